//! What the backend API demands of descriptors: which attributes they have, which they must have, and how the values of
//! one fit to those of others.

use super::{Descriptor, Failure, Id, Table, bad};
use std::collections::BTreeSet;
use std::ffi::c_int;

pub const POINTWISE: c_int = 0;
pub const CONVOLUTION: c_int = 1;
pub const ENGINE: c_int = 2;
pub const ENGINE_CONFIG: c_int = 3;
pub const HEURISTICS: c_int = 4;
pub const PLAN: c_int = 5;
pub const KNOB_CHOICE: c_int = 7;
pub const FORWARD: c_int = 10;
pub const BACKWARD_FILTER: c_int = 11;
pub const BACKWARD_DATA: c_int = 12;
pub const POINTWISE_OPERATION: c_int = 13;
pub const GRAPH: c_int = 15;
pub const PACK: c_int = 16;
pub const TENSOR: c_int = 17;

/// What the GPU of the current context answers for.
pub const NEED_A_DEVICE: [c_int; 3] = [HEURISTICS, PLAN, GRAPH];

pub const KINDS: [c_int; 14] = [
    POINTWISE,
    CONVOLUTION,
    ENGINE,
    ENGINE_CONFIG,
    HEURISTICS,
    PLAN,
    KNOB_CHOICE,
    FORWARD,
    BACKWARD_FILTER,
    BACKWARD_DATA,
    POINTWISE_OPERATION,
    GRAPH,
    PACK,
    TENSOR,
];

// Types of attributes.
const HANDLE: c_int = 0;
pub const DATA_TYPE: c_int = 1;
const BOOLEAN: c_int = 2;
pub const INT64: c_int = 3;
const FLOAT: c_int = 4;
const DOUBLE: c_int = 5;
const VOID_PTR: c_int = 6;
const CONVOLUTION_MODE: c_int = 7;
const HEUR_MODE: c_int = 8;
pub const KNOB_TYPE: c_int = 9;
const NAN_PROPAGATION: c_int = 10;
pub const NUMERICAL_NOTE: c_int = 11;
const POINTWISE_MODE: c_int = 14;
pub const BACKEND_DESCRIPTOR: c_int = 15;
pub const BEHAVIOR_NOTE: c_int = 19;

// Types of values.
pub const F32: c_int = 0;
pub const F16: c_int = 2;
pub const BF16: c_int = 9;

// Modes of pointwise operations.
pub const ADD: c_int = 0;
pub const RELU: c_int = 100;
pub const RELU_BACKWARD: c_int = 200;
/// What a ReLU does with a NaN, which else is 0.
pub const PROPAGATE_NAN: c_int = 1;

/// Elements of an attribute, and whether it must be set.
pub struct Rule {
    pub name: c_int,
    pub kind: c_int,
    pub least: i64,
    pub most: i64,
    pub required: bool,
}

const fn one(name: c_int, kind: c_int) -> Rule {
    Rule { name, kind, least: 1, most: 1, required: true }
}
const fn optional(name: c_int, kind: c_int) -> Rule {
    Rule { name, kind, least: 1, most: 1, required: false }
}
const fn several(name: c_int, kind: c_int, least: i64, most: i64) -> Rule {
    Rule { name, kind, least, most, required: true }
}

