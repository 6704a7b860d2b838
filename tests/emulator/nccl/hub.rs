//! Where the ranks meet: a thread of the process that made the unique id. Each asks with a frame; when all have, each gets an
//! answer, a code and data. Sums are added in the pairwise tree over ranks in which this program's own transports add.

use crate::{Code, INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR, SUCCESS};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::ops::Add;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::mpsc::channel;
use std::thread;

/// What a rank asks for.
#[derive(Clone, PartialEq)]
pub struct Frame {
    pub kind: Kind,
    /// The type of values to be summed.
    pub what: u32,
    pub data: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Join { rank: u32, size: u32 },
    Sum,
    /// A sum, of which each rank gets its part.
    Scatter,
    Gather,
    Leave,
}

/// Bytes of a value, of ncclUint32, ncclFloat32 and ncclBfloat16.
pub fn width(data_type: u32) -> Option<usize> {
    match data_type {
        UINT32 | FLOAT32 => Some(4),
        BFLOAT16 => Some(2),
        _ => None,
    }
}

const UINT32: u32 = 3;
const FLOAT32: u32 = 7;
const BFLOAT16: u32 = 9;

pub fn ask(mut hub: &UnixStream, frame: &Frame) -> io::Result<(Code, Vec<u8>)> {
    let (kind, rank, size) = match frame.kind {
        Kind::Join { rank, size } => (0, rank, size),
        Kind::Sum => (1, 0, 0),
        Kind::Leave => (2, 0, 0),
        Kind::Scatter => (3, 0, 0),
        Kind::Gather => (4, 0, 0),
    };
    for word in [kind, rank, size, frame.what] {
        hub.write_all(&word.to_le_bytes())?;
    }
    write_data(hub, &frame.data)?;
    let code = read_word(hub)? as Code;
    Ok((code, read_data(hub)?))
}

fn read_frame(hub: &UnixStream) -> io::Result<Frame> {
    let [kind, rank, size, what] = [read_word(hub)?, read_word(hub)?, read_word(hub)?, read_word(hub)?];
    let kind = match kind {
        0 => Kind::Join { rank, size },
        1 => Kind::Sum,
        3 => Kind::Scatter,
        4 => Kind::Gather,
        _ => Kind::Leave,
    };
    Ok(Frame { kind, what, data: read_data(hub)? })
}

fn answer(mut rank: &UnixStream, code: Code, data: &[u8]) {
    // A rank that has gone needs none.
    let _ = rank.write_all(&(code as u32).to_le_bytes()).and_then(|()| write_data(rank, data));
}

fn read_word(mut from: &UnixStream) -> io::Result<u32> {
    let mut word = [0; 4];
    from.read_exact(&mut word).map(|()| u32::from_le_bytes(word))
}

fn read_data(mut from: &UnixStream) -> io::Result<Vec<u8>> {
    let mut data = vec![0; read_word(from)? as usize];
    from.read_exact(&mut data).map(|()| data)
}

fn write_data(mut to: &UnixStream, data: &[u8]) -> io::Result<()> {
    to.write_all(&(data.len() as u32).to_le_bytes())?;
    to.write_all(data)
}

/// Begins to listen.
pub fn open(name: &str) -> io::Result<()> {
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    thread::spawn(move || gather(&listener).map(serve));
    Ok(())
}

/// All ranks, in order, once they have come.
fn gather(listener: &UnixListener) -> io::Result<Vec<UnixStream>> {
    let mut ranks = BTreeMap::new();
    let mut expected = 1;
    while ranks.len() < expected {
        let (stream, _) = listener.accept()?;
        let frame = read_frame(&stream)?;
        let Kind::Join { rank, size } = frame.kind else { continue };
        expected = size as usize;
        ranks.insert(rank, (stream, frame.data));
    }
    let gpus: Vec<&Vec<u8>> = ranks.values().map(|(_, gpu)| gpu).collect();
    let shared = gpus.iter().enumerate().any(|(rank, gpu)| gpus[..rank].contains(gpu));
    if shared {
        eprintln!("emulator: Duplicate GPU detected");
    }
    let streams: Vec<UnixStream> = ranks.into_values().map(|(stream, _)| stream).collect();
    streams.iter().for_each(|rank| answer(rank, if shared { INVALID_USAGE } else { SUCCESS }, &[]));
    Ok(streams)
}

