//! Judges each request of a client before any work is done for it.

use super::super::{BlockSize, PeerMisbehaved, SessionError, limits};
use crate::nbd::wire::{Command, CommandFlags, Dialect, ErrorCode, Request};
use crate::range::ByteRange;

/// What holds for the requests of one connection.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The headers that are spoken.
    pub dialect: Dialect,
    /// The export's size in bytes.
    pub size: u64,
    /// The export's block sizes.
    pub block_size: BlockSize,
    /// The number of metadata contexts that the client chose.
    pub contexts: usize,
}

/// A request, judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The number that the reply has to carry.
    pub cookie: u64,
    /// The offset that an extended reply has to repeat.
    pub offset: u64,
    /// The length of the payload behind the header, which has to be read and thrown away before the reply.
    pub payload: u64,
    /// What is to be done.
    pub verdict: Verdict,
}

/// What is to be done with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Read the range and send it.
    Read {
        /// The range; may be empty.
        range: ByteRange,
        /// Whether the reply has to be one chunk.
        in_one: bool,
    },
    /// Send the extents of the range.
    Status {
        /// The range, not empty.
        range: ByteRange,
        /// Whether one extent of each context is wanted.
        one: bool,
    },
    /// Nothing is to be done: report success.
    Nothing,
    /// Report an error.
    Refuse(ErrorCode, &'static str),
    /// Finish what is in flight and close.
    Disconnect,
}

impl Rules {
    /// The length of a request's header.
    pub const fn wanted(&self) -> usize {
        Request::len(self.dialect)
    }

    /// Takes exactly one header.
    pub fn judge(&self, header: &[u8]) -> Result<Judged, SessionError> {
        let request = Request::decode(self.dialect, header)?;
        let payload = match request.command {
            Command::WRITE => request.length,
            _ if request.flags.has(CommandFlags::PAYLOAD_LEN)
                && self.dialect == Dialect::Extended =>
            {
                request.length
            }
            _ => 0,
        };
        let most = u64::from(self.block_size.max()).saturating_mul(limits::DRAINED_WRITE_BLOCKS);
        if payload > most {
            return Err(PeerMisbehaved::PayloadTooLong {
                length: payload,
                most,
            }
            .into());
        }
        let verdict = match self.verdict(&request) {
            Ok(verdict) => verdict,
            Err((code, text)) => Verdict::Refuse(code, text),
        };
        Ok(Judged {
            cookie: request.cookie,
            offset: request.offset,
            payload,
            verdict,
        })
    }

    fn verdict(&self, request: &Request) -> Result<Verdict, Refusal> {
        match request.command {
            Command::READ => self.read(request),
            Command::BLOCK_STATUS => self.status(request),
            Command::DISC => Ok(Verdict::Disconnect),
            Command::FLUSH => {
                allow(request, CommandFlags::FUA)?;
                Ok(Verdict::Nothing)
            }
            Command::CACHE => {
                allow(request, CommandFlags::FUA)?;
                self.range(request)?;
                Ok(Verdict::Nothing)
            }
            Command::WRITE | Command::TRIM | Command::WRITE_ZEROES => {
                Err((ErrorCode::EPERM, "the export is read-only"))
            }
            _ => Err((ErrorCode::EINVAL, "the command is not known")),
        }
    }

    fn read(&self, request: &Request) -> Result<Verdict, Refusal> {
        let in_one = request.flags.has(CommandFlags::DF);
        match self.dialect {
            Dialect::Simple => allow(request, CommandFlags::FUA)?,
            Dialect::Structured | Dialect::Extended => {
                allow(request, CommandFlags::FUA | CommandFlags::DF)?;
            }
        }
        if request.length > u64::from(self.block_size.max()) {
            return Err((ErrorCode::EINVAL, "the read is longer than the block limit"));
        }
        let range = self.range(request)?;
        Ok(Verdict::Read { range, in_one })
    }

    fn status(&self, request: &Request) -> Result<Verdict, Refusal> {
        allow(request, CommandFlags::FUA | CommandFlags::REQ_ONE)?;
        if self.contexts == 0 {
            return Err((ErrorCode::EINVAL, "no metadata context was chosen"));
        }
        let range = self.range(request)?;
        if range.is_empty() {
            return Err((ErrorCode::EINVAL, "the range is empty"));
        }
        let one = request.flags.has(CommandFlags::REQ_ONE);
        Ok(Verdict::Status { range, one })
    }

    fn range(&self, request: &Request) -> Result<ByteRange, Refusal> {
        let range = ByteRange::at(request.offset, request.length)
            .filter(|range| range.end() <= self.size)
            .ok_or((ErrorCode::EINVAL, "the range passes the end of the export"))?;
        let mask = u64::from(self.block_size.min()).saturating_sub(1);
        match (range.start() | range.end()) & mask {
            0 => Ok(range),
            _ => Err((
                ErrorCode::EINVAL,
                "the range is not a multiple of the least block size",
            )),
        }
    }
}

