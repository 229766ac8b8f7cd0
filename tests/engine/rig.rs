//! A disk in memory, a server, and a repository to back it up to.

use std::path::PathBuf;
use std::sync::Arc;

use nbdbackup::engine::{
    self, BackupDisk, BackupOutcome, BackupRequest, Catalog, CopyOutcome, CopyRequest, EngineError,
    Event, Follow, Observer, RestoreRequest, SourceSpec, Target,
};
use nbdbackup::nbd::server::{MemoryDisk, Server, ServerOptions};
use nbdbackup::range::ByteRange;
use nbdbackup::repo::{ChunkSize, InitOptions, MemoryStorage, Repository};
use tempfile::TempDir;

/// One machine with one disk.
pub(crate) struct Rig {
    pub(crate) disk: Arc<MemoryDisk>,
    pub(crate) catalog: Catalog,
    pub(crate) storage: MemoryStorage,
    folder: TempDir,
}

/// A generator of random numbers that a seed tells all of.
pub(crate) struct Rng(u64);

struct Silent;

impl Observer for Silent {
    fn observe(&self, _: Event) {}
}

impl Rig {
    pub(crate) async fn new(rng: &mut Rng) -> Self {
        let size = 1 + rng.below(24 * CHUNK) as usize;
        Self::of_size(size)
    }

    pub(crate) fn of_size(size: usize) -> Self {
        let (storage, catalog) = new_repository();
        Self {
            disk: Arc::new(MemoryDisk::new(size as u64)),
            catalog,
            storage,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// Changes the disk at random: mostly writes, some zeros, discards, growth, and rarely shrinking.
    pub(crate) fn change(&self, rng: &mut Rng, can_grow: bool) {
        let size = self.disk.bytes().len() as u64;
        let range = |rng: &mut Rng| {
            let start = rng.below(size);
            let len = 1 + rng.below((size - start).min(3 * CHUNK));
            ByteRange::at(start, len.min(size - start)).unwrap()
        };
        match rng.below(16) {
            0..=8 => {
                let range = range(rng);
                let bytes: Vec<u8> = match rng.below(4) {
                    0 => vec![0; range.len() as usize],
                    1 => vec![rng.below(256) as u8; range.len() as usize],
                    _ => (0..range.len()).map(|_| rng.below(256) as u8).collect(),
                };
                self.disk.write(range.start(), &bytes);
            }
            9..=12 => self.disk.discard(range(rng)),
            13 | 14 if can_grow => self.disk.resize(size + 1 + rng.below(6 * CHUNK)),
            13 | 14 => {}
            _ => self.disk.resize(1 + rng.below(size)),
        }
    }

    /// Backs the disk up: in full, or following a bitmap.
    pub(crate) async fn backup(
        &self,
        follow: Option<&str>,
        starts: &[&str],
    ) -> Result<BackupOutcome, EngineError> {
        let follow = follow.map(|bitmap| Follow {
            bitmap: bitmap.to_owned(),
            parent: None,
            no_fallback: false,
        });
        self.backup_with(follow, starts).await
    }

    pub(crate) async fn backup_with(
        &self,
        follow: Option<Follow>,
        starts: &[&str],
    ) -> Result<BackupOutcome, EngineError> {
        let socket = self.folder.path().join("nbd");
        let _ = std::fs::remove_file(&socket);
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let server = Server::new(
            vec![("vda".to_owned(), self.disk.clone() as _)],
            ServerOptions::default(),
        )
        .unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let serving = tokio::spawn(async move {
            server
                .serve(listener.into(), async move { drop(stopped.await) })
                .await
        });
        let uri = format!("nbd+unix:///vda?socket={}", socket.display());
        let request = BackupRequest {
            name: "web1".to_owned(),
            disks: vec![BackupDisk {
                disk: "vda".to_owned(),
                source: SourceSpec::parse(&uri, None).unwrap(),
            }],
            tags: Vec::new(),
            follow,
            starts: starts.iter().map(|s| (*s).to_owned()).collect(),
            connections: 2,
            retry_time: std::time::Duration::ZERO,
            checkpoint_interval_bytes: 1 << 30,
            compression: None,
            verify_writes: true,
        };
        let outcome = engine::backup(
            &self.catalog,
            request,
            Arc::new(Silent),
            std::future::pending(),
        )
        .await;
        drop(stop);
        serving.await.unwrap();
        outcome
    }

    /// Opens the repository anew, as another process would.
    pub(crate) fn reopen(&mut self) {
        let repository = Repository::open(Arc::new(self.storage.clone())).unwrap();
        self.catalog = Catalog::over(repository, "memory");
    }

    /// Restores a snapshot to a file and returns its bytes.
    pub(crate) async fn restore(&self, snapshot: &str) -> Result<Vec<u8>, EngineError> {
        self.restore_from(&self.catalog, snapshot).await
    }

    /// Copies all snapshots to another repository.
    pub(crate) async fn copy_to(&self, other: &Catalog) -> Result<CopyOutcome, EngineError> {
        let request = CopyRequest::default();
        self.catalog.copy_to(other, request, Arc::new(Silent)).await
    }

    /// Restores a snapshot of any repository to a file and returns its bytes.
    pub(crate) async fn restore_from(
        &self,
        catalog: &Catalog,
        snapshot: &str,
    ) -> Result<Vec<u8>, EngineError> {
        let path: PathBuf = self.folder.path().join("restored");
        let request = RestoreRequest {
            snapshot: snapshot.to_owned(),
            disk: None,
            target: Target::Raw(path.clone()),
            overwrite: false,
        };
        engine::restore(catalog, request, Arc::new(Silent)).await?;
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        Ok(bytes)
    }
}

/// Makes a repository in memory.
pub(crate) fn new_repository() -> (MemoryStorage, Catalog) {
    let options = InitOptions {
        chunk_size: ChunkSize::new(CHUNK as u32).unwrap(),
        ..InitOptions::default()
    };
    let storage = MemoryStorage::new();
    let repository = Repository::init(Arc::new(storage.clone()), &options).unwrap();
    (storage, Catalog::over(repository, "memory"))
}

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x0123_4567_89ab_cdef)
    }

    /// A number below `limit`, which is not zero; the xorshift generator is plenty for choosing tests.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

pub(crate) const CHUNK: u64 = 64 << 10;
