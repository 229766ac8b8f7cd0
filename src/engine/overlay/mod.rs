//! A disk that clients write over a snapshot's: what they write lies in a folder, and the repository stays as it is.

mod files;
mod lock;
mod log;
mod map;
mod store;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::Mutex;

use super::export::Extents;
use super::workers::blocking;
use super::{EngineError, error};
use crate::nbd::server::{ExportSource, NbdError, SourceRead, all_abilities};
use crate::nbd::session::{BlockSize, Extent, Zeroing};
use crate::nbd::wire::{ErrorCode, TransmissionFlags};
use crate::range::ByteRange;
use files::{Files, LocalFiles};
use lock::{Turn, Turns};
use log::{GRANULE, Head};
use map::State;
use store::{Fill, Store};

/// What an overlay belongs to; one of something else is refused.
#[derive(Clone, Debug)]
pub(super) struct Belongs {
    pub(super) repository: [u8; 16],
    pub(super) snapshot: [u8; 16],
    pub(super) disk: String,
}

/// A writable export: an overlay over a base that does not change.
///
/// The contexts are those of the base, and `qemu:dirty-bitmap:since-ID` of the base's own snapshot: what was written.
/// What was written counts as dirty in all bitmaps.
pub(super) struct OverlayExport {
    base: Arc<dyn ExportSource>,
    store: Arc<Store>,
    turns: Turns,
    written: String,
    /// The commits that were begun.
    begun: AtomicU64,
    /// The last commit that made all durable that was done when it began.
    durable: Mutex<u64>,
}

impl OverlayExport {
    /// Opens the overlay of a disk in a folder, or starts one; returns its file too.
    ///
    /// # Errors
    /// When it belongs to something else, is damaged, is served by another process, or the folder refuses.
    pub(super) fn open(
        folder: &Path,
        belongs: Belongs,
        base: Arc<dyn ExportSource>,
        written: String,
    ) -> Result<(Self, PathBuf), EngineError> {
        let size_bytes = base.size_bytes();
        let failed = |cause: io::Error| EngineError::Overlay {
            folder: folder.display().to_string(),
            disk: belongs.disk.clone(),
            cause,
        };
        let (files, path) = LocalFiles::open(folder, &file_name(&belongs.disk)).map_err(failed)?;
        let head = Head {
            repository: belongs.repository,
            snapshot: belongs.snapshot,
            size_bytes,
            disk: belongs.disk.clone(),
        };
        let store = store(files, head).map_err(failed)?;
        Ok((Self::over(base, store, written), path))
    }

    fn over(base: Arc<dyn ExportSource>, store: Store, written: String) -> Self {
        Self {
            base,
            store: Arc::new(store),
            turns: Turns::default(),
            written,
            begun: AtomicU64::new(0),
            durable: Mutex::new(0),
        }
    }

    /// Makes all durable that was done before this was called; who waits shares the work of who works.
    pub(super) async fn commit(&self) -> Result<(), NbdError> {
        let wanted = self.begun.load(Ordering::SeqCst) + 1;
        let mut durable = self.durable.lock().await;
        if *durable >= wanted {
            return Ok(());
        }
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let store = Arc::clone(&self.store);
        on_thread(move || store.commit()).await?;
        *durable = number;
        Ok(())
    }

    /// Reads a range of the base that is shorter than a granule.
    async fn fill(&self, range: Option<ByteRange>) -> Result<Vec<u8>, NbdError> {
        let Some(range) = range.filter(|range| !range.is_empty()) else {
            return Ok(Vec::new());
        };
        match self.store.runs(range, 1).first() {
            Some((_, State::Base)) => {
                let bytes = self.base.read(range, Vec::new()).await?.into_bytes();
                match bytes.len() as u64 == range.len() {
                    true => Ok(bytes),
                    false => Err(NbdError::io("the snapshot gave another number of bytes")),
                }
            }
            Some((_, State::Zero)) => Ok(vec![0; range.len() as usize]),
            // Its other bytes stand in the file.
            Some((_, State::Data)) | None => Ok(Vec::new()),
        }
    }

    /// Writes bytes at a turn that holds their granules; returns the buffer and the turn.
    async fn put(
        &self,
        offset: u64,
        data: Vec<u8>,
        turn: Turn,
    ) -> Result<(Vec<u8>, Turn), NbdError> {
        let Some(range) = ByteRange::at(offset, data.len() as u64) else {
            return Err(NbdError::io("the range passes the end"));
        };
        let whole = self.store.bytes(&Store::granules(range));
        let fill = Fill {
            head: self
                .fill(ByteRange::new(whole.start(), range.start()))
                .await?,
            tail: self.fill(ByteRange::new(range.end(), whole.end())).await?,
        };
        let store = Arc::clone(&self.store);
        // The turn goes along: a client that hangs up meanwhile does not end the work.
        on_thread(move || {
            store.write(offset, &data, &fill)?;
            Ok((data, turn))
        })
        .await
    }

