use clap::Parser;
use lockstep::cli::{self, Cli};
use lockstep::launch::lifeline;
use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            lifeline::report(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
