//! The framing of a TFRecord file (<https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details>).
//! A file is records one behind the other, nothing else; all numbers are little-endian:
//!
//! ```text
//! length u64 | masked CRC32C of the length u32 | data, `length` bytes | masked CRC32C of the data u32
//! ```
//!
//! A CRC is masked, rotated and shifted by a constant, because the CRC of a string that contains its own CRC is
//! problematic, and records may be kept inside records.

use std::io::{self, Read};

/// Bytes in front of a record's data.
pub const HEADER: usize = 12;
/// Bytes behind it.
pub const FOOTER: usize = 4;
/// Bytes that the framing adds to a record's data.
pub const OVERHEAD: u64 = (HEADER + FOOTER) as u64;

/// What stands before and behind `data`.
pub fn frame(data: &[u8]) -> ([u8; HEADER], [u8; FOOTER]) {
    let mut header = [0; HEADER];
    let length = (data.len() as u64).to_le_bytes();
    header[..8].copy_from_slice(&length);
    header[8..].copy_from_slice(&masked_crc(&length).to_le_bytes());
    (header, masked_crc(data).to_le_bytes())
}

/// The data of a whole framed record, checked. An error says what is wrong with it.
pub fn unframe(record: &[u8]) -> Result<&[u8], String> {
    let whole = record.split_first_chunk::<HEADER>().and_then(|(header, rest)| {
        let (data, footer) = rest.split_last_chunk::<FOOTER>()?;
        Some((header, data, footer))
    });
    let Some((header, data, footer)) = whole else {
        return Err(format!("{} bytes are no record", record.len()));
    };
    let length = data_length(header)?;
    if length != data.len() as u64 {
        return Err(format!("its header says {length} bytes of data, its index {}", data.len()));
    }
    check_data(data, footer)?;
    Ok(data)
}

/// Goes through a file from its beginning to its end.
pub struct Scanner<R> {
    reader: R,
    /// Bytes of the file that are still ahead.
    left: u64,
    data: Vec<u8>,
}

impl<R: Read> Scanner<R> {
    /// `size`: bytes of the file. No record is believed to be longer than what is left of them.
    pub fn new(reader: R, size: u64) -> Scanner<R> {
        Scanner { reader, left: size, data: Vec::new() }
    }

    /// The data of the next record, checked; none at the end. An error says what is wrong with the record.
    pub fn next(&mut self) -> Result<Option<&[u8]>, String> {
        if self.left == 0 {
            return Ok(None);
        }
        if self.left < OVERHEAD {
            return Err(format!(
                "truncated: {} bytes are left in the file, a record has at least {OVERHEAD}",
                self.left
            ));
        }
        let mut header = [0; HEADER];
        self.read(|reader| reader.read_exact(&mut header))?;
        let length = data_length(&header)?;
        self.left -= OVERHEAD;
        if length > self.left {
            let left = self.left;
            return Err(format!("truncated: its header says {length} bytes of data, the file has {left} more"));
        }
        self.left -= length;
        let mut data = std::mem::take(&mut self.data);
        data.resize(length as usize, 0);
        self.read(|reader| reader.read_exact(&mut data))?;
        self.data = data;
        let mut footer = [0; FOOTER];
        self.read(|reader| reader.read_exact(&mut footer))?;
        check_data(&self.data, &footer)?;
        Ok(Some(&self.data))
    }

    fn read(&mut self, read: impl FnOnce(&mut R) -> io::Result<()>) -> Result<(), String> {
        read(&mut self.reader).map_err(|error| format!("reading it: {error}"))
    }
}

fn data_length(header: &[u8; HEADER]) -> Result<u64, String> {
    let (length, crc) = header.split_first_chunk::<8>().expect("a header is longer than its first field");
    let (stored, computed) = (u32::from_le_bytes([crc[0], crc[1], crc[2], crc[3]]), masked_crc(length));
    if stored != computed {
        return Err(format!("the CRC of its length is {stored:#010x}, but {computed:#010x} would be right: {DAMAGED}"));
    }
    Ok(u64::from_le_bytes(*length))
}

fn check_data(data: &[u8], footer: &[u8; FOOTER]) -> Result<(), String> {
    let (stored, computed) = (u32::from_le_bytes(*footer), masked_crc(data));
    match stored == computed {
        true => Ok(()),
        false => Err(format!("the CRC of its data is {stored:#010x}, but {computed:#010x} would be right: {DAMAGED}")),
    }
}

const DAMAGED: &str = "the file is damaged, or no TFRecord file";

fn masked_crc(bytes: &[u8]) -> u32 {
    const DELTA: u32 = 0xa282_ead8;
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(DELTA)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(data: &[u8]) -> Vec<u8> {
        let (header, footer) = frame(data);
        [&header[..], data, &footer].concat()
    }

    /// All records of a file, or what is wrong with the first bad one and how many came before it.
    fn scan(file: &[u8]) -> Result<Vec<Vec<u8>>, (usize, String)> {
        let mut scanner = Scanner::new(file, file.len() as u64);
        let mut found = Vec::new();
        loop {
            match scanner.next() {
                Ok(Some(data)) => found.push(data.to_vec()),
                Ok(None) => return Ok(found),
                Err(error) => return Err((found.len(), error)),
            }
        }
    }

    /// The bytes of a record that TensorFlow's writer makes of "abc" (and of nothing), from its published layout and a CRC
    /// computed bit by bit.
    #[test]
    fn a_frame_is_length_masked_crc_data_masked_crc() {
        let plain_crc = |bytes: &[u8]| {
            let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            !bytes.iter().fold(!0u32, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc)))
        };
        assert_eq!(plain_crc(b"123456789"), 0xe306_9283, "the check value of CRC-32C");
        for data in [&b"abc"[..], b""] {
            let mask = |crc: u32| crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
            let length = (data.len() as u64).to_le_bytes();
            let expected = [&length[..], &mask(plain_crc(&length)), data, &mask(plain_crc(data))].concat();
            assert_eq!(framed(data), expected);
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let records = [&b"first"[..], b"", b"the third record"];
        let file = records.map(framed).concat();
        assert_eq!(scan(&file).unwrap(), records);
        assert_eq!(unframe(&framed(b"first")), Ok(&b"first"[..]));
        for bit in 0..8 * file.len() {
            let mut flipped = file.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let (before, error) = scan(&flipped).expect_err("a flipped bit");
            let record = [21, 37, file.len()].iter().position(|&end| bit / 8 < end).unwrap();
            assert!(before == record && error.contains("CRC"), "bit {bit}, after {before} records: {error}");
        }
        for length in (0..file.len()).filter(|length| ![0, 21, 37].contains(length)) {
            assert!(scan(&file[..length]).unwrap_err().1.contains("truncated"), "cut to {length}");
        }
        for length in 0..21 {
            assert!(unframe(&framed(b"first")[..length]).is_err(), "cut to {length}");
        }
        let longer = [&framed(b"first")[..], b"more"].concat();
        assert_eq!(unframe(&longer).unwrap_err(), "its header says 5 bytes of data, its index 9");
    }

    /// A length with a right CRC that no file holds: refused before anything of that size is made.
    #[test]
    fn an_absurd_length_is_refused() {
        let length = u64::MAX.to_le_bytes();
        let file = [&length[..], &masked_crc(&length).to_le_bytes(), &[0; 100]].concat();
        let (_, error) = scan(&file).unwrap_err();
        assert_eq!(error, "truncated: its header says 18446744073709551615 bytes of data, the file has 96 more");
    }
}
