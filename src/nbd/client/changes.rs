//! Requests that change an export: writes, zeros, trims, flushes.

use bytes::Bytes;

use super::super::session::{Zeroing, limits};
use super::super::wire::{Command, CommandFlags, ErrorCode, TransmissionFlags};
use super::{Client, ClientError, ClientErrorKind, Phase};
use crate::range::ByteRange;

impl Client {
    /// Writes bytes, which have to start and end at multiples of the least block size.
    ///
    /// With `durable` they are on stable storage when this returns. After the first change a lost connection is final:
    /// what had been written through it without a flush may be gone.
    pub async fn write(&self, offset: u64, data: Bytes, durable: bool) -> Result<(), ClientError> {
        let Some(range) = ByteRange::at(offset, data.len() as u64) else {
            return Err(self.misuse("the range passes 2^64"));
        };
        let flags = self.may_change(range, TransmissionFlags::NONE, durable)?;
        let mut at = range.start();
        while at < range.end() {
            let end = range.end().min(at.saturating_add(self.longest));
            let piece = ByteRange::new(at, end).unwrap_or(range);
            // Both fit, since the data does.
            let part = (at - offset) as usize..(end - offset) as usize;
            let payload = Some(data.slice(part));
            let permits = self.permits(piece.len()).await;
            let connection = self.pool.pick()?;
            connection
                .effect(Command::WRITE, piece, flags, payload, permits)
                .await?;
            at = end;
        }
        Ok(())
    }

    /// Makes a range read as zeros.
    ///
    /// A fast zeroing fails with `ENOTSUP` where writing zeros would be as quick, also if the server knows none.
    pub async fn write_zeroes(&self, range: ByteRange, how: Zeroing) -> Result<(), ClientError> {
        let needs = match how.fast {
            true => TransmissionFlags::SEND_WRITE_ZEROES | TransmissionFlags::SEND_FAST_ZERO,
            false => TransmissionFlags::SEND_WRITE_ZEROES,
        };
        let flags = self.may_change(range, needs, how.durable)?;
        let flags = match how.keep_allocated {
            true => flags | CommandFlags::NO_HOLE,
            false => flags,
        };
        let (flags, longest) = match how.fast {
            true => (flags | CommandFlags::FAST_ZERO, limits::MAX_FAST_ZERO_RANGE),
            false => (flags, limits::MAX_ZERO_RANGE),
        };
        self.effects(Command::WRITE_ZEROES, range, flags, longest)
            .await
    }

    /// Gives a range up, whose content is not known any more then.
    pub async fn trim(&self, range: ByteRange, durable: bool) -> Result<(), ClientError> {
        let flags = self.may_change(range, TransmissionFlags::SEND_TRIM, durable)?;
        self.effects(Command::TRIM, range, flags, limits::MAX_ZERO_RANGE)
            .await
    }

    /// Makes all durable whose requests are done, whichever connection they took.
    pub async fn flush(&self) -> Result<(), ClientError> {
        if !self.export.flags.has(TransmissionFlags::SEND_FLUSH) {
            // Nothing is held back then.
            return Ok(());
        }
        let nothing = ByteRange::first(0);
        let permits = self.permits(0).await;
        let connection = self.pool.pick()?;
        connection
            .effect(Command::FLUSH, nothing, CommandFlags::NONE, None, permits)
            .await
    }

    /// Asks the server to have a range at hand for reads that follow; it may ignore that.
    pub async fn cache(&self, range: ByteRange) -> Result<(), ClientError> {
        self.check(range)?;
        if !self.export.flags.has(TransmissionFlags::SEND_CACHE) {
            return Ok(());
        }
        let whole = self.whole_blocks(range);
        self.effects(Command::CACHE, whole, CommandFlags::NONE, self.longest)
            .await
    }

    /// Has something done to a range piece by piece.
    async fn effects(
        &self,
        command: Command,
        range: ByteRange,
        flags: CommandFlags,
        longest: u64,
    ) -> Result<(), ClientError> {
        let mut at = range.start();
        while at < range.end() {
            let end = range.end().min(at.saturating_add(longest));
            let piece = ByteRange::new(at, end).unwrap_or(range);
            let permits = self.permits(0).await;
            let connection = self.pool.pick()?;
            connection
                .effect(command, piece, flags, None, permits)
                .await?;
            at = end;
        }
        Ok(())
    }

    /// Checks a change before it is asked for: some servers hang at one that they have to refuse.
    fn may_change(
        &self,
        range: ByteRange,
        needs: TransmissionFlags,
        durable: bool,
    ) -> Result<CommandFlags, ClientError> {
        self.check(range)?;
        let flags = self.export.flags;
        if flags.has(TransmissionFlags::READ_ONLY) {
            return Err(ClientErrorKind::ReadOnly.at(&self.peer, Phase::Transmission));
        }
        if !flags.has(needs) {
            return Err(self.unsupported("the export cannot zero or give up ranges that way"));
        }
        if durable && !flags.has(TransmissionFlags::SEND_FUA) {
            return Err(self.unsupported("the export knows no durable writes but by a flush"));
        }
        if self.whole_blocks(range) != range {
            return Err(self.misuse("a change has to start and end at whole blocks"));
        }
        self.pool.note_change();
        Ok(match durable {
            true => CommandFlags::FUA,
            false => CommandFlags::NONE,
        })
    }

    fn unsupported(&self, what: &'static str) -> ClientError {
        ClientErrorKind::Unsupported(what).at(&self.peer, Phase::Transmission)
    }
}

impl ClientError {
    /// Whether the server, or what it told of the export, says that it cannot do this at all, or not fast.
    pub fn is_unsupported(&self) -> bool {
        match &self.kind {
            ClientErrorKind::Unsupported(_) => true,
            ClientErrorKind::Request(failed) => failed.code == ErrorCode::ENOTSUP,
            _ => false,
        }
    }
}
