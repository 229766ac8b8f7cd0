//! What the tests of the program share: running it, its peers, disks, and a laboratory to put them in.

// Each test binary uses its own part of this.
#![allow(dead_code)]

pub(crate) mod certificates;
pub(crate) mod disk;
pub(crate) mod lab;
pub(crate) mod named;
pub(crate) mod process;
pub(crate) mod program;
pub(crate) mod server;
pub(crate) mod wait;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// The repository's default chunk size, and so what a dirty byte costs at most.
pub(crate) const CHUNK: u64 = 128 * KIB;
