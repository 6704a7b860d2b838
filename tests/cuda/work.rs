//! Memory, copies, events, modules and launches, on the stub.

use crate::harness::under_the_stub;
use cudarc::{driver, nvrtc};
use half::bf16;
use lockstep::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use lockstep::device::cuda::{Elementwise, Gpu, Memory};
use lockstep::device::{self, Arena, Place, Slice, SliceMut};
use lockstep::error::Kind;
use lockstep::model::layers;
use lockstep::model::{Backward, Build, Forward, Pass, Shape};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

/// Counts this thread's allocations; those of the stub, a library of its own, are not among them.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

static SCALE: Source = Source {
    name: "scale",
    text: "#include \"common.cuh\"\nextern \"C\" __global__ void scale(const T* x, T* y, float factor, u64 n) {}\n",
};

type Scale = Kernel<(Read<T>, Write<T>, f32, u64)>;

#[test]
fn memory_is_zeroed_copied_and_given_back() {
    under_the_stub("", || {
        let gpu = Gpu::take(0).unwrap();
        let before = gpu.memory().unwrap();
        assert_eq!(before, Memory { free: 1 << 30, total: 1 << 30 });
        let values: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let mut back = vec![f32::NAN; values.len()];

        let [one, other] = [0, 1].map(|_| device::allocate(Place::Cuda, 4000).unwrap());
        // SAFETY: each part is used by the call at hand alone.
        let (read, write) = unsafe { (|| one.slice(0..4000), || one.slice_mut(0..4000)) };
        gpu.compute().copy_and_wait(read(), SliceMut::from(&mut back[..])).unwrap();
        assert!(back.iter().all(|value| *value == 0.0), "memory of the GPU comes zeroed");

        gpu.copies().copy_and_wait(Slice::from(&values[..]), write()).unwrap();
        // SAFETY: as above.
        let (copy, copied) = unsafe { (other.slice_mut(0..4000), other.slice(0..4000)) };
        gpu.compute().copy_and_wait(read(), copy).unwrap();
        gpu.compute().copy_and_wait(copied, SliceMut::from(&mut back[..])).unwrap();
        assert_eq!(back, values);

        let pinned = gpu.allocate_pinned(4000).unwrap();
        // SAFETY: as above.
        let (staging, staged) = unsafe { (pinned.slice_mut(0..4000), pinned.slice(0..4000)) };
        assert!(staged.f32().iter().all(|value| *value == 0.0), "pinned memory comes zeroed, and the CPU reads it");
        gpu.copies().copy_and_wait(read(), staging).unwrap();
        assert_eq!(staged.f32(), values);
        let slice = read();
        assert!(std::panic::catch_unwind(|| slice.f32()[0]).is_err(), "a CPU kernel must not read the GPU's memory");

        drop((one, other, pinned));
        assert_eq!(gpu.memory().unwrap(), before);
    });
}

#[test]
fn host_memory_is_pinned_while_it_is_registered() {
    under_the_stub("", || {
        let gpu = Gpu::take(0).unwrap();
        let [some, none] = [4000, 0].map(|bytes| Arc::new(Arena::host(bytes).unwrap()));
        let registered = [gpu.register(&some).unwrap(), gpu.register(&none).unwrap()];
        assert_eq!(registered_bytes(), 4000 + 1);
        let error = gpu.register(&some).err().unwrap().to_string();
        let expected = "pinning 4000 bytes of host memory: CUDA's cuMemHostRegister failed with";
        assert!(error.starts_with(expected) && error.contains("(712)"), "{error}");
        drop((some, none, registered));
        assert_eq!(registered_bytes(), 0);
    });
}

#[test]
fn host_memory_that_cannot_be_pinned_is_an_error() {
    under_the_stub("register", || {
        let gpu = Gpu::take(0).unwrap();
        let error = gpu.register(&Arc::new(Arena::host(64).unwrap())).err().unwrap();
        assert!(error.to_string().starts_with("pinning 64 bytes of host memory"), "{error}");
        assert_eq!((error.kind(), registered_bytes()), (Kind::Device, 0));
    });
}

