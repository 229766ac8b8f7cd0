//! The states of a server before the transmission phase.

use super::super::{PeerIncompatible, PeerMisbehaved, SessionError, limits};
use super::answers::{After, Answers};
use super::tls::Gate;
use super::{Catalog, Tls};
use crate::nbd::wire::{
    ClientFlags, Dialect, ExportNameAnswer, Greeting, OptionCode, OptionHeader, OptionReplyCode,
    ServerFlags,
};

/// What both sides agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The export's place in the catalog.
    pub export: usize,
    /// The headers of the transmission phase.
    pub dialect: Dialect,
    /// The chosen contexts' places among those of the export, which are also their numbers.
    pub contexts: Vec<usize>,
}

/// A server's state before the transmission phase.
#[derive(Debug)]
pub enum Handshake {
    /// Waits for the client's flags.
    Flags(AwaitFlags),
    /// Waits for the head of an option.
    Option(AwaitOption),
    /// Waits for the payload of an option.
    Payload(AwaitPayload),
    /// Throws the payload of an overlong option away.
    Drain(Drain),
}

/// What bytes from a client led to; whatever was appended to `out` has to be sent first.
#[derive(Debug)]
pub enum Step {
    /// The handshake goes on.
    Next(Handshake),
    /// The transmission phase follows.
    Transmit(Agreed),
    /// TLS starts, and the handshake goes on within it; what came before must not be taken for a part of it.
    StartTls(Handshake),
    /// The connection ends, as the client wishes.
    Close,
}

impl Handshake {
    /// Appends the greeting.
    pub fn start(tls: Tls, out: &mut Vec<u8>) -> Self {
        Greeting::encode_newstyle(ServerFlags::FIXED_NEWSTYLE | ServerFlags::NO_ZEROES, out);
        Self::Flags(AwaitFlags { tls })
    }

    /// The number of bytes that [`Handshake::handle`] wants; never zero, and never more than [`limits::MAX_OPTION`].
    pub fn wanted(&self) -> usize {
        match self {
            Self::Flags(_) => 4,
            Self::Option(_) => OptionHeader::LEN,
            Self::Payload(state) => usize::try_from(state.header.length).unwrap_or(usize::MAX),
            Self::Drain(state) => state.left.min(limits::DRAIN_STEP),
        }
    }

    /// Takes exactly the bytes that are wanted.
    pub fn handle(
        self,
        bytes: &[u8],
        catalog: &Catalog,
        out: &mut Vec<u8>,
    ) -> Result<Step, SessionError> {
        match self {
            Self::Flags(state) => state.handle(bytes),
            Self::Option(state) => state.handle(bytes, catalog, out),
            Self::Payload(state) => state.handle(bytes, catalog, out),
            Self::Drain(state) => state.handle(bytes, out),
        }
    }
}

/// Waits for the client's flags.
#[derive(Debug)]
pub struct AwaitFlags {
    tls: Tls,
}

impl AwaitFlags {
    fn handle(self, bytes: &[u8]) -> Result<Step, SessionError> {
        let flags = ClientFlags(bytes.first_chunk().copied().map_or(0, u32::from_be_bytes));
        let known = ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES;
        if !flags.without(known).is_empty() {
            return Err(PeerMisbehaved::UnknownClientFlags { flags: flags.0 }.into());
        }
        Ok(Step::Next(Handshake::Option(AwaitOption {
            fixed: flags.has(ClientFlags::FIXED_NEWSTYLE),
            no_zeroes: flags.has(ClientFlags::NO_ZEROES),
            tls: self.tls,
            options: 0,
            answers: Answers::default(),
        })))
    }
}

/// Waits for the head of an option.
#[derive(Debug)]
pub struct AwaitOption {
    fixed: bool,
    no_zeroes: bool,
    tls: Tls,
    options: u32,
    answers: Answers,
}

