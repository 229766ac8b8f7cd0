//! Records: reading one from its pack and undoing its compression.

use super::chunk::{Place, RecordFlags};
use super::compress::decompress;
use super::error::RepoError;
use super::format::pack::{MAX_RECORD, PackHeader, PackKind};
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

/// Returns the plain bytes of a record, at most `limit`: the stored bytes themselves, or what `scratch` then holds.
pub(crate) fn decode<'a>(
    stored: &'a [u8],
    flags: RecordFlags,
    limit: usize,
    scratch: &'a mut Vec<u8>,
) -> Result<&'a [u8], String> {
    match flags {
        RecordFlags::RAW if stored.len() <= limit => Ok(stored),
        RecordFlags::RAW => Err(format!("a record of {} bytes is too long", stored.len())),
        RecordFlags::ZSTD => match decompress(stored, limit, scratch) {
            Ok(()) => Ok(scratch),
            Err(e) => Err(format!("the record does not decompress: {e}")),
        },
        other => Err(format!("a record is stored in an unknown way, {other:?}")),
    }
}
