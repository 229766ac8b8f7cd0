//! Reads that survive lost connections, and name the range that cannot be read.

use std::sync::atomic::Ordering;

use super::super::session::client::RequestFailed;
use super::super::wire::{ErrorCode, TransmissionFlags};
use super::reader::Filled;
use super::{Client, ClientError, ClientErrorKind, ReadReply};
use crate::range::ByteRange;

impl Client {
    /// Reads a range into `buf`, whose content is dropped and whose capacity is used.
    ///
    /// The bytes go from the socket straight into the buffer. A range that ends within a block is read with the rest of
    /// the block. A lost connection is made anew for as long as the options allow; then, and after an error of the disk,
    /// the range is read once more in pieces, so that the fault names what cannot be read.
    pub async fn read(&self, range: ByteRange, mut buf: Vec<u8>) -> Result<ReadReply, ClientError> {
        self.check(range)?;
        buf.clear();
        let whole = self.whole_blocks(range);
        let length = self.length(whole)?;
        if buf.capacity() < length {
            buf.reserve_exact(length);
        }
        let (buf, holes) = match self.read_at_once(whole, buf).await {
            Err(fault) if self.retries && (fault.is_of_disk() || self.pool.may_retry(&fault)) => {
                self.read_with_care(whole, fault).await?
            }
            read => read?,
        };
        Ok(ReadReply::new(range, whole, length, buf, holes))
    }

    /// Reads whole blocks in as few requests as possible.
    async fn read_at_once(&self, whole: ByteRange, buf: Vec<u8>) -> Result<Filled, ClientError> {
        let (mut buf, mut holes) = (buf, Vec::new());
        let mut at = whole.start();
        while at < whole.end() {
            let end = whole.end().min(at.saturating_add(self.longest));
            let piece = ByteRange::new(at, end).unwrap_or(whole);
            let base = self.length(ByteRange::new(whole.start(), at).unwrap_or(whole))?;
            let permits = self.permits(piece.len()).await;
            let connection = self.pool.pick()?;
            let in_one = self.careful.load(Ordering::Relaxed);
            let part = connection.read(piece, in_one, buf, base, permits).await?;
            buf = part.0;
            holes.extend(part.1);
            at = end;
        }
        Ok((buf, holes))
    }

    /// Reads whole blocks in pieces that shrink as they fail, down to the one that cannot be read.
    ///
    /// QEMU hangs up at an error of the disk, except where the reply has to be one chunk: then it says where it was.
    async fn read_with_care(
        &self,
        whole: ByteRange,
        mut fault: ClientError,
    ) -> Result<Filled, ClientError> {
        if fault.is_loss() {
            let in_one = self.export.flags.has(TransmissionFlags::SEND_DF);
            self.careful.store(in_one, Ordering::Relaxed);
        }
        // One at a time, so that no piece is blamed for a hang-up at another's.
        let _alone = self.care.lock().await;
        let least = u64::from(self.export.block_size.min()).max(LEAST_PIECE);
        let (mut data, mut holes) = (Vec::new(), Vec::new());
        // Pieces that are still to be read, the first one last.
        let mut pieces: Vec<ByteRange> = whole.split(self.longest).collect();
        pieces.reverse();
        let mut losses = 0;
        while let Some(piece) = pieces.pop() {
            if fault.is_loss() {
                self.pool.revive(fault.clone()).await?;
            }
            match self.read_at_once(piece, Vec::new()).await {
                Ok((bytes, found)) => {
                    let length = self.length(piece)?;
                    let start = data.len();
                    data.extend_from_slice(&bytes);
                    // What lacks at the end of a buffer is a hole.
                    data.resize(start + length, 0);
                    holes.extend(found);
                    losses = 0;
                    continue;
                }
                Err(again) if self.pool.may_retry(&again) => {
                    losses += 1;
                    fault = again;
                    if losses < LOSSES_PER_PIECE {
                        pieces.push(piece);
                        continue;
                    }
                    losses = 0;
                }
                Err(again) if again.is_of_disk() => fault = again,
                Err(again) => return Err(again),
            }
            match halves(piece, least) {
                Some((first, second)) => pieces.extend([second, first]),
                None => return Err(self.unreadable(piece, whole, least, fault).await),
            }
        }
        Ok((data, holes))
    }