impl AwaitOption {
    fn handle(
        mut self,
        bytes: &[u8],
        catalog: &Catalog,
        out: &mut Vec<u8>,
    ) -> Result<Step, SessionError> {
        let header = OptionHeader::decode(bytes)?;
        let OptionHeader { option, length } = header;
        self.options = self.options.saturating_add(1);
        if self.options > limits::MAX_OPTIONS_RECEIVED {
            return Err(PeerMisbehaved::TooManyOptions {
                most: limits::MAX_OPTIONS_RECEIVED,
            }
            .into());
        }
        if !self.fixed && option != OptionCode::EXPORT_NAME {
            return Err(PeerMisbehaved::OptionWithoutFixed { option }.into());
        }
        let most = match option {
            // No answer can refuse it, so there is no use in reading past it.
            OptionCode::EXPORT_NAME => limits::MAX_OPTION,
            _ => limits::MAX_OPTION_DRAINED,
        };
        if length > most {
            return Err(PeerMisbehaved::OptionTooLong {
                option,
                length,
                most,
            }
            .into());
        }
        if length > limits::MAX_OPTION {
            return Ok(Step::Next(Handshake::Drain(Drain {
                left: usize::try_from(length).unwrap_or(usize::MAX),
                header,
                next: self,
            })));
        }
        let payload = AwaitPayload { header, next: self };
        if length == 0 {
            return payload.handle(&[], catalog, out);
        }
        Ok(Step::Next(Handshake::Payload(payload)))
    }
}

/// Waits for the payload of an option.
#[derive(Debug)]
pub struct AwaitPayload {
    header: OptionHeader,
    next: AwaitOption,
}

impl AwaitPayload {
    fn handle(
        self,
        payload: &[u8],
        catalog: &Catalog,
        out: &mut Vec<u8>,
    ) -> Result<Step, SessionError> {
        let mut next = self.next;
        let OptionHeader { option, length } = self.header;
        match next.tls.gate(option, length) {
            Gate::Pass => {}
            Gate::Start => {
                Answers::acknowledge(option, out)?;
                next.tls = Tls::On;
                next.answers = Answers::default();
                return Ok(Step::StartTls(Handshake::Option(next)));
            }
            Gate::HangUp => return Err(PeerIncompatible::WithoutTls.into()),
            Gate::Refuse(code, text) => {
                Answers::refuse(option, code, text, out)?;
                return Ok(Step::Next(Handshake::Option(next)));
            }
        }
        if option == OptionCode::EXPORT_NAME {
            return export_name(&next, payload, catalog, out);
        }
        let after = next.answers.answer(option, payload, catalog, out)?;
        Ok(match after {
            After::Next => Step::Next(Handshake::Option(next)),
            After::Transmit(agreed) => Step::Transmit(agreed),
            After::Close => Step::Close,
        })
    }
}

/// Throws the payload of an overlong option away and refuses it.
#[derive(Debug)]
pub struct Drain {
    left: usize,
    header: OptionHeader,
    next: AwaitOption,
}

impl Drain {
    fn handle(mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<Step, SessionError> {
        self.left = self.left.saturating_sub(bytes.len());
        if self.left > 0 {
            return Ok(Step::Next(Handshake::Drain(self)));
        }
        let OptionHeader { option, length } = self.header;
        if option == OptionCode::ABORT {
            Answers::acknowledge(OptionCode::ABORT, out)?;
            return Ok(Step::Close);
        }
        let (code, text) = match self.next.tls.gate(option, length) {
            Gate::Refuse(code, text) => (code, text),
            Gate::Pass | Gate::Start | Gate::HangUp => match Answers::SUPPORTED.contains(&option) {
                true => (OptionReplyCode::ERR_TOO_BIG, "option is too long"),
                false => (OptionReplyCode::ERR_UNSUP, "option is too long"),
            },
        };
        Answers::refuse(option, code, text, out)?;
        Ok(Step::Next(Handshake::Option(self.next)))
    }
}

/// Answers the option that cannot be refused but by hanging up.
fn export_name(
    state: &AwaitOption,
    payload: &[u8],
    catalog: &Catalog,
    out: &mut Vec<u8>,
) -> Result<Step, SessionError> {
    let found = std::str::from_utf8(payload)
        .ok()
        .and_then(|name| catalog.find(name));
    let Some((export, offer)) = found else {
        let shown = payload.get(..payload.len().min(64)).unwrap_or_default();
        return Err(PeerIncompatible::NoSuchExport {
            name: String::from_utf8_lossy(shown).into_owned(),
        }
        .into());
    };
    let dialect = state.answers.dialect();
    if dialect == Dialect::Extended {
        return Err(PeerMisbehaved::ExportNameExtended.into());
    }
    ExportNameAnswer {
        size: offer.size,
        flags: offer.flags(dialect),
    }
    .encode(state.no_zeroes, out);
    Ok(Step::Transmit(state.answers.agreed(export)))
}
