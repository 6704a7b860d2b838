//! Finite differences. The checked function is J = sum(forward(x) * r) for fixed r, summed in f64, so that outputs which
//! a shift does not touch cancel exactly and only the f32 rounding of those it touches remains. The slope along one
//! coordinate is a central difference, extrapolated from two steps (Richardson: the error falls with h^4). Where the two
//! disagree, a kink (of relu, of a maximum) lies between x - h and x + h: a smaller step is tried, and a coordinate that
//! never settles is skipped, as Caffe's checker skips kinks. Few may be skipped, so a layer cannot hide behind that.

use crate::harness::{Gradients, Section, evaluation, training, values, with_threads};
use lockstep::model::layers::REGISTRY;
use lockstep::model::params::Role;
use lockstep::model::{Pass, Shape};

/// The sections that are checked, at least one for every layer type.
pub fn sections() -> Vec<Section> {
    let image = Shape::new(4, 5, 3);
    let wide = Shape::new(2, 2, 20);
    let section = |kind: &str, keys: &str, inputs: &[Shape]| Section {
        kind: kind.to_owned(),
        keys: keys.to_owned(),
        inputs: inputs.to_vec(),
    };
    vec![
        section("conv2d", "filters = 4\nkernel = 3", &[image]),
        section("conv2d", "filters = 5\nkernel = 3\nstride = 2\npadding = 1\nactivation = \"relu\"", &[image]),
        section("conv2d", "filters = 4\nkernel = 2\npadding = \"same\"\ngroups = 2\nbias = false", &[wide]),
        section("conv2d", "filters = 18\nkernel = 1\nactivation = \"tanh\"", &[wide]),
        section("conv2d", "filters = 16\nkernel = 3\npadding = 1\nalgorithm = \"winograd\"", &[Shape::new(4, 5, 16)]),
        section("conv2d", "filters = 16\nkernel = 5\nalgorithm = \"winograd\"", &[Shape::new(6, 5, 16)]),
        section("linear", "units = 7", &[Shape::vector(12)]),
        section("linear", "units = 18\nactivation = \"relu\"", &[Shape::vector(5)]),
        section("linear", "units = 1\nactivation = \"sigmoid\"\nbias = false", &[Shape::vector(6)]),
        section("max_pool", "size = 2", &[image]),
        section("max_pool", "size = 3\nstride = 2\npadding = 1", &[image]),
        section("max_pool", "size = 2\nstride = 1\npadding = \"same\"", &[wide]),
        section("avg_pool", "size = 2", &[image]),
        section("avg_pool", "size = 3\nstride = 2\npadding = 1", &[image]),
        section("avg_pool", "size = 3\nstride = 2\npadding = \"same\"", &[wide]),
        section("global_avg_pool", "", &[image]),
        section("global_avg_pool", "", &[Shape::new(1, 2, 40)]),
        section("global_max_pool", "", &[image]),
        section("lrn", "alpha = 0.3\ndepth_radius = 2\nbias = 1.0", &[Shape::new(2, 2, 9)]),
        section("lrn", "alpha = 0.1\nbeta = 0.6", &[Shape::new(1, 1, 110)]),
        section("batch_norm", "", &[image]),
        section("batch_norm", "activation = \"relu\"\nepsilon = 0.01", &[wide]),
        section("batch_norm", "activation = \"tanh\"", &[Shape::vector(7)]),
        section("dropout", "rate = 0.4", &[image]),
        section("flatten", "", &[image]),
        section("relu", "", &[image]),
        section("sigmoid", "", &[image]),
        section("tanh", "", &[image]),
        section("softmax", "", &[Shape::vector(9)]),
        section("softmax", "", &[image]),
        section("add", "", &[image, image, image]),
        section("add", "activation = \"relu\"", &[image, image]),
        section("concat", "", &[image, Shape::new(4, 5, 1), Shape::new(4, 5, 6)]),
    ]
}

const BATCH: usize = 3;

#[test]
fn every_registered_layer_is_checked() {
    let checked: Vec<String> = sections().into_iter().map(|section| section.kind).collect();
    for kind in REGISTRY {
        assert!(checked.iter().any(|name| name == kind.name), "no section for {}", kind.name);
    }
}

