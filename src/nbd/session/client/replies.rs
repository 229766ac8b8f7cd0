//! Takes a server's replies apart and holds each to its request.

use super::super::{BlockSize, PeerMisbehaved, SessionError, extents_of_reply, limits};
use super::in_flight::Entry;
use super::{Asked, Finished, InFlight, Outcome, RequestFailed};
use crate::nbd::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Command, Dialect, ErrorChunk, ErrorCode, HoleChunk,
    MetaContext, ReplyHeader, SimpleReply, StatusChunk,
};
use crate::range::ByteRange;

/// The state of the reply stream of one connection.
#[derive(Debug)]
pub struct Replies {
    dialect: Dialect,
    contexts: Vec<u32>,
    block_size: BlockSize,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Between two messages.
    Header,
    /// Within a header that is longer than the shortest.
    HeaderRest {
        start: [u8; ReplyHeader::LONGEST],
        have: usize,
        length: usize,
    },
    /// Before the offset of a data chunk.
    DataOffset(ChunkHeader),
    /// Before the payload of any other chunk.
    Payload(ChunkHeader),
    /// Within bytes of the disk, which the owner takes.
    Data { cookie: u64, done: bool },
}

/// What a part of a reply led to.
#[derive(Debug)]
pub enum Event<T> {
    /// More has to come.
    More,
    /// The next `length` bytes of the stream are the disk's; [`Replies::data_taken`] has to follow.
    Data {
        /// The request's cookie.
        cookie: u64,
        /// The bytes' place, counted from the request's start.
        at: u64,
        /// Their number.
        length: u64,
    },
    /// A reply is complete.
    Finished(Finished<T>),
}

impl Replies {
    /// Starts before the first reply.
    pub fn new(dialect: Dialect, contexts: &[MetaContext], block_size: BlockSize) -> Self {
        Self {
            dialect,
            contexts: contexts.iter().map(|context| context.id).collect(),
            block_size,
            stage: Stage::Header,
        }
    }

    /// Whether the stream stands between two messages.
    pub const fn at_boundary(&self) -> bool {
        matches!(self.stage, Stage::Header)
    }

    /// The number of bytes that [`Replies::handle`] wants, bounded by `limits`; zero while the owner takes data.
    pub fn wanted(&self) -> usize {
        match &self.stage {
            Stage::Header => ReplyHeader::shortest(self.dialect),
            Stage::HeaderRest { have, length, .. } => length.saturating_sub(*have),
            Stage::DataOffset(_) => DATA_OFFSET,
            Stage::Payload(header) => usize::try_from(header.length).unwrap_or(usize::MAX),
            Stage::Data { .. } => 0,
        }
    }

    /// Takes exactly the bytes that are wanted.
    pub fn handle<T>(
        &mut self,
        bytes: &[u8],
        requests: &mut InFlight<T>,
    ) -> Result<Event<T>, SessionError> {
        match std::mem::replace(&mut self.stage, Stage::Header) {
            Stage::Header => {
                let length = ReplyHeader::length(self.dialect, bytes)?;
                if length > bytes.len() {
                    let mut start = [0; ReplyHeader::LONGEST];
                    let have = put(&mut start, 0, bytes);
                    self.stage = Stage::HeaderRest {
                        start,
                        have,
                        length,
                    };
                    return Ok(Event::More);
                }
                self.handle_header(ReplyHeader::decode(bytes)?, requests)
            }
            Stage::HeaderRest {
                mut start, have, ..
            } => {
                let have = put(&mut start, have, bytes);
                let header = start.get(..have).unwrap_or_default();
                self.handle_header(ReplyHeader::decode(header)?, requests)
            }
            Stage::DataOffset(header) => self.handle_data_offset(header, bytes, requests),
            Stage::Payload(header) => self.handle_payload(header, bytes, requests),
            Stage::Data { cookie, done } => {
                self.stage = Stage::Data { cookie, done };
                Ok(Event::More)
            }
        }
    }

    /// Goes on behind the data of [`Event::Data`].
    pub fn data_taken<T>(&mut self, requests: &mut InFlight<T>) -> Result<Event<T>, SessionError> {
        match std::mem::replace(&mut self.stage, Stage::Header) {
            Stage::Data { cookie, done: true } => self.finish(cookie, requests),
            Stage::Data { done: false, .. } => Ok(Event::More),
            other => {
                self.stage = other;
                Ok(Event::More)
            }
        }
    }

    fn handle_header<T>(
        &mut self,
        header: ReplyHeader,
        requests: &mut InFlight<T>,
    ) -> Result<Event<T>, SessionError> {
        match header {
            ReplyHeader::Simple(simple) => self.handle_simple(simple, requests),
            ReplyHeader::Chunk(header) => self.handle_chunk_header(header, requests),
        }
    }

