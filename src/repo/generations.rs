//! The state of `gc/`: which generation is the last, and which packs nobody may refer to any more.

use std::collections::{BTreeMap, HashSet};

use super::error::RepoError;
use super::format::envelope::MAX_SMALL_FILE;
use super::format::generation::{Condemned, Sweep, encode_mark};
use super::format::{DecodeError, FileKind};
use super::repository::create;
use super::storage::{Storage, StorageError};

/// The last generation, and what is still to be done for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Generations {
    /// The number of the last generation; `None` before the first prune.
    pub(crate) last: Option<u64>,
    /// What it condemned, unless it is done.
    pub(crate) pending: Option<Condemned>,
    /// What is removed for it, once that is decided.
    pub(crate) decided: Option<Sweep>,
}

/// Reads the state.
///
/// Whatever is created or removed meanwhile, what is seen is the state at some moment of the reading or an older
/// number: a generation has its mark `done` before its other files go, and that mark stays for ever.
pub(crate) fn load(storage: &dyn Storage, mac_key: &[u8; 32]) -> Result<Generations, RepoError> {
    let Some((last, parts)) = last_of(storage)? else {
        return Ok(Generations::default());
    };
    let mut state = Generations {
        last: Some(last),
        ..Generations::default()
    };
    if parts.contains(&Part::Done) {
        return Ok(state);
    }
    let pending = read(storage, last, Part::Condemned, |b| {
        Condemned::decode(b, mac_key)
    });
    let decided = read(storage, last, Part::Sweep, |b| Sweep::decode(b, mac_key))?;
    // What a late process publishes once more it publishes after the end, which is looked for last.
    if is_done(storage, last)? {
        return Ok(state);
    }
    let pending = match (pending, &decided) {
        // What was decided says all that counts from then on.
        (Err(error), Some(sweep)) if error.is_damage() => Some(Condemned {
            packs: sweep.packs.clone(),
            dropped: sweep.snapshots.clone(),
            roots: Vec::new(),
        }),
        (pending, _) => pending?,
    };
    if pending.is_none() {
        tracing::warn!(
            generation = last,
            "a generation has an end and no beginning"
        );
        return Ok(state);
    }
    state.pending = pending;
    state.decided = decided;
    Ok(state)
}

