use super::*;
use crate::config::raw::Loss as Config;

fn cross_entropy(label_smoothing: f32) -> Config {
    Config::SoftmaxCrossEntropy { label_smoothing, class_weights: None }
}

/// Every loss, over five classes.
fn losses() -> Vec<Loss> {
    let weights = vec![0.5, 1.0, 2.0, 0.0, 1.5];
    [
        (cross_entropy(0.0), None),
        (cross_entropy(0.1), None),
        (cross_entropy(0.2), Some(weights)),
        (Config::KlDivergence { label_smoothing: 0.3 }, None),
        (Config::Mse {}, None),
    ]
    .into_iter()
    .map(|(config, weights)| Loss::new(&config, 5, weights).unwrap())
    .collect()
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    let labels = [3, 0, 4];
    let outputs: Vec<f32> = (0..15).map(|i| ((i * 7) % 11) as f32 * 0.4 - 2.0).collect();
    for loss in losses() {
        let mut grad = [f32::NAN; 15];
        loss.forward_backward(outputs[..].into(), &labels, 0.25, grad[..].as_mut().into());
        for i in 0..15 {
            let at = |shift: f32| {
                let mut outputs = outputs.clone();
                outputs[i] += shift;
                let rows = outputs.chunks_exact(5).zip(labels);
                rows.map(|(x, label)| f64::from(loss.value(x, label as usize))).sum::<f64>() * 0.25
            };
            let slope = (at(0.01) - at(-0.01)) / 0.02;
            assert!((slope - f64::from(grad[i])).abs() < 1e-4, "{loss:?} output {i}: {slope} or {}", grad[i]);
        }
    }
}

#[test]
fn the_parts_of_a_batch_add_up() {
    let labels = [1, 2, 0, 1];
    let outputs: Vec<f32> = (0..20).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
    for loss in losses() {
        let mut whole = vec![f32::NAN; 20];
        let both = loss.forward_backward(outputs[..].into(), &labels, 0.25, whole[..].as_mut().into());
        let mut parts = vec![f32::NAN; 20];
        let (front, back) = parts.split_at_mut(5);
        let first = loss.forward_backward(outputs[..5].into(), &labels[..1], 0.25, front.into());
        let second = loss.forward_backward(outputs[5..].into(), &labels[1..], 0.25, back.into());
        assert_eq!(whole, parts);
        assert_eq!(both.correct, first.correct + second.correct);
        assert!((both.loss_sum - first.loss_sum - second.loss_sum).abs() < 1e-5);
        assert_eq!(both, loss.evaluate(outputs[..].into(), &labels));
    }
}

#[test]
fn huge_logits_overflow_nothing_and_lose_no_digits() {
    let loss = Loss::new(&cross_entropy(0.0), 3, None).unwrap();
    let outputs = [10_000.0, 10_001.0, -10_000.0];
    let mut grad = [f32::NAN; 3];
    let out = loss.forward_backward(outputs[..].into(), &[0], 1.0, grad[..].as_mut().into());
    // log(1 + e) and its derivative.
    assert!((out.loss_sum - 1.313_261_7).abs() < 1e-6, "{}", out.loss_sum);
    assert!((grad[1] - 0.731_058_6).abs() < 1e-6 && grad[2] == 0.0, "{grad:?}");
    assert_eq!(out.correct, 0);
}

#[test]
fn a_loss_that_is_not_finite_stays_so() {
    for loss in losses() {
        assert!(!loss.evaluate([1.0, f32::NAN, 0.0, 0.0, 0.0][..].into(), &[1]).loss_sum.is_finite(), "{loss:?}");
    }
}

#[test]
fn wrong_keys_say_what_is_allowed() {
    let error = |smoothing, weights| Loss::new(&cross_entropy(smoothing), 3, weights).unwrap_err().to_string();
    assert_eq!(error(0.0, Some(vec![1.0])), "class_weights has 1 values, but there are 3 classes");
    assert!(error(0.0, Some(vec![1.0, -1.0, 1.0])).contains("class_weights has a -1"));
    assert!(error(1.0, None).contains("at least 0 and below 1"));
}