/// The attributes that a caller sets on a descriptor of a type.
fn rules(kind: c_int) -> Vec<Rule> {
    let descriptors = |names: std::ops::RangeInclusive<c_int>| names.map(|name| one(name, BACKEND_DESCRIPTOR));
    match kind {
        POINTWISE => vec![
            one(0, POINTWISE_MODE),
            one(1, DATA_TYPE),
            optional(2, NAN_PROPAGATION),
            optional(3, DOUBLE),
            optional(4, DOUBLE),
        ],
        CONVOLUTION => {
            let lists = 102..=105;
            let mut rules: Vec<Rule> = lists.map(|name| several(name, INT64, 2, 2)).collect();
            rules.extend([one(100, DATA_TYPE), one(101, CONVOLUTION_MODE), one(106, INT64)]);
            rules
        }
        HEURISTICS => vec![one(200, HEUR_MODE), one(201, BACKEND_DESCRIPTOR)],
        PLAN => vec![one(400, HANDLE), one(401, BACKEND_DESCRIPTOR)],
        FORWARD => {
            let mut rules: Vec<Rule> = descriptors(702..=705).collect();
            rules.extend([one(700, FLOAT), one(701, FLOAT)]);
            rules
        }
        BACKWARD_DATA => {
            let mut rules: Vec<Rule> = descriptors(708..=711).collect();
            rules.extend([one(706, FLOAT), one(707, FLOAT)]);
            rules
        }
        BACKWARD_FILTER => {
            let mut rules: Vec<Rule> = descriptors(714..=717).collect();
            rules.extend([one(712, FLOAT), one(713, FLOAT)]);
            rules
        }
        POINTWISE_OPERATION => {
            let mut rules = vec![one(750, BACKEND_DESCRIPTOR), one(751, BACKEND_DESCRIPTOR)];
            rules.extend([752, 753, 756, 757].map(|name| optional(name, BACKEND_DESCRIPTOR)));
            rules.extend([optional(754, FLOAT), optional(755, FLOAT)]);
            rules
        }
        GRAPH => vec![one(800, HANDLE), several(801, BACKEND_DESCRIPTOR, 1, 16)],
        PACK => vec![several(1000, INT64, 1, 64), several(1001, VOID_PTR, 1, 64), optional(1003, VOID_PTR)],
        TENSOR => vec![
            one(900, INT64),
            one(901, DATA_TYPE),
            several(902, INT64, 1, 8),
            several(903, INT64, 1, 8),
            one(906, INT64),
            optional(907, BOOLEAN),
        ],
        _ => Vec::new(),
    }
}

pub fn settable(kind: c_int, name: c_int) -> Result<Rule, Failure> {
    match rules(kind).into_iter().find(|rule| rule.name == name) {
        Some(rule) => Ok(rule),
        None => bad(format!("a descriptor of type {kind} has no attribute {name} to set")),
    }
}

/// What cuDNN gives only to callers with room for one element, no more.
pub fn is_scalar(kind: c_int, name: c_int) -> bool {
    matches!((kind, name), (KNOB_CHOICE, 600 | 601) | (ENGINE, 1301) | (PLAN, 402))
}

pub const fn bytes_of(kind: c_int) -> usize {
    match kind {
        HANDLE | INT64 | DOUBLE | VOID_PTR | BACKEND_DESCRIPTOR => 8,
        BOOLEAN => 1,
        _ => 4,
    }
}

pub const fn value_bytes(data_type: c_int) -> usize {
    if data_type == F32 { 4 } else { 2 }
}

/// What finalizing a descriptor checks.
pub fn check(table: &Table, descriptor: &Descriptor) -> Result<(), Failure> {
    for rule in rules(descriptor.kind).iter().filter(|rule| rule.required) {
        if !descriptor.has(rule.name) {
            return bad(format!("attribute {} is missing in a descriptor of type {}", rule.name, descriptor.kind));
        }
    }
    match descriptor.kind {
        POINTWISE => check_pointwise(descriptor),
        CONVOLUTION => check_convolution(descriptor),
        TENSOR => check_tensor(descriptor),
        FORWARD | BACKWARD_DATA | BACKWARD_FILTER => Product::new(table, descriptor).map(drop),
        POINTWISE_OPERATION => check_pointwise_operation(table, descriptor),
        HEURISTICS => table.finalized(descriptor.id(201), GRAPH).map(drop),
        GRAPH => check_graph(table, descriptor),
        PLAN => table.finalized(descriptor.id(401), ENGINE_CONFIG).map(drop),
        PACK => check_pack(descriptor),
        _ => bad(format!("descriptors of type {} come from cuDNN", descriptor.kind)),
    }
}

fn check_pointwise(descriptor: &Descriptor) -> Result<(), Failure> {
    match ([ADD, RELU, RELU_BACKWARD].contains(&descriptor.i32(0)), descriptor.i32(1)) {
        (true, F32) => Ok(()),
        (known, precision) => bad(format!("pointwise: mode known: {known}; computing in type {precision}")),
    }
}