#[test]
fn backward_is_the_slope_of_forward() {
    for section in sections() {
        for batch in [BATCH, 1, 2] {
            // One sample has no spread over which a vector could be normalised.
            let alone = batch == 1 && section.kind == "batch_norm" && section.inputs[0].is_vector();
            if !alone {
                check(&section, batch);
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    for section in sections() {
        let one = with_threads(1, || Problem::new(&section, BATCH).gradients());
        let two = with_threads(2, || Problem::new(&section, BATCH).gradients());
        assert_eq!(one, two, "{section:?}");
    }
}

#[test]
fn evaluation_reads_nothing_that_is_not_there() {
    for section in sections() {
        let problem = Problem::new(&section, BATCH);
        let output = section.build(BATCH).forward(&evaluation(BATCH), &problem.inputs, &problem.params);
        assert!(output.iter().all(|y| y.is_finite()), "{section:?}: {output:?}");
    }
}

/// A layer, a point at which it is differentiated, and the direction r.
struct Problem<'a> {
    section: &'a Section,
    pass: Pass,
    inputs: Vec<Vec<f32>>,
    params: Vec<Vec<f32>>,
    direction: Vec<f32>,
}

impl<'a> Problem<'a> {
    fn new(section: &'a Section, batch: usize) -> Self {
        let inferred = section.infer();
        let inputs =
            section.inputs.iter().enumerate().map(|(i, shape)| values(batch * shape.len(), 7 * i + 1)).collect();
        let param = |(i, spec): (usize, &lockstep::model::params::ParamSpec)| match spec.role {
            Role::Trainable => values(spec.len(), 5 * i + 3),
            Role::Running { .. } => values(spec.len(), 2).iter().map(|value| value.abs() + 0.5).collect(),
        };
        let params = inferred.params.iter().enumerate().map(param).collect();
        let direction = values(batch * inferred.output.len(), 4);
        Problem { section, pass: training(batch), inputs, params, direction }
    }

    fn gradients(&self) -> (Vec<f32>, Gradients) {
        let mut subject = self.section.build(BATCH);
        let output = subject.forward(&self.pass, &self.inputs, &self.params);
        let grads = subject.backward(&self.pass, &self.inputs, &output, &self.direction, &self.params);
        (output, grads)
    }
}

/// Which value is shifted.
#[derive(Clone, Copy, Debug)]
enum Coordinate {
    Input { tensor: usize, index: usize },
    Param { tensor: usize, index: usize },
}

fn check(section: &Section, batch: usize) {
    let mut problem = Problem::new(section, batch);
    let (_, grads) = problem.gradients();
    let mut subject = section.build(BATCH);
    let mut objective = |problem: &Problem<'_>| -> f64 {
        let output = subject.forward(&problem.pass, &problem.inputs, &problem.params);
        output.iter().zip(&problem.direction).map(|(y, r)| f64::from(*y) * f64::from(*r)).sum()
    };

    let (mut checked, mut skipped) = (0, 0);
    for at in coordinates(&problem, &section.infer().params.iter().map(|spec| spec.role).collect::<Vec<_>>()) {
        let backward = f64::from(match at {
            Coordinate::Input { tensor, index } => grads.inputs[tensor][index],
            Coordinate::Param { tensor, index } => grads.params[tensor][index],
        });
        checked += 1;
        match slope(&mut problem, at, first_step(section), &mut objective) {
            None => skipped += 1,
            Some(slope) => {
                let wrong = (slope - backward).abs();
                let allowed = TOLERANCE * slope.abs().max(1.0);
                assert!(wrong <= allowed, "{section:?}, batch {batch}, {at:?}: slope {slope}, backward {backward}");
            }
        }
    }
    assert!(skipped * 20 <= checked, "{section:?}: {skipped} of {checked} coordinates lie on kinks");
}

const TOLERANCE: f64 = 1e-3;

/// All coordinates of small tensors, an even choice of about 100 from large ones.
fn coordinates(problem: &Problem<'_>, roles: &[Role]) -> Vec<Coordinate> {
    let chosen = |len: usize| (0..len).step_by(len.div_ceil(100).max(1));
    let inputs = problem.inputs.iter().enumerate();
    let inputs = inputs.flat_map(|(tensor, x)| chosen(x.len()).map(move |index| Coordinate::Input { tensor, index }));
    let params = problem.params.iter().enumerate().filter(|(tensor, _)| roles[*tensor] == Role::Trainable);
    let params = params.flat_map(|(tensor, p)| chosen(p.len()).map(move |index| Coordinate::Param { tensor, index }));
    inputs.chain(params).collect()
}

/// Winograd's transforms round more than a small step can bear; being linear, they are as straight over a large one.
fn first_step(section: &Section) -> f32 {
    if section.keys.contains("winograd") { 1.0 } else { 0.02 }
}

/// The derivative along `at`; None if it does not settle.
fn slope(
    problem: &mut Problem<'_>,
    at: Coordinate,
    first_step: f32,
    objective: &mut impl FnMut(&Problem<'_>) -> f64,
) -> Option<f64> {
    let mut central = |step: f32| {
        let value = *value(problem, at);
        let mut side = |shifted: f32| {
            *self::value(problem, at) = shifted;
            objective(problem)
        };
        let difference = side(value + step) - side(value - step);
        *self::value(problem, at) = value;
        // The step as f32 has rounded it.
        difference / (f64::from(value + step) - f64::from(value - step))
    };
    let mut step = first_step;
    let mut wide = central(step);
    for _ in 0..5 {
        step /= 2.0;
        let narrow = central(step);
        if (wide - narrow).abs() <= TOLERANCE * narrow.abs().max(1.0) {
            return Some(narrow + (narrow - wide) / 3.0);
        }
        wide = narrow;
    }
    None
}

fn value<'a>(problem: &'a mut Problem<'_>, at: Coordinate) -> &'a mut f32 {
    match at {
        Coordinate::Input { tensor, index } => &mut problem.inputs[tensor][index],
        Coordinate::Param { tensor, index } => &mut problem.params[tensor][index],
    }
}
