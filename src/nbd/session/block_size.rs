//! The block sizes that both sides agree on.

use super::{PeerMisbehaved, limits};
use crate::nbd::wire::BlockSizeInfo;

/// Least, preferred and greatest size of a request; all checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    min: u32,
    preferred: u32,
    max: u32,
}

impl BlockSize {
    /// What holds for a server that does not speak of block sizes.
    pub const DEFAULT: Self = Self {
        min: 1,
        preferred: 4096,
        max: limits::DEFAULT_MAX_BLOCK,
    };

    /// Checks block sizes of our own; `None` if the protocol forbids them.
    pub fn new(min: u32, preferred: u32, max: u32) -> Option<Self> {
        let lawful = min.is_power_of_two()
            && min <= limits::MAX_MIN_BLOCK
            && preferred.is_power_of_two()
            && preferred >= min.max(512)
            && max >= preferred
            && max.checked_rem(min) == Some(0);
        lawful.then_some(Self {
            min,
            preferred,
            max,
        })
    }

    /// Checks the block sizes that a server sent.
    ///
    /// A greatest size below the preferred one is met in the field and taken: the preferred one is lowered.
    pub fn from_peer(info: BlockSizeInfo) -> Result<Self, PeerMisbehaved> {
        let BlockSizeInfo {
            min,
            preferred,
            max,
        } = info;
        let lawful = min.is_power_of_two()
            && min <= limits::MAX_MIN_BLOCK
            && preferred.is_power_of_two()
            && preferred >= min
            && max >= min;
        if !lawful {
            return Err(PeerMisbehaved::BlockSizes {
                min,
                preferred,
                max,
            });
        }
        let max = max.saturating_sub(max.checked_rem(min).unwrap_or(0));
        Ok(Self {
            min,
            preferred: preferred.min(max),
            max,
        })
    }

    /// Each request has to start and end at a multiple of this, a power of two.
    pub const fn min(self) -> u32 {
        self.min
    }

    /// Requests of this size work best.
    pub const fn preferred(self) -> u32 {
        self.preferred
    }

    /// No read and no write may be longer; a multiple of the least size.
    pub const fn max(self) -> u32 {
        self.max
    }
}

impl From<BlockSize> for BlockSizeInfo {
    fn from(sizes: BlockSize) -> Self {
        Self {
            min: sizes.min,
            preferred: sizes.preferred,
            max: sizes.max,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_peer(min: u32, preferred: u32, max: u32) -> Result<BlockSize, PeerMisbehaved> {
        BlockSize::from_peer(BlockSizeInfo {
            min,
            preferred,
            max,
        })
    }

    #[test]
    fn server_sends_block_sizes_that_make_no_sense() {
        for (min, preferred, max) in [
            (0, 4096, 65536),
            (3, 4096, 65536),
            (128 << 10, 128 << 10, 1 << 20),
            (512, 256, 65536),
            (512, 0, 65536),
            (512, 1000, 65536),
            (512, 4096, 256),
            (1, 1, 0),
        ] {
            assert!(from_peer(min, preferred, max).is_err(), "{min}");
        }
    }

    #[test]
    fn server_sends_a_greatest_size_below_the_preferred_one() {
        let sizes = from_peer(1, 4096, 100).unwrap();
        assert_eq!((sizes.preferred(), sizes.max()), (100, 100));
    }

    #[test]
    fn greatest_size_is_cut_to_whole_blocks() {
        let sizes = from_peer(512, 4096, u32::MAX).unwrap();
        assert_eq!(sizes.max(), u32::MAX - 511);
    }
}
