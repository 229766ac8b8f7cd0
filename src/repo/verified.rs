//! Remembering which packs were read and found whole when, so that a month of partial checks reads all.

use std::collections::HashMap;

use super::error::RepoError;
use super::format::generation::PackName;
use super::format::health::Verified;
use super::ids::{random_bytes, to_hex};
use super::repository::{Repository, create};
use super::storage::StorageError;

/// What earlier checks read.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    when: HashMap<PackName, i64>,
    files: Vec<String>,
    /// The files that cannot be read: no more than that packs are read again is lost with them.
    pub(crate) unreadable: Vec<(String, RepoError)>,
}

impl Journal {
    pub(crate) fn load(repo: &Repository) -> Result<Self, RepoError> {
        let mut journal = Self::default();
        for file in repo.storage().list(FOLDER)? {
            let decode = |bytes: &[u8]| Verified::decode(bytes, repo.keys().mac());
            match repo.read_hint(&file.name, decode)? {
                None => {}
                Some(Ok(verified)) => {
                    for (pack, when) in verified.packs {
                        let last = journal.when.entry(pack).or_insert(when);
                        *last = when.max(*last);
                    }
                    journal.files.push(file.name);
                }
                Some(Err(error)) => journal.unreadable.push((file.name, error)),
            }
        }
        Ok(journal)
    }

    /// Picks the packs that were not read for the longest time, until they make up so much of all bytes.
    pub(crate) fn choose(
        &self,
        packs: impl Iterator<Item = (PackName, u64)>,
        percent: f64,
    ) -> Vec<PackName> {
        let mut all: Vec<(Option<i64>, PackName, u64)> = packs
            .map(|(name, len)| (self.when.get(&name).copied(), name, len))
            .collect();
        all.sort_unstable();
        let total: u64 = all.iter().map(|(_, _, len)| len).sum();
        let most = total as f64 * percent / 100.0;
        let mut chosen = Vec::new();
        let mut bytes = 0_u64;
        for (_, name, len) in all {
            if bytes as f64 >= most {
                break;
            }
            bytes = bytes.saturating_add(len);
            chosen.push(name);
        }
        chosen
    }

    /// Adds packs that were read now, in one file that takes the place of those before.
    pub(crate) fn add(
        mut self,
        repo: &Repository,
        read: &[PackName],
        now_unix_nanos: i64,
        is_there: impl Fn(&PackName) -> bool,
    ) -> Result<(), RepoError> {
        for pack in read {
            self.when.insert(*pack, now_unix_nanos);
        }
        let mut packs: Vec<(PackName, i64)> =
            self.when.into_iter().filter(|(p, _)| is_there(p)).collect();
        packs.sort_unstable();
        let name: [u8; 16] = random_bytes()?;
        let file = Verified { packs }.encode(repo.keys().mac())?;
        create(
            &**repo.storage(),
            &format!("{FOLDER}{}", to_hex(&name)),
            &file,
        )?;
        repo.storage().barrier()?;
        for old in &self.files {
            match repo.storage().remove(old) {
                Ok(()) | Err(StorageError::Missing { .. }) => {}
                Err(other) => return Err(other.into()),
            }
        }
        Ok(())
    }
}

const FOLDER: &str = "verify/";

#[cfg(test)]
mod tests {
    use super::super::format::pack::PackKind;
    use super::super::ids::PackId;
    use super::*;

    #[test]
    fn packs_take_turns_until_all_were_read() {
        let name = |n: u8| (PackKind::Data, PackId::from_bytes([n; 16]));
        let all = || (0..10).map(|n| (name(n), 100));
        let mut journal = Journal::default();
        let mut seen = std::collections::HashSet::new();
        for day in 0..4 {
            let chosen = journal.choose(all(), 25.0);
            assert_eq!(chosen.len(), 3);
            for pack in chosen {
                seen.insert(pack);
                journal.when.insert(pack, day);
            }
        }
        assert_eq!(seen.len(), 10);
        assert_eq!(journal.choose(all(), 100.0).len(), 10);
        assert_eq!(journal.choose(all(), 0.0), []);
        // What is new comes first.
        let with_new = all().chain([(name(77), 1)]);
        assert_eq!(journal.choose(with_new, 0.01), [name(77)]);
    }
}
