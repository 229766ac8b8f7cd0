//! The disks that are measured with, made once by `tests/bench/mkdisk.sh`.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Fault;

/// Paths of images.
pub(crate) struct Disks {
    folder: PathBuf,
}

impl Disks {
    /// Makes the disks unless they are there.
    pub(crate) fn make(folder: &Path) -> Result<Self, Fault> {
        let folder = std::path::absolute(folder)?.join("disks");
        let made = Command::new("bash")
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/bench/mkdisk.sh"
            ))
            .arg(&folder)
            .status()?;
        match made.success() {
            true => Ok(Self { folder }),
            false => Err("tests/bench/mkdisk.sh cannot make the disks".into()),
        }
    }

    /// An image by its name, such as `gen1.qcow2`.
    pub(crate) fn image(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}
