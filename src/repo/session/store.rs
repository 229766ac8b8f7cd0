//! Storing one chunk or map node: hashing, compressing, proving what will be written.

use std::cell::RefCell;
use std::sync::atomic::Ordering;

use super::super::chunk::{ChunkEntry, Place, RecordFlags, is_zero};
use super::super::cipher::Encryption;
use super::super::compress::compress;
use super::super::error::RepoError;
#[cfg(test)]
use super::super::flip::{self, Point};
use super::super::format::node::Node;
use super::super::format::pack::PackKind;
use super::super::format::short_sum;
use super::super::ids::{ChunkId, NodeId};
use super::super::pack::{Appended, Body, Record};
use super::super::record::decode_body;
use super::{SessionCore, StoredChunk};

impl SessionCore {
    /// Stores a map node, unless the repository has it; says where it is and whether it is new.
    pub(crate) fn store_node(&self, id: &NodeId, node: &Node) -> Result<(Place, bool), RepoError> {
        self.check()?;
        if let Some(place) = self.known(PackKind::Meta, id.as_bytes())? {
            return Ok((place, false));
        }
        let keys = self.repo.keys();
        let is_right =
            |bytes: &[u8]| Node::decode(bytes, node.level()).is_ok_and(|d| d.id(keys) == *id);
        for _ in 0..ATTEMPTS {
            let mut bytes = node.encode();
            #[cfg(test)]
            flip::at(Point::Compressed, &mut bytes);
            let proved = self.verify_writes.then(|| short_sum(&bytes));
            if proved.is_some() && !self.meters.verify.time(|| is_right(&bytes)) {
                continue;
            }
            let record = Record {
                body: match self.repo.encryption() {
                    Encryption::None => Body::Clear(&bytes),
                    Encryption::Aes256Gcm => Body::ToSeal(&mut bytes),
                },
                // Nodes are made of hashes, which do not compress.
                flags: RecordFlags::RAW,
                proved,
            };
            match self.append(PackKind::Meta, id.as_bytes(), record)? {
                Appended::Now(place) => return Ok((place, true)),
                Appended::Before(place) => return Ok((place, false)),
                Appended::Changed => {}
            }
        }
        Err(self.misread(format!("map node {id}")))
    }

    pub(super) fn store_chunk(&self, plain: &[u8]) -> Result<StoredChunk, RepoError> {
        self.check()?;
        if plain.is_empty() || plain.len() > self.repo.chunk_size().bytes() as usize {
            return Err(RepoError::misuse(format!(
                "a chunk of {} bytes is none of {}",
                plain.len(),
                self.repo.chunk_size()
            )));
        }
        let known = |entry| StoredChunk {
            entry,
            is_new: false,
            stored_bytes: 0,
        };
        let meters = &self.meters;
        let hash = || (!is_zero(plain)).then(|| self.repo.keys().chunk_id(plain));
        let Some(id) = meters.hash.time(hash) else {
            return Ok(known(None));
        };
        let lookup = || self.known(PackKind::Data, id.as_bytes());
        if let Some(place) = meters.lookup.time(lookup)? {
            if self.interrupted.contains(&(PackKind::Data, place.pack)) {
                let len = plain.len() as u64;
                self.resumed_bytes.fetch_add(len, Ordering::Relaxed);
            }
            return Ok(known(Some(ChunkEntry { id, place })));
        }
        self.store_new(id, plain)
    }

    /// Stores a chunk that the repository does not have.
    ///
    /// What goes into a pack is decoded and hashed again before. A bit that flips meanwhile is most often in a buffer
    /// that can be made again; when it is in the chunk itself, or comes back, nothing of this session can be trusted.
    pub(super) fn store_new(&self, id: ChunkId, plain: &[u8]) -> Result<StoredChunk, RepoError> {
        for _ in 0..ATTEMPTS {
            let appended =
                BUFFERS.with_borrow_mut(|buffers| self.try_store(&id, plain, buffers))?;
            let (place, is_new) = match appended {
                Appended::Now(place) => (place, true),
                Appended::Before(place) => (place, false),
                Appended::Changed => continue,
            };
            return Ok(StoredChunk {
                entry: Some(ChunkEntry { id, place }),
                is_new,
                stored_bytes: if is_new { u64::from(place.len) } else { 0 },
            });
        }
        Err(self.misread(format!("chunk {id}")))
    }

    fn try_store(
        &self,
        id: &ChunkId,
        plain: &[u8],
        (compressed, again): &mut (Vec<u8>, Vec<u8>),
    ) -> Result<Appended, RepoError> {
        let (meters, encryption) = (&self.meters, self.repo.encryption());
        let flags = meters
            .compress
            .time(|| compress(plain, self.compression, compressed))
            .map_err(|e| RepoError::io("compress a chunk", e))?;
        if (encryption, flags) == (Encryption::Aes256Gcm, RecordFlags::RAW) {
            compressed.clear();
            compressed.extend_from_slice(plain);
        }
        #[cfg(test)]
        flip::at(Point::Compressed, compressed);
        let body = match (encryption, flags) {
            (Encryption::None, RecordFlags::RAW) => plain,
            _ => compressed,
        };
        let mut proved = None;
        if self.verify_writes {
            proved = meters.verify.time(|| {
                // The sum comes first: whatever changes afterwards no longer fits it.
                let sum = short_sum(body);
                let plain = decode_body(body, flags, plain.len(), again).ok()?;
                (self.repo.keys().chunk_id(plain) == *id).then_some(sum)
            });
            if proved.is_none() {
                return Ok(Appended::Changed);
            }
        }
        #[cfg(test)]
        flip::at(Point::Proved, compressed);
        let body = match (encryption, flags) {
            (Encryption::None, RecordFlags::RAW) => Body::Clear(plain),
            (Encryption::None, _) => Body::Clear(compressed),
            (Encryption::Aes256Gcm, _) => Body::ToSeal(compressed),
        };
        let record = Record {
            body,
            flags,
            proved,
        };
        let append = || self.append(PackKind::Data, id.as_bytes(), record);
        meters.pack.time(append)
    }

    /// Ends the session: something did not come out right twice.
    fn misread(&self, what: String) -> RepoError {
        self.packs.fail(RepoError::Misread { what })
    }

    fn append(
        &self,
        kind: PackKind,
        id: &[u8; 32],
        record: Record<'_>,
    ) -> Result<Appended, RepoError> {
        let appended = self.packs.append(kind, id, record)?;
        if self.packs.remembered() >= self.remembered {
            self.spill().map_err(|e| self.packs.fail(e))?;
        }
        if let Some(checkpoints) = &self.checkpoints
            && checkpoints.is_due(&self.packs)
        {
            self.checkpoint(checkpoints)
                .map_err(|e| self.packs.fail(e))?;
        }
        Ok(appended)
    }
}

thread_local! {
    /// What a chunk is compressed into, and what that is decompressed into again.
    static BUFFERS: RefCell<(Vec<u8>, Vec<u8>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// How often something is tried that does not come out right.
const ATTEMPTS: u32 = 2;
