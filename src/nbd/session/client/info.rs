//! `INFO` and `GO`: what an export is, and the way into the transmission phase.

use super::super::{BlockSize, PeerMisbehaved, SessionError, limits};
use super::list::cut;
use super::options::{bounded, unexpected};
use super::{OptionCall, Options};
use crate::nbd::wire::{
    EncodeError, Info, InfoCode, InfoRequest, OptionCode, OptionReplyCode, TransmissionFlags,
};

/// What a server tells about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportDetails {
    /// The size in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// The block sizes; [`BlockSize::DEFAULT`] if the server did not speak of them.
    pub block_size: BlockSize,
    /// The canonical name, if told.
    pub name: Option<String>,
    /// A text for people, if told.
    pub description: Option<String>,
}

/// Asks about an export and, as `GO`, enters the transmission phase.
///
/// Both ask for the same; only the size in the answer to `GO` counts, since one server tells a size of 0 before.
#[derive(Debug)]
pub struct AskExport {
    option: OptionCode,
    export: String,
    heard: Pieces,
}

#[derive(Debug, Default)]
struct Pieces {
    size: Option<(u64, TransmissionFlags)>,
    block_size: Option<BlockSize>,
    name: Option<String>,
    description: Option<String>,
}

impl AskExport {
    /// Asks about an export and stays in the handshake.
    pub fn info(export: &str) -> Self {
        Self::with(OptionCode::INFO, export)
    }

    /// Asks about an export and enters the transmission phase.
    pub fn go(export: &str) -> Self {
        Self::with(OptionCode::GO, export)
    }

    fn with(option: OptionCode, export: &str) -> Self {
        Self {
            option,
            export: export.to_owned(),
            heard: Pieces::default(),
        }
    }
}

impl OptionCall for AskExport {
    type Answer = ExportDetails;

    fn option(&self) -> OptionCode {
        self.option
    }

    fn payload(&self) -> Result<Vec<u8>, EncodeError> {
        InfoRequest {
            export: self.export.clone(),
            wanted: vec![InfoCode::BLOCK_SIZE, InfoCode::NAME, InfoCode::DESCRIPTION],
        }
        .encode()
    }

    fn piece(&mut self, code: OptionReplyCode, payload: &[u8]) -> Result<(), SessionError> {
        if code != OptionReplyCode::INFO {
            return Err(unexpected(self.option, code));
        }
        match Info::decode(payload)? {
            Info::Export(info) if info.size > limits::MAX_EXPORT_SIZE => {
                return Err(PeerMisbehaved::SizeTooLarge { size: info.size }.into());
            }
            Info::Export(info) => self.heard.size = Some((info.size, info.flags)),
            Info::BlockSize(sizes) => {
                self.heard.block_size = Some(BlockSize::from_peer(sizes)?);
            }
            Info::Name(name) => self.heard.name = Some(bounded("export name", name)?),
            Info::Description(mut text) => {
                cut(&mut text);
                self.heard.description = Some(text);
            }
            Info::Unknown(_) => {}
        }
        Ok(())
    }

    fn finish(self, _: &mut Options) -> Result<ExportDetails, SessionError> {
        let Some((size, flags)) = self.heard.size else {
            return Err(PeerMisbehaved::NoExportInfo {
                option: self.option,
            }
            .into());
        };
        Ok(ExportDetails {
            size,
            flags,
            block_size: self.heard.block_size.unwrap_or(BlockSize::DEFAULT),
            name: self.heard.name,
            description: self.heard.description.filter(|text| !text.is_empty()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn details(pieces: &[&[u8]]) -> Result<ExportDetails, SessionError> {
        let mut go = AskExport::go("d");
        for piece in pieces {
            go.piece(OptionReplyCode::INFO, piece)?;
        }
        go.finish(&mut Options::new(true))
    }

    #[test]
    fn server_acknowledges_go_without_a_size() {
        assert!(matches!(
            details(&[b"\0\x01name"]),
            Err(SessionError::Misbehaved(
                PeerMisbehaved::NoExportInfo { .. }
            ))
        ));
    }

    #[test]
    fn server_sends_a_size_past_63_bits() {
        for size in [1 << 63, u64::MAX] {
            let mut piece = vec![0, 0];
            piece.extend(u64::to_be_bytes(size));
            piece.extend([0, 1]);
            assert!(details(&[&piece]).is_err());
        }
    }

    #[test]
    fn unknown_information_is_passed_over() {
        let export = b"\0\0\0\0\0\0\0\0\x10\0\0\x01";
        let found = details(&[b"\0\x99abc", export]).unwrap();
        assert_eq!(found.size, 0x1000);
        assert_eq!(found.block_size, BlockSize::DEFAULT);
    }

    #[test]
    fn server_sends_an_overlong_description() {
        let export = b"\0\0\0\0\0\0\0\0\x10\0\0\x01";
        let mut long = vec![0, 2];
        long.extend([b'x'; 5000]);
        let found = details(&[&long, export]).unwrap();
        assert_eq!(found.description.unwrap().len(), limits::MAX_STRING);
    }
}