    /// Makes the fault that names all of the range that cannot be read, as far as it goes on without a gap.
    async fn unreadable(
        &self,
        piece: ByteRange,
        whole: ByteRange,
        least: u64,
        fault: ClientError,
    ) -> ClientError {
        let mut end = piece.end();
        if let ClientErrorKind::Request(_) = fault.kind {
            for _ in 0..MOST_PROBES {
                let next = ByteRange::new(end, whole.end().min(end.saturating_add(least)));
                let Some(next) = next.filter(|next| !next.is_empty()) else {
                    break;
                };
                match self.read_at_once(next, Vec::new()).await {
                    Err(again) if again.is_of_disk() => end = next.end(),
                    Ok(_) | Err(_) => break,
                }
            }
        }
        let bad = ByteRange::new(piece.start(), end).unwrap_or(piece);
        let kind = match fault.kind {
            ClientErrorKind::Request(failed) => ClientErrorKind::Request(RequestFailed {
                range: bad,
                ..failed
            }),
            _ => ClientErrorKind::LostAt { range: bad },
        };
        ClientError { kind, ..fault }
    }
}

impl ClientError {
    /// Whether a connection was lost, or is about to be; another one may do better.
    pub(super) fn is_loss(&self) -> bool {
        match &self.kind {
            ClientErrorKind::Io { .. }
            | ClientErrorKind::TimedOut { .. }
            | ClientErrorKind::Closed => true,
            ClientErrorKind::Request(failed) => failed.code == ErrorCode::ESHUTDOWN,
            _ => false,
        }
    }

    /// Whether the server could not read the disk, or not that much of it at once.
    pub(super) fn is_of_disk(&self) -> bool {
        match &self.kind {
            ClientErrorKind::Request(failed) => !matches!(
                failed.code,
                ErrorCode::EPERM | ErrorCode::EINVAL | ErrorCode::ENOTSUP | ErrorCode::ESHUTDOWN
            ),
            _ => false,
        }
    }

    /// Returns the range that cannot be read, if that is what happened.
    pub fn range(&self) -> Option<ByteRange> {
        match &self.kind {
            ClientErrorKind::Request(failed) => Some(failed.range),
            ClientErrorKind::LostAt { range } => Some(*range),
            _ => None,
        }
    }
}

/// Cuts a piece into two, each of whole blocks of `least` bytes; `None` for a piece of one block.
fn halves(piece: ByteRange, least: u64) -> Option<(ByteRange, ByteRange)> {
    let half = piece.len() / 2;
    let middle = piece.start() + half.next_multiple_of(least);
    if piece.len() <= least || middle >= piece.end() {
        return None;
    }
    ByteRange::new(piece.start(), middle).zip(ByteRange::new(middle, piece.end()))
}

/// The smallest piece that is tried: a sector.
const LEAST_PIECE: u64 = 512;
/// A piece during which the connection was lost this often is cut like one that failed.
const LOSSES_PER_PIECE: u32 = 2;
/// The blocks behind a bad one that are tried, to tell how far it goes.
const MOST_PROBES: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_whole_blocks_and_none_is_lost() {
        let range = |start, end| ByteRange::new(start, end).unwrap();
        assert_eq!(halves(range(0, 512), 512), None);
        assert_eq!(halves(range(512, 1000), 512), None);
        for (start, end) in [(0, 1024), (512, 512 + 1536), (0, 1 << 20), (512, 2000)] {
            let (first, second) = halves(range(start, end), 512).unwrap();
            assert_eq!((first.start(), second.end()), (start, end));
            assert_eq!(first.end(), second.start());
            assert_eq!(first.len() % 512, 0);
            assert!(!second.is_empty());
        }
    }
}
