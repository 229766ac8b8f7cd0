//! Overlays against a vector of bytes, and against crashes that lose, keep and tear what was not synced.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use futures::future::{BoxFuture, join_all};

use super::files::Files;
use super::log::{GRANULE, Head, LogError};
use super::map::State;
use super::store::{Fill, Store};
use super::{LocalFiles, OverlayExport, file_name};
use crate::nbd::server::{ExportSource, MemoryDisk};
use crate::nbd::session::Zeroing;
use crate::nbd::wire::ErrorCode;
use crate::range::ByteRange;

/// A small seeded generator (splitmix64).
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// What a crash may leave of, whole or in part.
const SECTOR: u64 = 512;
/// The disk ends within a granule.
const SECTORS: u64 = 40 * GRANULE / SECTOR + 3;
const SIZE: u64 = SECTORS * SECTOR;

/// A file whose bytes are durable once it is synced; until then each sector of each write is or is not.
#[derive(Clone, Default)]
struct Lossy {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<(u64, Vec<u8>)>,
}

impl Lossy {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset as usize + bytes.len();
        self.now.resize(self.now.len().max(end), 0);
        self.now[offset as usize..end].copy_from_slice(bytes);
        self.unsynced.push((offset, bytes.to_vec()));
    }

    fn sync(&mut self) {
        self.durable = self.now.clone();
        self.unsynced.clear();
    }

    /// What is found after the crash.
    fn after_crash(&self, random: &mut Random) -> Vec<u8> {
        let mut found = self.durable.clone();
        for (offset, bytes) in &self.unsynced {
            let range = ByteRange::at(*offset, bytes.len() as u64).unwrap();
            let how = random.below(4);
            for piece in range.split(SECTOR) {
                let keep = how == 0 || (how > 1 && random.below(2) == 0);
                let (start, end) = (piece.start() as usize, piece.end() as usize);
                if keep {
                    found.resize(found.len().max(end), 0);
                    let from = start - *offset as usize;
                    found[start..end].copy_from_slice(&bytes[from..from + end - start]);
                }
            }
        }
        found
    }
}

#[derive(Default)]
struct Disks {
    data: Lossy,
    log: Lossy,
    next: Option<Vec<u8>>,
    /// The calls until the power fails, if it does.
    power: Option<u64>,
    /// Calls that fail, by name.
    fails: BTreeSet<&'static str>,
    /// What happens right after the next sync of the bytes.
    after_sync: Option<Box<dyn FnOnce() + Send>>,
}

/// Both files in memory, with a power that can fail at any call.
struct MemoryFiles(Mutex<Disks>);

impl MemoryFiles {
    fn new() -> Arc<Self> {
        let disks = Disks {
            data: Lossy {
                now: vec![0; SIZE as usize],
                durable: vec![0; SIZE as usize],
                unsynced: Vec::new(),
            },
            ..Disks::default()
        };
        Arc::new(Self(Mutex::new(disks)))
    }

    fn disks(&self) -> MutexGuard<'_, Disks> {
        self.0.lock().unwrap()
    }

    fn call(&self, name: &'static str) -> io::Result<MutexGuard<'_, Disks>> {
        let mut disks = self.disks();
        match &mut disks.power {
            Some(0) => return Err(io::Error::other("no power")),
            Some(left) => *left -= 1,
            None => {}
        }
        match disks.fails.contains(name) {
            true if name == "append_log" => Err(io::ErrorKind::StorageFull.into()),
            true => Err(io::Error::other(name)),
            false => Ok(disks),
        }
    }

    fn crashed(&self, random: &mut Random) -> Arc<Self> {
        let disks = self.disks();
        let after = |file: &Lossy, random: &mut Random| {
            let found = file.after_crash(random);
            Lossy {
                now: found.clone(),
                durable: found,
                unsynced: Vec::new(),
            }
        };
        Arc::new(Self(Mutex::new(Disks {
            data: after(&disks.data, random),
            log: after(&disks.log, random),
            ..Disks::default()
        })))
    }
}

impl Files for MemoryFiles {
    fn read_data(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let disks = self.disks();
        let at = offset as usize;
        buf.copy_from_slice(&disks.data.now[at..at + buf.len()]);
        Ok(())
    }

