//! Published packs: which there are, and the footer of one, checked against its header, hash and name.

use std::collections::BTreeMap;

use super::super::error::RepoError;
use super::super::format::generation::PackName;
use super::super::format::pack::{FooterEntry, PackHeader, PackKind, PackTrailer, decode_footer};
use super::super::ids::{PackId, RepoUuid};
use super::super::storage::Storage;

/// What a pack holds.
#[derive(Debug)]
pub(crate) struct Footer {
    /// The length of the whole file.
    pub(crate) len: u64,
    /// The hash of header and footer.
    pub(crate) hash: [u8; 32],
    pub(crate) entries: Vec<FooterEntry>,
}

/// Lists all packs with their lengths, each once, although a folder that changes may name a file twice.
pub(crate) fn list_packs(storage: &dyn Storage) -> Result<BTreeMap<PackName, u64>, RepoError> {
    let mut packs = BTreeMap::new();
    for kind in [PackKind::Data, PackKind::Meta] {
        for file in storage.list(kind.folder())? {
            packs.extend(
                kind.parse_file_name(&file.name)
                    .map(|id| ((kind, id), file.len)),
            );
        }
    }
    Ok(packs)
}

/// Reads the footer of a pack of this repository; three small reads.
pub(crate) fn read_footer(
    storage: &dyn Storage,
    repo: RepoUuid,
    kind: PackKind,
    pack: PackId,
) -> Result<Footer, RepoError> {
    let file = kind.file_name(&pack);
    let len = storage.len(&file)?;
    let least = (PackHeader::LEN + PackTrailer::LEN) as u64;
    if len < least {
        return Err(RepoError::corrupt(file, len, "a pack is longer"));
    }
    let mut head = [0; PackHeader::LEN];
    storage.read_at(&file, 0, &mut head)?;
    let header = PackHeader::decode(&head, kind).map_err(|e| e.in_file(&file))?;
    if header.pack != pack || header.repo != repo {
        let what = format!("it is pack {} of repository {}", header.pack, header.repo);
        return Err(RepoError::corrupt(file, 0, what));
    }
    let mut trailer = [0; PackTrailer::LEN];
    storage.read_at(&file, len - PackTrailer::LEN as u64, &mut trailer)?;
    let (trailer, footer_at) = PackTrailer::decode(&trailer, len).map_err(|e| e.in_file(&file))?;
    let mut footer = vec![0; trailer.footer_len as usize];
    storage.read_at(&file, footer_at, &mut footer)?;
    if PackTrailer::hash_of(&head, &footer) != trailer.hash {
        return Err(RepoError::corrupt(
            file,
            footer_at,
            "the footer's hash differs",
        ));
    }
    let entries = decode_footer(&footer, footer_at).map_err(|e| e.in_file(&file))?;
    Ok(Footer {
        len,
        hash: trailer.hash,
        entries,
    })
}
