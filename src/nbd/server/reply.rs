//! Replies on their way to a client: headers and bytes in pieces, sent together without copying.

use std::io::{self, IoSlice};

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::OwnedSemaphorePermit;

use super::super::session::{Extent, limits};
use super::super::transport::write_slices;
use super::super::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Dialect, EncodeError, ErrorChunk, ErrorCode, HoleChunk,
    SimpleReply, StatusChunk, WireExtent,
};
use super::source::{Part, SourceRead};
use crate::range::ByteRange;

/// The request that a reply answers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answered {
    pub(super) dialect: Dialect,
    pub(super) cookie: u64,
    pub(super) offset: u64,
}

/// A reply or a part of one, with what its request holds until it is sent.
#[derive(Debug, Default)]
pub(super) struct Reply {
    heads: Vec<u8>,
    buf: Vec<u8>,
    pieces: Vec<Piece>,
    permits: Vec<OwnedSemaphorePermit>,
}

#[derive(Debug)]
enum Piece {
    /// The next bytes of `heads`.
    Head(usize),
    /// The next bytes of `buf`.
    Buffered(usize),
    Shared(Bytes),
    Zeros(u64),
}

impl Reply {
    /// Reports success without bytes.
    pub(super) fn success(to: Answered) -> Result<Self, EncodeError> {
        let mut reply = Self::default();
        match to.dialect {
            Dialect::Simple | Dialect::Structured => reply.simple(to, ErrorCode::OK),
            Dialect::Extended => reply.chunk(to, ChunkType::NONE, 0, true)?,
        }
        Ok(reply)
    }

    /// Reports success of a read of no bytes, for which structured replies have a chunk of their own.
    pub(super) fn empty_read(to: Answered) -> Result<Self, EncodeError> {
        let mut reply = Self::default();
        match to.dialect {
            Dialect::Simple => reply.simple(to, ErrorCode::OK),
            Dialect::Structured | Dialect::Extended => reply.chunk(to, ChunkType::NONE, 0, true)?,
        }
        Ok(reply)
    }

    /// Reports an error and ends the reply.
    pub(super) fn error(to: Answered, code: ErrorCode, text: &str) -> Result<Self, EncodeError> {
        let mut reply = Self::default();
        if to.dialect == Dialect::Simple {
            reply.simple(to, code);
            return Ok(reply);
        }
        let end = text.floor_char_boundary(limits::MAX_ERROR_TEXT_SENT);
        let error = ErrorChunk {
            code,
            text: text.get(..end).unwrap_or_default().to_owned(),
            offset: None,
        };
        let mut payload = Vec::new();
        let kind = error.encode(&mut payload)?;
        reply.chunk(to, kind, payload.len() as u64, true)?;
        reply.head(&payload);
        Ok(reply)
    }

    /// Sends the bytes of `range`; `in_one` if they may not be cut into chunks, `done` if the reply ends with them.
    pub(super) fn read(
        to: Answered,
        range: ByteRange,
        found: SourceRead,
        in_one: bool,
        done: bool,
    ) -> Result<Self, EncodeError> {
        let mut reply = Self {
            buf: found.buf,
            ..Self::default()
        };
        if to.dialect == Dialect::Simple {
            reply.simple(to, ErrorCode::OK);
            reply.put(found.parts);
            return Ok(reply);
        }
        let all_hole = matches!(found.parts.as_slice(), [Part::Hole(_)]);
        let runs = match in_one && !all_hole {
            true => vec![found.parts],
            false => runs(found.parts),
        };
        let last = runs.len().saturating_sub(1);
        let mut at = range.start();
        for (index, run) in runs.into_iter().enumerate() {
            let length = run.iter().map(Part::len).fold(0, u64::saturating_add);
            let done = done && index == last;
            match run.as_slice() {
                [Part::Hole(_)] => reply.hole(to, at, length, done)?,
                _ => {
                    let payload = length.saturating_add(8);
                    reply.chunk(to, ChunkType::OFFSET_DATA, payload, done)?;
                    reply.head(&at.to_be_bytes());
                    reply.put(run);
                }
            }
            at = at.saturating_add(length);
        }
        Ok(reply)
    }

    /// Sends the extents of each chosen context.
    pub(super) fn status(
        to: Answered,
        found: Vec<(u32, Vec<Extent>)>,
    ) -> Result<Self, EncodeError> {
        let mut reply = Self::default();
        let last = found.len().saturating_sub(1);
        for (index, (context, extents)) in found.into_iter().enumerate() {
            let extents = extents.iter().map(|extent| WireExtent {
                length: extent.range.len(),
                flags: extent.flags,
            });
            let chunk = StatusChunk {
                context,
                extents: extents.collect(),
            };
            let mut payload = Vec::new();
            let kind = match to.dialect {
                Dialect::Extended => {
                    chunk.encode_extended(&mut payload)?;
                    ChunkType::BLOCK_STATUS_EXT
                }
                Dialect::Simple | Dialect::Structured => {
                    chunk.encode_compact(&mut payload)?;
                    ChunkType::BLOCK_STATUS
                }
            };
            reply.chunk(to, kind, payload.len() as u64, index == last)?;
            reply.head(&payload);
        }
        Ok(reply)
    }

