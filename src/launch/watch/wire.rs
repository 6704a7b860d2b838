//! What goes over the links of the watch: seven u64 (little-endian), then for some messages a text. Nothing
//! here blocks, and heartbeats allocate nothing: a stopped peer's socket fills up, and its heartbeats are then left out.

use super::health::{Beat, Phase};
use super::reach::Reach;
use crate::launch::link::Link;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The sender is well.
    Beat(Beat),
    /// Rank 0 tells: the others wait for `rank`, of which it last heard `silent` ago.
    Late { rank: usize, beat: Beat, silent: Duration },
    /// Rank 0 tells: `rank` is gone without a word.
    Lost { rank: usize, beat: Beat, silent: Duration },
    /// Rank 0 tells: the network carries nothing more to `rank`.
    Cut { rank: usize },
    /// Rank 0 tells where the run could go on from.
    Saved { checkpoint: String },
    /// `rank` has ended: in order, or for a reason. From that rank to rank 0, from rank 0 to all.
    Ended { rank: usize, reason: Option<String> },
}

const NUMBERS: usize = 7;
const HEADER: usize = NUMBERS * 8;
/// Texts are cut to this many bytes.
const MAX_TEXT: usize = 2048;

impl Message {
    fn encode(&self, out: &mut Vec<u8>) {
        let state = |kind, rank: usize, beat: &Beat, silent: Duration| {
            let [waited, waiting, silent] = [beat.waited, beat.waiting, silent].map(|time| time.as_micros() as u64);
            [kind, rank as u64, beat.step, beat.phase as u64, waited, waiting, silent]
        };
        let (numbers, text) = match self {
            Message::Beat(beat) => (state(1, 0, beat, Duration::ZERO), &[][..]),
            Message::Late { rank, beat, silent } => (state(2, *rank, beat, *silent), &[][..]),
            Message::Lost { rank, beat, silent } => (state(3, *rank, beat, *silent), &[][..]),
            Message::Cut { rank } => ([6, *rank as u64, 0, 0, 0, 0, 0], &[][..]),
            Message::Ended { rank, reason } => {
                let text = cut(reason.as_deref().unwrap_or_default());
                ([4, *rank as u64, reason.is_some().into(), text.len() as u64, 0, 0, 0], text)
            }
            Message::Saved { checkpoint } => ([5, 0, 1, cut(checkpoint).len() as u64, 0, 0, 0], cut(checkpoint)),
        };
        numbers.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
        out.extend_from_slice(text);
    }

    /// The first message of `bytes` and its length; `None`: not all of it is here. An error is not a message at all.
    fn decode(bytes: &[u8]) -> Result<Option<(Message, usize)>, Errno> {
        let Some(header) = bytes.get(..HEADER) else { return Ok(None) };
        let mut numbers = [0; NUMBERS];
        for (number, bytes) in numbers.iter_mut().zip(header.as_chunks::<8>().0) {
            *number = u64::from_le_bytes(*bytes);
        }
        let [kind, rank, a, b, waited, waiting, silent] = numbers;
        let rank = usize::try_from(rank).map_err(|_| Errno::BADMSG)?;
        if kind == 4 || kind == 5 {
            let end = usize::try_from(b).ok().filter(|length| *length <= MAX_TEXT).ok_or(Errno::BADMSG)? + HEADER;
            let Some(text) = bytes.get(HEADER..end) else { return Ok(None) };
            let text = (a == 1).then(|| String::from_utf8_lossy(text).into_owned());
            let message = match kind {
                4 => Message::Ended { rank, reason: text },
                _ => Message::Saved { checkpoint: text.unwrap_or_default() },
            };
            return Ok(Some((message, end)));
        }
        let phase = Phase::from_number(b).ok_or(Errno::BADMSG)?;
        let [waited, waiting, silent] = [waited, waiting, silent].map(Duration::from_micros);
        let beat = Beat { step: a, phase, waited, waiting };
        let message = match kind {
            1 => Message::Beat(beat),
            2 => Message::Late { rank, beat, silent },
            3 => Message::Lost { rank, beat, silent },
            6 => Message::Cut { rank },
            _ => return Err(Errno::BADMSG),
        };
        Ok(Some((message, HEADER)))
    }
}

fn cut(text: &str) -> &[u8] {
    &text.as_bytes()[..text.len().min(MAX_TEXT)]
}

