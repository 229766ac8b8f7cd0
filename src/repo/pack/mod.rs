//! Writing packs: records are appended to open packs, which a thread of their own makes durable.

mod footer;
mod sealer;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::chunk::{Place, RecordFlags};
use super::cipher::{PackCipher, TAG_LEN};
use super::error::RepoError;
use super::format::pack::{
    FooterEntry, MAX_RECORD, MAX_RECORDS, PackHeader, PackKind, PackTrailer, encode_footer,
};
use super::format::segment::{Prefix, SegmentEntry, prefix_of};
use super::format::short_sum;
use super::ids::{PackId, RepoUuid, SnapshotId};
use super::keys::Keys;
use super::snapshot::WrittenPack;
use super::storage::{NewFile, Storage};
use sealer::Sealer;

pub(crate) use footer::{Footer, read_footer};

/// The packs of one session: two are open, one for chunks and one for map nodes.
///
/// Remembers what was written, until [`Packs::forget`] takes what an index segment knows.
#[derive(Debug)]
pub(crate) struct Packs {
    storage: Arc<dyn Storage>,
    repo: RepoUuid,
    keys: Arc<Keys>,
    session: SnapshotId,
    target_bytes: u64,
    data: Mutex<Option<Box<OpenPack>>>,
    meta: Mutex<Option<Box<OpenPack>>>,
    recent: Mutex<Recent>,
    sealer: Sealer,
}

/// The bytes of a record that is to be stored.
#[derive(Debug)]
pub(crate) enum Body<'a> {
    /// They are stored as they are.
    Clear(&'a [u8]),
    /// They are encrypted in place once it is known where they will stand.
    ToSeal(&'a mut Vec<u8>),
}

impl Body<'_> {
    /// The number of bytes as they will be stored.
    fn stored_len(&self) -> usize {
        match self {
            Self::Clear(bytes) => bytes.len(),
            Self::ToSeal(bytes) => bytes.len() + TAG_LEN,
        }
    }
}

/// What [`Packs::append`] did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Appended {
    pub(crate) place: Place,
    /// False when another thread stored the same meanwhile.
    pub(crate) is_new: bool,
}

impl Packs {
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        repo: RepoUuid,
        keys: Arc<Keys>,
        session: SnapshotId,
        target_bytes: u64,
    ) -> Result<Self, RepoError> {
        Ok(Self {
            sealer: Sealer::start()?,
            storage,
            repo,
            keys,
            session,
            target_bytes: target_bytes.min(MAX_TARGET),
            data: Mutex::default(),
            meta: Mutex::default(),
            recent: Mutex::default(),
        })
    }

    /// Returns where this session stored a record.
    pub(crate) fn find(&self, id: &[u8; 32]) -> Option<Place> {
        lock(&self.recent).find(id)
    }

    /// The number of records that are remembered.
    pub(crate) fn remembered(&self) -> usize {
        lock(&self.recent).slots.len()
    }

    /// Fails with the session's first failure, if there was one.
    pub(crate) fn check(&self) -> Result<(), RepoError> {
        self.sealer.check()
    }

    /// Ends the session for good: whatever is called later fails with this.
    pub(crate) fn fail(&self, error: RepoError) -> RepoError {
        self.sealer.fail(error)
    }

    /// Stores a record, unless this session has it already; `flags` say how it is compressed.
    pub(crate) fn append(
        &self,
        kind: PackKind,
        id: &[u8; 32],
        body: Body<'_>,
        flags: RecordFlags,
    ) -> Result<Appended, RepoError> {
        self.check()?;
        let len = u32::try_from(body.stored_len())
            .ok()
            .filter(|len| *len <= MAX_RECORD)
            .ok_or_else(|| {
                RepoError::misuse(format!(
                    "a record of {} bytes is too long",
                    body.stored_len()
                ))
            })?;
        let mut open = lock(self.slot(kind));
        // Looked up again under the lock that orders all appends: two threads may bring the same chunk.
        if let Some(place) = self.find(id) {
            return Ok(Appended {
                place,
                is_new: false,
            });
        }
        let result = self.append_to(&mut open, kind, id, body, (len, flags));
        let (place, full) = result.map_err(|e| self.fail(e))?;
        drop(open);
        if let Some(full) = full {
            self.sealer.seal(full)?;
        }
        Ok(Appended {
            place,
            is_new: true,
        })
    }

    /// Closes both open packs and returns once all packs are published, with their list.
    pub(crate) fn finish(&self) -> Result<Vec<WrittenPack>, RepoError> {
        for kind in [PackKind::Data, PackKind::Meta] {
            let open = lock(self.slot(kind)).take();
            if let Some(open) = open {
                self.sealer.seal(open)?;
            }
        }
        self.sealer.drain()
    }

    /// The bytes of the packs that are published.
    pub(crate) fn written_bytes(&self) -> u64 {
        self.sealer.written_bytes()
    }

    /// Returns the packs that were published after the first `known`.
    pub(crate) fn written_after(&self, known: usize) -> Vec<(PackKind, PackId)> {
        self.sealer.written_after(known)
    }

    /// Waits until the packs that were closed are published.
    pub(crate) fn drain(&self) -> Result<(), RepoError> {
        self.sealer.drain().map(drop)
    }

    /// Returns what is remembered of published packs, with the table of packs that the entries count in.
    pub(crate) fn published(&self) -> (Vec<SegmentEntry>, Vec<(PackKind, PackId)>) {
        let published = self.sealer.published();
        let recent = lock(&self.recent);
        let entries = recent
            .slots
            .iter()
            .filter(|(_, slot)| published.contains(&slot.pack))
            .map(|(prefix, slot)| SegmentEntry {
                prefix: *prefix,
                pack: slot.pack,
                offset: slot.offset,
                len: slot.len,
                flags: slot.flags.0,
            })
            .collect();
        (entries, recent.packs.clone())
    }

    /// Forgets what an index segment now knows.
    pub(crate) fn forget(&self, entries: &[SegmentEntry]) {
        let mut recent = lock(&self.recent);
        for entry in entries {
            recent.slots.remove(&entry.prefix);
        }
    }

    fn append_to(
        &self,
        slot: &mut Option<Box<OpenPack>>,
        kind: PackKind,
        id: &[u8; 32],
        body: Body<'_>,
        (len, flags): (u32, RecordFlags),
    ) -> Result<(Place, Option<Box<OpenPack>>), RepoError> {
        let open = match slot {
            Some(open) => open,
            None => slot.insert(Box::new(self.open(kind)?)),
        };
        let offset = open.len;
        let flags = flags.encrypted(self.keys.encryption());
        let stored: &[u8] = match (&open.cipher, body) {
            (None, Body::Clear(bytes)) => bytes,
            (Some(cipher), Body::ToSeal(bytes)) => {
                cipher.seal(offset, id, bytes)?;
                bytes
            }
            _ => {
                return Err(RepoError::misuse(
                    "a record was not made for this repository",
                ));
            }
        };
        open.write(stored)?;
        open.entries.push(FooterEntry {
            id: *id,
            offset,
            len,
            flags,
            sum: short_sum(stored),
        });
        let place = Place {
            pack: open.header.pack,
            offset,
            len,
            flags,
        };
        let number = open.number;
        let full = u64::from(open.len) >= self.target_bytes || open.entries.len() >= MAX_RECORDS;
        lock(&self.recent).slots.insert(
            prefix_of(id),
            Slot {
                pack: number,
                offset,
                len,
                flags,
            },
        );
        Ok((place, if full { slot.take() } else { None }))
    }

    fn open(&self, kind: PackKind) -> Result<OpenPack, RepoError> {
        let header = PackHeader {
            kind,
            repo: self.repo,
            session: self.session,
            pack: PackId::random()?,
        };
        let number = {
            let mut recent = lock(&self.recent);
            recent.packs.push((kind, header.pack));
            (recent.packs.len() - 1) as u32
        };
        let mut open = OpenPack {
            cipher: self.keys.pack_cipher(self.repo, kind, &header.pack),
            header,
            number,
            file: self.storage.create()?,
            len: 0,
            entries: Vec::new(),
        };
        open.write(&header.encode())?;
        Ok(open)
    }

    fn slot(&self, kind: PackKind) -> &Mutex<Option<Box<OpenPack>>> {
        match kind {
            PackKind::Data => &self.data,
            PackKind::Meta => &self.meta,
        }
    }
}

