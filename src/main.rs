//! The `nbdbackup` binary: parses, runs, exits.

use std::process::ExitCode;

fn main() -> ExitCode {
    nbdbackup::cli::main()
}
