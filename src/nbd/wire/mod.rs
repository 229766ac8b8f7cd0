//! The messages of the NBD protocol as bytes: one type per message, each with `encode` and `decode`.
//!
//! Decoders take exactly the bytes of one message. Codes are newtypes with constants, so values that we do not know
//! survive. The section names in the comments are those of the protocol document, `proto.md`.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

mod bytes;
mod chunk;
mod codes;
mod error;
pub mod fuzz;
mod greeting;
mod info;
mod meta;
mod option;
mod reply;
mod request;

pub use chunk::{ErrorChunk, HoleChunk, StatusChunk, WireExtent};
pub use codes::{
    ChunkFlags, ChunkType, ClientFlags, Command, CommandFlags, ErrorCode, InfoCode, OptionCode,
    OptionReplyCode, ServerFlags, TransmissionFlags,
};
pub use error::{DecodeError, EncodeError};
pub use greeting::{ExportNameAnswer, Greeting};
pub use info::{BlockSizeInfo, ExportInfo, Info, InfoRequest};
pub use meta::{MetaContext, MetaRequest};
pub use option::{ListedExport, OptionHeader, OptionReplyHeader, encode_option, encode_reply};
pub use reply::{ChunkHeader, ReplyHeader, SimpleReply};
pub use request::{Request, StatusFilter};

/// Which headers both sides use in the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// Compact requests, simple replies only.
    Simple,
    /// Compact requests, structured replies where the command wants them.
    Structured,
    /// Extended requests and replies with 64-bit lengths.
    Extended,
}

/// Bit 0 of a `base:allocation` extent: the range is not allocated.
pub const ALLOCATION_HOLE: u64 = 1;
/// Bit 1 of a `base:allocation` extent: the range reads as zeros.
pub const ALLOCATION_ZERO: u64 = 2;
/// Bit 0 of a `qemu:dirty-bitmap:NAME` extent: the range was written.
pub const BITMAP_DIRTY: u64 = 1;
