//! Operation graphs: a convolution's three products, and what is fused to them.
//!
//! ```text
//! forward          x, w         -> convolution -> (+ bias) -> (ReLU) -> y
//! backward, data   dy, w        -> convolution -> (0 where x is not above 0) -> dx
//! backward, weight x, dy        -> convolution -> dw
//! ```
//!
//! Activations are NHWC, filters (F, KH, KW, C / groups); to cuDNN dimensions are always in the order N, C, H, W, and strides
//! say how they lie. What passes between two operations is a virtual tensor, in f32: it exists in registers only.

use super::Handle;
use super::descriptor::{Address, Descriptor, Link};
use crate::device::cuda::kernels::Element;
use crate::error::Result;
use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind, cudnnConvolutionMode_t, cudnnDataType_t,
    cudnnNanPropagation_t, cudnnPointwiseMode_t as Mode,
};
use std::fmt;

/// Bytes to whose multiples all buffers are aligned.
pub const ALIGNMENT: usize = 16;

/// A convolution's shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convolution {
    pub batch: usize,
    /// Height, width, channels.
    pub input: [usize; 3],
    /// Height, width, filters.
    pub output: [usize; 3],
    /// Of a filter, down and across, as in what follows.
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    /// Rows and columns of zeros in front of the image, and behind it.
    pub before: [usize; 2],
    pub after: [usize; 2],
    pub groups: usize,
}

/// One of its products, with what is fused to it. Buffers are in the order of the formula.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// x, w, bias if there is one, y; the bias has the type of the others, since engines for 16 bits fuse no bias in f32
    Forward { bias: bool, relu: bool },
    /// dy, w, x if it masks, dx
    Data { mask: bool },
    /// x, dy, dw; this is f32 if `wide`, whatever the others are
    Weight { wide: bool },
}

/// A finalized graph.
pub struct Graph {
    pub(super) descriptor: Descriptor,
    pub(super) handle: Handle,
    pub convolution: Convolution,
    pub product: Product,
    pub element: Element,
    /// Bytes of each buffer.
    buffers: Vec<usize>,
    /// What the graph is made of; cuDNN refers to it.
    _parts: Vec<Descriptor>,
}

impl Graph {
    pub fn new(handle: &Handle, convolution: Convolution, product: Product, element: Element) -> Result<Graph> {
        let mut builder =
            Builder { convolution, element, buffers: Vec::new(), parts: Vec::new(), operations: Vec::new() };
        match product {
            Product::Forward { bias, relu } => builder.forward(bias, relu),
            Product::Data { mask } => builder.data(mask),
            Product::Weight { wide } => builder.weight(wide),
        }?;
        let _alone = handle.lock()?;
        let descriptor = (handle.of_graph(Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?)?)
            .with(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, &builder.operations)?
            .finalized()?;
        let Builder { buffers, parts, .. } = builder;
        Ok(Graph { descriptor, handle: handle.clone(), convolution, product, element, buffers, _parts: parts })
    }

    /// Bytes of each buffer, in the product's order.
    pub fn buffers(&self) -> &[usize] {
        &self.buffers
    }

    /// The names that `pack` gives to the buffers: their places.
    pub(super) fn pack(&self, buffers: &[usize], workspace: usize) -> Result<Descriptor> {
        let numbers: Vec<i64> = (0..buffers.len() as i64).collect();
        let addresses: Vec<Address> = buffers.iter().map(|&address| Address(address)).collect();
        Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &numbers)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, &addresses)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, &[Address(workspace)])?
            .finalized()
    }
}

impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Convolution { batch, input: [h, w, c], output: [.., filters], kernel: [kh, kw], .. } = self.convolution;
        let product = match self.product {
            Product::Forward { .. } => "forward",
            Product::Data { .. } => "gradient by the input",
            Product::Weight { .. } => "gradient by the weight",
        };
        write!(
            f,
            "{product} of a {kh}x{kw} convolution of {batch}x{h}x{w}x{c} with {filters} filters ({:?})",
            self.element
        )
    }
}

struct Builder {
    convolution: Convolution,
    element: Element,
    buffers: Vec<usize>,
    parts: Vec<Descriptor>,
    operations: Vec<Link>,
}

