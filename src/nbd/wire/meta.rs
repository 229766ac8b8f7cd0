//! What `LIST_META_CONTEXT` and `SET_META_CONTEXT` ask and how they are answered.

use super::bytes::{Fields, put_name, utf8};
use super::{DecodeError, EncodeError};

/// The payload of both options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaRequest {
    /// The export asked for.
    pub export: String,
    /// Names of contexts, or with LIST also their beginnings; none with LIST means all.
    pub queries: Vec<String>,
}

impl MetaRequest {
    /// Decodes the payload.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("metadata context request", payload);
        let export = fields.name("export name")?;
        let count = fields.u32()?;
        // Each query takes at least its length field: a larger count is a lie, found before the loop.
        if u64::from(count).saturating_mul(4) > fields.left() as u64 {
            return Err(DecodeError::Count {
                what: "metadata context request",
                count: u64::from(count),
                bytes: fields.left(),
            });
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(fields.name("metadata context query")?);
        }
        fields.finish()?;
        Ok(Self { export, queries })
    }

    /// Returns the payload.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let mut out = Vec::new();
        put_name("export name", &self.export, &mut out)?;
        let count = u32::try_from(self.queries.len()).map_err(|_| EncodeError {
            what: "metadata context request",
            value: self.queries.len() as u64,
        })?;
        out.extend_from_slice(&count.to_be_bytes());
        for query in &self.queries {
            put_name("metadata context query", query, &mut out)?;
        }
        Ok(out)
    }
}

/// One metadata context in an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// The number that block status replies will name it by; without meaning in the answer to LIST.
    pub id: u32,
    /// The context's name.
    pub name: String,
}

impl MetaContext {
    /// Decodes the payload of a reply of type `META_CONTEXT`.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new("metadata context", payload);
        let id = fields.u32()?;
        let name = utf8("metadata context name", fields.rest())?;
        Ok(Self { id, name })
    }

    /// Returns the payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.id.to_be_bytes().to_vec();
        out.extend_from_slice(self.name.as_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_the_spec_s_bytes() {
        let request = MetaRequest {
            export: "d".into(),
            queries: vec!["base:allocation".into()],
        };
        let bytes = request.encode().unwrap();
        assert_eq!(bytes, b"\0\0\0\x01d\0\0\0\x01\0\0\0\x0fbase:allocation");
        assert_eq!(MetaRequest::decode(&bytes).unwrap(), request);
    }

    #[test]
    fn request_that_claims_four_billion_queries_is_refused() {
        assert!(matches!(
            MetaRequest::decode(b"\0\0\0\x01d\xff\xff\xff\xff\0\0\0\0"),
            Err(DecodeError::Count { .. })
        ));
        assert!(MetaRequest::decode(b"\0\0\0\x01d\0\0\0\x01\xff\xff\xff\xffabc").is_err());
        assert!(MetaRequest::decode(b"\0\0\0\x01d\0\0\0\0x").is_err());
    }
}
