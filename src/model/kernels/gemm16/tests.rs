use super::super::gemm::strided;
use super::*;

/// Integers from -8 to 8 that depend on the index: bf16 holds them, and f32 holds sums of their products, whatever the
/// order, so kernels are held to equality.
fn integer(i: usize, seed: usize) -> f32 {
    ((i * 37 + i / 17 * 5 + seed * 101) % 17) as f32 - 8.0
}

fn integers(len: usize, seed: usize) -> Vec<bf16> {
    (0..len).map(|i| bf16::from_f32(integer(i, seed))).collect()
}

/// (offset of a row step, of a column step)
type Steps = (usize, usize);

fn len(rows: usize, cols: usize, (row_step, col_step): Steps) -> usize {
    rows.saturating_sub(1) * row_step + cols.saturating_sub(1) * col_step + 1
}

/// One product: how large, how its matrices lie in memory, and what becomes of the sums.
#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    a: Steps,
    b: Steps,
    store: Store,
    bias: bool,
}

impl Case {
    /// Row-major matrices.
    fn plain(m: usize, n: usize, k: usize) -> Case {
        Case { m, n, k, a: (k, 1), b: (n, 1), store: Store::default(), bias: true }
    }

    /// C(i, j) in f64, before it is rounded to what C consists of.
    fn expected(&self, i: usize, j: usize, a: &[bf16], b: &[bf16]) -> f64 {
        let product = |k: usize| a[i * self.a.0 + k * self.a.1].to_f64() * b[k * self.b.0 + j * self.b.1].to_f64();
        let started = match (self.store.accumulate, self.bias) {
            (true, _) => integer(i * self.n + j, 4),
            (false, true) => integer(j, 3),
            (false, false) => 0.0,
        };
        let sum = (0..self.k).map(product).sum::<f64>() + f64::from(started);
        if self.store.relu { sum.max(0.0) } else { sum }
    }

    /// Every kernel's product equals the sums, rounded once. All other memory, the scratch too, is NaN and is not read.
    fn check<T: Element + PartialEq>(self) {
        let Case { m, n, k, .. } = self;
        let (a, b) = (integers(len(m, k, self.a), 1), integers(len(k, n, self.b), 2));
        let bias: Option<Vec<f32>> = self.bias.then(|| (0..n).map(|j| integer(j, 3)).collect());
        let (rows, cols) = (strided(m, self.a.0), strided(k, self.a.1));
        let (b_rows, c_rows) = (strided(k, self.b.0), strided(m, n + 2));
        for kernel in Kernel::available() {
            let mut packed = vec![f32::NAN; packed_len(kernel, k, n)];
            let right = Right { data: &b, rows: &b_rows, step: self.b.1, n };
            pack_parallel(kernel, right, bias.as_deref(), &mut packed);
            let mut again = vec![f32::NAN; packed.len()];
            pack(kernel, right, bias.as_deref(), &mut again);
            assert!(packed.iter().map(|x| x.to_bits()).eq(again.iter().map(|x| x.to_bits())), "{kernel:?} {self:?}");

            let mut c = vec![T::from_sum(f32::NAN); m * (n + 2)];
            if self.store.accumulate {
                (0..m * n).for_each(|at| c[at / n * (n + 2) + at % n] = T::from_sum(integer(at, 4)));
            }
            let left = Left { data: &a, rows: &rows, cols: &cols };
            let mut scratch = vec![f32::NAN; scratch_len(kernel)];
            multiply(kernel, left, &packed, n, Out { data: &mut c, rows: &c_rows }, self.store, &mut scratch);

            for (i, row) in c.chunks_exact(n + 2).enumerate() {
                for (j, &found) in row[..n].iter().enumerate() {
                    let (found, expected) = (found.into(), self.expected(i, j, &a, &b));
                    let rounded: f32 = T::from_sum(expected as f32).into();
                    assert_eq!(found, rounded, "{kernel:?} {self:?}: C({i}, {j}), of {expected}");
                }
                assert!(row[n..].iter().all(|&x| x.into().is_nan()), "{kernel:?} {self:?} wrote beyond row {i}");
            }
        }
    }
}

