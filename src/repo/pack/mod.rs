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
use super::parity::{self, Parity};
use super::repository::Repository;
use super::snapshot::WrittenPack;
use super::storage::{NewFile, Storage};
use sealer::Sealer;

pub(crate) use footer::{Footer, list_packs, read_footer};

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
    parity: Parity,
    data: Mutex<Option<Box<OpenPack>>>,
    meta: Mutex<Option<Box<OpenPack>>>,
    recent: Mutex<Recent>,
    sealer: Sealer,
}

/// A record that is to be stored.
#[derive(Debug)]
pub(crate) struct Record<'a> {
    pub(crate) body: Body<'a>,
    /// How the body is compressed.
    pub(crate) flags: RecordFlags,
    /// The sum of the body as it was when it was proved; `None` when it was not.
    pub(crate) proved: Option<[u8; 8]>,
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
pub(crate) enum Appended {
    /// The record is here.
    Now(Place),
    /// Another thread stored the same meanwhile.
    Before(Place),
    /// The body is not what was proved any more; nothing was written.
    Changed,
}

impl Packs {
    pub(crate) fn new(
        repo: &Repository,
        session: SnapshotId,
        target_bytes: u64,
    ) -> Result<Self, RepoError> {
        Ok(Self {
            sealer: Sealer::start()?,
            storage: Arc::clone(repo.storage()),
            repo: repo.uuid(),
            keys: Arc::clone(repo.keys()),
            parity: repo.parity(),
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

    /// Stores a record, unless this session has it already.
    pub(crate) fn append(
        &self,
        kind: PackKind,
        id: &[u8; 32],
        record: Record<'_>,
    ) -> Result<Appended, RepoError> {
        self.check()?;
        let len = record.body.stored_len();
        let len = u32::try_from(len)
            .ok()
            .filter(|len| *len <= MAX_RECORD)
            .ok_or_else(|| RepoError::misuse(format!("a record of {len} bytes is too long")))?;
        let mut open = lock(self.slot(kind));
        // Looked up again under the lock that orders all appends: two threads may bring the same chunk.
        if let Some(place) = self.find(id) {
            return Ok(Appended::Before(place));
        }
        let result = self.append_to(&mut open, kind, id, record, len);
        let Some((place, full)) = result.map_err(|e| self.fail(e))? else {
            return Ok(Appended::Changed);
        };
        drop(open);
        if let Some(full) = full {
            self.sealer.seal(full)?;
        }
        Ok(Appended::Now(place))
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

    /// Returns the place and the pack, when that is full; `None` when the body is not what was proved.
    fn append_to(
        &self,
        slot: &mut Option<Box<OpenPack>>,
        kind: PackKind,
        id: &[u8; 32],
        record: Record<'_>,
        len: u32,
    ) -> Result<Option<Stood>, RepoError> {
        let open = match slot {
            Some(open) => open,
            None => slot.insert(Box::new(self.open(kind)?)),
        };
        let offset = open.len;
        let flags = record.flags.encrypted(self.keys.encryption());
        let (stored, sum): (&[u8], _) = match (&open.cipher, record.body) {
            (None, Body::Clear(bytes)) => {
                let sum = short_sum(bytes);
                if record.proved.is_some_and(|proved| proved != sum) {
                    return Ok(None);
                }
                (bytes, sum)
            }
            (Some(cipher), Body::ToSeal(bytes)) => {
                cipher.seal(offset, id, bytes)?;
                #[cfg(test)]
                super::flip::at(super::flip::Point::Sealed, bytes);
                let sum = short_sum(bytes);
                // What does not open is not written: the next record takes this offset, and its nonce, and this one
                // is never seen.
                if let Some(proved) = record.proved
                    && !(cipher.open(offset, id, bytes, &mut open.opened)
                        && short_sum(&open.opened) == proved)
                {
                    return Ok(None);
                }
                (bytes, sum)
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
            sum,
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
        Ok(Some((place, if full { slot.take() } else { None })))
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
            storage: Arc::clone(&self.storage),
            parity: self.parity,
            len: 0,
            entries: Vec::new(),
            opened: Vec::new(),
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

/// Where a record stands now, and its pack, should that be full.
type Stood = (Place, Option<Box<OpenPack>>);

/// A pack that is being written.
struct OpenPack {
    header: PackHeader,
    cipher: Option<PackCipher>,
    /// The pack's place in the session's table of packs.
    number: u32,
    file: Box<dyn NewFile>,
    storage: Arc<dyn Storage>,
    parity: Parity,
    len: u32,
    entries: Vec<FooterEntry>,
    /// A sealed record, opened again to be proved.
    opened: Vec<u8>,
}

impl OpenPack {
    fn write(&mut self, bytes: &[u8]) -> Result<(), RepoError> {
        self.file.write(bytes)?;
        // A pack is closed at its target, at most 1 GiB, and a record or a footer adds a few MiB.
        self.len += bytes.len() as u32;
        Ok(())
    }

    /// Writes the footer and the trailer, makes the file durable and publishes it, and its parity after it.
    fn seal(mut self) -> Result<WrittenPack, RepoError> {
        let footer = encode_footer(&self.entries);
        let trailer = PackTrailer::new(&self.header.encode(), &footer);
        self.write(&footer)?;
        self.write(&trailer.encode())?;
        let PackHeader {
            kind, pack, repo, ..
        } = self.header;
        self.file.publish(&kind.file_name(&pack))?;
        let len = self.len.into();
        parity::write(&*self.storage, repo, &(kind, pack), len, self.parity, false)?;
        Ok(WrittenPack {
            kind,
            id: pack,
            len,
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
