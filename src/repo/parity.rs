//! Parity of packs: writing it, looking how much of it and of its pack is whole, and computing a pack from it.

use std::fmt;

use super::error::{RepoError, unless_refused};
use super::format::generation::PackName;
use super::format::parity::{MAX_PARITY, ParityHeader, Shape, compute, file_name, restore};
use super::ids::RepoUuid;
use super::storage::{Storage, StorageError};

/// How many lost parts of each pack, of 64 at most, its parity makes up for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parity(u8);

impl Parity {
    /// Packs have no parity.
    pub const NONE: Self = Self(0);

    /// Takes 0, which is none, to 16.
    pub fn new(shards: u8) -> Option<Self> {
        (shards <= MAX_PARITY).then_some(Self(shards))
    }

    /// The number of parts.
    pub fn shards(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Parity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Default for Parity {
    fn default() -> Self {
        Self(4)
    }
}

/// Writes the parity of a pack that is published and whole; nothing where there is to be none.
///
/// Somebody else's of the same pack is as good, and stays unless it is to be replaced.
pub(crate) fn write(
    storage: &dyn Storage,
    repo: RepoUuid,
    pack: &PackName,
    pack_len: u64,
    parity: Parity,
    replace: bool,
) -> Result<(), RepoError> {
    if parity == Parity::NONE {
        return Ok(());
    }
    let shape = Shape::of(pack_len, parity.0)
        .ok_or_else(|| RepoError::misuse(format!("a pack of {pack_len} bytes has no parity")))?;
    let file = pack.0.file_name(&pack.1);
    let read = &mut |at, bytes: &mut [u8]| Ok(storage.read_at(&file, at, bytes)?);
    let (sums, shards) = match compute(&shape, read) {
        Ok(computed) => computed,
        // A prune removed the pack, of a session that it took for dead: that one is told when it commits.
        Err(RepoError::Missing { .. }) => return Ok(()),
        Err(other) => return Err(other),
    };
    let header = ParityHeader {
        repo,
        pack: *pack,
        shape,
        sums,
    };
    let mut new = storage.create()?;
    new.write(&header.encode())?;
    for shard in &shards {
        new.write(shard)?;
    }
    let name = file_name(&pack.1);
    let done = match replace {
        true => new.replace(&name),
        false => new.publish(&name),
    };
    match done {
        Ok(()) | Err(StorageError::Exists { .. }) => Ok(()),
        Err(other) => Err(other.into()),
    }
}

/// Reads the header of a pack's parity, and proves that it is of that pack of this repository.
pub(crate) fn read_header(
    storage: &dyn Storage,
    repo: RepoUuid,
    pack: &PackName,
) -> Result<ParityHeader, RepoError> {
    let file = file_name(&pack.1);
    let header = read_any_header(storage, repo, &file)?;
    if header.pack != *pack {
        let what = format!("it belongs to {}", header.pack.0.file_name(&header.pack.1));
        return Err(RepoError::corrupt(file, 0, what));
    }
    Ok(header)
}

/// The same for a file of which only the name is known.
pub(crate) fn read_any_header(
    storage: &dyn Storage,
    repo: RepoUuid,
    file: &str,
) -> Result<ParityHeader, RepoError> {
    let len = storage.len(file)?;
    let mut head = vec![
        0;
        usize::try_from(len)
            .map_or(ParityHeader::MAX_LEN, |len| len.min(ParityHeader::MAX_LEN))
    ];
    storage.read_at(file, 0, &mut head)?;
    let header = ParityHeader::decode(&head, len).map_err(|e| e.in_file(file))?;
    if header.repo != repo {
        let what = format!("it is of repository {}", header.repo);
        return Err(RepoError::corrupt(file, 0, what));
    }
    Ok(header)
}

/// A pack and its parity, shard by shard.
#[derive(Debug)]
pub(crate) struct Shards {
    header: ParityHeader,
    /// Which of all shards are as they were.
    good: Vec<bool>,
}

impl Shards {
    /// Reads all shards, or those of the parity only, and compares them with their sums.
    pub(crate) fn read(
        storage: &dyn Storage,
        header: ParityHeader,
        parity_only: bool,
    ) -> Result<Self, RepoError> {
        let shape = header.shape;
        let mut good = vec![true; shape.shards()];
        let mut buffer = vec![0; PIECE];
        for (shard, good) in good.iter_mut().enumerate() {
            if parity_only && shard < shape.data() {
                continue;
            }
            *good = is_good(storage, &header, shard, &mut buffer)?;
        }
        Ok(Self { header, good })
    }

    /// The number of shards that are damaged or gone.
    pub(crate) fn lost(&self) -> usize {
        self.good.iter().filter(|good| !**good).count()
    }

    /// Whether what is left is enough to compute the pack.
    pub(crate) fn is_enough(&self) -> bool {
        self.lost() <= self.header.shape.parity()
    }

    /// Says how many shards of a pack and of its parity are lost.
    fn says(&self) -> String {
        let shape = self.header.shape;
        format!(
            "{} of {} parts of it and of its parity are damaged, and parity makes up for {}",
            self.lost(),
            shape.shards(),
            shape.parity()
        )
    }
}

/// Computes a pack from what is left of it and of its parity; it is not proved yet.
pub(crate) fn rebuild(
    storage: &dyn Storage,
    repo: RepoUuid,
    pack: &PackName,
) -> Result<Vec<u8>, RepoError> {
    let shards = Shards::read(storage, read_header(storage, repo, pack)?, false)?;
    let file = pack.0.file_name(&pack.1);
    if !shards.is_enough() {
        return Err(RepoError::corrupt(file, 0, shards.says()));
    }
    let Shards { header, good } = shards;
    let shape = header.shape;
    let shard_len = usize::try_from(shape.shard_len()).unwrap_or(usize::MAX);
    let mut data = vec![0; shard_len.saturating_mul(shape.data())];
    for (shard, bytes) in data.chunks_mut(shard_len).enumerate() {
        if good[shard] {
            let stored = usize::try_from(shape.stored_len(shard)).unwrap_or(shard_len);
            storage.read_at(&file, shape.data_at(shard), &mut bytes[..stored])?;
        }
    }
    let mut parity = Vec::with_capacity(shape.parity());
    for shard in 0..shape.parity() {
        parity.push(match good[shape.data() + shard] {
            true => {
                let mut bytes = vec![0; shard_len];
                storage.read_at(&file_name(&pack.1), shape.parity_at(shard), &mut bytes)?;
                Some(bytes)
            }
            false => None,
        });
    }
    restore(&shape, &mut data, &good[..shape.data()], &parity)?;
    data.truncate(usize::try_from(shape.pack_len()).unwrap_or(usize::MAX));
    Ok(data)
}

/// Whether a shard is as it was; what the medium cannot read, or what is not there, is not.
fn is_good(
    storage: &dyn Storage,
    header: &ParityHeader,
    shard: usize,
    buffer: &mut [u8],
) -> Result<bool, RepoError> {
    let shape = header.shape;
    let (kind, pack) = header.pack;
    let (file, start, stored) = match shard.checked_sub(shape.data()) {
        None => (
            kind.file_name(&pack),
            shape.data_at(shard),
            shape.stored_len(shard),
        ),
        Some(parity) => (file_name(&pack), shape.parity_at(parity), shape.shard_len()),
    };
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < shape.shard_len() {
        let piece = usize::try_from(shape.shard_len() - at).map_or(PIECE, |left| left.min(PIECE));
        let there =
            usize::try_from(stored.saturating_sub(at)).map_or(piece, |left| left.min(piece));
        let piece = &mut buffer[..piece];
        piece[there..].fill(0);
        if there > 0 {
            let read = storage.read_at(&file, start + at, &mut piece[..there]);
            if unless_refused(read.map_err(RepoError::from))?.is_err() {
                return Ok(false);
            }
        }
        hasher.update(piece);
        at += piece.len() as u64;
    }
    Ok(header.fits(shard, &hasher))
}

const PIECE: usize = 256 << 10;
