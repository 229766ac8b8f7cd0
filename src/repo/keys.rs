//! The repository's keys: one random master key, and a key derived from it for each use.

use std::fmt;

use super::ids::{ChunkId, NodeId};

/// The keys of an opened repository.
#[derive(Clone)]
pub(crate) struct Keys {
    chunk_ids: [u8; 32],
    node_ids: [u8; 32],
    mac: [u8; 32],
}

impl Keys {
    pub(crate) fn derive(master: &[u8; 32]) -> Self {
        Self {
            chunk_ids: blake3::derive_key("nbdbackup 2026-11 k_id chunk identifiers", master),
            node_ids: blake3::derive_key("nbdbackup 2026-11 k_node map node identifiers", master),
            mac: blake3::derive_key("nbdbackup 2026-11 k_mac config and snapshots", master),
        }
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
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}