#[test]
fn out_of_memory_says_how_much_was_asked_for_and_is_free() {
    under_the_stub("", || {
        let gpu = Gpu::take(0).unwrap();
        let _most = gpu.allocate(900 << 20).unwrap();
        let error = gpu.allocate(200 << 20).err().unwrap();
        let expected =
            "out of memory on GPU 0 (Stub): 200.0 MiB were asked for at once, 124.0 MiB of 1024.0 MiB are free";
        assert!(error.to_string().starts_with(expected), "{error}");
        assert_eq!(error.kind(), Kind::Device);
    });
}

#[test]
fn a_gpu_that_is_not_there_is_refused() {
    under_the_stub("", || {
        let error = Gpu::take(3).err().unwrap().to_string();
        assert_eq!(error, "there is no GPU 3: this process sees 1 (nvidia-smi -L)");
        let error = device::allocate(Place::Cuda, 8).err().unwrap().to_string();
        assert!(error.contains("before this rank took one"), "{error}");
    });
}

#[test]
fn events_order_streams_and_measure() {
    under_the_stub("", || {
        let gpu = Gpu::take(0).unwrap();
        let (start, end, copied) = (gpu.timer().unwrap(), gpu.timer().unwrap(), gpu.event().unwrap());
        gpu.compute().record(&start).unwrap();
        gpu.copies().record(&copied).unwrap();
        gpu.compute().wait_for(&copied).unwrap();
        gpu.compute().record(&end).unwrap();
        end.wait().unwrap();
        assert!(copied.is_done().unwrap() && gpu.copies().is_done().unwrap());
        assert!(end.ms_since(&start).unwrap() >= 0.0);
    });
}

#[test]
fn a_source_is_compiled_once_for_each_type_and_its_kernels_are_launched() {
    under_the_stub("", || {
        let gpu = Gpu::take(0).unwrap();
        let elements = [Element::F32, Element::Bf16, Element::F32];
        let [scale, other, again]: [Scale; 3] =
            elements.map(|element| gpu.module(&SCALE, element).unwrap().kernel("scale").unwrap());
        assert_eq!(compilations(), 2);
        let memory = gpu.allocate(64).unwrap();
        for kernel in [&scale, &other, &again] {
            // SAFETY: the stub runs nothing.
            let arguments = unsafe { (memory.slice(0..32).into(), (&mut memory.slice_mut(32..64)).into(), 2.0, 8) };
            // SAFETY: as above.
            unsafe { kernel.launch(gpu.compute(), gpu.grid_over(8), arguments) }.unwrap();
        }
        assert_eq!(launches(), 3);
    });
}

#[test]
fn launches_copies_and_events_allocate_nothing_after_the_first() {
    under_the_stub("", || {
        let gpu = Gpu::take(0).unwrap();
        let elementwise = Elementwise::new(&gpu, Element::F32).unwrap();
        let (memory, event) = (gpu.allocate(64).unwrap(), gpu.event().unwrap());
        // SAFETY: the stub runs nothing, and copies at once.
        let step = || unsafe {
            elementwise.fill(memory.slice_mut(0..64), 1.0).unwrap();
            gpu.copies().copy(memory.slice(0..32), memory.slice_mut(32..64)).unwrap();
            gpu.copies().record(&event).unwrap();
            gpu.compute().wait_for(&event).unwrap();
        };
        step();
        let before = ALLOCATIONS.get();
        (0..10).for_each(|_| step());
        assert_eq!(ALLOCATIONS.get(), before);
        assert_eq!(launches(), 11);
    });
}

#[test]
fn a_launch_with_other_arguments_than_declared_or_with_host_memory_is_a_bug() {
    under_the_stub("", || {
        let gpu = Gpu::take(0).unwrap();
        let module = gpu.module(&SCALE, Element::F32).unwrap();
        let wrong = || module.kernel::<(Read<T>, Write<T>, f32, u32)>("scale").map(drop);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(wrong)).is_err());
        let host = [0.0f32; 4];
        assert!(std::panic::catch_unwind(|| Read::<T>::from(Slice::from(&host[..]))).is_err());
    });
}