    async fn make_zero(&self, range: ByteRange, reserve: bool) -> Result<(), NbdError> {
        let granules = Store::granules(range);
        let mut turn = self.turns.take(granules.clone()).await;
        let whole = self.store.bytes(&granules);
        // The granules that lie in the range whole.
        let first = granules.start + u64::from(whole.start() < range.start());
        let last = granules.end - u64::from(range.end() < whole.end());
        let inner = first..last.max(first);
        let parts = match first < last {
            true => {
                let inner = self.store.bytes(&inner);
                [
                    ByteRange::new(range.start(), inner.start()),
                    ByteRange::new(inner.end(), range.end()),
                ]
            }
            // Both ends may lie in two granules, or in one.
            false => {
                let middle = (granules.end - 1) * GRANULE;
                [
                    ByteRange::new(range.start(), middle.clamp(range.start(), range.end())),
                    ByteRange::new(middle.clamp(range.start(), range.end()), range.end()),
                ]
            }
        };
        for part in parts.into_iter().flatten().filter(|part| !part.is_empty()) {
            if let Some((_, State::Zero)) = self.store.runs(part, 1).first() {
                continue;
            }
            let zeros = vec![0; part.len() as usize];
            (_, turn) = self.put(part.start(), zeros, turn).await?;
        }
        let store = Arc::clone(&self.store);
        on_thread(move || {
            store.zero(inner, reserve)?;
            drop(turn);
            Ok(())
        })
        .await
    }

    /// Ends a change: makes it durable where that is asked for, or where too much waits.
    async fn settle(&self, durable: bool) -> Result<(), NbdError> {
        match durable || self.store.is_behind() {
            true => self.commit().await,
            false => Ok(()),
        }
    }

    async fn find(&self, range: ByteRange, buf: Vec<u8>) -> Result<SourceRead, NbdError> {
        let runs = self.store.runs(range, usize::MAX);
        if let [(run, State::Base)] = runs[..] {
            return self.base.read(run, buf).await;
        }
        // What is in the file is read at one go, into one buffer, behind each other.
        let data: Vec<ByteRange> = runs
            .iter()
            .filter(|(_, state)| *state == State::Data)
            .map(|(run, _)| *run)
            .collect();
        let mut read = match data.is_empty() {
            true => SourceRead::new(buf),
            false => {
                let store = Arc::clone(&self.store);
                SourceRead::of_parts(on_thread(move || read_runs(&store, &data, buf)).await?)
            }
        };
        for (run, state) in runs {
            match state {
                State::Zero => read.push_hole(run.len()),
                State::Data => read.push_next(run.len()),
                State::Base => {
                    let found = self.base.read(run, Vec::new()).await?;
                    if found.len() != run.len() {
                        return Err(NbdError::io("the snapshot gave another number of bytes"));
                    }
                    read.append(found);
                }
            }
        }
        Ok(read)
    }

    async fn tell(
        &self,
        context: usize,
        range: ByteRange,
        most: usize,
    ) -> Result<Vec<Extent>, NbdError> {
        let mut found = Extents::new(range, most);
        for (run, state) in self.store.runs(range, MOST_RUNS) {
            let base = match (context, state) {
                (ALLOCATION, State::Base) => Some(ALLOCATION),
                (WRITTEN, State::Base) => None,
                // The contexts behind the one that the base does not have.
                (context, State::Base) => Some(context - 1),
                (_, State::Data | State::Zero) => None,
            };
            let Some(base) = base else {
                let flags = match (context, state) {
                    (ALLOCATION, State::Zero) => HOLE_ZERO,
                    (ALLOCATION, _) | (_, State::Base) => 0,
                    (_, State::Data | State::Zero) => DIRTY,
                };
                match found.add(run, flags) {
                    true => continue,
                    false => break,
                }
            };
            let mut end = run.start();
            for extent in self.base.extents(base, run, most).await? {
                let Some(within) = extent.range.intersect(run) else {
                    break;
                };
                if !found.add(within, extent.flags) {
                    return Ok(found.found);
                }
                end = within.end();
            }
            // The base may tell less than what it was asked for.
            if end < run.end() {
                break;
            }
        }
        Ok(found.found)
    }
}

impl ExportSource for OverlayExport {
    fn size_bytes(&self) -> u64 {
        self.base.size_bytes()
    }

    fn description(&self) -> Option<String> {
        self.base.description()
    }

    fn block_size(&self) -> BlockSize {
        self.base.block_size()
    }

    fn contexts(&self) -> Vec<String> {
        let mut contexts = self.base.contexts();
        contexts.insert(WRITTEN.min(contexts.len()), self.written.clone());
        contexts
    }

    fn abilities(&self) -> TransmissionFlags {
        all_abilities()
    }

