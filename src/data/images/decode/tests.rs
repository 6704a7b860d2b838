use super::*;
use jpeg_encoder::{ColorType as JpegColour, Encoder, SamplingFactor};
use png::{BitDepth, ColorType};
use proptest::prelude::*;

const PLENTY: u64 = 1 << 20;

fn png_file(w: u32, h: u32, colour: ColorType, depth: BitDepth, bytes: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, w, h);
    encoder.set_color(colour);
    encoder.set_depth(depth);
    if colour == ColorType::Indexed {
        encoder.set_palette(&[10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3][..]);
    }
    encoder.write_header().unwrap().write_image_data(bytes).unwrap();
    file
}

/// Squares of 8x8 pixels of one colour each, so that a JPEG of quality 100 keeps them almost exactly.
fn jpeg_file(w: u16, h: u16, colour: JpegColour, squares: &[&[u8]], exif: Option<&[u8]>) -> Vec<u8> {
    let across = usize::from(w / 8);
    let pixels = (0..usize::from(w) * usize::from(h))
        .flat_map(|at| squares[at / usize::from(w) / 8 * across + at % usize::from(w) / 8].to_vec());
    let mut file = Vec::new();
    let mut encoder = Encoder::new(&mut file, 100);
    encoder.set_sampling_factor(SamplingFactor::F_1_1);
    if let Some(exif) = exif {
        encoder.add_exif_metadata(exif).unwrap();
    }
    encoder.encode(&pixels.collect::<Vec<u8>>(), w, h, colour).unwrap();
    file
}

fn decoded(file: Vec<u8>, channels: usize, max_pixels: u64) -> Result<Image, String> {
    // A used buffer: what was in it must not show.
    let mut image = Image::default();
    (image.encoded, image.spare) = (file, vec![99; 7]);
    image.reshape(Shape::new(5, 5, 3)).fill(77);
    decode(&mut image, channels, max_pixels).map(|()| image)
}

#[test]
fn every_kind_of_png_becomes_colours_or_grey() {
    let brightness = |[r, g, b]: [f64; 3]| (0.299 * r + 0.587 * g + 0.114 * b).round() as u8;
    let (l, a) = (|at: usize| (at * 40 + 3) as u8, |at: usize| (at * 90) as u8);
    let rgb = |at: usize| [(at * 37 + 1) as u8, (at * 11 + 100) as u8, 250 - (at * 29) as u8];
    let colours: Vec<u8> = (0..6).flat_map(rgb).collect();
    let greys: Vec<u8> = (0..6).map(|at| brightness(rgb(at).map(f64::from))).collect();
    let plain: Vec<u8> = (0..6).map(l).collect();
    let threefold: Vec<u8> = (0..6).flat_map(|at| [l(at); 3]).collect();
    let palette: Vec<u8> = [40, 50, 60, 10, 20, 30, 70, 80, 90, 1, 2, 3, 10, 20, 30, 40, 50, 60].into();
    let palette_greys = vec![brightness([40.0, 50.0, 60.0]), 18, brightness([70.0, 80.0, 90.0]), 2, 18, 48];
    // Upper and lower halves of 16 bits; the lower ones go.
    let wide = |bytes: &[u8]| bytes.iter().flat_map(|&byte| [byte, byte ^ 0x5A]).collect::<Vec<u8>>();
    let rgba: Vec<u8> = (0..6).flat_map(|at| rgb(at).into_iter().chain([a(at)])).collect();
    let la: Vec<u8> = (0..6).flat_map(|at| [l(at), a(at)]).collect();
    let cases = [
        (ColorType::Rgb, BitDepth::Eight, colours.clone(), &colours, &greys),
        (ColorType::Rgb, BitDepth::Sixteen, wide(&colours), &colours, &greys),
        (ColorType::Rgba, BitDepth::Eight, rgba.clone(), &colours, &greys),
        (ColorType::Rgba, BitDepth::Sixteen, wide(&rgba), &colours, &greys),
        (ColorType::Grayscale, BitDepth::Eight, plain.clone(), &threefold, &plain),
        (ColorType::Grayscale, BitDepth::Sixteen, wide(&plain), &threefold, &plain),
        (ColorType::GrayscaleAlpha, BitDepth::Eight, la.clone(), &threefold, &plain),
        (ColorType::GrayscaleAlpha, BitDepth::Sixteen, wide(&la), &threefold, &plain),
        // Two rows of three indices of two bits: 1 0 2, 3 0 1.
        (ColorType::Indexed, BitDepth::Two, vec![0b01_00_10_00, 0b11_00_01_00], &palette, &palette_greys),
    ];
    for (colour, depth, bytes, expected, expected_grey) in cases {
        let file = png_file(3, 2, colour, depth, &bytes);
        for (channels, expected) in [(3, expected), (1, expected_grey)] {
            let image = decoded(file.clone(), channels, PLENTY).unwrap();
            assert_eq!(image.shape(), Shape::new(2, 3, channels), "{colour:?} {depth:?}");
            assert_eq!(image.bytes(), expected, "{colour:?} {depth:?} to {channels} channels");
        }
    }
}

