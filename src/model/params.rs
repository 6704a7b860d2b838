//! Parameters: what a layer declares, how it is initialised, how it is laid out, and where it lies in the arenas.

use super::spec::NetSpec;
use crate::device::Place;
use crate::rng::{Purpose, Rng};
use std::ops::Range;

/// One parameter tensor as its layer declares it.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// `weight`, `bias`, `running_mean`, `running_var`; the full name is `layer.name`.
    pub name: &'static str,
    /// Canonical shape, as checkpoints hold it: (F, C/groups, KH, KW) for convolutions, (out, in) for linear layers.
    pub shape: Vec<usize>,
    pub layout: Layout,
    pub init: Init,
    pub role: Role,
}

/// How a tensor lies in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As in the checkpoint.
    Canonical,
    /// A convolution's weight as (KH, KW, C/groups, F): rows in the order in which im2col walks, filters contiguous.
    Hwio,
    /// A convolution's weight as (F, KH, KW, C/groups), which cuDNN wants with NHWC images.
    Ohwi,
}

/// Initial values, drawn per element in canonical order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    Constant(f32),
    Normal { std: f32 },
    Uniform { bound: f32 },
}

/// What happens to the summed gradient slot of a tensor after the all-reduce.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    /// The optimizer updates it.
    Trainable,
    /// A running statistic: `value = (1 - momentum) * value + momentum * slot`. Same on all ranks, never decayed.
    Running { momentum: f32 },
}

impl ParamSpec {
    /// A bias of so many values, all `first` at the start.
    pub fn bias(len: usize, first: f32) -> ParamSpec {
        ParamSpec {
            name: "bias",
            shape: vec![len],
            layout: Layout::Canonical,
            init: Init::Constant(first),
            role: Role::Trainable,
        }
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes the initial values, each once; `number` is the tensor's place among the net's parameters.
    pub fn initialise(&self, seed: u64, number: u32, arena: &mut [f32]) {
        let mut rng = Rng::new(seed, Purpose::Init, number, 0);
        let mut draw = |values: &mut [f32]| match self.init {
            Init::Constant(value) => values.fill(value),
            Init::Normal { std } => rng.fill_normal(std, values),
            Init::Uniform { bound } => rng.fill_range(-bound, bound, values),
        };
        match self.layout {
            Layout::Canonical => draw(arena),
            Layout::Hwio | Layout::Ohwi => {
                let mut canonical = vec![0.0; self.len()];
                draw(&mut canonical);
                self.to_arena(&canonical, arena);
            }
        }
    }

    /// Copies from canonical order into the arena's.
    pub fn to_arena(&self, canonical: &[f32], arena: &mut [f32]) {
        match self.layout {
            Layout::Canonical => arena.copy_from_slice(canonical),
            Layout::Hwio | Layout::Ohwi => self.each(|oihw, place| arena[place] = canonical[oihw]),
        }
    }

    /// Copies from the arena's order into canonical order.
    pub fn to_canonical(&self, arena: &[f32], canonical: &mut [f32]) {
        match self.layout {
            Layout::Canonical => canonical.copy_from_slice(arena),
            Layout::Hwio | Layout::Ohwi => self.each(|oihw, place| canonical[oihw] = arena[place]),
        }
    }

    /// The same on a device: layers ask for the layout of the CPU.
    pub fn on(self, place: Place) -> ParamSpec {
        match (place, self.layout) {
            (Place::Cuda, Layout::Hwio) => ParamSpec { layout: Layout::Ohwi, ..self },
            _ => self,
        }
    }

    /// Visits each element's place in canonical order and in the arena, of a convolution's weight.
    fn each(&self, mut visit: impl FnMut(usize, usize)) {
        let [filters, channels, kh, kw] = self.shape[..] else { panic!("{} is not (F, C, KH, KW)", self.name) };
        let mut oihw = 0;
        for f in 0..filters {
            for c in 0..channels {
                for k in 0..kh * kw {
                    let place = match self.layout {
                        Layout::Ohwi => (f * kh * kw + k) * channels + c,
                        _ => (k * channels + c) * filters + f,
                    };
                    visit(oihw, place);
                    oihw += 1;
                }
            }
        }
    }
}

/// A tensor in its place.
#[derive(Clone, Debug)]
pub struct Param {
    /// `layer.weight`
    pub name: String,
    pub node: usize,
    /// Its number in the order of forward: keys its initial values.
    pub number: u32,
    pub spec: ParamSpec,
    /// Elements of the parameter arena, and of every gradient and optimizer-state arena.
    pub range: Range<usize>,
}

impl Param {
    /// Where the next tensor may start: the end of the cache line in which this one ends.
    pub fn end_of_line(&self) -> usize {
        self.range.end.next_multiple_of(TAIL)
    }
}

/// Every parameter of a net, laid out once. The order is that in which backward finishes the gradients (last layer
/// first), so that what is ready to be reduced is always a prefix, and a bucket a contiguous range. Behind the last
/// tensor lies a tail of `TAIL` elements in which the loss, the counts and the flags of a step are summed over ranks.
#[derive(Clone, Debug)]
pub struct ParamTable {
    pub params: Vec<Param>,
    pub tail: Range<usize>,
}

/// Elements behind the parameters: one cache line.
pub const TAIL: usize = 16;

impl ParamTable {
    pub fn new(net: &NetSpec) -> ParamTable {
        let mut numbers = 0..;
        let mut params: Vec<Param> = Vec::new();
        for (node, layer) in net.nodes.iter().enumerate() {
            params.extend(layer.inferred.params.iter().zip(&mut numbers).map(|(spec, number)| Param {
                name: format!("{}.{}", layer.name, spec.name),
                node,
                number,
                spec: spec.clone(),
                range: 0..0,
            }));
        }
        ParamTable::place(params)
    }

