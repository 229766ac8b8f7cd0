//! What clients wrote over a snapshot's disk: bytes in one file, and which they are in a log beside it.
//!
//! A granule is called written only once all its bytes are, and the log says so only after those are durable: data
//! before map. What is synced without an error is there after a crash, and what was not is there or as it was before.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::files::Files;
use super::log::{self, GRANULE, Head, LogError, Writer};
use super::map::{Map, State};
use crate::range::{ByteRange, RangeSet};

/// What is written over one disk; its calls block.
pub(super) struct Store {
    files: Arc<dyn Files>,
    size_bytes: u64,
    head: Head,
    inner: Mutex<Inner>,
    commit: Mutex<Commit>,
}

struct Inner {
    map: Map,
    /// What the log does not tell yet.
    pending: RangeSet,
    /// Why nothing can be made durable any more.
    broken: Option<String>,
}

struct Commit {
    writer: Writer,
    len: u64,
    number: u64,
    /// The length at which the log is written anew.
    most: u64,
}

impl Store {
    /// Starts an overlay of which nothing is written.
    pub(super) fn create(files: Arc<dyn Files>, head: Head) -> io::Result<Self> {
        Self::start(files, head, Map::default())
    }

    /// Goes on with an overlay; its log is written anew, without what a crash has torn.
    pub(super) fn reopen(files: Arc<dyn Files>) -> Result<Self, LogError> {
        let log::Replayed { head, map } = log::replay(&*files)?;
        Ok(Self::start(files, head, map)?)
    }

    fn start(files: Arc<dyn Files>, head: Head, map: Map) -> io::Result<Self> {
        let (writer, len) = next_log(&*files, &head, &map)?;
        files.use_next_log()?;
        Ok(Self {
            size_bytes: head.size_bytes,
            commit: Mutex::new(Commit {
                writer,
                len,
                number: 1,
                most: most_log(len),
            }),
            inner: Mutex::new(Inner {
                map,
                pending: RangeSet::new(),
                broken: None,
            }),
            files,
            head,
        })
    }

    /// The granules that hold any byte of a range.
    pub(super) fn granules(range: ByteRange) -> Range<u64> {
        range.start() / GRANULE..range.end().div_ceil(GRANULE)
    }

    /// The bytes of some granules; the disk's last one may be short.
    pub(super) fn bytes(&self, granules: &Range<u64>) -> ByteRange {
        let end = granules.end.saturating_mul(GRANULE).min(self.size_bytes);
        ByteRange::new(granules.start * GRANULE, end).expect("granules lie on the disk")
    }

    /// Where the bytes of a range are, run by run from its start on, `most` runs at most.
    pub(super) fn runs(&self, range: ByteRange, most: usize) -> Vec<(ByteRange, State)> {
        let inner = self.inner();
        let runs = inner.map.runs(Self::granules(range)).take(most);
        runs.filter_map(|(granules, state)| {
            let bytes = self.bytes(&granules).intersect(range)?;
            Some((bytes, state))
        })
        .collect()
    }

