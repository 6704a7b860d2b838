//! `type = "conv2d"`: y(n, oh, ow, f) = activation(bias(f) + sum over kh, kw, c of
//! x(n, oh * stride + kh - before, ow * stride + kw - before, c) * weight(kh, kw, c, f)), zeros outside the image.
//! With `groups = G`, channels and filters are cut into G runs and a filter sees only its run's channels.

mod bf16;
mod cpu;
mod cuda;
mod depthwise;
mod padded;
mod tables;
#[cfg(test)]
mod tests;
mod winograd;

use super::super::init::Initializer;
use super::super::kernels::gemm16::Kernel;
use super::super::params::{Layout, ParamSpec, Role};
use super::super::widened;
use super::super::{Build, GpuScratch, Inferred, Layer, LayerSpec, Shape};
use super::window::{self, Axis, NamedPadding};
use super::{Activation, addressable, refuse_unused_bias_init, single};
use crate::device::cuda::kernels::Element;
use crate::error::{Error, Result};
use padded::Padded;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Conv2d {
    /// Output channels.
    #[schemars(range(min = 1))]
    filters: usize,
    /// Height and width of a filter.
    kernel: Extent,
    #[serde(default = "Extent::one")]
    stride: Extent,
    #[serde(default)]
    padding: Padding,
    /// Divides channels and filters; as many groups as channels is a depthwise convolution.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    groups: usize,
    #[serde(default = "super::yes")]
    bias: bool,
    #[serde(default)]
    activation: Activation,
    /// Of the weight; the default keeps the variance of activations through layers of ReLUs.
    #[serde(default)]
    init: Initializer,
    /// The first value of every bias.
    #[serde(default)]
    bias_init: f32,
    #[serde(default)]
    algorithm: Algorithm,
}

/// How the products are computed. On the CPU the choice is by shapes, never by timing, so all ranks make the same one; on a
/// GPU it is cuDNN's and timing's, where "direct" leaves out what transforms, and "winograd" is as "auto".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Algorithm {
    /// Winograd's transforms where they save time: 3x3 and 5x5 kernels of stride 1, with many channels.
    #[default]
    Auto,
    /// Sums of products, as the definition has them: the least rounding.
    Direct,
    /// Winograd's transforms, with rounding errors about ten times those of direct sums.
    Winograd,
}

fn one() -> usize {
    1
}

/// A number for both axes, or [height, width].
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a number, or [height, width]")]
enum Extent {
    Square(#[schemars(range(min = 1))] usize),
    Each(#[schemars(extend("items" = { "type": "integer", "format": "uint", "minimum": 1 }))] [usize; 2]),
}

impl Extent {
    fn one() -> Extent {
        Extent::Square(1)
    }
    fn each(self) -> [usize; 2] {
        match self {
            Extent::Square(size) => [size; 2],
            Extent::Each(sizes) => sizes,
        }
    }
}

/// Zeros around the image. "same" gives ceil(input / stride) outputs as in TensorFlow, for any stride: in all
/// max((output - 1) * stride + kernel - input, 0) zeros along an axis, the odd one below and to the right. With stride 1
/// that is PyTorch's "same" (which refuses other strides); with stride 2 it differs from `padding = 1`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "expected \"valid\", \"same\", the number of zeros on each side, or [vertical, horizontal]"
)]
enum Padding {
    Named(NamedPadding),
    Zeros(usize),
    Each([usize; 2]),
}

impl Default for Padding {
    fn default() -> Self {
        Padding::Named(NamedPadding::Valid)
    }
}

impl Padding {
    fn each(self) -> [window::Padding; 2] {
        match self {
            Padding::Named(name) => [window::Padding::Named(name); 2],
            Padding::Zeros(zeros) => [window::Padding::Zeros(zeros); 2],
            Padding::Each(zeros) => zeros.map(window::Padding::Zeros),
        }
    }
}

/// What the kernels need to know.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    input: Shape,
    output: Shape,
    rows: Axis,
    columns: Axis,
    groups: usize,
}

impl Geometry {
    /// Channels that a filter sees.
    fn channels(&self) -> usize {
        self.input.c / self.groups
    }
    /// Filters of a group.
    fn filters(&self) -> usize {
        self.output.c / self.groups
    }
    fn is_depthwise(&self) -> bool {
        self.groups == self.input.c && self.groups == self.output.c && self.groups > 1
    }
    /// Values that meet in one output: KH * KW * C / groups.
    fn taps(&self) -> usize {
        self.rows.size * self.columns.size * self.channels()
    }
}

impl Conv2d {
    fn direct(&self, geometry: Geometry, build: &Build<'_>) -> Box<dyn Layer> {
        Box::new(cpu::Conv2d::new(geometry, self.bias, self.activation, build))
    }

