//! Convolutions through cuDNN beyond what `layers` compares: which of its engines compute them, exact products, and no memory
//! asked of the heap.

use crate::allocations::allocations;
use crate::emulator;
use crate::values::{download, upload};
use half::bf16;
use lockstep::device::cuda::Gpu;
use lockstep::device::cuda::cudnn::{Convolution, Graph, Product, Rules, fastest, first};
use lockstep::device::cuda::kernels::Element;
use lockstep::device::{Arena, Place, Slice, SliceMut};
use lockstep::model::params::ParamSpec;
use lockstep::model::{Backward, Build, Forward, Layer, LayerSpec, Pass, Shape, layers};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, fs, thread};

/// A convolution as `[[model.layers]]` has it, over images of a shape.
struct Case {
    input: Shape,
    keys: &'static str,
}

const fn case(h: usize, w: usize, c: usize, keys: &'static str) -> Case {
    Case { input: Shape::new(h, w, c), keys }
}

/// Samples that layers are built for.
const BATCH: usize = 5;

/// y, dx, dweight in canonical order, dbias.
type Results = [Vec<f32>; 4];

impl Case {
    fn spec(&self) -> Arc<dyn LayerSpec> {
        let keys = toml::from_str(self.keys).unwrap_or_else(|error| panic!("{}: {error}", self.keys));
        (layers::find("conv2d").unwrap().parse)(keys).unwrap_or_else(|error| panic!("{}: {error}", self.keys)).spec
    }

    /// x, dy and the parameters in canonical order, made by a function of index and number.
    fn values(&self, batch: usize, value: impl Fn(usize, usize) -> f32) -> (Vec<f32>, Vec<f32>, Vec<Vec<f32>>) {
        let inferred = self.spec().infer(&[self.input]).unwrap();
        let values = |len: usize, number: usize| (0..len).map(|i| value(i, number)).collect::<Vec<f32>>();
        let params = inferred.params.iter().enumerate().map(|(i, param)| values(param.len(), 3 + i)).collect();
        (values(batch * self.input.len(), 1), values(batch * inferred.output.len(), 2), params)
    }

    fn cpu(&self, batch: usize, value: impl Fn(usize, usize) -> f32) -> Results {
        let (x, mut dy, params) = self.values(batch, value);
        let (spec, inputs) = (self.spec(), [self.input]);
        let inferred = spec.infer(&inputs).unwrap();
        let arena = |i: usize, canonical: &Vec<f32>| {
            let mut arena = vec![0.0; canonical.len()];
            inferred.params[i].to_arena(canonical, &mut arena);
            arena
        };
        let params: Vec<Vec<f32>> = params.iter().enumerate().map(|(i, param)| arena(i, param)).collect();
        let build = Build { inputs: &inputs, batch, threads: 1, ..Build::default() };
        let mut layer = spec.build(&build).unwrap();
        let (mut y, mut dx) = (vec![f32::NAN; dy.len()], vec![f32::NAN; x.len()]);
        let mut grads: Vec<Vec<f32>> = params.iter().map(|param| vec![f32::NAN; param.len()]).collect();
        let mut scratch = vec![f32::NAN; layer.scratch_bytes() / 4];
        let slices: Vec<Slice> = params.iter().map(|param| param[..].into()).collect();
        let io = Forward {
            inputs: &[x[..].into()],
            output: (&mut y[..]).into(),
            params: &slices,
            params_rounded: &[],
            saved: SliceMut::empty(),
            scratch: (&mut scratch[..]).into(),
        };
        layer.forward(&pass(batch), io).unwrap();
        let io = Backward {
            inputs: &[x[..].into()],
            output: if inferred.backward_reads_output { y[..].into() } else { Slice::empty() },
            grad_output: (&mut dy[..]).into(),
            grad_inputs: &mut [(&mut dx[..]).into()],
            params: &slices,
            params_rounded: &[],
            grad_params: &mut grads.iter_mut().map(|grad| SliceMut::from(&mut grad[..])).collect::<Vec<_>>(),
            factors: SliceMut::empty(),
            input_sums: SliceMut::empty(),
            saved: Slice::empty(),
            scratch: (&mut scratch[..]).into(),
        };
        layer.backward(&pass(batch), io).unwrap();
        let mut dweight = vec![0.0; grads[0].len()];
        inferred.params[0].to_canonical(&grads[0], &mut dweight);
        [y, dx, dweight, grads.get(1).cloned().unwrap_or_default()]
    }
}

