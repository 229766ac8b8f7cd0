//! Reading map nodes: by hint, else by the index, checked against their identifiers, with a cache.

use std::sync::Arc;

use super::super::cache::Cache;
use super::super::chunk::Place;
use super::super::error::RepoError;
use super::super::format::node::{MAX_NODE, Node};
use super::super::format::pack::PackKind;
use super::super::ids::{NodeId, RepoUuid};
use super::super::index::Index;
use super::super::keys::Keys;
use super::super::record::{self, Expected};
use super::super::snapshot::NodeRef;
use super::super::storage::Storage;

/// The map nodes of an opened repository.
#[derive(Debug)]
pub(crate) struct Nodes {
    storage: Arc<dyn Storage>,
    repo: RepoUuid,
    keys: Arc<Keys>,
    index: Arc<Index>,
    cache: Cache<NodeId, Node>,
}

impl Nodes {
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        repo: RepoUuid,
        keys: Arc<Keys>,
        index: Arc<Index>,
    ) -> Self {
        Self {
            storage,
            repo,
            keys,
            index,
            cache: Cache::new(CACHED_NODES),
        }
    }

    /// Returns a node that should stand at `level`.
    pub(crate) fn load(&self, node: &NodeRef, level: u8) -> Result<Arc<Node>, RepoError> {
        if let Some(known) = self.cache.find(&node.id) {
            // The level is part of what the identifier is made of, but the caller's claim is not.
            if known.level() == level {
                return Ok(known);
            }
        }
        let loaded = match self.load_from(node.id, &node.place, level) {
            Ok(loaded) => loaded,
            Err(first) => self.load_elsewhere(node, level, first)?,
        };
        let loaded = Arc::new(loaded);
        self.cache.add(node.id, Arc::clone(&loaded));
        Ok(loaded)
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.keys
    }

    fn load_elsewhere(
        &self,
        node: &NodeRef,
        level: u8,
        first: RepoError,
    ) -> Result<Node, RepoError> {
        let mut tried = vec![node.place];
        for look_again in [false, true] {
            // A prune may have moved it since the index was read.
            if look_again {
                self.index.refresh()?;
            }
            for (kind, place) in self.index.find_all(node.id.as_bytes())? {
                if kind != PackKind::Meta || tried.contains(&place) {
                    continue;
                }
                tried.push(place);
                if let Ok(loaded) = self.load_from(node.id, &place, level) {
                    return Ok(loaded);
                }
            }
        }
        Err(match first {
            RepoError::Missing { .. } => RepoError::Lost {
                what: "map node",
                id: node.id.to_string(),
                tried: tried.len(),
                last: Some(Box::new(first)),
            },
            other => other,
        })
    }

    fn load_from(&self, id: NodeId, place: &Place, level: u8) -> Result<Node, RepoError> {
        let file = PackKind::Meta.file_name(&place.pack);
        let at = u64::from(place.offset);
        let (mut stored, mut opened, mut plain) = (Vec::new(), Vec::new(), Vec::new());
        if place.len as usize > MAX_STORED_NODE {
            let what = format!("a map node of {} bytes", place.len);
            return Err(RepoError::corrupt(file, at, what));
        }
        record::read_stored(&*self.storage, PackKind::Meta, place, &mut stored)?;
        let expected = Expected {
            repo: self.repo,
            kind: PackKind::Meta,
            id: id.as_bytes(),
            place,
            limit: MAX_NODE,
        };
        let decoded = record::decode(&self.keys, &expected, &stored, &mut opened, &mut plain)
            .map_err(|what| RepoError::corrupt(&file, at, what))?;
        let node = Node::decode(decoded.of(&stored, &opened, &plain), level)
            .map_err(|e| e.in_file_from(&file, at))?;
        if node.id(&self.keys) != id {
            let what = format!("this is not map node {id}");
            return Err(RepoError::corrupt(file, at, what));
        }
        Ok(node)
    }
}

/// At most 8 KiB each.
const CACHED_NODES: usize = 1024;

/// What sealing may add to a node.
const MAX_STORED_NODE: usize = MAX_NODE + 256;
