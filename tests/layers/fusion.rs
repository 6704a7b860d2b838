//! A ReLU whose backward its reader does: equal bits to the net in which every layer does its own.

use crate::harness::values;
use lockstep::config::raw;
use lockstep::device::{Arena, Place};
use lockstep::model::layers;
use lockstep::model::net::{Net, Options};
use lockstep::model::precision::Precision;
use lockstep::model::spec::NetSpec;

const BATCH: usize = 3;

/// From a chain of (type, keys, what it reads: nothing for the layer before).
fn spec(entries: &[(&'static str, &str, &[&str])]) -> NetSpec {
    let layers = entries.iter().enumerate().map(|(number, (kind, keys, from))| raw::LayerEntry {
        name: format!("layer{number}"),
        kind,
        from: from.iter().map(|name| (*name).to_owned()).collect(),
        parsed: (layers::find(kind).expect("a layer").parse)(toml::from_str(keys).expect("TOML")).expect("valid keys"),
    });
    NetSpec::new(&raw::Model { input: [9, 9, 3], layers: layers.collect() }).expect("a net that fits")
}

const CONV: &str = "filters = 18\nkernel = 3\npadding = 1";
const CONV_RELU: &str = "filters = 18\nkernel = 3\npadding = 1\nactivation = \"relu\"";
const POOL: &str = "size = 3\nstride = 2";

/// The nets, and which of their layers leave their ReLU to the reader.
fn nets() -> Vec<(NetSpec, Vec<usize>)> {
    let head: [(&str, &str, &[&str]); 2] = [("flatten", "", &[]), ("linear", "units = 4", &[])];
    let net = |body: &[(&'static str, &'static str, &'static [&'static str])]| spec(&[body, &head].concat());
    vec![
        (net(&[("conv2d", CONV_RELU, &[]), ("max_pool", POOL, &[]), ("lrn", "", &[])]), vec![0]),
        (net(&[("conv2d", CONV_RELU, &[]), ("lrn", "alpha = 0.1", &[]), ("max_pool", POOL, &[])]), vec![0]),
        (net(&[("conv2d", CONV, &[]), ("relu", "", &[]), ("max_pool", POOL, &[])]), vec![1]),
        (net(&[("conv2d", CONV, &[]), ("batch_norm", "activation = \"relu\"", &[]), ("max_pool", POOL, &[])]), vec![1]),
        (
            net(&[
                ("conv2d", CONV, &[]),
                ("conv2d", CONV, &[]),
                ("add", "activation = \"relu\"", &["layer0", "layer1"]),
                ("max_pool", "size = 2\nstride = 1", &[]),
            ]),
            vec![2],
        ),
        // Two readers: each would mask its own share only, and the ReLU stays where it is.
        (
            net(&[
                ("conv2d", CONV_RELU, &[]),
                ("max_pool", "size = 3\nstride = 1\npadding = 1", &[]),
                ("add", "", &["layer0", "layer1"]),
            ]),
            vec![],
        ),
        // A byte cannot say "none" of 256 taps, and an average needs what it does not keep.
        (net(&[("conv2d", CONV_RELU, &[]), ("max_pool", "size = 16\npadding = 8\nstride = 4", &[])]), vec![]),
        (net(&[("conv2d", CONV_RELU, &[]), ("avg_pool", POOL, &[])]), vec![]),
        (net(&[("conv2d", "filters = 18\nkernel = 3\nactivation = \"tanh\"", &[]), ("max_pool", POOL, &[])]), vec![]),
    ]
}

#[test]
fn a_relu_done_by_its_reader_changes_no_bit() {
    for (spec, handed_over) in nets() {
        let found: Vec<usize> = (0..spec.nodes.len()).filter(|&node| spec.nodes[node].grad_masked).collect();
        assert_eq!(found, handed_over, "{:?}", spec.nodes);
        // What backward does not read, the memory plan need not keep.
        assert!(found.iter().all(|&node| !spec.nodes[node].inferred.backward_reads_output), "{:?}", spec.nodes);
        let mut separate = spec.clone();
        for node in &mut separate.nodes {
            node.inferred.backward_reads_output |= node.grad_masked;
            (node.grad_masked, node.masks_input) = (false, false);
        }
        for precision in [Precision::F32, Precision::Bf16] {
            let (fused, separate) = (gradients(spec.clone(), precision), gradients(separate.clone(), precision));
            let same = fused.iter().zip(&separate).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same && fused.iter().any(|x| *x != 0.0), "{precision:?} {:?}", spec.nodes);
        }
    }
}

/// Of all parameters.
fn gradients(spec: NetSpec, precision: Precision) -> Vec<f32> {
    let options = Options {
        batch: BATCH,
        place: Place::Host,
        threads: 1,
        seed: 3,
        precision,
        training: true,
        ..Options::default()
    };
    let mut net = Net::new(spec, &options).expect("a small net");
    let pass = crate::harness::training(BATCH);
    let images = values(BATCH * net.spec().input.len(), 1);
    net.forward(&pass, (&images[..]).into()).expect("forward");
    let (output, mut grad) = net.output_and_gradient(&pass);
    grad.f32().copy_from_slice(&values(output.f32().len(), 5));
    let bytes = 4 * net.table().len_with_tail();
    let grads = Arena::host(bytes).expect("memory");
    net.backward(&pass, (&images[..]).into(), &grads, |_| Ok(())).expect("backward");
    // SAFETY: backward is over.
    unsafe { grads.slice(0..bytes) }.f32().to_vec()
}

/// A bias's gradient is its reader's to make where that sees the gradient as it is behind the ReLU's backward.
#[test]
fn a_max_pool_makes_the_gradient_of_a_bias_in_front() {
    let conv_without_bias = &format!("{CONV_RELU}\nbias = false");
    for (keys, pool, summed) in [
        (CONV_RELU, POOL, true),
        (CONV, POOL, true),
        (conv_without_bias, POOL, false),
        ("filters = 18\nkernel = 3\nactivation = \"tanh\"", POOL, false),
        // It leaves the ReLU where it is.
        (CONV_RELU, "size = 16\npadding = 8\nstride = 4", false),
        (CONV, "size = 16\npadding = 8\nstride = 4", true),
    ] {
        let spec = spec(&[("conv2d", keys, &[]), ("max_pool", pool, &[])]);
        assert_eq!((spec.nodes[0].grad_summed, spec.nodes[1].sums_input), (summed, summed), "{keys}, {pool}");
    }
}
