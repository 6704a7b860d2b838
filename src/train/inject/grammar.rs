//! `--inject WHAT:WHERE`: how a fault is written.

use rustix::process::Signal;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// One `--inject`.
#[derive(Clone, Debug, PartialEq)]
pub struct Injection {
    pub fault: Fault,
    pub rank: usize,
    /// Counted from 1; a delay is for all steps and has none.
    pub step: u64,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    Signal(Signal),
    Stop {
        /// None: for good.
        wake_after: Option<Duration>,
    },
    Delay(Duration),
    DropLink,
    Nan,
    CorruptParams,
    CorruptCheckpoint,
}

/// Every fault: its name, the form of what follows, an example.
const FORMS: [(&str, &str, &str); 9] = [
    ("kill", "rank=R@step=S", "kill:rank=1@step=40"),
    ("stop", "rank=R@step=S or rank=R@step=S:TIME", "stop:rank=1@step=40:30s"),
    ("delay", "rank=R:TIME", "delay:rank=1:50ms"),
    ("drop-link", "rank=R@step=S", "drop-link:rank=1@step=40"),
    ("nan", "rank=R@step=S", "nan:rank=0@step=10"),
    ("corrupt-params", "rank=R@step=S", "corrupt-params:rank=1@step=100"),
    ("corrupt-checkpoint", "step=S", "corrupt-checkpoint:step=20"),
    ("term", "rank=R@step=S", "term:rank=0@step=40"),
    ("usr1", "rank=R@step=S", "usr1:rank=0@step=40"),
];

impl FromStr for Injection {
    type Err = String;

    fn from_str(text: &str) -> Result<Injection, String> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let Some((_, form, example)) = FORMS.iter().find(|(known, ..)| *known == name) else {
            return Err(unknown(name));
        };
        let parts = Parts::read(rest).filter(|parts| parts.step != Some(0));
        let injection = parts.and_then(|parts| parts.injection(name, text));
        injection.ok_or_else(|| {
            format!("expected {name}:{form}, such as {example}; steps count from 1, and a TIME ends in ms or s")
        })
    }
}

fn unknown(name: &str) -> String {
    let distance = |known: &str| strsim::damerau_levenshtein(name, known);
    let names: Vec<&str> = FORMS.iter().map(|(known, ..)| *known).collect();
    let near = names.iter().min_by_key(|known| distance(known)).filter(|known| distance(known) <= 3);
    let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
    format!("`{name}` is no fault; there are {}{near}", names.join(", "))
}

/// What stands behind the name.
#[derive(Default)]
struct Parts {
    rank: Option<usize>,
    step: Option<u64>,
    time: Option<Duration>,
}

impl Parts {
    /// None where that is not `rank=R@step=S:TIME` or some parts of it.
    fn read(text: &str) -> Option<Parts> {
        let (place, time) = text.split_once(':').map_or((text, None), |(place, time)| (place, Some(time)));
        let mut parts = Parts::default();
        if let Some(time) = time {
            parts.time = Some(duration(time)?);
        }
        for part in place.split('@') {
            match part.split_once('=')? {
                ("rank", rank) if parts.rank.is_none() => parts.rank = Some(rank.parse().ok()?),
                ("step", step) if parts.step.is_none() => parts.step = Some(step.parse().ok()?),
                _ => return None,
            }
        }
        Some(parts)
    }

