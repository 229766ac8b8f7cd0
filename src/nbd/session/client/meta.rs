//! `LIST_META_CONTEXT` and `SET_META_CONTEXT`: which extents an export can tell.

use super::super::{PeerMisbehaved, SessionError};
use super::options::{bounded, unexpected};
use super::{OptionCall, Options};
use crate::nbd::wire::{EncodeError, MetaContext, MetaRequest, OptionCode, OptionReplyCode};

/// Asks which metadata contexts there are.
#[derive(Debug)]
pub struct ListContexts {
    request: MetaRequest,
    names: Vec<String>,
}

impl ListContexts {
    /// Asks for those that match a query, or for all if there is none.
    pub fn new(export: &str, query: Option<&str>) -> Self {
        Self {
            request: MetaRequest {
                export: export.to_owned(),
                queries: query.into_iter().map(str::to_owned).collect(),
            },
            names: Vec::new(),
        }
    }
}

impl OptionCall for ListContexts {
    type Answer = Vec<String>;

    fn option(&self) -> OptionCode {
        OptionCode::LIST_META_CONTEXT
    }

    fn payload(&self) -> Result<Vec<u8>, EncodeError> {
        self.request.encode()
    }

    fn piece(&mut self, code: OptionReplyCode, payload: &[u8]) -> Result<(), SessionError> {
        if code != OptionReplyCode::META_CONTEXT {
            return Err(unexpected(self.option(), code));
        }
        let name = bounded("metadata context name", MetaContext::decode(payload)?.name)?;
        self.names.push(name);
        Ok(())
    }

    fn finish(mut self, _: &mut Options) -> Result<Vec<String>, SessionError> {
        // Some servers tell a context once for each query that it matches.
        self.names.sort();
        self.names.dedup();
        Ok(self.names)
    }
}

/// Chooses metadata contexts by their exact names.
#[derive(Debug)]
pub struct SetContexts {
    request: MetaRequest,
    granted: Vec<MetaContext>,
}

impl SetContexts {
    /// Chooses contexts for the export that the next `GO` names.
    pub fn new(export: &str, names: &[String]) -> Self {
        Self {
            request: MetaRequest {
                export: export.to_owned(),
                queries: names.to_vec(),
            },
            granted: Vec::new(),
        }
    }
}

impl OptionCall for SetContexts {
    /// Those that the server grants, in the order in which they were asked for.
    type Answer = Vec<MetaContext>;

    fn option(&self) -> OptionCode {
        OptionCode::SET_META_CONTEXT
    }

    fn payload(&self) -> Result<Vec<u8>, EncodeError> {
        self.request.encode()
    }

    fn piece(&mut self, code: OptionReplyCode, payload: &[u8]) -> Result<(), SessionError> {
        if code != OptionReplyCode::META_CONTEXT {
            return Err(unexpected(self.option(), code));
        }
        let context = MetaContext::decode(payload)?;
        if !self.request.queries.contains(&context.name) {
            return Err(PeerMisbehaved::ContextNotAsked { name: context.name }.into());
        }
        let twice = |g: &MetaContext| g.name == context.name || g.id == context.id;
        if self.granted.iter().any(twice) {
            return Err(PeerMisbehaved::ContextTwice {
                name: context.name,
                id: context.id,
            }
            .into());
        }
        self.granted.push(context);
        Ok(())
    }

    fn finish(mut self, _: &mut Options) -> Result<Vec<MetaContext>, SessionError> {
        let queries = &self.request.queries;
        self.granted
            .sort_by_key(|g| queries.iter().position(|q| *q == g.name));
        Ok(self.granted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(pieces: &[&[u8]]) -> Result<Vec<(u32, String)>, SessionError> {
        let mut set = SetContexts::new("d", &["a:b".into(), "c:d".into()]);
        for piece in pieces {
            set.piece(OptionReplyCode::META_CONTEXT, piece)?;
        }
        let found = set.finish(&mut Options::new(true))?;
        Ok(found.into_iter().map(|c| (c.id, c.name)).collect())
    }

    #[test]
    fn contexts_are_matched_by_name_and_not_by_order() {
        let found = granted(&[b"\0\0\0\x07c:d", b"\0\0\0\x09a:b"]).unwrap();
        assert_eq!(found, [(9, "a:b".to_owned()), (7, "c:d".to_owned())]);
        assert_eq!(granted(&[]).unwrap(), []);
    }

    #[test]
    fn server_grants_what_was_not_asked_for_or_twice() {
        assert!(granted(&[b"\0\0\0\x07x:y"]).is_err());
        assert!(granted(&[b"\0\0\0\x07a:b", b"\0\0\0\x08a:b"]).is_err());
        assert!(granted(&[b"\0\0\0\x07a:b", b"\0\0\0\x07c:d"]).is_err());
    }
}
