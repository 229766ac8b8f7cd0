//! Incremental, deduplicated backups of QEMU/KVM disks over NBD dirty bitmaps.
//!
//! The layers, bottom first: [`range`] and [`meter`], [`nbd`] and [`repo`] and [`qemu`] side by side, [`engine`], [`report`], [`cli`].
//! `docs/architecture.md` says what lives where, and `tests/layers` holds the code to it.

pub mod cli;
pub mod engine;
mod file;
pub mod meter;
pub mod nbd;
pub mod qemu;
pub mod range;
pub mod repo;
pub mod report;
