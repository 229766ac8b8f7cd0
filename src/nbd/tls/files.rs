//! Reads the files that TLS is set up with, within bounds, and leaves no copy of a secret behind.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::TlsError;

/// Reads a file.
pub(super) fn read(file: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    match read_all(file) {
        Ok((bytes, _)) => Ok(bytes),
        Err(source) => Err(unreadable(file, source)),
    }
}

/// Reads a file that need not exist.
pub(super) fn read_if_any(file: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, TlsError> {
    match read_all(file) {
        Ok((bytes, _)) => Ok(Some(bytes)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(unreadable(file, source)),
    }
}

/// Reads a file that nobody else should be able to read, and warns if anybody can.
pub(super) fn read_secret(file: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let (bytes, mode) = read_all(file).map_err(|source| unreadable(file, source))?;
    if mode & 0o004 != 0 {
        tracing::warn!("{} is a secret that any user can read", file.display());
    }
    Ok(bytes)
}

/// Says what is wrong with a file's content.
pub(super) fn content(file: &Path, problem: impl Into<String>) -> TlsError {
    TlsError::Content {
        file: file.to_owned(),
        problem: problem.into(),
    }
}

fn read_all(path: &Path) -> io::Result<(Zeroizing<Vec<u8>>, u32)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.len() > LARGEST {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    // With this room the buffer never moves, so that no freed memory keeps a part of it.
    let mut bytes = Zeroizing::new(Vec::with_capacity(LARGEST as usize + 1));
    file.take(LARGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok((bytes, metadata.permissions().mode()))
}

fn unreadable(file: &Path, source: io::Error) -> TlsError {
    TlsError::File {
        file: file.to_owned(),
        source: Arc::new(source),
    }
}

/// A bundle of all the authorities that a system trusts has a quarter of this.
const LARGEST: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endless_file_is_not_read_to_its_end() {
        let fault = read(Path::new("/dev/zero")).unwrap_err();
        assert!(matches!(fault, TlsError::File { .. }), "{fault}");
    }

    #[test]
    fn file_that_need_not_exist_may_be_missing_but_not_unreadable() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read_if_any(&folder.path().join("x")).unwrap().is_none());
        assert!(read_if_any(folder.path()).is_err());
    }
}
