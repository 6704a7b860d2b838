//! The transforms of one tile, each over `LANES` channels at once. In one dimension, with the points
//! +-a, +-b, +-c, infinity, and 0 if N = 8 (in this order wherever N values stand for points):
//!
//! ```text
//! input     d (N) -> v (N)    v_p = coefficients of Q(x) / (x - p), times d;   v_inf = coefficients of Q(x), times d
//! evaluate  w (K) -> u (N)    u_p = sum over i of p^i w_i;                     u_inf = w_(K-1)
//! collect   m (N) -> y (K)    y_i = sum over p of p^i m_p;                     y_(K-1) += m_inf
//! ```
//!
//! where Q(x) is the product of (x - p) over the finite points. `collect` is the transpose of `evaluate`. A filter is
//! evaluated and divided by Q'(p); then collect(evaluate(w) / Q' * input(d)) is the correlation of d and w.
//!
//! The points lie in pairs, so a pair's values are the sum and the difference of an even and an odd half. With N = 8
//! every v_p but v_0 is that of N = 7 over the last seven values, since Q(x) / (x - p) gains a factor x.

use std::ops::{Add, AddAssign, Mul, Sub};

/// Channels of one vector operation.
pub const LANES: usize = 8;
/// Pairs of points.
const PAIRS: usize = 3;
/// Where the two points without a partner stand.
const INFINITY: usize = 2 * PAIRS;
const ZERO: usize = INFINITY + 1;
/// The highest power of a point in use: four of five taps or outputs.
const POWERS: usize = 6;

/// The positive points: of many, those that gave the least error (for N = 7, {0, 1, 2} and 1/2 gives twice as much).
const fn points(n: usize) -> [f32; PAIRS] {
    match n {
        7 => [0.375, 0.8125, 1.875],
        8 => [0.5625, 0.875, 1.9375],
        _ => panic!("tiles have 7 or 8 points along each axis"),
    }
}

/// One value of each of some neighbouring channels.
#[derive(Clone, Copy)]
pub struct Lanes([f32; LANES]);

impl Lanes {
    pub const ZERO: Lanes = Lanes([0.0; LANES]);

    #[inline(always)]
    pub fn load(from: &[f32]) -> Lanes {
        let mut lanes = [0.0; LANES];
        lanes.copy_from_slice(&from[..LANES]);
        Lanes(lanes)
    }
    /// Values that lie `step` apart.
    #[inline(always)]
    pub fn gather(from: &[f32], step: usize) -> Lanes {
        let mut lanes = [0.0; LANES];
        for lane in 0..LANES {
            lanes[lane] = from[lane * step];
        }
        Lanes(lanes)
    }
    #[inline(always)]
    pub fn store(self, to: &mut [f32]) {
        to[..LANES].copy_from_slice(&self.0);
    }
    /// max(x, 0); a NaN stays a NaN.
    #[inline(always)]
    pub fn relu(mut self) -> Lanes {
        for lane in 0..LANES {
            self.0[lane] = if self.0[lane] < 0.0 { 0.0 } else { self.0[lane] };
        }
        self
    }
}

macro_rules! lanewise {
    ($trait:ident, $function:ident, $operator:tt) => {
        impl $trait for Lanes {
            type Output = Lanes;
            #[inline(always)]
            fn $function(mut self, other: Lanes) -> Lanes {
                for lane in 0..LANES {
                    self.0[lane] $operator other.0[lane];
                }
                self
            }
        }
    };
}
lanewise!(Add, add, +=);
lanewise!(Sub, sub, -=);

impl Mul<f32> for Lanes {
    type Output = Lanes;
    #[inline(always)]
    fn mul(mut self, factor: f32) -> Lanes {
        for lane in 0..LANES {
            self.0[lane] *= factor;
        }
        self
    }
}

impl AddAssign for Lanes {
    #[inline(always)]
    fn add_assign(&mut self, other: Lanes) {
        *self = *self + other;
    }
}

/// Between the passes along the two axes: B x A values.
pub type Columns<const A: usize, const B: usize> = [[Lanes; A]; B];

/// Applies a transform to the columns of A x A values, then to the rows of what comes out. `columns` is the caller's, so
/// that it need not be cleared for every tile.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "rows and columns of a square")]
pub fn both_axes<const A: usize, const B: usize>(
    columns: &mut Columns<A, B>,
    mut load: impl FnMut(usize, usize) -> Lanes,
    transform: impl Fn([Lanes; A]) -> [Lanes; B],
    mut store: impl FnMut(usize, usize, Lanes),
) {
    for j in 0..A {
        let mut column = [Lanes::ZERO; A];
        for i in 0..A {
            column[i] = load(i, j);
        }
        let column = transform(column);
        for i in 0..B {
            columns[i][j] = column[i];
        }
    }
    for i in 0..B {
        let row = transform(columns[i]);
        for j in 0..B {
            store(i, j, row[j]);
        }
    }
}

