use super::super::{check_batch, grid_over_tiles, lanes};
use super::Lrn;
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Kernel, Read, Source, T, Write};
use crate::error::{Error, Result};
use crate::model::{Backward, Build, Forward, Layer, Pass, Shape};

static SOURCE: Source = Source { name: "lrn", text: include_str!("lrn.cu") };
/// As in `lrn.cu`.
const THREADS: usize = 256;

/// x, y, pixels, channels, radius, bias, alpha, beta
type ForwardKernel = Kernel<(Read<T>, Write<T>, u32, u32, u32, f32, f32, f32)>;
/// x, dy, dx, pixels, channels, radius, bias, alpha, beta, masks
type BackwardKernel = Kernel<(Read<T>, Read<T>, Write<T>, u32, u32, u32, f32, f32, f32, u32)>;

pub struct Cuda {
    gpu: Gpu,
    element: Element,
    keys: Lrn,
    input: Shape,
    /// Packs of channels on each side that a thread's own are summed with.
    reach: usize,
    /// Whether the input comes from a ReLU whose backward is done here.
    masks_input: bool,
    forward: ForwardKernel,
    backward: BackwardKernel,
}

impl Cuda {
    pub fn new(keys: Lrn, build: &Build<'_>, element: Element) -> Result<Cuda> {
        let (gpu, input) = (Gpu::of_this_rank()?, build.inputs[0]);
        check_batch(build, &[input])?;
        let reach = keys.depth_radius.div_ceil(lanes(element, &[input.c]));
        if 2 * reach >= THREADS {
            return Err(Error::usage(format!(
                "depth_radius = {} is beyond what a GPU's kernel sums over {} channels; it has {} threads for them",
                keys.depth_radius, input.c, THREADS
            )));
        }
        let module = gpu.module(&SOURCE, element)?;
        Ok(Cuda {
            gpu,
            element,
            keys,
            input,
            reach,
            masks_input: build.masks_input,
            forward: module.kernel("lrn_forward")?,
            backward: module.kernel("lrn_backward")?,
        })
    }

    /// (pixels, C), and the packs of channels that they make.
    fn counts(&self, pass: &Pass) -> (u32, u32, usize) {
        let (values, c) = (pass.batch * self.input.len(), self.input.c);
        ((values / c) as u32, c as u32, values / lanes(self.element, &[c]))
    }
}

impl Layer for Cuda {
    fn forward(&mut self, pass: &Pass, mut io: Forward<'_>) -> Result<()> {
        let Lrn { depth_radius, bias, alpha, beta } = self.keys;
        let (pixels, c, packs) = self.counts(pass);
        let (x, y) = (io.inputs[0].into(), (&mut io.output).into());
        let arguments = (x, y, pixels, c, depth_radius as u32, bias, alpha, beta);
        // SAFETY: tensors of the net's arenas, of the shapes that the layer was built for.
        unsafe { self.forward.launch(self.gpu.compute(), self.gpu.grid_over(packs), arguments) }
    }

    fn backward(&mut self, pass: &Pass, io: Backward<'_>) -> Result<()> {
        let Lrn { depth_radius, bias, alpha, beta } = self.keys;
        let (pixels, c, packs) = self.counts(pass);
        let grid = grid_over_tiles(&self.gpu, packs.div_ceil(THREADS - 2 * self.reach), [THREADS as u32, 1]);
        let (x, dy, dx) = (io.inputs[0].into(), (&io.grad_output).into(), (&mut io.grad_inputs[0]).into());
        let arguments = (x, dy, dx, pixels, c, depth_radius as u32, bias, alpha, beta, u32::from(self.masks_input));
        // SAFETY: as above.
        unsafe { self.backward.launch(self.gpu.compute(), grid, arguments) }
    }
}