impl Builder {
    fn forward(&mut self, bias: bool, relu: bool) -> Result<()> {
        let y = self.image(self.convolution.output);
        let x = self.buffer(self.image(self.convolution.input))?;
        let w = self.buffer(self.filters())?;
        let bias = bias
            .then(|| self.buffer(Tensor::packed([1, self.convolution.output[2], 1, 1], self.element)))
            .transpose()?;
        // Of the convolution, of the addition, of the ReLU; the last of them is y.
        let last = usize::from(bias.is_some()) + usize::from(relu);
        let results: Vec<Link> =
            (0..=last).map(|i| if i == last { self.buffer(y) } else { self.passing(y) }).collect::<Result<_>>()?;
        self.convolve(FORWARD, [x, w, results[0]])?;
        if let Some(bias) = bias {
            let tensors = [
                (Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, results[0]),
                (Name::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, bias),
                (Name::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, results[1]),
            ];
            self.pointwise(Mode::CUDNN_POINTWISE_ADD, &tensors)?;
        }
        if relu {
            let tensors = [
                (Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, results[last - 1]),
                (Name::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, results[last]),
            ];
            self.pointwise(Mode::CUDNN_POINTWISE_RELU_FWD, &tensors)?;
        }
        Ok(())
    }

    fn data(&mut self, mask: bool) -> Result<()> {
        let image = self.image(self.convolution.input);
        let dy = self.buffer(self.image(self.convolution.output))?;
        let w = self.buffer(self.filters())?;
        if !mask {
            let dx = self.buffer(image)?;
            return self.convolve(DATA, [dx, w, dy]);
        }
        let x = self.buffer(image)?;
        let (sum, dx) = (self.passing(image)?, self.buffer(image)?);
        self.convolve(DATA, [sum, w, dy])?;
        // ReLU's output stands for its input: both are above 0 at the same places.
        let tensors = [
            (Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x),
            (Name::CUDNN_ATTR_OPERATION_POINTWISE_DYDESC, sum),
            (Name::CUDNN_ATTR_OPERATION_POINTWISE_DXDESC, dx),
        ];
        self.pointwise(Mode::CUDNN_POINTWISE_RELU_BWD, &tensors)
    }

    fn weight(&mut self, wide: bool) -> Result<()> {
        let x = self.buffer(self.image(self.convolution.input))?;
        let dy = self.buffer(self.image(self.convolution.output))?;
        let element = if wide { Element::F32 } else { self.element };
        let dw = self.buffer(Tensor { element, ..self.filters() })?;
        self.convolve(WEIGHT, [x, dw, dy])
    }

    /// One of the products over the tensors x, w and y, of which one is the result.
    fn convolve(&mut self, names: Names, tensors: [Link; 3]) -> Result<()> {
        let Convolution { stride, before, after, .. } = self.convolution;
        let signed = |pair: [usize; 2]| pair.map(|value| value as i64);
        let convolution = Descriptor::new(Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, &[2i64])?
            .with(Name::CUDNN_ATTR_CONVOLUTION_COMP_TYPE, &[cudnnDataType_t::CUDNN_DATA_FLOAT])?
            .with(Name::CUDNN_ATTR_CONVOLUTION_CONV_MODE, &[cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION])?
            .with(Name::CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, &signed(stride))?
            .with(Name::CUDNN_ATTR_CONVOLUTION_DILATIONS, &[1i64, 1])?
            .with(Name::CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, &signed(before))?
            .with(Name::CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, &signed(after))?
            .finalized()?;
        let mut operation = Descriptor::new(names.kind)?
            .with(names.convolution, &[convolution.link()])?
            .with(names.alpha, &[1f32])?
            .with(names.beta, &[0f32])?;
        for (name, tensor) in names.tensors.into_iter().zip(tensors) {
            operation = operation.with(name, &[tensor])?;
        }
        self.parts.push(convolution);
        self.operation(operation)
    }

