//! The command line: usage, exit codes, JSON, text.

mod check;
mod command;
mod copy;
mod forget;
mod json;
mod key;
mod reader;
mod snapshots;
#[path = "../support/mod.rs"]
mod support;
mod usage;