    fn handle_simple<T>(
        &mut self,
        simple: SimpleReply,
        requests: &mut InFlight<T>,
    ) -> Result<Event<T>, SessionError> {
        let SimpleReply { error, cookie } = simple;
        let entry = requests.entry(cookie)?;
        let command = entry.asked.command();
        let failed = error != ErrorCode::OK;
        match entry.asked {
            Asked::Read(range) if self.dialect == Dialect::Simple && !failed => {
                entry.coverage.add(range.start(), range.len())?;
                self.stage = Stage::Data { cookie, done: true };
                Ok(Event::Data {
                    cookie,
                    at: 0,
                    length: range.len(),
                })
            }
            Asked::Read(_) if self.dialect != Dialect::Simple => {
                Err(PeerMisbehaved::SimpleReply { command }.into())
            }
            Asked::Status { .. } if !failed => Err(PeerMisbehaved::SimpleReply { command }.into()),
            Asked::Effect { .. } if !failed => self.finish(cookie, requests),
            Asked::Read(_) | Asked::Status { .. } | Asked::Effect { .. } => {
                fail(entry, error, String::new(), None)?;
                self.finish(cookie, requests)
            }
        }
    }

    /// Checks what the header alone tells, so that no payload is read whose length is not bounded.
    fn handle_chunk_header<T>(
        &mut self,
        header: ChunkHeader,
        requests: &mut InFlight<T>,
    ) -> Result<Event<T>, SessionError> {
        let ChunkHeader { kind, length, .. } = header;
        let entry = requests.entry(header.cookie)?;
        let asked = entry.asked;
        if let Some(got) = header.offset
            && got != asked.range().start()
        {
            return Err(PeerMisbehaved::OtherOffset {
                got,
                wanted: asked.range().start(),
            }
            .into());
        }
        let (least, most) = match kind {
            ChunkType::NONE => (0, 0),
            ChunkType::OFFSET_DATA => (
                (DATA_OFFSET as u64).saturating_add(1),
                (DATA_OFFSET as u64).saturating_add(asked.range().len()),
            ),
            ChunkType::OFFSET_HOLE => (HoleChunk::LEN as u64, HoleChunk::LEN as u64),
            ChunkType::BLOCK_STATUS if self.dialect != Dialect::Extended => {
                (4, limits::MAX_STATUS_PAYLOAD)
            }
            ChunkType::BLOCK_STATUS_EXT if self.dialect == Dialect::Extended => {
                (8, limits::MAX_STATUS_PAYLOAD)
            }
            kind if kind.is_error() => (6, limits::MAX_ERROR_PAYLOAD),
            kind => return Err(PeerMisbehaved::UnknownChunk { kind }.into()),
        };
        if length < least || length > most {
            return Err(PeerMisbehaved::ChunkLength { kind, length }.into());
        }
        let command = asked.command();
        let fits = match kind {
            ChunkType::OFFSET_DATA | ChunkType::OFFSET_HOLE => command == Command::READ,
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT => {
                command == Command::BLOCK_STATUS
            }
            _ => true,
        };
        if !fits {
            return Err(PeerMisbehaved::WrongChunk { kind, command }.into());
        }
        match kind {
            ChunkType::NONE if !header.flags.has(ChunkFlags::DONE) => {
                Err(PeerMisbehaved::NoneWithoutDone.into())
            }
            ChunkType::NONE => self.finish(header.cookie, requests),
            ChunkType::OFFSET_DATA => {
                self.stage = Stage::DataOffset(header);
                Ok(Event::More)
            }
            _ => {
                self.stage = Stage::Payload(header);
                Ok(Event::More)
            }
        }
    }

    fn handle_data_offset<T>(
        &mut self,
        header: ChunkHeader,
        bytes: &[u8],
        requests: &mut InFlight<T>,
    ) -> Result<Event<T>, SessionError> {
        let offset = bytes.first_chunk().copied().map_or(0, u64::from_be_bytes);
        let length = header.length.saturating_sub(DATA_OFFSET as u64);
        let cookie = header.cookie;
        let entry = requests.entry(cookie)?;
        entry.coverage.add(offset, length)?;
        self.stage = Stage::Data {
            cookie,
            done: header.flags.has(ChunkFlags::DONE),
        };
        Ok(Event::Data {
            cookie,
            at: offset.saturating_sub(entry.asked.range().start()),
            length,
        })
    }

