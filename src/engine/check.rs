//! Checking a repository, mending it, and fetching what it lost from a copy.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;

use super::catalog::Catalog;
use super::error::{EngineError, repository};
use super::event::{Event, Observer, Progress};
use super::workers::blocking;
use crate::repo::{CheckOptions, Checked, LocalStorage, Repaired, RepoError, Storage, scrub};

/// What to check.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CheckRequest {
    /// How much of the packs is read, in percent; `None` reads their footers only.
    pub read_data_percent: Option<f64>,
    /// Whether to mend what can be mended.
    pub repair: bool,
}

/// What a check found.
#[derive(Clone, Debug)]
pub struct CheckOutcome {
    /// Where the repository lies.
    pub repository: String,
    /// Whether it was checked without its key, so that nothing is said of snapshots and maps.
    pub keyless: bool,
    /// What was found.
    pub checked: Checked,
    /// How long it took.
    pub duration: Duration,
}

/// What was mended, from parity and from a copy of the repository.
#[derive(Clone, Debug)]
pub struct RepairOutcome {
    /// Where the repository lies.
    pub repository: String,
    /// Where the copy lies, if there is one.
    pub from: Option<String>,
    /// What was mended and fetched.
    pub repaired: Repaired,
    /// The files of parity that were written anew.
    pub parity_made: Vec<String>,
    /// What a check found afterwards.
    pub checked: Checked,
}

impl Catalog {
    /// Checks the repository, and mends it where that is asked for.
    ///
    /// # Errors
    /// When the storage refuses; damage is no error, but what the outcome tells.
    pub async fn check(
        &self,
        request: CheckRequest,
        observer: Arc<dyn Observer>,
    ) -> Result<CheckOutcome, EngineError> {
        let clock = Instant::now();
        let checked = self.look(request, observer).await?;
        Ok(CheckOutcome {
            repository: self.path().to_owned(),
            keyless: false,
            checked,
            duration: clock.elapsed(),
        })
    }

    /// Mends damaged packs from parity or a copy of the repository's files, and fetches damaged snapshots from that copy,
    /// each proved first; then makes parity anew where it is damaged or missing.
    ///
    /// With `read_data` all records are read first, to find those that are damaged.
    ///
    /// # Errors
    /// When one of the two places refuses.
    pub async fn repair(
        &self,
        from: Option<PathBuf>,
        read_data: bool,
        observer: Arc<dyn Observer>,
    ) -> Result<RepairOutcome, EngineError> {
        let shown = from.as_ref().map(|from| from.display().to_string());
        let copy = match from {
            None => None,
            Some(from) => {
                let failed = repository(&from.display().to_string());
                let open = move || LocalStorage::open(&from).map_err(RepoError::from);
                Some(Arc::new(blocking(open).await?.map_err(failed)?))
            }
        };
        let mut mend = CheckRequest {
            read_data_percent: read_data.then_some(100.0),
            repair: true,
        };
        let mut repaired = Repaired::default();
        // What is missing must be known before it can be fetched: snapshots first, then maps level by level, then chunks.
        for _ in 0..TURNS {
            self.look(mend, Arc::clone(&observer)).await?;
            mend.read_data_percent = None;
            let (ours, copy) = (Arc::clone(self.repository()), copy.clone());
            let turn = blocking(move || {
                let copy = copy.as_deref().map(|copy| copy as &dyn Storage);
                ours.repair(copy)
            });
            let turn = turn.await?.map_err(self.failed())?;
            let last = turn.fetched.is_empty() && turn.mended.is_empty();
            repaired.mended.extend(turn.mended);
            repaired.fetched.extend(turn.fetched);
            repaired.fetched_bytes += turn.fetched_bytes;
            repaired.whole.extend(turn.whole);
            repaired.failed = turn.failed;
            if last {
                break;
            }
        }
        let ours = Arc::clone(self.repository());
        let parity_made = blocking(move || ours.mend_parity(read_data)).await?;
        let parity_made = parity_made.map_err(self.failed())?;
        let checked = self.look(CheckRequest::default(), observer).await?;
        Ok(RepairOutcome {
            repository: self.path().to_owned(),
            from: shown,
            repaired,
            parity_made,
            checked,
        })
    }

    async fn look(
        &self,
        request: CheckRequest,
        observer: Arc<dyn Observer>,
    ) -> Result<Checked, EngineError> {
        let options = CheckOptions {
            read_data_percent: request.read_data_percent,
            repair: request.repair,
            now_unix_nanos: Utc::now().timestamp_nanos_opt().unwrap_or(i64::MAX),
        };
        let repository = Arc::clone(self.repository());
        blocking(move || repository.check(&options, &|done, total| tell(&*observer, done, total)))
            .await?
            .map_err(self.failed())
    }
}

/// Checks the files in a directory without any key, against the checksums beside them.
///
/// # Errors
/// When there is no repository, or the storage refuses.
pub async fn check_keyless(
    path: PathBuf,
    observer: Arc<dyn Observer>,
) -> Result<CheckOutcome, EngineError> {
    let clock = Instant::now();
    let shown = path.display().to_string();
    let checked = blocking(move || {
        let storage = match LocalStorage::open(&path).map_err(RepoError::from) {
            Ok(storage) => storage,
            Err(RepoError::Missing { file }) => {
                return Err(RepoError::NotARepository { place: file });
            }
            Err(other) => return Err(other),
        };
        if storage.len("config").is_err() && storage.len("config.bak").is_err() {
            return Err(RepoError::NotARepository {
                place: storage.place(),
            });
        }
        scrub(&storage, &|done, total| tell(&*observer, done, total))
    })
    .await?
    .map_err(repository(&shown))?;
    Ok(CheckOutcome {
        repository: shown,
        keyless: true,
        checked,
        duration: clock.elapsed(),
    })
}

/// A snapshot, seven levels of a map, and chunks may each hide the next.
const TURNS: usize = 10;

fn tell(observer: &dyn Observer, done_bytes: u64, total_bytes: u64) {
    observer.observe(Event::Progress(Progress {
        disk: "packs".to_owned(),
        done_bytes,
        total_bytes,
        moved_bytes: done_bytes,
        new_bytes: 0,
    }));
}
