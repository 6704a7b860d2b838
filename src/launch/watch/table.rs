//! What a rank knows of all ranks, and what it says about them. Pure: time is an argument.

use super::health::Beat;
use super::pace::{HeldUp, Pace};
use super::reach::CUT;
use std::fmt::Display;
use std::time::{Duration, Instant};

/// A rank that has not been heard of for this long is stopped, or its machine is gone or overloaded.
pub const SILENT: Duration = Duration::from_secs(3);
/// A rank that lets others wait for this long is worth a line.
pub const LATE: Duration = Duration::from_secs(4);
/// From here on rank 0 tells the others who is late, so that each can name them when its own patience ends.
const NOTED: Duration = Duration::from_secs(1);
/// Names in one message.
const NAMES: usize = 8;

/// All ranks, as rank `me` sees them. Rank 0 hears from every rank; the others from rank 0, which tells them who is late.
pub struct Table {
    me: usize,
    peers: Vec<Peer>,
    /// The wait after which the next warning about late ranks comes. It doubles with each, for the whole run: a net whose
    /// steps are that uneven says so a few times and not every step.
    next_late: Duration,
    pace: Pace,
}

pub struct Peer {
    pid: u32,
    host: String,
    pub beat: Beat,
    pub heard: Instant,
    /// When it was last known to be late.
    noted: Option<Instant>,
    /// When it ended in order.
    pub ended: Option<Instant>,
    /// The silence after which the next warning about it comes; grows fourfold until it is heard of.
    next_silent: Duration,
}

impl Table {
    /// `identities`: pid and host by rank.
    pub fn new(me: usize, identities: Vec<(u32, String)>, beat: Beat, now: Instant) -> Table {
        let peer = |(pid, host)| Peer { pid, host, beat, heard: now, noted: None, ended: None, next_silent: SILENT };
        let pace = Pace::new(identities.len());
        Table { me, peers: identities.into_iter().map(peer).collect(), next_late: LATE, pace }
    }

    pub fn me(&self) -> usize {
        self.me
    }
    pub fn peer(&mut self, rank: usize) -> Option<&mut Peer> {
        self.peers.get_mut(rank)
    }

    /// A heartbeat. Returns how long the rank had been silent, if that was said.
    pub fn heard(&mut self, rank: usize, beat: Beat, now: Instant) -> Option<Duration> {
        let peer = self.peers.get_mut(rank)?;
        let silent = now.duration_since(peer.heard);
        let warned = peer.next_silent > SILENT;
        (peer.beat, peer.heard, peer.next_silent) = (beat, now, SILENT);
        warned.then_some(silent)
    }

    /// What rank 0 tells of a late rank.
    pub fn told_late(&mut self, rank: usize, beat: Beat, silent: Duration, now: Instant) {
        if let Some(peer) = self.peers.get_mut(rank) {
            peer.beat = beat;
            peer.heard = now.checked_sub(silent).unwrap_or(now);
            peer.noted = Some(now);
        }
    }

    /// This process did not run for a while, so nobody could be heard.
    pub fn forgive(&mut self, now: Instant) {
        self.peers.iter_mut().for_each(|peer| peer.heard = now);
        self.pace.forget();
    }

    /// Notes who is late, from heartbeats: whoever is silent, and, while others wait, whoever does not. If all wait, for
    /// different things, then those that are behind, and else all. The other ranks judge rank 0 only.
    pub fn note_late(&mut self, now: Instant) {
        let longest = self.longest_wait();
        let all_wait = self.peers.iter().filter(|peer| peer.ended.is_none()).all(|peer| !peer.beat.waited.is_zero());
        let last = self.peers.iter().map(|peer| peer.beat.step).max().unwrap_or(0);
        let level = self.peers.iter().all(|peer| peer.beat.step == last);
        let judged = if self.me == 0 { self.peers.len() } else { 1 };
        for peer in self.peers[..judged].iter_mut().filter(|peer| peer.ended.is_none()) {
            let waits = !peer.beat.waited.is_zero();
            let behind = !waits || (self.me == 0 && all_wait && (level || peer.beat.step < last));
            if peer.silence(now) >= NOTED || (longest >= NOTED && behind) {
                peer.noted = Some(now);
            }
        }
    }

