//! Judges each request of a client before any work is done for it.

use super::super::{BlockSize, PeerMisbehaved, SessionError, Zeroing, limits};
use crate::nbd::wire::{
    Command, CommandFlags, Dialect, ErrorCode, Request, StatusFilter, TransmissionFlags,
};
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
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// The metadata contexts that the client chose, by their places among those of the export.
    pub contexts: Vec<usize>,
}

/// A request, judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The number that the reply has to carry.
    pub cookie: u64,
    /// The offset that an extended reply has to repeat.
    pub offset: u64,
    /// The length of the payload behind the header.
    ///
    /// It has to be read before the reply: [`Verdict::Write`] and [`Verdict::StatusOf`] need it, all others throw it away.
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
    /// Write the payload, which is as long as the range.
    Write {
        /// The range; may be empty.
        range: ByteRange,
        /// Whether it has to be on stable storage before the reply.
        durable: bool,
    },
    /// Make the range zero.
    Zero {
        /// The range; may be empty.
        range: ByteRange,
        /// How.
        how: Zeroing,
    },
    /// Give the range up.
    Trim {
        /// The range; may be empty.
        range: ByteRange,
        /// Whether that has to be on stable storage before the reply.
        durable: bool,
    },
    /// Make all that was written durable.
    Flush,
    /// Send the extents of the range.
    Status {
        /// The range, not empty.
        range: ByteRange,
        /// Whether one extent of each context is wanted.
        one: bool,
        /// The contexts, by their places among those of the export.
        contexts: Vec<usize>,
    },
    /// Send the extents that the payload asks for: see [`Rules::judge_filter`].
    StatusOf {
        /// The range's start.
        offset: u64,
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
        let with_payload =
            self.dialect == Dialect::Extended && request.flags.has(CommandFlags::PAYLOAD_LEN);
        let payload = match request.command {
            Command::WRITE => request.length,
            _ if with_payload => request.length,
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
        let verdict = match self.verdict(&request, with_payload) {
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

    /// Takes the payload of a [`Verdict::StatusOf`].
    pub fn judge_filter(&self, offset: u64, one: bool, payload: &[u8]) -> Verdict {
        match self.filter(offset, one, payload) {
            Ok(verdict) => verdict,
            Err((code, text)) => Verdict::Refuse(code, text),
        }
    }

    fn verdict(&self, request: &Request, with_payload: bool) -> Result<Verdict, Refusal> {
        let durable = request.flags.has(CommandFlags::FUA);
        match request.command {
            Command::READ => self.read(request),
            Command::WRITE => {
                let longest = u64::from(self.block_size.max());
                if request.length > longest {
                    return Err((
                        ErrorCode::EINVAL,
                        "the write is longer than the block limit",
                    ));
                }
                // A client that leaves PAYLOAD_LEN out, as some do, can mean nothing else.
                let payload = match self.dialect {
                    Dialect::Extended => CommandFlags::PAYLOAD_LEN,
                    Dialect::Simple | Dialect::Structured => CommandFlags::NONE,
                };
                allow(request, CommandFlags::FUA | payload)?;
                let range = self.change(request, TransmissionFlags::NONE)?;
                Ok(Verdict::Write { range, durable })
            }
            Command::WRITE_ZEROES => {
                let fast = match self.flags.has(TransmissionFlags::SEND_FAST_ZERO) {
                    true => CommandFlags::FAST_ZERO,
                    false => CommandFlags::NONE,
                };
                let range = self.change(request, TransmissionFlags::SEND_WRITE_ZEROES)?;
                allow(request, CommandFlags::FUA | CommandFlags::NO_HOLE | fast)?;
                let how = Zeroing::from(request.flags);
                Ok(Verdict::Zero { range, how })
            }
            Command::TRIM => {
                let range = self.change(request, TransmissionFlags::SEND_TRIM)?;
                allow(request, CommandFlags::FUA)?;
                Ok(Verdict::Trim { range, durable })
            }
            Command::BLOCK_STATUS => self.status(request, with_payload),
            Command::DISC => Ok(Verdict::Disconnect),
            Command::FLUSH => {
                allow(request, CommandFlags::FUA)?;
                Ok(Verdict::Flush)
            }
            Command::CACHE => {
                allow(request, CommandFlags::FUA)?;
                self.range(request.offset, request.length)?;
                Ok(Verdict::Nothing)
            }
            Command::RESIZE => Err((ErrorCode::EINVAL, "the export cannot be resized")),
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
        let range = self.range(request.offset, request.length)?;
        Ok(Verdict::Read { range, in_one })
    }

    fn status(&self, request: &Request, with_payload: bool) -> Result<Verdict, Refusal> {
        let flags = CommandFlags::FUA | CommandFlags::REQ_ONE;
        let one = request.flags.has(CommandFlags::REQ_ONE);
        if self.contexts.is_empty() {
            return Err((ErrorCode::EINVAL, "no metadata context was chosen"));
        }
        if with_payload {
            allow(request, flags | CommandFlags::PAYLOAD_LEN)?;
            let most = StatusFilter::len(self.contexts.len());
            if usize::try_from(request.length).map_or(true, |length| length > most) {
                return Err((ErrorCode::EINVAL, "the filter names too many contexts"));
            }
            return Ok(Verdict::StatusOf {
                offset: request.offset,
                one,
            });
        }
        allow(request, flags)?;
        self.status_of(request.offset, request.length, one, self.contexts.clone())
    }

    fn filter(&self, offset: u64, one: bool, payload: &[u8]) -> Result<Verdict, Refusal> {
        let filter = StatusFilter::decode(payload)
            .map_err(|_| (ErrorCode::EINVAL, "the filter is malformed"))?;
        if filter.contexts.is_empty() {
            return Err((ErrorCode::EINVAL, "the filter names no context"));
        }
        let mut contexts = Vec::new();
        for id in filter.contexts {
            let place = usize::try_from(id).unwrap_or(usize::MAX);
            if !self.contexts.contains(&place) || contexts.contains(&place) {
                let text = "the filter names a context twice, or one that was not chosen";
                return Err((ErrorCode::EINVAL, text));
            }
            contexts.push(place);
        }
        self.status_of(offset, filter.length, one, contexts)
    }

    fn status_of(
        &self,
        offset: u64,
        length: u64,
        one: bool,
        contexts: Vec<usize>,
    ) -> Result<Verdict, Refusal> {
        let range = self.range(offset, length)?;
        if range.is_empty() {
            return Err((ErrorCode::EINVAL, "the range is empty"));
        }
        Ok(Verdict::Status {
            range,
            one,
            contexts,
        })
    }

    /// Checks the range of a change, and whether the export takes such changes.
    fn change(&self, request: &Request, needs: TransmissionFlags) -> Result<ByteRange, Refusal> {
        if self.flags.has(TransmissionFlags::READ_ONLY) {
            return Err((ErrorCode::EPERM, "the export is read-only"));
        }
        if !self.flags.has(needs) {
            return Err((ErrorCode::EINVAL, "the export does not know the command"));
        }
        match self.range(request.offset, request.length) {
            Err((_, text)) if text == PAST_END => Err((ErrorCode::ENOSPC, text)),
            checked => checked,
        }
    }

    fn range(&self, offset: u64, length: u64) -> Result<ByteRange, Refusal> {
        let range = ByteRange::at(offset, length)
            .filter(|range| range.end() <= self.size)
            .ok_or((ErrorCode::EINVAL, PAST_END))?;
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

const PAST_END: &str = "the range passes the end of the export";

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
            flags: TransmissionFlags::READ_ONLY,
            contexts: (0..contexts).collect(),
        }
    }

    fn writable(dialect: Dialect) -> Rules {
        Rules {
            flags: TransmissionFlags::SEND_TRIM
                | TransmissionFlags::SEND_WRITE_ZEROES
                | TransmissionFlags::SEND_FAST_ZERO,
            ..rules(dialect, 0)
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
    fn client_changes_what_it_may() {
        for dialect in [Dialect::Structured, Dialect::Extended] {
            let rules = writable(dialect);
            let range = ByteRange::at(4096, 512).unwrap();
            let judged = judge(&rules, 1, 1, 4096, 512);
            let durable = true;
            assert_eq!(judged.verdict, Verdict::Write { range, durable });
            assert_eq!(judged.payload, 512);
            assert_eq!(
                judge(&rules, 6, 0x13, 4096, 512).verdict,
                Verdict::Zero {
                    range,
                    how: Zeroing {
                        durable,
                        keep_allocated: true,
                        fast: true,
                    },
                }
            );
            assert_eq!(
                judge(&rules, 4, 1, 4096, 512).verdict,
                Verdict::Trim { range, durable }
            );
            assert_eq!(judge(&rules, 3, 0, 7, 7).verdict, Verdict::Flush);
            for (command, flags, offset, length, code) in [
                (1, 0, 10 << 20, 512, ErrorCode::ENOSPC),
                (6, 0, (10 << 20) - 512, 1024, ErrorCode::ENOSPC),
                (4, 0, u64::MAX - 511, 512, ErrorCode::ENOSPC),
                (1, 0, 1, 512, ErrorCode::EINVAL),
                (1, 0, 0, (1 << 20) + 512, ErrorCode::EINVAL),
                (1, 2, 0, 512, ErrorCode::EINVAL),
                (4, 2, 0, 512, ErrorCode::EINVAL),
                (6, 8, 0, 512, ErrorCode::EINVAL),
                (8, 0, 0, 512, ErrorCode::EINVAL),
            ] {
                let judged = judge(&rules, command, flags, offset, length);
                assert_eq!(refusal(&judged), Some(code), "{command} {offset:#x}");
            }
        }
        let mut modest = writable(Dialect::Structured);
        modest.flags = TransmissionFlags::SEND_WRITE_ZEROES;
        assert!(refusal(&judge(&modest, 4, 0, 0, 512)).is_some());
        assert!(refusal(&judge(&modest, 6, 16, 0, 512)).is_some());
        assert!(refusal(&judge(&modest, 6, 0, 0, 512)).is_none());
    }

    #[test]
    fn client_asks_some_contexts() {
        let rules = rules(Dialect::Extended, 3);
        let filter = |length: u64, ids: &[u32]| {
            let mut payload = length.to_be_bytes().to_vec();
            payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
            payload
        };
        let judged = judge(&rules, 7, 0x28, 512, 16);
        let (offset, one) = (512, true);
        assert_eq!(judged.verdict, Verdict::StatusOf { offset, one });
        assert_eq!(judged.payload, 16);
        let range = ByteRange::at(512, 1024).unwrap();
        let contexts = vec![2, 0];
        assert_eq!(
            rules.judge_filter(512, one, &filter(1024, &[2, 0])),
            Verdict::Status {
                range,
                one,
                contexts
            }
        );
        for payload in [
            filter(1024, &[]),
            filter(1024, &[3]),
            filter(1024, &[1, 1]),
            filter(1024, &[u32::MAX]),
            filter(0, &[1]),
            filter(u64::MAX, &[1]),
            filter(10 << 20, &[1]),
            filter(1024, &[1])[..11].to_vec(),
            Vec::new(),
        ] {
            let verdict = rules.judge_filter(512, false, &payload);
            assert!(
                matches!(verdict, Verdict::Refuse(ErrorCode::EINVAL, _)),
                "{payload:x?}"
            );
        }
        // Four contexts are more than were chosen; the payload has to be read past.
        let judged = judge(&rules, 7, 0x20, 0, 24);
        assert_eq!(
            (judged.payload, refusal(&judged)),
            (24, Some(ErrorCode::EINVAL))
        );
        for command in [0, 3, 4, 5, 6] {
            let judged = judge(&rules, command, 0x20, 0, 512);
            assert_eq!(judged.payload, 512);
            assert!(refusal(&judged).is_some(), "{command}");
        }
        let compact = Rules {
            dialect: Dialect::Structured,
            ..rules
        };
        assert!(refusal(&judge(&compact, 7, 0x20, 0, 512)).is_some());
        assert_eq!(judge(&compact, 7, 0x20, 0, 512).payload, 0);
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
