//! Samples made on the GPU against those that the CPU makes, bit for bit: of images that lie there, and of what is cut out of
//! images of any size for it.

use crate::emulator;
use half::bf16;
use lockstep::config::raw::{self, Augment, Filter, Statistics};
use lockstep::data::augment::cuda::{OnGpu, Placement};
use lockstep::data::augment::{Augmenter, Workspace};
use lockstep::data::image::Image;
use lockstep::data::resident::Resident;
use lockstep::data::{Dataset, Reading};
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::Element;
use lockstep::device::{Arena, Slice};
use lockstep::error::Result;
use lockstep::model::Shape;

const SEED: u64 = 11;
const EPOCH: u32 = 2;
const NORMALIZE: Augment = Augment::Normalize { statistics: Statistics::TrainingSet, mean: None, std: None };

/// Images whose bytes all differ from their neighbours', each of its shape.
struct Images(Vec<Shape>);

impl Images {
    const LEN: usize = 5;

    fn alike(shape: Shape) -> Images {
        Images(vec![shape; Images::LEN])
    }
}

impl Dataset for Images {
    fn len(&self) -> usize {
        Images::LEN
    }
    fn shape(&self) -> Option<Shape> {
        self.0.iter().all(|shape| *shape == self.0[0]).then_some(self.0[0])
    }
    fn classes(&self) -> usize {
        1
    }
    fn label(&self, _: usize) -> u32 {
        0
    }
    fn read(&self, index: usize, image: &mut Image) -> Result<Reading> {
        let byte = |at: usize| ((at + index * 101) * 37 + at / 7) as u8;
        image.reshape(self.0[index]).iter_mut().enumerate().for_each(|(at, out)| *out = byte(at));
        Ok(Reading::Whole)
    }
}

#[test]
fn samples_of_images_on_the_gpu_have_the_bits_of_the_cpus() {
    let Some(gpu) = emulator::gpu() else { return };
    let (crop, flip) = (|| Augment::RandomCrop { padding: 2 }, || Augment::HorizontalFlip {});
    let light = || Augment::Lighting { std: 0.1 };
    let shapes = [Shape::new(7, 5, 1), Shape::new(5, 8, 3), Shape::new(6, 16, 3), Shape::new(3, 4, 6)];
    for shape in shapes {
        let images = Images::alike(shape);
        let resident = |steps: &[Augment]| {
            let augmenter = Augmenter::new(steps, &images, shape).unwrap();
            let resident = Resident::new(raw::Resident::On, &gpu, &images, &augmenter, "test").unwrap().unwrap();
            let placement =
                |(image, index)| augmenter.placement(image as u32, (SEED, EPOCH, index)).expect("of the model's shape");
            let placements: Vec<Placement> = samples().map(placement).collect();
            check(&gpu, &images, &augmenter, &placements, resident.pixels());
        };
        resident(&[]);
        resident(&[crop(), flip(), NORMALIZE]);
        resident(&[NORMALIZE, crop()]);
        if shape.c == 3 {
            resident(&[light(), NORMALIZE, flip(), crop()]);
        }
    }
}

/// Scaled, scaled and moved over the edge, as large as the model's input by chance, and as they are.
#[test]
fn what_is_cut_out_for_the_gpu_has_the_bits_of_the_cpus() {
    let Some(gpu) = emulator::gpu() else { return };
    let filter = Filter::Bilinear;
    let resize = |shorter| Augment::Resize { shorter, filter };
    let part = Augment::RandomResizedCrop { scale: [0.1, 1.0], ratio: [0.5, 2.0], filter };
    let (crop, flip) = (Augment::RandomCrop { padding: 2 }, Augment::HorizontalFlip {});
    let input = Shape::new(6, 8, 3);
    let shapes = [(6, 8), (8, 9), (30, 11), (7, 40), (8, 8)].map(|(h, w)| Shape::new(h, w, 3)).to_vec();
    let light = Augment::Lighting { std: 0.1 };
    for (images, steps) in [
        (Images(shapes.clone()), vec![]),
        (Images(shapes.clone()), vec![resize(8), crop.clone(), flip.clone(), NORMALIZE]),
        (Images(shapes), vec![part, flip.clone(), light, NORMALIZE]),
        (Images::alike(input), vec![crop, flip, NORMALIZE]),
    ] {
        let augmenter = Augmenter::new(&steps, &images, input).unwrap();
        let mut pixels = vec![0; 2 * Images::LEN * input.len()];
        let (mut read, mut workspace) = (Image::default(), Workspace::default());
        let cut = |(sample, (image, index)): (usize, (usize, u64))| {
            images.read(image, &mut read).unwrap();
            let out = (&mut pixels[sample * input.len()..][..input.len()], sample as u32);
            augmenter.cut(&read, &mut workspace, out, (SEED, EPOCH, index)).unwrap()
        };
        let placements: Vec<Placement> = samples().enumerate().map(cut).collect();
        let pixels = on_gpu(&gpu, &pixels);
        check(&gpu, &images, &augmenter, &placements, emulator::whole(&pixels));
    }
}

/// Two of each image, in another order than they lie in: the image, and the number that keys its draws.
fn samples() -> impl Iterator<Item = (usize, u64)> {
    (0..2 * Images::LEN).map(|i| (i * 3 % Images::LEN, 1000 + i as u64))
}

fn on_gpu(gpu: &Gpu, bytes: &[u8]) -> Arena {
    let mut host = Arena::host(bytes.len()).unwrap();
    emulator::whole_mut(&mut host).u8().copy_from_slice(bytes);
    emulator::upload(gpu, &host)
}

/// What the GPU makes of the pixels at these placements is what the CPU makes of `samples`.
fn check(gpu: &Gpu, images: &Images, augmenter: &Augmenter, placements: &[Placement], pixels: Slice<'_>) {
    let placements = on_gpu(gpu, bytemuck::cast_slice(placements));
    let expected = samples().flat_map(|(image, index)| {
        let (mut read, mut out) = (Image::default(), vec![f32::NAN; augmenter.output().len()]);
        images.read(image, &mut read).unwrap();
        augmenter.apply(&read, &mut Workspace::default(), &mut out, (SEED, EPOCH, index)).unwrap();
        out
    });
    let expected: Vec<f32> = expected.collect();
    for element in [Element::F32, Element::Bf16] {
        let augment = OnGpu::new(gpu, augmenter, element).unwrap();
        let mut out = on_gpu(gpu, &vec![0xFF; expected.len() * element.bytes()]);
        // SAFETY: nothing is touched until `download` has waited for the stream.
        unsafe { augment.apply(pixels, emulator::whole(&placements), emulator::whole_mut(&mut out)) }.unwrap();
        let out = emulator::download(gpu, &out);
        let out = emulator::whole(&out);
        let found: Vec<f32> = match element {
            Element::F32 => out.f32().to_vec(),
            _ => out.bf16().iter().map(|value| value.to_f32()).collect(),
        };
        let rounded = |value: f32| if element == Element::F32 { value } else { bf16::from_f32(value).to_f32() };
        assert_eq!(found.len(), expected.len());
        for (at, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(*found, rounded(*expected), "value {at} in {element:?} by {augmenter:?}");
        }
    }
}