    fn write_data(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.call("write_data")?.data.write(offset, bytes);
        Ok(())
    }

    fn discard_data(&self, range: ByteRange) {
        if let Ok(mut disks) = self.call("discard_data") {
            let zeros = vec![0; range.len() as usize];
            disks.data.write(range.start(), &zeros);
        }
    }

    fn reserve_data(&self, _: ByteRange) -> io::Result<()> {
        self.call("reserve_data").map(drop)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disks = self.call("sync_data")?;
        disks.data.sync();
        let after = disks.after_sync.take();
        drop(disks);
        after.into_iter().for_each(|after| after());
        Ok(())
    }

    fn log_len(&self) -> io::Result<u64> {
        Ok(self.disks().log.now.len() as u64)
    }

    fn read_log(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let disks = self.disks();
        let at = offset as usize;
        buf.copy_from_slice(&disks.log.now[at..at + buf.len()]);
        Ok(())
    }

    fn append_log(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut disks = self.call("append_log")?;
        assert_eq!(offset, disks.log.now.len() as u64);
        disks.log.write(offset, bytes);
        Ok(())
    }

    fn truncate_log(&self, len: u64) -> io::Result<()> {
        self.call("truncate_log")?.log.now.truncate(len as usize);
        Ok(())
    }

    fn sync_log(&self) -> io::Result<()> {
        self.call("sync_log")?.log.sync();
        Ok(())
    }

    fn write_next_log(&self, pieces: &mut dyn Iterator<Item = Vec<u8>>) -> io::Result<()> {
        let mut disks = self.call("write_next_log")?;
        disks.next = Some(pieces.flatten().collect());
        Ok(())
    }

    fn use_next_log(&self) -> io::Result<()> {
        let mut disks = self.call("use_next_log")?;
        let next = disks.next.take().unwrap();
        disks.log = Lossy {
            now: next.clone(),
            durable: next,
            unsynced: Vec::new(),
        };
        Ok(())
    }
}

fn head() -> Head {
    Head {
        repository: [1; 16],
        snapshot: [2; 16],
        size_bytes: SIZE,
        disk: "vda".into(),
    }
}

/// A snapshot's disk: each sector holds its number, but for some holes.
fn base() -> Arc<MemoryDisk> {
    let disk = MemoryDisk::new(SIZE);
    for sector in 0..SECTORS {
        if sector / 24 % 3 != 1 {
            disk.write(sector * SECTOR, &filled(sector as u32 + 1));
        }
    }
    Arc::new(disk)
}

fn filled(tag: u32) -> Vec<u8> {
    tag.to_le_bytes().repeat(SECTOR as usize / 4)
}

fn over(files: &Arc<MemoryFiles>, base: &Arc<MemoryDisk>) -> OverlayExport {
    let files = Arc::clone(files) as Arc<dyn Files>;
    let store = match files.log_len().unwrap() {
        0 => Store::create(files, head()).unwrap(),
        _ => Store::reopen(files).unwrap(),
    };
    let written = "qemu:dirty-bitmap:since-02".to_owned();
    OverlayExport::over(Arc::clone(base) as Arc<dyn ExportSource>, store, written)
}

async fn read(export: &OverlayExport, range: ByteRange) -> Vec<u8> {
    let found = export.read(range, Vec::new()).await.unwrap();
    found.into_bytes()
}

fn whole() -> ByteRange {
    ByteRange::new(0, SIZE).unwrap()
}

