//! What the server needs of an export: the disk behind it.

use bytes::Bytes;
use futures::future::BoxFuture;

use super::super::session::server::Offer;
use super::super::session::{BlockSize, Extent, Zeroing};
use super::super::wire::{ErrorCode, TransmissionFlags};
use crate::range::ByteRange;

/// What a disk can do that takes all commands, quickly, and over any number of connections.
pub fn all_abilities() -> TransmissionFlags {
    TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_TRIM
        | TransmissionFlags::SEND_WRITE_ZEROES
        | TransmissionFlags::SEND_FAST_ZERO
        | TransmissionFlags::SEND_CACHE
        | TransmissionFlags::CAN_MULTI_CONN
}

/// A disk that a server can offer; requests come from many tasks at once.
///
/// What describes the disk must not change while it is offered: it is asked for once. No bytes are asked for before a
/// client has chosen the export.
pub trait ExportSource: Send + Sync + 'static {
    /// The size in bytes; a multiple of the least block size.
    fn size_bytes(&self) -> u64;

    /// A text for people, at most 4096 bytes.
    fn description(&self) -> Option<String> {
        None
    }

    /// The block sizes; by default any request up to 32 MiB is taken.
    fn block_size(&self) -> BlockSize {
        BlockSize::DEFAULT
    }

    /// The names of the metadata contexts whose extents can be told.
    fn contexts(&self) -> Vec<String> {
        Vec::new()
    }

    /// What clients may do besides reading; by default nothing, of a disk that does not change.
    ///
    /// A disk that can be written leaves `READ_ONLY` out. `CAN_MULTI_CONN` promises that a flush covers what any
    /// connection was told to be done, and `FAST_ZERO` that zeros are quick, or refused as such.
    fn abilities(&self) -> TransmissionFlags {
        Offer::READ_ONLY
    }

    /// Reads a range, which is not empty and lies on the disk.
    ///
    /// `buf` is an empty buffer, perhaps with room, for the bytes; it may be left unused.
    fn read(&self, range: ByteRange, buf: Vec<u8>) -> BoxFuture<'_, Result<SourceRead, NbdError>>;

    /// Tells extents from the range's start on, ascending and without a gap: at least one, at most `most`.
    ///
    /// `context` is the context's place in [`ExportSource::contexts`]. The last extent may end before the range does, at
    /// a multiple of the least block size, or behind it. Asked for only if there are contexts.
    fn extents(
        &self,
        context: usize,
        range: ByteRange,
        most: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdError>>;

    /// Writes bytes, at least one, which lie on the disk; the buffer is given back for another use.
    ///
    /// With `durable` they are on stable storage when this is done.
    fn write(
        &self,
        offset: u64,
        data: Vec<u8>,
        durable: bool,
    ) -> BoxFuture<'_, Result<Vec<u8>, NbdError>> {
        let _ = (offset, data, durable);
        refused()
    }

    /// Makes a range zero, which is not empty.
    fn zero(&self, range: ByteRange, how: Zeroing) -> BoxFuture<'_, Result<(), NbdError>> {
        let _ = (range, how);
        refused()
    }

    /// Gives a range up, which is not empty; it may read as anything that no other disk has to hide.
    fn trim(&self, range: ByteRange, durable: bool) -> BoxFuture<'_, Result<(), NbdError>> {
        let _ = (range, durable);
        refused()
    }

    /// Puts all on stable storage whose writes, zeros and trims are done; by default there is nothing to put.
    fn flush(&self) -> BoxFuture<'_, Result<(), NbdError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

fn refused<T: Send + 'static>() -> BoxFuture<'static, Result<T, NbdError>> {
    Box::pin(std::future::ready(Err(NbdError {
        code: ErrorCode::EPERM,
        text: "the export is read-only".to_owned(),
    })))
}

/// Why a source could not do a request; the client is told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {text}")]
pub struct NbdError {
    /// The kind of fault.
    pub code: ErrorCode,
    /// What happened, in a few words.
    pub text: String,
}

impl NbdError {
    /// A fault of the disk.
    pub fn io(text: impl Into<String>) -> Self {
        Self {
            code: ErrorCode::EIO,
            text: text.into(),
        }
    }
}