#[test]
fn every_kind_of_jpeg_becomes_colours_or_grey() {
    let colours: [[u8; 3]; 2] = [[200, 30, 90], [20, 220, 130]];
    // Ink: what remains of 255 after it and after black.
    let inks: [[u8; 4]; 2] = [[55, 225, 165, 0], [0, 100, 200, 51]];
    let of_inks =
        inks.map(|[c, m, y, k]| [c, m, y].map(|ink| ((255 - u32::from(ink)) * (255 - u32::from(k)) / 255) as u8));
    let grey = |[r, g, b]: [u8; 3]| (0.299 * f64::from(r) + 0.587 * f64::from(g) + 0.114 * f64::from(b)) as u8;
    let cases = [
        (JpegColour::Rgb, [&colours[0][..], &colours[1]], colours),
        (JpegColour::Cmyk, [&inks[0], &inks[1]], of_inks),
        (JpegColour::CmykAsYcck, [&inks[0], &inks[1]], of_inks),
        (JpegColour::Luma, [&[40], &[201]], [[40; 3], [201; 3]]),
    ];
    for (colour, squares, expected) in cases {
        let file = jpeg_file(16, 8, colour, &squares, None);
        for channels in [3, 1] {
            let image = decoded(file.clone(), channels, PLENTY).unwrap();
            assert_eq!(image.shape(), Shape::new(8, 16, channels));
            for (at, pixel) in image.bytes().chunks_exact(channels).enumerate() {
                let expected = expected[at % 16 / 8];
                let expected = if channels == 3 { expected.to_vec() } else { vec![grey(expected)] };
                let near = pixel.iter().zip(&expected).all(|(a, b)| a.abs_diff(*b) <= 3);
                assert!(near, "{colour:?}, pixel {at}: {pixel:?} instead of {expected:?}");
            }
        }
    }
}

/// A TIFF header and one entry: tag 0x0112, type SHORT, count 1.
fn exif_orientation(value: u16, big_endian: bool) -> Vec<u8> {
    let short = |number: u16| if big_endian { number.to_be_bytes() } else { number.to_le_bytes() };
    let long = |number: u32| if big_endian { number.to_be_bytes() } else { number.to_le_bytes() };
    let start: &[u8] = if big_endian { b"MM" } else { b"II" };
    let entry = [&short(0x0112)[..], &short(3), &long(1), &short(value), &short(0)].concat();
    [start, &short(42), &long(8), &short(1), &entry, &long(0)].concat()
}

#[test]
fn the_eight_orientations_are_turned_upright() {
    let expected: [(u32, [[u8; 3]; 2]); 4] = [
        (1, [[1, 2, 3], [4, 5, 6]]),
        (2, [[3, 2, 1], [6, 5, 4]]),
        (3, [[6, 5, 4], [3, 2, 1]]),
        (4, [[4, 5, 6], [1, 2, 3]]),
    ];
    let turned: [(u32, [[u8; 2]; 3]); 4] = [
        (5, [[1, 4], [2, 5], [3, 6]]),
        (6, [[4, 1], [5, 2], [6, 3]]),
        (7, [[6, 3], [5, 2], [4, 1]]),
        (8, [[3, 6], [2, 5], [1, 4]]),
    ];
    let all = expected.map(|(o, rows)| (o, Shape::new(2, 3, 3), rows.concat())).into_iter();
    for (orientation, shape, expected) in all.chain(turned.map(|(o, rows)| (o, Shape::new(3, 2, 3), rows.concat()))) {
        let mut image = Image::default();
        let pixels: Vec<u8> = (1..=6).flat_map(|at| [at, at + 10, at + 20]).collect();
        image.reshape(Shape::new(2, 3, 3)).copy_from_slice(&pixels);
        turn_upright(&mut image, orientation);
        let expected: Vec<u8> = expected.iter().flat_map(|at| [*at, at + 10, at + 20]).collect();
        assert_eq!((image.shape(), image.bytes()), (shape, &expected[..]), "orientation {orientation}");
    }
}

