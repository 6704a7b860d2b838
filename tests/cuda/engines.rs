//! The real cuDNN, asked what it would run on an H200, which needs no GPU: for every convolution of the configurations there
//! are engines that keep our rules. Without a GPU it tells of those that come compiled, not of those that it compiles itself.

use lockstep::device::cuda::cudnn::{Convolution, Graph, Handle, Product, Rules, first};
use lockstep::device::cuda::kernels::Element;
use lockstep::device::cuda::libraries;
use std::sync::Arc;

/// As cuDNN writes them.
const H200: &str = r#"{"deviceName": "NVIDIA H200", "deviceVer": 900, "smVersion": 900, "driverVer": 13000,
    "multiProcessorCount": 132, "smCountOrigin": 0, "smClockRateKHz": 1980000, "memClockRateKHz": 3201000,
    "l2CacheSize": 62914560, "totalGlobalMem": 150000000000, "warpSize": 32, "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048, "maxCtasPerSM": 32, "maxBlockSize": [1024, 1024, 64],
    "maxGridSize": [2147483647, 65535, 65535], "regsPerBlock": 65536, "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448, "reservedSharedMemoryPerBlock": 1024,
    "oversizedSharedMemoryPerBlock": 0, "supportCoopLaunch": 1, "isTccDriver": 0, "pciDeviceId": 0, "cudaDeviceId": 0}"#;

/// Name, batch, input, filters, kernel, zeros on each side.
type Case = (&'static str, usize, [usize; 3], usize, usize, usize);

/// Stride 1: AlexNet's first layer comes as arranged.
const CASES: [Case; 12] = [
    ("alexnet conv1", 512, [57, 57, 48], 96, 3, 0),
    ("alexnet conv2", 512, [27, 27, 96], 256, 5, 2),
    ("alexnet conv3", 512, [13, 13, 256], 384, 3, 1),
    ("alexnet conv4", 512, [13, 13, 384], 384, 3, 1),
    ("alexnet conv5", 512, [13, 13, 384], 256, 3, 1),
    ("quickstart conv1", 128, [32, 32, 3], 16, 3, 1),
    ("quickstart conv2", 128, [16, 16, 16], 32, 3, 1),
    ("quickstart conv3", 128, [8, 8, 32], 64, 3, 1),
    ("quickstart conv4", 128, [8, 8, 64], 64, 3, 1),
    ("fashion-mnist conv1", 128, [28, 28, 1], 32, 3, 1),
    ("fashion-mnist conv2", 128, [14, 14, 32], 64, 3, 1),
    ("fashion-mnist conv3", 128, [7, 7, 64], 128, 3, 1),
];

fn convolution((_, batch, input, filters, kernel, zeros): Case) -> Convolution {
    let [height, width, _] = input;
    let output = |length: usize| length + 2 * zeros - kernel + 1;
    Convolution {
        batch,
        input,
        output: [output(height), output(width), filters],
        kernel: [kernel; 2],
        stride: [1; 2],
        before: [zeros; 2],
        after: [zeros; 2],
        groups: 1,
    }
}

/// The products of a layer with bias and ReLU. Where one has several forms, one of them must be there.
const PRODUCTS: [(&str, &[Product]); 3] = [
    ("forward", &[Product::Forward { bias: true, relu: true }]),
    ("by the input", &[Product::Data { mask: true }, Product::Data { mask: false }]),
    ("by the weight", &[Product::Weight { wide: true }, Product::Weight { wide: false }]),
];

#[test]
fn cudnn_has_engines_for_every_convolution_of_the_configurations() {
    // cuDNN opens these two by their names.
    let found = libraries::nvrtc().and(libraries::cublas_lt()).and(libraries::cudnn());
    let device = match found.and_then(|_| Handle::described(H200)) {
        Ok(device) => device,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let mut missing = Vec::new();
    for case in CASES {
        for (element, tf32) in
            [(Element::F32, false), (Element::F32, true), (Element::Bf16, false), (Element::F16, false)]
        {
            for (what, products) in PRODUCTS {
                let rules = Rules { nondeterministic: false, tf32, direct: false, workspace: workspace(element) };
                let plans = products.iter().map(|&product| {
                    let graph = Graph::new(&device, convolution(case), product, element).map(Arc::new);
                    (product, graph.and_then(|graph| first(&graph, rules)))
                });
                let mut found = false;
                for (product, plan) in plans {
                    let answer = match &plan {
                        Ok(plan) => format!("{}, {} MiB", plan.name(), plan.workspace_bytes() >> 20),
                        Err(_) => "none".to_owned(),
                    };
                    println!("{:<20} {element:?}, tf32 {tf32:<5} {product:?}: {answer}", case.0);
                    found |= plan.is_ok();
                }
                if !found {
                    missing.push(format!("{} {what} in {element:?}, tf32 {tf32}", case.0));
                }
            }
        }
    }
    assert!(missing.is_empty(), "no engine for\n{}", missing.join("\n"));
}

/// As of the layer, on a GPU with this much memory.
fn workspace(element: Element) -> usize {
    if element == Element::F32 { 1 << 30 } else { 128 << 20 }
}
