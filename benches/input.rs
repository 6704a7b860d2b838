//! Images that one core makes ready for training in a second, from files to normalised floats: read, decode, random resized
//! crop, flip, normalise.
//!
//!     cargo bench --bench input -- FOLDER [SIDE [SECONDS]]
//!
//! FOLDER is as for `format = "images"`; SIDE is the model's, 224 unless given. One pass over the folder warms up, then
//! whole passes are timed until SECONDS (5) are over, by the clock and by the CPU time that they took, which a busy machine
//! changes less. `scripts/peers/input.sh` runs it beside torchvision.

use lockstep::config::raw::{self, Augment, DataShared, Filter, ImageFolder};
use lockstep::data::augment::{Augmenter, Workspace};
use lockstep::data::image::Image;
use lockstep::data::{self, Dataset, Target};
use lockstep::model::Shape;
use std::time::{Duration, Instant};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let [folder, options @ ..] = &arguments[..] else {
        return eprintln!("usage: cargo bench --bench input -- FOLDER [SIDE [SECONDS]]");
    };
    let number = |place: usize, default| options.get(place).map_or(default, |text| text.parse().expect("a number"));
    let (side, seconds) = (number(0, 224), number(1, 5));

    let input = Shape::new(side, side, 3);
    let steps = [
        Augment::RandomResizedCrop { scale: [0.08, 1.0], ratio: [0.75, 4.0 / 3.0], filter: Filter::Bilinear },
        Augment::HorizontalFlip {},
        Augment::Normalize { statistics: raw::Statistics::Imagenet, mean: None, std: None },
    ];
    let folder = ImageFolder { path: folder.into(), labels: None, train_folder: None, test_folder: None, test: 0.0 };
    let data = raw::Data { format: raw::Format::Images(folder), shared: DataShared::default() };
    let set = data::open(&data, Target { input, outputs: 1 }, 0).expect("a folder of images").train;
    let augmenter = Augmenter::new(&steps, &*set, input).expect("steps that fit");

    let mut pass = Pass {
        set: &*set,
        augmenter,
        image: Image::default(),
        workspace: Workspace::default(),
        out: vec![0.0; input.len()],
    };
    pass.run(0);
    let (start, cpu, mut passes) = (Instant::now(), cpu_seconds(), 0);
    while start.elapsed() < Duration::from_secs(seconds as u64) {
        passes += 1;
        pass.run(passes);
    }
    let images = passes as usize * set.len();
    let rates = [start.elapsed().as_secs_f64(), cpu_seconds() - cpu].map(|seconds| images as f64 / seconds);
    println!("{:.1} images/s, {:.1} a second of CPU time", rates[0], rates[1]);
}

/// Of this process.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

struct Pass<'a> {
    set: &'a dyn Dataset,
    augmenter: Augmenter,
    image: Image,
    workspace: Workspace,
    out: Vec<f32>,
}

impl Pass<'_> {
    fn run(&mut self, epoch: u32) {
        for index in 0..self.set.len() {
            self.set.read(index, &mut self.image).expect("a whole image");
            let sample = (1, epoch, index as u64);
            self.augmenter.apply(&self.image, &mut self.workspace, &mut self.out, sample).expect("a sample");
        }
        std::hint::black_box(&self.out);
    }
}
