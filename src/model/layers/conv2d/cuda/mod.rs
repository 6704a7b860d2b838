//! The convolution on a GPU: three products of cuDNN (`plans`), and kernels for what is not fused into them.
//!
//! The weight lies in the arena as cuDNN wants filters for NHWC images, (F, KH, KW, C / groups), and so does its gradient: no
//! copy is made of either, unless the images are arranged (`arrangement`). Plans are made when the layer is built, for the
//! greatest number of samples, and timed. One for fewer samples, such as an epoch's last batch, is made when they first come,
//! without timing; that pass allocates on the host, none on the GPU.

mod arrangement;
mod kernels;
mod plans;

use super::super::super::{Backward, Build, Forward, GpuScratch, Layer, Pass};
use super::super::Activation;
use super::super::activation::cuda::{Function, Gradient};
use super::super::channel_sums;
use super::{Algorithm, Geometry};
use crate::device::cuda::cudnn::{Plan, Product, Rules};
use crate::device::cuda::kernels::Element;
use crate::device::cuda::{Elementwise, Gpu, WORKSPACE_PART};
use crate::device::{Slice, SliceMut};
use crate::error::Result;
use arrangement::Arrangement;
use kernels::{Images, Kernels};
use plans::{Planner, Plans};

/// Bytes of workspace at most that a plan may use. In f32 the fast engines without tensor cores want much: cuDNN 9.26 proposes
/// one of 871 MiB for AlexNet's first layer at batch 512, and below that only slow ones.
const WORKSPACE_16_BITS: usize = 128 << 20;
const WORKSPACE_F32: usize = 1 << 30;
/// Bytes to whose multiples the parts of the scratch are aligned: a GPU's transaction.
const ALIGN: usize = 128;

pub struct Conv2d {
    planner: Planner,
    undo: Activation,
    /// Whether the bias's gradient is summed here, and not by the reader of the output.
    sums_bias: bool,
    /// For the numbers of samples that were met, the greatest first.
    plans: Vec<Plans>,
    kernels: Kernels,
    function: Function,
    gradient: Gradient,
    mask: Gradient,
    elementwise: Elementwise,
    lengths: Lengths,
}

/// Bytes of the parts of the scratch.
#[derive(Clone, Copy, Default)]
struct Lengths {
    workspace: usize,
    /// Arranged images and filters, and the gradients by them.
    images: usize,
    filters: usize,
    grad_images: usize,
    grad_filters: usize,
    /// The weight's gradient, where the product does not leave it in f32.
    narrow: usize,
    /// Of the parts of dy.
    sums: usize,
}

struct Scratch<'a> {
    workspace: SliceMut<'a>,
    images: SliceMut<'a>,
    filters: SliceMut<'a>,
    grad_images: SliceMut<'a>,
    grad_filters: SliceMut<'a>,
    narrow: SliceMut<'a>,
    sums: SliceMut<'a>,
}

impl Conv2d {
    pub fn new(
        geometry: Geometry,
        bias: bool,
        activation: Activation,
        algorithm: Algorithm,
        element: Element,
        build: &Build<'_>,
    ) -> Result<Conv2d> {
        let gpu = Gpu::of_this_rank()?;
        let undo = activation.to_undo(build);
        let planner = Planner {
            handle: gpu.cudnn()?,
            element,
            arrangement: Arrangement::of(&geometry),
            geometry,
            bias,
            activation,
            masks_input: build.masks_input,
            training: build.training,
            grad_inputs: build.grad_inputs,
            rules: Rules {
                nondeterministic: build.nondeterministic,
                tf32: build.tf32,
                direct: algorithm == Algorithm::Direct,
                workspace: workspace(element).min(gpu.memory()?.total / WORKSPACE_PART),
            },
            gpu: gpu.clone(),
        };
        let plans = planner.timed(build.batch)?;
        let kernels = Kernels::new(&gpu, element, geometry.output.c)?;
        let sums_bias = bias && build.training && !build.grad_summed;
        Ok(Conv2d {
            lengths: Lengths::new(&geometry, bias, element, build, plans.workspace_bytes()),
            plans: vec![plans],
            sums_bias,
            kernels,
            function: Function::new(&gpu, activation, element)?,
            gradient: Gradient::new(&gpu, undo, element)?,
            mask: Gradient::new(&gpu, Activation::Relu, element)?,
            elementwise: Elementwise::new(&gpu, element)?,
            planner,
            undo,
        })
    }

