//! The engines that a graph has here, what heuristics say of them, and what can be asked of the descriptors that cuDNN makes.
//!
//! Fused graphs run on tensor cores alone, as in cuDNN's runtime fusion; padding must be the same on both sides; and `rules`
//! refuses a weight gradient in f32 from halves if there are groups. So callers meet every way on which a graph can fail.

use super::rules::{self, Product};
use super::{Descriptor, Failure, NOT_SUPPORTED, Table, bad};
use std::collections::BTreeMap;
use std::ffi::c_int;

// Numerical notes.
const TENSOR_CORE: c_int = 0;
const DOWN_CONVERT_INPUTS: c_int = 1;
const REDUCED_PRECISION_REDUCTION: c_int = 2;
const NONDETERMINISTIC: c_int = 4;
const WINOGRAD: c_int = 5;

/// What is wrong with an engine's results.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Flaw {
    None,
    /// Operands in f32 lose all but so many bits behind the point.
    ShortOperands(u32),
    /// The sums do.
    ShortSums(u32),
    /// They depend on the order of additions: here they are just wrong.
    Nondeterministic,
    /// No plan can be made.
    Unsupported,
}

/// A configuration of an engine for a graph.
#[derive(Clone, Debug)]
pub struct Engine {
    pub graph: usize,
    pub index: i64,
    /// The value of its only knob.
    pub knob: i64,
    pub notes: Vec<c_int>,
    pub workspace: i64,
    pub flaw: Flaw,
}

pub enum Element {
    Enumeration(c_int),
    Integer(i64),
    Descriptor(Descriptor),
}

/// What is read from a finalized descriptor.
pub fn answer(table: &Table, of: &Descriptor, name: c_int, kind: c_int) -> Result<Vec<Element>, Failure> {
    let expect = |expected: c_int| match kind == expected {
        true => Ok(()),
        false => bad(format!("attribute {name} is of type {expected}, not {kind}")),
    };
    let engine = || of.engine.clone().expect("cuDNN makes such descriptors with an engine");
    match (of.kind, name) {
        (rules::HEURISTICS, 202) => {
            expect(rules::BACKEND_DESCRIPTOR)?;
            let made = |engine| Element::Descriptor(made(rules::ENGINE_CONFIG, engine));
            Ok(engines(table, of)?.into_iter().map(made).collect())
        }
        (rules::ENGINE_CONFIG, 300) => {
            expect(rules::BACKEND_DESCRIPTOR)?;
            Ok(vec![Element::Descriptor(made(rules::ENGINE, engine()))])
        }
        (rules::ENGINE_CONFIG, 302) => {
            expect(rules::BACKEND_DESCRIPTOR)?;
            Ok(vec![Element::Descriptor(made(rules::KNOB_CHOICE, engine()))])
        }
        (rules::KNOB_CHOICE, 600) => {
            expect(rules::KNOB_TYPE)?;
            Ok(vec![Element::Enumeration(13)])
        }
        (rules::KNOB_CHOICE, 601) => {
            expect(rules::INT64)?;
            Ok(vec![Element::Integer(engine().knob)])
        }
        (rules::ENGINE, 1301) => {
            expect(rules::INT64)?;
            Ok(vec![Element::Integer(engine().index)])
        }
        (rules::ENGINE, 1303) => {
            expect(rules::NUMERICAL_NOTE)?;
            Ok(engine().notes.into_iter().map(Element::Enumeration).collect())
        }
        (rules::ENGINE, 1305) => {
            expect(rules::BEHAVIOR_NOTE)?;
            Ok(Vec::new())
        }
        (rules::PLAN, 402) => {
            expect(rules::INT64)?;
            Ok(vec![Element::Integer(engine().workspace)])
        }
        (kind, name) => bad(format!("a descriptor of type {kind} has no attribute {name} to get")),
    }
}