fn check_convolution(descriptor: &Descriptor) -> Result<(), Failure> {
    let at_least = |name, least| descriptor.i64s(name).iter().all(|&value| value >= least);
    // Cross-correlation, sums in f32, two axes; dilations and strides from 1, paddings from 0.
    let sizes = at_least(102, 1) && at_least(103, 1) && at_least(104, 0) && at_least(105, 0);
    match (descriptor.i32(100), descriptor.i32(101), descriptor.i64(106)) {
        (F32, 1, 2) if sizes => Ok(()),
        (F32, 1, 2) => bad("convolution: a stride or dilation below 1, or a padding below 0"),
        found => bad(format!("convolution: (compute type, mode, axes) are {found:?}, (0, 1, 2) is expected")),
    }
}

fn check_tensor(descriptor: &Descriptor) -> Result<(), Failure> {
    let (dimensions, strides) = (descriptor.i64s(902), descriptor.i64s(903));
    let (alignment, data_type) = (descriptor.i64(900), descriptor.i32(901));
    if dimensions.len() != strides.len() || dimensions.iter().chain(&strides).any(|&value| value < 1) {
        return bad(format!("tensor: dimensions {dimensions:?} with strides {strides:?}"));
    }
    if ![F32, F16, BF16].contains(&data_type) {
        return bad(format!("tensor: values of type {data_type}"));
    }
    if alignment < value_bytes(data_type) as i64 || alignment & (alignment - 1) != 0 {
        return bad(format!("tensor: an alignment of {alignment} bytes"));
    }
    Ok(())
}

/// A tensor as an operation sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub uid: i64,
    pub data_type: c_int,
    pub alignment: i64,
    pub is_virtual: bool,
    pub dimensions: [usize; 4],
    pub strides: [usize; 4],
}

impl Tensor {
    pub fn new(table: &Table, id: Id) -> Result<Tensor, Failure> {
        let tensor = table.finalized(id, TENSOR)?;
        let four = |name| {
            let values: Vec<usize> = tensor.i64s(name).iter().map(|&value| value as usize).collect();
            <[usize; 4]>::try_from(values).or_else(|values| bad(format!("{values:?} where four values are expected")))
        };
        Ok(Tensor {
            uid: tensor.i64(906),
            data_type: tensor.i32(901),
            alignment: tensor.i64(900),
            is_virtual: tensor.flag(907),
            dimensions: four(902)?,
            strides: four(903)?,
        })
    }
}

/// One of a convolution's three products: which tensor plays which part is the same in all of them.
#[derive(Debug)]
pub struct Product {
    pub x: Tensor,
    pub w: Tensor,
    pub y: Tensor,
    pub alpha: f32,
    pub beta: f32,
    pub dilation: [usize; 2],
    pub stride: [usize; 2],
    pub before: [usize; 2],
    pub after: [usize; 2],
}

impl Product {
    pub fn new(table: &Table, operation: &Descriptor) -> Result<Product, Failure> {
        let [alpha, beta, convolution, w, x, y] = match operation.kind {
            FORWARD => [700, 701, 702, 703, 704, 705],
            BACKWARD_DATA => [706, 707, 708, 709, 710, 711],
            _ => [712, 713, 714, 715, 716, 717],
        };
        let convolution = table.finalized(operation.id(convolution), CONVOLUTION)?;
        let two = |name| {
            let values = convolution.i64s(name);
            [values[0] as usize, values[1] as usize]
        };
        let tensor = |name| Tensor::new(table, operation.id(name));
        let product = Product {
            x: tensor(x)?,
            w: tensor(w)?,
            y: tensor(y)?,
            alpha: operation.f32(alpha, 1.0),
            beta: operation.f32(beta, 0.0),
            dilation: two(102),
            stride: two(103),
            after: two(104),
            before: two(105),
        };
        product.check(operation.kind)?;
        Ok(product)
    }

    fn check(&self, kind: c_int) -> Result<(), Failure> {
        let ([n, c, ..], [k, channels, ..]) = (self.x.dimensions, self.w.dimensions);
        let extent = |axis: usize| {
            let filter = self.dilation[axis] * (self.w.dimensions[2 + axis] - 1) + 1;
            let padded = self.x.dimensions[2 + axis] + self.before[axis] + self.after[axis];
            padded.checked_sub(filter).map_or(0, |room| room / self.stride[axis] + 1)
        };
        let expected = [n, k, extent(0), extent(1)];
        if self.y.dimensions != expected || c % channels != 0 || k % (c / channels) != 0 {
            return bad(format!(
                "convolution of x {:?} with w {:?}: y is {:?}, expected {expected:?}",
                self.x.dimensions, self.w.dimensions, self.y.dimensions
            ));
        }
        let inputs = match kind {
            FORWARD => [&self.x, &self.w],
            BACKWARD_DATA => [&self.y, &self.w],
            _ => [&self.x, &self.y],
        };
        if inputs[0].data_type != inputs[1].data_type || inputs.iter().any(|input| input.is_virtual) {
            return bad("convolution: the operands differ in type, or one is virtual");
        }
        if kind == BACKWARD_FILTER && c != channels && self.w.data_type != self.x.data_type {
            return bad("convolution: with groups the weight's gradient has the operands' type");
        }
        Ok(())
    }
}

