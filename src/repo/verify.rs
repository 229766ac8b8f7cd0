//! Proving that a stored record is what its footer says: checksum, encryption, compression and identifier.

use super::chunk::Place;
use super::error::RepoError;
use super::format::generation::PackName;
use super::format::node::{MAX_NODE, Node};
use super::format::pack::{FooterEntry, PackKind};
use super::format::short_sum;
use super::record::{self, Decoded, Expected};
use super::repository::Repository;
use super::storage::Storage;

/// Buffers for records, to be used again and again.
#[derive(Debug, Default)]
pub(crate) struct RecordBuffers {
    pub(crate) stored: Vec<u8>,
    /// What was decrypted, and may still be compressed; only in encrypted repositories.
    pub(crate) opened: Vec<u8>,
    plain: Vec<u8>,
}

/// Reads a record and proves all that can be proved of it.
pub(crate) fn read_verified(
    repo: &Repository,
    name: &PackName,
    entry: &FooterEntry,
    buffers: &mut RecordBuffers,
) -> Result<(), RepoError> {
    read_verified_in(repo, &**repo.storage(), name, entry, buffers)
}

/// The same with a pack that lies elsewhere.
pub(crate) fn read_verified_in(
    repo: &Repository,
    storage: &dyn Storage,
    (kind, pack): &PackName,
    entry: &FooterEntry,
    buffers: &mut RecordBuffers,
) -> Result<(), RepoError> {
    let place = Place {
        pack: *pack,
        offset: entry.offset,
        len: entry.len,
        flags: entry.flags,
    };
    record::read_stored(storage, *kind, &place, &mut buffers.stored)?;
    verify(repo, *kind, &place, entry, buffers)
        .map_err(|what| RepoError::corrupt(kind.file_name(pack), entry.offset.into(), what))
}

fn verify(
    repo: &Repository,
    kind: PackKind,
    place: &Place,
    entry: &FooterEntry,
    buffers: &mut RecordBuffers,
) -> Result<(), String> {
    let RecordBuffers {
        stored,
        opened,
        plain,
    } = buffers;
    if short_sum(stored) != entry.sum {
        return Err("the record's checksum differs".to_owned());
    }
    let expected = Expected {
        repo: repo.uuid(),
        kind,
        id: &entry.id,
        place,
        limit: match kind {
            PackKind::Data => repo.chunk_size().bytes() as usize,
            PackKind::Meta => MAX_NODE,
        },
    };
    let decoded: Decoded = record::decode(repo.keys(), &expected, stored, opened, plain)?;
    let bytes = decoded.of(stored, opened, plain);
    let same = match kind {
        PackKind::Data => *repo.keys().chunk_id(bytes).as_bytes() == entry.id,
        PackKind::Meta => {
            // A node says its own level, which is part of what its identifier is made of.
            let level = bytes.get(1).copied().unwrap_or(0);
            let node = Node::decode(bytes, level).map_err(|e| format!("{e:?}"))?;
            *node.id(repo.keys()).as_bytes() == entry.id
        }
    };
    match same {
        true => Ok(()),
        false => Err("the record is not what its identifier says".to_owned()),
    }
}
