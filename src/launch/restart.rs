//! `trainer -n N --max-restarts K`: whether ranks that failed are started again, how many of them, and when. Pure but for
//! what it is told of the run.

use super::job::{LAUNCH_ID, LAUNCH_RESTARTS};
use super::verdict::{Ending, How};
use crate::error::{Error, Kind, Result};
use clap::Args;
use std::time::Duration;

/// Waited before a restart if the one before it has brought the run no further; doubles from one to the next.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, Default, Args)]
pub struct Options {
    /// Restart lost ranks; see also --elastic, --min-ranks
    #[arg(long, value_name = "K", requires = "ranks")]
    pub max_restarts: Option<u64>,
    /// Go on without the ranks that were lost.
    #[arg(long, requires = "max_restarts", hide = true)]
    pub elastic: bool,
    /// The fewest ranks for `elastic`; 1 where it is not given.
    #[arg(long, value_name = "N", requires = "elastic", hide = true)]
    pub min_ranks: Option<usize>,
}

/// What restarting needs to know of the run.
pub struct Run<'a> {
    /// Names this launch to its ranks.
    pub launch: &'a str,
    /// Step of the newest checkpoint from which a start goes on, before which there were so many.
    pub saved: &'a dyn Fn(u64) -> Option<u64>,
    /// Whether so many ranks can share a step; else why not.
    pub fits: &'a dyn Fn(usize) -> Result<()>,
    /// What to give in order to go on.
    pub again: &'a str,
}

pub struct Restarts<'a> {
    options: &'a Options,
    run: Run<'a>,
    done: u64,
    /// The newest checkpoint when the ranks were last started.
    saved: Option<u64>,
    pause: Duration,
}

/// Of an environment.
pub type Variable = (&'static str, String);

/// The ranks are to be started again.
#[derive(Debug, PartialEq)]
pub struct Restart {
    pub ranks: usize,
    pub pause: Duration,
    /// For the user.
    pub text: String,
}

impl<'a> Restarts<'a> {
    /// For a run that `ranks` are about to begin. Fails (kind Usage) where `--min-ranks` are more.
    pub fn new(options: &'a Options, ranks: usize, run: Run<'a>) -> Result<Restarts<'a>> {
        match options.min_ranks {
            Some(min) if min == 0 || min > ranks => {
                Err(Error::usage(format!("--min-ranks {min} with -n {ranks}; give a number from 1 to {ranks}")))
            }
            _ => Ok(Restarts { options, saved: (run.saved)(0), run, done: 0, pause: FIRST_PAUSE }),
        }
    }

    /// What the ranks of the next start are to find in their environment.
    pub fn variables(&self) -> Vec<Variable> {
        vec![(LAUNCH_ID, self.run.launch.to_string()), (LAUNCH_RESTARTS, self.done.to_string())]
    }

    /// What to give in order to go on.
    pub fn again(&self) -> &str {
        self.run.again
    }

    /// The ranks have ended, with this exit code as their verdict: what to do next. None: nothing, that was the end; an
    /// error is a restart that cannot be, in words to be added.
    pub fn next(&mut self, endings: &[Ending], code: u8) -> Result<Option<Restart>, String> {
        let max = self.options.max_restarts.unwrap_or(0);
        if max == 0 || !is_mendable(code) {
            return Ok(None);
        }
        if endings.iter().any(|end| end.lacking) {
            return Err("no restart: what is lacking would be lacking again".into());
        }
        if self.done == max {
            return Err(format!("no restart is left of --max-restarts {max}"));
        }
        let (ranks, fewer) = if self.options.elastic { self.left(endings)? } else { (endings.len(), String::new()) };
        self.done += 1;
        let saved = (self.run.saved)(self.done);
        let pause = self.pause_before(saved);
        let soon = if pause.is_zero() { String::new() } else { format!(" in {} s", pause.as_secs()) };
        let from = match saved {
            Some(step) => format!("the newest checkpoint is of step {step}"),
            None => "nothing was saved, so it begins again".into(),
        };
        let on = if ranks == 1 { "1 rank".into() } else { format!("{ranks} ranks") };
        let text = format!("restart {} of {max}{soon}, on {on}{fewer}: {from}", self.done);
        Ok(Some(Restart { ranks, pause, text }))
    }

    /// With how many ranks it goes on without those that were lost, and words for why they are fewer.
    fn left(&self, endings: &[Ending]) -> Result<(usize, String), String> {
        let (all, left) = (endings.len(), endings.iter().filter(|end| was_well(end)).count());
        let min = self.options.min_ranks.unwrap_or(1);
        if left < min {
            return Err(format!("no restart: {left} of {all} ranks are left, and --min-ranks is {min}"));
        }
        let unfit = |ranks: usize| (self.run.fits)(ranks).err();
        let why = unfit(left).map_or_else(String::new, |why| format!("; {why}"));
        match (min..=left).rev().find(|&ranks| unfit(ranks).is_none()) {
            Some(ranks) if ranks == all => Ok((ranks, String::new())),
            Some(ranks) => Ok((ranks, format!(" ({left} of {all} are left{why})"))),
            None => Err(format!("no restart: {left} of {all} ranks are left, and --min-ranks is {min}{why}")),
        }
    }

    /// None after an attempt that has saved something.
    fn pause_before(&mut self, saved: Option<u64>) -> Duration {
        if std::mem::replace(&mut self.saved, saved) != saved {
            self.pause = FIRST_PAUSE;
            return Duration::ZERO;
        }
        let pause = self.pause;
        self.pause = (2 * pause).min(LONGEST_PAUSE);
        pause
    }
}

