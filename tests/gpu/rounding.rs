//! In bf16 a GPU multiplies by rounded weights; a CPU without instructions for it multiplies by those in f32. What comes out in
//! front of a batch normalisation differs little, but some of its values change their sign behind it, and so does what a ReLU lets
//! through: the gradients in front differ by some percent. With weights that are bf16 values both compute the same.

use crate::emulator;
use crate::layers::relative_error;
use crate::values::{Values, download};
use half::bf16;
use lockstep::config::raw;
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::Element;
use lockstep::device::{self, Place, Slice, SliceMut};
use lockstep::model::net::{Net, Options};
use lockstep::model::params::Param;
use lockstep::model::precision::Precision;
use lockstep::model::spec::NetSpec;
use lockstep::model::{Pass, layers};
use lockstep::rng::{Purpose, Rng};

const BATCH: usize = 16;

#[test]
fn gradients_in_bf16_are_those_of_the_cpu_where_weights_are_bf16_values() {
    let Some(gpu) = emulator::gpu() else { return };
    for rounded in [true, false] {
        let [on_cpu, on_gpu] = [Place::Host, Place::Cuda].map(|place| gradients(place, &gpu, rounded));
        for ((name, expected), (_, found)) in on_cpu.iter().zip(&on_gpu) {
            let error = relative_error(found, expected);
            println!("weights rounded before: {rounded:<5} {name:<20} {error:.2e}");
            assert!(error < 0.02 || !rounded, "{name} differs by {error:e}");
        }
    }
}

/// Two convolutions, each with batch normalisation and ReLU behind it.
fn spec() -> NetSpec {
    let layers = [
        ("conv2d", "filters = 8\nkernel = 5\nstride = 4\nbias = false"),
        ("batch_norm", "activation = \"relu\""),
        ("conv2d", "filters = 8\nkernel = 3\npadding = \"same\"\nbias = false"),
        ("batch_norm", "activation = \"relu\""),
        ("flatten", ""),
        ("linear", "units = 10"),
    ];
    let entry = |(number, (kind, keys)): (usize, (&'static str, &str))| raw::LayerEntry {
        name: format!("layer{number}"),
        kind,
        from: Vec::new(),
        parsed: (layers::find(kind).unwrap().parse)(toml::from_str(keys).unwrap()).unwrap(),
    };
    NetSpec::new(&raw::Model { input: [32, 32, 3], layers: layers.into_iter().enumerate().map(entry).collect() })
        .unwrap()
}

/// Of each parameter, in canonical order, by its name.
fn gradients(place: Place, gpu: &Gpu, rounded: bool) -> Vec<(String, Vec<f32>)> {
    let options = Options {
        batch: BATCH,
        place,
        threads: 1,
        seed: 3,
        precision: Precision::Bf16,
        training: true,
        ..Options::default()
    };
    let mut net = Net::new(spec(), &options).unwrap();
    if rounded {
        net.edit_params(|_, params| params.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32())).unwrap();
    }
    let pass = Pass { batch: BATCH, training: true, first_sample: 0, share: 1.0 };
    let values = normal(1, BATCH * net.spec().input.len());
    // To a GPU they come rounded; the net on the CPU rounds them itself.
    let on_gpu = Values::of(gpu, &values, Element::Bf16);
    let images = if place == Place::Host { Slice::from(&values[..]) } else { on_gpu.slice() };
    net.forward(&pass, images).unwrap();
    write_normal(gpu, 2, net.output_and_gradient(&pass).1);
    let grads = device::allocate(place, 4 * net.table().len_with_tail()).unwrap();
    net.backward(&pass, images, &grads, |_| Ok(())).unwrap();
    let values: Vec<f32> = match place {
        // SAFETY: backward is over.
        Place::Host => unsafe { grads.slice(0..grads.bytes()) }.f32().to_vec(),
        Place::Cuda => download(gpu, &grads),
    };
    let canonical = |param: &Param| {
        let mut canonical = vec![0.0; param.range.len()];
        param.spec.to_canonical(&values[param.range.clone()], &mut canonical);
        (param.name.clone(), canonical)
    };
    net.table().params.iter().map(canonical).collect()
}

fn normal(number: u32, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    Rng::new(5, Purpose::Test, number, 0).fill_normal(1.0, &mut values);
    values
}

fn write_normal(gpu: &Gpu, number: u32, mut to: SliceMut<'_>) {
    let values = normal(number, to.bytes() / 4);
    match to.place() {
        Place::Host => to.f32().copy_from_slice(&values),
        Place::Cuda => gpu.compute().copy_and_wait(Slice::from(&values[..]), to).unwrap(),
    }
}