    fn handle_payload<T>(
        &mut self,
        header: ChunkHeader,
        payload: &[u8],
        requests: &mut InFlight<T>,
    ) -> Result<Event<T>, SessionError> {
        let entry = requests.entry(header.cookie)?;
        match header.kind {
            ChunkType::OFFSET_HOLE => take_hole(entry, HoleChunk::decode(payload)?)?,
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT => {
                let chunk = StatusChunk::decode(header.kind, payload)?;
                self.take_status(entry, &chunk)?;
            }
            kind => {
                let error = ErrorChunk::decode(kind, payload)?;
                fail(entry, error.code, error.text, error.offset)?;
            }
        }
        if header.flags.has(ChunkFlags::DONE) {
            return self.finish(header.cookie, requests);
        }
        Ok(Event::More)
    }

    fn take_status<T>(
        &self,
        entry: &mut Entry<T>,
        chunk: &StatusChunk,
    ) -> Result<(), SessionError> {
        let id = chunk.context;
        let Some(at) = self.contexts.iter().position(|context| *context == id) else {
            return Err(PeerMisbehaved::UnknownContext { id }.into());
        };
        if let Asked::Status {
            only: Some(only), ..
        } = entry.asked
            && only != at
        {
            return Err(PeerMisbehaved::StatusNotAsked { id }.into());
        }
        let extents = extents_of_reply(chunk, entry.asked.range(), self.block_size)?;
        entry.status.resize(self.contexts.len(), None);
        match entry.status.get_mut(at) {
            Some(slot @ None) => {
                *slot = Some(extents);
                Ok(())
            }
            Some(Some(_)) | None => Err(PeerMisbehaved::StatusTwice { id }.into()),
        }
    }

    /// Ends a reply: everything asked for has come, or an error.
    fn finish<T>(&self, cookie: u64, requests: &mut InFlight<T>) -> Result<Event<T>, SessionError> {
        let entry = requests.entry(cookie)?;
        let outcome = match (entry.error.take(), entry.asked) {
            (Some(error), _) => Outcome::Failed(error),
            (None, Asked::Read(_)) => {
                entry.coverage.finish()?;
                Outcome::Read(merged(std::mem::take(&mut entry.holes)))
            }
            (None, Asked::Effect { .. }) => Outcome::Done,
            (
                None,
                Asked::Status {
                    range: request,
                    only,
                },
            ) => {
                let mut found = Vec::new();
                let mut came = std::mem::take(&mut entry.status).into_iter();
                for (at, id) in self.contexts.iter().enumerate() {
                    let came = came.next().flatten();
                    if only.is_some_and(|only| only != at) {
                        continue;
                    }
                    match came {
                        Some(extents) => found.push(extents),
                        None => {
                            return Err(PeerMisbehaved::StatusMissing { id: *id, request }.into());
                        }
                    }
                }
                Outcome::Status(found)
            }
        };
        let owner = requests.take(cookie)?.owner;
        Ok(Event::Finished(Finished { owner, outcome }))
    }
}

fn take_hole<T>(entry: &mut Entry<T>, hole: HoleChunk) -> Result<(), SessionError> {
    let HoleChunk { offset, length } = hole;
    if length == 0 {
        return Err(PeerMisbehaved::EmptyHole { offset }.into());
    }
    let range = entry.coverage.add(offset, u64::from(length))?;
    entry.holes.push(range);
    Ok(())
}

/// Notes why a request failed: the first reason counts, since later ones are mostly its consequences.
fn fail<T>(
    entry: &mut Entry<T>,
    code: ErrorCode,
    text: String,
    offset: Option<u64>,
) -> Result<(), SessionError> {
    entry.errors = entry.errors.saturating_add(1);
    if entry.errors > limits::MAX_ERRORS_PER_REPLY {
        return Err(PeerMisbehaved::TooManyErrors {
            most: limits::MAX_ERRORS_PER_REPLY,
        }
        .into());
    }
    let range = entry.asked.range();
    let within = |at: &u64| (range.start()..range.end()).contains(at);
    entry.error.get_or_insert(RequestFailed {
        command: entry.asked.command(),
        range,
        code: match code {
            ErrorCode::OK => ErrorCode::EINVAL,
            code => code,
        },
        text,
        offset: offset.filter(within),
    });
    Ok(())
}

/// Adds bytes to a header that has `have` of them, and returns how many it has then.
fn put(header: &mut [u8; ReplyHeader::LONGEST], have: usize, bytes: &[u8]) -> usize {
    let rest = header.iter_mut().skip(have);
    rest.zip(bytes).for_each(|(to, from)| *to = *from);
    have.saturating_add(bytes.len()).min(header.len())
}

/// Sorts holes and joins those that touch.
fn merged(mut holes: Vec<ByteRange>) -> Vec<ByteRange> {
    holes.sort_unstable();
    holes.dedup_by(|next, before| {
        let joined = ByteRange::new(before.start(), next.end());
        match joined {
            Some(joined) if before.end() == next.start() => {
                *before = joined;
                true
            }
            _ => false,
        }
    });
    holes
}

/// The bytes before the data in a data chunk.
const DATA_OFFSET: usize = 8;