#[test]
fn products_of_all_sizes_equal_their_sums() {
    const SIZES: [usize; 8] = [0, 1, 7, 8, 16, 17, 33, 100];
    for (number, m) in SIZES.into_iter().enumerate() {
        for n in SIZES {
            for k in [0, 1, 2, 31, 32, 33, 65] {
                let store = Store { accumulate: (number + n + k) % 3 == 0, relu: (m + k) % 2 == 0 };
                let case = Case { store, bias: n % 2 == 0, ..Case::plain(m, n, k) };
                case.check::<f32>();
                case.check::<bf16>();
            }
        }
    }
}

#[test]
fn blocks_of_rows_of_columns_and_of_sums_join() {
    let (accumulate, relu) = (true, true);
    Case { store: Store { accumulate: false, relu }, ..Case::plain(135, 33, 1025) }.check::<bf16>();
    Case { store: Store { accumulate, relu: false }, ..Case::plain(129, 9, 515) }.check::<f32>();
    Case { store: Store { accumulate, relu }, ..Case::plain(3, 17, 769) }.check::<bf16>();
    Case::plain(2, 530, 384).check::<bf16>();
    Case::plain(2, 530, 513).check::<f32>();
}

#[test]
fn every_layout_of_both_sides_gives_the_same_product() {
    let (m, n, k) = (45, 37, 23);
    let layouts = |rows: usize, cols: usize| [(cols, 1), (1, rows), (2 * cols + 3, 2), (1, 1)];
    for a in layouts(m, k) {
        for b in layouts(k, n) {
            Case { a, b, ..Case::plain(m, n, k) }.check::<f32>();
        }
    }
}

/// The tables of a 3 x 3 convolution of 5 channels over images of 9 x 8 (h, w): (pixels, taps).
fn window_tables() -> (Vec<u32>, Vec<u32>) {
    let (h, w, c) = (9, 8, 5);
    let pixels = (0..(h - 2) * (w - 2)).map(|at| ((at / (w - 2) * w + at % (w - 2)) * c) as u32);
    let taps = (0..3 * 3 * c).map(|at| ((at / (3 * c) * w + at / c % 3) * c + at % c) as u32);
    (pixels.collect(), taps.collect())
}

#[test]
fn the_windows_of_an_image_are_taken_in_runs() {
    let x = integers(9 * 8 * 5, 1);
    let (pixels, taps) = window_tables();
    // Forward, where the columns come in runs, and the weight's gradient, where the rows do.
    for (rows, cols) in [(&pixels, &taps), (&taps, &pixels)] {
        let (m, n, k) = (rows.len(), 7, cols.len());
        let (b, b_rows, c_rows) = (integers(k * n, 2), strided(k, n), strided(m, n));
        for kernel in Kernel::available() {
            let mut packed = vec![f32::NAN; packed_len(kernel, k, n)];
            pack(kernel, Right { data: &b, rows: &b_rows, step: 1, n }, None, &mut packed);
            let mut c = vec![f32::NAN; m * n];
            let (left, out) = (Left { data: &x, rows, cols }, Out { data: &mut c, rows: &c_rows });
            let mut scratch = vec![f32::NAN; scratch_len(kernel)];
            multiply(kernel, left, &packed, n, out, Store::default(), &mut scratch);
            for (at, &found) in c.iter().enumerate() {
                let product = |k: usize| x[(rows[at / n] + cols[k]) as usize].to_f32() * b[k * n + at % n].to_f32();
                assert_eq!(found, (0..k).map(product).sum::<f32>(), "{kernel:?} C({}, {})", at / n, at % n);
            }
        }
    }
}

/// Fractions, whose sums depend on their order.
fn fractions(len: usize, seed: usize) -> Vec<bf16> {
    (0..len).map(|i| bf16::from_f32(((i * 37 + seed * 101) % 211) as f32 / 211.0 - 0.5)).collect()
}

