//! Captures of streams, and launches of what was captured.

use crate::emulator::{self, whole, whole_mut};
use lockstep::device::cuda::kernels::{Element, Grid, Kernel, Source, T, Write};
use lockstep::device::cuda::{Capture, Gpu, Graph};
use lockstep::device::{Arena, SliceMut};
use lockstep::error::Result;

static SOURCE: Source = Source {
    name: "doubling",
    text: "#include \"common.cuh\"\n\
           extern \"C\" __global__ void twice(T* x, u32 n) { map(n, [](float x) { return 2 * x; }, x, x); }\n",
};

struct Doubling {
    kernel: Kernel<(Write<T>, u32)>,
}

impl Doubling {
    fn new(gpu: &Gpu) -> Doubling {
        Doubling { kernel: gpu.module(&SOURCE, Element::F32).unwrap().kernel("twice").unwrap() }
    }

    fn put(&self, gpu: &Gpu, mut x: SliceMut<'_>) -> Result<()> {
        let (n, grid) = ((x.bytes() / 4) as u32, Grid { blocks: [1; 3], threads: [32, 1, 1], shared_bytes: 0 });
        // SAFETY: the tests keep the memory until they have waited.
        unsafe { self.kernel.launch(gpu.compute(), grid, ((&mut x).into(), n)) }
    }
}

/// One captured in two streams: copy to the GPU, a kernel, copy back, in either of which the host has put other values since.
#[test]
fn a_graph_does_again_what_was_captured() {
    let Some(gpu) = emulator::alone("graphs::a_graph_does_again_what_was_captured") else { return };
    let doubling = Doubling::new(&gpu);
    let [mut from, mut to] = [(); 2].map(|()| gpu.allocate_pinned(40).unwrap());
    let mut x = gpu.allocate(40).unwrap();
    let [begun, copied] = [(); 2].map(|()| gpu.event().unwrap());
    let mut capture = || -> Result<Graph> {
        let (compute, copies) = (gpu.compute(), gpu.copies());
        let capture = Capture::begin(compute)?;
        compute.record(&begun)?;
        copies.wait_for(&begun)?;
        // SAFETY: nothing is freed before the last launch is over.
        unsafe { copies.copy(whole(&from), whole_mut(&mut x)) }?;
        copies.record(&copied)?;
        compute.wait_for(&copied)?;
        doubling.put(&gpu, whole_mut(&mut x))?;
        // SAFETY: as above.
        unsafe { compute.copy(whole(&x), whole_mut(&mut to)) }?;
        capture.end().map(|graph| graph.expect("there was work"))
    };
    let graph = capture().unwrap();
    gpu.compute().wait().unwrap();
    assert_eq!(whole(&to).f32(), [0.0; 10], "a capture is no launch");
    for value in [1.0, -3.0] {
        whole_mut(&mut from).f32().fill(value);
        // SAFETY: as above.
        unsafe { graph.launch(gpu.compute()) }.unwrap();
        gpu.compute().wait().unwrap();
        assert_eq!(whole(&to).f32(), [2.0 * value; 10]);
    }
}

/// What may not be captured is refused, and the streams are as before.
#[test]
fn a_capture_that_cannot_be_is_refused() {
    let Some(gpu) = emulator::alone("graphs::a_capture_that_cannot_be_is_refused") else { return };
    let doubling = Doubling::new(&gpu);
    let mut x = gpu.allocate(40).unwrap();
    let event = gpu.event().unwrap();
    let refused = |work: &mut dyn FnMut() -> Result<()>, code: &str| {
        let capture = Capture::begin(gpu.compute()).unwrap();
        let worked = work();
        let ended = capture.end().map(drop);
        let error = worked.and(ended).expect_err(code).to_string();
        assert!(error.contains(code), "{error}");
    };
    refused(&mut || gpu.compute().wait(), "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED");
    refused(&mut || gpu.allocate(4).map(drop), "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED");
    let mut fork = || {
        gpu.compute().record(&event)?;
        gpu.copies().wait_for(&event)?;
        // SAFETY: it is never launched.
        unsafe { gpu.copies().zero(whole_mut(&mut x)) }
    };
    refused(&mut fork, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED");
    let host = Arena::host(40).unwrap();
    // SAFETY: as above.
    let mut pageable = || unsafe { gpu.compute().copy(whole(&host), whole_mut(&mut x)) };
    if std::env::var_os("LOCKSTEP_TEST_GPU").is_none() {
        refused(&mut pageable, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED");
    }
    assert!(Capture::begin(gpu.compute()).unwrap().end().unwrap().is_none(), "of nothing");
    // One that is given up leaves nothing behind.
    drop(Capture::begin(gpu.compute()).unwrap());
    doubling.put(&gpu, whole_mut(&mut x)).unwrap();
    gpu.compute().wait().unwrap();
}