/// A lost rank or a failed device may do better next time. Usage, configuration, data, a bug or a loss that is not finite are
/// the same at every start.
fn is_mendable(code: u8) -> bool {
    [Kind::PeerLost, Kind::Device].iter().any(|kind| *kind as u8 == code)
}

/// Ended only because it missed others.
fn was_well(end: &Ending) -> bool {
    !end.killed_by_us && end.how == How::Exit(Kind::PeerLost as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOST: How = How::Exit(4);

    fn endings(hows: &[How]) -> Vec<Ending> {
        let end = |(rank, how): (usize, &How)| Ending {
            rank,
            pid: 1,
            how: *how,
            killed_by_us: false,
            lacking: false,
            report: None,
        };
        hows.iter().enumerate().map(end).collect()
    }

    /// A run of a global batch of 48 that saves as `saved` says.
    fn check(options: &Options, ranks: usize, saved: &dyn Fn(u64) -> Option<u64>, see: impl FnOnce(Restarts<'_>)) {
        let fits = |ranks: usize| match 48 % ranks {
            0 => Ok(()),
            _ => Err(Error::usage(format!("48 is not divisible by {ranks} ranks"))),
        };
        see(Restarts::new(options, ranks, Run { launch: "1", saved, fits: &fits, again: "the same command" }).unwrap());
    }

    #[test]
    fn only_what_may_do_better_is_started_again_and_only_so_often() {
        let options = Options { max_restarts: Some(2), ..Options::default() };
        let ended = endings(&[LOST, How::Signal(9)]);
        check(&options, 2, &|_| None, |mut restarts| {
            for code in [0, 1, 2, 3, 5, 75, 130] {
                assert_eq!(restarts.next(&ended, code), Ok(None), "{code}");
            }
            for (code, text) in [
                (4, "restart 1 of 2 in 1 s, on 2 ranks: nothing was saved, so it begins again"),
                (6, "restart 2 of 2 in 2 s"),
            ] {
                let restart = restarts.next(&ended, code).unwrap().unwrap();
                assert!(restart.ranks == 2 && restart.text.starts_with(text), "{restart:?}");
            }
            assert_eq!(restarts.next(&ended, 4), Err("no restart is left of --max-restarts 2".into()));
        });
        check(&options, 2, &|_| None, |mut restarts| {
            let mut ended = endings(&[How::Exit(6); 2]);
            ended[1].lacking = true;
            assert_eq!(restarts.next(&ended, 6), Err("no restart: what is lacking would be lacking again".into()));
        });
        check(&Options::default(), 2, &|_| None, |mut restarts| assert_eq!(restarts.next(&ended, 4), Ok(None)));
    }

    #[test]
    fn the_pause_grows_while_nothing_is_saved() {
        let options = Options { max_restarts: Some(20), ..Options::default() };
        let step = std::cell::Cell::new(0);
        check(&options, 2, &|_| Some(step.get() / 3), |mut restarts| {
            let mut pauses = Vec::new();
            for _ in 0..12 {
                step.set(step.get() + 1);
                pauses.push(restarts.next(&endings(&[LOST; 2]), 4).unwrap().unwrap().pause.as_secs());
            }
            assert_eq!(pauses, [1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]);
        });
        check(&options, 2, &|_| None, |mut restarts| {
            let pause = (0..12).map(|_| restarts.next(&endings(&[LOST; 2]), 4).unwrap().unwrap().pause).max();
            assert_eq!(pause, Some(LONGEST_PAUSE));
        });
    }

    #[test]
    fn an_elastic_restart_takes_the_most_ranks_that_are_left_and_fit() {
        let options = Options { max_restarts: Some(9), elastic: true, min_ranks: None };
        let died = How::Signal(9);
        let stuck = |mut ended: Vec<Ending>| {
            ended[0].killed_by_us = true;
            ended
        };
        check(&options, 6, &|_| Some(20), |mut restarts| {
            for (ended, ranks) in [
                (endings(&[LOST, died, LOST, LOST, LOST]), 4),
                (endings(&[LOST, died, LOST, LOST, LOST, LOST]), 4),
                (stuck(endings(&[LOST, died, LOST, LOST])), 2),
                (endings(&[How::Exit(6), LOST]), 1),
            ] {
                let restart = restarts.next(&ended, 4).unwrap().unwrap();
                assert_eq!(restart.ranks, ranks, "{ended:?}");
                assert!(restart.text.ends_with(": the newest checkpoint is of step 20"), "{}", restart.text);
            }
            let error = restarts.next(&endings(&[died, died]), 4).unwrap_err();
            assert_eq!(error, "no restart: 0 of 2 ranks are left, and --min-ranks is 1");
        });
        let options = Options { min_ranks: Some(5), ..options };
        check(&options, 6, &|_| None, |mut restarts| {
            let error = restarts.next(&endings(&[LOST, died, LOST, LOST, LOST, LOST]), 4).unwrap_err();
            assert!(error.ends_with("--min-ranks is 5; 48 is not divisible by 5 ranks"), "{error}");
        });
        let none = Run { launch: "1", saved: &|_| None, fits: &|_| Ok(()), again: "the same command" };
        assert!(
            Restarts::new(&options, 4, none).is_err_and(|error| error.to_string().contains("--min-ranks 5 with -n 4"))
        );
    }
}
