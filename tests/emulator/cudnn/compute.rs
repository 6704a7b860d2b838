//! Runs a plan: the operations of its graph one after the other, sums in f64, every tensor rounded to its type once.

use super::engines::{Engine, Flaw};
use super::rules::{self, BF16, F16, F32, Product, Tensor};
use super::{Descriptor, Failure, Id, Table, bad, queue};
use std::collections::BTreeMap;

/// Values by number of their tensor, dense, in the order of the dimensions.
type Values = BTreeMap<i64, Vec<f64>>;

/// Checks the call and puts the work into the stream, with the descriptors as they are now.
pub fn execute(table: &Table, stream: usize, plan: Id, pack: Id) -> Result<(), Failure> {
    let engine = table.finalized(plan, rules::PLAN)?.engine.clone().expect("a plan has an engine");
    let pack = table.finalized(pack, rules::PACK)?;
    let operations = rules::operations(table, table.finalized(engine.graph, rules::GRAPH)?)?;
    let pointers: BTreeMap<i64, usize> =
        pack.i64s(1000).into_iter().zip(pack.i64s(1001).into_iter().map(|pointer| pointer as usize)).collect();
    check_pointers(table, &operations, &pointers)?;
    let workspace = workspace(&engine, pack)?;

    let table = table.clone();
    let work = move || {
        // The engine may write all that it asked for.
        unsafe { std::ptr::write_bytes(workspace as *mut u8, 0xff, engine.workspace as usize) };
        if let Err((_, message)) = run(&table, &engine, &pointers) {
            eprintln!("emulator: cuDNN: {message}");
        }
        true
    };
    match queue::put(stream, work) {
        true => Ok(()),
        false => bad(format!("the handle has no stream of the emulator's driver, but {stream:#x}")),
    }
}

fn run(table: &Table, engine: &Engine, pointers: &BTreeMap<i64, usize>) -> Result<(), Failure> {
    let operations = rules::operations(table, table.finalized(engine.graph, rules::GRAPH)?)?;
    let mut values = Values::new();
    for operation in operations {
        let tensors = rules::tensors(table, operation)?;
        let (output, inputs) = tensors.split_last().expect("an operation has an output");
        for input in inputs.iter().filter(|input| !input.is_virtual) {
            values.insert(input.uid, unsafe { load(input, pointers[&input.uid]) });
        }
        let mut result = match operation.kind {
            rules::POINTWISE_OPERATION => pointwise(table, operation, &tensors, &values)?,
            _ => multiply(&Product::new(table, operation)?, operation.kind, engine.flaw, &values),
        };
        result.iter_mut().for_each(|value| *value = round(*value, output.data_type));
        if !output.is_virtual {
            unsafe { store(output, pointers[&output.uid], &result) };
        }
        values.insert(output.uid, result);
    }
    Ok(())
}

/// One pointer for each tensor in memory, aligned as the tensor says, and none beside.
fn check_pointers(table: &Table, operations: &[&Descriptor], pointers: &BTreeMap<i64, usize>) -> Result<(), Failure> {
    let mut wanted = BTreeMap::new();
    for operation in operations {
        for tensor in rules::tensors(table, operation)?.into_iter().filter(|tensor| !tensor.is_virtual) {
            wanted.insert(tensor.uid, tensor.alignment as usize);
        }
    }
    if !wanted.keys().eq(pointers.keys()) {
        return bad(format!("variant pack: tensors {:?}, the graph has {:?}", pointers.keys(), wanted.keys()));
    }
    match pointers.iter().find(|(uid, pointer)| **pointer == 0 || *pointer % wanted[uid] != 0) {
        Some((uid, pointer)) => bad(format!("variant pack: tensor {uid} at {pointer:#x}, aligned to {}", wanted[uid])),
        None => Ok(()),
    }
}

