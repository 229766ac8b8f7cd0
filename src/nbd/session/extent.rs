//! Extents of a metadata context, and the checks on those that a server sends.

use super::{BlockSize, PeerMisbehaved, SessionError};
use crate::nbd::wire::StatusChunk;
use crate::range::ByteRange;

/// A range of the disk with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The range.
    pub range: ByteRange,
    /// The status; what its bits mean depends on the context.
    pub flags: u64,
}

/// Turns one context's status chunk into extents that start at the request's start, ascend without a gap and stay
/// within the request.
///
/// A server may send less than was asked for and more; neighbours with one status are merged. What is left ends at the
/// request's end or at a multiple of the least block size, and is never empty.
pub fn extents_of_reply(
    chunk: &StatusChunk,
    request: ByteRange,
    sizes: BlockSize,
) -> Result<Vec<Extent>, SessionError> {
    let id = chunk.context;
    if chunk.extents.is_empty() {
        return Err(PeerMisbehaved::NoExtent { id }.into());
    }
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = request.start();
    for sent in &chunk.extents {
        if sent.length == 0 {
            return Err(PeerMisbehaved::EmptyExtent { id, offset: at }.into());
        }
        let end = at.saturating_add(sent.length).min(request.end());
        push(&mut extents, at, end, sent.flags);
        at = end;
        if at == request.end() {
            return Ok(extents);
        }
    }
    // The next request has to start at a whole block.
    let mask = u64::from(sizes.min()).saturating_sub(1);
    let end = at & !mask;
    if end <= request.start() {
        return Err(PeerMisbehaved::NoProgress {
            id,
            end: at,
            request,
        }
        .into());
    }
    while let Some(last) = extents.last_mut() {
        if last.range.start() >= end {
            extents.pop();
            continue;
        }
        if let Some(cut) = ByteRange::new(last.range.start(), end.min(last.range.end())) {
            last.range = cut;
        }
        break;
    }
    Ok(extents)
}

/// Adds an extent behind the others, as part of the last one if it has the same status.
fn push(extents: &mut Vec<Extent>, start: u64, end: u64, flags: u64) {
    if let Some(last) = extents.last_mut()
        && last.flags == flags
        && let Some(longer) = ByteRange::new(last.range.start(), end)
    {
        last.range = longer;
    } else if let Some(range) = ByteRange::new(start, end) {
        extents.push(Extent { range, flags });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::{BlockSizeInfo, WireExtent};

    fn extents(
        request: (u64, u64),
        min: u32,
        sent: &[(u64, u64)],
    ) -> Result<Vec<(u64, u64, u64)>, SessionError> {
        let chunk = StatusChunk {
            context: 4,
            extents: sent
                .iter()
                .map(|&(length, flags)| WireExtent { length, flags })
                .collect(),
        };
        let sizes = BlockSize::from_peer(BlockSizeInfo {
            min,
            preferred: 4096,
            max: 1 << 20,
        });
        let request = ByteRange::new(request.0, request.1).unwrap();
        let found = extents_of_reply(&chunk, request, sizes.unwrap())?;
        Ok(found
            .iter()
            .map(|e| (e.range.start(), e.range.end(), e.flags))
            .collect())
    }

    #[test]
    fn server_sends_more_than_was_asked_for() {
        assert_eq!(
            extents((512, 1024), 512, &[(32256, 3)]).unwrap(),
            [(512, 1024, 3)]
        );
        assert_eq!(
            extents((0, 1024), 1, &[(512, 0), (u64::MAX, 1), (7, 0)]).unwrap(),
            [(0, 512, 0), (512, 1024, 1)]
        );
    }

    #[test]
    fn server_sends_less_than_was_asked_for() {
        assert_eq!(extents((0, 4096), 1, &[(100, 1)]).unwrap(), [(0, 100, 1)]);
    }

    #[test]
    fn server_ends_within_a_block() {
        assert_eq!(
            extents((0, 1 << 20), 4096, &[(5000, 1), (3000, 0), (300, 1)]).unwrap(),
            [(0, 5000, 1), (5000, 8000, 0), (8000, 8192, 1)]
        );
        assert_eq!(
            extents((0, 1 << 20), 4096, &[(4000, 1), (200, 0), (300, 1)]).unwrap(),
            [(0, 4000, 1), (4000, 4096, 0)]
        );
        let fault = extents((4096, 1 << 20), 4096, &[(4000, 1)]).unwrap_err();
        assert!(matches!(
            fault,
            SessionError::Misbehaved(PeerMisbehaved::NoProgress { end: 8096, .. })
        ));
    }

    #[test]
    fn server_splits_one_status_into_many_extents() {
        assert_eq!(
            extents((0, 300), 1, &[(100, 2), (100, 2), (100, 3)]).unwrap(),
            [(0, 200, 2), (200, 300, 3)]
        );
    }

    #[test]
    fn server_sends_extent_of_no_bytes() {
        assert!(matches!(
            extents((0, 300), 1, &[(100, 2), (0, 1)]),
            Err(SessionError::Misbehaved(PeerMisbehaved::EmptyExtent {
                id: 4,
                offset: 100
            }))
        ));
        assert!(matches!(
            extents((0, 300), 1, &[]),
            Err(SessionError::Misbehaved(PeerMisbehaved::NoExtent { id: 4 }))
        ));
    }
}
