//! What one sees while it trains: a live bar where both outputs are a terminal, else a line at each log step.

use indicatif::{HumanCount, MultiProgress, ProgressBar, ProgressStyle};
use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::LazyLock;

/// Owns the terminal's last lines; log lines from any thread make it step aside.
static TERMINAL: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Writes to the terminal without tearing the bar.
pub(super) fn aside<R>(write: impl FnOnce() -> R) -> R {
    TERMINAL.suspend(write)
}

/// A line on stdout that stays.
pub(crate) fn print(line: impl fmt::Display) {
    // Whoever read it may have left (`trainer | head`); that does not end the work.
    let _ = aside(|| writeln!(std::io::stdout(), "{line}"));
}

/// Whether a live bar can be shown.
pub(super) fn is_terminal() -> bool {
    std::io::stdout().is_terminal() && std::io::stderr().is_terminal()
}

/// How well the net does.
pub(crate) struct Scores {
    pub loss: f64,
    pub accuracy: f64,
}

impl fmt::Display for Scores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Scores { loss, accuracy } = self;
        // That of a run that diverges would be a long row of digits.
        if *loss < 1e5 {
            write!(f, "loss {loss:.4}")?
        } else {
            write!(f, "loss {loss:.3e}")?
        }
        write!(f, "  accuracy {accuracy:.4}")
    }
}

/// Averages over the samples since some moment, from all ranks; shares are of rank 0's training time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    pub loss: f64,
    pub accuracy: f64,
    pub samples_per_second: f64,
    pub communication: f64,
    pub waiting: f64,
    pub data: f64,
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rates { loss, accuracy, samples_per_second, .. } = *self;
        write!(f, "{}  {} samples/s", Scores { loss, accuracy }, HumanCount(samples_per_second as u64))?;
        let percent = |share: f64| (100.0 * share).round();
        let [communication, waiting, data] = [self.communication, self.waiting, self.data].map(percent);
        write!(f, "  comm {communication} %  wait {waiting} %  data {data} %")
    }
}

/// Where the run is: `epoch 3/10`.
pub(super) fn epoch_of(epoch: u64, epochs: Option<u64>) -> String {
    match epochs {
        Some(epochs) => format!("epoch {}/{epochs}", (epoch + 1).min(epochs)),
        None => format!("epoch {}", epoch + 1),
    }
}

/// Two lines at the foot of the terminal.
pub(super) struct Bar(ProgressBar);

impl Bar {
    pub fn show(first_step: u64, total_steps: Option<u64>) -> Bar {
        let (bar, template) = match total_steps {
            Some(total) => {
                (ProgressBar::new(total), "{prefix}  step {pos}/{len} {wide_bar} {percent} %  ETA {eta}\n{msg}")
            }
            None => (ProgressBar::no_length(), "{prefix}  step {pos}  {elapsed} so far\n{msg}"),
        };
        let style = ProgressStyle::with_template(template).expect("a valid template").progress_chars("━╸─");
        let bar = TERMINAL.add(bar.with_style(style).with_prefix("starting").with_position(first_step));
        bar.reset_eta();
        Bar(bar)
    }

    /// Cheap: draws at most twenty times a second.
    pub fn set_step(&self, step: u64) {
        self.0.set_position(step);
    }

    pub fn set_rates(&self, epoch: String, rates: &Rates) {
        self.0.set_prefix(epoch);
        self.0.set_message(rates.to_string());
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
        TERMINAL.remove(&self.0);
    }
}