    /// Reads bytes that are in the overlay's file.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.files.read_data(offset, buf)
    }

    /// Writes bytes, and what fills up the granules at both ends where those are not in the file yet.
    ///
    /// The caller has its turn at these granules.
    pub(super) fn write(&self, offset: u64, data: &[u8], fill: &Fill) -> io::Result<()> {
        self.check()?;
        let end = offset + data.len() as u64;
        let Fill { head, tail } = fill;
        if !head.is_empty() {
            self.files.write_data(offset - head.len() as u64, head)?;
        }
        self.files.write_data(offset, data)?;
        if !tail.is_empty() {
            self.files.write_data(end, tail)?;
        }
        let Some(range) = ByteRange::new(offset, end) else {
            return Ok(());
        };
        self.inner()
            .change(self, Self::granules(range), State::Data);
        Ok(())
    }

    /// Makes whole granules zero; with `reserve` they keep room for bytes.
    ///
    /// The caller has its turn at these granules.
    pub(super) fn zero(&self, granules: Range<u64>, reserve: bool) -> io::Result<()> {
        self.check()?;
        if granules.is_empty() {
            return Ok(());
        }
        if reserve {
            self.files.reserve_data(self.bytes(&granules))?;
        }
        let held = self.inner().change(self, granules, State::Zero);
        if !reserve {
            for run in held {
                self.files.discard_data(run);
            }
        }
        Ok(())
    }

    /// Whether so much waits for the log that it has to be written.
    pub(super) fn is_behind(&self) -> bool {
        self.inner().pending.iter().count() > MAX_PENDING
    }

    /// Makes durable all that was written and zeroed before; an error of the system's is final.
    pub(super) fn commit(&self) -> io::Result<()> {
        let mut commit = self.commit.lock().expect("no holder panics");
        self.check()?;
        let (pending, runs, whole) = {
            let mut inner = self.inner();
            let pending = std::mem::take(&mut inner.pending);
            let runs = inner.runs_of(&pending);
            // What the map says now is written already, and durable after the next step: the whole may be told anew.
            let whole = (commit.len > commit.most).then(|| inner.map.clone());
            (pending, runs, whole)
        };
        if let Err(error) = self.files.sync_data() {
            return Err(self.breaks("making its bytes durable", error));
        }
        if let Some(map) = whole {
            match next_log(&*self.files, &self.head, &map) {
                Ok((writer, len)) => {
                    if let Err(error) = self.files.use_next_log() {
                        return Err(self.breaks("replacing its map", error));
                    }
                    *commit = Commit {
                        writer,
                        len,
                        number: 1,
                        most: most_log(len),
                    };
                    return Ok(());
                }
                // Such as no room for two: the one goes on growing.
                Err(error) => {
                    tracing::warn!(%error, "the map of an overlay could not be written anew");
                    commit.most = most_log(commit.len);
                }
            }
        }
        if runs.is_empty() {
            return Ok(());
        }
        let mut len = commit.len;
        for record in commit.writer.records(commit.number, runs.into_iter()) {
            if let Err(error) = self.files.append_log(len, &record) {
                // Nothing was promised yet, and what came of it must not stand before the next record.
                if let Err(error) = self.files.truncate_log(commit.len) {
                    return Err(self.breaks("taking back a part of its map", error));
                }
                self.inner().pending.extend(pending.iter());
                return Err(error);
            }
            len += record.len() as u64;
        }
        if let Err(error) = self.files.sync_log() {
            return Err(self.breaks("making its map durable", error));
        }
        commit.len = len;
        commit.number += 1;
        Ok(())
    }

    /// Fails once something could not be made durable: the system tells of lost bytes only once.
    fn check(&self) -> io::Result<()> {
        match &self.inner().broken {
            None => Ok(()),
            Some(why) => Err(io::Error::other(format!("the overlay has failed: {why}"))),
        }
    }

    fn breaks(&self, doing: &str, error: io::Error) -> io::Error {
        let text = format!("{doing}: {error}");
        tracing::error!("the overlay of disk {} failed at {text}", self.head.disk);
        self.inner().broken.get_or_insert(text);
        error
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder panics")
    }
}

impl Inner {
    /// Sets the state of granules; returns what was in the file before and is not any more.
    fn change(&mut self, store: &Store, granules: Range<u64>, state: State) -> Vec<ByteRange> {
        let mut left = Vec::new();
        for (run, before) in self.map.runs(granules.clone()) {
            if before == state {
                continue;
            }
            let bytes = store.bytes(&run);
            self.pending.insert(bytes);
            if before == State::Data {
                left.push(bytes);
            }
        }
        self.map.set(granules, state);
        left
    }

    fn runs_of(&self, ranges: &RangeSet) -> Vec<(Range<u64>, State)> {
        ranges
            .iter()
            .flat_map(|range| self.map.runs(Store::granules(range)))
            .collect()
    }
}

/// The bytes of granules that a write holds a part of, before it and behind it.
#[derive(Debug, Default)]
pub(super) struct Fill {
    pub(super) head: Vec<u8>,
    pub(super) tail: Vec<u8>,
}

/// Writes a log that tells all of a map; returns its length too.
fn next_log(files: &dyn Files, head: &Head, map: &Map) -> io::Result<(Writer, u64)> {
    let mut salt = [0; 16];
    getrandom::fill(&mut salt).map_err(io::Error::other)?;
    let (bytes, writer) = head.encode(salt);
    let granules = head.size_bytes.div_ceil(GRANULE);
    let mut len = 0;
    let records = writer.records(0, map.held(granules));
    let mut pieces = std::iter::once(bytes)
        .chain(records)
        .inspect(|piece| len += piece.len() as u64);
    files.write_next_log(&mut pieces)?;
    drop(pieces);
    Ok((writer, len))
}

fn most_log(len: u64) -> u64 {
    LEAST_LOG.max(len.saturating_mul(4))
}

/// The runs that may wait for the log.
const MAX_PENDING: usize = if cfg!(test) { 8 } else { 16_384 };
/// A shorter log is not written anew while it is in use.
const LEAST_LOG: u64 = if cfg!(test) { 1 << 10 } else { 16 << 20 };
