//! The repository's keys: one random master key, and a key derived from it for each use.

use std::fmt;

use zeroize::{Zeroize, ZeroizeOnDrop};

use super::cipher::{Encryption, PackCipher};
use super::format::pack::PackKind;
use super::ids::{ChunkId, NodeId, PackId, RepoUuid};

/// The keys of an opened repository, wiped from memory when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub(crate) struct Keys {
    chunk_ids: [u8; 32],
    node_ids: [u8; 32],
    mac: [u8; 32],
    data: [u8; 32],
    meta: [u8; 32],
    texts: [u8; 32],
    #[zeroize(skip)]
    encryption: Encryption,
}

impl Keys {
    /// Derives all keys; `encryption` says which of them are used.
    pub(crate) fn derive(master: &[u8; 32], encryption: Encryption) -> Self {
        let derive = |context| blake3::derive_key(context, master);
        Self {
            chunk_ids: derive("nbdbackup 2026-11 k_id chunk identifiers"),
            node_ids: derive("nbdbackup 2026-11 k_node map node identifiers"),
            mac: derive("nbdbackup 2026-11 k_mac config and snapshots"),
            data: derive("nbdbackup 2026-11 k_data chunks"),
            meta: derive("nbdbackup 2026-11 k_meta map nodes"),
            texts: derive("nbdbackup 2026-11 k_text snapshots and labels"),
            encryption,
        }
    }

    /// Whether and how the repository is encrypted.
    pub(crate) fn encryption(&self) -> Encryption {
        self.encryption
    }

    /// Returns the identifier of a chunk's plain bytes.
    pub(crate) fn chunk_id(&self, plain: &[u8]) -> ChunkId {
        ChunkId::from_bytes(*blake3::keyed_hash(&self.chunk_ids, plain).as_bytes())
    }

    /// Begins the identifier of a map node.
    pub(crate) fn node_hasher(&self) -> blake3::Hasher {
        blake3::Hasher::new_keyed(&self.node_ids)
    }

    /// Ends the identifier of a map node.
    pub(crate) fn node_id(hasher: &blake3::Hasher) -> NodeId {
        NodeId::from_bytes(*hasher.finalize().as_bytes())
    }

    /// The key of the MACs on `config` and snapshots.
    pub(crate) fn mac(&self) -> &[u8; 32] {
        &self.mac
    }

    /// The key of sealed snapshots and labels.
    pub(crate) fn texts(&self) -> &[u8; 32] {
        &self.texts
    }

    /// Returns the cipher of a pack's records; `None` when the repository is not encrypted.
    pub(crate) fn pack_cipher(
        &self,
        repo: RepoUuid,
        kind: PackKind,
        pack: &PackId,
    ) -> Option<PackCipher> {
        let key = match kind {
            PackKind::Data => &self.data,
            PackKind::Meta => &self.meta,
        };
        match self.encryption {
            Encryption::None => None,
            Encryption::Aes256Gcm => Some(PackCipher::new(key, repo, kind, pack)),
        }
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({:?})", self.encryption)
    }
}
