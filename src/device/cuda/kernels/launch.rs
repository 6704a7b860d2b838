//! A kernel and its launch. The arguments of a launch are a tuple of values; nothing is allocated.

use super::Module;
use crate::device::cuda::Gpu;
use crate::device::cuda::stream::Stream;
use crate::device::{Place, Slice, SliceMut};
use crate::error::Result;
use cudarc::driver::sys::CUfunction;
use half::{bf16, f16};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

/// A kernel that takes the arguments `A`, looked up by `Module::kernel`.
pub struct Kernel<A> {
    function: CUfunction,
    name: &'static str,
    _module: Arc<Module>,
    arguments: PhantomData<fn(A)>,
}

// SAFETY: a function belongs to its module, which any thread may use.
unsafe impl<A> Send for Kernel<A> {}
// SAFETY: as above.
unsafe impl<A> Sync for Kernel<A> {}

impl<A: Arguments> Kernel<A> {
    pub(super) fn new(function: CUfunction, name: &'static str, module: Arc<Module>) -> Self {
        Kernel { function, name, _module: module, arguments: PhantomData }
    }

    /// Puts the kernel into the stream.
    ///
    /// # Safety
    /// The kernel reads and writes no memory but what its arguments give it, as long as it says; until the stream has come
    /// past it, that stays allocated and is touched by nobody else.
    pub unsafe fn launch(&self, stream: &Stream, grid: Grid, arguments: A) -> Result<()> {
        let handle = stream.handle()?;
        let ([x, y, z], [threads_x, threads_y, threads_z]) = (grid.blocks, grid.threads);
        arguments
            .with_addresses(|addresses| {
                // SAFETY: the addresses are of values of the types that the kernel declares, which the call copies.
                unsafe {
                    call!(cuLaunchKernel(
                        self.function,
                        x,
                        y,
                        z,
                        threads_x,
                        threads_y,
                        threads_z,
                        grid.shared_bytes,
                        handle,
                        addresses.as_mut_ptr(),
                        ptr::null_mut()
                    ))
                }
            })
            .map_err(|error| error.context(format_args!("launching {} over {grid:?}", self.name)))
    }
}

/// The threads of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub blocks: [u32; 3],
    /// Of a block.
    pub threads: [u32; 3],
    /// Of dynamic shared memory, a block.
    pub shared_bytes: u32,
}

/// Threads of a block where nothing else decides, and blocks that fill a multiprocessor (2048 threads) with them.
const THREADS: u32 = 256;
const BLOCKS_PER_MULTIPROCESSOR: u32 = 8;

impl Gpu {
    /// For a kernel that strides over its grid: a thread for each of so many items, or as many as run at once.
    pub fn grid_over(&self, items: usize) -> Grid {
        let enough = items.div_ceil(THREADS as usize).max(1);
        let at_once = self.device().multiprocessors.max(1) * BLOCKS_PER_MULTIPROCESSOR;
        let blocks = u32::try_from(enough).map_or(at_once, |enough| enough.min(at_once));
        Grid { blocks: [blocks, 1, 1], threads: [THREADS, 1, 1], shared_bytes: 0 }
    }
}

/// Memory that a kernel reads: `const V*`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Read<V>(usize, PhantomData<V>);

/// Memory that a kernel writes: `V*`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Write<V>(usize, PhantomData<V>);

/// The type of a source's values, chosen when it is compiled (`Element`).
#[derive(Clone, Copy)]
pub struct T;

impl<V> From<Slice<'_>> for Read<V> {
    fn from(memory: Slice<'_>) -> Self {
        assert_eq!(memory.place(), Place::Cuda, "a CUDA kernel was given memory of the {:?}", memory.place());
        Read(memory.address(), PhantomData)
    }
}

impl<V> From<&SliceMut<'_>> for Read<V> {
    fn from(memory: &SliceMut<'_>) -> Self {
        memory.as_slice().into()
    }
}

impl<V> From<&mut SliceMut<'_>> for Write<V> {
    fn from(memory: &mut SliceMut<'_>) -> Self {
        assert_eq!(memory.place(), Place::Cuda, "a CUDA kernel was given memory of the {:?}", memory.place());
        Write(memory.address(), PhantomData)
    }
}

/// A type that has a name in `common.cuh`.
pub trait Value {
    const NAME: &'static str;
}

macro_rules! values {
    ($($value:ty = $name:literal),*) => {
        $(impl Value for $value {
            const NAME: &'static str = $name;
        })*
    };
}

values!(
    T = "T",
    f32 = "float",
    f64 = "double",
    bf16 = "bf16",
    f16 = "f16",
    u8 = "u8",
    u32 = "u32",
    u64 = "u64",
    i32 = "i32"
);

/// What can be handed to a kernel.
///
/// # Safety
/// The bytes of `Self` are those of the C type that `c_type` names.
pub unsafe trait Argument: Copy {
    fn c_type() -> String;
}

// SAFETY: an address, as in CUDA's 64-bit programs.
unsafe impl<V: Value + Copy> Argument for Read<V> {
    fn c_type() -> String {
        format!("const {}*", V::NAME)
    }
}

// SAFETY: as above.
unsafe impl<V: Value + Copy> Argument for Write<V> {
    fn c_type() -> String {
        format!("{}*", V::NAME)
    }
}

macro_rules! scalars {
    ($($scalar:ty),*) => {
        $(
            // SAFETY: the same type in C.
            unsafe impl Argument for $scalar {
                fn c_type() -> String {
                    <$scalar as Value>::NAME.to_owned()
                }
            }
        )*
    };
}

scalars!(f32, u32, u64, i32);

/// A tuple of arguments.
pub trait Arguments {
    /// As the kernel declares them.
    fn types() -> Vec<String>;
    /// What `launch` does with their addresses.
    fn with_addresses(self, launch: impl FnOnce(&mut [*mut c_void]) -> Result<()>) -> Result<()>;
}

macro_rules! tuples {
    ($(($($name:ident)*))*) => {
        $(impl<$($name: Argument),*> Arguments for ($($name,)*) {
            fn types() -> Vec<String> {
                vec![$($name::c_type()),*]
            }
            #[allow(non_snake_case)]
            fn with_addresses(self, launch: impl FnOnce(&mut [*mut c_void]) -> Result<()>) -> Result<()> {
                let ($($name,)*) = self;
                launch(&mut [$((&raw const $name).cast_mut().cast()),*])
            }
        })*
    };
}

tuples!((A)(A B)(A B C)(A B C D)(A B C D E)(A B C D E F)(A B C D E F G)(A B C D E F G H)(A B C D E F G H I)
    (A B C D E F G H I J)(A B C D E F G H I J K)(A B C D E F G H I J K L)(A B C D E F G H I J K L M)
    (A B C D E F G H I J K L M N)(A B C D E F G H I J K L M N O)(A B C D E F G H I J K L M N O P));