#[test]
fn a_row_of_c_has_the_same_bits_wherever_m_is_cut_and_whoever_computes_it() {
    use rayon::prelude::*;
    let (m, n, k) = (140, 40, 700);
    let (a, b) = (fractions(m * k, 1), fractions(k * n, 2));
    let (rows, cols, b_rows, c_rows) = (strided(m, k), strided(k, 1), strided(k, n), strided(m, n));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("three threads");
    for kernel in Kernel::available() {
        let mut packed = vec![0.0; packed_len(kernel, k, n)];
        pack(kernel, Right { data: &b, rows: &b_rows, step: 1, n }, None, &mut packed);
        let product = |size: usize| {
            let mut c = vec![0.0f32; m * n];
            pool.install(|| {
                rows.par_chunks(size).zip(c.par_chunks_mut(size * n)).for_each(|(rows, c)| {
                    let (left, out) =
                        (Left { data: &a, rows, cols: &cols }, Out { data: c, rows: &c_rows[..rows.len()] });
                    let mut scratch = vec![f32::NAN; scratch_len(kernel)];
                    multiply(kernel, left, &packed, n, out, Store::default(), &mut scratch);
                });
            });
            c
        };
        let whole = product(m);
        for size in [1, 5, 31, 139] {
            assert!(whole == product(size), "{kernel:?} in pieces of {size} rows");
        }
    }
}

#[test]
fn fractions_are_summed_as_exactly_as_f32_allows() {
    let (m, n, k) = (37, 35, 1100);
    let (a, b) = (fractions(m * k, 1), fractions(k * n, 2));
    let (rows, cols, b_rows, c_rows) = (strided(m, k), strided(k, 1), strided(k, n), strided(m, n));
    for kernel in Kernel::available() {
        let mut packed = vec![0.0; packed_len(kernel, k, n)];
        pack(kernel, Right { data: &b, rows: &b_rows, step: 1, n }, None, &mut packed);
        let mut c = vec![0.0f32; m * n];
        let (left, out) = (Left { data: &a, rows: &rows, cols: &cols }, Out { data: &mut c, rows: &c_rows });
        multiply(kernel, left, &packed, n, out, Store::default(), &mut vec![f32::NAN; scratch_len(kernel)]);
        for (at, &found) in c.iter().enumerate() {
            let product = |l: usize| a[at / n * k + l].to_f64() * b[l * n + at % n].to_f64();
            let expected: f64 = (0..k).map(product).sum();
            assert!((f64::from(found) - expected).abs() < 2e-5, "{kernel:?}: {found}, expected {expected}");
        }
    }
}

#[test]
fn nan_and_infinity_reach_their_row_alone() {
    let (m, n, k) = (3, 2, 5);
    let mut a = vec![bf16::ONE; m * k];
    (a[k + 4], a[2 * k + 4]) = (bf16::NAN, bf16::INFINITY);
    let b = vec![bf16::ONE; k * n];
    for kernel in Kernel::available() {
        let mut packed = vec![0.0; packed_len(kernel, k, n)];
        pack(kernel, Right { data: &b, rows: &strided(k, n), step: 1, n }, None, &mut packed);
        let mut c = vec![bf16::ZERO; m * n];
        let (rows, cols, c_rows) = (strided(m, k), strided(k, 1), strided(m, n));
        let (left, out) = (Left { data: &a, rows: &rows, cols: &cols }, Out { data: &mut c, rows: &c_rows });
        let store = Store { relu: true, ..Store::default() };
        multiply(kernel, left, &packed, n, out, store, &mut vec![f32::NAN; scratch_len(kernel)]);
        assert!(c[..n].iter().all(|x| x.to_f32() == 5.0), "{kernel:?}: {c:?}");
        assert!(c[n..2 * n].iter().all(|x| x.is_nan()), "{kernel:?}: {c:?}");
        assert!(c[2 * n..].iter().all(|x| x.to_f32() == f32::INFINITY), "{kernel:?}: {c:?}");
    }
}