type Refusal = (ErrorCode, &'static str);

fn allow(request: &Request, flags: CommandFlags) -> Result<(), Refusal> {
    match request.flags.without(flags).is_empty() {
        true => Ok(()),
        false => Err((ErrorCode::EINVAL, "the command does not have these flags")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(dialect: Dialect, contexts: usize) -> Rules {
        Rules {
            dialect,
            size: 10 << 20,
            block_size: BlockSize::new(512, 4096, 1 << 20).unwrap(),
            contexts,
        }
    }

    fn judge(rules: &Rules, command: u16, flags: u16, offset: u64, length: u64) -> Judged {
        let mut bytes = Vec::new();
        Request {
            flags: CommandFlags(flags),
            command: Command(command),
            cookie: 7,
            offset,
            length,
        }
        .encode(rules.dialect, &mut bytes)
        .unwrap();
        assert_eq!(bytes.len(), rules.wanted());
        rules.judge(&bytes).unwrap()
    }

    fn refusal(judged: &Judged) -> Option<ErrorCode> {
        match judged.verdict {
            Verdict::Refuse(code, _) => Some(code),
            _ => None,
        }
    }

    #[test]
    fn client_reads_past_the_end_or_too_much() {
        let rules = rules(Dialect::Structured, 0);
        for (offset, length) in [
            (10 << 20, 512),
            (u64::MAX - 511, 512),
            (0, (1 << 20) + 512),
            (0, u64::from(u32::MAX)),
            (1, 512),
            (0, 511),
        ] {
            let judged = judge(&rules, 0, 0, offset, length);
            assert_eq!(refusal(&judged), Some(ErrorCode::EINVAL), "{offset:#x}");
        }
        let last = judge(&rules, 0, 0, (10 << 20) - 512, 512);
        assert!(matches!(last.verdict, Verdict::Read { in_one: false, .. }));
        let nothing = judge(&rules, 0, 0, 0, 0).verdict;
        assert!(matches!(nothing, Verdict::Read { range, .. } if range.is_empty()));
    }

    #[test]
    fn client_sets_flags_that_the_command_does_not_have() {
        let simple = rules(Dialect::Simple, 0);
        let structured = rules(Dialect::Structured, 1);
        assert_eq!(
            refusal(&judge(&simple, 0, 4, 0, 512)),
            Some(ErrorCode::EINVAL)
        );
        assert_eq!(refusal(&judge(&structured, 0, 4, 0, 512)), None);
        assert_eq!(refusal(&judge(&structured, 0, 1, 0, 512)), None);
        for (command, flags) in [(0, 2), (0, 0x8000), (7, 4), (3, 8), (5, 0x80)] {
            let judged = judge(&structured, command, flags, 0, 512);
            assert_eq!(refusal(&judged), Some(ErrorCode::EINVAL), "{command}");
        }
    }

    #[test]
    fn client_writes_to_a_read_only_export() {
        let rules = rules(Dialect::Simple, 0);
        let judged = judge(&rules, 1, 0, 0, 4096);
        assert_eq!(
            (judged.payload, refusal(&judged)),
            (4096, Some(ErrorCode::EPERM))
        );
        for command in [4, 6] {
            let judged = judge(&rules, command, 0, 0, 4096);
            assert_eq!(
                (judged.payload, refusal(&judged)),
                (0, Some(ErrorCode::EPERM))
            );
        }
    }

    #[test]
    fn client_writes_more_than_is_worth_reading() {
        let rules = rules(Dialect::Simple, 0);
        let mut bytes = b"\x25\x60\x95\x13\0\0\0\x01cookie!!\0\0\0\0\0\0\0\0".to_vec();
        bytes.extend((2_u32 << 20).to_be_bytes());
        assert_eq!(rules.judge(&bytes).unwrap().payload, 2 << 20);
        bytes.truncate(24);
        bytes.extend(u32::MAX.to_be_bytes());
        assert!(matches!(
            rules.judge(&bytes),
            Err(SessionError::Misbehaved(
                PeerMisbehaved::PayloadTooLong { .. }
            ))
        ));
    }

    #[test]
    fn client_sends_unknown_commands() {
        let rules = rules(Dialect::Structured, 1);
        for command in [8, 9, 99, 0xffff] {
            let judged = judge(&rules, command, 0, 0, 512);
            assert_eq!(refusal(&judged), Some(ErrorCode::EINVAL));
        }
    }

    #[test]
    fn client_asks_for_status_it_did_not_choose_or_of_nothing() {
        let without = rules(Dialect::Structured, 0);
        let with = rules(Dialect::Structured, 1);
        assert!(refusal(&judge(&without, 7, 0, 0, 512)).is_some());
        assert!(refusal(&judge(&with, 7, 0, 0, 0)).is_some());
        assert!(refusal(&judge(&with, 7, 0, 0, u64::from(u32::MAX))).is_some());
        assert!(matches!(
            judge(&with, 7, 8, 0, 10 << 20).verdict,
            Verdict::Status { one: true, .. }
        ));
    }

    #[test]
    fn extended_request_of_all_bytes_there_are_is_refused() {
        let rules = rules(Dialect::Extended, 1);
        for command in [0, 3, 5, 7] {
            let judged = judge(&rules, command, 0, 0, u64::MAX);
            assert_eq!(refusal(&judged).is_some(), command != 3);
        }
    }

    #[test]
    fn client_sends_a_wrong_magic() {
        assert!(rules(Dialect::Simple, 0).judge(&[0x77; 28]).is_err());
    }
}
