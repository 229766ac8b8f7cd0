//! Map nodes: 128 children, of which the absent ones are holes, each with a hint of its place.

use super::DecodeError;
use super::cursor::Cursor;
use crate::repo::chunk::{Place, RecordFlags};
use crate::repo::ids::{NodeId, PackId};
use crate::repo::keys::Keys;

/// The number of children of each node.
pub(crate) const FAN_OUT: usize = 128;

/// The base-two logarithm of [`FAN_OUT`].
pub(crate) const FAN_OUT_LOG2: u32 = 7;

/// The highest level of a root: chunks of 64 KiB of a disk of 2^64 bytes have numbers of 48 bits.
pub(crate) const MAX_LEVEL: u8 = 6;

/// The most bytes of an encoded node.
pub(crate) const MAX_NODE: usize = PREFIX_LEN + FAN_OUT * (PackId::LEN + CHILD_LEN);

/// A child of a node: a chunk below level 0, else a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Child {
    pub(crate) id: [u8; 32],
    pub(crate) place: Place,
}

/// A map node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    level: u8,
    /// Bit `i` says whether child `i` is there.
    presence: u128,
    /// The children that are there, in order.
    children: Vec<Child>,
}

impl Node {
    /// Makes a node of the children that are there.
    pub(crate) fn new(level: u8, slots: &[Option<Child>; FAN_OUT]) -> Self {
        let mut presence = 0;
        for (slot, bit) in slots.iter().zip(bits()) {
            if slot.is_some() {
                presence |= bit;
            }
        }
        Self {
            level,
            presence,
            children: slots.iter().flatten().copied().collect(),
        }
    }

    pub(crate) fn level(&self) -> u8 {
        self.level
    }

    /// The children that are there, in order.
    pub(crate) fn children(&self) -> &[Child] {
        &self.children
    }

    /// Returns the child `slot`, counted from 0; `None` for a hole.
    pub(crate) fn child(&self, slot: usize) -> Option<&Child> {
        let bit = bits().nth(slot)?;
        if self.presence & bit == 0 {
            return None;
        }
        let below = self.presence & bit.wrapping_sub(1);
        self.children.get(below.count_ones() as usize)
    }

    /// The node's identifier, which says nothing about places.
    pub(crate) fn id(&self, keys: &Keys) -> NodeId {
        let mut hasher = keys.node_hasher();
        hasher.update(&[self.level]);
        hasher.update(&self.presence.to_le_bytes());
        for child in &self.children {
            hasher.update(&child.id);
        }
        Keys::node_id(&hasher)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut packs: Vec<PackId> = Vec::new();
        let mut entries = Vec::with_capacity(self.children.len().saturating_mul(CHILD_LEN));
        for child in &self.children {
            let place = &child.place;
            // From the end, since neighbours mostly share a pack.
            let index = match packs.iter().rposition(|p| *p == place.pack) {
                Some(index) => index,
                None => {
                    packs.push(place.pack);
                    packs.len().saturating_sub(1)
                }
            };
            entries.extend_from_slice(&child.id);
            // There are at most 128 children, so that a byte holds the index.
            entries.push(index as u8);
            entries.extend_from_slice(&place.offset.to_le_bytes());
            let [a, b, c, _] = place.len.to_le_bytes();
            entries.extend_from_slice(&[a, b, c, place.flags.0]);
        }
        let mut bytes = Vec::with_capacity(MAX_NODE);
        bytes.extend_from_slice(&[VERSION, self.level, packs.len() as u8, 0]);
        bytes.extend_from_slice(&self.presence.to_le_bytes());
        for pack in &packs {
            bytes.extend_from_slice(pack.as_bytes());
        }
        bytes.extend_from_slice(&entries);
        bytes
    }

