//! How a range is to be made zero.

use crate::nbd::wire::CommandFlags;

/// How a range is to be made zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zeroing {
    /// Whether it has to be on stable storage before the reply.
    pub durable: bool,
    /// Whether the range has to stay allocated.
    pub keep_allocated: bool,
    /// Whether to fail rather than to take as long as writing zeros would.
    pub fast: bool,
}

impl From<CommandFlags> for Zeroing {
    fn from(flags: CommandFlags) -> Self {
        Self {
            durable: flags.has(CommandFlags::FUA),
            keep_allocated: flags.has(CommandFlags::NO_HOLE),
            fast: flags.has(CommandFlags::FAST_ZERO),
        }
    }
}
