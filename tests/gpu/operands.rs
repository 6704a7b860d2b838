//! One layer's operands, and its forward and backward on them. Everything that a call must write is full of NaN before it, and
//! each buffer is an allocation of its own, so what a layer leaves out, or does beyond its buffers, shows.

use crate::allocations::allocations;
use crate::emulator::{self, whole, whole_mut};
use crate::layers::Case;
use half::{bf16, f16};
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::kernels::Element;
use lockstep::device::{Arena, Place, Slice, SliceMut};
use lockstep::model::params::ParamSpec;
use lockstep::model::{Backward, Build, Forward, Inferred, Layer, LayerSpec, Pass};
use lockstep::rng::{Purpose, Rng};

pub struct Operands<'a> {
    case: &'a Case,
    batch: usize,
    element: Element,
    tf32: bool,
    inferred: Inferred,
    inputs: Vec<Vec<f32>>,
    /// In canonical order.
    params: Vec<Vec<f32>>,
    grad_output: Vec<f32>,
}

/// How a layer is called.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    batch: usize,
    training: bool,
}

impl Call {
    pub fn training(batch: usize) -> Call {
        Call { batch, training: true }
    }
    pub fn evaluation(batch: usize) -> Call {
        Call { batch, training: false }
    }
}

pub struct Results {
    /// Forward: the output. Backward: the gradients by inputs, then by parameters; none in evaluation.
    pub values: [Vec<Vec<f32>>; 2],
    /// How often the layer asked the heap for memory.
    pub allocations: usize,
}

/// Canonical values of a layer's operands.
pub struct Given {
    pub inputs: Vec<Vec<f32>>,
    pub params: Vec<Vec<f32>>,
    pub grad_output: Vec<f32>,
}

impl Given {
    fn map(mut self, of: impl Fn(f32) -> f32) -> Given {
        let all = self.inputs.iter_mut().chain(&mut self.params).chain([&mut self.grad_output]);
        all.flatten().for_each(|value| *value = of(*value));
        self
    }
}

impl<'a> Operands<'a> {
    pub fn new(case: &'a Case, spec: &dyn LayerSpec, batch: usize, element: Element, tf32: bool) -> Self {
        let inferred = spec.infer(&case.inputs).unwrap_or_else(|error| panic!("{case:?}: {error}"));
        let mut number = 0;
        let mut normal = |len: usize| {
            number += 1;
            let mut values = vec![0.0; len];
            Rng::new(5, Purpose::Test, number, 0).fill_normal(1.0, &mut values);
            values
        };
        let mut inputs: Vec<Vec<f32>> = case.inputs.iter().map(|shape| normal(batch * shape.len())).collect();
        if case.masks_input {
            inputs[0].iter_mut().for_each(|value| *value = value.max(0.0));
        }
        let params = inferred.params.iter().map(|spec| param(spec, normal(spec.len()))).collect();
        let grad_output = normal(batch * inferred.output.len());
        let given = Given { inputs, params, grad_output };
        // Values that TF32 holds, so that none falls on the other side of a ReLU's edge; `oracles` has others.
        let given = if tf32 { given.map(|value| f32::from_bits(value.to_bits() & !0x1FFF)) } else { given };
        Operands::of(case, inferred, given, batch, element, tf32)
    }

    /// Of these values, rounded as the layer's type holds them.
    pub fn of(case: &'a Case, inferred: Inferred, given: Given, batch: usize, element: Element, tf32: bool) -> Self {
        let Given { inputs, params, grad_output } = given.map(|value| round(element, value));
        Operands { case, batch, element, tf32, inputs, params, grad_output, inferred }
    }

    pub fn on_cpu(&self, spec: &dyn LayerSpec, call: Call) -> Results {
        let layer = spec.build(&self.build()).unwrap_or_else(|error| panic!("{:?}: {error}", self.case));
        let mut results = self.run(layer, call, &Cpu);
        // What a layer of the CPU leaves to the ReLU itself.
        if self.case.masks_input && !self.inferred.can_mask_input && call.training {
            let masked = self.inputs[0].iter().zip(&mut results.values[1][0]).filter(|(input, _)| **input <= 0.0);
            masked.for_each(|(_, grad)| *grad = 0.0);
        }
        results
    }

    pub fn on_gpu(&self, gpu: &Gpu, spec: &dyn LayerSpec, call: Call) -> Results {
        let build = Build { sums_input: self.case.sums_input, ..self.build() };
        let layer = spec.build_cuda(&build, self.element).unwrap_or_else(|error| panic!("{:?}: {error}", self.case));
        self.run(layer, call, &Cuda { gpu, element: self.element })
    }

