//! QEMU beside the protocol: child processes such as `qemu-nbd`.

mod error;
mod image;
mod nbd_process;

pub use error::QemuError;
pub use image::{ImageBitmap, ImageFormat, bitmaps, convert_from_nbd, open_image};
pub use nbd_process::QemuNbd;
