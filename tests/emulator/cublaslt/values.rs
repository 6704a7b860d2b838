//! Values in memory: f32, and two of 16 bits that are computed with in f32.

use std::ffi::c_void;

/// Types of values, as `cudaDataType` numbers them.
pub const F32: u32 = 0;
pub const F16: u32 = 2;
pub const BF16: u32 = 14;

pub fn size(of: u32) -> usize {
    if of == F32 { 4 } else { 2 }
}

pub unsafe fn load(from: *const c_void, of: u32, at: usize) -> f32 {
    let half = || unsafe { *from.cast::<u16>().add(at) };
    match of {
        F32 => unsafe { *from.cast::<f32>().add(at) },
        BF16 => f32::from_bits(u32::from(half()) << 16),
        _ => widen_f16(half()),
    }
}

pub unsafe fn store(to: *mut c_void, of: u32, at: usize, value: f32) {
    let half = match of {
        F32 => return unsafe { *to.cast::<f32>().add(at) = value },
        BF16 => narrow_bf16(value),
        _ => narrow_f16(value),
    };
    unsafe { *to.cast::<u16>().add(at) = half };
}

/// To nearest even.
fn narrow_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    match value.is_nan() {
        true => (bits >> 16) as u16 | 0x40,
        false => ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16,
    }
}

fn widen_f16(half: u16) -> f32 {
    let (sign, exponent, fraction) = (half >> 15, half >> 10 & 0x1F, half & 0x3FF);
    let magnitude = match exponent {
        0 => f32::from(fraction) * 2f32.powi(-24),
        0x1F if fraction == 0 => f32::INFINITY,
        0x1F => f32::NAN,
        _ => (1.0 + f32::from(fraction) / 1024.0) * 2f32.powi(i32::from(exponent) - 15),
    };
    if sign == 1 { -magnitude } else { magnitude }
}

/// To nearest even: counts units in the last place, which are exact in f32.
fn narrow_f16(value: f32) -> u16 {
    let (sign, magnitude) = (u16::from(value.is_sign_negative()) << 15, value.abs());
    if magnitude.is_nan() {
        return sign | 0x7E00;
    }
    if magnitude >= 65520.0 {
        return sign | 0x7C00;
    }
    let exponent = (magnitude.to_bits() >> 23) as i32 - 127;
    let unit = exponent.max(-14) - 10;
    let units = (magnitude / 2f32.powi(unit)).round_ties_even() as u16;
    // Units beyond 1024 carry into the exponent by themselves.
    sign | (((exponent.max(-14) + 14) as u16) << 10) + units
}
