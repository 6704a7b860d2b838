//! Samples made on the GPU against those that the CPU makes, bit for bit.

use crate::emulator;
use half::bf16;
use lockstep::config::raw::{Augment, Statistics};
use lockstep::data::augment::cuda::{OnGpu, Placement};
use lockstep::data::augment::{Augmenter, Workspace};
use lockstep::data::image::Image;
use lockstep::data::{Dataset, Reading};
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::Element;
use lockstep::device::{Arena, Slice};
use lockstep::error::Result;
use lockstep::model::Shape;

const SEED: u64 = 11;
const EPOCH: u32 = 2;
const NORMALIZE: Augment = Augment::Normalize { statistics: Statistics::TrainingSet, mean: None, std: None };

/// Images whose bytes all differ from their neighbours'.
struct Images {
    shape: Shape,
    bytes: Vec<u8>,
}

impl Images {
    const LEN: usize = 5;

    fn new(shape: Shape) -> Images {
        Images { shape, bytes: (0..Images::LEN * shape.len()).map(|at| (at * 37 + at / 7) as u8).collect() }
    }
}

impl Dataset for Images {
    fn len(&self) -> usize {
        Images::LEN
    }
    fn shape(&self) -> Option<Shape> {
        Some(self.shape)
    }
    fn classes(&self) -> usize {
        1
    }
    fn label(&self, _: usize) -> u32 {
        0
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        image.reshape(self.shape).copy_from_slice(&self.bytes[index * self.shape.len()..][..self.shape.len()]);
        Ok(Reading::Whole)
    }
}

#[test]
fn samples_have_the_bits_of_the_cpus() {
    let Some(gpu) = emulator::gpu() else { return };
    let (crop, flip) = (|| Augment::RandomCrop { padding: 2 }, || Augment::HorizontalFlip {});
    let light = || Augment::Lighting { std: 0.1 };
    let shapes = [Shape::new(7, 5, 1), Shape::new(5, 8, 3), Shape::new(6, 16, 3), Shape::new(3, 4, 6)];
    for shape in shapes {
        check(&gpu, shape, &[]);
        check(&gpu, shape, &[crop(), flip(), NORMALIZE]);
        check(&gpu, shape, &[NORMALIZE, crop()]);
        if shape.c == 3 {
            check(&gpu, shape, &[light(), NORMALIZE, flip(), crop()]);
        }
    }
}

/// Two samples of each image, in another order than they lie in.
fn check(gpu: &Gpu, shape: Shape, steps: &[Augment]) {
    let images = Images::new(shape);
    let augmenter = Augmenter::new(steps, &images, shape).unwrap();
    let samples: Vec<(u32, u64)> =
        (0..2 * Images::LEN).map(|i| ((i * 3 % Images::LEN) as u32, 1000 + i as u64)).collect();
    let placement = |&(image, index): &(u32, u64)| augmenter.placement(shape, image, (SEED, EPOCH, index)).unwrap();
    let placements: Vec<Placement> = samples.iter().map(placement).collect();
    let on_gpu = |bytes: &[u8]| {
        let mut host = Arena::host(bytes.len()).unwrap();
        emulator::whole_mut(&mut host).u8().copy_from_slice(bytes);
        emulator::upload(gpu, &host)
    };
    let (pixels, placements) = (on_gpu(&images.bytes), on_gpu(bytemuck::cast_slice(&placements)));

    let expected = samples.iter().flat_map(|&(image, index)| {
        let (mut read, mut out) = (Image::default(), vec![f32::NAN; shape.len()]);
        images.read(image as usize, &mut read).unwrap();
        augmenter.apply(&read, &mut Workspace::default(), &mut out, (SEED, EPOCH, index)).unwrap();
        out
    });
    let expected: Vec<f32> = expected.collect();
    for element in [Element::F32, Element::Bf16] {
        let augment = OnGpu::new(gpu, &augmenter, shape, element).unwrap();
        let mut out = on_gpu(&vec![0xFF; expected.len() * element.bytes()]);
        let [pixels, placements]: [Slice; 2] = [&pixels, &placements].map(emulator::whole);
        // SAFETY: nothing is touched until `download` has waited for the stream.
        unsafe { augment.apply(pixels, placements, emulator::whole_mut(&mut out)) }.unwrap();
        let out = emulator::download(gpu, &out);
        let out = emulator::whole(&out);
        let found: Vec<f32> = match element {
            Element::F32 => out.f32().to_vec(),
            _ => out.bf16().iter().map(|value| value.to_f32()).collect(),
        };
        let rounded = |value: f32| if element == Element::F32 { value } else { bf16::from_f32(value).to_f32() };
        assert_eq!(found.len(), expected.len());
        for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(*found, rounded(*expected), "value {at} of {shape}, {steps:?} in {element:?}");
        }
    }
}
