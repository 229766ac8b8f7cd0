//! Lists of tagged values: u16 tag, u32 length, value; a reader skips tags that it does not know.

use super::DecodeError;
use super::cursor::Cursor;
use crate::repo::error::RepoError;

/// Writes a list of tagged values.
#[derive(Debug, Default)]
pub(crate) struct TlvWriter {
    bytes: Vec<u8>,
}

impl TlvWriter {
    pub(crate) fn put(&mut self, tag: u16, value: &[u8]) -> Result<(), RepoError> {
        let len = u32::try_from(value.len())
            .ok()
            .filter(|_| value.len() <= MAX_VALUE)
            .ok_or_else(|| {
                RepoError::misuse(format!("a value of {} bytes is too long", value.len()))
            })?;
        self.bytes.extend_from_slice(&tag.to_le_bytes());
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(value);
        Ok(())
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// One tagged value.
#[derive(Clone, Debug)]
pub(crate) struct Tlv<'a> {
    pub(crate) tag: u16,
    pub(crate) value: &'a [u8],
    /// The offset of the value.
    pub(crate) at: u64,
}

impl<'a> Tlv<'a> {
    pub(crate) fn cursor(&self) -> Cursor<'a> {
        Cursor::starting_at(self.value, self.at)
    }

    /// Reads the whole value as one field.
    pub(crate) fn whole<T>(
        &self,
        what: &str,
        read: impl FnOnce(&mut Cursor<'a>) -> Result<T, DecodeError>,
    ) -> Result<T, DecodeError> {
        let mut cursor = self.cursor();
        let value = read(&mut cursor)?;
        cursor.finish(what)?;
        Ok(value)
    }

    pub(crate) fn array<const N: usize>(&self, what: &str) -> Result<[u8; N], DecodeError> {
        self.whole(what, |c| c.array(what))
    }

    pub(crate) fn u8(&self, what: &str) -> Result<u8, DecodeError> {
        self.whole(what, |c| c.u8(what))
    }

    pub(crate) fn u64(&self, what: &str) -> Result<u64, DecodeError> {
        self.whole(what, |c| c.u64(what))
    }

    pub(crate) fn text(&self, what: &str) -> Result<String, DecodeError> {
        String::from_utf8(self.value.to_vec())
            .map_err(|_| DecodeError::corrupt(self.at, format!("{what} is not UTF-8")))
    }
}

/// Reads a list of tagged values from bytes that stand at the offset `at`.
pub(crate) fn read_tlvs(
    bytes: &[u8],
    at: u64,
) -> impl Iterator<Item = Result<Tlv<'_>, DecodeError>> {
    let mut cursor = Cursor::starting_at(bytes, at);
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed || cursor.left() == 0 {
            return None;
        }
        let next = read_one(&mut cursor);
        failed = next.is_err();
        Some(next)
    })
}

/// Keeps the value of a tag that may stand only once.
pub(crate) fn once<T>(slot: &mut Option<T>, value: T, tlv: &Tlv<'_>) -> Result<(), DecodeError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(DecodeError::corrupt(
            tlv.at,
            format!("tag {} stands twice", tlv.tag),
        )),
    }
}

/// Takes the value of a tag that must stand once.
pub(crate) fn required<T>(slot: Option<T>, at: u64, what: &str) -> Result<T, DecodeError> {
    slot.ok_or_else(|| DecodeError::corrupt(at, format!("the {what} is not there")))
}

fn read_one<'a>(cursor: &mut Cursor<'a>) -> Result<Tlv<'a>, DecodeError> {
    let tag = cursor.u16("tag")?;
    let len = cursor.u32("length of a value")?;
    let at = cursor.at();
    let len = usize::try_from(len)
        .map_err(|_| DecodeError::corrupt(at, "the length of a value does not fit"))?;
    let value = cursor.bytes(len, "value")?;
    Ok(Tlv { tag, value, at })
}

/// The most bytes of one value; far above what any has.
const MAX_VALUE: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn value_that_ends_past_the_end_is_corrupt() {
        let mut writer = TlvWriter::default();
        writer.put(7, b"abc").unwrap();
        let mut bytes = writer.finish();
        bytes.pop();
        let read: Vec<_> = read_tlvs(&bytes, 10).collect();
        assert_eq!(read.len(), 1);
        assert!(matches!(read[0], Err(DecodeError::Corrupt { at: 16, .. })));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>) {
            prop_assert!(read_tlvs(&bytes, 0).count() <= bytes.len());
        }
    }
}
