//! Checking a repository without any key: what is stored against the checksums beside it.

use super::check::{Checked, check_files, compare, hash_of, list_parity, tell_what_mends};
use super::error::{RepoError, unless_refused};
use super::format::FileKind;
use super::format::config::Config;
use super::format::envelope::{self, MAX_SMALL_FILE};
use super::format::{segment, short_sum};
use super::pack::{list_packs, read_footer};
use super::repository::CONFIG_FILES;
use super::storage::Storage;

/// Reads all files and compares them with their checksums; `progress` is told of bytes read, and of how many.
///
/// Who can write to the storage can make checksums fit: only a check with the key proves more than that nothing broke.
pub fn scrub(storage: &dyn Storage, progress: &dyn Fn(u64, u64)) -> Result<Checked, RepoError> {
    let mut found = Checked::default();
    let config = config(storage, &mut found)?;
    for file in storage.list("")? {
        let name = &file.name;
        let kinds: &[FileKind] = match name.split_once('/') {
            Some(("snap", _)) => &[FileKind::Snapshot, FileKind::Fence],
            Some(("forget", _)) => &[FileKind::Forgotten],
            Some(("bad", _)) => &[FileKind::Bad],
            Some(("verify", _)) => &[FileKind::Verified],
            Some(("idx", _)) => {
                if let Some((_, id)) = segment::parse_file_name(name) {
                    match unless_refused(hash_of(storage, name))? {
                        Ok(hash) if hash == *id.as_bytes() => {}
                        Ok(_) => found.file(name, "its hash is not its name"),
                        // Removed since it was listed.
                        Err(RepoError::Missing { .. }) => {}
                        Err(error) => found.fault(name, &error),
                    }
                }
                continue;
            }
            _ => continue,
        };
        let read = storage.read(name, MAX_SMALL_FILE);
        let bytes = match unless_refused(read.map_err(RepoError::from))? {
            Ok(bytes) => bytes,
            Err(RepoError::Missing { .. }) => continue,
            Err(error) => {
                found.fault(name, &error);
                continue;
            }
        };
        let mut read = kinds
            .iter()
            .map(|kind| envelope::unwrap(&bytes, *kind, true));
        let whole = read.any(|opened| opened.is_ok());
        if let Some(first) = kinds.first().filter(|_| !whole)
            && let Err(error) = envelope::unwrap(&bytes, *first, true)
        {
            found.fault(name, &error.in_file(name));
        }
        found.snapshots += u64::from(whole && name.starts_with("snap/"));
    }
    packs(storage, &config, &mut found, progress)?;
    tell_what_mends(storage, config.uuid, &mut found)?;
    Ok(found)
}

fn config(storage: &dyn Storage, found: &mut Checked) -> Result<Config, RepoError> {
    let mut good = None;
    let mut first = None;
    for file in CONFIG_FILES {
        let read = storage
            .read(file, MAX_SMALL_FILE)
            .map_err(RepoError::from)
            .and_then(|bytes| Config::decode_keyless(&bytes).map_err(|e| e.in_file(file)));
        match unless_refused(read)? {
            Ok(config) => good = good.or(Some(config)),
            Err(error) => {
                found.fault(file, &error);
                first = first.or(Some(error));
            }
        }
    }
    match (good, first) {
        (Some(config), _) => Ok(config),
        (None, Some(error)) => Err(error),
        (None, None) => Err(RepoError::NotARepository {
            place: storage.place(),
        }),
    }
}

fn packs(
    storage: &dyn Storage,
    config: &Config,
    found: &mut Checked,
    progress: &dyn Fn(u64, u64),
) -> Result<(), RepoError> {
    let parity = list_parity(storage)?;
    let packs = list_packs(storage)?;
    found.pack_bytes = packs.values().sum();
    let mut buffer = Vec::new();
    for (name, len) in &packs {
        let file = name.0.file_name(&name.1);
        let footer = read_footer(storage, config.uuid, name.0, name.1);
        let footer = match unless_refused(footer)? {
            Ok(footer) => footer,
            // Removed since it was listed.
            Err(RepoError::Missing { .. }) => continue,
            Err(error) => {
                found.fault(&file, &error);
                continue;
            }
        };
        found.packs += 1;
        let damaged = found.files_total;
        for entry in &footer.entries {
            buffer.resize(entry.len as usize, 0);
            let read = storage.read_at(&file, entry.offset.into(), &mut buffer);
            match unless_refused(read.map_err(RepoError::from))? {
                Ok(()) if short_sum(&buffer) == entry.sum => {}
                Ok(()) => {
                    let what = "the record's checksum differs";
                    let error = RepoError::corrupt(&file, entry.offset.into(), what);
                    found.fault(&file, &error);
                }
                Err(RepoError::Missing { .. }) => break,
                Err(error) => found.fault(&file, &error),
            }
        }
        if found.files_total == damaged
            && let Some(problem) = compare(storage, config.uuid, name)?
        {
            found.parity(&name.1, problem);
        }
        found.read_packs += 1;
        found.read_bytes += len;
        progress(found.read_bytes, found.pack_bytes);
    }
    check_files(storage, config.uuid, config.parity, &parity, &packs, found)
}