    /// None where the fault asks for other parts.
    fn injection(self, name: &str, text: &str) -> Option<Injection> {
        let (fault, rank, step) = match (name, self.rank, self.step, self.time) {
            ("kill", Some(rank), Some(step), None) => (Fault::Signal(Signal::KILL), rank, step),
            ("term", Some(rank), Some(step), None) => (Fault::Signal(Signal::TERM), rank, step),
            ("usr1", Some(rank), Some(step), None) => (Fault::Signal(Signal::USR1), rank, step),
            ("stop", Some(rank), Some(step), wake_after) => (Fault::Stop { wake_after }, rank, step),
            ("delay", Some(rank), None, Some(time)) => (Fault::Delay(time), rank, 0),
            ("drop-link", Some(rank), Some(step), None) => (Fault::DropLink, rank, step),
            ("nan", Some(rank), Some(step), None) => (Fault::Nan, rank, step),
            ("corrupt-params", Some(rank), Some(step), None) => (Fault::CorruptParams, rank, step),
            // Rank 0 writes them.
            ("corrupt-checkpoint", None, Some(step), None) => (Fault::CorruptCheckpoint, 0, step),
            _ => return None,
        };
        Some(Injection { fault, rank, step, text: text.to_string() })
    }
}

/// `50ms`, `1.5s`; up to a day.
fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic())?);
    let seconds = number.parse::<f64>().ok()? * [("ms", 1e-3), ("s", 1.0)].iter().find(|(name, _)| *name == unit)?.1;
    (0.0..=86_400.0).contains(&seconds).then(|| Duration::from_secs_f64(seconds))
}

/// As it was written.
impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (Fault, usize, u64) {
        let Injection { fault, rank, step, .. } = text.parse().unwrap();
        (fault, rank, step)
    }

    #[test]
    fn every_form_is_read() {
        let ms = Duration::from_millis;
        assert_eq!(parse("kill:rank=1@step=40"), (Fault::Signal(Signal::KILL), 1, 40));
        assert_eq!(parse("kill:step=40@rank=1"), (Fault::Signal(Signal::KILL), 1, 40));
        assert_eq!(parse("stop:rank=1@step=40"), (Fault::Stop { wake_after: None }, 1, 40));
        assert_eq!(parse("stop:rank=1@step=40:1.5s"), (Fault::Stop { wake_after: Some(ms(1500)) }, 1, 40));
        assert_eq!(parse("delay:rank=2:50ms"), (Fault::Delay(ms(50)), 2, 0));
        assert_eq!(parse("corrupt-checkpoint:step=20"), (Fault::CorruptCheckpoint, 0, 20));
        for (name, _, example) in FORMS {
            let read: Injection = example.parse().unwrap();
            assert_eq!(read.to_string(), example);
            assert!(example.starts_with(name));
        }
    }

    #[test]
    fn what_is_not_a_fault_is_answered_with_what_would_be() {
        for (text, words) in [
            ("kil:rank=1@step=40", "`kil` is no fault; there are kill, stop, delay"),
            ("kil:rank=1@step=40", "did you mean `kill`?"),
            ("explode:rank=1@step=40", "`explode` is no fault; there are kill, "),
            ("", "`` is no fault"),
            ("kill", "expected kill:rank=R@step=S, such as kill:rank=1@step=40"),
            ("kill:rank=1", "expected kill:rank=R@step=S"),
            ("kill:rank=1@step=0", "steps count from 1"),
            ("kill:rank=1@rank=2@step=3", "expected kill:rank=R@step=S"),
            ("kill:rank=-1@step=3", "expected kill:rank=R@step=S"),
            ("kill:rank=1@step=3:5s", "expected kill:rank=R@step=S"),
            ("stop:rank=1@step=3:5h", "expected stop:rank=R@step=S or rank=R@step=S:TIME"),
            ("stop:rank=1@step=3:-5s", "a TIME ends in ms or s"),
            ("delay:rank=1", "expected delay:rank=R:TIME, such as delay:rank=1:50ms"),
            ("delay:rank=1:ms", "expected delay:rank=R:TIME"),
            ("delay:rank=1:infs", "expected delay:rank=R:TIME"),
            ("corrupt-checkpoint:rank=1@step=3", "expected corrupt-checkpoint:step=S"),
        ] {
            let error = text.parse::<Injection>().unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert!(!"explode:rank=1".parse::<Injection>().unwrap_err().contains("did you mean"));
    }
}
