//! How a server answers each option, and what it remembers between two.

use super::super::{SessionError, limits};
use super::{Agreed, Catalog, Offer};
use crate::nbd::wire::{
    Dialect, ExportInfo, Info, InfoCode, InfoRequest, ListedExport, MetaContext, MetaRequest,
    OptionCode, OptionReplyCode, TransmissionFlags, encode_reply,
};

/// What the options so far have agreed on.
#[derive(Debug)]
pub(super) struct Answers {
    dialect: Dialect,
    /// The export for which contexts are chosen, and the chosen ones.
    chosen: Option<(usize, Vec<usize>)>,
}

/// What follows an answer.
#[derive(Debug)]
pub(super) enum After {
    Next,
    Transmit(Agreed),
    Close,
}

impl Default for Answers {
    fn default() -> Self {
        Self {
            dialect: Dialect::Simple,
            chosen: None,
        }
    }
}

impl Answers {
    /// The options that have an answer besides a refusal.
    pub(super) const SUPPORTED: &[OptionCode] = &[
        OptionCode::EXPORT_NAME,
        OptionCode::ABORT,
        OptionCode::LIST,
        OptionCode::INFO,
        OptionCode::GO,
        OptionCode::STRUCTURED_REPLY,
        OptionCode::LIST_META_CONTEXT,
        OptionCode::SET_META_CONTEXT,
        OptionCode::EXTENDED_HEADERS,
    ];

    pub(super) const fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Sums up for a client that enters the transmission phase with an export.
    pub(super) fn agreed(&self, export: usize) -> Agreed {
        let contexts = match &self.chosen {
            Some((of, contexts)) if *of == export => contexts.clone(),
            _ => Vec::new(),
        };
        Agreed {
            export,
            dialect: self.dialect,
            contexts,
        }
    }

    pub(super) fn acknowledge(option: OptionCode, out: &mut Vec<u8>) -> Result<(), SessionError> {
        encode_reply(option, OptionReplyCode::ACK, &[], out)?;
        Ok(())
    }

    pub(super) fn refuse(
        option: OptionCode,
        code: OptionReplyCode,
        text: &str,
        out: &mut Vec<u8>,
    ) -> Result<After, SessionError> {
        let end = text.floor_char_boundary(limits::MAX_ERROR_TEXT_SENT);
        let text = text.get(..end).unwrap_or_default();
        encode_reply(option, code, text.as_bytes(), out)?;
        Ok(After::Next)
    }

    /// Answers any option but `EXPORT_NAME`.
    pub(super) fn answer(
        &mut self,
        option: OptionCode,
        payload: &[u8],
        catalog: &Catalog,
        out: &mut Vec<u8>,
    ) -> Result<After, SessionError> {
        match option {
            OptionCode::ABORT => {
                Self::acknowledge(option, out)?;
                Ok(After::Close)
            }
            OptionCode::LIST => list(payload, catalog, out),
            OptionCode::STRUCTURED_REPLY => self.structured(payload, out),
            OptionCode::EXTENDED_HEADERS => self.extended(payload, out),
            OptionCode::INFO | OptionCode::GO => self.info(option, payload, catalog, out),
            OptionCode::LIST_META_CONTEXT => list_contexts(payload, catalog, out),
            OptionCode::SET_META_CONTEXT => self.set_contexts(payload, catalog, out),
            _ => Self::refuse(
                option,
                OptionReplyCode::ERR_UNSUP,
                &format!("option {option} is not supported"),
                out,
            ),
        }
    }

