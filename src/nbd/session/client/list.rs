//! The options without a payload: `LIST`, `STRUCTURED_REPLY`, `EXTENDED_HEADERS`, `ABORT`.

use super::super::{SessionError, limits};
use super::options::{bounded, unexpected};
use super::{OptionCall, Options};
use crate::nbd::wire::{Dialect, EncodeError, ListedExport, OptionCode, OptionReplyCode};

/// Asks for the names of the exports.
#[derive(Debug, Default)]
pub struct List {
    exports: Vec<ListedExport>,
}

impl OptionCall for List {
    type Answer = Vec<ListedExport>;

    fn option(&self) -> OptionCode {
        OptionCode::LIST
    }

    fn payload(&self) -> Result<Vec<u8>, EncodeError> {
        Ok(Vec::new())
    }

    fn piece(&mut self, code: OptionReplyCode, payload: &[u8]) -> Result<(), SessionError> {
        if code != OptionReplyCode::SERVER {
            return Err(unexpected(OptionCode::LIST, code));
        }
        let mut export = ListedExport::decode(payload)?;
        export.name = bounded("export name", export.name)?;
        cut(&mut export.description);
        self.exports.push(export);
        Ok(())
    }

    fn finish(self, _: &mut Options) -> Result<Self::Answer, SessionError> {
        Ok(self.exports)
    }
}

/// Asks for structured replies.
#[derive(Debug)]
pub struct StructuredReply;

impl OptionCall for StructuredReply {
    type Answer = ();

    fn option(&self) -> OptionCode {
        OptionCode::STRUCTURED_REPLY
    }

    fn payload(&self) -> Result<Vec<u8>, EncodeError> {
        Ok(Vec::new())
    }

    fn finish(self, options: &mut Options) -> Result<(), SessionError> {
        options.agree(Dialect::Structured);
        Ok(())
    }
}

/// Asks for extended headers, which bring structured replies along.
#[derive(Debug)]
pub struct ExtendedHeaders;

impl OptionCall for ExtendedHeaders {
    type Answer = ();

    fn option(&self) -> OptionCode {
        OptionCode::EXTENDED_HEADERS
    }

    fn payload(&self) -> Result<Vec<u8>, EncodeError> {
        Ok(Vec::new())
    }

    fn finish(self, options: &mut Options) -> Result<(), SessionError> {
        options.agree(Dialect::Extended);
        Ok(())
    }
}

/// Ends the connection in the handshake; a server may answer or hang up.
#[derive(Debug)]
pub struct Abort;

impl OptionCall for Abort {
    type Answer = ();

    fn option(&self) -> OptionCode {
        OptionCode::ABORT
    }

    fn payload(&self) -> Result<Vec<u8>, EncodeError> {
        Ok(Vec::new())
    }

    fn finish(self, _: &mut Options) -> Result<(), SessionError> {
        Ok(())
    }
}

/// Shortens a text for people to the most that any text may have.
pub(super) fn cut(text: &mut String) {
    let end = text.floor_char_boundary(limits::MAX_STRING);
    text.truncate(end);
}