fn pass(batch: usize) -> Pass {
    Pass { batch, training: true, first_sample: 0, share: 1.0 }
}

/// A layer on the GPU.
struct Subject<'a> {
    gpu: &'a Gpu,
    case: &'a Case,
    element: Element,
    layer: Box<dyn Layer>,
    specs: Vec<ParamSpec>,
    reads_output: bool,
}

/// Device memory of a pass. Parameters are there as they are and rounded.
struct Buffers {
    x: Arena,
    y: Arena,
    dx: Arena,
    dy: Arena,
    params: Vec<Arena>,
    rounded: Vec<Arena>,
    grads: Vec<Arena>,
    scratch: Arena,
}

impl<'a> Subject<'a> {
    fn new(gpu: &'a Gpu, case: &'a Case, element: Element, with: impl Fn(&mut Build<'_>)) -> Subject<'a> {
        let inputs = [case.input];
        let mut build = Build { inputs: &inputs, batch: BATCH, ..Build::default() };
        (build.training, build.grad_inputs) = (true, true);
        with(&mut build);
        let spec = case.spec();
        let inferred = spec.infer(&inputs).unwrap();
        let layer = spec.build_cuda(&build, element);
        Subject {
            layer: layer.unwrap_or_else(|error| panic!("{}: {error}", case.keys)),
            specs: inferred.params.into_iter().map(|param| param.on(Place::Cuda)).collect(),
            reads_output: inferred.backward_reads_output,
            gpu,
            case,
            element,
        }
    }

    /// Forward and backward into poisoned memory.
    fn run(&mut self, batch: usize, value: impl Fn(usize, usize) -> f32) -> Results {
        let buffers = self.buffers(batch, value);
        self.pass(batch, &buffers);
        let grad = |i: usize| buffers.grads.get(i).map_or(vec![], |grad| download(self.gpu, grad));
        let mut dweight = vec![0.0; self.specs[0].len()];
        self.specs[0].to_canonical(&grad(0), &mut dweight);
        [self.download(&buffers.y), self.download(&buffers.dx), dweight, grad(1)]
    }

    fn buffers(&self, batch: usize, value: impl Fn(usize, usize) -> f32) -> Buffers {
        let (x, dy, params) = self.case.values(batch, value);
        let arena = |(spec, canonical): (&ParamSpec, &Vec<f32>)| {
            let mut arena = vec![0.0; canonical.len()];
            spec.to_arena(canonical, &mut arena);
            arena
        };
        let params: Vec<Vec<f32>> = self.specs.iter().zip(&params).map(arena).collect();
        let (x, dy) = (self.upload(&x), self.upload(&dy));
        Buffers {
            y: poisoned(self.gpu, dy.bytes()),
            dx: poisoned(self.gpu, x.bytes()),
            params: params.iter().map(|param| upload(self.gpu, param)).collect(),
            rounded: params.iter().map(|param| self.upload(param)).collect(),
            grads: params.iter().map(|param| poisoned(self.gpu, 4 * param.len())).collect(),
            scratch: poisoned(self.gpu, self.layer.scratch_bytes()),
            x,
            dy,
        }
    }

    /// Forward, and backward from its output.
    fn pass(&mut self, batch: usize, buffers: &Buffers) {
        let Buffers { x, y, dx, dy, scratch, .. } = buffers;
        let (params, rounded) = (two(&buffers.params), two(&buffers.rounded));
        let count = self.specs.len();
        let io = Forward {
            inputs: &[all(x)],
            output: all_mut(y),
            params: &params[..count],
            params_rounded: if self.element == Element::F32 { &[] } else { &rounded[..count] },
            saved: SliceMut::empty(),
            scratch: all_mut(scratch),
        };
        self.layer.forward(&pass(batch), io).unwrap();
        let mut grads = [0, 1].map(|i| buffers.grads.get(i).map_or(SliceMut::empty(), all_mut));
        let io = Backward {
            inputs: &[all(x)],
            output: if self.reads_output { all(y) } else { Slice::empty() },
            grad_output: all_mut(dy),
            grad_inputs: &mut [all_mut(dx)],
            params: &params[..count],
            params_rounded: if self.element == Element::F32 { &[] } else { &rounded[..count] },
            grad_params: &mut grads[..count],
            factors: SliceMut::empty(),
            input_sums: SliceMut::empty(),
            saved: Slice::empty(),
            scratch: all_mut(scratch),
        };
        self.layer.backward(&pass(batch), io).unwrap();
    }

    /// In the layer's type.
    fn upload(&self, values: &[f32]) -> Arena {
        match self.element {
            Element::F32 => upload(self.gpu, values),
            _ => upload(self.gpu, &values.iter().map(|&value| bf16::from_f32(value)).collect::<Vec<_>>()),
        }
    }

    fn download(&self, arena: &Arena) -> Vec<f32> {
        match self.element {
            Element::F32 => download(self.gpu, arena),
            _ => download::<bf16>(self.gpu, arena).into_iter().map(f32::from).collect(),
        }
    }
}

/// At most two, empty ones behind them.
fn two(arenas: &[Arena]) -> [Slice<'_>; 2] {
    [0, 1].map(|i| arenas.get(i).map_or(Slice::empty(), all))
}

/// NaNs in any type.
fn poisoned(gpu: &Gpu, bytes: usize) -> Arena {
    upload(gpu, &vec![bf16::from_bits(u16::MAX); bytes / 2])
}

fn all(arena: &Arena) -> Slice<'_> {
    // SAFETY: the stream's work on it comes one after the other.
    unsafe { arena.slice(0..arena.bytes()) }
}

fn all_mut(arena: &Arena) -> SliceMut<'_> {
    // SAFETY: as above.
    unsafe { arena.slice_mut(0..arena.bytes()) }
}

