//! How a run ended, from how its ranks ended: one exit code and one message, however many ranks say the same.

use super::lifeline::last_word;
use super::signals;
use crate::error::Kind;

/// How a rank ended.
#[derive(Clone, Debug)]
pub struct Ending {
    pub rank: usize,
    pub pid: u32,
    pub how: How,
    /// The launcher ended it because others had failed: a consequence, not a cause.
    pub killed_by_us: bool,
    /// It lacks something, by its own word, that it would lack at the next start too.
    pub lacking: bool,
    /// The rank's own last word.
    pub report: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Exit(i32),
    Signal(i32),
    /// By a signal that the launcher had passed on and the rank did not catch: it had nothing to save.
    Asked(i32),
}

const DONE: How = How::Exit(0);
const LOST: How = How::Exit(Kind::PeerLost as i32);
const STOPPED: How = How::Exit(Kind::Stopped as i32);

/// `endings` in the order in which the ranks ended. A rank's own error comes first, then death by a signal, sent by
/// who knows whom or on request; that peers were lost follows from any of them.
pub fn verdict(endings: &[Ending]) -> (u8, Option<String>) {
    let causes: Vec<&Ending> = endings.iter().filter(|end| !end.killed_by_us).collect();
    let exits: Vec<&Ending> =
        select(&causes, |how| matches!(how, How::Exit(_)) && ![DONE, LOST, STOPPED].contains(&how));
    let deaths: Vec<&Ending> = select(&causes, |how| matches!(how, How::Signal(_)));
    let asked = causes.iter().find_map(|end| if let How::Asked(signal) = end.how { Some(signal) } else { None });
    let lost: Vec<&Ending> = select(&causes, |how| how == LOST);
    let stopped: Vec<&Ending> = select(&causes, |how| how == STOPPED);

    let mut lines: Vec<String> = Vec::new();
    let code = if let Some(first) = exits.first() {
        lines.extend(words(&exits));
        lines.extend(deaths.iter().map(|end| death(end)));
        exit_code(first.how)
    } else if !deaths.is_empty() {
        lines.extend(deaths.iter().map(|end| death(end)));
        lines.extend(spokesman(&lost).map(|(rank, text)| format!("  rank {rank}: {text}")));
        Kind::PeerLost as u8
    } else if let Some(signal) = asked {
        lines.push(format!("stopped by {}; there was nothing to save", signals::name(signal)));
        Kind::Stopped as u8
    } else if !lost.is_empty() {
        lines.extend(spokesman(&lost).map(|(_, text)| last_word(Kind::PeerLost as i32, text)));
        Kind::PeerLost as u8
    } else if !stopped.is_empty() {
        lines.extend(spokesman(&stopped).map(|(_, text)| text.to_string()));
        Kind::Stopped as u8
    } else {
        0
    };
    let stuck = endings.iter().filter(|end| end.killed_by_us);
    lines.extend(stuck.map(|end| {
        format!("  rank {} (pid {}) did not stop by itself and was ended by the launcher", end.rank, end.pid)
    }));
    (code, (!lines.is_empty()).then(|| lines.join("\n")))
}

fn select<'a>(endings: &[&'a Ending], which: impl Fn(How) -> bool) -> Vec<&'a Ending> {
    endings.iter().copied().filter(|end| which(end.how)).collect()
}

fn exit_code(how: How) -> u8 {
    match how {
        How::Exit(code) => u8::try_from(code).unwrap_or(Kind::Internal as u8),
        How::Signal(_) | How::Asked(_) => Kind::PeerLost as u8,
    }
}

/// Every different reason once, with its rank unless rank 0 gives it: that one speaks for the run.
fn words(endings: &[&Ending]) -> Vec<String> {
    let mut sorted = endings.to_vec();
    sorted.sort_by_key(|end| end.rank);
    let mut said: Vec<&Option<String>> = Vec::new();
    let mut lines = Vec::new();
    for Ending { rank, pid, how, report, .. } in sorted {
        match report {
            Some(_) if said.contains(&report) => {}
            Some(text) if *rank == 0 => lines.push(format!("error: {text}")),
            Some(text) => lines.push(format!("error: rank {rank}: {text}")),
            None => {
                let code = exit_code(*how);
                lines.push(format!("error: rank {rank} (pid {pid}) ended with code {code}; its own output says why"));
            }
        }
        said.push(report);
    }
    lines
}

fn death(Ending { rank, pid, how, .. }: &Ending) -> String {
    let How::Signal(signal) = *how else { unreachable!("selected by signal") };
    let hint = match signals::name(signal) {
        "SIGKILL" => "; if nobody did that, the machine ran out of memory (`dmesg` tells)",
        _ => "",
    };
    format!("error: rank {rank} (pid {pid}) was killed by signal {signal} ({}){hint}", signals::name(signal))
}

/// The lowest rank that said something, and what.
fn spokesman<'a>(endings: &[&'a Ending]) -> Option<(usize, &'a str)> {
    let spoke = endings.iter().filter_map(|end| end.report.as_deref().map(|text| (end.rank, text)));
    spoke.min_by_key(|(rank, _)| *rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(rank: usize, how: How, report: &str) -> Ending {
        let report = (!report.is_empty()).then(|| report.to_string());
        Ending { rank, pid: 1000 + rank as u32, how, killed_by_us: false, lacking: false, report }
    }

    #[test]
    fn an_own_error_wins_over_what_follows_from_it() {
        let (code, text) = verdict(&[
            end(2, How::Exit(3), "train.idx: 7 bytes are missing"),
            end(1, LOST, "rank 2 stopped"),
            end(0, LOST, "rank 2 stopped"),
            Ending { killed_by_us: true, ..end(3, How::Signal(9), "") },
        ]);
        assert_eq!(code, 3);
        assert_eq!(
            text.unwrap(),
            "error: rank 2: train.idx: 7 bytes are missing\n  rank 3 (pid 1003) did not stop by itself and was ended by the launcher"
        );
    }

    #[test]
    fn what_all_ranks_say_is_said_once() {
        let all: Vec<Ending> = (0..4).rev().map(|rank| end(rank, How::Exit(2), "unknown key `lr`")).collect();
        assert_eq!(verdict(&all), (2, Some("error: unknown key `lr`".to_string())));
        let stopped: Vec<Ending> = (0..4).rev().map(|rank| end(rank, STOPPED, "stopped by SIGTERM")).collect();
        assert_eq!(verdict(&stopped), (75, Some("stopped by SIGTERM".to_string())));
        assert_eq!(verdict(&[end(1, DONE, ""), end(0, DONE, "")]), (0, None));
    }

    #[test]
    fn ranks_that_a_signal_ended_on_request_are_not_lost() {
        let (code, text) = verdict(&[end(1, How::Asked(15), ""), end(0, LOST, "rank 1 was lost")]);
        assert_eq!((code, text), (75, Some("stopped by SIGTERM; there was nothing to save".to_string())));
    }

    #[test]
    fn a_death_names_the_signal_and_lets_the_lowest_survivor_speak() {
        let (code, text) =
            verdict(&[end(1, How::Signal(11), ""), end(2, LOST, "seen from 2"), end(0, LOST, "seen from 0")]);
        assert_eq!(code, 4);
        assert_eq!(text.unwrap(), "error: rank 1 (pid 1001) was killed by signal 11 (SIGSEGV)\n  rank 0: seen from 0");
        let (code, text) = verdict(&[end(1, How::Exit(101), ""), end(0, LOST, "")]);
        assert_eq!(code, 101);
        assert_eq!(text.unwrap(), "error: rank 1 (pid 1001) ended with code 101; its own output says why");
    }
}
