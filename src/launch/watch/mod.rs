//! Ranks watch each other. A thread a rank sends heartbeats over a star of its own; rank 0 hears all of them and tells
//! the others who is gone and who is late.
//!
//! - A link that ends without a word means that its rank is dead: the kernel closes it, whatever killed the process, so
//!   this takes no time-out. Rank 0 tells everybody, and each rank stops within a second: its waits end at once
//!   (`Health::wait`), and if the main thread does not (a long kernel, a blocked disk), the watch ends the process.
//! - A rank that ends says so: in order, or for what reason, and the peers give that reason.
//! - A network that is cut closes nothing. The kernel knows that it gets no acknowledgements any more (`reach`): for the
//!   star, over which heartbeats always go, and for the transports' connections, whose other ends rank 0 may still reach.
//! - A rank that is silent (stopped, overloaded), late, or slower than the others is named in a warning. Only the time-out
//!   of a wait makes it an error.
//!
//! Cost: 56 bytes to rank 0 and 56 back and a system call a connection, five times a second; the thread sleeps in between
//! and allocates nothing.

mod health;
mod pace;
mod reach;
mod table;
mod wire;

pub use health::{Health, Phase};
pub use reach::round_trip;

use super::lifeline;
use super::rendezvous::Control;
use crate::error::{Context, Error, Kind, Result};
use health::Beat;
use reach::Reach;
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use signal_hook::low_level;
use std::fmt::{self, Display, Formatter};
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use table::Table;
use wire::{Message, Stream};

const HEARTBEAT: Duration = Duration::from_millis(200);
/// How long the main thread has, after a failure, to end by itself.
const GRACE: Duration = Duration::from_millis(500);
/// The same once it has said that it is ending: time to write why. Less than the launcher's patience.
const LAST_WORDS: Duration = Duration::from_secs(4);
/// More than this between two rounds: this process did not run itself.
const OWN_GAP: Duration = Duration::from_secs(1);
/// A rank that still waits so long after a peer has ended in order waits for something that will not come.
const FAREWELL: Duration = Duration::from_secs(2);

/// This rank's watch thread.
pub struct Watch {
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

/// How the main thread tells the watch that it ends.
struct Shared {
    /// In order, or the reason.
    outcome: OnceLock<Option<String>>,
    wake: OwnedFd,
}

impl Watch {
    /// Collective: all ranks call it. From here on the loss of a peer ends the waits of `health`.
    pub fn start(mut control: Control, health: Arc<Health>) -> Result<Watch> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC).or_kind(Kind::Internal, "waking the watch")?;
        let shared = Arc::new(Shared { outcome: OnceLock::new(), wake });
        if control.size() == 1 {
            return Ok(Watch { thread: None, shared });
        }
        let identity = format!("{} {}", std::process::id(), rustix::system::uname().nodename().to_string_lossy());
        let identities = control.all_gather(identity.as_bytes())?.into_iter().map(|bytes| {
            let text = String::from_utf8_lossy(&bytes);
            let (pid, host) = text.split_once(' ').unwrap_or_default();
            (pid.parse().unwrap_or(0), host.to_string())
        });
        let table = Table::new(control.rank(), identities.collect(), health.beat(), Instant::now());
        *health.peers() = Some(table);
        let watcher = Watcher::new(control, health, shared.clone())?;
        let thread = std::thread::Builder::new().name("watch".into()).spawn(move || watcher.run());
        Ok(Watch { thread: Some(thread.or_kind(Kind::Internal, "starting the watch thread")?), shared })
    }

    /// The last thing a rank does: tells the peers that it ends in order, or why not. Without this, they call it lost.
    pub fn finish<T>(self, result: &Result<T>) {
        let reason = result.as_ref().err().filter(|error| error.kind() != Kind::Stopped).map(Error::to_string);
        let _ = self.shared.outcome.set(reason);
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread {
            let _ = thread.join();
        }
    }
}

/// What this rank is doing, put into words only for who prints it: a heartbeat allocates nothing.
struct Activity<'a>(&'a Health);

impl Display for Activity<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.activity())
    }
}

/// What the thread holds.
struct Watcher {
    me: usize,
    health: Arc<Health>,
    shared: Arc<Shared>,
    /// Open links: on rank 0 to every other rank, else to rank 0.
    streams: Vec<Stream>,
    epoll: OwnedFd,
    /// When a failure was first seen.
    failed: Option<Instant>,
}