/// Values of both signs.
fn mixed(i: usize, number: usize) -> f32 {
    ((i * 37 + number * 101) % 211) as f32 / 211.0 - 0.45
}

/// Sums of small integers are exact in any order, so nothing but the right products was added.
#[test]
fn arranged_images_give_the_same_products() {
    let Some(gpu) = emulator::gpu() else { return };
    let integer = |i: usize, number: usize| ((i * 7 + number * 3) % 9) as f32 - 4.0;
    for case in [
        case(31, 31, 3, "filters = 4\nkernel = 11\nstride = 4\nalgorithm = \"direct\""),
        case(28, 30, 3, "filters = 4\nkernel = 11\nstride = 4\npadding = 2\nalgorithm = \"direct\""),
        case(10, 10, 7, "filters = 4\nkernel = 4\nstride = 3\npadding = \"same\"\nalgorithm = \"direct\""),
        case(6, 7, 9, "filters = 4\nkernel = 4\npadding = \"same\"\nalgorithm = \"direct\""),
    ] {
        let found = Subject::new(&gpu, &case, Element::F32, |_| ()).run(BATCH, integer);
        assert!(found == case.cpu(BATCH, integer), "{}", case.keys);
    }
}

/// Once a layer has met its buffers, its passes ask the heap of this program for nothing.
#[test]
fn a_pass_allocates_nothing_on_the_host() {
    let Some(gpu) = emulator::gpu() else { return };
    let cases = [
        case(7, 6, 8, "filters = 16\nkernel = 3\npadding = 1\nactivation = \"relu\""),
        case(6, 7, 8, "filters = 12\nkernel = 3\npadding = 1\ngroups = 4\nactivation = \"tanh\""),
        case(23, 23, 3, "filters = 10\nkernel = 11\nstride = 4\npadding = 2\nbias = false\nactivation = \"relu\""),
    ];
    for case in &cases {
        let mut subject = Subject::new(&gpu, case, Element::Bf16, |build| build.masks_input = true);
        let buffers = subject.buffers(BATCH, mixed);
        subject.pass(BATCH, &buffers);
        assert_eq!(allocations(|| subject.pass(BATCH, &buffers)), 0, "{}", case.keys);
    }
}