    fn read(&self, range: ByteRange, buf: Vec<u8>) -> BoxFuture<'_, Result<SourceRead, NbdError>> {
        self.find(range, buf).boxed()
    }

    fn extents(
        &self,
        context: usize,
        range: ByteRange,
        most: usize,
    ) -> BoxFuture<'_, Result<Vec<Extent>, NbdError>> {
        self.tell(context, range, most).boxed()
    }

    fn write(
        &self,
        offset: u64,
        data: Vec<u8>,
        durable: bool,
    ) -> BoxFuture<'_, Result<Vec<u8>, NbdError>> {
        async move {
            let Some(range) = ByteRange::at(offset, data.len() as u64) else {
                return Err(NbdError::io("the range passes the end"));
            };
            let turn = self.turns.take(Store::granules(range)).await;
            let (data, turn) = self.put(offset, data, turn).await?;
            drop(turn);
            self.settle(durable).await?;
            Ok(data)
        }
        .boxed()
    }

    fn zero(&self, range: ByteRange, how: Zeroing) -> BoxFuture<'_, Result<(), NbdError>> {
        async move {
            self.make_zero(range, how.keep_allocated).await?;
            self.settle(how.durable).await
        }
        .boxed()
    }

    fn trim(&self, range: ByteRange, durable: bool) -> BoxFuture<'_, Result<(), NbdError>> {
        async move {
            self.make_zero(range, false).await?;
            self.settle(durable).await
        }
        .boxed()
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), NbdError>> {
        self.commit().boxed()
    }
}

/// Goes on with what lies in the files, or starts anew where there is nothing.
fn store(files: LocalFiles, head: Head) -> io::Result<Store> {
    let other = |text: String| Err(io::Error::other(text));
    let (len, size) = (files.data_len()?, head.size_bytes);
    if !files.has_log() {
        if len != 0 {
            return other(
                "its map is missing, without which nobody knows what is in it".to_owned(),
            );
        }
        let files = Arc::new(files);
        let store = Store::create(Arc::clone(&files) as Arc<dyn Files>, head)?;
        files.make_data(size)?;
        return Ok(store);
    }
    // A look before anything is written, the new map included.
    let found = log::replay(&files).map_err(|e| io::Error::other(error::chain(&e)))?;
    if found.head != head {
        return other(format!(
            "it belongs to {}, and this is {}; use another folder, or remove it",
            shown(&found.head),
            shown(&head)
        ));
    }
    let held = found.map.held(size.div_ceil(GRANULE));
    let has_data = { held }.any(|(_, state)| state == State::Data);
    if len != size && (len != 0 || has_data) {
        return other(format!("it has {len} bytes in the place of {size}"));
    }
    drop(found);
    if len != size {
        files.make_data(size)?;
    }
    Store::reopen(Arc::new(files)).map_err(|e| io::Error::other(error::chain(&e)))
}

fn shown(head: &Head) -> String {
    let hex = |id: &[u8; 16]| -> String { id.iter().map(|b| format!("{b:02x}")).collect() };
    format!(
        "disk {} of {} bytes of snapshot {} in repository {}",
        head.disk,
        head.size_bytes,
        hex(&head.snapshot),
        hex(&head.repository)
    )
}

/// A disk's name as that of a file: what could mean something to a path stands in hexadecimal.
fn file_name(disk: &str) -> String {
    let plain = |at: usize, byte: u8| {
        byte.is_ascii_alphanumeric() || b"_-".contains(&byte) || (byte == b'.' && at > 0)
    };
    let mut name = String::new();
    for (at, byte) in disk.bytes().enumerate() {
        match plain(at, byte) {
            true => name.push(char::from(byte)),
            false => name.push_str(&format!("%{byte:02x}")),
        }
    }
    name
}

fn read_runs(store: &Store, runs: &[ByteRange], mut buf: Vec<u8>) -> io::Result<Vec<u8>> {
    let length: u64 = runs.iter().map(|run| run.len()).sum();
    buf.resize(length as usize, 0);
    let mut rest = &mut buf[..];
    for run in runs {
        let (part, behind) = rest.split_at_mut(run.len() as usize);
        store.read(run.start(), part)?;
        rest = behind;
    }
    Ok(buf)
}

async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, NbdError> {
    match blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(fault)) => Err(told(&fault)),
        Err(fault) => Err(NbdError::io(fault.to_string())),
    }
}

fn told(fault: &io::Error) -> NbdError {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    let code = match fault.kind() {
        StorageFull | QuotaExceeded => ErrorCode::ENOSPC,
        _ => ErrorCode::EIO,
    };
    NbdError {
        code,
        text: fault.to_string(),
    }
}

/// The place of `base:allocation` among the contexts, of the base and of the overlay.
const ALLOCATION: usize = 0;
/// The place of what was written among the overlay's contexts.
const WRITTEN: usize = 1;
/// The runs that are looked at for one answer.
const MOST_RUNS: usize = 1 << 16;
/// Both bits of `base:allocation`.
const HOLE_ZERO: u64 = 3;
/// The bit of a dirty bitmap.
const DIRTY: u64 = 1;
