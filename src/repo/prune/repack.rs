//! Writing packs anew with what is needed of old ones, each record proved before it is copied.

use std::collections::HashMap;

use super::plan::Plan;
use crate::repo::cipher::Encryption;
use crate::repo::error::RepoError;
use crate::repo::format::generation::PackName;
use crate::repo::format::pack::FooterEntry;
use crate::repo::format::short_sum;
use crate::repo::ids::{SnapshotId, to_hex};
use crate::repo::pack::{Appended, Body, Packs, Record, read_footer};
use crate::repo::repository::Repository;
use crate::repo::verify::{RecordBuffers, read_verified};

/// What was written.
#[derive(Debug, Default)]
pub(super) struct Repacked {
    /// The packs that hold something damaged: they must stay.
    pub(super) damaged: Vec<(PackName, RepoError)>,
    pub(super) written_bytes: u64,
}

/// Copies what is needed of the plan's packs into new ones, and returns when these are durable and in the index.
pub(super) fn repack(
    repo: &Repository,
    plan: &Plan,
    pack_bytes: u64,
) -> Result<Repacked, RepoError> {
    let mut done = Repacked::default();
    let mut moves = plan.moves().peekable();
    if moves.peek().is_none() {
        return Ok(done);
    }
    let packs = Packs::new(repo, SnapshotId::random()?, pack_bytes)?;
    let mut buffers = RecordBuffers::default();
    for (name, offsets) in moves {
        match copy(repo, &packs, name, offsets, &mut buffers) {
            Ok(()) => {}
            Err(error) if error.is_damage() || matches!(error, RepoError::Missing { .. }) => {
                tracing::error!(%error, "a pack is damaged; it is left as it is");
                done.damaged.push((*name, error));
            }
            Err(other) => return Err(other),
        }
        if packs.remembered() >= REMEMBERED {
            packs.drain()?;
            index(repo, &packs)?;
        }
    }
    let written = packs.finish()?;
    index(repo, &packs)?;
    done.written_bytes = written.iter().map(|pack| pack.len).sum();
    Ok(done)
}

fn copy(
    repo: &Repository,
    packs: &Packs,
    name: &PackName,
    needed: &[(u32, u32)],
    buffers: &mut RecordBuffers,
) -> Result<(), RepoError> {
    let footer = read_footer(&**repo.storage(), repo.uuid(), name.0, name.1)?;
    let entries: HashMap<u32, &FooterEntry> =
        footer.entries.iter().map(|e| (e.offset, e)).collect();
    for (offset, _) in needed {
        let Some(entry) = entries.get(offset) else {
            return Err(RepoError::corrupt(
                name.0.file_name(&name.1),
                (*offset).into(),
                "the index knows a record here, the footer does not",
            ));
        };
        read_verified(repo, name, entry, buffers)?;
        let (proved, body) = match entry.flags.encryption() {
            Some(Encryption::Aes256Gcm) => (
                short_sum(&buffers.opened),
                Body::ToSeal(&mut buffers.opened),
            ),
            _ => (entry.sum, Body::Clear(&buffers.stored)),
        };
        let record = Record {
            body,
            flags: entry.flags.compression(),
            proved: Some(proved),
        };
        match packs.append(name.0, &entry.id, record)? {
            Appended::Now(_) | Appended::Before(_) => {}
            Appended::Changed => {
                return Err(RepoError::Misread {
                    what: format!("record {}", to_hex(&entry.id)),
                });
            }
        }
    }
    Ok(())
}

/// Puts what is published into the index, once it is durable.
fn index(repo: &Repository, packs: &Packs) -> Result<(), RepoError> {
    let (entries, table) = packs.published();
    repo.storage().barrier()?;
    if !entries.is_empty() {
        repo.index().add(entries.clone(), &table)?;
        packs.forget(&entries);
        repo.storage().barrier()?;
    }
    Ok(())
}

/// How many records are remembered before they are written to the index.
const REMEMBERED: usize = 200_000;
