use super::*;
use crate::config::raw::Augment;
use crate::data::memory::InMemory;
use crate::data::order;
use crate::model::Shape;
use std::collections::HashSet;
use std::sync::atomic::AtomicUsize;

const SEED: u64 = 3;
const SHAPE: Shape = Shape::new(4, 4, 1);
/// The sample that a failing set cannot read, and the one that it panics on.
const UNREADABLE: usize = 17;
const PANICKING: usize = 23;

/// Images that tell their index, read after a delay that differs from sample to sample.
#[derive(Default)]
struct Slow {
    len: usize,
    failing: bool,
    damaged: Vec<usize>,
    reads: AtomicUsize,
}

impl Dataset for Slow {
    fn len(&self) -> usize {
        self.len
    }
    fn shape(&self) -> Option<Shape> {
        Some(SHAPE)
    }
    fn classes(&self) -> usize {
        10
    }
    fn label(&self, index: usize) -> u32 {
        (index % 10) as u32
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        let read = self.reads.fetch_add(1, Relaxed);
        // Every read of a sample waits differently, so runs differ in which worker is first.
        std::thread::sleep(Duration::from_micros((index * 7919 + read * 104_729) as u64 % 300));
        if self.failing && index == UNREADABLE {
            return Err(Error::data(format!("images.bin: image {index} is damaged")));
        }
        assert!(!self.failing || index != PANICKING, "planted panic");
        image.reshape(SHAPE).iter_mut().enumerate().for_each(|(at, out)| *out = byte(index, at));
        if self.damaged.contains(&index) {
            return Ok(Reading::Damaged(Error::data(format!("{index}.jpg: no image"))));
        }
        Ok(Reading::Whole)
    }
}

/// What sample `index` holds.
fn byte(index: usize, at: usize) -> u8 {
    (index * 31 + at * 5) as u8
}

fn slow(len: usize) -> Arc<Slow> {
    Arc::new(Slow { len, ..Slow::default() })
}

fn loader(workers: usize, prefetch: usize) -> Loader {
    let steps = [Augment::RandomCrop { padding: 1 }, Augment::HorizontalFlip {}];
    let augmenter = Augmenter::new(&steps, &*slow(1), SHAPE).unwrap();
    Loader {
        augmenter,
        form: Form::Values,
        sampler: raw::Sampler::Shuffle,
        seed: SEED,
        workers,
        prefetch,
        skipped: Arc::default(),
    }
}

fn batching(global: usize, micro: Option<usize>, rank: usize, size: usize) -> Batching {
    Batching { global, micro, rank, size }
}

/// Everything that a batch says.
type Told = ([usize; 5], Vec<u32>, Vec<u32>, Vec<f32>);

fn told(batch: &Batch) -> Told {
    let place = [batch.epoch as usize, batch.step, batch.micro, batch.position, batch.step_count];
    (place, batch.indices.clone(), batch.labels.clone(), batch.values().to_vec())
}

fn collect(mut queue: DataQueue) -> Vec<Told> {
    let mut all = Vec::new();
    while let Some(batch) = queue.next().unwrap() {
        all.push(told(batch));
    }
    assert!(queue.next().unwrap().is_none(), "the end stays the end");
    all
}

/// What the queue should give, made one sample after another.
fn plainly(set: &Slow, batching: Batching, start: Position, epochs: u32) -> Vec<Told> {
    let augmenter = loader(1, 1).augmenter;
    let mut all = Vec::new();
    for epoch in start.epoch..epochs {
        let mut order = vec![0; set.len];
        order::shuffle(&mut order, SEED, epoch);
        let mut consumed = if epoch == start.epoch { start.consumed } else { 0 };
        while consumed < set.len {
            let step = batching.step(set.len, consumed);
            for micro in batching.micros() {
                let positions = batching.positions(&step, micro);
                let place = [epoch as usize, consumed / batching.global, micro, positions.start, step.len()];
                let indices = order[positions].to_vec();
                let labels = indices.iter().map(|&index| set.label(index as usize)).collect();
                let mut images = vec![0.0; indices.len() * SHAPE.len()];
                for (&index, out) in indices.iter().zip(images.chunks_exact_mut(SHAPE.len())) {
                    let mut image = Image::default();
                    set.read(index as usize, &mut image).unwrap();
                    augmenter.apply(&image, &mut Workspace::default(), out, (SEED, epoch, index.into())).unwrap();
                }
                all.push((place, indices, labels, images));
            }
            consumed = step.end;
        }
    }
    all
}

