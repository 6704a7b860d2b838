//! Once the queue is warm, batches come and go without a heap allocation, in any thread, over the epochs' borders too.

use lockstep::config::raw::{Augment, Format};
use lockstep::data;
use lockstep::data::augment::Augmenter;
use lockstep::data::partition::Batching;
use lockstep::data::queue::{DataQueue, Loader, Position};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_warm_queue_allocates_nothing() {
    let train = data::open(&Format::Shapes { train: 100, test: 1 }, 1).unwrap().train;
    let steps = [Augment::RandomCrop { padding: 4 }, Augment::HorizontalFlip {}, Augment::Normalize {}];
    // One worker: the first batch proves that its thread has started.
    let loader = Loader { augmenter: Augmenter::new(&steps, &*train).unwrap(), seed: 1, workers: 1, prefetch: 3 };
    let batching = Batching { global: 16, micro: Some(4), rank: 1, size: 2 };
    let mut queue = DataQueue::train(train, loader, batching, Position::default(), 20).unwrap();
    assert!(queue.next().unwrap().is_some());

    let before = ALLOCATIONS.load(SeqCst);
    let mut last = (0, 0);
    for _ in 0..200 {
        let batch = queue.next().unwrap().expect("20 epochs are 280 batches");
        last = (batch.epoch, batch.count());
    }
    let allocations = ALLOCATIONS.load(SeqCst) - before;
    assert_eq!(allocations, 0, "allocations in 200 batches up to epoch {}, the last of {} samples", last.0, last.1);
}