impl Watcher {
    fn new(control: Control, health: Arc<Health>, shared: Arc<Shared>) -> Result<Watcher> {
        let me = control.rank();
        let streams: Vec<Stream> = control.into_links().into_iter().map(Stream::new).collect();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).or_kind(Kind::Internal, "watching links")?;
        let nothing = epoll::EventData::new_u64(0);
        epoll::add(&epoll, &shared.wake, nothing, epoll::EventFlags::IN).or_kind(Kind::Internal, "watching links")?;
        for stream in &streams {
            // `reach` judges better. Refused by a Unix socket, which is never cut.
            let _ = stream.link.socket.set_tcp_user_timeout(None);
            epoll::add(&epoll, &stream.link.socket, nothing, epoll::EventFlags::IN)
                .or_kind(Kind::Internal, "watching links")?;
        }
        Ok(Watcher { me, health, shared, streams, epoll, failed: None })
    }

    fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        let mut next_beat = Instant::now();
        let mut last_round = next_beat;
        loop {
            self.receive();
            let now = Instant::now();
            if now - last_round > OWN_GAP {
                self.forgive(now);
            }
            last_round = now;
            if now >= next_beat {
                self.beat(now);
                self.look_for_cuts(now);
                next_beat = now + HEARTBEAT;
            }
            if let Some(reason) = self.shared.outcome.get() {
                self.tell(&Message::Ended { rank: self.me, reason: reason.clone() });
                return;
            }
            self.enforce(now);
            events.clear();
            let left = next_beat.saturating_duration_since(now);
            let timeout = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
            // An error (a signal) is as good as an event.
            let _ = epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&timeout));
        }
    }

    /// This process did not run for a while: that nobody was heard means nothing.
    fn forgive(&mut self, now: Instant) {
        if let Some(table) = self.health.peers().as_mut() {
            table.forgive(now);
        }
        self.streams.iter_mut().for_each(|stream| stream.reach = Reach::default());
        self.health.lines().iter_mut().for_each(|line| line.reach = Reach::default());
    }

    /// Takes what has come on all links; a link at its end is dropped.
    fn receive(&mut self) {
        let mut index = 0;
        while index < self.streams.len() {
            match self.streams[index].receive() {
                Ok(Some(message)) => self.hear(self.streams[index].link.peer, message),
                Ok(None) => index += 1,
                Err(_) => {
                    let rank = self.drop_link(index);
                    self.link_ended(rank);
                }
            }
        }
    }

    /// The rank to which the link led.
    fn drop_link(&mut self, index: usize) -> usize {
        let stream = self.streams.swap_remove(index);
        let _ = epoll::delete(&self.epoll, &stream.link.socket);
        stream.link.peer
    }

    fn hear(&mut self, from: usize, message: Message) {
        if self.health.is_cut_off() {
            return;
        }
        let now = Instant::now();
        match message {
            Message::Beat(beat) => {
                let mut peers = self.health.peers();
                let Some(table) = peers.as_mut() else { return };
                if let Some(silent) = table.heard(from, beat, now) {
                    tracing::warn!("{} goes on after {:.1} s", table.name(from), silent.as_secs_f64());
                }
            }
            Message::Late { rank, beat, silent } => {
                if let Some(table) = self.health.peers().as_mut() {
                    table.told_late(rank, beat, silent, now);
                }
            }
            Message::Lost { rank, beat, silent } => self.lost(rank, beat, silent),
            Message::Cut { rank } => self.fail(|table| table.cut_off(rank, 0)),
            Message::Saved { checkpoint } => self.health.saved(checkpoint),
            Message::Ended { rank, reason } => {
                if let Some(table) = self.health.peers().as_mut()
                    && let Some(peer) = table.peer(rank)
                {
                    peer.ended = Some(now);
                }
                if let Some(reason) = &reason {
                    self.fail(|table| format!("{} stopped: {reason}", table.name(rank)));
                }
                if self.me == 0 {
                    self.tell(&Message::Ended { rank, reason });
                }
            }
        }
    }

    /// The end of a link is the death of its rank, unless that has said that it ends.
    fn link_ended(&mut self, rank: usize) {
        let Some((beat, silent)) = self.note_end(rank, Instant::now()) else { return };
        if self.me == 0 {
            self.tell(&Message::Lost { rank, beat, silent });
        }
        self.lost(rank, beat, silent);
    }

    fn lost(&self, rank: usize, beat: Beat, silent: Duration) {
        let step = self.health.beat().step;
        self.fail(|table| table.lost(rank, beat, silent, step));
    }

    /// What was last heard of a rank that has just ended; `None` if that was known.
    fn note_end(&self, rank: usize, now: Instant) -> Option<(Beat, Duration)> {
        let mut peers = self.health.peers();
        let peer = peers.as_mut()?.peer(rank).filter(|peer| peer.ended.is_none())?;
        peer.ended = Some(now);
        Some((peer.beat, peer.silence(now)))
    }

    /// The network may be cut between any two ranks: on a link of the star, or on a connection of the transport.
    fn look_for_cuts(&mut self, now: Instant) {
        let link = self.streams.iter_mut().position(|Stream { link, reach, .. }| reach.is_cut(&link.socket, now));
        let cut = link.map(|index| self.drop_link(index));
        let cut = cut.or_else(|| self.health.lines().iter_mut().find_map(|line| line.is_cut(now).then_some(line.peer)));
        if let Some(rank) = cut
            && self.note_end(rank, now).is_some()
        {
            if self.me == 0 {
                self.tell(&Message::Cut { rank });
            }
            self.fail(|table| table.cut_off(rank, self.me));
        }
    }

    /// Ends this rank's waits, with what it did and where the run can go on.
    fn fail(&self, what: impl FnOnce(&Table) -> String) {
        let what = self.health.peers().as_ref().map(what).unwrap_or_default();
        let (me, activity) = (self.me, self.health.activity());
        // A peer's reason may have said it.
        let hint = Some(self.health.hint()).filter(|hint| !what.contains(hint)).unwrap_or_default();
        self.health.fail(Error::peer_lost(format!("{what}; rank {me} was {activity}{hint}")));
    }

    fn tell(&mut self, message: &Message) {
        if self.health.is_cut_off() {
            return;
        }
        self.streams.iter_mut().for_each(|stream| stream.send(message));
    }

    /// Five times a second: says that this rank is well, and looks who is not.
    fn beat(&mut self, now: Instant) {
        let beat = self.health.beat();
        self.tell(&Message::Beat(beat));
        if self.me == 0
            && let Some(checkpoint) = self.health.news()
        {
            self.tell(&Message::Saved { checkpoint });
        }
        let health = self.health.clone();
        let mut peers = health.peers();
        let Some(table) = peers.as_mut() else { return };
        table.heard(self.me, beat, now);
        table.note_late(now);
        if self.me == 0 {
            for (rank, peer) in table.late_ranks(now) {
                self.tell(&Message::Late { rank, beat: peer.beat, silent: peer.silence(now) });
            }
        }
        if health.failure().is_none()
            && let Some(warning) = table.warning(now, Activity(&health), health.timeout())
        {
            tracing::warn!("{warning}");
        }
        let gone = if beat.waited > FAREWELL { table.gone(FAREWELL, now) } else { None };
        drop(peers);
        if let Some(gone) = gone {
            self.fail(|_| gone);
        }
    }

    /// After a failure the main thread has a moment to end by itself; then the process ends here, whatever it is at.
    fn enforce(&mut self, now: Instant) {
        let Some(failure) = self.health.failure() else { return };
        let grace = if self.health.is_ending() { LAST_WORDS } else { GRACE };
        if now - *self.failed.get_or_insert(now) > grace {
            self.tell(&Message::Ended { rank: self.me, reason: Some(failure.to_string()) });
            lifeline::report(&failure);
            low_level::exit(failure.exit_code().into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until(what: &str, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ranks that are threads of this process; `start` is what each does with its end of the star.
    fn ranks<T: Send>(size: usize, start: impl Fn(usize, Control) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let start = &start;
            let controls = Control::local(size).unwrap().into_iter().enumerate();
            let threads: Vec<_> = controls.map(|(rank, control)| scope.spawn(move || start(rank, control))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn a_checkpoint_and_the_reason_of_an_end_are_told_to_the_others() {
        let healths = [0, 1].map(|_| Health::new(Duration::from_secs(60)));
        let watches = ranks(2, |rank, control| Watch::start(control, healths[rank].clone()).unwrap());
        let [first, second] = <[Watch; 2]>::try_from(watches).ok().unwrap();
        healths[0].saved("runs/x/step-30");
        until("the checkpoint", || healths[1].hint().contains("runs/x/step-30"));

        healths[0].set(40, Phase::Backward);
        second.finish::<()>(&Err(Error::data("train.idx is cut off")));
        until("the reason", || healths[0].failure().is_some());
        first.finish(&Ok(()));
        let failure = healths[0].check().unwrap_err();
        assert_eq!(failure.kind(), Kind::PeerLost);
        let text = failure.to_string();
        assert!(text.starts_with(&format!("rank 1 (pid {} on host ", std::process::id())), "{text}");
        let end = ") stopped: train.idx is cut off; rank 0 was in backward of step 40. Last checkpoint: runs/x/step-30";
        assert!(text.ends_with(end), "{text}");
    }

    #[test]
    fn a_death_is_told_to_those_who_have_no_link_to_the_dead() {
        let healths = [0, 1].map(|_| Health::new(Duration::from_secs(60)));
        let watches = ranks(3, |rank, mut control| match healths.get(rank) {
            Some(health) => Some(Watch::start(control, health.clone()).unwrap()),
            // Dies as soon as it has said who it is.
            None => control.all_gather(b"4711 far").map(|_| None).unwrap(),
        });
        until("the death", || healths[1].failure().is_some());
        watches.into_iter().flatten().for_each(|watch| watch.finish(&Ok(())));
        let text = healths[1].check().unwrap_err().to_string();
        assert_eq!(
            text,
            "rank 2 (pid 4711 on host far) was lost in step 0 while in start; rank 1 was in start of step 0"
        );
    }
}