#[inline(always)]
pub fn input<const N: usize>(d: [Lanes; N]) -> [Lanes; N] {
    let p = const { points(N) };
    let sq = [p[0] * p[0], p[1] * p[1], p[2] * p[2]];
    // Q(x) of the six paired points is x^6 - s x^4 + t x^2 - u.
    let (s, t, u) = (sq[0] + sq[1] + sq[2], sq[0] * sq[1] + sq[0] * sq[2] + sq[1] * sq[2], sq[0] * sq[1] * sq[2]);
    let first = N - 7;
    let mut v = [Lanes::ZERO; N];
    for pair in 0..PAIRS {
        // Q(x) / (x - p) = (x + p) (x^2 - q) (x^2 - r), with the squares q, r of the other two.
        let (q, r) = (sq[(pair + 1) % PAIRS], sq[(pair + 2) % PAIRS]);
        let low = d[first + 4] - d[first + 2] * (q + r) + d[first] * (q * r);
        let high = d[first + 5] - d[first + 3] * (q + r) + d[first + 1] * (q * r);
        let low = low * p[pair];
        v[2 * pair] = high + low;
        v[2 * pair + 1] = high - low;
    }
    v[INFINITY] = d[first + 6] - d[first + 4] * s + (d[first + 2] * t - d[first] * u);
    if N > ZERO {
        v[ZERO] = d[6] - d[4] * s + (d[2] * t - d[0] * u);
    }
    v
}

#[inline(always)]
pub fn evaluate<const K: usize, const N: usize>(w: [Lanes; K]) -> [Lanes; N] {
    let powers = const { powers(points(N)) };
    let mut u = [Lanes::ZERO; N];
    for pair in 0..PAIRS {
        let (mut even, mut odd) = (w[0], w[1] * powers[pair][1]);
        for i in 2..K {
            if i % 2 == 0 {
                even += w[i] * powers[pair][i];
            } else {
                odd += w[i] * powers[pair][i];
            }
        }
        u[2 * pair] = even + odd;
        u[2 * pair + 1] = even - odd;
    }
    u[INFINITY] = w[K - 1];
    if N > ZERO {
        u[ZERO] = w[0];
    }
    u
}

#[inline(always)]
pub fn collect<const N: usize, const K: usize>(m: [Lanes; N]) -> [Lanes; K] {
    let powers = const { powers(points(N)) };
    let mut y = [Lanes::ZERO; K];
    for pair in 0..PAIRS {
        let (even, odd) = (m[2 * pair] + m[2 * pair + 1], m[2 * pair] - m[2 * pair + 1]);
        y[0] += even;
        for i in 1..K {
            y[i] += if i % 2 == 0 { even } else { odd } * powers[pair][i];
        }
    }
    y[K - 1] += m[INFINITY];
    if N > ZERO {
        y[0] += m[ZERO];
    }
    y
}

const fn powers(points: [f32; PAIRS]) -> [[f32; POWERS]; PAIRS] {
    let mut powers = [[1.0; POWERS]; PAIRS];
    let mut pair = 0;
    while pair < PAIRS {
        let mut i = 1;
        while i < POWERS {
            powers[pair][i] = powers[pair][i - 1] * points[pair];
            i += 1;
        }
        pair += 1;
    }
    powers
}

/// 1 / Q'(p) for each point, 1 for infinity.
pub const fn scales<const N: usize>() -> [f32; N] {
    let p = points(N);
    let sq = [p[0] * p[0], p[1] * p[1], p[2] * p[2]];
    let mut scales = [1.0; N];
    let mut pair = 0;
    while pair < PAIRS {
        let (q, r) = (sq[(pair + 1) % PAIRS], sq[(pair + 2) % PAIRS]);
        let derivative = 2.0 * p[pair] * (sq[pair] - q) * (sq[pair] - r);
        // The point 0 contributes the factor p, which makes Q'(-p) equal to Q'(p) in place of its opposite.
        let [plus, minus] = if N > ZERO { [derivative * p[pair]; 2] } else { [derivative, -derivative] };
        scales[2 * pair] = 1.0 / plus;
        scales[2 * pair + 1] = 1.0 / minus;
        pair += 1;
    }
    if N > ZERO {
        scales[ZERO] = -1.0 / (sq[0] * sq[1] * sq[2]);
    }
    scales
}
