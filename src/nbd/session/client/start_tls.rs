//! `STARTTLS`: what was agreed on before it counts no more.

use super::super::SessionError;
use super::{OptionCall, Options};
use crate::nbd::wire::{EncodeError, OptionCode};

/// Asks to go on over TLS, whose handshake follows the acknowledgement at once.
#[derive(Debug)]
pub struct StartTls;

impl OptionCall for StartTls {
    type Answer = ();

    fn option(&self) -> OptionCode {
        OptionCode::STARTTLS
    }

    fn payload(&self) -> Result<Vec<u8>, EncodeError> {
        Ok(Vec::new())
    }

    fn finish(self, options: &mut Options) -> Result<(), SessionError> {
        options.forget();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Heard, StructuredReply};
    use super::*;
    use crate::nbd::wire::Dialect;

    const ACK: &[u8] = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0";
    const ACK_STRUCTURED: &[u8] = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\0\0\0\0";

    #[test]
    fn what_was_agreed_on_in_the_clear_is_forgotten() {
        let sent = Options::new(true).send(StructuredReply, &mut Vec::new());
        let Heard::Done(options, Ok(())) = sent.unwrap().handle(ACK_STRUCTURED).unwrap() else {
            panic!("not done");
        };
        let mut out = Vec::new();
        let sent = options.send(StartTls, &mut out).unwrap();
        assert_eq!(out, b"IHAVEOPT\0\0\0\x05\0\0\0\0");
        assert_eq!(sent.wanted(), ACK.len());
        let Heard::Done(options, Ok(())) = sent.handle(ACK).unwrap() else {
            panic!("not done");
        };
        assert_eq!(options.dialect(), Dialect::Simple);
    }
}
