//! What a fuzzer calls with any bytes, for each format at rest: put into a file whose checksums fit, or no field is ever
//! reached.

use super::checkpoint::Checkpoint;
use super::config::Config;
use super::filter::{Filter, FilterShape};
use super::generation::{Beat, Condemned, Sweep};
use super::health::{BadPack, Verified};
use super::key_slot::KeySlot;
use super::node::Node;
use super::pack::{PackHeader, PackKind, PackTrailer, decode_footer, encode_footer};
use super::parity::{ParityHeader, Shape};
use super::segment::{Directory, SegmentTrailer, decode_page, seal_page};
use super::{DecodeError, FileKind, envelope};
use crate::repo::chunk::ChunkSize;
use crate::repo::cipher::Encryption;
use crate::repo::keys::Keys;
use crate::repo::snapshot::Snapshot;

/// Takes bytes as one file or part of a file; the first byte says of which kind.
///
/// None may panic, and what decodes encodes to what decodes to the same.
pub fn format(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else {
        return;
    };
    let keys = Keys::derive(&[7; 32], Encryption::None);
    let mac = keys.mac();
    match kind {
        0 => small(
            FileKind::Config,
            bytes,
            mac,
            |file| Config::decode(file, mac),
            |config| config.encode(mac).ok(),
        ),
        1 => {
            let Ok(file) = envelope::wrap(FileKind::KeySlot, bytes, None) else {
                return;
            };
            if let Ok(slot) = KeySlot::decode(&file) {
                assert!(
                    slot.encode()
                        .is_ok_and(|again| KeySlot::decode(&again).is_ok())
                );
            }
        }
        2 | 3 => {
            let file_kind = match kind {
                2 => FileKind::Snapshot,
                _ => FileKind::Forgotten,
            };
            let decode =
                |file: &[u8]| Snapshot::decode(file, file_kind, &keys, ChunkSize::default());
            small(file_kind, bytes, mac, decode, |snapshot| {
                snapshot.encode(file_kind, &keys).ok()
            });
        }
        4 => small(
            FileKind::Beat,
            bytes,
            mac,
            |file| Beat::decode(file, mac),
            |beat| beat.encode(mac).ok(),
        ),
        5 => small(
            FileKind::Condemned,
            bytes,
            mac,
            |file| Condemned::decode(file, mac),
            |c| c.encode(mac).ok(),
        ),
        6 => small(
            FileKind::Sweep,
            bytes,
            mac,
            |file| Sweep::decode(file, mac),
            |sweep| sweep.encode(mac).ok(),
        ),
        7 => {
            for level in [0, 1, 3] {
                if let Ok(node) = Node::decode(bytes, level) {
                    assert_eq!(Node::decode(&node.encode(), level).ok(), Some(node));
                }
            }
        }
        8 => {
            for kind in [PackKind::Data, PackKind::Meta] {
                // A header's checksum is not put right: it has no field that could be out of its bounds.
                if let Ok(header) = PackHeader::decode(bytes, kind) {
                    assert!(bytes.starts_with(&header.encode()));
                }
            }
            let file_len = 1 << 20;
            if let Ok((trailer, footer_len)) = PackTrailer::decode(bytes, file_len) {
                assert!(footer_len < file_len);
                assert_eq!(trailer.encode(), bytes);
            }
        }
        9 => {
            for records_end in [0, 4096, 1 << 20, u64::from(u32::MAX)] {
                if let Ok(entries) = decode_footer(bytes, records_end) {
                    assert_eq!(encode_footer(&entries), bytes);
                }
            }
        }
        10 => {
            let page = seal_page(bytes.to_vec());
            if let Ok(entries) = decode_page(&page, 0) {
                assert!(entries.is_sorted_by_key(|entry| entry.prefix));
            }
        }
        11 => {
            if let Ok(directory) = Directory::decode(bytes, 1 << 30) {
                assert_eq!(directory.encode(), bytes);
            }
        }
        12 => {
            if let Ok((trailer, directory_len)) = SegmentTrailer::decode(bytes, 1 << 30) {
                assert!(directory_len < 1 << 30);
                assert_eq!(trailer.encode(), bytes);
            }
        }
        13 => filter(bytes),
        14 => small(
            FileKind::Checkpoint,
            bytes,
            mac,
            |file| Checkpoint::decode(file, &keys),
            |checkpoint| checkpoint.encode(&keys).ok(),
        ),
        15 => small(
            FileKind::Bad,
            bytes,
            mac,
            |file| BadPack::decode(file, mac),
            |bad| bad.encode(mac).ok(),
        ),
        16 => small(
            FileKind::Verified,
            bytes,
            mac,
            |file| Verified::decode(file, mac),
            |verified| verified.encode(mac).ok(),
        ),
        17 => parity(bytes),
        _ => {}
    }
}

/// Takes bytes for a parity file whose header's hash fits, of any length that is asked for.
fn parity(bytes: &[u8]) {
    let mut head = super::encode_header(FileKind::Parity).to_vec();
    head.extend_from_slice(bytes);
    let hash = blake3::hash(&head);
    head.extend_from_slice(hash.as_bytes());
    let Some(at) = bytes.get(32..48) else {
        return;
    };
    // The length that the fields ask for, where they ask for one that can be.
    let (counts, _) = at.split_at(4);
    let [_, _, most, _] = *counts else {
        return;
    };
    let mut pack_len = [0; 8];
    for (to, from) in pack_len.iter_mut().zip(at.iter().skip(8)) {
        *to = *from;
    }
    let shape = Shape::of(u64::from_le_bytes(pack_len), most);
    let file_len = shape.map_or(0, |shape| shape.file_len());
    if let Ok(header) = ParityHeader::decode(&head, file_len) {
        assert_eq!(header.encode(), head);
        assert!(header.shape.header_len() <= ParityHeader::MAX_LEN);
        assert!(ParityHeader::decode(&head, file_len.saturating_add(1)).is_err());
    }
}

/// Wraps a payload with sums that fit; what decodes has to survive being written and read again.
fn small<T: PartialEq + std::fmt::Debug>(
    kind: FileKind,
    payload: &[u8],
    mac: &[u8; 32],
    decode: impl Fn(&[u8]) -> Result<T, DecodeError>,
    encode: impl Fn(&T) -> Option<Vec<u8>>,
) {
    let Ok(file) = envelope::wrap(kind, payload, Some(mac)) else {
        return;
    };
    let Ok(value) = decode(&file) else {
        return;
    };
    let again = encode(&value).and_then(|again| decode(&again).ok());
    assert_eq!(again, Some(value));
}

fn filter(bytes: &[u8]) {
    let Some((shape, bytes)) = bytes.split_first_chunk::<16>() else {
        return;
    };
    let [seed @ .., a, b, c, d, e, f, g, h] = *shape;
    let shape = FilterShape {
        seed: u64::from_le_bytes(seed),
        segment_len: u32::from_le_bytes([a, b, c, d]),
        segment_count: u32::from_le_bytes([e, f, g, h]),
    };
    if let Ok(filter) = Filter::from_parts(shape, bytes.to_vec()) {
        for key in [0, 1, u64::MAX, shape.seed, 0x9e37_79b9_7f4a_7c15] {
            filter.may_hold(key);
        }
    }
}