    /// The ranks noted as late within the last second.
    pub fn late_ranks(&self, now: Instant) -> impl Iterator<Item = (usize, &Peer)> {
        let recent = move |peer: &Peer| peer.noted.is_some_and(|noted| now.duration_since(noted) <= NOTED);
        self.peers
            .iter()
            .enumerate()
            .filter(move |(rank, peer)| *rank != self.me && peer.ended.is_none() && recent(peer))
    }

    /// The late ranks as words for an error; empty if there are none.
    pub fn late(&self, now: Instant) -> String {
        let words = self.late_ranks(now).map(|(rank, peer)| {
            let Beat { step, phase, .. } = peer.beat;
            let heard = peer.silence(now).as_secs_f64();
            format!("{}, last heard of {heard:.1} s ago in {phase} of step {step}", self.name(rank))
        });
        let count = self.late_ranks(now).count();
        let words: Vec<String> = words.take(NAMES).collect();
        let more = if count > NAMES { format!("; and {} more", count - NAMES) } else { String::new() };
        words.join("; ") + &more
    }

    /// One warning, when one is due: about ranks that are silent, that let others wait, or that are slow. `activity` is this rank's; it is
    /// written only into a warning.
    pub fn warning(&mut self, now: Instant, activity: impl Display, timeout: Duration) -> Option<String> {
        let silent = self.silent_warning(now, activity, timeout);
        if silent.is_some() || self.me != 0 {
            return silent;
        }
        self.late_warning(now, timeout).or_else(|| self.slow_warning(now))
    }

    /// Only rank 0 hears all; of rank 0 itself the next rank speaks.
    fn silent_warning(&mut self, now: Instant, activity: impl Display, timeout: Duration) -> Option<String> {
        let me = self.me;
        let watched = match me {
            0 => &mut self.peers[..],
            1 => &mut self.peers[..1],
            _ => &mut [],
        };
        let silent = |peer: &Peer, limit: Duration| peer.ended.is_none() && peer.silence(now) >= limit;
        let (rank, _) = watched.iter().enumerate().find(|(_, peer)| silent(peer, peer.next_silent))?;
        let others = watched.iter().filter(|peer| silent(peer, SILENT)).count() - 1;
        watched
            .iter_mut()
            .filter(|peer| silent(peer, SILENT))
            .for_each(|peer| peer.next_silent = peer.silence(now) * 4);
        let peer = &self.peers[rank];
        let Beat { step, phase, .. } = peer.beat;
        let silent = peer.silence(now).as_secs_f64();
        let others = if others > 0 { format!(" and {others} more ranks have") } else { " has".to_string() };
        Some(format!(
            "{}{others} not been heard of for {silent:.1} s, last in {phase} of step {step}: it is stopped, or its machine is \
             overloaded or gone. Rank {me} is {activity}{}. The run ends when a rank has waited {} s ([parallel] timeout)",
            self.name(rank),
            self.waited(),
            timeout.as_secs_f64()
        ))
    }

    fn late_warning(&mut self, now: Instant, timeout: Duration) -> Option<String> {
        let waited = self.longest_wait();
        let (first, late) = self.peers.iter().enumerate().find(|(_, peer)| {
            peer.ended.is_none() && peer.silence(now) < SILENT && peer.noted.is_some_and(|noted| noted == now)
        })?;
        if waited < self.next_late {
            return None;
        }
        let (waiting, peer) = self.peers.iter().enumerate().max_by_key(|(_, peer)| peer.beat.waited)?;
        let text = format!(
            "{} is alive but keeps the others waiting: it is in {} of step {}, and rank {waiting} has waited for {:.1} s in \
             {} of step {}. The run ends when a rank has waited {} s ([parallel] timeout)",
            self.name(first),
            late.beat.phase,
            late.beat.step,
            waited.as_secs_f64(),
            peer.beat.phase,
            peer.beat.step,
            timeout.as_secs_f64()
        );
        self.next_late = waited * 2;
        Some(text)
    }

    fn slow_warning(&mut self, now: Instant) -> Option<String> {
        let HeldUp { by, share, seconds, steps } = self.pace.look(self.peers.iter().map(|peer| &peer.beat), now)?;
        let (who, whom) = match by.count {
            1 => (format!("{} is the slowest rank", self.name(by.rank)), "it"),
            more => (format!("{} and {} more are the slowest ranks", self.name(by.rank), more - 1), "them"),
        };
        Some(format!(
            "{who}: in the last {seconds:.0} s the others waited {:.0} % of the time for {whom}, {:.1} ms a step",
            100.0 * share,
            1e3 * by.seconds / steps as f64
        ))
    }