#[test]
fn any_number_of_workers_gives_the_plain_order_of_batches() {
    for (micro, start) in [(None, Position::default()), (Some(4), Position { epoch: 1, consumed: 32 })] {
        let expected = plainly(&slow(90), batching(16, micro, 1, 2), start, 3);
        for (workers, prefetch) in [(1, 1), (1, 4), (3, 1), (4, 6), (7, 3)] {
            let batching = batching(16, micro, 1, 2);
            let queue = DataQueue::train(slow(90), loader(workers, prefetch), batching, start, 3).unwrap();
            assert!(collect(queue) == expected, "{workers} workers, {prefetch} ahead, micro {micro:?}");
        }
    }
}

#[test]
fn two_ranks_interrupted_and_resumed_on_four_use_every_sample_once() {
    let (samples, stopped) = (103, Position { epoch: 2, consumed: 48 });
    let mut used = Vec::new();
    for (size, start) in [(2, Position { epoch: 2, consumed: 0 }), (4, stopped)] {
        for rank in 0..size {
            let queue =
                DataQueue::train(slow(samples), loader(2, 3), batching(16, None, rank, size), start, 3).unwrap();
            let before = |told: &Told| size == 4 || told.0[1] * 16 < stopped.consumed;
            used.extend(collect(queue).into_iter().filter(before).flat_map(|told| told.1));
        }
    }
    used.sort();
    assert!(used.iter().copied().eq(0..samples as u32), "{used:?}");
}

#[test]
fn a_position_at_the_end_of_an_epoch_goes_on_with_the_next_and_one_beyond_is_refused() {
    let at = |consumed| {
        DataQueue::train(slow(20), loader(1, 1), batching(8, None, 0, 1), Position { epoch: 0, consumed }, 2)
    };
    assert_eq!(at(20).unwrap().next().unwrap().unwrap().epoch, 1);
    let error = at(21).err().unwrap().to_string();
    assert!(error.contains("21 samples into epoch 0, but the training set has only 20"), "{error}");
}

#[test]
fn evaluation_reads_every_sample_once_in_order_without_augmentation() {
    let mut indices = Vec::new();
    for rank in 0..3 {
        for (place, part, labels, images) in
            collect(DataQueue::eval(slow(50), loader(3, 2), 8, rank, 3, Vec::new()).unwrap())
        {
            assert_eq!(place[3..], [part[0] as usize, part.len()]);
            assert!(part.len() <= 8 && labels.len() == part.len());
            for (&index, image) in part.iter().zip(images.chunks_exact(SHAPE.len())) {
                let plain: Vec<f32> = (0..SHAPE.len()).map(|at| f32::from(byte(index as usize, at)) / 255.0).collect();
                assert_eq!(image, plain);
            }
            indices.extend(part);
        }
    }
    assert!(indices.into_iter().eq(0..50));
}

#[test]
fn an_evaluation_gets_by_with_the_buffers_of_the_one_before() {
    let evaluate = |buffers| {
        let mut queue = DataQueue::eval(slow(50), loader(3, 2), 8, 0, 1, buffers).unwrap();
        let mut indices = Vec::new();
        while let Some(batch) = queue.next().unwrap() {
            indices.extend_from_slice(&batch.indices);
        }
        assert!(indices.into_iter().eq(0..50));
        queue.take_buffers()
    };
    let addresses = |buffers: &[Batch]| buffers.iter().map(|batch| batch.values().as_ptr()).collect::<HashSet<_>>();
    let first = evaluate(Vec::new());
    let before = addresses(&first);
    assert_eq!(before.len(), 4, "of each worker, and the one in the step's hands");
    assert_eq!(addresses(&evaluate(first)), before);
}