/// Gives a generation up whose list cannot be read, by deciding that nothing is removed for it; false when that cannot be.
///
/// Until then nobody may begin to store, who would not know what not to refer to.
pub(crate) fn give_up(storage: &dyn Storage, mac_key: &[u8; 32]) -> Result<bool, RepoError> {
    match last_of(storage)? {
        Some((last, parts)) if parts == [Part::Condemned] => {
            // Another process may decide at the same time: then that counts.
            decide(storage, mac_key, last, &Sweep::default())?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Finds the last generation and its files.
fn last_of(storage: &dyn Storage) -> Result<Option<(u64, Vec<Part>)>, RepoError> {
    let mut files: BTreeMap<u64, Vec<Part>> = BTreeMap::new();
    for file in storage.list("gc/")? {
        if let Some((generation, part)) = parse(&file.name) {
            files.entry(generation).or_default().push(part);
        }
    }
    Ok(files.pop_last())
}

/// Publishes the next generation; false when another process was faster.
pub(crate) fn condemn(
    storage: &dyn Storage,
    mac_key: &[u8; 32],
    generation: u64,
    condemned: &Condemned,
) -> Result<bool, RepoError> {
    let file = condemned.encode(mac_key)?;
    publish_once(storage, generation, Part::Condemned, &file)
}

/// Publishes what is removed for a generation; false when another process has decided.
pub(crate) fn decide(
    storage: &dyn Storage,
    mac_key: &[u8; 32],
    generation: u64,
    sweep: &Sweep,
) -> Result<bool, RepoError> {
    let file = sweep.encode(mac_key)?;
    publish_once(storage, generation, Part::Sweep, &file)
}

/// Ends a generation for which all is removed.
pub(crate) fn end(
    storage: &dyn Storage,
    mac_key: &[u8; 32],
    generation: u64,
) -> Result<(), RepoError> {
    let done = encode_mark(FileKind::Done, mac_key)?;
    match create(storage, &file_name(generation, Part::Done), &done) {
        Ok(()) | Err(RepoError::NotEmpty { .. }) => {}
        Err(other) => return Err(other),
    }
    storage.barrier()?;
    for part in [Part::Condemned, Part::Sweep] {
        match storage.remove(&file_name(generation, part)) {
            Ok(()) | Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Ok(())
}

/// Removes what processes left that were late or died: files of generations that are done.
pub(crate) fn tidy(storage: &dyn Storage) -> Result<(), RepoError> {
    let files = storage.list("gc/")?;
    let parsed = || {
        files
            .iter()
            .filter_map(|f| Some((parse(&f.name)?, &f.name)))
    };
    let done: HashSet<u64> = parsed()
        .filter(|((_, part), _)| *part == Part::Done)
        .map(|((generation, _), _)| generation)
        .collect();
    for ((generation, part), name) in parsed() {
        if part == Part::Done || !done.contains(&generation) {
            continue;
        }
        match storage.remove(name) {
            Ok(()) | Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Ok(())
}

/// Publishes a part that is decided once; what comes after the end of the generation is taken back.
///
/// The name is free again after the end; whoever was so late finds the mark `done`, which came before that.
fn publish_once(
    storage: &dyn Storage,
    generation: u64,
    part: Part,
    bytes: &[u8],
) -> Result<bool, RepoError> {
    let name = file_name(generation, part);
    match create(storage, &name, bytes) {
        Ok(()) => {}
        Err(RepoError::NotEmpty { .. }) => return Ok(false),
        Err(other) => return Err(other),
    }
    if is_done(storage, generation)? {
        match storage.remove(&name) {
            Ok(()) | Err(StorageError::Missing { .. }) => return Ok(false),
            Err(other) => return Err(other.into()),
        }
    }
    storage.barrier()?;
    Ok(true)
}

fn is_done(storage: &dyn Storage, generation: u64) -> Result<bool, RepoError> {
    match storage.len(&file_name(generation, Part::Done)) {
        Ok(_) => Ok(true),
        Err(StorageError::Missing { .. }) => Ok(false),
        Err(other) => Err(other.into()),
    }
}

fn read<T>(
    storage: &dyn Storage,
    generation: u64,
    part: Part,
    decode: impl Fn(&[u8]) -> Result<T, DecodeError>,
) -> Result<Option<T>, RepoError> {
    let name = file_name(generation, part);
    match storage.read(&name, MAX_SMALL_FILE) {
        Ok(bytes) => decode(&bytes).map(Some).map_err(|e| e.in_file(&name)),
        Err(StorageError::Missing { .. }) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

/// A file of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Condemned,
    Sweep,
    Done,
}

impl Part {
    const ALL: [Self; 3] = [Self::Condemned, Self::Sweep, Self::Done];

    const fn word(self) -> &'static str {
        match self {
            Self::Condemned => "condemned",
            Self::Sweep => "sweep",
            Self::Done => "done",
        }
    }
}

fn file_name(generation: u64, part: Part) -> String {
    format!("gc/{generation}.{}", part.word())
}

fn parse(name: &str) -> Option<(u64, Part)> {
    let (number, word) = name.strip_prefix("gc/")?.split_once('.')?;
    let number = number.parse().ok()?;
    let part = Part::ALL.into_iter().find(|p| p.word() == word)?;
    (file_name(number, part) == name).then_some((number, part))
}

#[cfg(test)]
mod tests {
    use super::super::storage::MemoryStorage;
    use super::*;

    const KEY: [u8; 32] = [1; 32];

    #[test]
    fn generation_is_pending_until_it_is_done_and_never_again() {
        let storage = MemoryStorage::new();
        assert_eq!(load(&storage, &KEY).unwrap(), Generations::default());
        let condemned = Condemned::default();
        assert!(condemn(&storage, &KEY, 0, &condemned).unwrap());
        assert!(!condemn(&storage, &KEY, 0, &condemned).unwrap());
        let state = load(&storage, &KEY).unwrap();
        assert_eq!(
            (state.last, state.pending),
            (Some(0), Some(condemned.clone()))
        );
        assert_eq!(state.decided, None);
        assert!(decide(&storage, &KEY, 0, &Sweep::default()).unwrap());
        assert!(!decide(&storage, &KEY, 0, &Sweep::default()).unwrap());
        assert!(load(&storage, &KEY).unwrap().decided.is_some());
        end(&storage, &KEY, 0).unwrap();
        let state = load(&storage, &KEY).unwrap();
        assert_eq!(
            (state.last, state.pending, state.decided),
            (Some(0), None, None)
        );
        assert_eq!(storage.list("gc/").unwrap().len(), 1);
        // The names are free, but who comes now is late.
        assert!(!condemn(&storage, &KEY, 0, &condemned).unwrap());
        assert!(!decide(&storage, &KEY, 0, &Sweep::default()).unwrap());
        assert_eq!(storage.list("gc/").unwrap().len(), 1);
    }

    #[test]
    fn name_that_is_not_exactly_ours_is_no_generation() {
        assert_eq!(parse("gc/12.done"), Some((12, Part::Done)));
        for name in ["gc/012.done", "gc/+1.done", "gc/1", "gc/1.x", "gc/x.done"] {
            assert_eq!(parse(name), None, "{name}");
        }
    }
}