/// The engine that a plan runs; nothing for other descriptors.
pub fn of_plan(table: &Table, plan: &Descriptor) -> Result<Option<Engine>, Failure> {
    if plan.kind != rules::PLAN {
        return Ok(None);
    }
    let engine = table.finalized(plan.id(401), rules::ENGINE_CONFIG)?.engine.clone();
    match &engine {
        Some(engine) if engine.flaw == Flaw::Unsupported => {
            Err((NOT_SUPPORTED, format!("engine {} does not support the graph", engine.index)))
        }
        _ => Ok(engine),
    }
}

fn made(kind: c_int, engine: Engine) -> Descriptor {
    Descriptor { kind, finalized: true, attributes: BTreeMap::new(), engine: Some(engine) }
}

/// In the order that heuristics give them: the tempting ones first.
fn engines(table: &Table, heuristics: &Descriptor) -> Result<Vec<Engine>, Failure> {
    let id = heuristics.id(201);
    let operations = rules::operations(table, table.finalized(id, rules::GRAPH)?)?;
    let Some(product) = operations.first().filter(|operation| operation.kind != rules::POINTWISE_OPERATION) else {
        return Err((NOT_SUPPORTED, "no engine for a graph without a convolution".into()));
    };
    let kind = product.kind;
    let product = Product::new(table, product)?;
    let fused = operations.len() > 1;
    let output = match kind {
        rules::FORWARD => &product.y,
        rules::BACKWARD_DATA => &product.x,
        _ => &product.w,
    };
    let wide = product.x.data_type == rules::F32 && product.y.data_type == rules::F32;
    // Real cuDNN has no precompiled engine that fuses a bias in f32 to halves.
    let tensors = operations.iter().map(|operation| rules::tensors(table, operation)).collect::<Result<Vec<_>, _>>()?;
    let wide_operand = |tensor: &rules::Tensor| !tensor.is_virtual && tensor.data_type == rules::F32;
    if fused && !wide && tensors.iter().flatten().any(wide_operand) {
        return Err((NOT_SUPPORTED, "no engine that fuses f32 to 16 bits".into()));
    }
    let mixed = !fused && !wide && output.data_type == rules::F32;
    if product.before != product.after || (mixed && kind != rules::BACKWARD_FILTER) {
        return Err((NOT_SUPPORTED, "no engine for the graph".into()));
    }

    let bytes = output.dimensions.iter().product::<usize>() * rules::value_bytes(output.data_type);
    let engine = |index, knob, notes: &[c_int], workspace: usize, flaw| Engine {
        graph: id,
        index,
        knob,
        notes: notes.to_vec(),
        workspace: workspace as i64,
        flaw,
    };
    let tensor_cores = match wide {
        true => engine(1, 16, &[TENSOR_CORE], 0, Flaw::ShortOperands(10)),
        false => engine(1, 16, &[TENSOR_CORE], 0, Flaw::None),
    };
    let plain = |knob| engine(2, knob, &[], bytes + 48, Flaw::None);
    let mut engines = vec![
        engine(5, 16, &[], 0, Flaw::Unsupported),
        engine(0, 16, &[NONDETERMINISTIC, TENSOR_CORE], 0, Flaw::Nondeterministic),
    ];
    // Modes: 1 is B, 2 fallback, 3 A.
    match (heuristics.i32(200), fused) {
        (1 | 3, true) => engines.push(tensor_cores),
        (_, true) => {}
        (2, false) => engines = vec![plain(16)],
        (_, false) if wide => engines.extend([
            engine(3, 16, &[TENSOR_CORE, DOWN_CONVERT_INPUTS], 0, Flaw::ShortOperands(7)),
            tensor_cores,
            engine(4, 16, &[WINOGRAD], bytes, Flaw::None),
            plain(16),
            plain(32),
        ]),
        (_, false) => engines.extend([
            engine(6, 16, &[TENSOR_CORE, REDUCED_PRECISION_REDUCTION], 0, Flaw::ShortSums(3)),
            tensor_cores,
            plain(16),
        ]),
    }
    Ok(engines)
}