#[tokio::test]
async fn reads_and_extents_are_those_of_a_vector_of_bytes() {
    for seed in 0..20 {
        let mut random = Random(seed);
        let base = base();
        let files = MemoryFiles::new();
        let mut export = over(&files, &base);
        let mut model = base.bytes();
        let before = base.bytes();
        for _ in 0..120 {
            let longest = [10, 5000, 40_000, SIZE][random.below(4) as usize];
            let start = random.below(SIZE);
            let len = (1 + random.below(longest)).min(SIZE - start);
            let range = ByteRange::at(start, len).unwrap();
            let place = start as usize..(start + len) as usize;
            match random.below(7) {
                0..3 => {
                    let byte = random.below(256) as u8;
                    let data = vec![byte; len as usize];
                    model[place].fill(byte);
                    let durable = random.below(4) == 0;
                    export.write(start, data, durable).await.unwrap();
                }
                3 => {
                    model[place].fill(0);
                    let how = Zeroing {
                        durable: random.below(4) == 0,
                        keep_allocated: random.below(2) == 0,
                        fast: random.below(2) == 0,
                    };
                    export.zero(range, how).await.unwrap();
                }
                4 => {
                    model[place].fill(0);
                    export.trim(range, false).await.unwrap();
                }
                5 => export.flush().await.unwrap(),
                _ => {
                    export.flush().await.unwrap();
                    export = over(&files, &base);
                }
            }
            assert_eq!(
                read(&export, range).await,
                model[start as usize..(start + len) as usize]
            );
        }
        assert_eq!(read(&export, whole()).await, model, "seed {seed}");
        assert_eq!(base.bytes(), before);
        for (context, bit) in [(0, 2), (1, 1)] {
            let mut at = 0;
            while at < SIZE {
                let rest = ByteRange::new(at, SIZE).unwrap();
                let most = 1 + random.below(5) as usize;
                let found = export.extents(context, rest, most).await.unwrap();
                assert!(!found.is_empty() && found.len() <= most);
                for extent in found {
                    assert_eq!(extent.range.start(), at);
                    at = extent.range.end();
                    let place = extent.range.start() as usize..at as usize;
                    match (context, extent.flags & bit != 0) {
                        (0, true) => assert!(model[place].iter().all(|byte| *byte == 0)),
                        (1, false) => assert_eq!(model[place.clone()], before[place]),
                        _ => {}
                    }
                }
            }
            assert_eq!(at, SIZE);
        }
    }
}

/// What each sector may hold after a crash.
struct Model {
    /// What was there when a flush began that succeeded.
    durable: Vec<u32>,
    /// What came later, acknowledged or not.
    since: Vec<Vec<u32>>,
    now: Vec<u32>,
}

/// A change of some sectors, or a flush.
#[derive(Clone)]
enum Change {
    Write(std::ops::Range<u64>, u32, bool),
    Zero(std::ops::Range<u64>, bool),
    Flush,
}

fn random_change(random: &mut Random, from: u64, to: u64, tag: u32) -> Change {
    let start = from + random.below(to - from);
    let longest = [1, 9, 40][random.below(3) as usize];
    let end = (start + 1 + random.below(longest)).min(to);
    match random.below(8) {
        0..5 => Change::Write(start..end, tag, random.below(8) == 0),
        5..7 => Change::Zero(start..end, random.below(8) == 0),
        _ => Change::Flush,
    }
}

fn start<'a>(export: &'a OverlayExport, change: &Change) -> BoxFuture<'a, bool> {
    let bytes =
        |s: &std::ops::Range<u64>| ByteRange::new(s.start * SECTOR, s.end * SECTOR).unwrap();
    let change = change.clone();
    Box::pin(async move {
        match change {
            Change::Write(sectors, tag, durable) => {
                let data = filled(tag).repeat((sectors.end - sectors.start) as usize);
                let done = export.write(sectors.start * SECTOR, data, durable).await;
                done.is_ok()
            }
            Change::Zero(sectors, durable) => {
                let how = Zeroing {
                    durable,
                    ..Zeroing::default()
                };
                export.zero(bytes(&sectors), how).await.is_ok()
            }
            Change::Flush => export.flush().await.is_ok(),
        }
    })
}

impl Model {
    fn of(found: &[u8]) -> Self {
        let tags = found
            .chunks(SECTOR as usize)
            .map(|sector| {
                let tag = u32::from_le_bytes(sector[..4].try_into().unwrap());
                assert_eq!(sector, filled(tag), "a sector is torn");
                tag
            })
            .collect::<Vec<_>>();
        Self {
            since: vec![Vec::new(); tags.len()],
            now: tags.clone(),
            durable: tags,
        }
    }