    /// A rank that has ended in order at least `ago`, as the reason why a wait for it is in vain.
    pub fn gone(&self, ago: Duration, now: Instant) -> Option<String> {
        let gone = |peer: &Peer| peer.ended.is_some_and(|ended| now.saturating_duration_since(ended) >= ago);
        let rank = self.peers.iter().position(gone)?;
        Some(format!("{} has ended its run while others still wait for it", self.name(rank)))
    }

    /// `rank 1 (pid 4711 on host a)`
    pub fn name(&self, rank: usize) -> String {
        self.peers.get(rank).map_or_else(
            || format!("rank {rank}"),
            |peer| format!("rank {rank} (pid {} on host {})", peer.pid, peer.host),
        )
    }

    /// How a peer was lost, seen from this rank in `my_step`. The last heartbeat may be many short steps old, but a peer
    /// is never more than one step away.
    pub fn lost(&self, rank: usize, beat: Beat, silent: Duration, my_step: u64) -> String {
        let Beat { step, phase, .. } = beat;
        let name = self.name(rank);
        if step == my_step {
            return format!("{name} was lost in step {step} while in {phase}");
        }
        format!(
            "{name} was lost about step {my_step}; {:.1} s before, it was in {phase} of step {step}",
            silent.as_secs_f64()
        )
    }

    /// That `rank` is cut off, as rank `from` has found.
    pub fn cut_off(&self, rank: usize, from: usize) -> String {
        let host = |rank: usize| self.peers.get(rank).map_or("?", |peer| &peer.host);
        format!(
            "no acknowledgement from {} for {:.1} s: the network between it and {} is cut, or host {} is gone",
            self.name(rank),
            CUT.as_secs_f64(),
            self.name(from),
            host(rank)
        )
    }

    fn longest_wait(&self) -> Duration {
        self.peers.iter().map(|peer| peer.beat.waited).max().unwrap_or(Duration::ZERO)
    }

    fn waited(&self) -> String {
        match self.peers[self.me].beat.waited {
            Duration::ZERO => String::new(),
            waited => format!(" (for {:.1} s)", waited.as_secs_f64()),
        }
    }
}

impl Peer {
    pub fn silence(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.heard)
    }
}

#[cfg(test)]
mod tests {
    use super::super::health::Phase;
    use super::*;

    fn beat(step: u64, phase: Phase, waited: u64) -> Beat {
        Beat { step, phase, waited: Duration::from_millis(waited), waiting: Duration::ZERO }
    }

    fn table(me: usize, size: usize, now: Instant) -> Table {
        let identities = (0..size).map(|rank| (100 + rank as u32, format!("node{rank}"))).collect();
        Table::new(me, identities, beat(0, Phase::Start, 0), now)
    }

    /// Heartbeats five times a second: rank 1 stops at 1.0 s, the others wait for it from then on.
    #[test]
    fn a_stopped_rank_is_named_once_within_five_seconds_and_then_with_back_off() {
        let start = Instant::now();
        let mut table = table(0, 3, start);
        let mut warnings = Vec::new();
        for tick in 0..100u64 {
            let (ms, now) = (tick * 200, start + Duration::from_millis(tick * 200));
            for rank in [0, 1, 2] {
                if rank != 1 || ms < 1000 {
                    table.heard(
                        rank,
                        beat(7, Phase::AllReduce, if rank == 1 { 0 } else { ms.saturating_sub(1000) }),
                        now,
                    );
                }
            }
            table.note_late(now);
            if let Some(text) =
                table.warning(now, "waiting for rank 1, in all-reduce of step 7", Duration::from_secs(300))
            {
                warnings.push((ms, text));
            }
        }
        let times: Vec<u64> = warnings.iter().map(|(ms, _)| *ms).collect();
        assert_eq!(times, [3800, 12800], "{warnings:#?}");
        assert_eq!(
            warnings[0].1,
            "rank 1 (pid 101 on host node1) has not been heard of for 3.0 s, last in all-reduce of step 7: it is stopped, \
             or its machine is overloaded or gone. Rank 0 is waiting for rank 1, in all-reduce of step 7 (for 2.8 s). The run ends when \
             a rank has waited 300 s ([parallel] timeout)"
        );
        let now = start + Duration::from_secs(20);
        assert_eq!(table.heard(1, beat(7, Phase::AllReduce, 0), now), Some(Duration::from_millis(19_200)));
        assert_eq!(table.heard(1, beat(7, Phase::AllReduce, 0), now), None);
    }

