//! The log of an overlay: which granules are in its file or zeros, in records that each carry a checksum.
//!
//! A head says what the overlay belongs to. Records follow, each of some runs of granules, numbered by the commit that
//! wrote them; those of commit 0 were written with the head. A commit is written only after the one before was durable,
//! so that only the last one can be torn by a crash.

use std::io;
use std::ops::Range;

use super::files::Files;
use super::map::{Map, State};

/// What an overlay belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) repository: [u8; 16],
    pub(super) snapshot: [u8; 16],
    pub(super) size_bytes: u64,
    pub(super) disk: String,
}

/// What a log says.
#[derive(Debug)]
pub(super) struct Replayed {
    pub(super) head: Head,
    pub(super) map: Map,
}

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogError {
    #[error("its map is damaged at byte {at:#x}: {what}")]
    Damaged { at: u64, what: &'static str },
    #[error("its map has format {0}, which this program does not know")]
    Unsupported(u32),
    #[error("its map cannot be read")]
    Io(#[from] io::Error),
}

/// Makes the pieces of one log.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    /// What ties records to their head.
    key: [u8; 32],
}

impl Head {
    /// Encodes the head of a new log; `salt` makes it unlike any other.
    pub(super) fn encode(&self, salt: [u8; 16]) -> (Vec<u8>, Writer) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((self.disk.len() as u32).to_le_bytes());
        bytes.extend(self.size_bytes.to_le_bytes());
        bytes.extend(GRANULE.to_le_bytes());
        bytes.extend(self.repository);
        bytes.extend(self.snapshot);
        bytes.extend(salt);
        bytes.extend(self.disk.as_bytes());
        let key = *blake3::hash(&bytes).as_bytes();
        bytes.extend(key);
        (bytes, Writer { key })
    }

    /// Reads the head at the start of a log; returns its length too.
    fn read(files: &dyn Files, len: u64) -> Result<(Self, Writer, u64), LogError> {
        let damaged = |what| LogError::Damaged { at: 0, what };
        let mut fixed = [0; FIXED];
        if len < FIXED as u64 {
            return Err(damaged("it ends within its head"));
        }
        files.read_log(0, &mut fixed)?;
        let (magic, rest) = fixed.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(damaged("it does not begin as one"));
        }
        let mut fields = Fields(rest);
        let version = fields.u32();
        if version != VERSION {
            return Err(LogError::Unsupported(version));
        }
        let name_len = fields.u32();
        let end = FIXED as u64 + u64::from(name_len) + KEY;
        if name_len > MAX_NAME || len < end {
            return Err(damaged("the disk's name is too long"));
        }
        let (size_bytes, granule) = (fields.u64(), fields.u64());
        let (repository, snapshot) = (fields.id(), fields.id());
        let mut whole = vec![0; end as usize];
        files.read_log(0, &mut whole)?;
        let (text, key) = whole.split_at(whole.len() - KEY as usize);
        if blake3::hash(text).as_bytes() != key || granule != GRANULE {
            return Err(damaged("the head's checksum is wrong"));
        }
        let disk = String::from_utf8(text[FIXED..].to_vec())
            .map_err(|_| damaged("the disk's name is no text"))?;
        let head = Self {
            repository,
            snapshot,
            size_bytes,
            disk,
        };
        let mut tied = [0; 32];
        tied.copy_from_slice(key);
        Ok((head, Writer { key: tied }, end))
    }
}

impl Writer {
    /// Encodes the runs of one commit as records, each made when it is asked for.
    pub(super) fn records(
        &self,
        commit: u64,
        runs: impl Iterator<Item = (Range<u64>, State)>,
    ) -> impl Iterator<Item = Vec<u8>> {
        let mut runs = runs.peekable();
        let mut number = 0;
        let mut ended = false;
        std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let mut body = Vec::new();
            for (run, state) in runs.by_ref().take(MAX_RUNS) {
                body.extend(run.start.to_le_bytes());
                let bits = match state {
                    State::Base => 0,
                    State::Data => 1,
                    State::Zero => 2,
                };
                body.extend(((run.end - run.start) << 2 | bits).to_le_bytes());
            }
            ended = runs.peek().is_none();
            let record = Record {
                runs: (body.len() / RUN) as u32,
                commit,
                number,
                last: ended,
            };
            number += 1;
            Some(record.encode(&self.key, &body))
        })
    }
}

/// The head of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    runs: u32,
    commit: u64,
    /// Its place among those of its commit.
    number: u32,
    /// Whether it is the last of its commit.
    last: bool,
}

impl Record {
    fn encode(self, key: &[u8; 32], body: &[u8]) -> Vec<u8> {
        let mut bytes = RECORD.to_vec();
        bytes.extend(self.runs.to_le_bytes());
        bytes.extend(self.commit.to_le_bytes());
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(u32::from(self.last).to_le_bytes());
        let sum = checksum(key, &bytes, body);
        bytes.extend(sum);
        bytes.extend(body);
        bytes
    }