    /// Takes in changes that were made at once, and which of them were acknowledged.
    fn take(&mut self, changes: &[Change], done: &[bool]) {
        let flushed = changes
            .iter()
            .zip(done)
            .any(|(change, done)| *done && matches!(change, Change::Flush));
        if flushed {
            self.durable.clone_from(&self.now);
            self.since.iter_mut().for_each(Vec::clear);
        }
        for (change, done) in changes.iter().zip(done) {
            let (sectors, tag, durable) = match change {
                Change::Write(sectors, tag, durable) => (sectors, *tag, *durable),
                Change::Zero(sectors, durable) => (sectors, 0, *durable),
                Change::Flush => continue,
            };
            for sector in sectors.clone() {
                let at = sector as usize;
                if *done {
                    self.now[at] = tag;
                }
                match durable && *done {
                    true => {
                        self.durable[at] = tag;
                        self.since[at].clear();
                    }
                    false => self.since[at].push(tag),
                }
            }
        }
    }

    fn allows(&self, found: &Self) -> Result<(), String> {
        for (at, tag) in found.now.iter().enumerate() {
            if self.durable[at] != *tag && !self.since[at].contains(tag) {
                return Err(format!(
                    "sector {at} holds {tag:#x} in the place of {:#x} or any of {:x?}",
                    self.durable[at], self.since[at]
                ));
            }
        }
        Ok(())
    }
}

#[tokio::test]
async fn crash_at_any_call_loses_nothing_that_was_flushed() {
    for seed in 0..400 {
        let mut random = Random(seed);
        let base = base();
        let mut files = MemoryFiles::new();
        let mut model = Model::of(&base.bytes());
        let mut tag = 0x1000;
        for life in 0..4 {
            let export = over(&files, &base);
            files.disks().power = Some(random.below(160));
            for _ in 0..60 {
                // At once, in sectors of their own, which lie in granules that others write too.
                let count = 1 + random.below(4);
                let share = SECTORS / count;
                let changes: Vec<Change> = (0..count)
                    .map(|n| {
                        tag += 1;
                        random_change(&mut random, n * share, (n + 1) * share, tag)
                    })
                    .collect();
                let done = join_all(changes.iter().map(|change| start(&export, change))).await;
                model.take(&changes, &done);
                if files.disks().power == Some(0) {
                    break;
                }
            }
            drop(export);
            files = files.crashed(&mut random);
            let export = over(&files, &base);
            let found = Model::of(&read(&export, whole()).await);
            if let Err(fault) = model.allows(&found) {
                panic!("seed {seed}, life {life}: {fault}");
            }
            model = found;
        }
    }
}

#[test]
fn what_is_written_while_a_flush_works_is_not_called_durable_by_it() {
    // Most flushes add to the log, and some write it anew.
    for flushes in 0..60 {
        for seed in 0..4 {
            let files = MemoryFiles::new();
            let store = Arc::new(Store::create(Arc::clone(&files) as _, head()).unwrap());
            let write = |granule: u64, byte: u8| {
                let data = [byte; GRANULE as usize];
                store.write(granule * GRANULE, &data, &Fill::default())
            };
            for at in 0..flushes {
                match at % 2 {
                    0 => write(3, 1).unwrap(),
                    _ => store.zero(3..4, false).unwrap(),
                }
                store.commit().unwrap();
            }
            write(1, 7).unwrap();
            let meanwhile = Arc::clone(&store);
            files.disks().after_sync = Some(Box::new(move || {
                let data = [8; GRANULE as usize];
                meanwhile
                    .write(5 * GRANULE, &data, &Fill::default())
                    .unwrap();
            }));
            store.commit().unwrap();
            let files = files.crashed(&mut Random(seed));
            let store = Store::reopen(Arc::clone(&files) as _).unwrap();
            let granule = |number: u64| {
                let range = ByteRange::at(number * GRANULE, GRANULE).unwrap();
                store.runs(range, 9)
            };
            assert_eq!(granule(1)[0].1, State::Data);
            assert_eq!(granule(5)[0].1, State::Base, "{flushes} {seed}");
        }
    }
}