/// A link with what has come in part and what could not be sent yet.
pub struct Stream {
    pub link: Link,
    pub reach: Reach,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
}

impl Stream {
    pub fn new(link: Link) -> Stream {
        let space = || Vec::with_capacity(HEADER + MAX_TEXT);
        Stream { link, reach: Reach::default(), inbox: space(), outbox: space() }
    }

    /// Sends what the socket takes now, and the rest with the next message. Heartbeats do not queue up. A link that is
    /// broken is noticed where it is read.
    pub fn send(&mut self, message: &Message) {
        if self.outbox.is_empty() || !matches!(message, Message::Beat(_) | Message::Late { .. }) {
            message.encode(&mut self.outbox);
        }
        while !self.outbox.is_empty() {
            match rustix::net::send(&self.link.socket, &self.outbox, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(sent) => drop(self.outbox.drain(..sent)),
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// The next message that is here; `None`: no more for now. An error: the link is at its end.
    pub fn receive(&mut self) -> Result<Option<Message>, Errno> {
        loop {
            if let Some((message, length)) = Message::decode(&self.inbox)? {
                self.inbox.drain(..length);
                return Ok(Some(message));
            }
            let start = self.inbox.len();
            self.inbox.resize(HEADER + MAX_TEXT, 0);
            let received = rustix::net::recv(&self.link.socket, &mut self.inbox[start..], RecvFlags::DONTWAIT);
            self.inbox.truncate(start + received.as_ref().map_or(0, |(_, count)| *count));
            match received {
                Ok((_, 0)) => return Err(Errno::CONNRESET),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::link;

    fn messages() -> Vec<Message> {
        let (waited, waiting) = (Duration::from_millis(1234), Duration::from_micros(56_789));
        let beat = Beat { step: 40, phase: Phase::AllReduce, waited, waiting };
        let silent = Duration::from_secs(3);
        vec![
            Message::Beat(beat),
            Message::Late { rank: 3, beat, silent },
            Message::Lost { rank: 7, beat: Beat { phase: Phase::Finish, ..beat }, silent },
            Message::Cut { rank: 5 },
            Message::Ended { rank: 1, reason: Some("train.idx: no such file – ü".into()) },
            Message::Ended { rank: 2, reason: None },
            Message::Saved { checkpoint: "runs/x/step-30".into() },
        ]
    }

    #[test]
    fn messages_survive_any_cut_of_the_stream() {
        let mut bytes = Vec::new();
        messages().iter().for_each(|message| message.encode(&mut bytes));
        for cut in 0..bytes.len() {
            let (a, b) = link::pair().unwrap();
            let mut receiver = Stream::new(Link::new(1, b));
            let sender = Link::new(0, a);
            let mut seen = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                rustix::net::send(&sender.socket, part, SendFlags::NOSIGNAL).unwrap();
                while let Some(message) = receiver.receive().unwrap() {
                    seen.push(message);
                }
            }
            assert_eq!(seen, messages(), "cut at {cut}");
            drop(sender);
            assert_eq!(receiver.receive(), Err(Errno::CONNRESET));
        }
    }

    #[test]
    fn noise_is_refused_and_long_reasons_are_cut() {
        assert_eq!(Message::decode(&[0xff; HEADER]), Err(Errno::BADMSG));
        let long = Message::Ended { rank: 0, reason: Some("ü".repeat(4000)) };
        let mut bytes = Vec::new();
        long.encode(&mut bytes);
        let (message, length) = Message::decode(&bytes).unwrap().unwrap();
        assert_eq!(length, bytes.len());
        assert_eq!(message, Message::Ended { rank: 0, reason: Some("ü".repeat(MAX_TEXT / 2)) });
    }

    #[test]
    fn a_stopped_peer_does_not_block_the_sender_and_still_gets_the_reason() {
        let (a, b) = link::pair().unwrap();
        let (mut sender, mut receiver) = (Stream::new(Link::new(1, a)), Stream::new(Link::new(0, b)));
        let beat = messages().remove(0);
        for _ in 0..100_000 {
            sender.send(&beat);
        }
        let ended = Message::Ended { rank: 0, reason: Some("out of memory".into()) };
        sender.send(&ended);
        let mut last = None;
        for _ in 0..10 {
            while let Some(message) = receiver.receive().unwrap() {
                last = Some(message);
            }
            sender.send(&beat);
            if last.as_ref() == Some(&ended) {
                return;
            }
        }
        panic!("the last message was {last:?}");
    }
}
