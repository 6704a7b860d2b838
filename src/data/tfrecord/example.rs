//! `tf.train.Example`, the message inside a record: a map from names to lists of bytes, floats or integers.
//!
//! ```text
//! Example  { features: Features = 1 }
//! Features { feature: map<string, Feature> = 1 }
//! Feature  { oneof: BytesList = 1 | FloatList = 2 | Int64List = 3 }      each a `repeated value = 1`
//! ```
//!
//! (<https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/feature.proto>). Records are written
//! through prost's structs. Reading wants one feature of each record, many thousand times a second: `bytes` and `integer`
//! walk the message with prost's primitives and borrow from it, so nothing is allocated, whatever a damaged message says.

use prost::bytes::Buf;
use prost::encoding::{self, DecodeContext, WireType};
use prost::{Message, Oneof};
use std::collections::BTreeMap;
use std::fmt;

#[derive(Clone, PartialEq, Message)]
pub struct Example {
    #[prost(message, optional, tag = "1")]
    pub features: Option<Features>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Features {
    #[prost(btree_map = "string, message", tag = "1")]
    pub feature: BTreeMap<String, Feature>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Feature {
    #[prost(oneof = "Kind", tags = "1, 2, 3")]
    pub kind: Option<Kind>,
}

#[derive(Clone, PartialEq, Oneof)]
pub enum Kind {
    #[prost(message, tag = "1")]
    Bytes(BytesList),
    #[prost(message, tag = "2")]
    Float(FloatList),
    #[prost(message, tag = "3")]
    Int64(Int64List),
}

#[derive(Clone, PartialEq, Message)]
pub struct BytesList {
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub value: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub struct FloatList {
    #[prost(float, repeated, tag = "1")]
    pub value: Vec<f32>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Int64List {
    #[prost(int64, repeated, tag = "1")]
    pub value: Vec<i64>,
}

impl Example {
    pub fn new(features: impl IntoIterator<Item = (&'static str, Kind)>) -> Example {
        let feature = |(name, kind): (&str, Kind)| (name.to_owned(), Feature { kind: Some(kind) });
        Example { features: Some(Features { feature: features.into_iter().map(feature).collect() }) }
    }
}

impl Kind {
    pub fn bytes(value: impl Into<Vec<u8>>) -> Kind {
        Kind::Bytes(BytesList { value: vec![value.into()] })
    }
    pub fn integer(value: i64) -> Kind {
        Kind::Int64(Int64List { value: vec![value] })
    }
}

/// The one string of bytes that the feature `name` of an encoded `Example` holds, borrowed from it. An error says what
/// else is there.
pub fn bytes<'a>(example: &'a [u8], name: &str) -> Result<&'a [u8], String> {
    let mut values = Values::default();
    walk(list(example, name, BYTES)?, |field| {
        if let (1, Value::Bytes(value)) = field {
            values.push(value);
        }
        Ok(())
    })?;
    values.only(name)
}

/// The one integer that the feature `name` of an encoded `Example` holds.
pub fn integer(example: &[u8], name: &str) -> Result<i64, String> {
    let mut values = Values::default();
    walk(list(example, name, INT64)?, |field| {
        match field {
            (1, Value::Varint(value)) => values.push(value as i64),
            // Writers pack repeated integers into one string of bytes.
            (1, Value::Bytes(mut packed)) => {
                while packed.has_remaining() {
                    values.push(encoding::decode_varint(&mut packed).map_err(malformed)? as i64);
                }
            }
            _ => {}
        }
        Ok(())
    })?;
    values.only(name)
}

/// Counts the values of a list and keeps the last.
struct Values<T> {
    count: usize,
    last: Option<T>,
}

impl<T> Default for Values<T> {
    fn default() -> Self {
        Values { count: 0, last: None }
    }
}

impl<T> Values<T> {
    fn push(&mut self, value: T) {
        self.count += 1;
        self.last = Some(value);
    }

    fn only(self, name: &str) -> Result<T, String> {
        match self {
            Values { count: 1, last: Some(value) } => Ok(value),
            Values { count, .. } => Err(format!("its feature `{name}` holds {count} values, one is needed")),
        }
    }
}

// Tags of `Feature`'s kinds.
const BYTES: u32 = 1;
const INT64: u32 = 3;

fn kind_name(tag: u32) -> &'static str {
    match tag {
        BYTES => "bytes",
        INT64 => "integers",
        _ => "floats",
    }
}

/// The encoded list in the feature `name`, which must be of this kind.
fn list<'a>(example: &'a [u8], name: &str, kind: u32) -> Result<&'a [u8], String> {
    let mut found = None;
    each_feature(example, |key, feature| {
        // As everywhere in protocol buffers, the last one of several counts.
        if key == name.as_bytes() {
            found = Some(feature);
        }
    })?;
    let feature = found.ok_or_else(|| format!("it has no feature `{name}`; it has {}", names(example)))?;
    let mut found = None;
    walk(feature, |field| {
        if let (tag @ 1..=3, Value::Bytes(list)) = field {
            found = Some((tag, list));
        }
        Ok(())
    })?;
    match found {
        Some((tag, list)) if tag == kind => Ok(list),
        Some((tag, _)) => {
            let (is, needed) = (kind_name(tag), kind_name(kind));
            Err(format!("its feature `{name}` holds {is}, but {needed} are needed there"))
        }
        None => Err(format!("its feature `{name}` is empty")),
    }
}