    fn build(&self) -> Build<'_> {
        Build {
            inputs: &self.case.inputs,
            batch: self.batch,
            tf32: self.tf32,
            threads: rayon::current_num_threads(),
            seed: 0x1234_5678_9abc_def0,
            layer: 3,
            masks_input: self.case.masks_input,
            grad_masked: self.case.grad_masked,
            training: true,
            grad_inputs: true,
            ..Build::default()
        }
    }

    fn run(&self, mut layer: Box<dyn Layer>, call: Call, memory: &dyn Memory) -> Results {
        let pass = Pass { batch: call.batch, training: call.training, first_sample: (1 << 32) - 2, share: 0.3 };
        let mut buffers = self.buffers(&*layer, call.batch, memory);
        let forward = Forward {
            inputs: &slices(&buffers.inputs),
            output: whole_mut(&mut buffers.output),
            params: &slices(&buffers.params),
            params_rounded: &slices(&buffers.rounded),
            saved: whole_mut(&mut buffers.saved),
            scratch: whole_mut(&mut buffers.scratch),
        };
        let in_forward = allocations(|| {
            layer.begin(&pass).unwrap();
            layer.forward(&pass, forward).unwrap_or_else(|error| panic!("{:?}, forward: {error}", self.case));
        });
        let output = vec![memory.read(&buffers.output, call.batch * self.inferred.output.len())];
        let (grads, in_backward) = match call.training {
            true => self.backward(&mut *layer, &pass, buffers, memory),
            false => (Vec::new(), 0),
        };
        Results { values: [output, grads], allocations: in_forward + in_backward }
    }

    /// The gradients by inputs, then by parameters in canonical order, then the first's sums over the pixels if the case has
    /// them; and how often the layer asked the heap for memory.
    fn backward(
        &self,
        layer: &mut dyn Layer,
        pass: &Pass,
        buffers: Buffers,
        memory: &dyn Memory,
    ) -> (Vec<Vec<f32>>, usize) {
        let len = |values: &[f32]| values.len() / self.batch * pass.batch;
        let mut grad_output = memory.activation(&self.grad_output[..len(&self.grad_output)]);
        let mut scratch = memory.poisoned(layer.scratch_bytes());
        let poisoned = |input: &Vec<f32>| memory.activation(&vec![f32::NAN; len(input)]);
        let mut grad_inputs: Vec<Arena> = self.inputs.iter().map(poisoned).collect();
        let mut grad_params: Vec<Arena> = self.params.iter().map(|param| memory.poisoned(4 * param.len())).collect();
        let channels = if self.case.sums_input { self.case.inputs[0].c } else { 0 };
        let mut input_sums = memory.poisoned(4 * channels);
        let Inferred { backward_reads_input, backward_reads_output, .. } = self.inferred;
        let read = |arena, is_read| if is_read { whole(arena) } else { Slice::empty() };
        let io = Backward {
            inputs: &buffers.inputs.iter().map(|input| read(input, backward_reads_input)).collect::<Vec<_>>(),
            output: read(&buffers.output, backward_reads_output && !self.case.grad_masked),
            grad_output: whole_mut(&mut grad_output),
            grad_inputs: &mut grad_inputs.iter_mut().map(whole_mut).collect::<Vec<_>>(),
            params: &slices(&buffers.params),
            params_rounded: &slices(&buffers.rounded),
            grad_params: &mut grad_params.iter_mut().map(whole_mut).collect::<Vec<_>>(),
            factors: SliceMut::empty(),
            input_sums: whole_mut(&mut input_sums),
            saved: whole(&buffers.saved),
            scratch: whole_mut(&mut scratch),
        };
        let allocated = allocations(|| {
            layer.backward(pass, io).unwrap_or_else(|error| panic!("{:?}, backward: {error}", self.case));
        });
        let mut grads: Vec<Vec<f32>> =
            grad_inputs.iter().zip(&self.inputs).map(|(grad, input)| memory.read(grad, len(input))).collect();
        let specs = self.specs_on(memory.place());
        let of_params = specs.iter().zip(&grad_params).map(|(spec, grad)| canonical(spec, &memory.read_f32(grad)));
        let sums = self.case.sums_input.then(|| match memory.place() {
            Place::Cuda => memory.read_f32(&input_sums),
            Place::Host => sums_over_pixels(&grads[0], channels),
        });
        grads.extend(of_params.chain(sums));
        (grads, allocated)
    }

    fn buffers(&self, layer: &dyn Layer, batch: usize, memory: &dyn Memory) -> Buffers {
        let specs = self.specs_on(memory.place());
        let params: Vec<Vec<f32>> = specs.iter().zip(&self.params).map(|(spec, param)| arranged(spec, param)).collect();
        let of_batch = |input: &Vec<f32>| memory.activation(&input[..input.len() / self.batch * batch]);
        Buffers {
            inputs: self.inputs.iter().map(of_batch).collect(),
            params: params.iter().map(|param| memory.f32(param)).collect(),
            rounded: params.iter().map(|param| memory.activation(param)).collect(),
            output: memory.activation(&vec![f32::NAN; batch * self.inferred.output.len()]),
            saved: memory.poisoned(self.inferred.saved_bytes * self.batch + self.inferred.saved_bytes_fixed),
            scratch: memory.poisoned(layer.scratch_bytes()),
        }
    }

    /// The parameters as they lie on a device.
    fn specs_on(&self, place: Place) -> Vec<ParamSpec> {
        self.inferred.params.iter().map(|spec| spec.clone().on(place)).collect()
    }
}

