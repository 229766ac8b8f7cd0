//! Every bound that is put on a peer.

/// The longest export name, context name, description or error text, in bytes ("Conventions": 4096).
pub const MAX_STRING: usize = 4096;

/// The largest export size: offsets have to fit a signed 64-bit number on most systems.
pub const MAX_EXPORT_SIZE: u64 = i64::MAX as u64;

/// The largest minimum block size that the protocol allows.
pub const MAX_MIN_BLOCK: u32 = 64 << 10;

/// The largest read, and the largest write payload, for a peer that does not speak of block sizes.
pub const DEFAULT_MAX_BLOCK: u32 = 32 << 20;

/// As client: the longest answer to an option.
pub const MAX_OPTION_REPLY: u32 = 16 << 10;

/// As client: the most answers to one option, which bounds the exports in a list and the contexts of an export.
pub const MAX_REPLIES_PER_OPTION: u32 = 10_000;

/// As client: the most options sent on one connection; nbdkit closes after 32.
pub const MAX_OPTIONS_SENT: u32 = 30;

/// As client: the longest payload of a block status chunk: 2^20 extents of 64 bits.
pub const MAX_STATUS_PAYLOAD: u64 = (16 << 20) + 8;

/// As client: the longest range of one block status request; some servers fail near 2^32.
pub const MAX_STATUS_RANGE: u64 = 2 << 30;

/// As client: the longest range of one block status request with an extended header: any disk.
pub const MAX_STATUS_RANGE_EXTENDED: u64 = MAX_EXPORT_SIZE;

/// As client: the longest range that one request zeroes or gives up, so that no server is silent over it for long.
pub const MAX_ZERO_RANGE: u64 = 1 << 30;

/// As client: the same where the request may only be fast.
pub const MAX_FAST_ZERO_RANGE: u64 = 2 << 30;

/// As client: the longest payload of an error chunk, 14 bytes of fields around a text.
pub const MAX_ERROR_PAYLOAD: u64 = 14 + MAX_STRING as u64;

/// As client: the most error chunks in one reply.
pub const MAX_ERRORS_PER_REPLY: u32 = 64;

/// As client: the most chunks of a reply to a read that may come in another order than that of the disk.
pub const MAX_SCATTERED_CHUNKS: u32 = 4096;

/// As client: a reply to a read may have this many chunks, and one more for each [`BYTES_PER_CHUNK`] bytes.
pub const FREE_CHUNKS: u64 = 64;

/// See [`FREE_CHUNKS`].
pub const BYTES_PER_CHUNK: u64 = 512;

/// As server: the longest option that is taken in.
pub const MAX_OPTION: u32 = 64 << 10;

/// As server: the longest option that is read and refused; a longer one ends the connection.
pub const MAX_OPTION_DRAINED: u32 = 32 << 20;

/// As server: the number of bytes that are thrown away at a time.
pub const DRAIN_STEP: usize = 64 << 10;

/// As server: the most options on one connection.
pub const MAX_OPTIONS_RECEIVED: u32 = 1000;

/// As server: the longest error text sent; QEMU hangs up when an error's payload exceeds 1000 bytes.
pub const MAX_ERROR_TEXT_SENT: usize = 800;

/// As server: the most extents in one block status chunk.
pub const MAX_EXTENTS_SENT: usize = 64 << 10;

/// As server: a write that is refused is read and thrown away up to this multiple of the largest block.
pub const DRAINED_WRITE_BLOCKS: u64 = 2;