/// Where the engine has its workspace.
fn workspace(engine: &Engine, pack: &Descriptor) -> Result<usize, Failure> {
    let workspace = pack.i64s(1003).first().map_or(0, |&pointer| pointer as usize);
    if engine.workspace > 0 && (workspace == 0 || workspace % 16 != 0) {
        return bad(format!("variant pack: the workspace of {} bytes is at {workspace:#x}", engine.workspace));
    }
    Ok(workspace)
}

/// One of the three products. All of them sum the same triples of elements, over another of the three.
fn multiply(product: &Product, kind: i32, flaw: Flaw, values: &Values) -> Vec<f64> {
    let Product { x, w, y, .. } = product;
    let operand = |tensor: &Tensor| -> Vec<f64> {
        let values = &values[&tensor.uid];
        match flaw {
            Flaw::ShortOperands(bits) => values.iter().map(|&value| shorten(value, bits)).collect(),
            _ => values.clone(),
        }
    };
    let zeros = |tensor: &Tensor| vec![0.0; tensor.dimensions.iter().product()];
    let mut sums = match kind {
        rules::FORWARD => {
            let (x, w, mut sums) = (operand(x), operand(w), zeros(y));
            triples(product, |i, j, k| sums[k] += x[i] * w[j]);
            sums
        }
        rules::BACKWARD_DATA => {
            let (y, w, mut sums) = (operand(y), operand(w), zeros(x));
            triples(product, |i, j, k| sums[i] += y[k] * w[j]);
            sums
        }
        _ => {
            let (x, y, mut sums) = (operand(x), operand(y), zeros(w));
            triples(product, |i, j, k| sums[j] += x[i] * y[k]);
            sums
        }
    };
    assert!(product.beta == 0.0, "no beta in the emulator");
    for sum in &mut sums {
        *sum *= f64::from(product.alpha);
        match flaw {
            Flaw::Nondeterministic => *sum = *sum * 1.5 + 1.0,
            Flaw::ShortSums(bits) => *sum = shorten(*sum, bits),
            _ => {}
        }
    }
    sums
}

/// Visits the elements of x, w and y that meet: x (N, C, H, W), w (K, C / groups, KH, KW), y (N, K, OH, OW).
fn triples(product: &Product, mut visit: impl FnMut(usize, usize, usize)) {
    let ([n, c, h, width], [filters, channels, kh, kw]) = (product.x.dimensions, product.w.dimensions);
    let [_, _, oh, ow] = product.y.dimensions;
    let per_group = filters / (c / channels);
    // The row or column of x under a tap; None on the padding.
    let place = |axis: usize, o: usize, tap: usize, length: usize| {
        let place = o * product.stride[axis] + tap * product.dilation[axis];
        place.checked_sub(product.before[axis]).filter(|&place| place < length)
    };
    for (image, filter) in (0..n).flat_map(|image| (0..filters).map(move |filter| (image, filter))) {
        for (row, column) in (0..oh).flat_map(|row| (0..ow).map(move |column| (row, column))) {
            let k = ((image * filters + filter) * oh + row) * ow + column;
            for (r, s) in (0..kh).flat_map(|r| (0..kw).map(move |s| (r, s))) {
                let (Some(y), Some(x)) = (place(0, row, r, h), place(1, column, s, width)) else { continue };
                for channel in 0..channels {
                    let from = filter / per_group * channels + channel;
                    let i = ((image * c + from) * h + y) * width + x;
                    let j = ((filter * channels + channel) * kh + r) * kw + s;
                    visit(i, j, k);
                }
            }
        }
    }
}

