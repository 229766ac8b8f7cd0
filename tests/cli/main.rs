//! The command line: usage, exit codes, JSON, text.

mod command;
mod forget;
mod json;
mod key;
mod snapshots;
#[path = "../support/mod.rs"]
mod support;
mod usage;
