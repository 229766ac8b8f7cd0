//! Records: reading one from its pack, undoing its encryption and its compression.

use super::chunk::{Place, RecordFlags};
use super::cipher::Encryption;
use super::compress::decompress;
use super::error::RepoError;
use super::format::pack::{MAX_RECORD, PackHeader, PackKind};
use super::ids::RepoUuid;
use super::keys::Keys;
use super::storage::Storage;

/// Reads the stored bytes of a record into `stored`.
pub(crate) fn read_stored(
    storage: &dyn Storage,
    kind: PackKind,
    place: &Place,
    stored: &mut Vec<u8>,
) -> Result<(), RepoError> {
    let file = kind.file_name(&place.pack);
    if place.len > MAX_RECORD || place.offset < PackHeader::LEN as u32 {
        return Err(RepoError::corrupt(
            file,
            place.offset.into(),
            format!("no record of {} bytes can be here", place.len),
        ));
    }
    stored.resize(place.len as usize, 0);
    Ok(storage.read_at(&file, place.offset.into(), stored)?)
}

/// What a record must be to be decoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected<'a> {
    pub(crate) repo: RepoUuid,
    pub(crate) kind: PackKind,
    pub(crate) id: &'a [u8; 32],
    pub(crate) place: &'a Place,
    /// The most plain bytes.
    pub(crate) limit: usize,
}

/// Where the plain bytes of a record are, once it is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decoded {
    /// They are the stored bytes themselves.
    Stored,
    /// In the buffer for what was decrypted.
    Opened,
    /// In the buffer for what was decompressed.
    Plain,
}

impl Decoded {
    /// Picks the buffer.
    pub(crate) fn of<'a>(self, stored: &'a [u8], opened: &'a [u8], plain: &'a [u8]) -> &'a [u8] {
        match self {
            Self::Stored => stored,
            Self::Opened => opened,
            Self::Plain => plain,
        }
    }
}

/// Finds the plain bytes of a record, at most as many as expected; they are not yet checked against an identifier.
pub(crate) fn decode(
    keys: &Keys,
    expected: &Expected<'_>,
    stored: &[u8],
    opened: &mut Vec<u8>,
    plain: &mut Vec<u8>,
) -> Result<Decoded, String> {
    let Expected { kind, place, .. } = expected;
    let cipher = keys.pack_cipher(expected.repo, *kind, &place.pack);
    let body: &[u8] = match (cipher, place.flags.encryption()) {
        (None, Some(Encryption::None)) => stored,
        (Some(cipher), Some(Encryption::Aes256Gcm)) => {
            if !cipher.open(place.offset, expected.id, stored, opened) {
                return Err("the record does not decrypt".to_owned());
            }
            opened
        }
        (None, Some(_)) => return Err("the record is encrypted, the repository is not".to_owned()),
        (Some(_), Some(_)) => return Err("the record is not encrypted".to_owned()),
        (_, None) => return Err(unknown(place.flags)),
    };
    match decompress_body(body, place.flags.compression(), expected.limit, plain)? {
        Body::Plain => Ok(Decoded::Plain),
        Body::Itself if std::ptr::eq(body, stored) => Ok(Decoded::Stored),
        Body::Itself => Ok(Decoded::Opened),
    }
}

/// Where the plain bytes of what is not encrypted are.
enum Body {
    Itself,
    Plain,
}

/// Finds the plain bytes of a record that is not, or not any more, encrypted.
pub(crate) fn decode_body<'a>(
    body: &'a [u8],
    flags: RecordFlags,
    limit: usize,
    plain: &'a mut Vec<u8>,
) -> Result<&'a [u8], String> {
    Ok(match decompress_body(body, flags, limit, plain)? {
        Body::Itself => body,
        Body::Plain => plain,
    })
}

fn decompress_body(
    body: &[u8],
    flags: RecordFlags,
    limit: usize,
    plain: &mut Vec<u8>,
) -> Result<Body, String> {
    match flags {
        RecordFlags::RAW if body.len() > limit => {
            Err(format!("a record of {} bytes is too long", body.len()))
        }
        RecordFlags::RAW => Ok(Body::Itself),
        RecordFlags::ZSTD => match decompress(body, limit, plain) {
            Ok(()) => Ok(Body::Plain),
            Err(e) => Err(format!("the record does not decompress: {e}")),
        },
        _ => Err(unknown(flags)),
    }
}

fn unknown(flags: RecordFlags) -> String {
    format!("a record is stored in an unknown way, {flags:?}")
}
