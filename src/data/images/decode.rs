//! From the bytes of a JPEG or PNG file to an upright image of one or three channels.
//!
//! The header is read first, and an image of more than `max_pixels` is refused before anything of its size is allocated.
//! What a decoder then holds is bounded by the pixels: 9 bytes each for a progressive JPEG, 11 for a PNG of 16 bits and
//! four channels.

use crate::data::image::{Image, room};
use crate::model::Shape;
use png::Transformations;
use std::io::Cursor;
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

const JPEG: [u8; 3] = [0xFF, 0xD8, 0xFF];
const PNG: [u8; 8] = *b"\x89PNG\r\n\x1a\n";
/// The greatest side that a JPEG's header can say.
const JPEG_SIDE: usize = 65_535;
/// What a PNG may need besides its pixels: chunks, tables, profiles.
const PNG_OVERHEAD: u64 = 1 << 24;

/// Decodes `image.encoded` into `image`, of `channels` 1 or 3. The error is the reason why that is impossible.
pub fn decode(image: &mut Image, channels: usize, max_pixels: u64) -> Result<(), String> {
    let encoded = std::mem::take(&mut image.encoded);
    let orientation = if encoded.starts_with(&JPEG) {
        jpeg(&encoded, image, channels, max_pixels)
    } else if encoded.starts_with(&PNG) {
        png(&encoded, image, channels, max_pixels)
    } else {
        Err(unknown(&encoded))
    };
    image.encoded = encoded;
    turn_upright(image, orientation?);
    Ok(())
}

fn unknown(encoded: &[u8]) -> String {
    let start: Vec<String> = encoded.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    match start.is_empty() {
        true => "the file is empty".into(),
        false => format!("neither JPEG nor PNG: it begins with {}", start.join(" ")),
    }
}

fn check_size(w: usize, h: usize, max_pixels: u64) -> Result<(), String> {
    match (w as u64).checked_mul(h as u64) {
        Some(0) => Err(format!("its header says {w}x{h} pixels")),
        Some(pixels) if pixels <= max_pixels => Ok(()),
        _ => Err(format!("its header says {w}x{h} pixels; data.max_pixels allows {max_pixels}")),
    }
}

/// Strict: data that end early or make no sense are an error, where a lenient decoder would fill up with grey.
fn jpeg(encoded: &[u8], image: &mut Image, channels: usize, max_pixels: u64) -> Result<u32, String> {
    let options = DecoderOptions::default().set_strict_mode(true).set_max_width(JPEG_SIDE).set_max_height(JPEG_SIDE);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(encoded), options);
    decoder.decode_headers().map_err(|error| format!("not a whole JPEG: {error}"))?;
    let (w, h) = decoder.dimensions().ok_or("a JPEG without dimensions")?;
    check_size(w, h, max_pixels)?;
    // Where it is stored apart from the colours, brightness is taken as it is.
    let has_luma = matches!(decoder.input_colorspace(), Some(ColorSpace::Luma | ColorSpace::YCbCr));
    let (colours, stored) = if channels == 1 && has_luma { (ColorSpace::Luma, 1) } else { (ColorSpace::RGB, 3) };
    decoder.set_options(options.jpeg_set_out_colorspace(colours));
    let orientation = decoder.exif().map_or(1, |exif| orientation(exif));
    let decoded = if stored == channels {
        decoder.decode_into(image.reshape(Shape::new(h, w, channels)))
    } else {
        decoder.decode_into(room(&mut image.spare, h * w * stored))
    };
    decoded.map_err(|error| format!("not a whole JPEG: {error}"))?;
    if !has_end(encoded) {
        return Err("not a whole JPEG: it has no end-of-image marker".into());
    }
    if stored != channels {
        convert(image, Shape::new(h, w, channels), stored);
    }
    Ok(orientation)
}

/// Whether the end-of-image marker stands behind the header, where a thumbnail may have its own. The decoder does not miss it
/// if no more than the last rows are lost.
fn has_end(encoded: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xDA;
    let mut rest = &encoded[2..];
    while let &[0xFF, marker, high, low, ..] = rest
        && marker != START_OF_SCAN
    {
        let segment = if marker == 0xFF { 1 } else { 2 + usize::from(u16::from_be_bytes([high, low])) };
        rest = rest.get(segment..).unwrap_or_default();
    }
    rest.windows(2).rev().any(|pair| pair == [0xFF, 0xD9])
}

