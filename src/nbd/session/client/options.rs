//! The state in which a client may send an option, and the state in which it waits for the answers.

use super::super::{PeerIncompatible, PeerMisbehaved, Refused, SessionError, limits};
use super::AwaitExportName;
use crate::nbd::wire::{
    Dialect, EncodeError, OptionCode, OptionReplyCode, OptionReplyHeader, encode_option,
};

/// May send the next option of the handshake.
#[derive(Debug)]
pub struct Options {
    no_zeroes: bool,
    dialect: Dialect,
    sent: u32,
}

impl Options {
    pub(super) const fn new(no_zeroes: bool) -> Self {
        Self {
            no_zeroes,
            dialect: Dialect::Simple,
            sent: 0,
        }
    }

    /// What the transmission phase will speak, as agreed so far.
    pub const fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// How many options may still be sent on this connection.
    pub const fn left(&self) -> u32 {
        limits::MAX_OPTIONS_SENT.saturating_sub(self.sent)
    }

    /// Appends an option to `out` and waits for its answers.
    pub fn send<C: OptionCall>(
        mut self,
        call: C,
        out: &mut Vec<u8>,
    ) -> Result<Sent<C>, SessionError> {
        if self.left() == 0 {
            return Err(PeerIncompatible::OptionsSpent {
                most: limits::MAX_OPTIONS_SENT,
            }
            .into());
        }
        self.sent = self.sent.saturating_add(1);
        encode_option(call.option(), &call.payload()?, out)?;
        Ok(Sent {
            options: self,
            call,
            header: None,
            answers: 0,
        })
    }

    /// Chooses an export the old way, for a server that does not know `GO`.
    pub fn export_name(
        self,
        export: &str,
        out: &mut Vec<u8>,
    ) -> Result<AwaitExportName, SessionError> {
        AwaitExportName::send(self.no_zeroes, export, out)
    }

    pub(super) fn agree(&mut self, dialect: Dialect) {
        self.dialect = dialect;
    }

    /// Drops what was agreed on so far.
    pub(super) fn forget(&mut self) {
        self.dialect = Dialect::Simple;
    }
}

/// An option of the client: what it sends and how it takes the answers.
pub trait OptionCall: Sized {
    /// What the answers amount to.
    type Answer;

    /// The option's number.
    fn option(&self) -> OptionCode;

    /// The option's payload.
    fn payload(&self) -> Result<Vec<u8>, EncodeError>;

    /// Takes an answer before the last; the default has none.
    fn piece(&mut self, code: OptionReplyCode, payload: &[u8]) -> Result<(), SessionError> {
        let _ = payload;
        Err(unexpected(self.option(), code))
    }

    /// Takes the acknowledgement, which ends the answers.
    fn finish(self, options: &mut Options) -> Result<Self::Answer, SessionError>;
}

/// Waits for the answers to an option.
#[derive(Debug)]
pub struct Sent<C> {
    options: Options,
    call: C,
    header: Option<OptionReplyHeader>,
    answers: u32,
}

/// What an answer led to.
#[derive(Debug)]
pub enum Heard<C: OptionCall> {
    /// More has to come.
    More(Sent<C>),
    /// The option is done or refused, and the next may be sent.
    Done(Options, Result<C::Answer, Refused>),
}

impl<C: OptionCall> Sent<C> {
    /// The number of bytes that [`Sent::handle`] wants; never zero.
    pub fn wanted(&self) -> usize {
        match self.header {
            None => OptionReplyHeader::LEN,
            Some(header) => usize::try_from(header.length).unwrap_or(usize::MAX),
        }
    }

    /// Takes exactly the bytes that are wanted.
    pub fn handle(mut self, bytes: &[u8]) -> Result<Heard<C>, SessionError> {
        match self.header.take() {
            None => self.handle_header(bytes),
            Some(header) => self.handle_payload(header.code, bytes),
        }
    }

    fn handle_header(mut self, bytes: &[u8]) -> Result<Heard<C>, SessionError> {
        let option = self.call.option();
        let header = OptionReplyHeader::decode(bytes)?;
        if header.option != option {
            return Err(PeerMisbehaved::AnswerToOther {
                sent: option,
                got: header.option,
            }
            .into());
        }
        if header.length > limits::MAX_OPTION_REPLY {
            return Err(PeerMisbehaved::AnswerTooLong {
                option,
                length: header.length,
                most: limits::MAX_OPTION_REPLY,
            }
            .into());
        }
        if header.length == 0 {
            return self.handle_payload(header.code, &[]);
        }
        self.header = Some(header);
        Ok(Heard::More(self))
    }