/// The first few names of features, for messages.
fn names(example: &[u8]) -> String {
    const SHOWN: usize = 8;
    let (mut names, mut count) = (Vec::new(), 0);
    // The caller has walked the message before, and it had no error to tell.
    let _ = each_feature(example, |key, _| {
        count += 1;
        if count <= SHOWN {
            let key: String = String::from_utf8_lossy(&key[..key.len().min(64)]).escape_debug().collect();
            names.push(format!("`{key}`"));
        }
    });
    match count {
        0 => "none".to_owned(),
        1..=SHOWN => names.join(", "),
        more => format!("{} and {} more", names.join(", "), more - SHOWN),
    }
}

/// Calls `take` with the name and the encoded `Feature` of every entry.
fn each_feature<'a>(example: &'a [u8], mut take: impl FnMut(&'a [u8], &'a [u8])) -> Result<(), String> {
    walk(example, |field| {
        let (1, Value::Bytes(features)) = field else { return Ok(()) };
        walk(features, |field| {
            let (1, Value::Bytes(entry)) = field else { return Ok(()) };
            let (mut key, mut feature) = (&[][..], &[][..]);
            walk(entry, |field| {
                match field {
                    (1, Value::Bytes(found)) => key = found,
                    (2, Value::Bytes(found)) => feature = found,
                    _ => {}
                }
                Ok(())
            })?;
            take(key, feature);
            Ok(())
        })
    })
}

/// The value of a field, as far as `Example` has such.
enum Value<'a> {
    Varint(u64),
    /// A string, a message or a packed list.
    Bytes(&'a [u8]),
    /// Of a type that no field that is asked for has.
    Other,
}

/// Calls `take` with the tag and the value of every field of an encoded message.
fn walk<'a>(mut message: &'a [u8], mut take: impl FnMut((u32, Value<'a>)) -> Result<(), String>) -> Result<(), String> {
    while message.has_remaining() {
        let (tag, wire_type) = encoding::decode_key(&mut message).map_err(malformed)?;
        let value = match wire_type {
            WireType::Varint => Value::Varint(encoding::decode_varint(&mut message).map_err(malformed)?),
            WireType::LengthDelimited => {
                let length = encoding::decode_varint(&mut message).map_err(malformed)?;
                let split = usize::try_from(length).ok().and_then(|length| message.split_at_checked(length));
                let (bytes, rest) = split.ok_or_else(|| {
                    malformed(format!("field {tag} is to have {length} bytes, {} are left", message.len()))
                })?;
                message = rest;
                Value::Bytes(bytes)
            }
            other => {
                encoding::skip_field(other, tag, &mut message, DecodeContext::default()).map_err(malformed)?;
                Value::Other
            }
        };
        take((tag, value))?;
    }
    Ok(())
}

fn malformed(why: impl fmt::Display) -> String {
    format!("its data are no tf.train.Example: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Example {
        Example::new([
            ("image/class/label", Kind::integer(-7)),
            ("image/encoded", Kind::bytes(*b"\xff\xd8 bytes")),
            ("two", Kind::Int64(Int64List { value: vec![1, 300] })),
            ("none", Kind::Bytes(BytesList { value: vec![] })),
            ("box", Kind::Float(FloatList { value: vec![0.5] })),
        ])
    }

    #[test]
    fn one_feature_is_found_among_others() {
        let encoded = example().encode_to_vec();
        assert_eq!(bytes(&encoded, "image/encoded").unwrap(), b"\xff\xd8 bytes");
        assert_eq!(integer(&encoded, "image/class/label"), Ok(-7));
        assert_eq!(Example::decode(&encoded[..]).unwrap(), example(), "prost reads it as well");
    }

    #[test]
    fn what_is_missing_or_of_another_kind_is_named() {
        let encoded = example().encode_to_vec();
        for (error, expected) in [
            (integer(&encoded, "label").unwrap_err(), "no feature `label`; it has `box`, `image/class/label`"),
            (integer(&encoded, "image/encoded").unwrap_err(), "`image/encoded` holds bytes, but integers are needed"),
            (bytes(&encoded, "box").unwrap_err(), "`box` holds floats, but bytes are needed"),
            (integer(&encoded, "two").unwrap_err(), "`two` holds 2 values, one is needed"),
            (bytes(&encoded, "none").unwrap_err(), "`none` holds 0 values, one is needed"),
            (bytes(&[], "a").unwrap_err(), "it has no feature `a`; it has none"),
            (bytes(&encoded[..encoded.len() - 1], "a").unwrap_err(), "no tf.train.Example: field 1 is to have"),
        ] {
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    /// Old writers put an integer into a field of its own, `value = 1` with wire type 0, and Google's merge rule lets
    /// a message come in pieces. Of several values for one key, or several kinds in one feature, the last counts.
    #[test]
    fn unpacked_integers_and_unknown_fields_are_read() {
        let int64_list = [1 << 3, 42];
        let feature = [&[3 << 3 | 2, 2][..], &int64_list].concat();
        let entry = [&[1 << 3 | 2, 1, b'k', 2 << 3 | 2, 4][..], &feature].concat();
        let features = [&[1 << 3 | 2, entry.len() as u8][..], &entry, &[9 << 3 | 5, 1, 2, 3, 4]].concat();
        let example = [&[7 << 3, 1, 1 << 3 | 2, features.len() as u8][..], &features].concat();
        assert_eq!(integer(&example, "k"), Ok(42));
        let mut other = example[2..].to_vec();
        *other.iter_mut().find(|byte| **byte == 42).unwrap() = 43;
        assert_eq!(integer(&[&example[..], &other].concat(), "k"), Ok(43));

        let kinds = [&[1 << 3 | 2, 0][..], &feature].concat();
        let entry = [&[1 << 3 | 2, 1, b'k', 2 << 3 | 2, 6][..], &kinds].concat();
        let features = [&[1 << 3 | 2, entry.len() as u8][..], &entry].concat();
        assert_eq!(integer(&[&[1 << 3 | 2, features.len() as u8][..], &features].concat(), "k"), Ok(42));
    }
}