fn png(encoded: &[u8], image: &mut Image, channels: usize, max_pixels: u64) -> Result<u32, String> {
    let damaged = |error: png::DecodingError| format!("not a whole PNG: {error}");
    let bytes = usize::try_from(max_pixels.saturating_mul(8) + PNG_OVERHEAD).unwrap_or(usize::MAX);
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(encoded), png::Limits { bytes });
    // Palettes and 1, 2, 4 bits become 8; of 16 bits the upper 8 remain.
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    decoder.set_ignore_text_chunk(true);
    let (w, h) = decoder.read_header_info().map_err(damaged)?.size();
    let (w, h) = (w as usize, h as usize);
    check_size(w, h, max_pixels)?;
    let mut reader = decoder.read_info().map_err(damaged)?;
    let stored = reader.output_color_type().0.samples();
    let decoded = reader.next_frame(room(&mut image.spare, h * w * stored)).map_err(damaged)?;
    if (decoded.width as usize, decoded.height as usize) != (w, h) {
        return Err("an animation whose first frame is smaller than the image".into());
    }
    reader.finish().map_err(damaged)?;
    convert(image, Shape::new(h, w, channels), stored);
    Ok(reader.info().exif_metadata.as_deref().map_or(1, orientation))
}

/// Makes the image from the spare buffer, where a pixel has `stored` channels: grey, grey and alpha, RGB, or RGB and alpha.
/// Alpha is left away. Grey is ITU-R BT.601's brightness.
fn convert(image: &mut Image, shape: Shape, stored: usize) {
    let (from, to) = image.reshape_from_spare(shape);
    let from = from.chunks_exact(stored);
    match (stored, shape.c) {
        (1 | 2, 1) => to.iter_mut().zip(from).for_each(|(to, from)| *to = from[0]),
        (1 | 2, _) => to.chunks_exact_mut(3).zip(from).for_each(|(to, from)| to.fill(from[0])),
        (_, 1) => to.iter_mut().zip(from).for_each(|(to, from)| {
            let [r, g, b] = [from[0], from[1], from[2]].map(u32::from);
            *to = ((19_595 * r + 38_470 * g + 7_471 * b + 32_768) >> 16) as u8;
        }),
        _ => to.chunks_exact_mut(3).zip(from).for_each(|(to, from)| to.copy_from_slice(&from[..3])),
    }
}

/// EXIF's orientation, 1 to 8. What is missing, or damaged, or out of range, as cameras write it at times, is 1: upright.
fn orientation(tiff: &[u8]) -> u32 {
    let exif = exif::Reader::new().read_raw(tiff.to_vec()).ok();
    let field = exif.as_ref().and_then(|exif| exif.get_field(exif::Tag::Orientation, exif::In::PRIMARY));
    field.and_then(|field| field.value.get_uint(0)).filter(|value| (1..=8).contains(value)).unwrap_or(1)
}

/// Turns and mirrors the image as EXIF's orientation asks. With that, 5 to 8 exchange width and height.
fn turn_upright(image: &mut Image, orientation: u32) {
    if orientation == 1 {
        return;
    }
    let Shape { h, w, c } = image.shape();
    let turned = if orientation < 5 { Shape::new(h, w, c) } else { Shape::new(w, h, c) };
    image.move_to_spare();
    let (from, to) = image.reshape_from_spare(turned);
    for (number, pixel) in to.chunks_exact_mut(c).enumerate() {
        let (y, x) = (number / turned.w, number % turned.w);
        let (from_y, from_x) = match orientation {
            2 => (y, w - 1 - x),
            3 => (h - 1 - y, w - 1 - x),
            4 => (h - 1 - y, x),
            5 => (x, y),
            6 => (h - 1 - x, y),
            7 => (h - 1 - x, w - 1 - y),
            _ => (x, w - 1 - y),
        };
        pixel.copy_from_slice(&from[(from_y * w + from_x) * c..][..c]);
    }
}

#[cfg(test)]
mod tests;