    fn handle_payload(
        mut self,
        code: OptionReplyCode,
        payload: &[u8],
    ) -> Result<Heard<C>, SessionError> {
        let option = self.call.option();
        if code.is_error() {
            let text = String::from_utf8_lossy(payload).into_owned();
            return Ok(Heard::Done(
                self.options,
                Err(Refused { option, code, text }),
            ));
        }
        if code == OptionReplyCode::ACK {
            if !payload.is_empty() {
                return Err(PeerMisbehaved::AckWithPayload {
                    option,
                    length: payload.len(),
                }
                .into());
            }
            let answer = self.call.finish(&mut self.options)?;
            return Ok(Heard::Done(self.options, Ok(answer)));
        }
        self.answers = self.answers.saturating_add(1);
        if self.answers > limits::MAX_REPLIES_PER_OPTION {
            return Err(PeerMisbehaved::TooManyAnswers {
                option,
                most: limits::MAX_REPLIES_PER_OPTION,
            }
            .into());
        }
        self.call.piece(code, payload)?;
        Ok(Heard::More(self))
    }
}

pub(super) fn unexpected(option: OptionCode, code: OptionReplyCode) -> SessionError {
    PeerMisbehaved::UnexpectedAnswer { option, code }.into()
}

/// Refuses a text that is longer than any may be.
pub(super) fn bounded(what: &'static str, text: String) -> Result<String, SessionError> {
    match text.len() {
        length if length > limits::MAX_STRING => {
            Err(PeerMisbehaved::StringTooLong { what, length }.into())
        }
        _ => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ExtendedHeaders, StructuredReply};
    use super::*;

    fn sent() -> Sent<StructuredReply> {
        let mut out = Vec::new();
        let sent = Options::new(true).send(StructuredReply, &mut out).unwrap();
        assert_eq!(out, b"IHAVEOPT\0\0\0\x08\0\0\0\0");
        sent
    }

    fn header(option: u8, code: u32, length: u32) -> Vec<u8> {
        let mut bytes = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0".to_vec();
        bytes.push(option);
        bytes.extend(code.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    #[test]
    fn any_error_refuses_the_option_and_keeps_the_server_s_words() {
        for code in [0x8000_0001, 0x8000_0007, 0x8000_0077, 0xffff_ffff] {
            let Heard::More(more) = sent().handle(&header(8, code, 2)).unwrap() else {
                panic!("done before the payload");
            };
            assert_eq!(more.wanted(), 2);
            let Heard::Done(options, Err(refused)) = more.handle(b"no").unwrap() else {
                panic!("not refused");
            };
            assert_eq!((refused.code.0, refused.text.as_str()), (code, "no"));
            assert_eq!(options.dialect(), Dialect::Simple);
        }
    }

    #[test]
    fn acknowledged_structured_replies_change_the_dialect() {
        let Heard::Done(options, Ok(())) = sent().handle(&header(8, 1, 0)).unwrap() else {
            panic!("not done");
        };
        assert_eq!(options.dialect(), Dialect::Structured);
    }

    #[test]
    fn acknowledged_extended_headers_change_the_dialect() {
        let mut out = Vec::new();
        let sent = Options::new(true).send(ExtendedHeaders, &mut out).unwrap();
        assert_eq!(out, b"IHAVEOPT\0\0\0\x0b\0\0\0\0");
        let Heard::Done(options, Ok(())) = sent.handle(&header(11, 1, 0)).unwrap() else {
            panic!("not done");
        };
        assert_eq!(options.dialect(), Dialect::Extended);
    }

    #[test]
    fn server_answers_with_an_unknown_code_that_is_no_error() {
        assert!(matches!(
            sent().handle(&header(8, 99, 0)),
            Err(SessionError::Misbehaved(
                PeerMisbehaved::UnexpectedAnswer { .. }
            ))
        ));
    }

    #[test]
    fn server_answers_another_option() {
        assert!(matches!(
            sent().handle(&header(7, 1, 0)),
            Err(SessionError::Misbehaved(
                PeerMisbehaved::AnswerToOther { .. }
            ))
        ));
    }

    #[test]
    fn server_claims_an_answer_of_four_gibibytes() {
        assert!(matches!(
            sent().handle(&header(8, 0x8000_0001, u32::MAX)),
            Err(SessionError::Misbehaved(
                PeerMisbehaved::AnswerTooLong { .. }
            ))
        ));
    }

    #[test]
    fn server_acknowledges_with_a_payload() {
        let Heard::More(more) = sent().handle(&header(8, 1, 1)).unwrap() else {
            panic!("done before the payload");
        };
        assert!(matches!(
            more.handle(b"x"),
            Err(SessionError::Misbehaved(
                PeerMisbehaved::AckWithPayload { .. }
            ))
        ));
    }

    #[test]
    fn client_stops_before_nbdkit_hangs_up() {
        let mut options = Options::new(true);
        for _ in 0..limits::MAX_OPTIONS_SENT {
            let sent = options.send(StructuredReply, &mut Vec::new()).unwrap();
            let Heard::Done(next, _) = sent.handle(&header(8, 0x8000_0001, 0)).unwrap() else {
                panic!("not done");
            };
            options = next;
        }
        assert!(options.send(StructuredReply, &mut Vec::new()).is_err());
    }
}
