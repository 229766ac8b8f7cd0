//! What a fuzzer calls with any bytes, for each decoder: none may panic, and what decodes encodes to the same message.

use super::{
    ChunkHeader, ChunkType, Dialect, ErrorChunk, ExportNameAnswer, Greeting, HoleChunk, Info,
    InfoRequest, ListedExport, MetaContext, MetaRequest, OptionHeader, OptionReplyHeader,
    ReplyHeader, Request, StatusChunk, StatusFilter,
};

/// Takes the first byte as the choice of a decoder and the rest as its message.
pub fn message(data: &[u8]) {
    let Some((which, bytes)) = data.split_first() else {
        return;
    };
    match which % 18 {
        0 => drop(Greeting::decode(bytes)),
        1 => drop(ExportNameAnswer::decode(bytes)),
        2 => drop(OptionHeader::decode(bytes)),
        3 => drop(OptionReplyHeader::decode(bytes)),
        4 => again(bytes, ListedExport::decode, |m| m.encode().ok()),
        5 => again(bytes, Info::decode, |m| m.encode().ok()),
        6 => again(bytes, InfoRequest::decode, |m| m.encode().ok()),
        7 => again(bytes, MetaRequest::decode, |m| m.encode().ok()),
        8 => again(bytes, MetaContext::decode, |m| Some(m.encode())),
        9 => request(Dialect::Structured, bytes),
        10 => request(Dialect::Extended, bytes),
        11 => again(bytes, StatusFilter::decode, |m| {
            let mut out = Vec::new();
            m.encode(&mut out);
            Some(out)
        }),
        12 => again(bytes, ReplyHeader::decode, |m| {
            let mut out = Vec::new();
            match m {
                ReplyHeader::Simple(simple) => simple.encode(&mut out),
                ReplyHeader::Chunk(chunk) => ChunkHeader::encode(chunk, &mut out).ok()?,
            }
            Some(out)
        }),
        13 => again(bytes, HoleChunk::decode, |m| {
            let mut out = Vec::new();
            m.encode(&mut out);
            Some(out)
        }),
        14 => error(ChunkType::ERROR, bytes),
        15 => error(ChunkType::ERROR_OFFSET, bytes),
        16 => again(
            bytes,
            |bytes| StatusChunk::decode(ChunkType::BLOCK_STATUS, bytes),
            |m| {
                let mut out = Vec::new();
                m.encode_compact(&mut out).ok().map(|()| out)
            },
        ),
        _ => again(
            bytes,
            |bytes| StatusChunk::decode(ChunkType::BLOCK_STATUS_EXT, bytes),
            |m| {
                let mut out = Vec::new();
                m.encode_extended(&mut out).ok().map(|()| out)
            },
        ),
    }
}

fn request(dialect: Dialect, bytes: &[u8]) {
    let decode = |bytes: &[u8]| Request::decode(dialect, bytes);
    again(bytes, decode, |m| {
        let mut out = Vec::new();
        m.encode(dialect, &mut out).ok().map(|()| out)
    });
}

fn error(kind: ChunkType, bytes: &[u8]) {
    let decode = |bytes: &[u8]| ErrorChunk::decode(kind, bytes);
    again(bytes, decode, |m| {
        let mut out = Vec::new();
        // A text that is no UTF-8 is mended, and may not fit any more then.
        m.encode(&mut out).ok().map(|_| out)
    });
}

/// Decodes, encodes and decodes once more: the message has to be the same.
fn again<T: PartialEq + std::fmt::Debug, E>(
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<T, E>,
    encode: impl Fn(&T) -> Option<Vec<u8>>,
) {
    let Ok(message) = decode(bytes) else {
        return;
    };
    if let Some(encoded) = encode(&message) {
        assert_eq!(decode(&encoded).ok(), Some(message));
    }
}