    #[test]
    fn a_late_rank_is_named_when_others_have_waited_and_then_ever_more_rarely() {
        let start = Instant::now();
        let mut table = table(0, 3, start);
        let mut times = Vec::new();
        for tick in 0..100u64 {
            let (ms, now) = (tick * 200, start + Duration::from_millis(tick * 200));
            table.heard(0, beat(7, Phase::AllReduce, ms), now);
            table.heard(1, beat(7, Phase::AllReduce, ms), now);
            table.heard(2, beat(7, Phase::Data, 0), now);
            table.note_late(now);
            if let Some(text) = table.warning(now, "", Duration::from_secs(300)) {
                assert!(text.starts_with(
                    "rank 2 (pid 102 on host node2) is alive but keeps the others waiting: it is in data"
                ));
                times.push(ms);
            }
        }
        assert_eq!(times, [4000, 8000, 16000]);
        let now = start + Duration::from_millis(19_800);
        assert_eq!(table.late(now), "rank 2 (pid 102 on host node2), last heard of 0.0 s ago in data of step 7");
    }

    #[test]
    fn nobody_is_blamed_for_long_steps_nor_for_this_process_being_stopped() {
        let start = Instant::now();
        let mut table = table(0, 2, start);
        for tick in 0..300u64 {
            let now = start + Duration::from_millis(tick * 200);
            table.heard(0, beat(7, Phase::Forward, 0), now);
            table.heard(1, beat(7, Phase::Evaluate, 0), now);
            table.note_late(now);
            assert_eq!(table.warning(now, "", Duration::from_secs(300)), None);
        }
        let now = start + Duration::from_secs(1000);
        table.forgive(now);
        table.note_late(now);
        assert_eq!(table.warning(now, "", Duration::from_secs(300)), None);
        assert_eq!(table.late(now), "");
    }

    #[test]
    fn rank_0_names_the_slowest_with_its_cost() {
        let start = Instant::now();
        let slow = |me: usize, host_of_two: bool| {
            let mut table = table(me, 4, start);
            for (seconds, step) in [(0, 1), (10, 101)] {
                let now = start + Duration::from_secs(seconds);
                for rank in 0..4 {
                    let waits = rank < 2 || (rank == 2 && !host_of_two);
                    let waiting = Duration::from_millis(if waits { seconds * 310 } else { 0 });
                    table.heard(rank, Beat { waiting, ..beat(step, Phase::Forward, 0) }, now);
                }
                let warning = table.warning(now, "", Duration::from_secs(300));
                assert!(seconds > 0 || warning.is_none(), "{warning:?}");
                if seconds > 0 {
                    return warning;
                }
            }
            None
        };
        let end = "in the last 10 s the others waited 31 % of the time for";
        assert_eq!(
            slow(0, false),
            Some(format!("rank 3 (pid 103 on host node3) is the slowest rank: {end} it, 31.0 ms a step"))
        );
        assert_eq!(
            slow(0, true),
            Some(format!(
                "rank 2 (pid 102 on host node2) and 1 more are the slowest ranks: {end} them, 31.0 ms a step"
            ))
        );
        assert_eq!(slow(1, false), None);
    }

    #[test]
    fn who_is_cut_off_is_named_with_both_ends() {
        assert_eq!(
            table(3, 4, Instant::now()).cut_off(2, 3),
            "no acknowledgement from rank 2 (pid 102 on host node2) for 1.2 s: the network between it and rank 3 (pid 103 on \
             host node3) is cut, or host node2 is gone"
        );
    }

    #[test]
    fn of_rank_0_only_the_next_rank_speaks() {
        let start = Instant::now();
        let now = start + Duration::from_secs(4);
        for me in [1, 2] {
            let mut table = table(me, 3, start);
            let warning = table.warning(now, "in data of step 1", Duration::from_secs(300));
            assert_eq!(warning.is_some(), me == 1, "{warning:?}");
        }
    }
}