    /// The number of the plans for so many samples.
    fn plans_for(&mut self, batch: usize) -> Result<usize> {
        if let Some(known) = self.plans.iter().position(|plans| plans.batch == batch) {
            return Ok(known);
        }
        self.plans.push(self.planner.untimed(batch, self.lengths.workspace)?);
        Ok(self.plans.len() - 1)
    }

    /// Weight or bias for cuDNN: f32 layers read the parameter itself, others the rounded one.
    fn parameter<'a>(&self, number: usize, params: &[Slice<'a>], rounded: &[Slice<'a>]) -> Slice<'a> {
        if self.planner.element == Element::F32 { params[number] } else { rounded[number] }
    }

    fn images(&self, arrangement: &Arrangement, count: usize) -> Images {
        let Geometry { input, rows, columns, .. } = self.planner.geometry;
        let before = [rows.before, columns.before];
        Images { count, lengths: input.lengths(), block: arrangement.block, blocks: arrangement.image, before }
    }

    fn filters(&self, arrangement: &Arrangement) -> Images {
        let Geometry { output, rows, columns, .. } = self.planner.geometry;
        let lengths = [rows.size, columns.size, self.planner.geometry.channels()];
        Images::filters(arrangement, output.c, lengths)
    }

    /// x as the products want it.
    fn arranged_images<'a>(&self, batch: usize, x: Slice<'a>, mut to: SliceMut<'a>) -> Result<Slice<'a>> {
        let Some(arrangement) = &self.planner.arrangement else { return Ok(x) };
        let images = self.images(arrangement, batch);
        let mut to = to.take(images.arranged_bytes(self.planner.element));
        // SAFETY: the scratch is this call's, in whose stream its next use comes later.
        unsafe { self.kernels.arrange(images, x, to.reborrow()) }?;
        Ok(to.into_shared())
    }

    /// The weight as the products want it.
    fn arranged_filters<'a>(&self, weight: Slice<'a>, mut to: SliceMut<'a>) -> Result<Slice<'a>> {
        let Some(arrangement) = &self.planner.arrangement else { return Ok(weight) };
        // SAFETY: as above.
        unsafe { self.kernels.arrange(self.filters(arrangement), weight, to.reborrow()) }?;
        Ok(to.into_shared())
    }

    /// What the product did not do itself.
    fn finish_forward(&self, product: Product, y: SliceMut<'_>, bias: Option<Slice<'_>>) -> Result<()> {
        let Product::Forward { bias: biased, relu } = product else { unreachable!("forward's plan") };
        let activation = if relu { Activation::None } else { self.planner.activation };
        // SAFETY: both are in the net's arenas.
        unsafe {
            match bias.filter(|_| !biased) {
                Some(bias) => self.kernels.add_bias(y, bias, activation),
                None if activation != Activation::None => self.function.apply(y),
                None => Ok(()),
            }
        }
    }

    /// Undoes the activation in dy, and gives the bias's gradient.
    fn backward_bias(
        &self,
        y: Slice<'_>,
        dy: SliceMut<'_>,
        grad_bias: &mut [SliceMut<'_>],
        sums: SliceMut<'_>,
    ) -> Result<()> {
        // SAFETY: all are in the net's arenas.
        unsafe {
            match grad_bias {
                [grad, ..] if self.sums_bias => self.kernels.bias_gradient(self.undo, y, dy, sums, grad.reborrow()),
                _ => self.gradient.apply_in_place(y, dy),
            }
        }
    }

    /// From x, arranged, and dy.
    fn backward_weight(
        &mut self,
        number: usize,
        [x, dy]: [Slice<'_>; 2],
        mut grad: SliceMut<'_>,
        scratch: &mut Scratch<'_>,
    ) -> Result<()> {
        let arrangement = self.planner.arrangement;
        let plan = self.plans[number].weight.as_mut().expect("the layer was built for training");
        let result = if arrangement.is_some() { scratch.grad_filters.reborrow() } else { grad.reborrow() };
        let wide = plan.graph().product == Product::Weight { wide: true };
        let written = if wide { result.address() } else { scratch.narrow.address() };
        // SAFETY: buffers of these lengths, in the net's arenas and this call's scratch.
        unsafe {
            plan.run(&[x.address(), dy.address(), written], scratch.workspace.address())?;
            if !wide {
                self.elementwise.widen(scratch.narrow.as_slice(), result)?;
            }
            match &arrangement {
                None => Ok(()),
                Some(arrangement) => {
                    let (filters, from) = (self.filters(arrangement), scratch.grad_filters.as_slice());
                    self.kernels.restore(filters, from, grad, Element::F32)
                }
            }
        }
    }

    /// From dy and the weight, arranged; x is that of the layer.
    fn backward_data(
        &mut self,
        number: usize,
        [x, dy, weight]: [Slice<'_>; 3],
        mut grad: SliceMut<'_>,
        scratch: &mut Scratch<'_>,
    ) -> Result<()> {
        let (batch, arrangement, element) = (self.plans[number].batch, self.planner.arrangement, self.planner.element);
        let plan = self.plans[number].data.as_mut().expect("the layer was built for a gradient by its input");
        let masked = plan.graph().product == Product::Data { mask: true };
        let written = if arrangement.is_some() { scratch.grad_images.address() } else { grad.address() };
        let workspace = scratch.workspace.address();
        // SAFETY: buffers of these lengths, in the net's arenas and this call's scratch.
        unsafe {
            match masked {
                true => plan.run(&[dy.address(), weight.address(), x.address(), written], workspace),
                false => plan.run(&[dy.address(), weight.address(), written], workspace),
            }?;
            if let Some(arrangement) = &arrangement {
                let images = self.images(arrangement, batch);
                let from = scratch.grad_images.take(images.arranged_bytes(element));
                self.kernels.restore(images, from.as_slice(), grad.reborrow(), element)?;
            }
            match self.planner.masks_input && !masked {
                true => self.mask.apply_in_place(x, grad),
                false => Ok(()),
            }
        }
    }
}

/// What the layer will work in: all but the workspace, which timing decides on, and the most that this may be.
pub fn scratch(geometry: &Geometry, bias: bool, element: Element, build: &Build<'_>) -> GpuScratch {
    let lengths = Lengths::new(geometry, bias, element, build, 0);
    GpuScratch { bytes: lengths.total(), workspace: workspace(element) }
}

/// Whether the product that makes the gradient by the images can mask it: not where they are arranged.
pub fn can_mask_input(geometry: &Geometry) -> bool {
    Arrangement::of(geometry).is_none()
}

fn workspace(element: Element) -> usize {
    if element == Element::F32 { WORKSPACE_F32 } else { WORKSPACE_16_BITS }
}

impl Layer for Conv2d {
    fn scratch_bytes(&self) -> usize {
        self.lengths.total()
    }

    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let number = self.plans_for(pass.batch)?;
        let scratch = self.lengths.split(io.scratch);
        let x = self.arranged_images(pass.batch, io.inputs[0], scratch.images)?;
        let weight = self.arranged_filters(self.parameter(0, io.params, io.params_rounded), scratch.filters)?;
        let bias = self.planner.bias.then(|| [io.params[1], self.parameter(1, io.params, io.params_rounded)]);
        let plan: &mut Plan = &mut self.plans[number].forward;
        let product = plan.graph().product;
        let (y, workspace) = (io.output.address(), scratch.workspace.address());
        // SAFETY: buffers of these lengths, in the net's arenas and this call's scratch.
        unsafe {
            match (product, bias) {
                (Product::Forward { bias: true, .. }, Some([_, bias])) => {
                    plan.run(&[x.address(), weight.address(), bias.address(), y], workspace)
                }
                _ => plan.run(&[x.address(), weight.address(), y], workspace),
            }
        }?;
        self.finish_forward(product, io.output.reborrow(), bias.map(|[wide, _]| wide))
    }

    fn backward(&mut self, pass: &Pass, mut io: Backward<'_>) -> Result<()> {
        let number = self.plans_for(pass.batch)?;
        let mut scratch = self.lengths.split(io.scratch);
        let [grad_weight, grad_bias @ ..] = io.grad_params else { unreachable!("infer declares a weight") };
        self.backward_bias(io.output, io.grad_output.reborrow(), grad_bias, scratch.sums.reborrow())?;
        let (x, dy) = (io.inputs[0], io.grad_output.into_shared());
        let images = self.arranged_images(pass.batch, x, std::mem::replace(&mut scratch.images, SliceMut::empty()))?;
        self.backward_weight(number, [images, dy], grad_weight.reborrow(), &mut scratch)?;
        let [grad_input] = io.grad_inputs else { unreachable!("infer takes one input") };
        if grad_input.bytes() == 0 {
            return Ok(());
        }
        let weight = self.parameter(0, io.params, io.params_rounded);
        let filters = self.arranged_filters(weight, std::mem::replace(&mut scratch.filters, SliceMut::empty()))?;
        self.backward_data(number, [x, dy, filters], grad_input.reborrow(), &mut scratch)
    }
}

impl Lengths {
    /// For the greatest number of samples, and plans that want so much workspace.
    fn new(geometry: &Geometry, bias: bool, element: Element, build: &Build<'_>, workspace: usize) -> Lengths {
        let Geometry { input, output, .. } = *geometry;
        let &Build { batch, training, grad_inputs, .. } = build;
        let (value, channels) = (element.bytes(), geometry.channels());
        let [images, filters, weights] = match Arrangement::of(geometry) {
            Some(arrangement) => {
                let filters = output.c * arrangement.len(arrangement.filter, channels);
                [batch * arrangement.len(arrangement.image, input.c), filters, filters]
            }
            None => [0, 0, geometry.taps() * output.c],
        };
        let if_wanted = |wanted: bool, bytes: usize| if wanted { bytes } else { 0 };
        let sums_bias = training && bias && !build.grad_summed;
        Lengths {
            workspace,
            images: images * value,
            filters: filters * value,
            grad_images: if_wanted(training && grad_inputs, images * value),
            grad_filters: if_wanted(training, filters * size_of::<f32>()),
            // Whether a product leaves f32 may depend on the number of samples.
            narrow: if_wanted(training && element != Element::F32, weights * value),
            sums: if_wanted(sums_bias, channel_sums::parts_bytes(batch * output.h * output.w, output.c)),
        }
    }

    fn all(self) -> [usize; 7] {
        let Lengths { workspace, images, filters, grad_images, grad_filters, narrow, sums } = self;
        [workspace, images, filters, grad_images, grad_filters, narrow, sums]
    }

    fn total(self) -> usize {
        self.all().map(|bytes| bytes.next_multiple_of(ALIGN)).iter().sum()
    }

    fn split(self, mut scratch: SliceMut<'_>) -> Scratch<'_> {
        let [workspace, images, filters, grad_images, grad_filters, narrow, sums] = self.all().map(|bytes| {
            let mut aligned = scratch.take(bytes.next_multiple_of(ALIGN));
            aligned.take(bytes)
        });
        Scratch { workspace, images, filters, grad_images, grad_filters, narrow, sums }
    }
}
