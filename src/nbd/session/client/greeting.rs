//! The first state of a client, and the old way to the transmission phase.

use super::super::{BlockSize, PeerIncompatible, PeerMisbehaved, SessionError, limits};
use super::{ExportDetails, Options};
use crate::nbd::wire::{
    ClientFlags, ExportNameAnswer, Greeting, OptionCode, ServerFlags, encode_option,
};

/// Waits for the server's first bytes.
#[derive(Debug, Default)]
pub struct AwaitGreeting;

/// How a connection can go on after the greeting.
#[derive(Debug)]
pub enum Opened {
    /// Any option may be sent.
    Fixed(Options),
    /// Only `EXPORT_NAME` may be sent.
    NotFixed(NotFixed),
}

impl AwaitGreeting {
    /// The number of bytes that [`AwaitGreeting::handle`] wants.
    pub const fn wanted(&self) -> usize {
        Greeting::LEN
    }

    /// Takes the greeting and appends the client's flags.
    pub fn handle(self, bytes: &[u8], out: &mut Vec<u8>) -> Result<Opened, SessionError> {
        let offered = match Greeting::decode(bytes)? {
            Greeting::Newstyle(flags) => flags,
            Greeting::Oldstyle => return Err(PeerIncompatible::Oldstyle.into()),
        };
        let mut taken = ClientFlags::NONE;
        let fixed = offered.has(ServerFlags::FIXED_NEWSTYLE);
        if fixed {
            taken = taken | ClientFlags::FIXED_NEWSTYLE;
        }
        let no_zeroes = offered.has(ServerFlags::NO_ZEROES);
        if no_zeroes {
            taken = taken | ClientFlags::NO_ZEROES;
        }
        out.extend_from_slice(&taken.0.to_be_bytes());
        Ok(match fixed {
            true => Opened::Fixed(Options::new(no_zeroes)),
            false => Opened::NotFixed(NotFixed { no_zeroes }),
        })
    }
}

/// May choose an export by its name and do nothing else.
#[derive(Debug)]
pub struct NotFixed {
    no_zeroes: bool,
}

impl NotFixed {
    /// Chooses an export.
    pub fn export_name(
        self,
        export: &str,
        out: &mut Vec<u8>,
    ) -> Result<AwaitExportName, SessionError> {
        AwaitExportName::send(self.no_zeroes, export, out)
    }
}

/// Waits for the answer to `EXPORT_NAME`; a server that refuses can only hang up.
#[derive(Debug)]
pub struct AwaitExportName {
    no_zeroes: bool,
}

impl AwaitExportName {
    pub(super) fn send(
        no_zeroes: bool,
        export: &str,
        out: &mut Vec<u8>,
    ) -> Result<Self, SessionError> {
        encode_option(OptionCode::EXPORT_NAME, export.as_bytes(), out)?;
        Ok(Self { no_zeroes })
    }

    /// The number of bytes that [`AwaitExportName::handle`] wants.
    pub const fn wanted(&self) -> usize {
        ExportNameAnswer::len(self.no_zeroes)
    }

    /// Takes the answer; the transmission phase follows.
    pub fn handle(self, bytes: &[u8]) -> Result<ExportDetails, SessionError> {
        let ExportNameAnswer { size, flags } = ExportNameAnswer::decode(bytes)?;
        if size > limits::MAX_EXPORT_SIZE {
            return Err(PeerMisbehaved::SizeTooLarge { size }.into());
        }
        Ok(ExportDetails {
            size,
            flags,
            block_size: BlockSize::DEFAULT,
            name: None,
            description: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(greeting: &[u8; 18]) -> (Result<Opened, SessionError>, Vec<u8>) {
        let mut out = Vec::new();
        (AwaitGreeting.handle(greeting, &mut out), out)
    }

    #[test]
    fn client_takes_only_the_flags_that_were_offered() {
        assert_eq!(open(b"NBDMAGICIHAVEOPT\0\x03").1, [0, 0, 0, 3]);
        assert_eq!(open(b"NBDMAGICIHAVEOPT\0\x01").1, [0, 0, 0, 1]);
        assert_eq!(open(b"NBDMAGICIHAVEOPT\xff\xfd").1, [0, 0, 0, 1]);
        let (opened, flags) = open(b"NBDMAGICIHAVEOPT\0\x02");
        assert!(matches!(opened, Ok(Opened::NotFixed(_))));
        assert_eq!(flags, [0, 0, 0, 2]);
    }

    #[test]
    fn server_speaks_oldstyle() {
        let (opened, _) = open(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0");
        assert!(matches!(
            opened,
            Err(SessionError::Incompatible(PeerIncompatible::Oldstyle))
        ));
    }

    #[test]
    fn server_sends_a_size_past_63_bits_by_export_name() {
        let mut out = Vec::new();
        let wait = NotFixed { no_zeroes: true }
            .export_name("", &mut out)
            .unwrap();
        assert_eq!(wait.wanted(), 10);
        let bytes = b"\x80\0\0\0\0\0\0\0\0\x01";
        assert!(wait.handle(bytes).is_err());
    }
}