/// TF32 reads 11 significant bits of each factor, which is far from f32, but only where it is asked for.
#[test]
fn tf32_is_used_if_it_is_asked_for() {
    let Some(gpu) = emulator::gpu() else { return };
    let case = case(7, 6, 8, "filters = 16\nkernel = 3\npadding = 1\nactivation = \"relu\"");
    let error = |tf32| {
        let [found, ..] = Subject::new(&gpu, &case, Element::F32, |build| build.tf32 = tf32).run(BATCH, mixed);
        let [expected, ..] = case.cpu(BATCH, mixed);
        found.iter().zip(&expected).fold(0.0, |worst: f32, (a, b)| worst.max((a - b).abs()))
    };
    let [exact, cut] = [false, true].map(error);
    assert!(exact < 1e-5 && (1e-5..1e-2).contains(&cut), "{exact} and {cut}");
}

const CONVOLUTION: Convolution = Convolution {
    batch: 2,
    input: [8, 8, 8],
    output: [8, 8, 16],
    kernel: [3, 3],
    stride: [1, 1],
    before: [1, 1],
    after: [1, 1],
    groups: 1,
};
const PLAIN: Product = Product::Forward { bias: false, relu: false };
const RULES: Rules = Rules { nondeterministic: false, tf32: false, direct: false, workspace: 1 << 20 };

/// The emulated GPU, whose engines are known.
fn emulated() -> Option<Gpu> {
    if env::var_os("LOCKSTEP_TEST_GPU").is_some() {
        eprintln!("skipped: which engines a real cuDNN has is not known");
        return None;
    }
    emulator::gpu()
}

fn graph(gpu: &Gpu, convolution: Convolution, product: Product, element: Element) -> Arc<Graph> {
    Arc::new(Graph::new(&gpu.cudnn().unwrap(), convolution, product, element).unwrap())
}

#[test]
fn engines_that_break_a_rule_are_not_taken() {
    let Some(gpu) = emulated() else { return };
    let name = |product, element, rules| {
        first(&graph(&gpu, CONVOLUTION, product, element), rules).ok().map(|plan| plan.name().to_owned())
    };
    let of = |rules| name(PLAIN, Element::F32, rules);
    assert_eq!(of(RULES).as_deref(), Some("eng4_k13=16"));
    assert_eq!(of(Rules { direct: true, ..RULES }).as_deref(), Some("eng2_k13=16"));
    assert_eq!(of(Rules { tf32: true, ..RULES }).as_deref(), Some("eng1_k13=16"));
    assert_eq!(of(Rules { tf32: true, nondeterministic: true, ..RULES }).as_deref(), Some("eng0_k13=16"));
    assert_eq!(of(Rules { workspace: 100, ..RULES }), None);
    assert_eq!(name(PLAIN, Element::Bf16, RULES).as_deref(), Some("eng1_k13=16"));
    let fused = Product::Forward { bias: true, relu: true };
    assert_eq!(name(fused, Element::F32, RULES), None);
    assert_eq!(name(fused, Element::F16, RULES).as_deref(), Some("eng1_k13=16"));
}

