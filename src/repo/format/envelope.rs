//! The wrapping of small files: header, length, payload, checksum, and a MAC under the repository's key.

use super::cursor::Cursor;
use super::{DecodeError, FileKind, decode_header, encode_header};

/// The most bytes of a whole small file.
pub(crate) const MAX_SMALL_FILE: u64 = 64 << 20;

/// Wraps a payload; `mac_key` is `None` for key slots only, which are read before there is a key.
pub(crate) fn wrap(
    kind: FileKind,
    payload: &[u8],
    mac_key: Option<&[u8; 32]>,
) -> Result<Vec<u8>, DecodeError> {
    let len = u32::try_from(payload.len())
        .ok()
        .filter(|len| u64::from(*len).saturating_add(OVERHEAD) <= MAX_SMALL_FILE)
        .ok_or_else(|| DecodeError::unsupported("a file of more than 64 MiB"))?;
    let mut file = Vec::with_capacity(payload.len().saturating_add(OVERHEAD as usize));
    file.extend_from_slice(&encode_header(kind));
    file.extend_from_slice(&len.to_le_bytes());
    file.extend_from_slice(payload);
    let sum = blake3::hash(&file);
    let mac = mac_key.map(|key| blake3::keyed_hash(key, &file));
    file.extend_from_slice(sum.as_bytes());
    if let Some(mac) = mac {
        file.extend_from_slice(mac.as_bytes());
    }
    Ok(file)
}

/// A small file whose checksum fits.
#[derive(Debug)]
pub(crate) struct Opened<'a> {
    /// The payload, which stands at [`PAYLOAD_AT`].
    pub(crate) payload: &'a [u8],
    signed: &'a [u8],
    mac: Option<[u8; 32]>,
}

impl Opened<'_> {
    /// Checks that whoever wrote this knew the repository's key.
    pub(crate) fn check_mac(&self, key: &[u8; 32]) -> Result<(), DecodeError> {
        // `blake3::Hash` compares in constant time.
        match self.mac {
            Some(mac) if blake3::keyed_hash(key, self.signed) == blake3::Hash::from(mac) => Ok(()),
            _ => Err(DecodeError::corrupt(
                self.signed.len() as u64,
                "the MAC differs: it was not written with this repository's key",
            )),
        }
    }
}

/// Unwraps a small file and checks its header and checksum; the MAC, when there is one, is the caller's to check.
pub(crate) fn unwrap(
    file: &[u8],
    kind: FileKind,
    has_mac: bool,
) -> Result<Opened<'_>, DecodeError> {
    let mut cursor = Cursor::new(file);
    decode_header(&mut cursor, kind)?;
    let len = cursor.u32("length of the payload")?;
    let payload = cursor.bytes(len as usize, "payload")?;
    let signed_len = cursor.at() as usize;
    let sum: [u8; 32] = cursor.array("checksum")?;
    let mac = match has_mac {
        true => Some(cursor.array("MAC")?),
        false => None,
    };
    cursor.finish("file")?;
    let signed = file
        .get(..signed_len)
        .ok_or_else(|| DecodeError::corrupt(0, "the length of the payload does not fit"))?;
    if blake3::hash(signed) != blake3::Hash::from(sum) {
        return Err(DecodeError::corrupt(
            signed_len as u64,
            "the checksum differs",
        ));
    }
    Ok(Opened {
        payload,
        signed,
        mac,
    })
}

/// Where the payload starts.
pub(crate) const PAYLOAD_AT: u64 = 20;

const OVERHEAD: u64 = 84;