#[test]
fn orientation_comes_from_the_exif_of_a_jpeg_and_nonsense_is_upright() {
    let squares: [&[u8]; 2] = [&[30], &[200]];
    for (exif, expected) in [
        (exif_orientation(6, true), (16, 8, [30, 200])),
        (exif_orientation(6, false), (16, 8, [30, 200])),
        (exif_orientation(8, false), (16, 8, [200, 30])),
        (exif_orientation(2, false), (8, 16, [200, 30])),
        (exif_orientation(0, false), (8, 16, [30, 200])),
        (exif_orientation(9, true), (8, 16, [30, 200])),
        (b"MM\0*\0\0\0\xFFgarbled".to_vec(), (8, 16, [30, 200])),
    ] {
        let image = decoded(jpeg_file(16, 8, JpegColour::Luma, &squares, Some(&exif)), 1, PLENTY).unwrap();
        let ends = [image.bytes()[0], image.bytes()[127]];
        assert_eq!((image.shape().h, image.shape().w), (expected.0, expected.1), "{exif:?}");
        assert!(ends.iter().zip(expected.2).all(|(a, b)| a.abs_diff(b) < 3), "{exif:?}: {ends:?}");
    }
}

/// A PNG's chunk: length, type, data, checksum.
fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let said = [&kind[..], data].concat();
    [&(data.len() as u32).to_be_bytes()[..], &said, &crc(&said).to_be_bytes()].concat()
}

/// The file with more chunks behind its header, which ends at byte 33.
fn with_chunks(png: &[u8], chunks: &[Vec<u8>]) -> Vec<u8> {
    [&png[..33], &chunks.concat(), &png[33..]].concat()
}

#[test]
fn orientation_comes_from_the_exif_of_a_png() {
    let file = png_file(3, 2, ColorType::Grayscale, BitDepth::Eight, &[1, 2, 3, 4, 5, 6]);
    let turned = with_chunks(&file, &[chunk(b"eXIf", &exif_orientation(6, true))]);
    let image = decoded(turned, 1, PLENTY).unwrap();
    assert_eq!((image.shape(), image.bytes()), (Shape::new(3, 2, 1), &[4, 1, 5, 2, 6, 3][..]));
}

/// Of an animation the first frame is the image; here it is 2x1 of 3x2 pixels.
#[test]
fn a_first_frame_that_leaves_pixels_open_is_refused() {
    let mut file = png_file(2, 1, ColorType::Grayscale, BitDepth::Eight, &[1, 2]);
    let header = [&3u32.to_be_bytes()[..], &2u32.to_be_bytes(), &file[24..29]].concat();
    file.splice(8..33, chunk(b"IHDR", &header));
    let one_frame = chunk(b"acTL", &[1u32, 0].map(u32::to_be_bytes).concat());
    // Number, width, height, left, top; then a delay of 0/1 s, and what becomes of the frame.
    let frame = [&[0u32, 2, 1, 0, 0].map(u32::to_be_bytes).concat()[..], &[0, 0, 0, 1, 0, 0]].concat();
    let error = decoded(with_chunks(&file, &[one_frame, chunk(b"fcTL", &frame)]), 1, PLENTY).err().unwrap();
    assert!(error.contains("frame"), "{error}");
}

/// A thumbnail in the header has an end-of-image marker of its own.
#[test]
fn the_end_of_a_thumbnail_is_not_the_end_of_the_image() {
    let exif = [&exif_orientation(1, true)[..], &[0xFF, 0xD8, 0xFF, 0xD9]].concat();
    let mut file = jpeg_file(16, 8, JpegColour::Luma, &[&[30], &[200]], Some(&exif));
    decoded(file.clone(), 1, PLENTY).unwrap();
    file.truncate(file.len() - 2);
    let error = decoded(file, 1, PLENTY).err().unwrap();
    assert!(error.contains("not a whole JPEG"), "{error}");
}

