//! Values in a GPU's memory, for tests.

use crate::emulator::{download, upload};
use half::{bf16, f16};
use lockstep::device::cuda::kernels::Element;
use lockstep::device::{Arena, Slice, SliceMut};
use std::ops::Range;

/// Values in device memory, between guards that must stay NaN, and what they are.
pub struct Values {
    element: Element,
    pub values: Vec<f32>,
    memory: Arena,
}

/// Values of a guard: what buffers promise of their alignment, and no more.
const GUARD: usize = 16;

impl Values {
    pub fn of(values: &[f32], element: Element) -> Values {
        let guard = [f32::NAN; GUARD];
        let guarded = [&guard, values, &guard].concat();
        let memory = match element {
            Element::F32 => upload(&guarded),
            Element::Bf16 => upload(&guarded.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>()),
            Element::F16 => upload(&guarded.iter().map(|x| f16::from_f32(*x)).collect::<Vec<_>>()),
        };
        let mut made = Values { element, values: Vec::new(), memory };
        made.values = made.download();
        made
    }

    pub fn poisoned(len: usize, element: Element) -> Values {
        Values::of(&vec![f32::NAN; len], element)
    }

    pub fn download(&self) -> Vec<f32> {
        let mut guarded: Vec<f32> = match self.element {
            Element::F32 => download(&self.memory),
            Element::Bf16 => download::<bf16>(&self.memory).into_iter().map(f32::from).collect(),
            Element::F16 => download::<f16>(&self.memory).into_iter().map(f32::from).collect(),
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
