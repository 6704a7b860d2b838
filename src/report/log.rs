//! Log lines on stderr: `warning: ...`, without time or target, and never through the middle of the progress bar.

use super::progress;
use std::fmt;
use std::io::{self, Write};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::registry::LookupSpan;

/// The target of a warning that every rank has reason to give: only rank 0's is shown.
pub const SAID_ONCE: &str = "said once";

/// Sends the `tracing` events of this process to stderr. `verbosity` 0 shows warnings, and on rank 0 also what a user
/// wants to know once; 1 adds debugging and 2 everything; below 0 only errors remain. The first call counts.
pub fn init(verbosity: i8, rank: usize) {
    let level = match verbosity {
        ..0 => LevelFilter::ERROR,
        0 if rank == 0 => LevelFilter::INFO,
        0 => LevelFilter::WARN,
        1 => LevelFilter::DEBUG,
        2.. => LevelFilter::TRACE,
    };
    let builder =
        tracing_subscriber::fmt().with_max_level(level).with_writer(|| Stderr).event_format(PlainLines { rank });
    let _ = tracing::subscriber::set_global_default(builder.finish());
}

struct PlainLines {
    rank: usize,
}

impl<S, N> FormatEvent<S, N> for PlainLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if self.rank != 0 && event.metadata().target() == SAID_ONCE {
            return Ok(());
        }
        writer.write_str(match *event.metadata().level() {
            Level::ERROR => "error: ",
            Level::WARN => "warning: ",
            Level::INFO => "",
            Level::DEBUG => "debug: ",
            Level::TRACE => "trace: ",
        })?;
        ctx.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// One event a `write`; the bar steps aside for it.
struct Stderr;

impl Write for Stderr {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        progress::aside(|| io::stderr().write_all(event)).map(|()| event.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