fn pointwise(table: &Table, operation: &Descriptor, tensors: &[Tensor], values: &Values) -> Result<Vec<f64>, Failure> {
    let [x, second, ..] = tensors else { return bad("a pointwise operation has two tensors") };
    let a = &values[&x.uid];
    let descriptor = table.finalized(operation.id(750), rules::POINTWISE)?;
    Ok(match descriptor.i32(0) {
        rules::ADD => {
            let b = &values[&second.uid];
            let strides = dense(second.dimensions);
            let index = |place: [usize; 4]| -> usize {
                (0..4).map(|axis| if second.dimensions[axis] == 1 { 0 } else { place[axis] * strides[axis] }).sum()
            };
            places(x.dimensions).zip(a).map(|(place, a)| a + b[index(place)]).collect()
        }
        rules::RELU => {
            let keeps_nan = descriptor.has(2) && descriptor.i32(2) == rules::PROPAGATE_NAN;
            a.iter().map(|&a| if a > 0.0 || (a.is_nan() && keeps_nan) { a } else { 0.0 }).collect()
        }
        // x is what went into the ReLU, the second the gradient of what came out.
        _ => a.iter().zip(&values[&second.uid]).map(|(&a, &grad)| if a > 0.0 { grad } else { 0.0 }).collect(),
    })
}

fn places(dimensions: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    let strides = dense(dimensions);
    (0..dimensions.iter().product::<usize>())
        .map(move |at| std::array::from_fn(|axis| at / strides[axis] % dimensions[axis]))
}

fn dense(dimensions: [usize; 4]) -> [usize; 4] {
    std::array::from_fn(|axis| dimensions[axis + 1..].iter().product())
}

unsafe fn load(tensor: &Tensor, address: usize) -> Vec<f64> {
    let value = |place: [usize; 4]| {
        let at: usize = place.iter().zip(tensor.strides).map(|(place, stride)| place * stride).sum();
        match tensor.data_type {
            F32 => f64::from(unsafe { *(address as *const f32).add(at) }),
            BF16 => f64::from(f32::from_bits(u32::from(unsafe { *(address as *const u16).add(at) }) << 16)),
            _ => half(unsafe { *(address as *const u16).add(at) }),
        }
    };
    places(tensor.dimensions).map(value).collect()
}

unsafe fn store(tensor: &Tensor, address: usize, values: &[f64]) {
    for (place, &value) in places(tensor.dimensions).zip(values) {
        let at: usize = place.iter().zip(tensor.strides).map(|(place, stride)| place * stride).sum();
        match tensor.data_type {
            F32 => unsafe { *(address as *mut f32).add(at) = value as f32 },
            BF16 => unsafe { *(address as *mut u16).add(at) = ((value as f32).to_bits() >> 16) as u16 },
            _ => unsafe { *(address as *mut u16).add(at) = half_bits(value) },
        }
    }
}

/// To the nearest value of a type, to even in the middle.
fn round(value: f64, data_type: i32) -> f64 {
    match data_type {
        F32 => f64::from(value as f32),
        BF16 => shorten(f64::from(value as f32), 7),
        F16 => half(half_bits(value)),
        _ => unreachable!("rules let no other type pass"),
    }
}

/// With so many bits behind the leading one.
fn shorten(value: f64, bits: u32) -> f64 {
    if !value.is_finite() {
        return value;
    }
    let drop = 52 - bits;
    let pattern = value.to_bits();
    let half = (1 << (drop - 1)) - 1 + (pattern >> drop & 1);
    f64::from_bits((pattern + half) >> drop << drop)
}

fn half(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023) / 1024.0);
    sign * match exponent {
        0 => fraction * 2f64.powi(-14),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + fraction) * 2f64.powi(exponent - 15),
    }
}

fn half_bits(value: f64) -> u16 {
    let sign = u16::from(value.is_sign_negative()) << 15;
    let magnitude = value.abs();
    if magnitude.is_nan() {
        return 0x7e00;
    }
    // Below the normal range values are multiples of 2^-24; so is a unit in the last place at the exponent above it.
    let exponent = (magnitude.log2().floor() as i32).clamp(-14, 16);
    let units = (magnitude / 2f64.powi(exponent - 10)).round_ties_even();
    match units as u32 {
        _ if magnitude >= 65520.0 => sign | 0x7c00,
        units => sign | (((exponent + 14) as u32 * 1024 + units) as u16),
    }
}
