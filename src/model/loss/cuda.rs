//! The losses on a GPU: a warp a sample computes its loss and its gradient, and one block adds the losses up in a fixed order.
//! Outputs are read and gradients written in the type of the layers, so that nothing is converted for the loss.

use super::{Rule, target};
use crate::device::cuda::Gpu;
use crate::device::cuda::kernels::{Element, Grid, Kernel, Read, Source, T, Write};
use crate::device::{Arena, Place, Slice, SliceMut};
use crate::error::Result;
use crate::optim::cuda::Control;

static SOURCE: Source = Source { name: "loss", text: include_str!("loss.cu") };

/// Threads of a block, and the samples that they are for.
const THREADS: u32 = 256;
const ROWS: usize = 8;

/// A loss over (batch, classes) outputs in a GPU's memory.
pub struct Loss {
    gpu: Gpu,
    element: Element,
    classes: usize,
    rule: u32,
    smoothing: f32,
    entropy: f32,
    /// By class: its weight, and the sum of the targets where it is the label.
    tables: Arena,
    /// (2, batch): what each sample adds to the sums.
    rows: Arena,
    rows_of: Kernel<Rows>,
    sums_of: Kernel<SumsOf>,
}

/// Outputs, labels, weights, totals, gradient, rows; batch, classes, rule; smoothing, entropy, scale, loss scale.
type Rows = (Read<T>, Read<u32>, Read<f32>, Read<f32>, Write<T>, Write<f32>, u32, u32, u32, f32, f32, f32, Read<f32>);

/// Rows, sums, whether parameters are broken, the word that halts an update; batch.
type SumsOf = (Read<f32>, Write<f32>, Read<u32>, Write<u32>, u32);

impl Loss {
    /// For at most `batch` samples, whose outputs and gradients are of type `element`.
    pub fn new(loss: &super::Loss, batch: usize, element: Element) -> Result<Loss> {
        let (gpu, classes) = (Gpu::of_this_rank()?, loss.classes);
        let (rule, smoothing, entropy, weights) = match &loss.rule {
            Rule::CrossEntropy { smoothing, weights, entropy } => (0, *smoothing, *entropy, weights.as_deref()),
            Rule::SquaredError => (1, 0.0, 0.0, None),
        };
        let total = |label| (0..classes).map(|k| target(smoothing, weights, classes, label, k)).sum();
        let all: Vec<f32> = weights.map_or(vec![1.0; classes], <[f32]>::to_vec);
        let all: Vec<f32> = all.into_iter().chain((0..classes).map(total)).collect();
        let tables = gpu.allocate(size_of_val(&all[..]))?;
        // SAFETY: nobody else knows the memory.
        gpu.compute().copy_and_wait(Slice::from(&all[..]), unsafe { tables.slice_mut(0..tables.bytes()) })?;
        let module = gpu.module(&SOURCE, element)?;
        Ok(Loss {
            rows: gpu.allocate(2 * batch * size_of::<f32>())?,
            rows_of: module.kernel("loss_rows")?,
            sums_of: module.kernel("loss_sums")?,
            gpu,
            element,
            classes,
            rule,
            smoothing,
            entropy,
            tables,
        })
    }

    /// Loss and gradient: outputs (batch, classes), labels (batch) as u32, grad (batch, classes) = scale * dloss/doutputs, times
    /// the loss's scale that is in `control`; sums gets the loss, without it, and the number of samples whose largest output is the
    /// label's, summed over the batch, as f32. If the loss is not finite, the step is halted. If an update has made a parameter that
    /// is not finite, the loss is a NaN.
    ///
    /// # Safety
    /// All stay allocated, and nobody else touches them, until the compute stream has come past this. Labels are below
    /// the number of classes.
    pub unsafe fn forward_backward(
        &self,
        outputs: Slice<'_>,
        labels: Slice<'_>,
        scale: f32,
        mut grad: SliceMut<'_>,
        sums: SliceMut<'_>,
        control: &Control,
    ) -> Result<()> {
        assert_eq!(grad.bytes(), outputs.bytes(), "a gradient for each output");
        let gradient = (scale, control.scale().into(), (&mut grad).into());
        // SAFETY: the caller's promise.
        unsafe { self.launch(outputs, labels, gradient, sums, (control.broken(), control.halt())) }
    }

    /// The sums alone.
    ///
    /// # Safety
    /// As above.
    pub unsafe fn evaluate(&self, outputs: Slice<'_>, labels: Slice<'_>, sums: SliceMut<'_>) -> Result<()> {
        let gradient = (0.0, Read::from(&nowhere()), (&mut nowhere()).into());
        // SAFETY: the caller's promise.
        unsafe { self.launch(outputs, labels, gradient, sums, (nowhere().into_shared(), nowhere())) }
    }

    unsafe fn launch(
        &self,
        outputs: Slice<'_>,
        labels: Slice<'_>,
        (scale, loss_scale, grad): (f32, Read<f32>, Write<T>),
        mut sums: SliceMut<'_>,
        (broken, mut halt): (Slice<'_>, SliceMut<'_>),
    ) -> Result<()> {
        let batch = labels.bytes() / size_of::<u32>();
        assert_eq!(outputs.bytes(), batch * self.classes * self.element.bytes(), "outputs for {batch} labels");
        assert!(2 * batch * size_of::<f32>() <= self.rows.bytes() && sums.bytes() >= 2 * size_of::<f32>());
        let half = self.tables.bytes() / 2;
        // SAFETY: written once, by `new`.
        let [weights, totals] = [0..half, half..2 * half].map(|range| unsafe { self.tables.slice(range) });
        // SAFETY: used by the compute stream alone.
        let mut rows = unsafe { self.rows.slice_mut(0..self.rows.bytes()) };
        let (samples, classes) = (batch as u32, self.classes as u32);
        let grid = Grid { blocks: [batch.div_ceil(ROWS) as u32, 1, 1], threads: [THREADS, 1, 1], shared_bytes: 0 };
        let one = Grid { blocks: [1; 3], ..grid };
        let arguments = (
            outputs.into(),
            labels.into(),
            weights.into(),
            totals.into(),
            grad,
            (&mut rows).into(),
            samples,
            classes,
            self.rule,
            self.smoothing,
            self.entropy,
            scale,
            loss_scale,
        );
        // SAFETY: lengths as the kernels' comments say; the caller vouches for the rest.
        unsafe {
            self.rows_of.launch(self.gpu.compute(), grid, arguments)?;
            let arguments = ((&rows).into(), (&mut sums).into(), broken.into(), (&mut halt).into(), samples);
            self.sums_of.launch(self.gpu.compute(), one, arguments)
        }
    }
}

/// Not wanted: kernels ask for the address before they write.
fn nowhere<'a>() -> SliceMut<'a> {
    // SAFETY: no memory.
    unsafe { SliceMut::from_raw(Place::Cuda, 0, 0) }
}