    /// Reads a node that should stand at `level`.
    pub(crate) fn decode(bytes: &[u8], level: u8) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        match cursor.u8("version of a node")? {
            VERSION => {}
            other => {
                return Err(DecodeError::unsupported(format!(
                    "map node version {other}"
                )));
            }
        }
        let found = cursor.u8("level")?;
        if found != level {
            return Err(DecodeError::corrupt(
                1,
                format!("a node of level {found} stands at level {level}"),
            ));
        }
        let pack_count = usize::from(cursor.u8("number of packs")?);
        if pack_count > FAN_OUT || cursor.u8("reserved byte")? != 0 {
            return Err(DecodeError::corrupt(2, "the number of packs is too large"));
        }
        let presence = cursor.u128("presence bits")?;
        let mut packs = Vec::with_capacity(pack_count);
        for _ in 0..pack_count {
            packs.push(PackId::from_bytes(cursor.array("pack id")?));
        }
        let mut children = Vec::with_capacity(presence.count_ones() as usize);
        for _ in 0..presence.count_ones() {
            let at = cursor.at();
            let id = cursor.array("child's id")?;
            let index = usize::from(cursor.u8("pack index")?);
            let pack = *packs.get(index).ok_or_else(|| {
                DecodeError::corrupt(at, format!("pack {index} of {pack_count} is named"))
            })?;
            let place = Place {
                pack,
                offset: cursor.u32("offset")?,
                len: cursor.u24("length")?,
                flags: RecordFlags(cursor.u8("flags")?),
            };
            children.push(Child { id, place });
        }
        cursor.finish("map node")?;
        Ok(Self {
            level,
            presence,
            children,
        })
    }
}

fn bits() -> impl Iterator<Item = u128> {
    std::iter::successors(Some(1_u128), |bit| bit.checked_mul(2))
}

const VERSION: u8 = 1;
const PREFIX_LEN: usize = 20;
const CHILD_LEN: usize = 41;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn child(seed: u8) -> Child {
        Child {
            id: [seed; 32],
            place: Place {
                pack: PackId::from_bytes([seed / 3; 16]),
                offset: u32::from(seed) << 20,
                len: 0xff_ffff,
                flags: RecordFlags::ZSTD,
            },
        }
    }

    #[test]
    fn node_survives_its_bytes_and_finds_its_children() {
        let mut slots = [None; FAN_OUT];
        for slot in [0, 1, 63, 64, 126, 127] {
            slots[slot] = Some(child(slot as u8));
        }
        let node = Node::new(3, &slots);
        let bytes = node.encode();
        assert_eq!(Node::decode(&bytes, 3).unwrap(), node);
        assert!(Node::decode(&bytes, 2).is_err());
        for (slot, want) in slots.iter().enumerate() {
            assert_eq!(node.child(slot), want.as_ref());
        }
        assert_eq!(node.child(128), None);
    }

    #[test]
    fn full_node_of_as_many_packs_is_the_largest() {
        let slots: [_; FAN_OUT] = std::array::from_fn(|i| {
            let mut child = child(i as u8);
            child.place.pack = PackId::from_bytes([i as u8; 16]);
            Some(child)
        });
        let bytes = Node::new(0, &slots).encode();
        assert_eq!(bytes.len(), MAX_NODE);
        assert!(Node::decode(&bytes, 0).is_ok());
    }

    #[test]
    fn places_do_not_change_the_id_and_positions_do() {
        let keys = Keys::derive(&[9; 32], crate::repo::cipher::Encryption::None);
        let with = |slot: usize, child: Child| {
            let mut slots = [None; FAN_OUT];
            slots[slot] = Some(child);
            Node::new(0, &slots)
        };
        let mut moved = child(1);
        moved.place.offset = 5;
        assert_eq!(with(4, child(1)).id(&keys), with(4, moved).id(&keys));
        assert_ne!(with(4, child(1)).id(&keys), with(5, child(1)).id(&keys));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(mut bytes: Vec<u8>, level in 0..4_u8) {
            let _ = Node::decode(&bytes, level);
            bytes.splice(0..0, [VERSION, level]);
            let _ = Node::decode(&bytes, level);
        }
    }
}
