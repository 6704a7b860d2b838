//! The loss and the update on a GPU, here an emulated one, against the CPU's.

#[path = "common/emulator.rs"]
mod emulator;
#[path = "common/values.rs"]
mod values;

use emulator::upload;
use lockstep::config::raw;
use lockstep::device::cuda::kernels::Element;
use lockstep::device::{Slice, SliceMut};
use lockstep::model::loss::{self, Loss};
use values::{Values, distance};

#[test]
fn losses_agree_with_the_cpus() {
    for (classes, batch) in [(2, 1), (10, 9), (33, 300), (1000, 17)] {
        let weights = (0..classes).map(|k| ((k + 1) % 5) as f32 * 0.5).collect::<Vec<_>>();
        let cross_entropy = |label_smoothing| raw::Loss::SoftmaxCrossEntropy { label_smoothing, class_weights: None };
        for (config, weights) in [
            (cross_entropy(0.0), None),
            (cross_entropy(0.1), None),
            (cross_entropy(0.2), Some(weights)),
            (raw::Loss::KlDivergence { label_smoothing: 0.3 }, None),
            (raw::Loss::Mse {}, None),
        ] {
            let loss = Loss::new(&config, classes, weights).unwrap();
            check_loss(&loss, classes, batch, Element::F32);
            check_loss(&loss, classes, batch.min(40), Element::Bf16);
        }
    }
}

fn check_loss(loss: &Loss, classes: usize, batch: usize, element: Element) {
    let value = |i: usize| ((i * 7919 % 1013) as f32 - 500.0) * 0.02;
    // Of equal values the first is the answer.
    let outputs = Values::of(&(0..batch * classes).map(|i| value(i).round()).collect::<Vec<_>>(), element);
    let labels: Vec<u32> = (0..batch).map(|i| (i * 13 % classes) as u32).collect();
    let scale = 1.0 / batch as f32;
    let mut expected = vec![f32::NAN; batch * classes];
    let x = Slice::from(&outputs.values[..]);
    let sums = loss.forward_backward(x, &labels, scale, SliceMut::from(&mut expected[..]));

    let on_gpu = loss::cuda::Loss::new(loss, 300, element).unwrap();
    let memory = upload(&labels);
    // SAFETY: nobody writes it.
    let labels = unsafe { memory.slice(0..memory.bytes()) };
    let (grad, found) = (Values::poisoned(batch * classes, element), Values::poisoned(2, Element::F32));
    // SAFETY: all live until `download` has waited.
    unsafe { on_gpu.forward_backward(outputs.slice(), labels, scale, grad.slice_mut(), found.slice_mut()) }.unwrap();
    let what = format!("{loss:?} of {batch} samples in {element:?}");
    let error = distance(&grad.download(), &expected);
    assert!(error <= if element == Element::F32 { 3e-6 } else { 4e-3 }, "gradient of {what}: {error}");
    let both = found.download();
    assert!(((both[0] - sums.loss_sum) / sums.loss_sum).abs() < 1e-5, "{what}: {both:?}, {sums:?}");
    assert_eq!(both[1], sums.correct as f32, "{what}");

    let found = Values::poisoned(2, Element::F32);
    // SAFETY: as above.
    unsafe { on_gpu.evaluate(outputs.slice(), labels, found.slice_mut()) }.unwrap();
    assert_eq!(found.download(), both, "{what}");
}
