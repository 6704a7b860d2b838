use clap::Parser;
use lockstep::cli::{self, Cli};
use lockstep::error::{Error, Kind, Result};
use lockstep::launch::lifeline;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(guarded(|| cli::run(Cli::parse())))
}

/// Does the work and says how it ended; the value is the exit code. A panic is a bug, and rayon hands on those of the
/// compute threads.
fn guarded(work: impl FnOnce() -> Result<u8>) -> u8 {
    panic::set_hook(Box::new(report_bug));
    match panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            lifeline::report(&error);
            error.exit_code()
        }
        Err(_) => Kind::Internal as u8,
    }
}

fn report_bug(info: &PanicHookInfo<'_>) {
    let (text, formatted) = (info.payload().downcast_ref::<&str>(), info.payload().downcast_ref::<String>());
    let message = text.copied().or(formatted.map(String::as_str)).unwrap_or("panic").replace('\n', ";");
    let place = info.location().map(|place| format!(" ({place})")).unwrap_or_default();
    lifeline::report(&Error::internal(format!("this is a bug in lockstep: {message}{place}; please report it")));
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        eprintln!("{backtrace}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{self, Command};

    /// Runs itself once more as the process that panics, on a compute thread.
    #[test]
    fn a_panic_is_one_line_and_exit_code_1() {
        if std::env::var_os("PANIC").is_some() {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
            process::exit(guarded(|| pool.install(|| panic!("planted\nhere"))).into());
        }
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["--nocapture", "--exact", "tests::a_panic_is_one_line_and_exit_code_1"]);
        let output = again.env("PANIC", "1").env_remove("RUST_BACKTRACE").output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.starts_with("error: this is a bug in lockstep: planted;here (src/main.rs:"), "{error}");
        assert!(error.ends_with("; please report it\n") && error.lines().count() == 1, "{error}");
    }
}
