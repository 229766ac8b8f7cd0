//! The command line: what was typed, what it means, and one file per command.

use std::process::ExitCode;

/// Runs the command line of this process and returns its exit code.
pub fn main() -> ExitCode {
    ExitCode::from(2)
}
