//! Counts which bytes of a read have come.

use super::super::{PeerMisbehaved, SessionError, limits};
use crate::range::{ByteRange, RangeSet};

/// The bytes of a read that have come.
///
/// As long as chunks come in the disk's order, which nearly all servers keep to, this is one number.
#[derive(Debug)]
pub(super) struct Coverage {
    request: ByteRange,
    next: u64,
    scattered: Option<Box<RangeSet>>,
    scattered_chunks: u32,
    chunks: u64,
}

impl Coverage {
    pub(super) fn new(request: ByteRange) -> Self {
        Self {
            request,
            next: request.start(),
            scattered: None,
            scattered_chunks: 0,
            chunks: 0,
        }
    }

    /// Adds the `length` bytes at `offset`, which have to be new ones of the request.
    pub(super) fn add(&mut self, offset: u64, length: u64) -> Result<ByteRange, SessionError> {
        let request = self.request;
        let chunk =
            ByteRange::at(offset, length).ok_or(PeerMisbehaved::ChunkPastEnd { offset, length })?;
        if !request.contains(chunk) {
            return Err(PeerMisbehaved::ChunkOutside { chunk, request }.into());
        }
        self.chunks = self.chunks.saturating_add(1);
        let most = most_chunks(request);
        if self.chunks > most {
            return Err(PeerMisbehaved::TooManyChunks { request, most }.into());
        }
        if self.scattered.is_none() && chunk.start() == self.next {
            self.next = chunk.end();
            return Ok(chunk);
        }
        self.add_scattered(chunk)?;
        Ok(chunk)
    }

    /// Fails unless each byte has come.
    pub(super) fn finish(&self) -> Result<(), SessionError> {
        let covered = self.covered();
        if covered == self.request.len() {
            return Ok(());
        }
        Err(PeerMisbehaved::ShortRead {
            request: self.request,
            covered,
        }
        .into())
    }

    fn covered(&self) -> u64 {
        match &self.scattered {
            None => self.next.saturating_sub(self.request.start()),
            Some(set) => set.len(),
        }
    }

    fn add_scattered(&mut self, chunk: ByteRange) -> Result<(), SessionError> {
        let request = self.request;
        let set = self.scattered.get_or_insert_with(|| {
            let before = ByteRange::new(request.start(), self.next);
            Box::new(before.into_iter().collect())
        });
        if set.overlaps(chunk) {
            return Err(PeerMisbehaved::ChunkOverlap { chunk, request }.into());
        }
        self.scattered_chunks = self.scattered_chunks.saturating_add(1);
        if self.scattered_chunks > limits::MAX_SCATTERED_CHUNKS {
            return Err(PeerMisbehaved::TooManyChunks {
                request,
                most: u64::from(limits::MAX_SCATTERED_CHUNKS),
            }
            .into());
        }
        set.insert(chunk);
        Ok(())
    }
}

fn most_chunks(request: ByteRange) -> u64 {
    let by_length = request.len().checked_div(limits::BYTES_PER_CHUNK);
    limits::FREE_CHUNKS.saturating_add(by_length.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cover(chunks: &[(u64, u64)]) -> Result<(), SessionError> {
        let mut coverage = Coverage::new(ByteRange::new(100, 200).unwrap());
        for &(offset, length) in chunks {
            coverage.add(offset, length)?;
        }
        coverage.finish()
    }

    #[test]
    fn chunks_may_come_in_any_order() {
        cover(&[(100, 100)]).unwrap();
        cover(&[(100, 50), (150, 50)]).unwrap();
        cover(&[(150, 50), (100, 50)]).unwrap();
        cover(&[(100, 10), (150, 50), (110, 30), (140, 10)]).unwrap();
    }

    #[test]
    fn server_sends_fewer_bytes_than_were_asked_for() {
        for short in [&[(100, 99)][..], &[(101, 99)], &[(100, 40), (141, 59)], &[]] {
            assert!(matches!(
                cover(short),
                Err(SessionError::Misbehaved(PeerMisbehaved::ShortRead { .. }))
            ));
        }
    }

    #[test]
    fn server_sends_bytes_twice() {
        for twice in [
            &[(100, 50), (149, 51)][..],
            &[(150, 50), (100, 51)],
            &[(100, 100), (100, 1)],
        ] {
            assert!(matches!(
                cover(twice),
                Err(SessionError::Misbehaved(
                    PeerMisbehaved::ChunkOverlap { .. }
                ))
            ));
        }
    }

    #[test]
    fn server_sends_bytes_outside_the_request() {
        assert!(cover(&[(99, 1)]).is_err());
        assert!(cover(&[(100, 101)]).is_err());
        assert!(cover(&[(u64::MAX, 2)]).is_err());
    }

    #[test]
    fn server_cuts_a_read_into_dust() {
        let mut coverage = Coverage::new(ByteRange::first(1 << 20));
        let fault = (0..).find_map(|i| coverage.add(i, 1).err());
        assert!(matches!(
            fault,
            Some(SessionError::Misbehaved(
                PeerMisbehaved::TooManyChunks { .. }
            ))
        ));
        let mut coverage = Coverage::new(ByteRange::first(32 << 20));
        let backwards = (1_u64..32 << 20).rev().step_by(2);
        let (at, _) = backwards
            .enumerate()
            .find(|(_, i)| coverage.add(*i, 1).is_err())
            .unwrap();
        assert_eq!(at, limits::MAX_SCATTERED_CHUNKS as usize);
    }
}
