//! A ReLU whose backward its reader's data gradient does, as it does on a GPU alone: the gradients of the net in which every layer
//! does its own.

use crate::emulator;
use crate::step::value;
use crate::values::{Values, distance, download};
use lockstep::config::raw;
use lockstep::device::Place;
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::Element;
use lockstep::model::net::{Net, Options};
use lockstep::model::precision::Precision;
use lockstep::model::spec::NetSpec;
use lockstep::model::{Pass, layers};

const BATCH: usize = 3;

const CONV: &str = "filters = 9\nkernel = 3\npadding = 1";
const RELU: &str = "filters = 8\nkernel = 3\npadding = 1\nactivation = \"relu\"";
/// More zeros behind the image than in front: a copy of it is made, and no product reads the image itself.
const ARRANGED: &str = "filters = 4\nkernel = 2\npadding = \"same\"";

/// A chain of (type, keys) with a linear layer behind it.
fn net(chain: &[(&'static str, &str)]) -> NetSpec {
    let head = [("flatten", ""), ("linear", "units = 4")];
    let layers = chain.iter().chain(&head).enumerate().map(|(number, (kind, keys))| raw::LayerEntry {
        name: format!("layer{number}"),
        kind,
        from: Vec::new(),
        parsed: (layers::find(kind).expect("a layer").parse)(toml::from_str(keys).expect("TOML")).expect("valid keys"),
    });
    NetSpec::new(&raw::Model { input: [7, 6, 3], layers: layers.collect() }).expect("a net that fits")
}

#[test]
fn a_relu_done_by_a_convolution_gives_the_same_gradients() {
    let Some(gpu) = emulator::gpu() else { return };
    // And the layers that leave their ReLU to the reader.
    let nets = [
        (net(&[("conv2d", RELU), ("conv2d", RELU), ("conv2d", CONV)]), vec![0, 1]),
        (net(&[("conv2d", CONV), ("batch_norm", "activation = \"relu\""), ("conv2d", RELU)]), vec![1]),
        (net(&[("conv2d", CONV), ("relu", ""), ("conv2d", CONV)]), vec![1]),
        (net(&[("conv2d", RELU), ("conv2d", ARRANGED)]), vec![]),
    ];
    for (spec, expected) in nets {
        assert!(spec.nodes.iter().all(|node| !node.grad_masked), "on the CPU: {:?}", spec.nodes);
        let fused = spec.clone().on(Place::Cuda);
        let found: Vec<usize> = (0..fused.nodes.len()).filter(|&node| fused.nodes[node].grad_masked).collect();
        assert_eq!(found, expected, "{:?}", spec.nodes);
        let mut separate = spec;
        separate.nodes.iter_mut().for_each(|node| node.inferred.can_mask_input_on_gpu = false);
        for (precision, limit) in [(Precision::F32, 1e-6), (Precision::Bf16, 1e-2), (Precision::Fp16, 1e-3)] {
            let [fused, separate] = [&fused, &separate].map(|spec| gradients(&gpu, spec.clone(), precision));
            let error = distance(&fused, &separate);
            println!("{expected:?} in {precision:?}: {error:e}");
            assert!(error < limit && fused.iter().any(|x| *x != 0.0), "{expected:?} in {precision:?}: {error}");
        }
    }
}

/// Of all parameters.
fn gradients(gpu: &Gpu, spec: NetSpec, precision: Precision) -> Vec<f32> {
    let options =
        Options { batch: BATCH, place: Place::Cuda, seed: 3, precision, training: true, ..Options::default() };
    let images =
        Values::of(gpu, &(0..BATCH * spec.input.len()).map(|i| value(i, 1.0)).collect::<Vec<_>>(), precision.element());
    let mut net = Net::new(spec, &options).unwrap();
    let grads = gpu.allocate(net.table().len() * size_of::<f32>()).unwrap();
    let pass = Pass { batch: BATCH, training: true, first_sample: 0, share: 1.0 };
    net.forward(&pass, images.slice()).unwrap();
    let outputs = BATCH * net.spec().output().len();
    let of_loss = Values::of(gpu, &(0..outputs).map(|i| value(7 * i + 3, 1.0)).collect::<Vec<_>>(), Element::F32);
    // SAFETY: both live until `download` has waited.
    unsafe { gpu.compute().copy(of_loss.slice(), net.output_and_gradient(&pass).1) }.unwrap();
    net.backward(&pass, images.slice(), &grads, |_| Ok(())).unwrap();
    download(gpu, &grads)
}
