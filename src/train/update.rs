//! From the summed gradient to new parameters, bucket by bucket.

use super::checkpoint::{State, Tensor, state_name};
use crate::config::raw;
use crate::device::Arena;
use crate::error::Result;
use crate::model::net::Net;
use crate::model::params::{Param, ParamTable, Role};
use crate::optim::{self, At, Optimizer, clip};
use std::ops::Range;

/// The optimizer and its state, which lies in arenas of the parameters' layout.
pub struct Updater {
    rule: Box<dyn Optimizer>,
    state: Vec<Arena>,
    clip_value: Option<f32>,
    clip_norm: Option<f32>,
}

impl Updater {
    pub fn new(config: &raw::Optimizer, table: &ParamTable) -> Result<Updater> {
        let rule = optim::new(config);
        let bytes = table.len() * size_of::<f32>();
        let state = rule.state().iter().map(|_| Arena::host(bytes)).collect::<Result<_>>()?;
        let raw::OptimizerShared { clip_value, clip_norm, .. } = config.shared;
        Ok(Updater { rule, state, clip_value, clip_norm })
    }

    /// Whether the update needs the whole gradient before it can begin.
    pub fn needs_norm(&self) -> bool {
        self.clip_norm.is_some()
    }

    /// What every trainable gradient is multiplied by, from the sum of squares over the whole gradient.
    pub fn norm_factor(&self, squares: f64) -> f32 {
        self.clip_norm.map_or(1.0, |limit| clip::norm_factor(squares, limit))
    }

    /// Sum of squares over the trainable tensors of one bucket.
    pub fn squares(table: &ParamTable, bucket: &Range<usize>, grads: &[f32]) -> f64 {
        tensors(table, bucket)
            .filter(|param| param.spec.role == Role::Trainable)
            .map(|param| clip::sum_of_squares(&grads[within(bucket, param)]))
            .sum()
    }

    /// Updates the tensors of one bucket; with both kinds of clipping, by norm first. `grads` are the bucket's elements, summed over all ranks.
    pub fn update(&mut self, net: &mut Net, bucket: &Range<usize>, grads: &mut [f32], factor: f32, at: At) {
        let (table, mut weights) = net.weights_mut();
        for param in tensors(table, bucket) {
            let values = &mut weights.f32[param.range.clone()];
            let grads = &mut grads[within(bucket, param)];
            match param.spec.role {
                Role::Running { momentum } => {
                    let mix = |(value, mean): (&mut f32, &f32)| *value += momentum * (mean - *value);
                    values.iter_mut().zip(&*grads).for_each(mix);
                }
                Role::Trainable => {
                    clip::scale(grads, factor);
                    if let Some(limit) = self.clip_value {
                        clip::clip_value(grads, limit);
                    }
                    self.update_tensor(at, values, grads, &param.range);
                }
            }
            weights.mirror(param.range.clone());
        }
    }

    fn update_tensor(&mut self, at: At, values: &mut [f32], grads: &[f32], range: &Range<usize>) {
        let bytes = range.start * size_of::<f32>()..range.end * size_of::<f32>();
        // SAFETY: `&mut self`, and every state tensor has an arena of its own.
        let of = |arena: &Arena| unsafe { arena.slice_mut(bytes.clone()) }.into_f32();
        match &self.state[..] {
            [] => self.rule.update(at, values, grads, &mut []),
            [a] => self.rule.update(at, values, grads, &mut [of(a)]),
            [a, b] => self.rule.update(at, values, grads, &mut [of(a), of(b)]),
            more => unreachable!("an optimizer with {} state tensors", more.len()),
        }
    }

    /// The optimizer's state, tensor by tensor of `Optimizer::state`, each in the layout of the parameters.
    pub fn state_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        // SAFETY: `&mut self`, and the arenas are apart.
        self.state.iter_mut().map(|arena| unsafe { arena.slice_mut(0..arena.bytes()) }.into_f32())
    }

    /// All parameters and all optimizer state, canonical.
    pub fn export(&self, net: &Net) -> Vec<Tensor> {
        let mut tensors = export_params(net);
        self.each_state(net.table(), |name, param, values| {
            let mut canonical = vec![0.0; param.spec.len()];
            param.spec.to_canonical(values, &mut canonical);
            tensors.push(Tensor { name, shape: param.spec.shape.clone(), values: canonical });
            Ok(())
        })
        .expect("exporting cannot fail");
        tensors
    }

    /// Whether all tensors of a checkpoint are of this net and optimizer.
    pub fn fits(&self, table: &ParamTable, state: &State) -> Result<()> {
        table.params.iter().try_for_each(|param| state.tensor(&param.name, &param.spec.shape).map(|_| ()))?;
        self.each_state(table, |name, param, _| state.tensor(&name, &param.spec.shape).map(|_| ()))
    }

    /// The counterpart of `export`: fails, naming the tensor, where the state does not fit this net and optimizer.
    pub fn import(&mut self, net: &mut Net, state: &State) -> Result<()> {
        import_params(net, state)?;
        self.each_state(net.table(), |name, param, values| {
            param.spec.to_arena(&state.tensor(&name, &param.spec.shape)?.values, values);
            Ok(())
        })
    }

    fn each_state(
        &self,
        table: &ParamTable,
        mut visit: impl FnMut(String, &Param, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        for (name, arena) in self.rule.state().iter().zip(&self.state) {
            for param in table.params.iter().filter(|param| param.spec.role == Role::Trainable) {
                let bytes = param.range.start * size_of::<f32>()..param.range.end * size_of::<f32>();
                // SAFETY: between steps nobody else uses the state.
                visit(state_name(name, &param.name), param, unsafe { arena.slice_mut(bytes) }.into_f32())?;
            }
        }
        Ok(())
    }
}

/// All parameters in canonical layout.
pub fn export_params(net: &Net) -> Vec<Tensor> {
    let export = |param: &Param| {
        let mut values = vec![0.0; param.spec.len()];
        param.spec.to_canonical(&net.params()[param.range.clone()], &mut values);
        Tensor { name: param.name.clone(), shape: param.spec.shape.clone(), values }
    };
    net.table().params.iter().map(export).collect()
}

/// Sets all parameters from a checkpoint; fails, naming the tensor, where it was made by another net.
pub fn import_params(net: &mut Net, state: &State) -> Result<()> {
    let (table, mut weights) = net.weights_mut();
    for param in &table.params {
        let tensor = state.tensor(&param.name, &param.spec.shape)?;
        param.spec.to_arena(&tensor.values, &mut weights.f32[param.range.clone()]);
    }
    weights.refresh_bf16();
    Ok(())
}

/// Buckets end where layers end, so a tensor is in a bucket as a whole or not at all.
fn tensors<'a>(table: &'a ParamTable, bucket: &'a Range<usize>) -> impl Iterator<Item = &'a Param> {
    table.params.iter().filter(|param| bucket.contains(&param.range.start))
}

fn within(bucket: &Range<usize>, param: &Param) -> Range<usize> {
    param.range.start - bucket.start..param.range.end - bucket.start
}