/// Answers until the ranks leave together, or one is lost.
fn serve(ranks: Vec<UnixStream>) {
    let (heard, frames) = channel();
    for (rank, stream) in ranks.iter().enumerate() {
        let (Ok(stream), heard) = (stream.try_clone(), heard.clone()) else { return };
        thread::spawn(move || {
            loop {
                let frame = read_frame(&stream).ok();
                let over = frame.as_ref().is_none_or(|frame| frame.kind == Kind::Leave);
                if heard.send((rank, frame)).is_err() || over {
                    return;
                }
            }
        });
    }
    loop {
        let mut asked: BTreeMap<usize, Frame> = BTreeMap::new();
        while asked.len() < ranks.len() {
            match frames.recv() {
                Ok((rank, Some(frame))) => drop(asked.insert(rank, frame)),
                _ => return ranks.iter().for_each(|rank| answer(rank, REMOTE_ERROR, &[])),
            }
        }
        let asked: Vec<Frame> = asked.into_values().collect();
        let like = |frame: &Frame| (frame.kind, frame.what, frame.data.len());
        if asked.iter().any(|frame| like(frame) != like(&asked[0])) {
            eprintln!("emulator: the ranks ask for {:?}", asked.iter().map(like).collect::<Vec<_>>());
            return ranks.iter().for_each(|rank| answer(rank, INVALID_ARGUMENT, &[]));
        }
        let data = match asked[0].kind {
            Kind::Sum | Kind::Scatter => tree(&asked),
            Kind::Gather => asked.iter().flat_map(|frame| &frame.data).copied().collect(),
            Kind::Join { .. } | Kind::Leave => Vec::new(),
        };
        let part = data.len() / ranks.len();
        for (number, rank) in ranks.iter().enumerate() {
            let of = if asked[0].kind == Kind::Scatter { number * part..(number + 1) * part } else { 0..data.len() };
            answer(rank, SUCCESS, &data[of]);
        }
        if asked[0].kind == Kind::Leave {
            return;
        }
    }
}

/// The pairwise tree: the sum over the first half of the ranks, rounded up, plus that over the others.
fn tree(frames: &[Frame]) -> Vec<u8> {
    let [frame] = frames else {
        let (left, right) = frames.split_at(frames.len().div_ceil(2));
        let (mut sums, terms) = (tree(left), tree(right));
        match frames[0].what {
            UINT32 => add::<4, u32>(&mut sums, &terms, u32::from_le_bytes, u32::to_le_bytes),
            FLOAT32 => add::<4, f32>(&mut sums, &terms, f32::from_le_bytes, f32::to_le_bytes),
            _ => add::<2, f32>(&mut sums, &terms, wide, nearest),
        }
        return sums;
    };
    frame.data.clone()
}

fn add<const N: usize, V: Add<Output = V>>(
    sums: &mut [u8],
    terms: &[u8],
    wide: impl Fn([u8; N]) -> V,
    narrow: impl Fn(V) -> [u8; N],
) {
    for (sum, term) in sums.as_chunks_mut::<N>().0.iter_mut().zip(terms.as_chunks::<N>().0) {
        *sum = narrow(wide(*sum) + wide(*term));
    }
}

fn wide(bf16: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bf16)) << 16)
}

/// To the nearest bf16, to even where two are as near.
fn nearest(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let rounded = match value.is_nan() {
        true => bits | 0x40_0000,
        false => bits + 0x7FFF + (bits >> 16 & 1),
    };
    ((rounded >> 16) as u16).to_le_bytes()
}
