//! The linear layer on a GPU: three products of cuBLASLt, each planned when the layer is built.
//!
//! ```text
//! forward            y (batch, units)    = activation(x (batch, inputs)  W^T (inputs, units)  + bias)
//! backward, weight   dW (units, inputs)  = dy^T (units, batch)  x (batch, inputs),   dbias = the sums of dy^T's rows
//! backward, data     dx (batch, inputs)  = dy (batch, units)  W (units, inputs)
//! ```
//!
//! Bias and ReLU are added to y on its way to memory, and the bias's gradient is summed where the product reads dy, if the
//! library has an algorithm that does; else by a kernel of our own. ReLU's backward takes its mask from y, as on the CPU: y is
//! kept anyway, and a mask of bits (cuBLASLt's RELU_AUX) would serve no product here, since the one whose result it masks
//! (DRELU) is in the layer behind. Sums are in f32; of 16-bit layers only the gradients of the parameters are stored so.

use super::super::super::{Backward, Build, Forward, Layer, Pass};
use super::super::Activation;
use super::super::activation::cuda::{Function, Gradient};
use crate::device::cuda::Gpu;
use crate::device::cuda::cublaslt::{Epilogue, Matmul, Operands, Product};
use crate::device::cuda::kernels::{Element, Grid, Kernel, Read, Source, T, Write};
use crate::device::{Slice, SliceMut};
use crate::error::Result;

static SOURCE: Source = Source { name: "linear", text: include_str!("linear.cu") };

pub struct Linear {
    gpu: Gpu,
    element: Element,
    forward: Matmul,
    /// What the product does not do itself.
    function: Function,
    /// Where backward will be called.
    backward: Option<Gradients>,
}

struct Gradients {
    undo: Gradient,
    weight: Matmul,
    bias: Bias,
    /// By the input, where somebody wants it.
    data: Option<Matmul>,
}

/// Who sums the bias's gradient.
enum Bias {
    None,
    /// The product that makes the weight's.
    Product,
    Kernel(Kernel<(Read<T>, Write<f32>, u32, u32)>),
}

impl Linear {
    pub fn new(
        (inputs, units): (usize, usize),
        bias: bool,
        activation: Activation,
        element: Element,
        build: &Build<'_>,
    ) -> Result<Linear> {
        let gpu = Gpu::of_this_rank()?;
        let (epilogue, function) = match (bias, activation) {
            (true, Activation::Relu) => (Epilogue::BiasRelu, Activation::None),
            (true, _) => (Epilogue::Bias, activation),
            (false, Activation::Relu) => (Epilogue::Relu, Activation::None),
            (false, _) => (Epilogue::None, activation),
        };
        let forward = Product {
            m: build.batch,
            n: units,
            k: inputs,
            transpose_left: false,
            transpose_right: true,
            factors: element,
            result: element,
            tf32: build.tf32,
            epilogue,
        };
        let undo = activation.to_undo(build);
        let backward = build.training.then(|| Gradients::new(&gpu, &forward, bias, undo, build.grad_inputs));
        Ok(Linear {
            forward: Matmul::new(&gpu, &forward)?,
            function: Function::new(&gpu, function, element)?,
            backward: backward.transpose()?,
            gpu,
            element,
        })
    }