    fn structured(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<After, SessionError> {
        let option = OptionCode::STRUCTURED_REPLY;
        if !payload.is_empty() {
            return invalid(option, "the option has no payload", out);
        }
        match self.dialect {
            Dialect::Simple => {
                self.dialect = Dialect::Structured;
                Self::acknowledge(option, out)?;
                Ok(After::Next)
            }
            Dialect::Structured => invalid(option, "structured replies are on already", out),
            Dialect::Extended => {
                let text = "extended headers are on, and structured replies with them";
                Self::refuse(option, OptionReplyCode::ERR_EXT_HEADER_REQD, text, out)
            }
        }
    }

    fn extended(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<After, SessionError> {
        let option = OptionCode::EXTENDED_HEADERS;
        if !payload.is_empty() {
            return invalid(option, "the option has no payload", out);
        }
        if self.dialect == Dialect::Extended {
            return invalid(option, "extended headers are on already", out);
        }
        self.dialect = Dialect::Extended;
        Self::acknowledge(option, out)?;
        Ok(After::Next)
    }

    /// What an export can do for a client that has agreed on this much; INFO tells of all that GO could.
    fn flags(&self, option: OptionCode, export: usize, offer: &Offer) -> TransmissionFlags {
        let chosen =
            matches!(&self.chosen, Some((of, contexts)) if *of == export && !contexts.is_empty());
        let filter = self.dialect == Dialect::Extended
            && (chosen || (option == OptionCode::INFO && !offer.contexts.is_empty()));
        let flags = offer.flags(self.dialect);
        match filter {
            true => flags | TransmissionFlags::BLOCK_STATUS_PAYLOAD,
            false => flags,
        }
    }

    fn info(
        &self,
        option: OptionCode,
        payload: &[u8],
        catalog: &Catalog,
        out: &mut Vec<u8>,
    ) -> Result<After, SessionError> {
        let request = match InfoRequest::decode(payload) {
            Ok(request) => request,
            Err(fault) => return invalid(option, &fault.to_string(), out),
        };
        let (export, offer) = match find(option, &request.export, catalog, out)? {
            Ok(found) => found,
            Err(after) => return Ok(after),
        };
        // Block sizes first: QEMU checks the size against them only in this order.
        let mut infos = vec![
            Info::BlockSize(offer.block_size.into()),
            Info::Export(ExportInfo {
                size: offer.size,
                flags: self.flags(option, export, offer),
            }),
        ];
        if let Some(text) = &offer.description {
            infos.push(Info::Description(text.clone()));
        }
        if request.wanted.contains(&InfoCode::NAME) {
            infos.push(Info::Name(offer.name.clone()));
        }
        for info in infos {
            encode_reply(option, OptionReplyCode::INFO, &info.encode()?, out)?;
        }
        Self::acknowledge(option, out)?;
        Ok(match option {
            OptionCode::GO => After::Transmit(self.agreed(export)),
            _ => After::Next,
        })
    }

    fn set_contexts(
        &mut self,
        payload: &[u8],
        catalog: &Catalog,
        out: &mut Vec<u8>,
    ) -> Result<After, SessionError> {
        let option = OptionCode::SET_META_CONTEXT;
        // Whatever comes of it, an earlier choice is void.
        self.chosen = None;
        if self.dialect == Dialect::Simple {
            return invalid(option, "structured replies have to be on", out);
        }
        let request = match MetaRequest::decode(payload) {
            Ok(request) => request,
            Err(fault) => return invalid(option, &fault.to_string(), out),
        };
        let (export, offer) = match find(option, &request.export, catalog, out)? {
            Ok(found) => found,
            Err(after) => return Ok(after),
        };
        let mut chosen = Vec::new();
        for (at, name) in offer.contexts.iter().enumerate() {
            if request.queries.contains(name) {
                let id = u32::try_from(at).unwrap_or(u32::MAX);
                put_context(option, id, name, out)?;
                chosen.push(at);
            }
        }
        self.chosen = Some((export, chosen));
        Self::acknowledge(option, out)?;
        Ok(After::Next)
    }
}

fn list(payload: &[u8], catalog: &Catalog, out: &mut Vec<u8>) -> Result<After, SessionError> {
    let option = OptionCode::LIST;
    if !payload.is_empty() {
        return invalid(option, "the option has no payload", out);
    }
    for offer in catalog.offers() {
        let listed = ListedExport {
            name: offer.name.clone(),
            description: offer.description.clone().unwrap_or_default(),
        };
        encode_reply(option, OptionReplyCode::SERVER, &listed.encode()?, out)?;
    }
    Answers::acknowledge(option, out)?;
    Ok(After::Next)
}

fn list_contexts(
    payload: &[u8],
    catalog: &Catalog,
    out: &mut Vec<u8>,
) -> Result<After, SessionError> {
    let option = OptionCode::LIST_META_CONTEXT;
    let request = match MetaRequest::decode(payload) {
        Ok(request) => request,
        Err(fault) => return invalid(option, &fault.to_string(), out),
    };
    let (_, offer) = match find(option, &request.export, catalog, out)? {
        Ok(found) => found,
        Err(after) => return Ok(after),
    };
    for name in &offer.contexts {
        let asked = |query: &String| {
            query == name || (query.ends_with(':') && name.starts_with(query.as_str()))
        };
        if request.queries.is_empty() || request.queries.iter().any(asked) {
            put_context(option, 0, name, out)?;
        }
    }
    Answers::acknowledge(option, out)?;
    Ok(After::Next)
}

fn put_context(
    option: OptionCode,
    id: u32,
    name: &str,
    out: &mut Vec<u8>,
) -> Result<(), SessionError> {
    let context = MetaContext {
        id,
        name: name.to_owned(),
    };
    encode_reply(
        option,
        OptionReplyCode::META_CONTEXT,
        &context.encode(),
        out,
    )?;
    Ok(())
}

/// Finds the export that an option names, or refuses the option.
#[allow(clippy::type_complexity)] // an error of the session, else a refusal, else the export
fn find<'a>(
    option: OptionCode,
    name: &str,
    catalog: &'a Catalog,
    out: &mut Vec<u8>,
) -> Result<Result<(usize, &'a Offer), After>, SessionError> {
    if name.len() > limits::MAX_STRING || name.contains('\0') {
        let text = "the export name is longer than 4096 bytes or holds a zero byte";
        return Ok(Err(invalid(option, text, out)?));
    }
    match catalog.find(name) {
        Some(found) => Ok(Ok(found)),
        None => {
            let end = name.floor_char_boundary(64);
            let shown = name.get(..end).unwrap_or_default();
            let text = format!("there is no export named {shown:?}");
            Answers::refuse(option, OptionReplyCode::ERR_UNKNOWN, &text, out).map(Err)
        }
    }
}

fn invalid(option: OptionCode, text: &str, out: &mut Vec<u8>) -> Result<After, SessionError> {
    Answers::refuse(option, OptionReplyCode::ERR_INVALID, text, out)
}