    fn pointwise(&mut self, mode: Mode, tensors: &[(Name, Link)]) -> Result<()> {
        let mut pointwise = Descriptor::new(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_POINTWISE_MODE, &[mode])?
            .with(Name::CUDNN_ATTR_POINTWISE_MATH_PREC, &[cudnnDataType_t::CUDNN_DATA_FLOAT])?;
        if mode != Mode::CUDNN_POINTWISE_ADD {
            // Else a ReLU makes a NaN 0. cuDNN documents this for all modes that compare, as the only choice it supports.
            let keep = cudnnNanPropagation_t::CUDNN_PROPAGATE_NAN;
            pointwise = pointwise.with(Name::CUDNN_ATTR_POINTWISE_NAN_PROPAGATION, &[keep])?;
        }
        let pointwise = pointwise.finalized()?;
        let mut operation = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, &[pointwise.link()])?;
        for (name, tensor) in tensors {
            operation = operation.with(*name, &[*tensor])?;
        }
        self.parts.push(pointwise);
        self.operation(operation)
    }

    fn operation(&mut self, operation: Descriptor) -> Result<()> {
        let operation = operation.finalized()?;
        self.operations.push(operation.link());
        self.parts.push(operation);
        Ok(())
    }

    /// A tensor in memory: the next of the product's buffers, whose place is its number.
    fn buffer(&mut self, tensor: Tensor) -> Result<Link> {
        let number = self.buffers.len();
        self.buffers.push(tensor.dimensions.iter().product::<usize>() * tensor.element.bytes());
        self.tensor(tensor, number, false)
    }

    /// A virtual one, numbered beyond all buffers.
    fn passing(&mut self, tensor: Tensor) -> Result<Link> {
        let number = 16 + self.parts.len();
        self.tensor(Tensor { element: Element::F32, ..tensor }, number, true)
    }

    fn tensor(&mut self, tensor: Tensor, number: usize, passing: bool) -> Result<Link> {
        let Tensor { dimensions, strides, element } = tensor;
        let signed = |values: [usize; 4]| values.map(|value| value as i64);
        let data_type = match element {
            Element::F32 => cudnnDataType_t::CUDNN_DATA_FLOAT,
            Element::Bf16 => cudnnDataType_t::CUDNN_DATA_BFLOAT16,
            Element::F16 => cudnnDataType_t::CUDNN_DATA_HALF,
        };
        let descriptor = Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, &[number as i64])?
            .with(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, &[data_type])?
            .with(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, &signed(dimensions))?
            .with(Name::CUDNN_ATTR_TENSOR_STRIDES, &signed(strides))?
            .with(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[ALIGNMENT as i64])?
            .with(Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL, &[passing])?
            .finalized()?;
        let link = descriptor.link();
        self.parts.push(descriptor);
        Ok(link)
    }

    /// x or y, or a gradient by them.
    fn image(&self, [height, width, channels]: [usize; 3]) -> Tensor {
        Tensor::packed([self.convolution.batch, channels, height, width], self.element)
    }

    fn filters(&self) -> Tensor {
        let Convolution { input, output, kernel, groups, .. } = self.convolution;
        Tensor::packed([output[2], input[2] / groups, kernel[0], kernel[1]], self.element)
    }
}

#[derive(Clone, Copy)]
struct Tensor {
    dimensions: [usize; 4],
    strides: [usize; 4],
    element: Element,
}

impl Tensor {
    /// Without gaps, the second of the dimensions running fastest.
    fn packed(dimensions: [usize; 4], element: Element) -> Tensor {
        let [_, c, h, w] = dimensions;
        Tensor { dimensions, strides: [c * h * w, 1, w * c, c], element }
    }
}

/// The names of a convolution's attributes; tensors in the order x, w, y.
struct Names {
    kind: Kind,
    convolution: Name,
    alpha: Name,
    beta: Name,
    tensors: [Name; 3],
}

const FORWARD: Names = Names {
    kind: Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
    convolution: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
    alpha: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
    beta: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA,
    tensors: [
        Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
        Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
        Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y,
    ],
};

const DATA: Names = Names {
    kind: Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
    convolution: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
    alpha: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
    beta: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA,
    tensors: [
        Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
        Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
        Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
    ],
};

const WEIGHT: Names = Names {
    kind: Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
    convolution: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
    alpha: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
    beta: Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA,
    tensors: [
        Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
        Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
        Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
    ],
};