#[tokio::test]
async fn failed_sync_is_told_and_no_later_flush_succeeds() {
    for name in ["sync_data", "sync_log"] {
        let files = MemoryFiles::new();
        let export = over(&files, &base());
        export.write(0, vec![7; 4096], false).await.unwrap();
        files.disks().fails.insert(name);
        assert_eq!(export.flush().await.unwrap_err().code, ErrorCode::EIO);
        files.disks().fails.clear();
        assert!(export.flush().await.is_err(), "{name}");
        assert!(export.write(0, vec![8; 512], true).await.is_err(), "{name}");
        assert!(export.zero(whole(), Zeroing::default()).await.is_err());
        assert_eq!(read(&export, whole()).await[..4096], [7; 4096]);
    }
}

#[tokio::test]
async fn full_disk_is_told_and_what_waits_is_kept_for_the_next_flush() {
    let (files, base) = (MemoryFiles::new(), base());
    let export = over(&files, &base);
    export.write(4096, vec![7; 4096], false).await.unwrap();
    files.disks().fails.insert("append_log");
    assert_eq!(export.flush().await.unwrap_err().code, ErrorCode::ENOSPC);
    export.write(8192, vec![8; 4096], false).await.unwrap();
    files.disks().fails.clear();
    export.flush().await.unwrap();
    drop(export);
    let files = files.crashed(&mut Random(1));
    let found = read(&over(&files, &base), whole()).await;
    assert_eq!(found[4096..8192], [7; 4096]);
    assert_eq!(found[8192..12288], [8; 4096]);
}

#[tokio::test]
async fn damage_before_the_last_commit_is_no_torn_end() {
    let (files, base) = (MemoryFiles::new(), base());
    let export = over(&files, &base);
    let mut ends = vec![files.log_len().unwrap()];
    for at in 0..4 {
        export.write(at * 8192, vec![7; 4096], true).await.unwrap();
        ends.push(files.log_len().unwrap());
    }
    drop(export);
    let log = files.disks().log.now.clone();
    let replay = |log: Vec<u8>| {
        files.disks().log.now = log;
        super::log::replay(&*files)
    };
    let held = |log: Vec<u8>| replay(log).unwrap().map.held(41).count();
    for at in 0..log.len() {
        let mut damaged = log.clone();
        damaged[at] ^= 0x40;
        match (at as u64) < ends[3] {
            // The head, what was written with it, and all commits but the last one.
            true => assert!(
                matches!(
                    replay(damaged),
                    Err(LogError::Damaged { .. } | LogError::Unsupported(_))
                ),
                "byte {at} of {ends:?}"
            ),
            false => assert_eq!(held(damaged), 3, "byte {at}"),
        }
    }
    for len in ends[3] as usize..log.len() {
        assert_eq!(held(log[..len].to_vec()), 3);
    }
    assert_eq!(held(log), 4);
}

#[test]
fn names_of_disks_stay_in_the_folder() {
    assert_eq!(file_name("vda"), "vda");
    assert_eq!(file_name("../a b/.."), "%2e.%2fa%20b%2f..");
    assert_eq!(file_name(""), "");
    assert_ne!(file_name("a%2f"), file_name("a/"));
}

#[test]
fn files_of_another_disk_or_process_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let open = |head: Head| {
        let (files, _) = LocalFiles::open(folder.path(), "vda")?;
        super::store(files, head)
    };
    let store = open(head()).unwrap();
    assert_eq!(
        open(head()).err().unwrap().kind(),
        io::ErrorKind::ResourceBusy
    );
    drop(store);
    for other in [
        Head {
            repository: [9; 16],
            ..head()
        },
        Head {
            snapshot: [9; 16],
            ..head()
        },
        Head {
            size_bytes: SIZE + 512,
            ..head()
        },
        Head {
            disk: "vdb".into(),
            ..head()
        },
    ] {
        let text = open(other).err().unwrap().to_string();
        assert!(text.contains("belongs to disk vda"), "{text}");
    }
    drop(open(head()).unwrap());
    std::fs::remove_file(folder.path().join("vda.overlay-map")).unwrap();
    let text = open(head()).err().unwrap().to_string();
    assert!(text.contains("map is missing"), "{text}");
}