    /// f32 layers read the parameters themselves, others the rounded ones.
    fn choose<'a>(&self, params: &'a [Slice<'a>], rounded: &'a [Slice<'a>]) -> &'a [Slice<'a>] {
        if self.element == Element::F32 { params } else { rounded }
    }
}

impl Gradients {
    fn new(gpu: &Gpu, forward: &Product, bias: bool, undo: Activation, data: bool) -> Result<Gradients> {
        let plain = Product { transpose_right: false, epilogue: Epilogue::None, ..*forward };
        let weight =
            Product { m: forward.n, n: forward.k, k: forward.m, transpose_left: true, result: Element::F32, ..plain };
        let data = data.then(|| Matmul::new(gpu, &Product { n: forward.k, k: forward.n, ..plain }));
        let (weight, bias) = weight_and_bias(gpu, weight, bias)?;
        Ok(Gradients { undo: Gradient::new(gpu, undo, forward.factors)?, weight, bias, data: data.transpose()? })
    }
}

/// The product, with the bias's sums in it if it can have them.
fn weight_and_bias(gpu: &Gpu, product: Product, bias: bool) -> Result<(Matmul, Bias)> {
    if !bias {
        return Ok((Matmul::new(gpu, &product)?, Bias::None));
    }
    match Matmul::new(gpu, &Product { epilogue: Epilogue::SumLeft, ..product }) {
        Ok(matmul) => Ok((matmul, Bias::Product)),
        Err(error) => {
            tracing::debug!("the bias's gradient gets a kernel of its own: {error}");
            let kernel = gpu.module(&SOURCE, product.factors)?.kernel("sum_rows")?;
            Ok((Matmul::new(gpu, &product)?, Bias::Kernel(kernel)))
        }
    }
}

impl Layer for Linear {
    fn scratch_bytes(&self) -> usize {
        let backward = self.backward.iter().flat_map(|gradients| gradients.data.iter().chain([&gradients.weight]));
        backward.chain([&self.forward]).map(Matmul::workspace_bytes).max().unwrap_or(0)
    }

    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let params = self.choose(io.params, io.params_rounded);
        let operands = Operands {
            left: io.inputs[0],
            right: params[0],
            result: io.output.reborrow(),
            bias: params.get(1).map_or(0, |bias| bias.address()),
            workspace: io.scratch,
        };
        self.forward.run(pass.batch, operands)?;
        // SAFETY: y is in the net's arenas.
        unsafe { self.function.apply(io.output) }
    }

    fn backward(&mut self, pass: &Pass, mut io: Backward<'_>) -> Result<()> {
        assert_eq!(io.factors.bytes(), 0, "ranks on GPUs exchange gradients, not factors");
        let weight = self.choose(io.params, io.params_rounded)[0];
        let gradients = self.backward.as_mut().expect("a layer is built for training if it is trained");
        // SAFETY: dy and y are in the net's arenas.
        unsafe { gradients.undo.apply_in_place(io.output, io.grad_output.reborrow()) }?;
        let dy = io.grad_output.into_shared();
        gradients.by_params(&self.gpu, pass.batch, [io.inputs[0], dy], io.grad_params, io.scratch.reborrow())?;
        if let Some(data) = gradients.data.as_mut().filter(|_| io.grad_inputs[0].bytes() > 0) {
            let result = io.grad_inputs[0].reborrow();
            data.run(pass.batch, Operands { left: dy, right: weight, result, bias: 0, workspace: io.scratch })?;
        }
        Ok(())
    }
}

impl Gradients {
    fn by_params(
        &mut self,
        gpu: &Gpu,
        batch: usize,
        [x, dy]: [Slice<'_>; 2],
        grads: &mut [SliceMut<'_>],
        workspace: SliceMut<'_>,
    ) -> Result<()> {
        let [weight, bias @ ..] = grads else { unreachable!("infer declares a weight") };
        let sums = match (&self.bias, &*bias) {
            (Bias::Product, [bias]) => bias.address(),
            _ => 0,
        };
        let operands = Operands { left: dy, right: x, result: weight.reborrow(), bias: sums, workspace };
        self.weight.run(batch, operands)?;
        let (Bias::Kernel(sum_rows), [bias]) = (&self.bias, bias) else { return Ok(()) };
        let units = bias.bytes() / size_of::<f32>();
        let grid = Grid { blocks: [units.div_ceil(32) as u32, 1, 1], threads: [256, 1, 1], shared_bytes: 0 };
        let arguments = (dy.into(), bias.into(), batch as u32, units as u32);
        // SAFETY: dy (batch, units) and a sum for each unit, in the net's arenas.
        unsafe { sum_rows.launch(gpu.compute(), grid, arguments) }
    }
}
