//! Times of single layers, one line for each layer, batch and product: `cargo bench --bench kernels [-- NAME...]`.
//! Each time is the least of many calls within a fifth of a second, on one thread, and of that thread's CPU time, so that
//! what else the machine does costs nothing here but cache. `GB/s` counts every buffer of the call once.
//! `scripts/peers/kernels.sh` runs the same layers in PyTorch, in turns with these.
//!
//! Products: `forward`; `weight`, backward without the gradient of the input; `backward`, all of it.

use lockstep::config::raw;
use lockstep::device::{Arena, Slice, SliceMut};
use lockstep::model::kernels::gemm::{self, Kernel, Left, Out, Right, Store, strided};
use lockstep::model::loss::Loss;
use lockstep::model::{Backward, Build, Forward, Inferred, Layer, Pass, Shape, layers};
use lockstep::rng::{Purpose, Rng};
use rustix::time::{ClockId, clock_gettime};

/// name, batches, inputs, their (side, channels), type and keys
type Case = (&'static str, &'static [usize], usize, (usize, usize), &'static str, &'static str);

const CASES: &[Case] = &[
    ("fashion1", &[64], 1, (28, 1), "conv2d", "filters = 32\nkernel = 3\npadding = 1"),
    ("fashion2", &[64], 1, (28, 32), "conv2d", "filters = 32\nkernel = 3\npadding = 1"),
    ("fashion3", &[64], 1, (14, 32), "conv2d", "filters = 64\nkernel = 3\npadding = 1"),
    ("fashion4", &[64], 1, (14, 64), "conv2d", "filters = 64\nkernel = 3\npadding = 1"),
    ("fashion5", &[64], 1, (7, 64), "conv2d", "filters = 128\nkernel = 3\npadding = 1"),
    ("fashion6", &[64], 1, (1, 3136), "linear", "units = 128"),
    ("fashion7", &[64], 1, (1, 128), "linear", "units = 10"),
    ("depthwise", &[64], 1, (14, 64), "conv2d", "filters = 64\nkernel = 3\npadding = 1\ngroups = 64"),
    // AlexNet (2012) on one tower.
    ("conv1", &[32], 1, (227, 3), "conv2d", "filters = 96\nkernel = 11\nstride = 4\nactivation = \"relu\""),
    ("conv2", &[32], 1, (27, 96), "conv2d", "filters = 256\nkernel = 5\npadding = 2\nactivation = \"relu\""),
    ("conv3", &[32], 1, (13, 256), "conv2d", "filters = 384\nkernel = 3\npadding = 1\nactivation = \"relu\""),
    ("conv4", &[32], 1, (13, 384), "conv2d", "filters = 384\nkernel = 3\npadding = 1\nactivation = \"relu\""),
    ("conv5", &[32], 1, (13, 384), "conv2d", "filters = 256\nkernel = 3\npadding = 1\nactivation = \"relu\""),
    ("pool1", &[32, 128], 1, (55, 96), "max_pool", "size = 3\nstride = 2"),
    ("pool2", &[32, 128], 1, (27, 256), "max_pool", "size = 3\nstride = 2"),
    ("pool5", &[32, 128], 1, (13, 256), "max_pool", "size = 3\nstride = 2"),
    ("lrn1", &[32, 128], 1, (27, 96), "lrn", ""),
    ("lrn2", &[32, 128], 1, (13, 256), "lrn", ""),
    ("flatten", &[32, 128], 1, (6, 256), "flatten", ""),
    ("dropout6", &[32, 128], 1, (1, 4096), "dropout", ""),
    ("fc6", &[32, 128], 1, (1, 9216), "linear", "units = 4096\nactivation = \"relu\""),
    ("fc7", &[32, 128], 1, (1, 4096), "linear", "units = 4096\nactivation = \"relu\""),
    ("fc8", &[32, 128], 1, (1, 4096), "linear", "units = 1000"),
    // Layers of other nets, at the size of AlexNet's second convolution.
    ("avg_pool", &[32], 1, (27, 256), "avg_pool", "size = 3\nstride = 2"),
    ("relu", &[32], 1, (27, 256), "relu", ""),
    ("sigmoid", &[32], 1, (27, 256), "sigmoid", ""),
    ("tanh", &[32], 1, (27, 256), "tanh", ""),
    ("dropout", &[32], 1, (27, 256), "dropout", ""),
    ("add", &[32], 2, (27, 256), "add", ""),
    ("add_relu", &[32], 2, (27, 256), "add", "activation = \"relu\""),
    ("batchnorm", &[32], 1, (27, 256), "batch_norm", "activation = \"relu\""),
];

/// name, (M, K, N): products C = A B with a packed B. Winograd's F(4x4, 3x3) has 36 of them for a layer.
const PRODUCTS: &[(&str, (usize, usize, usize))] = &[
    ("winograd3", (512, 256, 384)),
    ("winograd4", (512, 384, 384)),
    ("winograd5", (512, 384, 256)),
    ("square", (768, 768, 768)),
];

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let is_chosen = |case: &str| chosen.is_empty() || chosen.iter().any(|name| case.starts_with(name.as_str()));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread");
    println!("{:10} {:>6} {:9} {:>10} {:>9} {:>7}", "layer", "batch", "product", "ms", "GFLOP/s", "GB/s");
    pool.install(|| {
        for case in CASES.iter().filter(|case| is_chosen(case.0)) {
            case.1.iter().for_each(|&batch| run_layer(case, batch));
        }
        for (name, size) in PRODUCTS.iter().filter(|(name, _)| is_chosen(name)) {
            run_product(name, *size);
        }
        if is_chosen("loss") {
            run_loss();
        }
    });
}

