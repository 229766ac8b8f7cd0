//! Parity: whether each pack has it, and whether it is as it was; and whether it can mend a damaged pack.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{Checked, DamagedFile};
use crate::repo::error::{RepoError, unless_refused};
use crate::repo::format::generation::PackName;
use crate::repo::format::pack::{PackHeader, PackKind};
use crate::repo::format::parity::{FOLDER, file_name, parse_file_name};
use crate::repo::ids::{PackId, RepoUuid};
use crate::repo::parity::{Parity, Shards, read_any_header, read_header};
use crate::repo::storage::{Storage, StorageError};

impl Checked {
    pub(crate) fn parity(&mut self, pack: &PackId, problem: impl Into<String>) {
        self.parity_total += 1;
        if self.parity.len() < super::LISTED {
            self.parity.push(DamagedFile {
                file: file_name(pack),
                problem: problem.into(),
                repaired: false,
                parity: None,
            });
        }
    }
}

/// Lists the packs that have parity.
pub(crate) fn list(storage: &dyn Storage) -> Result<BTreeSet<PackId>, RepoError> {
    let files = storage.list(FOLDER)?;
    Ok(files
        .iter()
        .filter_map(|file| parse_file_name(&file.name))
        .collect())
}

/// Looks at the parity files that were there before the packs were listed, as far as their headers tell.
pub(crate) fn check_files(
    storage: &dyn Storage,
    repo: RepoUuid,
    parity: Parity,
    listed: &BTreeSet<PackId>,
    packs: &BTreeMap<PackName, u64>,
    found: &mut Checked,
) -> Result<(), RepoError> {
    for id in listed {
        let name = [PackKind::Data, PackKind::Meta].map(|kind| (kind, *id));
        let pack = name.iter().find_map(|name| packs.get_key_value(name));
        let header = read_any_header(storage, repo, &file_name(id));
        let problem = match (unless_refused(header)?, pack) {
            // Removed with its pack since it was listed.
            (Err(RepoError::Missing { .. }), _) => continue,
            (_, None) if gone_for_good(storage, id)? => "it belongs to no pack".to_owned(),
            (_, None) => continue,
            (Err(error), Some(_)) => error.to_string(),
            (Ok(header), Some((name, len))) => {
                if header.pack != *name {
                    let (kind, pack) = header.pack;
                    format!("it belongs to {}", kind.file_name(&pack))
                } else if header.shape.pack_len() != *len {
                    let was = header.shape.pack_len();
                    format!("it is of a pack of {was} bytes, and the pack has {len}")
                } else {
                    found.parity_files += 1;
                    continue;
                }
            }
        };
        found.parity(id, problem);
    }
    if parity == Parity::NONE {
        return Ok(());
    }
    let without: Vec<&PackName> = packs
        .keys()
        .filter(|name| !listed.contains(&name.1))
        .collect();
    if without.is_empty() {
        return Ok(());
    }
    let sessions = announced(storage)?;
    for name in without {
        // A session writes a pack first, then its parity; a prune removes the pack first.
        let there = storage.len(&file_name(&name.1)).is_ok();
        let pack_there = storage.len(&name.0.file_name(&name.1)).is_ok();
        if !there && pack_there && !is_being_written(storage, name, &sessions) {
            found.parity(&name.1, "it is missing");
        }
    }
    Ok(())
}

/// Compares the parity of a pack with the sums that it holds, and says what does not fit.
///
/// What is wrong with its header, [`check_files`] says. The pack proves itself by other sums; reading all of it once more
/// for these would cost a check a third of its time.
pub(crate) fn compare(
    storage: &dyn Storage,
    repo: RepoUuid,
    name: &PackName,
) -> Result<Option<String>, RepoError> {
    let shards =
        read_header(storage, repo, name).and_then(|header| Shards::read(storage, header, true));
    Ok(match unless_refused(shards)? {
        Ok(shards) => match shards.lost() {
            0 => None,
            lost => Some(format!("{lost} of its parts do not have their sums")),
        },
        Err(_) => None,
    })
}

/// Finds out for the first damaged packs whether their parity can mend them.
pub(crate) fn tell_what_mends(
    storage: &dyn Storage,
    repo: RepoUuid,
    found: &mut Checked,
) -> Result<(), RepoError> {
    let mut known: BTreeMap<PackName, Option<bool>> = BTreeMap::new();
    for file in &mut found.files {
        let kinds = [PackKind::Data, PackKind::Meta].into_iter();
        let mut names = kinds.filter_map(|kind| Some((kind, kind.parse_file_name(&file.file)?)));
        let Some(name) = names.next() else {
            continue;
        };
        file.parity = match known.get(&name) {
            Some(known) => *known,
            None if known.len() >= LOOKED_AT => continue,
            None => {
                let shards = read_header(storage, repo, &name)
                    .and_then(|header| Shards::read(storage, header, false));
                let enough = unless_refused(shards)?
                    .ok()
                    .map(|shards| shards.is_enough());
                known.insert(name, enough);
                enough
            }
        };
    }
    Ok(())
}

/// Whether a pack of which there is parity is not there; it never comes back, since names are not used twice.
fn gone_for_good(storage: &dyn Storage, pack: &PackId) -> Result<bool, RepoError> {
    for kind in [PackKind::Data, PackKind::Meta] {
        match storage.len(&kind.file_name(pack)) {
            Ok(_) => return Ok(false),
            Err(StorageError::Missing { .. }) => {}
            Err(other) => return Err(other.into()),
        }
    }
    Ok(storage.len(&file_name(pack)).is_ok())
}

/// The sessions that are open, as their announcements' names say.
fn announced(storage: &dyn Storage) -> Result<HashSet<String>, RepoError> {
    let files = storage.list("sess/")?;
    Ok(files
        .iter()
        .filter_map(|file| file.name.strip_prefix("sess/")?.split_once('.'))
        .map(|(session, _)| session.to_owned())
        .collect())
}

fn is_being_written(storage: &dyn Storage, name: &PackName, sessions: &HashSet<String>) -> bool {
    let mut head = [0; PackHeader::LEN];
    let read = storage.read_at(&name.0.file_name(&name.1), 0, &mut head);
    let header = read
        .ok()
        .and_then(|()| PackHeader::decode(&head, name.0).ok());
    header.is_some_and(|header| sessions.contains(&header.session.to_string()))
}

/// How many damaged packs are read for this.
const LOOKED_AT: usize = 100;