fn photograph() -> Vec<u8> {
    let mut file = Vec::new();
    let pixels: Vec<u8> = (0..61 * 47 * 3).map(|at| (at * at / 7 + at * 31) as u8).collect();
    Encoder::new(&mut file, 80).encode(&pixels, 61, 47, JpegColour::Rgb).unwrap();
    file
}

fn progressive() -> Vec<u8> {
    let mut file = Vec::new();
    let pixels: Vec<u8> = (0..61 * 47 * 3).map(|at| (at * at / 7 + at * 31) as u8).collect();
    let mut encoder = Encoder::new(&mut file, 80);
    encoder.set_progressive(true);
    encoder.encode(&pixels, 61, 47, JpegColour::Rgb).unwrap();
    file
}

fn picture() -> Vec<u8> {
    let pixels: Vec<u8> = (0..30 * 20 * 3).map(|at| (at * 31 + at / 7) as u8).collect();
    png_file(30, 20, ColorType::Rgb, BitDepth::Eight, &pixels)
}

#[test]
fn a_file_that_ends_early_is_refused_wherever_it_ends() {
    for (file, word) in [(photograph(), "JPEG"), (progressive(), "JPEG"), (picture(), "PNG")] {
        decoded(file.clone(), 3, PLENTY).unwrap();
        for end in 0..file.len() - 2 {
            let error = decoded(file[..end].to_vec(), 3, PLENTY).err();
            let error = error.unwrap_or_else(|| panic!("a {word} of {} bytes was read up to {end}", file.len()));
            assert!(end < 8 || error.contains(word), "{end}: {error}");
        }
    }
}

#[test]
fn a_header_that_promises_too_much_is_refused_before_memory_is_taken() {
    // A PNG's IHDR holds width and height from byte 16 on, and its checksum from 29 on.
    let mut bomb = picture();
    bomb[16..24].copy_from_slice(&[0, 0xFF, 0xFF, 0xFF, 0, 0xFF, 0xFF, 0xFF]);
    let checksum = crc(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&checksum.to_be_bytes());
    let error = decoded(bomb, 3, 100_000_000).err().unwrap();
    assert!(error.contains("16777215x16777215 pixels; data.max_pixels allows 100000000"), "{error}");

    // A JPEG's SOF0 holds precision, height, width behind its length.
    let mut bomb = photograph();
    let frame = bomb.windows(2).position(|marker| marker == [0xFF, 0xC0]).unwrap();
    bomb[frame + 5..frame + 9].fill(0xFF);
    let error = decoded(bomb, 3, 100_000_000).err().unwrap();
    assert!(error.contains("65535x65535 pixels"), "{error}");

    assert!(decoded(picture(), 3, 600).is_ok());
    assert!(decoded(picture(), 3, 599).err().unwrap().contains("30x20 pixels; data.max_pixels allows 599"));
}

/// CRC-32 as PNG has it.
fn crc(bytes: &[u8]) -> u32 {
    let mut hasher = flate2::Crc::new();
    hasher.update(bytes);
    hasher.sum()
}

#[test]
fn what_is_no_image_is_named_as_that() {
    assert_eq!(decoded(Vec::new(), 3, PLENTY).err().unwrap(), "the file is empty");
    assert_eq!(
        decoded(b"GIF89a".to_vec(), 3, PLENTY).err().unwrap(),
        "neither JPEG nor PNG: it begins with 47 49 46 38"
    );
}

proptest! {
    /// Whatever is changed in a file: an image or an error, no panic and no memory beyond the limit.
    #[test]
    fn no_garbled_file_makes_it_panic(
        which in 0usize..3,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        channels in prop::sample::select(vec![1usize, 3]),
    ) {
        let files: [fn() -> Vec<u8>; 3] = [photograph, progressive, picture];
        let mut file = files[which]();
        for (at, value) in changes {
            let at = at.index(file.len());
            file[at] = value;
        }
        let _ = decoded(file, channels, 10_000);
    }
}