    /// Keeps what the request holds until the reply is sent.
    pub(super) fn holding(mut self, permits: Vec<OwnedSemaphorePermit>) -> Self {
        self.permits = permits;
        self
    }

    /// Returns the buffer for another use.
    pub(super) fn into_buf(self) -> Vec<u8> {
        self.buf
    }

    /// Adds the pieces' bytes in their order.
    fn slices<'a>(&'a self, out: &mut Vec<IoSlice<'a>>) {
        let (mut heads, mut buf) = (self.heads.as_slice(), self.buf.as_slice());
        for piece in &self.pieces {
            match piece {
                Piece::Head(length) => out.push(IoSlice::new(take(&mut heads, *length))),
                Piece::Buffered(length) => out.push(IoSlice::new(take(&mut buf, *length))),
                Piece::Shared(bytes) => out.push(IoSlice::new(bytes)),
                Piece::Zeros(length) => {
                    let mut left = *length;
                    while left > 0 {
                        let step = left.min(ZEROS.len() as u64);
                        out.push(IoSlice::new(ZEROS.get(..step as usize).unwrap_or(&[])));
                        left -= step;
                    }
                }
            }
        }
    }

    fn simple(&mut self, to: Answered, error: ErrorCode) {
        let before = self.heads.len();
        let cookie = to.cookie;
        SimpleReply { error, cookie }.encode(&mut self.heads);
        self.put_head(before);
    }

    fn chunk(
        &mut self,
        to: Answered,
        kind: ChunkType,
        length: u64,
        done: bool,
    ) -> Result<(), EncodeError> {
        let header = ChunkHeader {
            flags: if done {
                ChunkFlags::DONE
            } else {
                ChunkFlags::NONE
            },
            kind,
            cookie: to.cookie,
            offset: (to.dialect == Dialect::Extended).then_some(to.offset),
            length,
        };
        let before = self.heads.len();
        header.encode(&mut self.heads)?;
        self.put_head(before);
        Ok(())
    }

    fn hole(
        &mut self,
        to: Answered,
        offset: u64,
        length: u64,
        done: bool,
    ) -> Result<(), EncodeError> {
        let length = u32::try_from(length).map_err(|_| EncodeError {
            what: "the length of a hole chunk",
            value: length,
        })?;
        self.chunk(to, ChunkType::OFFSET_HOLE, HoleChunk::LEN as u64, done)?;
        let before = self.heads.len();
        HoleChunk { offset, length }.encode(&mut self.heads);
        self.put_head(before);
        Ok(())
    }

    fn head(&mut self, bytes: &[u8]) {
        let before = self.heads.len();
        self.heads.extend_from_slice(bytes);
        self.put_head(before);
    }

    /// Makes a piece of what was added to `heads`.
    fn put_head(&mut self, before: usize) {
        let added = self.heads.len() - before;
        match self.pieces.last_mut() {
            Some(Piece::Head(length)) => *length += added,
            _ => self.pieces.push(Piece::Head(added)),
        }
    }

    fn put(&mut self, parts: Vec<Part>) {
        self.pieces.extend(parts.into_iter().map(|part| match part {
            Part::Buffered(length) => Piece::Buffered(length),
            Part::Shared(bytes) => Piece::Shared(bytes),
            Part::Hole(length) => Piece::Zeros(length),
        }));
    }
}

/// Sends replies, as many pieces as possible in one system call.
pub(super) async fn send(
    write: &mut (impl AsyncWrite + Unpin),
    replies: &[Reply],
) -> io::Result<()> {
    let mut slices = Vec::new();
    for reply in replies {
        reply.slices(&mut slices);
    }
    write_slices(write, &mut slices).await?;
    write.flush().await
}

/// Splits parts into runs of data and single holes.
fn runs(parts: Vec<Part>) -> Vec<Vec<Part>> {
    let mut runs: Vec<Vec<Part>> = Vec::new();
    for part in parts {
        let is_data = |part: &Part| !matches!(part, Part::Hole(_));
        match runs.last_mut() {
            Some(run) if is_data(&part) && run.last().is_some_and(is_data) => run.push(part),
            _ => runs.push(vec![part]),
        }
    }
    runs
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (head, rest) = bytes.split_at_checked(length).unwrap_or((bytes, &[]));
    *bytes = rest;
    head
}

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