    /// The same for a device's arena.
    pub fn on(mut self, place: Place) -> ParamTable {
        self.params.iter_mut().for_each(|param| param.spec = param.spec.clone().on(place));
        self
    }

    fn place(mut params: Vec<Param>) -> ParamTable {
        params.sort_by_key(|param| (std::cmp::Reverse(param.node), param.number));
        let mut end = 0;
        for param in &mut params {
            param.range = end..end + param.spec.len();
            end = param.end_of_line();
        }
        ParamTable { params, tail: end..end + TAIL }
    }

    /// Elements of the parameters, padding included: length of the parameter arena.
    pub fn len(&self) -> usize {
        self.tail.start
    }
    pub fn is_empty(&self) -> bool {
        self.params.is_empty()
    }
    /// Elements of a gradient arena: the parameters and the tail.
    pub fn len_with_tail(&self) -> usize {
        self.tail.end
    }
    /// Values that the optimizer trains.
    pub fn trainable(&self) -> usize {
        self.params.iter().filter(|p| p.spec.role == Role::Trainable).map(|p| p.spec.len()).sum()
    }
    /// The tensors of one node, in the order in which its layer declared them.
    pub fn of_node(&self, node: usize) -> &[Param] {
        let start = self.params.partition_point(|p| p.node > node);
        let end = self.params.partition_point(|p| p.node >= node);
        &self.params[start..end]
    }