fn sums_over_pixels(grad: &[f32], channels: usize) -> Vec<f32> {
    let sum = |channel: usize| grad[channel..].iter().step_by(channels).map(|&value| f64::from(value)).sum::<f64>();
    (0..channels).map(|channel| sum(channel) as f32).collect()
}

/// What forward gets, and what it leaves for backward.
struct Buffers {
    inputs: Vec<Arena>,
    params: Vec<Arena>,
    /// The parameters in the layer's type.
    rounded: Vec<Arena>,
    output: Arena,
    saved: Arena,
    scratch: Arena,
}

/// The weight of a product such that sums stay around 1; others around 1 themselves, as a running variance is not below 0.
fn param(spec: &ParamSpec, normal: Vec<f32>) -> Vec<f32> {
    let value = |normal: f32| match &spec.shape[..] {
        [_, inputs @ ..] if !inputs.is_empty() => normal / (inputs.iter().product::<usize>() as f32).sqrt(),
        _ => 1.0 + 0.2 * normal.clamp(-2.0, 2.0),
    };
    normal.into_iter().map(value).collect()
}

/// As it lies in the arena.
fn arranged(spec: &ParamSpec, canonical: &[f32]) -> Vec<f32> {
    let mut arena = vec![0.0; canonical.len()];
    spec.to_arena(canonical, &mut arena);
    arena
}

fn canonical(spec: &ParamSpec, arena: &[f32]) -> Vec<f32> {
    let mut canonical = vec![0.0; arena.len()];
    spec.to_canonical(arena, &mut canonical);
    canonical
}

fn round(element: Element, value: f32) -> f32 {
    match element {
        Element::F32 => value,
        Element::Bf16 => bf16::from_f32(value).to_f32(),
        Element::F16 => f16::from_f32(value).to_f32(),
    }
}

fn slices(arenas: &[Arena]) -> Vec<Slice<'_>> {
    arenas.iter().map(whole).collect()
}

/// Where operands lie.
trait Memory {
    fn place(&self) -> Place;
    /// Values of the layer's type.
    fn activation(&self, values: &[f32]) -> Arena;
    fn f32(&self, values: &[f32]) -> Arena;
    fn poisoned(&self, bytes: usize) -> Arena;
    fn read(&self, arena: &Arena, len: usize) -> Vec<f32>;
    fn read_f32(&self, arena: &Arena) -> Vec<f32>;
}

struct Cpu;

impl Memory for Cpu {
    fn place(&self) -> Place {
        Place::Host
    }
    fn activation(&self, values: &[f32]) -> Arena {
        self.f32(values)
    }
    fn f32(&self, values: &[f32]) -> Arena {
        let mut arena = Arena::host(size_of_val(values)).expect("memory");
        whole_mut(&mut arena).f32().copy_from_slice(values);
        arena
    }
    fn poisoned(&self, bytes: usize) -> Arena {
        let mut arena = Arena::host(bytes).expect("memory");
        whole_mut(&mut arena).u8().fill(0xFF);
        arena
    }
    fn read(&self, arena: &Arena, _: usize) -> Vec<f32> {
        self.read_f32(arena)
    }
    fn read_f32(&self, arena: &Arena) -> Vec<f32> {
        whole(arena).f32().to_vec()
    }
}

struct Cuda<'a> {
    gpu: &'a Gpu,
    element: Element,
}

impl Memory for Cuda<'_> {
    fn place(&self) -> Place {
        Place::Cuda
    }
    fn activation(&self, values: &[f32]) -> Arena {
        let mut arena = Arena::host(values.len() * self.element.bytes()).expect("memory");
        let mut to = whole_mut(&mut arena);
        match self.element {
            Element::F32 => to.f32().copy_from_slice(values),
            Element::Bf16 => to.bf16().iter_mut().zip(values).for_each(|(to, from)| *to = bf16::from_f32(*from)),
            Element::F16 => {
                let to: &mut [f16] = bytemuck::cast_slice_mut(to.u8());
                to.iter_mut().zip(values).for_each(|(to, from)| *to = f16::from_f32(*from));
            }
        }
        emulator::upload(self.gpu, &arena)
    }
    fn f32(&self, values: &[f32]) -> Arena {
        emulator::upload(self.gpu, &Cpu.f32(values))
    }
    fn poisoned(&self, bytes: usize) -> Arena {
        emulator::upload(self.gpu, &Cpu.poisoned(bytes))
    }
    fn read(&self, arena: &Arena, len: usize) -> Vec<f32> {
        let host = emulator::download(self.gpu, arena);
        match self.element {
            Element::F32 => whole(&host).f32()[..len].to_vec(),
            Element::Bf16 => whole(&host).bf16()[..len].iter().map(|value| value.to_f32()).collect(),
            Element::F16 => {
                let values: &[f16] = bytemuck::cast_slice(whole(&host).u8());
                values[..len].iter().map(|value| value.to_f32()).collect()
            }
        }
    }
    fn read_f32(&self, arena: &Arena) -> Vec<f32> {
        whole(&emulator::download(self.gpu, arena)).f32().to_vec()
    }
}