    fn geometry(&self, inputs: &[Shape]) -> Result<Geometry, String> {
        let input = single(inputs)?;
        let Conv2d { filters, groups, .. } = *self;
        let (kernel, stride, padding) = (self.kernel.each(), self.stride.each(), self.padding.each());
        if input.c % groups != 0 || filters % groups != 0 {
            return Err(format!(
                "groups = {groups} must divide the {} channels of its input ({input}) and its {filters} filters",
                input.c
            ));
        }
        for axis in 0..2 {
            if let window::Padding::Zeros(zeros) = padding[axis]
                && zeros >= kernel[axis]
            {
                return Err(format!(
                    "padding {zeros} is not smaller than the kernel ({}): a filter would see nothing but zeros",
                    kernel[axis]
                ));
            }
        }
        let axis = |number: usize, length| Axis::new(length, kernel[number], stride[number], padding[number]);
        let (Some(rows), Some(columns)) = (axis(0, input.h), axis(1, input.w)) else {
            let [kh, kw] = kernel;
            return Err(format!(
                "a {kh}x{kw} kernel does not fit into its input, {input}: use a smaller kernel, or padding"
            ));
        };
        let output = Shape { h: rows.output, w: columns.output, c: filters };
        let geometry = Geometry { input, output, rows, columns, groups };
        addressable("weight", &[filters, geometry.channels(), kernel[0], kernel[1]])?;
        addressable("output", &output.lengths())?;
        addressable("padded input", &Padded::of_input(&geometry).lengths())?;
        addressable("padded output gradient", &Padded::of_grad(&geometry).lengths())?;
        match winograd::obstacle(&geometry) {
            Some(obstacle) if self.algorithm == Algorithm::Winograd => {
                return Err(format!("algorithm = \"winograd\" {obstacle}; leave the choice to \"auto\""));
            }
            _ => {}
        }
        Ok(geometry)
    }
}

impl LayerSpec for Conv2d {
    fn infer(&self, inputs: &[Shape]) -> Result<Inferred, String> {
        refuse_unused_bias_init(self.bias, self.bias_init)?;
        let geometry = self.geometry(inputs)?;
        let Geometry { output, rows, columns, .. } = geometry;
        let area = rows.size * columns.size;
        let weight = ParamSpec {
            name: "weight",
            shape: vec![output.c, geometry.channels(), rows.size, columns.size],
            layout: Layout::Hwio,
            init: self.init.resolve(geometry.taps(), area * geometry.filters()),
            role: Role::Trainable,
        };
        let bias = self.bias.then(|| ParamSpec::bias(output.c, self.bias_init));
        Ok(Inferred {
            output,
            params: std::iter::once(weight).chain(bias).collect(),
            forward_flops: (2 * geometry.taps() as u64).saturating_mul(output.len() as u64),
            backward_reads_input: true,
            backward_reads_output: self.activation != Activation::None,
            relu_output: self.activation == Activation::Relu,
            adds_bias: self.bias && self.activation.is_relu_or_none(),
            can_mask_input_on_gpu: cuda::can_mask_input(&geometry),
            ..Inferred::default()
        })
    }

    fn gpu_scratch(&self, build: &Build<'_>, element: Element) -> GpuScratch {
        let geometry = self.geometry(build.inputs).expect("inferred before");
        cuda::scratch(&geometry, self.bias, element, build)
    }

    fn build(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        let geometry = self.geometry(build.inputs).map_err(Error::usage)?;
        Ok(match self.algorithm {
            Algorithm::Auto if !winograd::pays(&geometry, build.batch) => self.direct(geometry, build),
            Algorithm::Direct => self.direct(geometry, build),
            _ => Box::new(winograd::Conv2d::new(geometry, self.bias, self.activation, build)),
        })
    }

    fn build_bf16(&self, build: &Build<'_>) -> Result<Box<dyn Layer>> {
        match Kernel::best().is_native().then(|| self.native(Kernel::best(), build)).flatten() {
            Some(layer) => Ok(Box::new(layer)),
            None => widened::around(self, build),
        }
    }

    fn build_cuda(&self, build: &Build<'_>, element: Element) -> Result<Box<dyn Layer>> {
        let geometry = self.geometry(build.inputs).map_err(Error::usage)?;
        Ok(Box::new(cuda::Conv2d::new(geometry, self.bias, self.activation, self.algorithm, element, build)?))
    }
}

impl Conv2d {
    /// The operator with bf16 products, for what they are good for: a depthwise convolution is none, and of activations
    /// they know ReLU.
    fn native(&self, kernel: &'static Kernel, build: &Build<'_>) -> Option<bf16::Conv2d> {
        let geometry = self.geometry(build.inputs).ok()?;
        let fits = !geometry.is_depthwise() && self.activation.is_relu_or_none();
        fits.then(|| bf16::Conv2d::new(kernel, geometry, self.bias, self.activation == Activation::Relu, build))
    }
}