    /// Reads the record at a place of the log; `None` if none is there whole.
    fn read(
        files: &dyn Files,
        key: &[u8; 32],
        at: u64,
        len: u64,
        body: &mut Vec<u8>,
    ) -> io::Result<Option<Self>> {
        let mut head = [0; RECORD_HEAD];
        if len.saturating_sub(at) < RECORD_HEAD as u64 {
            return Ok(None);
        }
        files.read_log(at, &mut head)?;
        let (text, sum) = head.split_at(RECORD_HEAD - SUM);
        let (magic, rest) = text.split_at(RECORD.len());
        let mut fields = Fields(rest);
        let record = Self {
            runs: fields.u32(),
            commit: fields.u64(),
            number: fields.u32(),
            last: fields.u32() != 0,
        };
        let body_len = record.runs as usize * RUN;
        let left = len - at - RECORD_HEAD as u64;
        if magic != RECORD || record.runs as usize > MAX_RUNS || left < body_len as u64 {
            return Ok(None);
        }
        body.resize(body_len, 0);
        files.read_log(at + RECORD_HEAD as u64, body)?;
        Ok((checksum(key, text, body) == *sum).then_some(record))
    }
}

/// Reads a log up to where the last commit may be torn.
///
/// What is damaged elsewhere is an error: it would otherwise take back what was acknowledged.
pub(super) fn replay(files: &dyn Files) -> Result<Replayed, LogError> {
    let len = files.log_len()?;
    let (head, writer, mut at) = Head::read(files, len)?;
    let granules = head.size_bytes.div_ceil(GRANULE);
    let mut map = Map::default();
    let mut body = Vec::new();
    // The commit, and the number in it, of the record that has to follow, and whether it starts a commit.
    let (mut commit, mut number) = (0, 0);
    while at < len {
        let damaged = |what| LogError::Damaged { at, what };
        let found = Record::read(files, &writer.key, at, len, &mut body)?;
        let Some(record) = found.filter(|r| (r.commit, r.number) == (commit, number)) else {
            if later_commit(files, &writer.key, at, len, commit)? {
                return Err(damaged("a record is wrong before others that are whole"));
            }
            break;
        };
        for run in body.chunks_exact(RUN) {
            let mut fields = Fields(run);
            let (start, word) = (fields.u64(), fields.u64());
            let state = match word & 3 {
                1 => State::Data,
                2 => State::Zero,
                _ => State::Base,
            };
            let end = start.checked_add(word >> 2).filter(|end| *end <= granules);
            map.set(start..end.ok_or(damaged("a run passes the end"))?, state);
        }
        at += (RECORD_HEAD + body.len()) as u64;
        (commit, number) = match record.last {
            true => (commit + 1, 0),
            false => (commit, number + 1),
        };
    }
    if commit == 0 {
        let what = "what was written with its head is not whole";
        return Err(LogError::Damaged { at, what });
    }
    Ok(Replayed { head, map })
}

/// Looks for a whole record of a commit that was written after `commit` was durable.
fn later_commit(
    files: &dyn Files,
    key: &[u8; 32],
    from: u64,
    len: u64,
    commit: u64,
) -> io::Result<bool> {
    let mut window = vec![0; WINDOW];
    let mut body = Vec::new();
    let mut at = from;
    while at < len {
        let count = (len - at).min(WINDOW as u64) as usize;
        files.read_log(at, &mut window[..count])?;
        for place in window[..count]
            .windows(RECORD.len())
            .enumerate()
            .filter(|(_, bytes)| *bytes == RECORD)
        {
            let found = Record::read(files, key, at + place.0 as u64, len, &mut body)?;
            if found.is_some_and(|record| record.commit > commit) {
                return Ok(true);
            }
        }
        // A mark may lie across the end of a window.
        at += (count.saturating_sub(RECORD.len() - 1)).max(1) as u64;
    }
    Ok(false)
}

fn checksum(key: &[u8; 32], head: &[u8], body: &[u8]) -> [u8; SUM] {
    let mut hash = blake3::Hasher::new_keyed(key);
    hash.update(head);
    hash.update(body);
    let mut sum = [0; SUM];
    hash.finalize_xof().fill(&mut sum);
    sum
}

/// Little-endian fields of bytes whose length is known.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the length is known");
        self.0 = rest;
        *field
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn id(&mut self) -> [u8; 16] {
        self.take()
    }
}

/// The unit of an overlay: what guests' file systems write.
pub(super) const GRANULE: u64 = 4096;
const MAGIC: &[u8] = b"NBDBKOVL";
const VERSION: u32 = 1;
/// The head up to the disk's name.
const FIXED: usize = 8 + 4 + 4 + 8 + 8 + 16 + 16 + 16;
const KEY: u64 = 32;
const MAX_NAME: u32 = 4096;
const RECORD: &[u8] = b"OVLR";
const SUM: usize = 16;
const RECORD_HEAD: usize = 4 + 4 + 8 + 4 + 4 + SUM;
const RUN: usize = 16;
/// The runs of a record: 1 MiB.
const MAX_RUNS: usize = 1 << 16;
const WINDOW: usize = 1 << 20;