/// The bytes of a range, in parts.
///
/// Holes are told apart, so that zeros are neither made nor, if the client understands it, sent.
#[derive(Clone, Debug, Default)]
pub struct SourceRead {
    pub(super) buf: Vec<u8>,
    pub(super) parts: Vec<Part>,
}

/// A part of a range's bytes.
#[derive(Clone, Debug)]
pub(super) enum Part {
    /// The next bytes of the buffer.
    Buffered(usize),
    /// Bytes that lie elsewhere, such as in a cache.
    Shared(Bytes),
    /// Zeros.
    Hole(u64),
}

impl Part {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Buffered(length) => *length as u64,
            Self::Shared(bytes) => bytes.len() as u64,
            Self::Hole(length) => *length,
        }
    }
}

impl SourceRead {
    /// Starts with no part, and a buffer for those that are copied.
    pub fn new(mut buf: Vec<u8>) -> Self {
        buf.clear();
        Self {
            buf,
            parts: Vec::new(),
        }
    }

    /// Starts with no part, and a buffer whose bytes [`SourceRead::push_next`] adds.
    pub fn of_parts(buf: Vec<u8>) -> Self {
        Self {
            buf,
            parts: Vec::new(),
        }
    }

    /// Takes a buffer whose content is the whole range.
    pub fn data(buf: Vec<u8>) -> Self {
        let parts = vec![Part::Buffered(buf.len())];
        Self { buf, parts }
    }

    /// Adds a copy of bytes.
    pub fn push_copy(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
        match self.parts.last_mut() {
            Some(Part::Buffered(length)) => *length += bytes.len(),
            _ if bytes.is_empty() => {}
            _ => self.parts.push(Part::Buffered(bytes.len())),
        }
    }

    /// Adds bytes without copying them.
    pub fn push_shared(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.parts.push(Part::Shared(bytes));
        }
    }

    /// Adds zeros.
    pub fn push_hole(&mut self, length: u64) {
        match self.parts.last_mut() {
            Some(Part::Hole(before)) => *before = before.saturating_add(length),
            _ if length == 0 => {}
            _ => self.parts.push(Part::Hole(length)),
        }
    }

    /// Adds bytes that stand in the buffer behind those that were added from it before.
    pub fn push_next(&mut self, length: u64) {
        match (self.parts.last_mut(), length as usize) {
            (_, 0) => {}
            (Some(Part::Buffered(before)), length) => *before += length,
            (_, length) => self.parts.push(Part::Buffered(length)),
        }
    }

    /// Adds all of another read, without copying it.
    pub fn append(&mut self, other: Self) {
        let buf = Bytes::from(other.buf);
        let mut at = 0;
        for part in other.parts {
            match part {
                Part::Hole(length) => self.push_hole(length),
                Part::Shared(bytes) => self.push_shared(bytes),
                Part::Buffered(length) => {
                    let end = (at + length).min(buf.len());
                    self.push_shared(buf.slice(at..end));
                    at = end;
                }
            }
        }
    }

    /// Copies the bytes, zeros included, into one buffer.
    pub fn into_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len() as usize);
        let mut buffered = &self.buf[..];
        for part in &self.parts {
            match part {
                Part::Hole(length) => bytes.resize(bytes.len() + *length as usize, 0),
                Part::Shared(shared) => bytes.extend_from_slice(shared),
                Part::Buffered(length) => {
                    let (these, rest) = buffered.split_at((*length).min(buffered.len()));
                    bytes.extend_from_slice(these);
                    buffered = rest;
                }
            }
        }
        bytes
    }

    /// The number of bytes so far, zeros included.
    pub fn len(&self) -> u64 {
        self.parts
            .iter()
            .map(Part::len)
            .fold(0, u64::saturating_add)
    }

    /// Whether the buffer holds the bytes that the parts speak of.
    pub(super) fn is_sound(&self) -> bool {
        let buffered = self.parts.iter().map(|part| match part {
            Part::Buffered(length) => *length,
            Part::Shared(_) | Part::Hole(_) => 0,
        });
        buffered.fold(0, usize::saturating_add) <= self.buf.len()
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
