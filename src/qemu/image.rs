//! Disk images as files: which format one has, and writing one through `qemu-img`.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Stdio;

use super::error::QemuError;
use crate::file;

/// How an image file is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The disk's bytes as they are.
    Raw,
    /// A format that QEMU knows by this name.
    Qemu(String),
}

impl ImageFormat {
    /// Takes the format's name as the user gave it.
    pub fn named(name: &str) -> Self {
        match name {
            "raw" => Self::Raw,
            other => Self::Qemu(other.to_owned()),
        }
    }

    /// Tells an image's format from its first bytes and its name, which must agree.
    ///
    /// A guest can write any header to a raw disk, so that the bytes alone must never choose a format that
    /// names other files.
    ///
    /// # Errors
    /// When the image cannot be read, or its bytes and its name disagree.
    pub fn detect(path: &Path) -> Result<Self, QemuError> {
        let image = |source| QemuError::Image {
            path: path.to_owned(),
            source,
        };
        let mut head = Vec::new();
        open_image(path)
            .map_err(image)?
            .take(HEAD)
            .read_to_end(&mut head)
            .map_err(image)?;
        let Some((found, endings)) = MAGICS
            .iter()
            .find(|(_, magic, _)| head.starts_with(magic))
            .map(|(found, _, endings)| (*found, *endings))
        else {
            return Ok(Self::Raw);
        };
        let ending = path
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or("")
            .to_ascii_lowercase();
        if endings.contains(&ending.as_str()) {
            Ok(Self::Qemu(found.to_owned()))
        } else {
            Err(QemuError::FormatUnclear {
                path: path.to_owned(),
                found,
            })
        }
    }
}

/// Opens an image to read it.
///
/// # Errors
/// When the system refuses, or it is neither a file nor a block device; a pipe is not waited for.
pub fn open_image(path: &Path) -> io::Result<File> {
    let image = file::open(path)?;
    let kind = image.metadata()?.file_type();
    match kind.is_file() || kind.is_block_device() {
        true => Ok(image),
        false => Err(file::no_disk()),
    }
}

/// A persistent bitmap in an image, as `qemu-img info` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageBitmap {
    /// Its name.
    pub name: String,
    /// Whether it was not closed cleanly, so that QEMU refuses to use it.
    pub inconsistent: bool,
    /// Whether it records whenever the image is open for writing.
    pub recording: bool,
}

/// Lists the persistent bitmaps of an image.
///
/// # Errors
/// When `qemu-img` cannot be started, fails, or says what cannot be understood.
pub async fn bitmaps(path: &Path, format: &str) -> Result<Vec<ImageBitmap>, QemuError> {
    let program = "qemu-img";
    let done = tokio::process::Command::new(program)
        .args(["info", "--output=json", "-f", format])
        .arg(absolute(path).map_err(|source| QemuError::Image {
            path: path.to_owned(),
            source,
        })?)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|source| QemuError::Start { program, source })?;
    if !done.status.success() {
        return Err(QemuError::Failed {
            program,
            message: super::nbd_process::last_words(&done.stderr),
        });
    }
    let info: serde_json::Value =
        serde_json::from_slice(&done.stdout).map_err(|e| QemuError::Failed {
            program,
            message: format!("its JSON cannot be read: {e}"),
        })?;
    let listed = info
        .pointer("/format-specific/data/bitmaps")
        .and_then(|b| b.as_array());
    Ok(listed.into_iter().flatten().filter_map(bitmap).collect())
}

fn bitmap(listed: &serde_json::Value) -> Option<ImageBitmap> {
    let flags = listed.get("flags")?.as_array()?;
    let has = |flag| flags.iter().any(|f| f == flag);
    Some(ImageBitmap {
        name: listed.get("name")?.as_str()?.to_owned(),
        inconsistent: has("in-use"),
        recording: has("auto"),
    })
}

/// Writes the export behind an NBD URI to an image file of the given format, through `qemu-img convert`.
///
/// # Errors
/// When `qemu-img` cannot be started or fails; the message is its own.
pub async fn convert_from_nbd(uri: &str, format: &str, target: &Path) -> Result<(), QemuError> {
    let program = "qemu-img";
    let done = tokio::process::Command::new(program)
        .args(["convert", "-f", "raw", "-O", format, uri])
        .arg(absolute(target).map_err(|source| QemuError::Image {
            path: target.to_owned(),
            source,
        })?)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|source| QemuError::Start { program, source })?;
    if done.status.success() {
        Ok(())
    } else {
        Err(QemuError::Failed {
            program,
            message: super::nbd_process::last_words(&done.stderr),
        })
    }
}

/// Makes a path that no program takes for an option or a protocol such as `nbd:`.
pub(super) fn absolute(path: &Path) -> io::Result<std::path::PathBuf> {
    std::path::absolute(path)
}

const HEAD: u64 = 16;

/// QEMU's name of each format, its first bytes, and the file names' endings that agree with it.
const MAGICS: &[(&str, &[u8], &[&str])] = &[
    ("qcow2", b"QFI\xfb", &["qcow2", "qcow"]),
    ("qed", b"QED\0", &["qed"]),
    ("vmdk", b"KDMV", &["vmdk"]),
    ("vmdk", b"COWD", &["vmdk"]),
    (
        "vmdk",
        b"# Disk DescriptorFile".first_chunk::<16>().unwrap(),
        &["vmdk"],
    ),
    ("vhdx", b"vhdxfile", &["vhdx"]),
    ("vpc", b"conectix", &["vhd", "vpc"]),
    (
        "vdi",
        b"<<< Oracle VM Vi".first_chunk::<16>().unwrap(),
        &["vdi"],
    ),
    ("luks", b"LUKS\xba\xbe", &["luks"]),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn detect(name: &str, bytes: &[u8]) -> Result<ImageFormat, QemuError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        ImageFormat::detect(&path)
    }

    #[test]
    fn image_without_a_magic_is_raw() {
        assert_eq!(detect("a.img", b"").unwrap(), ImageFormat::Raw);
        assert_eq!(detect("a.qcow2", &[0; 600]).unwrap(), ImageFormat::Raw);
    }

    #[test]
    fn name_and_magic_that_agree_decide() {
        assert_eq!(
            detect("a.QCOW2", b"QFI\xfb\0\0\0\x03").unwrap(),
            ImageFormat::Qemu("qcow2".to_owned())
        );
    }

    #[test]
    fn raw_disk_with_a_guests_qcow2_header_is_refused() {
        assert!(matches!(
            detect("a.img", b"QFI\xfb\0\0\0\x03"),
            Err(QemuError::FormatUnclear { .. })
        ));
    }
}
