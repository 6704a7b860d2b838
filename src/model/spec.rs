//! The network before it has memory: order, connections and shapes, each inferred once.

use super::layers::{Parsed, addressable};
use super::{Inferred, LayerSpec, Shape};
use crate::config::raw;
use crate::device::Place;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

/// Inputs at most of one layer; lets a pass keep its lists on the stack.
pub const MAX_INPUTS: usize = 16;
/// Parameter tensors at most of one layer.
pub const MAX_PARAMS: usize = 4;

/// An activation: 0 is the data, i + 1 the output of node i.
pub type Activation = usize;
pub const DATA: Activation = 0;

/// A layer in its place.
#[derive(Clone, Debug)]
pub struct Node {
    pub name: String,
    pub kind: &'static str,
    pub spec: Arc<dyn LayerSpec>,
    pub inputs: Vec<Activation>,
    pub inferred: Inferred,
    /// Whether backward has anything to do here: parameters in this layer or before it.
    pub learns: bool,
    /// See `Build`.
    pub masks_input: bool,
    pub grad_masked: bool,
    pub sums_input: bool,
    pub grad_summed: bool,
}

/// The whole network; nodes stand in the order of forward, and the last one's output is the network's.
#[derive(Clone, Debug)]
pub struct NetSpec {
    pub input: Shape,
    pub nodes: Vec<Node>,
}

impl NetSpec {
    pub fn new(model: &raw::Model) -> Result<NetSpec> {
        let [h, w, c] = model.input;
        let mut net = NetSpec { input: Shape::new(h, w, c), nodes: Vec::with_capacity(model.layers.len()) };
        addressable("sample", &model.input).map_err(|reason| Error::usage(format!("model.input: {reason}")))?;
        let mut by_name = HashMap::from([("input".to_owned(), DATA)]);
        for entry in &model.layers {
            let earlier = |name: &String| *by_name.get(name).expect("config::rules lets only earlier layers pass");
            let inputs = match &entry.from[..] {
                [] => vec![net.nodes.len()],
                names => names.iter().map(earlier).collect(),
            };
            let node = net.place(&entry.name, entry.kind, &entry.parsed, inputs)?;
            net.nodes.push(node);
            by_name.insert(entry.name.clone(), net.nodes.len());
        }
        net.refuse_unused()?;
        net.hand_over(|inferred| inferred.can_mask_input);
        Ok(net)
    }

    /// The same for a device: layers say what they do on the CPU, and more on a GPU.
    pub fn on(mut self, place: Place) -> NetSpec {
        if place == Place::Cuda {
            self.hand_over(|inferred| inferred.can_mask_input || inferred.can_mask_input_on_gpu);
        }
        self
    }

    /// What the only reader of an output can do for the layer in front with its own backward, it does: the backward of a ReLU,
    /// and then the gradient of a bias. Passes over the gradient are saved, and the output need not be kept for the ReLU's.
    fn hand_over(&mut self, can_mask_input: impl Fn(&Inferred) -> bool) {
        for node in 0..self.nodes.len() {
            let inputs = |reader: &Node| reader.inputs.iter().filter(|&&input| input == node + 1).count();
            let readers: Vec<usize> = (0..self.nodes.len()).filter(|&at| inputs(&self.nodes[at]) > 0).collect();
            let &[reader] = &readers[..] else { continue };
            let (own, other) = (&self.nodes[node].inferred, &self.nodes[reader].inferred);
            let masks = own.relu_output && can_mask_input(other);
            let sums = own.adds_bias && other.can_sum_input && (masks || !own.relu_output);
            (self.nodes[node].grad_masked, self.nodes[reader].masks_input) = (masks, masks);
            (self.nodes[node].grad_summed, self.nodes[reader].sums_input) = (sums, sums);
            self.nodes[node].inferred.backward_reads_output &= !masks;
        }
    }

    /// Shape of one sample's activation.
    pub fn shape(&self, activation: Activation) -> Shape {
        match activation.checked_sub(1) {
            None => self.input,
            Some(node) => self.nodes[node].inferred.output,
        }
    }

    pub fn output(&self) -> Shape {
        self.shape(self.nodes.len())
    }

    /// Shapes of what a node reads.
    pub fn input_shapes(&self, node: usize) -> Vec<Shape> {
        self.nodes[node].inputs.iter().map(|&activation| self.shape(activation)).collect()
    }

    /// Whether anyone needs the gradient of this activation.
    pub fn needs_gradient(&self, activation: Activation) -> bool {
        activation.checked_sub(1).is_some_and(|node| self.nodes[node].learns)
    }

    /// Whether backward gives gradients by parameters and gradients by inputs in this node.
    pub fn has_both_gradients(&self, node: usize) -> bool {
        let Node { inferred, inputs, .. } = &self.nodes[node];
        !inferred.params.is_empty() && inputs.iter().any(|&input| self.needs_gradient(input))
    }

    fn place(&self, name: &str, kind: &'static str, parsed: &Parsed, inputs: Vec<Activation>) -> Result<Node> {
        if inputs.len() > MAX_INPUTS {
            return Err(Error::usage(format!(
                "layer `{name}` reads {} inputs; at most {MAX_INPUTS} are possible",
                inputs.len()
            )));
        }
        let shapes: Vec<Shape> = inputs.iter().map(|&activation| self.shape(activation)).collect();
        let inferred = parsed.spec.infer(&shapes).and_then(|inferred| {
            addressable("output", &inferred.output.lengths())?;
            Ok(inferred)
        });
        let inferred = inferred.map_err(|reason| {
            let sources = inputs.iter().zip(&shapes).map(|(&activation, shape)| match activation.checked_sub(1) {
                None => format!("the input ({shape})"),
                Some(node) => format!("`{}` ({shape})", self.nodes[node].name),
            });
            let sources = sources.collect::<Vec<_>>().join(" and ");
            Error::usage(format!("layer `{name}` ({kind}) does not fit after {sources}: {reason}"))
        })?;
        assert!(inferred.params.len() <= MAX_PARAMS, "{kind} declares {} parameters", inferred.params.len());
        let learns = !inferred.params.is_empty() || inputs.iter().any(|&activation| self.needs_gradient(activation));
        Ok(Node {
            name: name.to_owned(),
            kind,
            spec: parsed.spec.clone(),
            inputs,
            inferred,
            learns,
            masks_input: false,
            grad_masked: false,
            sums_input: false,
            grad_summed: false,
        })
    }

    fn refuse_unused(&self) -> Result<()> {
        let Some(last) = self.nodes.len().checked_sub(1) else {
            return Err(Error::usage("the model has no layers; add at least one [[model.layers]]"));
        };
        let used = |node: usize| self.nodes.iter().any(|other| other.inputs.contains(&(node + 1)));
        match (0..last).find(|&node| !used(node)) {
            Some(node) => Err(Error::usage(format!(
                "nothing reads layer `{}`; name it in a later layer's `from`, or take it out",
                self.nodes[node].name
            ))),
            None => Ok(()),
        }
    }
}
