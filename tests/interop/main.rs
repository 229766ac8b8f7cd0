//! The program against real peers: qemu-nbd, qemu-storage-daemon, qemu-img, nbdkit, nbdcopy, nbdinfo.

mod chain;
mod crash;
mod damage;
mod fallback;
mod live;
mod nbd_faults;
mod nbd_restore;
mod resize;
mod restore;
mod serve;
mod signal;
mod source;
mod sparse;
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod whole;
