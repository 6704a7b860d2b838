use super::*;

fn values(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 + i / 211 + seed * 101) % 211) as f32 / 211.0 - 0.45).collect()
}

/// A convolution of two images, cut into chunks of at most so many bytes.
struct Case {
    input: Shape,
    filters: usize,
    taps: usize,
    before: [usize; 2],
    chunk_bytes: usize,
    /// What `Winograd::new` should choose.
    points: usize,
}

const IMAGES: usize = 2;

impl Case {
    fn output(&self) -> Shape {
        let length = |input: usize, before: usize| input + 2 * before + 1 - self.taps;
        Shape::new(length(self.input.h, self.before[0]), length(self.input.w, self.before[1]), self.filters)
    }

    /// Calls `visit` with the places in x, in the filter (R, R, C, F), and in y of every product.
    fn each_term(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let (input, output) = (self.input, self.output());
        for y in 0..IMAGES * output.h * output.w {
            let (image, oh, ow) = (y / (output.h * output.w), y / output.w % output.h, y % output.w);
            for tap in 0..self.taps * self.taps {
                let h = (oh + tap / self.taps).wrapping_sub(self.before[0]);
                let w = (ow + tap % self.taps).wrapping_sub(self.before[1]);
                if h < input.h && w < input.w {
                    let x = (image * input.h + h) * input.w + w;
                    for c in 0..input.c {
                        (0..output.c)
                            .for_each(|f| visit(x * input.c + c, (tap * input.c + c) * output.c + f, y * output.c + f));
                    }
                }
            }
        }
    }

    fn check(&self) {
        let (input, output) = (self.input, self.output());
        let winograd = Winograd::with_chunks(input, output, self.taps, self.before, IMAGES, self.chunk_bytes);
        assert_eq!(winograd.points, self.points, "{input} {output}");
        let (x, dy) = (values(IMAGES * input.len(), 1), values(IMAGES * output.len(), 2));
        let filter = values(self.taps * self.taps * input.c * output.c, 3);

        let mut packed = vec![f32::NAN; winograd.filter_len()];
        winograd.pack(Filter { data: &filter, row: output.c, column: 1, turned: false }, &mut packed);
        let (mut y, mut dfilter) = (vec![f32::NAN; dy.len()], vec![f32::NAN; filter.len()]);
        let mut scratch = vec![f32::NAN; winograd.forward_len()];
        winograd.forward(IMAGES, &x, &packed, Finish::default(), &mut y, &mut scratch);
        let (mut scratch, mut sums) = (vec![f32::NAN; winograd.gradient_len()], vec![f32::NAN; output.c]);
        for rows in winograd.chunks(IMAGES) {
            let accumulate = rows.start > 0;
            winograd.gradient(rows, &x, &dy, accumulate, &mut sums, &mut scratch);
        }
        winograd.finish_gradient(&mut dfilter, &scratch);

        let (mut y_sums, mut filter_sums) = (vec![Sum::default(); y.len()], vec![Sum::default(); filter.len()]);
        self.each_term(|at_x, at_filter, at_y| {
            y_sums[at_y].add(x[at_x], filter[at_filter]);
            filter_sums[at_filter].add(x[at_x], dy[at_y]);
        });
        assert_close("y", self, &y, &y_sums);
        assert_close("dfilter", self, &dfilter, &filter_sums);
        let mut bias = vec![Sum::default(); output.c];
        dy.iter().enumerate().for_each(|(at, &dy)| bias[at % output.c].add(dy, 1.0));
        assert_close("sums", self, &sums, &bias);
    }
}

/// A sum of products and of their magnitudes.
#[derive(Clone, Default)]
struct Sum {
    value: f64,
    magnitude: f64,
}

impl Sum {
    fn add(&mut self, a: f32, b: f32) {
        let product = f64::from(a) * f64::from(b);
        self.value += product;
        self.magnitude += product.abs();
    }
}

/// No error above so many roundings (2^-24) of the largest sum of magnitudes: what the essay promises.
fn assert_close(what: &str, case: &Case, found: &[f32], expected: &[Sum]) {
    let roundings = if case.points == 7 { 128.0 } else { 256.0 };
    let largest = expected.iter().fold(0.0, |largest: f64, sum| largest.max(sum.magnitude));
    for (at, (&found, sum)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - sum.value).abs();
        assert!(
            error <= roundings * (-24f64).exp2() * largest,
            "{what}[{at}] is {found}, expected {}, for {} taps over {}",
            sum.value,
            case.taps,
            case.input
        );
    }
}

#[test]
fn products_equal_the_definition_within_the_promised_error() {
    let case = |h, w, c, filters, taps, before, chunk_bytes, points| {
        Case { input: Shape::new(h, w, c), filters, taps, before, chunk_bytes, points }.check();
    };
    case(13, 13, 32, 16, 3, [1, 1], CHUNK_BYTES, 7);
    case(13, 13, 16, 48, 3, [1, 1], 1, 7);
    case(12, 6, 16, 32, 3, [1, 1], 100_000, 8);
    case(8, 14, 16, 16, 3, [0, 0], CHUNK_BYTES, 8);
    case(9, 9, 16, 32, 5, [2, 2], 100_000, 7);
    case(13, 7, 16, 16, 5, [0, 0], CHUNK_BYTES, 7);
    case(8, 11, 32, 16, 5, [2, 2], 1, 8);
}
