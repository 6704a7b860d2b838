//! Layers with bf16 products against their f32 form, with each of the kernels that this CPU has.

use crate::device::{Slice, SliceMut};
use crate::model::{Backward, Build, Forward, Layer, LayerSpec, Pass, Shape};
use half::bf16;

/// Half a unit in the last of 8 bits.
const ROUNDING: f32 = 1.0 / 256.0;

/// Runs the layer that `native` builds, if it builds one, and the f32 layer of `spec`, over batches that fill what they
/// were built for and that do not, on one thread and on three.
pub fn agree(spec: &dyn LayerSpec, input: Shape, native: impl Fn(&Build<'_>) -> Option<Box<dyn Layer>> + Sync) {
    let operands = Operands::new(spec, input, 5);
    let inputs = [input];
    let build = |threads| Build { inputs: &inputs, batch: 5, threads, ..Build::default() };
    for batch in [5, 2] {
        let expected = operands.f32(&mut *spec.build(&build(1)).unwrap(), batch);
        let [alone, together] = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| native(&build(threads)).map(|mut layer| operands.bf16(&mut *layer, batch)))
        });
        let Some(alone) = alone else { return };
        assert!(Some(&alone) == together.as_ref(), "{spec:?}: three threads give other bits");
        for (what, (found, expected)) in ["y", "dx", "dweight", "dbias"].iter().zip(alone.iter().zip(&expected)) {
            compare(&format!("{what} of {batch} in {spec:?}"), found, expected);
        }
    }
}

/// y, dx, dweight, dbias, widened.
type Results = [Vec<f32>; 4];

/// What goes in; bf16 holds all of it exactly.
struct Operands {
    input: Shape,
    output: Shape,
    x: Vec<f32>,
    dy: Vec<f32>,
    params: Vec<Vec<f32>>,
    reads_output: bool,
}

impl Operands {
    fn new(spec: &dyn LayerSpec, input: Shape, batch: usize) -> Operands {
        let inferred = spec.infer(&[input]).unwrap();
        let values = |len: usize, seed: usize| {
            let value = |i: usize| ((i * 37 + seed * 101) % 211) as f32 / 211.0 - 0.45;
            (0..len).map(|i| bf16::from_f32(value(i)).to_f32()).collect::<Vec<_>>()
        };
        Operands {
            input,
            output: inferred.output,
            x: values(batch * input.len(), 1),
            dy: values(batch * inferred.output.len(), 2),
            params: inferred.params.iter().enumerate().map(|(i, param)| values(param.len(), 3 + i)).collect(),
            reads_output: inferred.backward_reads_output,
        }
    }

    fn bf16(&self, layer: &mut dyn Layer, batch: usize) -> Results {
        let (x, mut dy) = (narrow(&self.x[..batch * self.input.len()]), narrow(&self.dy[..batch * self.output.len()]));
        let (mut y, mut dx) = (vec![bf16::NAN; dy.len()], vec![bf16::NAN; x.len()]);
        let params: Vec<Vec<bf16>> = self.params.iter().map(|param| narrow(param)).collect();
        let params: Vec<Slice> = params.iter().map(|param| param[..].into()).collect();
        let buffers = [&mut dy, &mut y, &mut dx].map(|values| SliceMut::from(&mut values[..]));
        let [dweight, dbias] = self.run(layer, batch, x[..].into(), buffers, &params);
        [widen(&y), widen(&dx), dweight, dbias]
    }

    fn f32(&self, layer: &mut dyn Layer, batch: usize) -> Results {
        let (x, mut dy) = (&self.x[..batch * self.input.len()], self.dy[..batch * self.output.len()].to_vec());
        let (mut y, mut dx) = (vec![f32::NAN; dy.len()], vec![f32::NAN; x.len()]);
        let buffers = [&mut dy, &mut y, &mut dx].map(|values| SliceMut::from(&mut values[..]));
        let [dweight, dbias] = self.run(layer, batch, x.into(), buffers, &[]);
        [y, dx, dweight, dbias]
    }

    /// Forward and backward from poisoned memory.
    fn run(
        &self,
        layer: &mut dyn Layer,
        batch: usize,
        x: Slice<'_>,
        [dy, mut y, dx]: [SliceMut<'_>; 3],
        params_rounded: &[Slice<'_>],
    ) -> [Vec<f32>; 2] {
        let pass = Pass { batch, training: true, first_sample: 0, share: 1.0 };
        let params: Vec<Slice> = self.params.iter().map(|param| param[..].into()).collect();
        let mut scratch = vec![f32::NAN; layer.scratch_bytes().div_ceil(4)];
        let io = Forward {
            inputs: &[x],
            output: y.reborrow(),
            params: &params,
            params_rounded,
            saved: SliceMut::empty(),
            scratch: SliceMut::from(&mut scratch[..]),
        };
        layer.forward(&pass, io).unwrap();
        scratch.fill(f32::NAN);
        let mut grads: Vec<Vec<f32>> = self.params.iter().map(|param| vec![f32::NAN; param.len()]).collect();
        let io = Backward {
            inputs: &[x],
            output: if self.reads_output { y.as_slice() } else { Slice::empty() },
            grad_output: dy,
            grad_inputs: &mut [dx],
            params: &params,
            params_rounded,
            grad_params: &mut grads.iter_mut().map(|grad| SliceMut::from(&mut grad[..])).collect::<Vec<_>>(),
            factors: SliceMut::empty(),
            input_sums: SliceMut::empty(),
            saved: Slice::empty(),
            scratch: SliceMut::from(&mut scratch[..]),
        };
        layer.backward(&pass, io).unwrap();
        let mut grads = grads.into_iter();
        std::array::from_fn(|_| grads.next().unwrap_or_default())
    }
}

fn compare(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= ROUNDING * (expected.abs() + 0.1 * largest);
        assert!(close, "{what} at {i}: {found}, in f32 {expected}, the largest {largest}");
    }
}

fn narrow(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|value| bf16::from_f32(*value)).collect()
}

fn widen(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}
