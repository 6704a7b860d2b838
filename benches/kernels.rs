//! GFLOP/s of the convolutions and linear layers of two networks, one line a layer: `cargo bench --bench kernels [-- NAME]`.
//! Each time is the least of many calls within half a second, on one thread. `scripts/peers` has the same for PyTorch.

use lockstep::device::{Arena, Place, Slice, SliceMut};
use lockstep::model::{Backward, Build, Forward, Layer, Pass, Shape, layers};
use lockstep::rng::{Purpose, Rng};
use std::time::{Duration, Instant};

/// name, batch, input (side, channels), type and keys
type Case = (&'static str, usize, (usize, usize), &'static str, &'static str);

const CASES: &[Case] = &[
    ("fashion1", 64, (28, 1), "conv2d", "filters = 32\nkernel = 3\npadding = 1"),
    ("fashion2", 64, (28, 32), "conv2d", "filters = 32\nkernel = 3\npadding = 1"),
    ("fashion3", 64, (14, 32), "conv2d", "filters = 64\nkernel = 3\npadding = 1"),
    ("fashion4", 64, (14, 64), "conv2d", "filters = 64\nkernel = 3\npadding = 1"),
    ("fashion5", 64, (7, 64), "conv2d", "filters = 128\nkernel = 3\npadding = 1"),
    ("fashion6", 64, (1, 3136), "linear", "units = 128"),
    ("fashion7", 64, (1, 128), "linear", "units = 10"),
    ("depthwise", 64, (14, 64), "conv2d", "filters = 64\nkernel = 3\npadding = 1\ngroups = 64"),
    ("2012-1", 32, (227, 3), "conv2d", "filters = 96\nkernel = 11\nstride = 4"),
    ("2012-2", 32, (27, 96), "conv2d", "filters = 256\nkernel = 5\npadding = 2"),
    ("2012-3", 32, (13, 256), "conv2d", "filters = 384\nkernel = 3\npadding = 1"),
    ("2012-4", 32, (13, 384), "conv2d", "filters = 384\nkernel = 3\npadding = 1"),
    ("2012-5", 32, (13, 384), "conv2d", "filters = 256\nkernel = 3\npadding = 1"),
    ("alexnet1", 32, (224, 3), "conv2d", "filters = 64\nkernel = 11\nstride = 4\npadding = 2"),
    ("alexnet2", 32, (27, 64), "conv2d", "filters = 192\nkernel = 5\npadding = 2"),
    ("alexnet3", 32, (13, 192), "conv2d", "filters = 384\nkernel = 3\npadding = 1"),
    ("alexnet4", 32, (13, 384), "conv2d", "filters = 256\nkernel = 3\npadding = 1"),
    ("alexnet5", 32, (13, 256), "conv2d", "filters = 256\nkernel = 3\npadding = 1"),
    ("alexnet6", 32, (1, 9216), "linear", "units = 4096"),
    ("alexnet7", 32, (1, 4096), "linear", "units = 4096"),
    ("alexnet8", 32, (1, 4096), "linear", "units = 1000"),
];

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    println!("{:10} {:>20} {:>20} {:>20}", "", "forward", "backward, weight", "backward, both");
    for case in CASES.iter().filter(|case| chosen.is_empty() || chosen.iter().any(|name| case.0.starts_with(name))) {
        pool.install(|| run(case));
    }
}

fn run(&(name, batch, (side, channels), kind, keys): &Case) {
    let input = Shape::new(side, side, channels);
    let spec =
        (layers::find(kind).expect("registered").parse)(toml::from_str(keys).expect("TOML")).expect("valid").spec;
    let inferred = spec.infer(&[input]).expect("fits");
    let build = Build { inputs: &[input], batch, place: Place::Host, threads: 1, seed: 1, layer: 0 };
    let mut bench = Bench {
        layer: spec.build(&build).expect("builds"),
        batch,
        x: random(batch * input.len()),
        y: random(batch * inferred.output.len()),
        params: inferred.params.iter().map(|param| random(param.len())).collect(),
        grads: inferred.params.iter().map(|param| random(param.len())).collect(),
        dx: random(batch * input.len()),
        dy: random(batch * inferred.output.len()),
        scratch: random(0),
    };
    bench.scratch = random(bench.layer.scratch_bytes() / 4);

    let flops = (inferred.forward_flops * batch as u64) as f64;
    let forward = least(|| bench.forward());
    let weight = least(|| bench.backward(false));
    let both = least(|| bench.backward(true));
    let column =
        |seconds: f64, products: f64| format!("{:9.3} ms {:7.1}", seconds * 1e3, products * flops / seconds / 1e9);
    println!("{name:10} {:>20} {:>20} {:>20}", column(forward, 1.0), column(weight, 1.0), column(both, 2.0));
}

struct Bench {
    layer: Box<dyn Layer>,
    batch: usize,
    x: Buffer,
    y: Buffer,
    params: Vec<Buffer>,
    grads: Vec<Buffer>,
    dx: Buffer,
    dy: Buffer,
    scratch: Buffer,
}

impl Bench {
    fn pass(&self) -> Pass {
        Pass { batch: self.batch, training: true, first_sample: 0, share: 1.0 }
    }

    fn forward(&mut self) {
        let pass = self.pass();
        let io = Forward {
            inputs: &[self.x.read()],
            output: self.y.write(),
            params: &[self.params[0].read(), self.params[1].read()],
            params_bf16: &[],
            saved: SliceMut::empty(),
            scratch: self.scratch.write(),
        };
        self.layer.forward(&pass, io).expect("runs");
    }

    fn backward(&mut self, data: bool) {
        let pass = self.pass();
        let [weight, bias] = &mut self.grads[..] else { panic!("a weight and a bias") };
        let io = Backward {
            inputs: &[self.x.read()],
            output: Slice::empty(),
            grad_output: self.dy.write(),
            grad_inputs: &mut [if data { self.dx.write() } else { SliceMut::empty() }],
            params: &[self.params[0].read(), self.params[1].read()],
            params_bf16: &[],
            grad_params: &mut [weight.write(), bias.write()],
            saved: Slice::empty(),
            scratch: self.scratch.write(),
        };
        self.layer.backward(&pass, io).expect("runs");
    }
}

/// Aligned memory, as the net's.
struct Buffer(Arena);

fn random(len: usize) -> Buffer {
    let buffer = Buffer(Arena::host(4 * len).expect("memory"));
    let mut rng = Rng::new(1, Purpose::Test, 0, len as u64);
    // SAFETY: nobody else has the arena yet.
    unsafe { buffer.0.slice_mut(0..4 * len) }.f32().iter_mut().for_each(|x| *x = rng.range(-1.0, 1.0));
    buffer
}

impl Buffer {
    fn read(&self) -> Slice<'_> {
        // SAFETY: `write` needs the buffer mutably.
        unsafe { self.0.slice(0..self.0.bytes()) }
    }
    fn write(&mut self) -> SliceMut<'_> {
        // SAFETY: borrowed mutably.
        unsafe { self.0.slice_mut(0..self.0.bytes()) }
    }
}

/// Seconds of the fastest call.
fn least(mut call: impl FnMut()) -> f64 {
    call();
    let (start, mut least) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < Duration::from_millis(500) {
        let begin = Instant::now();
        call();
        least = least.min(begin.elapsed().as_secs_f64());
    }
    least
}
