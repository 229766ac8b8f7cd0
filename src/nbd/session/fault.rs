//! What a peer can do wrong, sorted by kind.

use super::limits;
use crate::nbd::wire::{ChunkType, Command, DecodeError, EncodeError, OptionCode, OptionReplyCode};
use crate::range::ByteRange;

/// Why a session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The peer's bytes do not parse.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The peer's bytes parse and break the protocol.
    #[error(transparent)]
    Misbehaved(#[from] PeerMisbehaved),
    /// The peer keeps to the protocol and is of no use.
    #[error(transparent)]
    Incompatible(#[from] PeerIncompatible),
    /// Our own message has no bytes, since a value of it is too large.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// A breach of the protocol by the peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the fields are the values that the texts show
pub enum PeerMisbehaved {
    /// An answer to an option that was not sent.
    #[error("server answered option {got} when {sent} was asked")]
    AnswerToOther { sent: OptionCode, got: OptionCode },
    /// An answer past the limit.
    #[error("server's answer to {option} has {length} bytes, at most {most} are accepted")]
    AnswerTooLong {
        option: OptionCode,
        length: u32,
        most: u32,
    },
    /// Answers without end.
    #[error("server sent more than {most} answers to {option}")]
    TooManyAnswers { option: OptionCode, most: u32 },
    /// A kind of answer that the option does not have.
    #[error("server answered {option} with {code}")]
    UnexpectedAnswer {
        option: OptionCode,
        code: OptionReplyCode,
    },
    /// An acknowledgement that carries bytes.
    #[error("server acknowledged {option} with a payload of {length} bytes")]
    AckWithPayload { option: OptionCode, length: usize },
    /// An export without its size.
    #[error("server acknowledged {option} without telling the export's size")]
    NoExportInfo { option: OptionCode },
    /// A size that no disk has.
    #[error("server says that the export has {size} bytes, more than 2^63-1")]
    SizeTooLarge { size: u64 },
    /// Block sizes that the protocol forbids.
    #[error("server's block sizes make no sense: least {min}, preferred {preferred}, most {max}")]
    BlockSizes { min: u32, preferred: u32, max: u32 },
    /// A text longer than any may be.
    #[error("{what} of {length} bytes exceeds {most}", most = limits::MAX_STRING)]
    StringTooLong { what: &'static str, length: usize },
    /// A context that was not asked for.
    #[error("server chose metadata context {name:?}, which was not asked for")]
    ContextNotAsked { name: String },
    /// A context that was granted twice.
    #[error("server granted metadata context {name:?} or its id {id} twice")]
    ContextTwice { name: String, id: u32 },
    /// A reply to no request.
    #[error("server replied to a request that is not in flight, cookie {cookie:#x}")]
    UnknownCookie { cookie: u64 },
    /// A simple reply where a structured one has to stand.
    #[error("server sent a simple reply to {command}")]
    SimpleReply { command: Command },
    /// An extended reply with another request's offset.
    #[error("server replied with offset {got:#x} to a request at {wanted:#x}")]
    OtherOffset { got: u64, wanted: u64 },
    /// A chunk whose length its type does not allow.
    #[error("server sent a reply chunk {kind} of {length} bytes")]
    ChunkLength { kind: ChunkType, length: u64 },
    /// A chunk type that is neither known nor an error.
    #[error("server sent a reply chunk of unknown type {kind}")]
    UnknownChunk { kind: ChunkType },
    /// An empty chunk that does not end its reply.
    #[error("server sent an empty reply chunk that does not end its reply")]
    NoneWithoutDone,
    /// A chunk that does not fit the command.
    #[error("server sent a reply chunk {kind} for {command}")]
    WrongChunk { kind: ChunkType, command: Command },
    /// Bytes that were not asked for.
    #[error("reply chunk covers {chunk}, outside the request {request}")]
    ChunkOutside {
        chunk: ByteRange,
        request: ByteRange,
    },
    /// A chunk whose end does not fit 64 bits.
    #[error("reply chunk of {length} bytes at {offset:#x} passes 2^64")]
    ChunkPastEnd { offset: u64, length: u64 },
    /// Bytes sent twice.
    #[error("reply chunk covers {chunk}, part of which came before in the reply to {request}")]
    ChunkOverlap {
        chunk: ByteRange,
        request: ByteRange,
    },
    /// A hole of no bytes.
    #[error("reply chunk at {offset:#x} is a hole of no bytes")]
    EmptyHole { offset: u64 },
    /// A read that was cut into dust.
    #[error("reply to the read of {request} is cut into more than {most} chunks")]
    TooManyChunks { request: ByteRange, most: u64 },
    /// Errors without end.
    #[error("server sent more than {most} errors for one request")]
    TooManyErrors { most: u32 },
    /// A read that ended before all bytes came.
    #[error("reply to the read of {request} ended after {covered} of its bytes")]
    ShortRead { request: ByteRange, covered: u64 },
    /// Status of an unknown context.
    #[error("block status names metadata context id {id}, which was not granted")]
    UnknownContext { id: u32 },
    /// Status of a context that the request left out.
    #[error("block status names metadata context id {id}, which this request did not ask")]
    StatusNotAsked { id: u32 },
    /// Two statuses of one context.
    #[error("block status of metadata context id {id} came twice in one reply")]
    StatusTwice { id: u32 },
    /// No status of a granted context.
    #[error("block status of metadata context id {id} is missing in the reply to {request}")]
    StatusMissing { id: u32, request: ByteRange },
    /// A status without extents.
    #[error("block status of metadata context id {id} has no extent")]
    NoExtent { id: u32 },
    /// An extent of no bytes.
    #[error("block status of metadata context id {id} has an extent of no bytes at {offset:#x}")]
    EmptyExtent { id: u32, offset: u64 },
    /// A status that covers less than a block.
    #[error(
        "block status of metadata context id {id} ends at {end:#x}, within the first block of {request}"
    )]
    NoProgress {
        id: u32,
        end: u64,
        request: ByteRange,
    },
    /// A client flag that was not offered.
    #[error("client set flags {flags:#x}, which were not offered")]
    UnknownClientFlags { flags: u32 },
    /// An option that only fixed newstyle has.
    #[error("client sent option {option} without fixed newstyle")]
    OptionWithoutFixed { option: OptionCode },
    /// The old way to an export, which extended headers leave behind.
    #[error("client sent option EXPORT_NAME after EXTENDED_HEADERS")]
    ExportNameExtended,
    /// An option too long to read past.
    #[error("client sent option {option} with {length} bytes, at most {most} are read")]
    OptionTooLong {
        option: OptionCode,
        length: u32,
        most: u32,
    },
    /// Options without end.
    #[error("client sent more than {most} options")]
    TooManyOptions { most: u32 },
    /// A write too long to read past.
    #[error("client sent a payload of {length} bytes, at most {most} are read")]
    PayloadTooLong { length: u64, most: u64 },
}

/// A peer that keeps to the protocol and is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the fields are the values that the texts show
pub enum PeerIncompatible {
    /// A server that knows no export names, options or TLS.
    #[error("server speaks oldstyle NBD, which has no export names and no dirty bitmaps")]
    Oldstyle,
    /// A server without the fixes to newstyle.
    #[error("server does not speak fixed newstyle, so {wanted} cannot be asked for")]
    NotFixed { wanted: OptionCode },
    /// More options than some servers take.
    #[error("more than {most} options on one connection")]
    OptionsSpent { most: u32 },
    /// A client that wants an export in the clear where only TLS will do, and cannot be told.
    #[error("client asked by EXPORT_NAME for an export without TLS")]
    WithoutTls,
    /// A client that wants an export that is not there, and cannot be told.
    #[error("client asked by EXPORT_NAME for the unknown export {name:?}")]
    NoSuchExport { name: String },
}

/// A lawful refusal of an option, with the server's own words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("server refused {option} with {code}{}", shown(.text))]
pub struct Refused {
    /// The option.
    pub option: OptionCode,
    /// The kind of refusal.
    pub code: OptionReplyCode,
    /// The server's own words; may be empty.
    pub text: String,
}

/// Shows a peer's words so that they cannot fake lines or colours on a terminal.
fn shown(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(": {}", text.escape_debug())
    }
}