/// b broadcasts to x, and everything else has one shape.
fn check_pointwise_operation(table: &Table, operation: &Descriptor) -> Result<(), Failure> {
    let mode = table.finalized(operation.id(750), POINTWISE)?.i32(0);
    let needed: &[c_int] = match mode {
        ADD => &[751, 752, 753],
        RELU => &[751, 753],
        _ => &[751, 756, 757],
    };
    let given: Vec<c_int> = [751, 752, 753, 756, 757].into_iter().filter(|&name| operation.has(name)).collect();
    if given != needed {
        return bad(format!("pointwise mode {mode} has tensors {given:?}, expected {needed:?}"));
    }
    let x = Tensor::new(table, operation.id(751))?;
    for &name in needed {
        let tensor = Tensor::new(table, operation.id(name))?;
        let broadcast = |axis: usize| name == 752 && tensor.dimensions[axis] == 1;
        if !(0..4).all(|axis| tensor.dimensions[axis] == x.dimensions[axis] || broadcast(axis)) {
            return bad(format!("pointwise: tensor {name} is {:?}, x is {:?}", tensor.dimensions, x.dimensions));
        }
    }
    Ok(())
}

/// The tensors of an operation: inputs, then its output.
pub fn tensors(table: &Table, operation: &Descriptor) -> Result<Vec<Tensor>, Failure> {
    let names: &[c_int] = match operation.kind {
        FORWARD => &[704, 703, 705],
        BACKWARD_DATA => &[711, 709, 710],
        BACKWARD_FILTER => &[716, 717, 715],
        POINTWISE_OPERATION if operation.has(756) => &[751, 757, 756],
        POINTWISE_OPERATION if operation.has(752) => &[751, 752, 753],
        POINTWISE_OPERATION => &[751, 753],
        kind => return bad(format!("a descriptor of type {kind} is no operation")),
    };
    names.iter().map(|&name| Tensor::new(table, operation.id(name))).collect()
}

pub fn operations<'a>(table: &'a Table, graph: &Descriptor) -> Result<Vec<&'a Descriptor>, Failure> {
    let of = |id: i64| {
        let operation = table.get(id as Id)?;
        table.finalized(id as Id, operation.kind)
    };
    graph.i64s(801).into_iter().map(of).collect()
}

/// One number means one tensor, each is written once, and a virtual one is written before it is read.
fn check_graph(table: &Table, graph: &Descriptor) -> Result<(), Failure> {
    let (mut known, mut written) = (Vec::<Tensor>::new(), BTreeSet::new());
    for operation in operations(table, graph)? {
        let tensors = tensors(table, operation)?;
        let (output, inputs) = tensors.split_last().expect("an operation has an output");
        if let Some(input) = inputs.iter().find(|input| input.is_virtual && !written.contains(&input.uid)) {
            return bad(format!("graph: virtual tensor {} is read before it is written", input.uid));
        }
        if !written.insert(output.uid) {
            return bad(format!("graph: tensor {} is written twice", output.uid));
        }
        for tensor in tensors {
            match known.iter().find(|known| known.uid == tensor.uid) {
                Some(known) if *known != tensor => {
                    return bad(format!("graph: two tensors are numbered {}", tensor.uid));
                }
                Some(_) => {}
                None => known.push(tensor),
            }
        }
    }
    Ok(())
}

fn check_pack(pack: &Descriptor) -> Result<(), Failure> {
    let (uids, pointers) = (pack.i64s(1000), pack.i64s(1001));
    let distinct: BTreeSet<i64> = uids.iter().copied().collect();
    if uids.len() != pointers.len() || distinct.len() != uids.len() {
        return bad(format!("variant pack: numbers {uids:?} for {} pointers", pointers.len()));
    }
    Ok(())
}
