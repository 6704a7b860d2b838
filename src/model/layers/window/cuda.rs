//! `Window` as kernels take it: `window.cuh`.

use super::{Axis, Window};
use crate::device::cuda::kernels::Argument;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DeviceWindow {
    rows: [u32; 5],
    columns: [u32; 5],
}

// SAFETY: ten words, as in the declaration.
unsafe impl Argument for DeviceWindow {
    fn c_type() -> String {
        "Window".to_owned()
    }
}

impl From<&Window> for DeviceWindow {
    fn from(window: &Window) -> Self {
        DeviceWindow { rows: words(&window.rows), columns: words(&window.columns) }
    }
}

fn words(axis: &Axis) -> [u32; 5] {
    // A stride beyond 32 bits is one beyond any image, which has one window then.
    let word = |length| u32::try_from(length).unwrap_or(u32::MAX);
    [axis.input, axis.output, axis.size, axis.stride, axis.before].map(word)
}