    /// The gradient arena without its tail cut into buckets: contiguous, together everything, each at least `bytes` long
    /// (but the last) and ending where a layer ends. The layers for whose number `apart` says so have a bucket of their own.
    pub fn buckets(&self, bytes: usize, apart: impl Fn(usize) -> bool) -> Vec<Range<usize>> {
        let mut buckets = Vec::new();
        let mut start = 0;
        for (i, param) in self.params.iter().enumerate() {
            let end = param.end_of_line();
            let next = self.params.get(i + 1);
            let layer_ends = next.is_none_or(|next| next.node != param.node);
            let cut = apart(param.node) || next.is_some_and(|next| apart(next.node));
            if layer_ends && (cut || (end - start) * size_of::<f32>() >= bytes) {
                buckets.push(start..end);
                start = end;
            }
        }
        if start < self.len() {
            buckets.push(start..self.len());
        }
        buckets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layer by layer from the last: a weight of 100 and a bias of 10, then running statistics, then a weight of 300.
    fn table() -> ParamTable {
        let param = |node: usize, number: u32, len: usize, role: Role| Param {
            name: format!("{node}.{number}"),
            node,
            number,
            spec: ParamSpec {
                name: "weight",
                shape: vec![len],
                layout: Layout::Canonical,
                init: Init::Constant(0.0),
                role,
            },
            range: 0..0,
        };
        let running = Role::Running { momentum: 0.1 };
        ParamTable::place(vec![
            param(0, 0, 300, Role::Trainable),
            param(1, 1, 8, running),
            param(3, 2, 100, Role::Trainable),
            param(3, 3, 10, Role::Trainable),
        ])
    }

    #[test]
    fn the_last_layer_comes_first_and_tensors_start_at_cache_lines() {
        let table = table();
        let ranges: Vec<_> = table.params.iter().map(|p| p.range.clone()).collect();
        assert_eq!(ranges, [0..100, 112..122, 128..136, 144..444]);
        assert_eq!((table.tail.clone(), table.len(), table.trainable()), (448..464, 448, 410));
        assert_eq!(table.of_node(3).iter().map(|p| p.number).collect::<Vec<_>>(), [2, 3]);
        assert!(table.of_node(2).is_empty());
    }

    #[test]
    fn buckets_end_with_layers() {
        let table = table();
        let ends = |bytes| table.buckets(bytes, |_| false).iter().map(|bucket| bucket.end).collect::<Vec<_>>();
        assert_eq!(table.buckets(0, |_| false), [0..128, 128..144, 144..448]);
        assert_eq!(ends(4 * 129), [144, 448]);
        assert_eq!(ends(4 * 400), [448]);
        assert_eq!(table.buckets(usize::MAX, |node| node == 1), [0..128, 128..144, 144..448]);
        assert!(ParamTable::place(Vec::new()).buckets(1, |_| false).is_empty());
    }

    #[test]
    fn layouts_go_there_and_back() {
        let host = ParamSpec {
            name: "weight",
            shape: vec![2, 3, 2, 1],
            layout: Layout::Hwio,
            init: Init::Constant(0.0),
            role: Role::Trainable,
        };
        // filter 1, channel 2, kh 1: canonical 11; on the CPU row (kh 1, c 2) = 5, column 1, on a GPU the last value.
        let cases = [(Place::Host, [0.0, 6.0, 2.0, 8.0], 11), (Place::Cuda, [0.0, 2.0, 4.0, 1.0], 11)];
        for (place, first, last) in cases {
            let spec = host.clone().on(place);
            let canonical: Vec<f32> = (0..12).map(|i| i as f32).collect();
            let (mut arena, mut back) = (vec![0.0; 12], vec![0.0; 12]);
            spec.to_arena(&canonical, &mut arena);
            assert_eq!((&arena[..4], arena[last]), (&first[..], 11.0), "{place:?}");
            spec.to_canonical(&arena, &mut back);
            assert_eq!(back, canonical, "{place:?}");
        }
        let linear = ParamSpec { layout: Layout::Canonical, ..host };
        assert_eq!(linear.clone().on(Place::Cuda), linear);
    }

    #[test]
    fn initial_values_are_drawn_from_the_tensors_own_stream_in_canonical_order() {
        let spec =
            |layout, init| ParamSpec { name: "weight", shape: vec![5, 3, 4, 2], layout, init, role: Role::Trainable };
        for number in [0, 4] {
            let drawn = |fill: fn(&mut Rng, &mut [f32])| {
                let mut values = vec![f32::NAN; 120];
                fill(&mut Rng::new(9, Purpose::Init, number, 0), &mut values);
                values
            };
            for (init, canonical) in [
                (Init::Constant(0.5), vec![0.5; 120]),
                (Init::Normal { std: 0.25 }, drawn(|rng, values| rng.fill_normal(0.25, values))),
                (Init::Uniform { bound: 0.5 }, drawn(|rng, values| rng.fill_range(-0.5, 0.5, values))),
            ] {
                for layout in [Layout::Canonical, Layout::Hwio, Layout::Ohwi] {
                    let (mut arena, mut found) = (vec![f32::NAN; 120], vec![f32::NAN; 120]);
                    spec(layout, init).initialise(9, number, &mut arena);
                    spec(layout, init).to_canonical(&arena, &mut found);
                    assert_eq!(found, canonical, "{init:?} {layout:?} of tensor {number}");
                }
            }
        }
    }
}