#[test]
fn a_failed_launch_names_the_kernel() {
    under_the_stub("launch", || {
        let gpu = Gpu::take(0).unwrap();
        let elementwise = Elementwise::new(&gpu, Element::F32).unwrap();
        let memory = gpu.allocate(64).unwrap();
        // SAFETY: the stub runs nothing.
        let error = unsafe { elementwise.fill(memory.slice_mut(0..64), 1.0) }.unwrap_err().to_string();
        let expected =
            "CUDA's cuLaunchKernel failed with CUDA_ERROR_LAUNCH_FAILED (719), said by the stub; an earlier kernel";
        assert!(error.starts_with("launching fill over Grid") && error.contains(expected), "{error}");
    });
}

#[test]
fn an_error_in_a_source_comes_with_the_compilers_log() {
    under_the_stub("compile", || {
        let gpu = Gpu::take(0).unwrap();
        let error = gpu.module(&SCALE, Element::F32).err().unwrap();
        assert_eq!(error.kind(), Kind::Internal);
        let expected = "scale.cu for sm_90: some.cu(3): error: planted by the stub; 1 error";
        assert!(error.to_string().ends_with(expected), "{error}");
    });
}

/// Those that have kernels: built by the registry, their kernels are found and launched.
#[test]
fn layers_launch_their_kernels() {
    under_the_stub("", || {
        let gpu = Gpu::take(0).unwrap();
        let bytes = 1024;
        let arenas: Vec<_> = (0..6).map(|_| gpu.allocate(bytes).unwrap()).collect();
        // SAFETY: the stub runs nothing.
        let (read, write) = unsafe { (|i: usize| arenas[i].slice(0..bytes), |i: usize| arenas[i].slice_mut(0..bytes)) };
        let values = [(false, bytes / size_of::<f32>()), (true, bytes / size_of::<bf16>())];
        // Kernels in forward and in backward: the add of three inputs copies two of their gradients.
        let cases = [("relu", 1, "", [1, 1]), ("sigmoid", 1, "", [1, 1]), ("tanh", 1, "", [1, 1])];
        for (kind, inputs, keys, expected) in cases.into_iter().chain([("add", 3, "activation = \"relu\"", [2, 1])]) {
            for (is_bf16, count) in values {
                let shapes = vec![Shape::vector(count); inputs];
                let spec = (layers::find(kind).unwrap().parse)(toml::from_str(keys).unwrap()).unwrap().spec;
                spec.infer(&shapes).unwrap();
                let build = Build { inputs: &shapes, batch: 1, place: Place::Cuda, ..Build::default() };
                let mut layer = if is_bf16 { spec.build_bf16(&build) } else { spec.build(&build) }.unwrap();
                let pass = Pass { batch: 1, training: true, first_sample: 0, share: 1.0 };
                let before = launches();
                let inputs: Vec<Slice<'_>> = (0..inputs).map(read).collect();
                let (output, saved, scratch) = (write(3), SliceMut::empty(), SliceMut::empty());
                let io = Forward { inputs: &inputs, output, params: &[], params_bf16: &[], saved, scratch };
                layer.begin(&pass).unwrap();
                layer.forward(&pass, io).unwrap();
                let after_forward = launches();
                let mut grad_inputs: Vec<SliceMut<'_>> = (0..inputs.len()).map(write).collect();
                let io = Backward {
                    inputs: &[],
                    output: read(3),
                    grad_output: write(4),
                    grad_inputs: &mut grad_inputs,
                    params: &[],
                    params_bf16: &[],
                    grad_params: &mut [],
                    factors: SliceMut::empty(),
                    saved: Slice::empty(),
                    scratch: SliceMut::empty(),
                };
                layer.backward(&pass, io).unwrap();
                let counted = [after_forward - before, launches() - after_forward];
                assert_eq!(counted, expected, "{kind}, bf16: {is_bf16}");
            }
        }
    });
}

fn launches() -> usize {
    // SAFETY: a function of the stub.
    unsafe { driver::sys::culib().get::<unsafe extern "C" fn() -> usize>("stub_launches").unwrap()() }
}

/// Of host memory.
fn registered_bytes() -> usize {
    // SAFETY: as above.
    unsafe { driver::sys::culib().get::<unsafe extern "C" fn() -> usize>("stub_registered").unwrap()() }
}

fn compilations() -> usize {
    // SAFETY: as above.
    unsafe { nvrtc::sys::culib().get::<unsafe extern "C" fn() -> usize>("stub_compilations").unwrap()() }
}