fn report(name: &str, batch: usize, product: &str, seconds: f64, flops: f64, bytes: usize) {
    let (ms, gflops, rate) = (seconds * 1e3, flops / seconds / 1e9, bytes as f64 / seconds / 1e9);
    println!("{name:10} {batch:6} {product:9} {ms:10.4} {gflops:9.1} {rate:7.1}");
}

fn run_layer(&(name, _, inputs, (side, channels), kind, keys): &Case, batch: usize) {
    let input = Shape::new(side, side, channels);
    let spec =
        (layers::find(kind).expect("registered").parse)(toml::from_str(keys).expect("TOML")).expect("valid").spec;
    let inputs = vec![input; inputs];
    let inferred = spec.infer(&inputs).expect("fits");
    let build = Build { inputs: &inputs, batch, threads: 1, ..Build::default() };
    let values = |shape: &Shape| random(batch * shape.len());
    let mut bench = Bench {
        layer: spec.build(&build).expect("builds"),
        batch,
        x: inputs.iter().map(values).collect(),
        y: values(&inferred.output),
        saved: random((batch * inferred.saved_bytes + inferred.saved_bytes_fixed).div_ceil(4)),
        params: inferred.params.iter().map(|param| random(param.len())).collect(),
        grads: inferred.params.iter().map(|param| random(param.len())).collect(),
        dx: inputs.iter().map(values).collect(),
        dy: values(&inferred.output),
        scratch: random(0),
        inferred,
    };
    bench.scratch = random(bench.layer.scratch_bytes() / 4);

    let flops = (bench.inferred.forward_flops * batch as u64) as f64;
    let bytes = |buffers: &[Buffer]| buffers.iter().map(|buffer| buffer.0.bytes()).sum::<usize>();
    let (x, y, params) = (bytes(&bench.x), bench.y.0.bytes(), bytes(&bench.params));
    let (saved, reads) = (bench.saved.0.bytes(), &bench.inferred);
    let read = y + saved + if reads.backward_reads_input { x } else { 0 };
    let read = read + if reads.backward_reads_output { y } else { 0 };

    report(name, batch, "forward", least(|| bench.forward()), flops, x + y + params + saved);
    if params > 0 {
        report(name, batch, "weight", least(|| bench.backward(false)), flops, read + params);
    }
    let products = if params > 0 { 2.0 } else { 1.0 };
    report(name, batch, "backward", least(|| bench.backward(true)), products * flops, read + x + 2 * params);
}

fn run_product(name: &str, (m, k, n): (usize, usize, usize)) {
    let kernel = Kernel::best();
    let (a, b, mut c) = (random(m * k), random(k * n), random(m * n));
    let mut packed = vec![0.0; gemm::packed_len(kernel, k, n)];
    let right = Right { data: b.read().f32(), rows: &strided(k, n), step: 1, n };
    gemm::pack(kernel, right, None, &mut packed);
    let (rows, cols, c_rows) = (strided(m, k), strided(k, 1), strided(m, n));
    let seconds = least(|| {
        let left = Left { data: a.read().f32(), rows: &rows, cols: &cols };
        let out = Out { data: c.write().into_f32(), rows: &c_rows };
        gemm::multiply(kernel, left, &packed, n, out, Store::default());
    });
    report(name, m, "product", seconds, 2.0 * (m * k * n) as f64, 4 * (m * k + k * n + m * n));
}

fn run_loss() {
    let classes = 1000;
    let config: raw::Loss = toml::from_str("type = \"softmax_cross_entropy\"").expect("TOML");
    let loss = Loss::new(&config, classes, None).expect("valid");
    for batch in [32, 128] {
        let (outputs, mut grad) = (random(batch * classes), random(batch * classes));
        let labels: Vec<u32> = (0..batch as u32).map(|n| n * 37 % 1000).collect();
        let seconds = least(|| {
            loss.forward_backward(outputs.read(), &labels, 1.0 / batch as f32, grad.write());
        });
        report("loss", batch, "both", seconds, 0.0, outputs.0.bytes() + grad.0.bytes());
    }
}

struct Bench {
    layer: Box<dyn Layer>,
    inferred: Inferred,
    batch: usize,
    x: Vec<Buffer>,
    y: Buffer,
    saved: Buffer,
    params: Vec<Buffer>,
    grads: Vec<Buffer>,
    dx: Vec<Buffer>,
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
            inputs: &read(&self.x),
            output: self.y.write(),
            params: &read(&self.params),
            params_rounded: &[],
            saved: self.saved.write(),
            scratch: self.scratch.write(),
        };
        self.layer.forward(&pass, io).expect("runs");
    }

    fn backward(&mut self, data: bool) {
        let pass = self.pass();
        let io = Backward {
            inputs: &read(&self.x),
            output: if self.inferred.backward_reads_output { self.y.read() } else { Slice::empty() },
            grad_output: self.dy.write(),
            grad_inputs: &mut (self.dx.iter_mut())
                .map(|dx| if data { dx.write() } else { SliceMut::empty() })
                .collect::<Vec<_>>(),
            params: &read(&self.params),
            params_rounded: &[],
            grad_params: &mut self.grads.iter_mut().map(Buffer::write).collect::<Vec<_>>(),
            factors: SliceMut::empty(),
            input_sums: SliceMut::empty(),
            saved: self.saved.read(),
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

fn read(buffers: &[Buffer]) -> Vec<Slice<'_>> {
    buffers.iter().map(Buffer::read).collect()
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
    let (start, mut least) = (cpu_seconds(), f64::INFINITY);
    while cpu_seconds() - start < 0.2 {
        let begin = cpu_seconds();
        call();
        least = least.min(cpu_seconds() - begin);
    }
    least
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
