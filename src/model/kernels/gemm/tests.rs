use super::*;

/// Values that depend on the index and are not small integers.
fn values(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 + seed * 101) % 211) as f32 / 211.0 - 0.5).collect()
}

/// How a matrix lies in memory: (offset of a row step, of a column step).
fn layouts(rows: usize, cols: usize) -> [(usize, usize); 3] {
    [(cols, 1), (1, rows), (2 * cols + 3, 2)]
}

fn len(rows: usize, cols: usize, (row_step, col_step): (usize, usize)) -> usize {
    rows.saturating_sub(1) * row_step + cols.saturating_sub(1) * col_step + 1
}

/// One product in every kernel against f64 sums. All other memory is NaN and must stay what it was.
fn check(m: usize, n: usize, k: usize, a_steps: (usize, usize), b_steps: (usize, usize), store: Store, bias: bool) {
    let a = values(len(m, k, a_steps), 1);
    let b = values(len(k, n, b_steps), 2);
    let bias = bias.then(|| values(n, 3));
    let (rows, cols) = (strided(m, a_steps.0), strided(k, a_steps.1));
    let (b_rows, c_rows) = (strided(k, b_steps.0), strided(m, n + 2));
    for kernel in Kernel::available() {
        let mut packed = vec![f32::NAN; packed_len(kernel, k, n)];
        let right = Right { data: &b, rows: &b_rows, step: b_steps.1, n };
        pack_parallel(kernel, right, bias.as_deref(), &mut packed);
        let mut again = vec![f32::NAN; packed.len()];
        pack(kernel, right, bias.as_deref(), &mut again);
        assert_eq!(packed, again);

        let mut c = vec![f32::NAN; m * (n + 2)];
        let before = values(m * n, 4);
        if store.accumulate {
            (0..m * n).for_each(|at| c[at / n * (n + 2) + at % n] = before[at]);
        }
        let left = Left { data: &a, rows: &rows, cols: &cols };
        let before_c = c.clone();
        multiply(kernel, left, &packed, n, Out { data: &mut c, rows: &c_rows }, store);
        if b_steps.1 == 1 && bias.is_none() {
            for threads in [3, 1] {
                let mut buffers = vec![f32::NAN; threads * panel_buffer_len(kernel)];
                let mut found = before_c.clone();
                let out = Out { data: &mut found, rows: &c_rows };
                multiply_in_place(kernel, left, right, &mut buffers, out, store);
                let same = found.iter().zip(&c).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{kernel:?} {m}x{n}x{k} in place on {threads} threads");
            }
        }
        for (i, row) in c.chunks_exact(n + 2).enumerate() {
            for (j, &found) in row[..n].iter().enumerate() {
                let product = |k: usize| {
                    f64::from(a[i * a_steps.0 + k * a_steps.1]) * f64::from(b[k * b_steps.0 + j * b_steps.1])
                };
                let started = match &bias {
                    _ if store.accumulate => before[i * n + j],
                    Some(bias) => bias[j],
                    None => 0.0,
                };
                let mut expected = (0..k).map(product).sum::<f64>() + f64::from(started);
                if store.relu {
                    expected = expected.max(0.0);
                }
                let error = (f64::from(found) - expected).abs();
                assert!(
                    error <= 1e-6 * (k as f64 + 1.0),
                    "{kernel:?} {m}x{n}x{k} {a_steps:?} {b_steps:?}: C({i}, {j}) is {found}, expected {expected}"
                );
            }
            assert!(row[n..].iter().all(|x| x.is_nan()), "{kernel:?} {m}x{n}x{k} wrote beyond row {i}");
        }
    }
}

#[test]
fn products_of_all_sizes_equal_their_sums() {
    const SIZES: [usize; 10] = [0, 1, 5, 6, 7, 15, 16, 17, 31, 100];
    for m in SIZES {
        for n in SIZES {
            for k in [0, 1, 6, 17, 100] {
                let store = Store { accumulate: (m + n + k) % 3 == 0, relu: (m + k) % 2 == 0 };
                check(m, n, k, (k, 1), (n, 1), store, n % 2 == 0);
            }
        }
    }
}

#[test]
fn blocks_of_rows_and_of_sums_join() {
    check(MC + 7, 33, 2 * KC + 1, (2 * KC + 1, 1), (33, 1), Store { accumulate: false, relu: true }, true);
    check(2 * MC, 9, KC + 5, (KC + 5, 1), (9, 1), Store { accumulate: true, relu: false }, false);
    check(13, 257, KC, (KC, 1), (257, 1), Store::default(), true);
    check(13, 75, 2 * KC + 1, (2 * KC + 1, 1), (75, 1), Store { accumulate: false, relu: true }, false);
}

#[test]
fn every_layout_of_both_sides_gives_the_same_product() {
    let (m, n, k) = (31, 37, 23);
    for a_steps in layouts(m, k) {
        for b_steps in layouts(k, n) {
            check(m, n, k, a_steps, b_steps, Store::default(), true);
        }
    }
}

#[test]
fn a_row_of_c_has_the_same_bits_wherever_m_is_cut() {
    let (m, n, k) = (50, 40, 700);
    let (a, b) = (values(m * k, 1), values(k * n, 2));
    let (rows, cols, b_rows, c_rows) = (strided(m, k), strided(k, 1), strided(k, n), strided(m, n));
    for kernel in Kernel::available() {
        let mut packed = vec![0.0; packed_len(kernel, k, n)];
        pack(kernel, Right { data: &b, rows: &b_rows, step: 1, n }, None, &mut packed);
        let product = |cut: usize| {
            let mut c = vec![0.0; m * n];
            for rows in [&rows[..cut], &rows[cut..]].into_iter().zip([0..cut, cut..m]) {
                let left = Left { data: &a, rows: rows.0, cols: &cols };
                multiply(kernel, left, &packed, n, Out { data: &mut c, rows: &c_rows[rows.1] }, Store::default());
            }
            c
        };
        let whole = product(0);
        for cut in [1, 5, 6, 49] {
            assert!(whole == product(cut), "{kernel:?} cut at {cut}");
        }
    }
}

#[test]
fn relu_keeps_a_nan() {
    for kernel in Kernel::available() {
        for n in [1, kernel.nr] {
            let mut packed = vec![0.0; packed_len(kernel, 1, n)];
            pack(kernel, Right { data: &vec![1.0; n], rows: &[0], step: 1, n }, None, &mut packed);
            let mut c = vec![0.0; n];
            let left = Left { data: &[f32::NAN], rows: &[0], cols: &[0] };
            let store = Store { accumulate: false, relu: true };
            multiply(kernel, left, &packed, n, Out { data: &mut c, rows: &[0] }, store);
            assert!(c.iter().all(|x| x.is_nan()), "{kernel:?}");
        }
    }
}