/// A pack that is being written.
struct OpenPack {
    header: PackHeader,
    cipher: Option<PackCipher>,
    /// The pack's place in the session's table of packs.
    number: u32,
    file: Box<dyn NewFile>,
    len: u32,
    entries: Vec<FooterEntry>,
}

impl OpenPack {
    fn write(&mut self, bytes: &[u8]) -> Result<(), RepoError> {
        self.file.write(bytes)?;
        // A pack is closed at its target, at most 1 GiB, and a record or a footer adds a few MiB.
        self.len += bytes.len() as u32;
        Ok(())
    }

    /// Writes the footer and the trailer, makes the file durable and publishes it.
    fn seal(mut self) -> Result<WrittenPack, RepoError> {
        let footer = encode_footer(&self.entries);
        let trailer = PackTrailer::new(&self.header.encode(), &footer);
        self.write(&footer)?;
        self.write(&trailer.encode())?;
        let PackHeader { kind, pack, .. } = self.header;
        self.file.publish(&kind.file_name(&pack))?;
        Ok(WrittenPack {
            kind,
            id: pack,
            len: self.len.into(),
            footer_hash: trailer.hash,
        })
    }
}

impl std::fmt::Debug for OpenPack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OpenPack({:?}, {} bytes)", self.header, self.len)
    }
}

/// What this session wrote and no index segment knows yet.
#[derive(Debug, Default)]
struct Recent {
    slots: HashMap<Prefix, Slot, BuildHasherDefault<IdHasher>>,
    packs: Vec<(PackKind, PackId)>,
}

impl Recent {
    fn find(&self, id: &[u8; 32]) -> Option<Place> {
        let slot = self.slots.get(&prefix_of(id))?;
        let (_, pack) = self.packs.get(slot.pack as usize)?;
        Some(Place {
            pack: *pack,
            offset: slot.offset,
            len: slot.len,
            flags: slot.flags,
        })
    }
}

/// A place, with the pack as a number to be small.
#[derive(Clone, Copy, Debug)]
struct Slot {
    pack: u32,
    offset: u32,
    len: u32,
    flags: RecordFlags,
}

/// Takes identifiers for their own hashes: they are keyed hashes, which nobody can choose.
#[derive(Debug, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u128(&mut self, id: u128) {
        self.0 = id as u64;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panics between two statements leaves an entry too few, never a wrong one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The highest target: a pack's length must fit 32 bits.
const MAX_TARGET: u64 = 1 << 30;