#[test]
fn an_error_or_a_panic_comes_with_the_step_that_needed_the_sample() {
    let set = Arc::new(Slow { len: 40, failing: true, ..Slow::default() });
    let mut queue = DataQueue::eval(set, loader(4, 6), 5, 0, 1, Vec::new()).unwrap();
    for step in 0..8 {
        let outcome = queue.next().map(|batch| batch.unwrap().indices.clone());
        match step {
            3 => {
                let error = outcome.unwrap_err();
                assert_eq!(error.kind(), Kind::Data);
                let expected = "sample 17, wanted in epoch 0 by step 3: images.bin: image 17 is damaged";
                assert_eq!(error.to_string(), expected);
            }
            4 => assert!(outcome.unwrap_err().to_string().contains("panicked")),
            _ => assert!(outcome.unwrap().into_iter().eq(step * 5..step * 5 + 5)),
        }
    }
    assert!(queue.next().unwrap().is_none());
}

#[test]
fn what_lies_ahead_comes_next_and_its_error_not_before() {
    let set = Arc::new(Slow { len: 40, failing: true, ..Slow::default() });
    let mut queue = DataQueue::eval(set, loader(2, 3), 5, 0, 1, Vec::new()).unwrap();
    for step in 0..8 {
        while !queue.ready(Duration::from_micros(50)) {}
        let ahead = queue.ahead().map(told);
        assert!(queue.ready(Duration::ZERO));
        match (step, queue.next()) {
            (3 | 4, outcome) => assert!(ahead.is_none() && outcome.is_err()),
            (_, outcome) => assert!(ahead == Some(told(outcome.unwrap().unwrap()))),
        }
    }
    assert!(queue.ahead().is_none() && queue.next().unwrap().is_none());
}

#[test]
fn workers_never_run_ahead_of_the_bound_and_buffers_go_round() {
    let (prefetch, set) = (3, slow(4000));
    let mut queue =
        DataQueue::train(set.clone(), loader(2, prefetch), batching(8, None, 0, 1), Position::default(), 1).unwrap();
    let mut buffers = HashSet::new();
    for taken in 1..=300 {
        let batch = queue.next().unwrap().unwrap();
        buffers.insert(batch.values().as_ptr());
        assert!(set.reads.load(Relaxed) <= (taken + prefetch) * 8);
    }
    assert!(buffers.len() <= prefetch + 1, "{} buffers", buffers.len());
}

#[test]
fn workers_prepare_as_many_batches_ahead_as_they_may() {
    let (prefetch, set) = (5, slow(400));
    let queue =
        DataQueue::train(set.clone(), loader(1, prefetch), batching(8, None, 0, 1), Position::default(), 1).unwrap();
    let start = std::time::Instant::now();
    while set.reads.load(Relaxed) < prefetch * 8 {
        assert!(start.elapsed() < Duration::from_secs(60), "{} samples were read", set.reads.load(Relaxed));
        std::thread::yield_now();
    }
    drop(queue);
}

/// Full, empty, in the middle of a read, ended: dropping returns. A hang here is what the test runner's limit catches.
#[test]
fn dropping_it_at_any_moment_stops_the_workers() {
    for moment in 0..200u64 {
        let set = slow(64);
        let mut queue =
            DataQueue::train(set.clone(), loader(3, 2), batching(8, None, 0, 1), Position::default(), 1).unwrap();
        for _ in 0..moment % 5 {
            queue.next().unwrap();
        }
        std::thread::sleep(Duration::from_micros(moment * 37 % 1000));
        drop(queue);
        assert_eq!(Arc::strong_count(&set), 1, "a worker outlived its queue");
    }
}