/// What timing chose once is chosen again, by whoever asks; what is not there any more is timed anew.
#[test]
fn a_choice_stands() {
    let Some(gpu) = emulated() else { return };
    // No other test has a convolution of so many images.
    let convolution = Convolution { batch: 17, ..CONVOLUTION };
    let choose = || {
        let graph = graph(&gpu, convolution, PLAIN, Element::F32);
        fastest(&gpu, &graph, RULES).unwrap().name().to_owned()
    };
    choose();
    let folder = PathBuf::from(env::var_os("XDG_CACHE_HOME").unwrap()).join("lockstep/choices");
    let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let mut files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let file = files.find(|path| text(path).contains("forward of a 3x3 convolution of 17x8x8x8")).unwrap();
    let key = text(&file).split_once('\n').unwrap().0.to_owned();
    for other in ["eng4_k13=16", "eng2_k13=32"] {
        fs::write(&file, format!("{key}\n{other}\n")).unwrap();
        assert_eq!(choose(), other);
    }
    fs::write(&file, format!("{key}\neng7\n")).unwrap();
    let chosen = choose();
    assert!(["eng4_k13=16", "eng2_k13=16", "eng2_k13=32"].contains(&&*chosen));
    assert_eq!(text(&file), format!("{key}\n{chosen}\n"));
}

#[test]
fn what_cudnn_refuses_is_said_in_its_words() {
    let Some(gpu) = emulated() else { return };
    let wrong = Convolution { output: [7, 8, 16], ..CONVOLUTION };
    let error = Graph::new(&gpu.cudnn().unwrap(), wrong, PLAIN, Element::F32).err().unwrap().to_string();
    let expected =
        "cuDNN's cudnnBackendFinalize failed with CUDNN_STATUS_BAD_PARAM: cudnnBackendFinalize: convolution of x";
    assert!(error.contains(expected), "{error}");
    // No engine pads one side more than the other.
    let lopsided = Convolution { output: [9, 8, 16], after: [2, 1], ..CONVOLUTION };
    let error = fastest(&gpu, &graph(&gpu, lopsided, PLAIN, Element::F32), RULES).err().unwrap().to_string();
    let reason = "cuDNN's cudnnBackendGetAttribute failed with CUDNN_STATUS_NOT_SUPPORTED";
    assert!(
        error.contains("has no engine for the forward of a 3x3 convolution of") && error.contains(reason),
        "{error}"
    );
}

/// More sets of buffers than a plan keeps, then the first again.
#[test]
fn a_plan_takes_any_buffers() {
    let Some(gpu) = emulator::gpu() else { return };
    let mut plan = first(&graph(&gpu, CONVOLUTION, PLAIN, Element::F32), RULES).unwrap();
    let [x, w, y] = plan.graph().buffers()[..] else { panic!("three buffers") };
    let ones = |bytes: usize| upload(&gpu, &vec![1f32; bytes / 4]);
    let (x, w, workspace) = (ones(x), ones(w), ones(plan.workspace_bytes()));
    let outputs: Vec<Arena> = (0..20).map(|_| ones(y)).collect();
    for output in outputs.iter().chain(&outputs[..1]) {
        // SAFETY: buffers of the graph's lengths.
        unsafe { plan.run(&[x.address(), w.address(), output.address()], workspace.address()) }.unwrap();
        let found: Vec<f32> = download(&gpu, output);
        // 8 channels under 9 taps, at a corner 4.
        assert_eq!((found[0], found[9 * 16]), (32.0, 72.0));
    }
}

/// A thread that no context was made current in before.
#[test]
fn any_thread_plans_and_runs() {
    let Some(gpu) = emulator::gpu() else { return };
    let handle = gpu.cudnn().unwrap();
    let plan = move || {
        let graph = Arc::new(Graph::new(&handle, CONVOLUTION, PLAIN, Element::F32)?);
        first(&graph, RULES)
    };
    let mut plan = thread::spawn(plan).join().unwrap().unwrap();
    let memory: Vec<Arena> = plan.graph().buffers().iter().map(|&bytes| poisoned(&gpu, bytes)).collect();
    let (buffers, workspace) =
        (memory.iter().map(Arena::address).collect::<Vec<_>>(), poisoned(&gpu, plan.workspace_bytes()));
    let to = workspace.address();
    // SAFETY: buffers of the graph's lengths, which live until the stream is waited for.
    thread::spawn(move || unsafe { plan.run(&buffers, to) }).join().unwrap().unwrap();
    gpu.compute().wait().unwrap();
}
