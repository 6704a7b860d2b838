//! The plans of a layer's products.

use super::super::super::Activation;
use super::super::Geometry;
use super::arrangement::{Arrangement, convolution};
use crate::device::cuda::Gpu;
use crate::device::cuda::cudnn::{self, Graph, Handle, Plan, Product, Rules};
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use std::sync::Arc;

/// For one number of samples.
pub struct Plans {
    pub batch: usize,
    pub forward: Plan,
    /// Nothing where backward, or the gradient by the input, is not wanted.
    pub weight: Option<Plan>,
    pub data: Option<Plan>,
}

impl Plans {
    pub fn workspace_bytes(&self) -> usize {
        let plans = [Some(&self.forward), self.weight.as_ref(), self.data.as_ref()];
        plans.into_iter().flatten().map(Plan::workspace_bytes).max().unwrap_or(0)
    }
}

/// What is planned.
pub struct Planner {
    pub gpu: Gpu,
    pub handle: Handle,
    pub element: Element,
    pub geometry: Geometry,
    pub arrangement: Option<Arrangement>,
    pub bias: bool,
    pub activation: Activation,
    pub masks_input: bool,
    pub training: bool,
    pub grad_inputs: bool,
    pub rules: Rules,
}

/// How one of several plans is chosen.
#[derive(Clone, Copy)]
enum Choice {
    /// Each is tried. Waits for the GPU.
    Timed,
    /// The first whose workspace is there.
    First { workspace: usize },
}

impl Planner {
    /// The fastest plans, for the greatest number of samples.
    pub fn timed(&self, batch: usize) -> Result<Plans> {
        self.plans(batch, Choice::Timed)
    }

    /// Good ones, for any number of samples that comes up later, and for the workspace that was made.
    pub fn untimed(&self, batch: usize, workspace: usize) -> Result<Plans> {
        self.plans(batch, Choice::First { workspace })
    }

    fn plans(&self, batch: usize, choice: Choice) -> Result<Plans> {
        let (fused, plain) = (self.forward(), Product::Forward { bias: false, relu: false });
        let masked = Product::Data { mask: self.masks_input && self.arrangement.is_none() };
        let data = || self.plan(batch, &[masked, Product::Data { mask: false }], choice);
        // Where no engine leaves sums in f32, they are widened behind it.
        let weight = || match self.element {
            Element::F32 => self.plan(batch, &[Product::Weight { wide: true }], choice),
            _ => self.plan(batch, &[Product::Weight { wide: true }, Product::Weight { wide: false }], choice),
        };
        Ok(Plans {
            batch,
            forward: self.plan(batch, &[fused, plain], choice)?,
            weight: self.training.then(weight).transpose()?,
            data: (self.training && self.grad_inputs).then(data).transpose()?,
        })
    }

    /// With all that can be fused. Sigmoid and tanh come behind the bias, and have kernels of their own.
    fn forward(&self) -> Product {
        match self.activation.is_relu_or_none() {
            true => Product::Forward { bias: self.bias, relu: self.activation == Activation::Relu },
            false => Product::Forward { bias: false, relu: false },
        }
    }

    /// Of the first product for which there is an engine. cuDNN may refuse a graph, or propose nothing for it.
    fn plan(&self, batch: usize, products: &[Product], choice: Choice) -> Result<Plan> {
        let convolution = convolution(&self.geometry, self.arrangement.as_ref(), batch);
        let mut reason = None;
        for &product in products {
            let graph = Graph::new(&self.handle, convolution, product, self.element).map(Arc::new);
            let plan = graph.and_then(|graph| self.choose(&graph, choice));
            match plan {
                Ok(plan) => return Ok(plan),
                Err(error) => reason = Some(error),
            }
        }
        Err(reason.expect("a product is wanted"))
    }

    fn choose(&self, graph: &Arc<Graph>, choice: Choice) -> Result<Plan> {
        let plan = match choice {
            Choice::Timed => cudnn::fastest(&self.gpu, graph, self.rules),
            Choice::First { workspace } => cudnn::first(graph, Rules { workspace, ..self.rules }),
        };
        plan.map_err(|error| error.context(self.gpu.device()))
    }
}