#[test]
fn ready_waits_no_longer_than_it_is_told() {
    let mut queue = DataQueue::eval(slow(20), loader(1, 1), 5, 0, 1, Vec::new()).unwrap();
    for _ in 0..4 {
        while !queue.ready(Duration::from_micros(50)) {}
        assert!(queue.next().unwrap().is_some());
    }
    while !queue.ready(Duration::from_micros(50)) {}
    assert!(queue.next().unwrap().is_none());
}

#[test]
fn batches_beyond_memory_are_an_error_not_an_abort() {
    let error = DataQueue::eval(slow(4), loader(1, 2), usize::MAX / 2, 0, 1, Vec::new())
        .err()
        .expect("there is not that much memory");
    assert!(error.kind() == Kind::Device && error.to_string().contains("lower data.prefetch"), "{error}");
}

/// Of 40 samples one is of class 0, so a balanced epoch has it 20 times: cropped and mirrored in many ways, not in one.
#[test]
fn a_sample_that_comes_again_in_an_epoch_is_augmented_anew() {
    let pixels = (0..40 * SHAPE.len()).map(|at| (at * 7) as u8).collect();
    let labels = (0..40).map(|index| u8::from(index > 0)).collect();
    let set = Arc::new(InMemory::new(SHAPE, 2, pixels, labels));
    let loader = Loader { sampler: raw::Sampler::Balanced, ..loader(2, 2) };
    let queue = DataQueue::train(set, loader, batching(8, None, 0, 1), Position::default(), 1).unwrap();
    let mut seen = Vec::new();
    for (_, indices, _, images) in collect(queue) {
        let images = indices.into_iter().zip(images.chunks_exact(SHAPE.len()));
        seen.extend(images.filter(|(index, _)| *index == 0).map(|(_, image)| image.to_vec()));
    }
    assert_eq!(seen.len(), 20);
    seen.sort_by(|a, b| a.partial_cmp(b).unwrap());
    seen.dedup();
    assert!(seen.len() > 8, "{} of the 18 ways", seen.len());
}

/// Labels are the index's last digit: 5, 15 and 25 are of one class.
fn damaged(damaged: &[usize]) -> Arc<Slow> {
    Arc::new(Slow { len: 40, damaged: damaged.to_vec(), ..Slow::default() })
}

#[test]
fn in_training_the_next_whole_image_of_the_class_stands_in_with_the_draws_of_the_damaged() {
    let loader = loader(3, 2);
    let (augmenter, skipped) = (loader.augmenter.clone(), loader.skipped.clone());
    let queue =
        DataQueue::train(damaged(&[5, 15, 39]), loader, batching(16, None, 0, 1), Position::default(), 2).unwrap();
    let mut seen = 0;
    for (place, indices, labels, images) in collect(queue) {
        for ((&index, label), image) in indices.iter().zip(labels).zip(images.chunks_exact(SHAPE.len())) {
            let shown = match index {
                5 | 15 => 25,
                39 => 9,
                whole => whole,
            };
            seen += u64::from(shown != index);
            let mut source = Image::default();
            source.reshape(SHAPE).iter_mut().enumerate().for_each(|(at, out)| *out = byte(shown as usize, at));
            let mut expected = vec![0.0; SHAPE.len()];
            let sample = (SEED, place[0] as u32, u64::from(index));
            augmenter.apply(&source, &mut Workspace::default(), &mut expected, sample).unwrap();
            assert_eq!((image, label), (&expected[..], index % 10), "sample {index} in epoch {}", place[0]);
        }
    }
    assert_eq!((seen, skipped.times()), (6, 6));
}

