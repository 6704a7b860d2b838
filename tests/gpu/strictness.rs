//! The emulator notices what a GPU may not: else a test on it would prove little.

use crate::emulator::{self, whole, whole_mut};
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::{Element, Grid, Kernel, Source, T, Write};
use lockstep::device::{Arena, Place, Slice, SliceMut};
use lockstep::error::Result;

static FAULTY: Source = Source {
    name: "faulty",
    text: "#include \"common.cuh\"\n\
           extern \"C\" __global__ void one_beyond(T* x, u32 n) { map(n + 1, []() { return 1.0f; }, x); }\n\
           extern \"C\" __global__ void half_a_barrier(T* x, u32 n) { if (threadIdx.x < n) __syncthreads(); }\n",
};

#[test]
fn faults_are_noticed() {
    let Some(gpu) = emulator::gpu() else { return };
    if std::env::var_os("LOCKSTEP_TEST_GPU").is_some() {
        return eprintln!("skipped: the faults of these kernels are for the emulator");
    }
    let mut memory = gpu.allocate(10 * size_of::<f32>()).unwrap();
    let launch = |name| faulty(&gpu, name, whole_mut(&mut memory), 10);
    let [beyond, barrier] = ["one_beyond", "half_a_barrier"].map(launch);
    assert!(refused(beyond, "CUDA_ERROR_LAUNCH_FAILED"), "a write behind the end");
    assert!(refused(barrier, "CUDA_ERROR_LAUNCH_FAILED"), "a barrier for some threads");

    let mut host = Arena::host(44).unwrap();
    // SAFETY: never read by this process.
    let long = unsafe { Slice::from_raw(Place::Cuda, memory.address(), 44) };
    assert!(refused(gpu.compute().copy_and_wait(long, whole_mut(&mut host)), "CUDA_ERROR_INVALID_VALUE"));
    let freed = memory.address();
    drop(memory);
    // SAFETY: as above; that it is freed is the point.
    let freed = unsafe { SliceMut::from_raw(Place::Cuda, freed, 40) };
    let host = Arena::host(40).unwrap();
    assert!(refused(gpu.compute().copy_and_wait(whole(&host), freed), "CUDA_ERROR_INVALID_VALUE"), "freed memory");
}

fn faulty(gpu: &Gpu, name: &'static str, mut x: SliceMut<'_>, n: u32) -> Result<()> {
    let kernel: Kernel<(Write<T>, u32)> = gpu.module(&FAULTY, Element::F32)?.kernel(name)?;
    let grid = Grid { blocks: [1, 1, 1], threads: [32, 1, 1], shared_bytes: 0 };
    // SAFETY: none; the emulator is there to notice.
    unsafe { kernel.launch(gpu.compute(), grid, ((&mut x).into(), n)) }?;
    gpu.compute().wait()
}

fn refused(result: Result<()>, code: &str) -> bool {
    result.is_err_and(|error| error.to_string().contains(code))
}

/// A stream works as late as it may, so that one that should have waited for another comes too early.
#[test]
fn streams_wait_for_nobody_by_themselves() {
    if !emulator::is_lazy() {
        return eprintln!("skipped: only the emulator's streams are known to be late");
    }
    let Some(gpu) = emulator::alone("strictness::streams_wait_for_nobody_by_themselves") else { return };
    let (mut first, second) = (gpu.allocate(8).unwrap(), gpu.allocate(8).unwrap());
    let mut seen = gpu.allocate_pinned(8).unwrap();
    let mut ones = gpu.allocate_pinned(8).unwrap();
    whole_mut(&mut ones).f32().fill(1.0);
    // SAFETY: nothing is freed before the last wait.
    unsafe { gpu.compute().copy(whole(&ones), whole_mut(&mut first)) }.unwrap();
    let event = gpu.event().unwrap();
    gpu.compute().record(&event).unwrap();
    let mut pass_on = || {
        // SAFETY: as above; that `first` is used by two streams is the point.
        let to = unsafe { SliceMut::from_raw(Place::Cuda, second.address(), 8) };
        // SAFETY: as above.
        unsafe { gpu.copies().copy(whole(&first), to) }.unwrap();
        gpu.copies().copy_and_wait(whole(&second), whole_mut(&mut seen)).unwrap();
        whole(&seen).f32().to_vec()
    };
    assert_eq!(pass_on(), [0.0; 2], "without a wait");
    gpu.copies().wait_for(&event).unwrap();
    assert_eq!(pass_on(), [1.0; 2], "with a wait");
}
