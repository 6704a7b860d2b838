//! Values in a GPU's memory, for tests.

use half::{bf16, f16};
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::Element;
use lockstep::device::{Arena, Place, Slice, SliceMut};
use std::ops::Range;

/// Values in device memory, between guards that must stay NaN, and what they are.
pub struct Values {
    gpu: Gpu,
    element: Element,
    pub values: Vec<f32>,
    memory: Arena,
}

/// Values of a guard: what buffers promise of their alignment, and no more.
const GUARD: usize = 16;

impl Values {
    pub fn of(gpu: &Gpu, values: &[f32], element: Element) -> Values {
        let guard = [f32::NAN; GUARD];
        let guarded = [&guard, values, &guard].concat();
        let memory = match element {
            Element::F32 => upload(gpu, &guarded),
            Element::Bf16 => upload(gpu, &guarded.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>()),
            Element::F16 => upload(gpu, &guarded.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>()),
        };
        let mut made = Values { gpu: gpu.clone(), element, values: Vec::new(), memory };
        made.values = made.download();
        made
    }

    pub fn poisoned(gpu: &Gpu, len: usize, element: Element) -> Values {
        Values::of(gpu, &vec![f32::NAN; len], element)
    }

    pub fn download(&self) -> Vec<f32> {
        let mut guarded: Vec<f32> = match self.element {
            Element::F32 => download(&self.gpu, &self.memory),
            Element::Bf16 => download::<bf16>(&self.gpu, &self.memory).into_iter().map(f32::from).collect(),
            Element::F16 => download::<f16>(&self.gpu, &self.memory).into_iter().map(f32::from).collect(),
        };
        let behind = guarded.split_off(guarded.len() - GUARD);
        let values = guarded.split_off(GUARD);
        assert!(guarded.iter().chain(&behind).all(|value| value.is_nan()), "written beyond the end");
        values
    }

    fn bytes(&self) -> Range<usize> {
        let guard = GUARD * self.element.bytes();
        guard..self.memory.bytes() - guard
    }

    pub fn slice(&self) -> Slice<'_> {
        // SAFETY: work on it is in one stream.
        unsafe { self.memory.slice(self.bytes()) }
    }

    pub fn slice_mut(&self) -> SliceMut<'_> {
        // SAFETY: as above.
        unsafe { self.memory.slice_mut(self.bytes()) }
    }
}

/// The largest difference, relative to the largest value that is expected; NaN where one of them is.
pub fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(f32::MIN_POSITIVE, |largest, value| largest.max(value.abs()));
    let errors = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs() / largest);
    errors.fold(0.0, |worst, error| if error.is_nan() || error > worst { error } else { worst })
}

/// Device memory with these values.
pub fn upload<V: bytemuck::Pod>(gpu: &Gpu, values: &[V]) -> Arena {
    let arena = gpu.allocate(size_of_val(values)).unwrap();
    // SAFETY: the values' own bytes, and memory that nobody else knows.
    let (from, to) = unsafe {
        let from = Slice::from_raw(Place::Host, values.as_ptr() as usize, size_of_val(values));
        (from, arena.slice_mut(0..arena.bytes()))
    };
    gpu.compute().copy_and_wait(from, to).unwrap();
    arena
}

/// What is in device memory, all work done.
pub fn download<V: bytemuck::Pod>(gpu: &Gpu, arena: &Arena) -> Vec<V> {
    let mut values = vec![V::zeroed(); arena.bytes() / size_of::<V>()];
    // SAFETY: the values' own bytes; work that writes the arena is in the same stream, before the copy.
    let (from, to) = unsafe {
        let to = SliceMut::from_raw(Place::Host, values.as_mut_ptr() as usize, arena.bytes());
        (arena.slice(0..arena.bytes()), to)
    };
    gpu.compute().copy_and_wait(from, to).unwrap();
    values
}