#[test]
fn in_evaluation_damaged_images_are_left_out() {
    for workers in [1, 4] {
        let loader = loader(workers, 2);
        let skipped = loader.skipped.clone();
        let out = [0, 1, 7, 16, 17, 18, 19, 20, 21, 22, 23, 39];
        let queue = DataQueue::eval(damaged(&out), loader, 8, 0, 1, Vec::new()).unwrap();
        let mut left: Vec<usize> = Vec::new();
        for (_, indices, labels, images) in collect(queue) {
            assert_eq!((labels.len(), images.len()), (indices.len(), indices.len() * SHAPE.len()));
            for ((&index, label), image) in indices.iter().zip(labels).zip(images.chunks_exact(SHAPE.len())) {
                let plain = (0..SHAPE.len()).map(|at| f32::from(byte(index as usize, at)) / 255.0);
                assert!(label == index % 10 && image.iter().copied().eq(plain), "sample {index}");
                left.push(index as usize);
            }
        }
        assert!(left.into_iter().eq((0..40).filter(|index| !out.contains(index))), "{workers} workers");
        assert_eq!(skipped.times(), 12);
    }
}

#[test]
fn a_class_without_a_whole_image_ends_the_run() {
    let set = damaged(&[5, 15, 25, 35]);
    let mut queue = DataQueue::train(set, loader(2, 2), batching(40, None, 0, 1), Position::default(), 1).unwrap();
    let error = queue.next().map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("no image of class 5 can stand in") && error.contains(".jpg: no image"), "{error}");
}

/// Eight samples, one of which waits until all others are done, which only other workers can do.
struct Waiting {
    slowest: usize,
    done: AtomicUsize,
    outcome: fn(usize) -> Result<Reading>,
}

impl Waiting {
    /// So large that a worker takes them on one by one.
    const SHAPE: Shape = Shape::new(256, 256, 1);

    /// One batch of all, by two workers.
    fn queue(slowest: usize, outcome: fn(usize) -> Result<Reading>) -> DataQueue {
        let set = Arc::new(Waiting { slowest, done: AtomicUsize::new(0), outcome });
        let augmenter = Augmenter::new(&[], &*set, Waiting::SHAPE).unwrap();
        DataQueue::eval(set, Loader { augmenter, ..loader(2, 1) }, 8, 0, 1, Vec::new()).unwrap()
    }
}

impl Dataset for Waiting {
    fn len(&self) -> usize {
        8
    }
    fn shape(&self) -> Option<Shape> {
        Some(Waiting::SHAPE)
    }
    fn classes(&self) -> usize {
        1
    }
    fn label(&self, _: usize) -> u32 {
        0
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        let start = std::time::Instant::now();
        while index == self.slowest && self.done.load(Relaxed) < 7 {
            assert!(start.elapsed() < Duration::from_secs(60), "the others wait for this one");
            std::thread::yield_now();
        }
        image.reshape(Waiting::SHAPE).fill(index as u8);
        self.done.fetch_add(1, Relaxed);
        (self.outcome)(index)
    }
}

#[test]
fn a_sample_that_takes_long_holds_up_no_other_of_its_batch() {
    let mut queue = Waiting::queue(0, |_| Ok(Reading::Whole));
    let images = queue.next().unwrap().unwrap().values().chunks_exact(Waiting::SHAPE.len());
    assert!(images.enumerate().all(|(index, image)| image[9] == index as f32 / 255.0));
}

#[test]
fn of_several_errors_the_first_samples_is_told_whenever_it_came() {
    for slowest in [0, 3] {
        let mut queue = Waiting::queue(slowest, |index| Err(Error::data(format!("image {index}"))));
        let error = queue.next().map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("sample 0, wanted"), "the last to fail is {slowest}: {error}");
    }
}

#[test]
fn damaged_images_are_left_out_in_whatever_order_they_are_found() {
    for slowest in [0, 3, 5] {
        let mut queue = Waiting::queue(slowest, |index| match index {
            2 | 5 => Ok(Reading::Whole),
            _ => Ok(Reading::Damaged(Error::data("no image"))),
        });
        let batch = queue.next().unwrap().unwrap();
        assert_eq!(batch.indices, [2, 5], "the last to be read is {slowest}");
        assert!(batch.values().chunks_exact(Waiting::SHAPE.len()).map(|image| image[9]).eq([2.0 / 255.0, 5.0 / 255.0]));
    }
}
