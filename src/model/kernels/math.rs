//! exp, ln, sine and cosine, tanh and the logistic function without branches, tables or calls, so that loops over them are
//! vectorised. They are S. Moshier's Cephes formulas (`expf.c`, `logf.c`, `sinf.c`, `tanhf.c`). The tests hold them against f64.

/// ln 2 in two parts, the first of few bits, so that its product with an exponent is exact.
const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// e^x, to a relative error of 2^-22; 0 below -87.3, where the result would not be a normal number, and 2.4e38 above 88.3.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding this leaves n + 127 in the lowest bits, n being the nearest integer: the exponent of 2^n.
    const ROUND: f32 = (3 << 22) as f32 + 127.0;

    let inside = if x < -87.3 { -87.3 } else { x };
    let inside = if inside > 88.3 { 88.3 } else { inside };
    let shifted = inside * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = inside - n * LN2[0] - n * LN2[1];
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 0.166_666_66;
    let p = p * r + 0.5;
    let power = (p * r * r + r + 1.0) * f32::from_bits(shifted.to_bits() << 23);
    if x < -87.3 { 0.0 } else { power }
}

/// The natural logarithm of a normal positive number, to a relative error of 2^-22.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    // x = m 2^n with m from the square root of 1/2 to that of 2.
    let n = (x.to_bits().wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits()) as i32) >> 23;
    let m = f32::from_bits(x.to_bits().wrapping_sub((n << 23) as u32)) - 1.0;
    let n = n as f32;
    let p = 7.037_683_6e-2;
    let p = p * m - 0.115_146_1;
    let p = p * m + 0.116_769_99;
    let p = p * m - 0.124_201_41;
    let p = p * m + 0.142_493_23;
    let p = p * m - 0.166_680_58;
    let p = p * m + 0.200_007_15;
    let p = p * m - 0.249_999_94;
    let p = p * m + 0.333_333_3;
    let square = m * m;
    let low = p * m * square + n * LN2[1] - 0.5 * square;
    m + low + n * LN2[0]
}

/// Sine and cosine of an angle in turns, from 0 to 1, to an absolute error of 2^-23.
#[inline(always)]
pub fn sin_cos_of_turns(turns: f32) -> (f32, f32) {
    // Adding this leaves the nearest integer in the lowest bits.
    const ROUND: f32 = (3 << 22) as f32;

    let shifted = turns * 4.0 + ROUND;
    let quarters = shifted.to_bits();
    let x = (turns * 4.0 - (shifted - ROUND)) * std::f32::consts::FRAC_PI_2;
    let square = x * x;
    let p = -1.951_529_6e-4;
    let p = p * square + 8.332_161e-3;
    let p = p * square - 0.166_666_55;
    let sin = p * square * x + x;
    let p = 2.443_315_7e-5;
    let p = p * square - 1.388_731_6e-3;
    let p = p * square + 4.166_664_6e-2;
    let cos = p * square * square - 0.5 * square + 1.0;
    let (sin, cos) = if quarters & 1 == 0 { (sin, cos) } else { (cos, sin) };
    let negated = |value: f32, sign: u32| f32::from_bits(value.to_bits() ^ ((sign & 2) << 30));
    (negated(sin, quarters), negated(cos, quarters.wrapping_add(1)))
}

/// 1 / (1 + e^-x), to a relative error of 2^-21 where it is a normal number.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh x, to a relative error of 2^-21: an odd polynomial near 0, elsewhere 1 - 2 / (e^2x + 1).
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let size = x.abs();
    let far = 1.0 - 2.0 / (exp(2.0 * size) + 1.0);
    let square = x * x;
    let p = -5.704_988_7e-3;
    let p = p * square + 2.063_909e-2;
    let p = p * square - 5.373_971_6e-2;
    let p = p * square + 0.133_314_42;
    let p = p * square - 0.333_332_8;
    let near = p * square * size + size;
    // A NaN takes the first way.
    (if size >= 0.625 { far } else { near }).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every sign and exponent with 64 mantissas, and the neighbourhoods of what is special.
    fn points() -> impl Iterator<Item = f32> {
        let all = (0..=u32::MAX >> 17).map(|bits| f32::from_bits((bits << 17) | 0x1_2345));
        let near = [-0.625f32, 0.625, -87.3, 88.3, 1.0];
        let near = near.into_iter().flat_map(|x| (-40..40).map(move |i| x + i as f32 * 1e-3 * x));
        all.chain(near).chain((-2000..2000).map(|i| i as f32 * 0.0437)).filter(|x| x.is_finite())
    }

    fn check(what: &str, bound: f64, range: std::ops::Range<f32>, found: fn(f32) -> f32, expected: fn(f64) -> f64) {
        let mut worst = (0.0, 0.0);
        for x in points().filter(|x| range.contains(x)) {
            let expected = expected(f64::from(x));
            let error = ((f64::from(found(x)) - expected) / expected).abs();
            if error > worst.0 {
                worst = (error, x);
            }
        }
        assert!(worst.0 < bound, "{what}({}) is wrong by a relative {}", worst.1, worst.0);
        assert!(worst.0 > bound / 64.0, "{what}: its bound {bound} is far above its error {}", worst.0);
    }

    #[test]
    fn errors_are_what_is_said() {
        check("exp", (-22f64).exp2(), -87.2..88.2, exp, f64::exp);
        check("ln", (-22f64).exp2(), f32::MIN_POSITIVE..f32::MAX, ln, f64::ln);
        check("sigmoid", (-21f64).exp2(), -87.0..f32::MAX, sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
        check(
            "tanh",
            (-21f64).exp2(),
            f32::MIN..f32::MAX,
            |x| if x.abs() < 1e-30 { 1.0 } else { tanh(x) },
            |x| {
                if x.abs() < 1e-30 { 1.0 } else { x.tanh() }
            },
        );
    }

    #[test]
    fn angles_of_all_quarters() {
        let worst = (0..1 << 20).map(|i| i as f32 / (1 << 20) as f32).fold(0.0, |worst: f64, turns| {
            let ((sin, cos), expected) =
                (sin_cos_of_turns(turns), (f64::from(turns) * std::f64::consts::TAU).sin_cos());
            worst.max((f64::from(sin) - expected.0).abs()).max((f64::from(cos) - expected.1).abs())
        });
        assert!(((-25f64).exp2()..(-23f64).exp2()).contains(&worst), "wrong by {worst}");
        assert_eq!([0.0, 0.25, 0.5, 0.75].map(sin_cos_of_turns), [(0.0, 1.0), (1.0, 0.0), (-0.0, -1.0), (-1.0, -0.0)]);
    }

    #[test]
    fn ends_and_broken_values() {
        assert!([exp, sigmoid, tanh].iter().all(|f| f(f32::NAN).is_nan()));
        assert_eq!([exp(f32::NEG_INFINITY), exp(-1e30), exp(0.0)], [0.0, 0.0, 1.0]);
        assert_eq!(ln(1.0), 0.0);
        assert!(exp(f32::INFINITY) > 2.2e38);
        assert_eq!([sigmoid(f32::INFINITY), sigmoid(0.0)], [1.0, 0.5]);
        assert!(sigmoid(f32::NEG_INFINITY) < 5e-39);
        assert_eq!([tanh(f32::INFINITY), tanh(f32::NEG_INFINITY), tanh(0.0)], [1.0, -1.0, 0.0]);
        assert!(tanh(-0.0).is_sign_negative() && tanh(1e-39) == 1e-39);
    }
}
