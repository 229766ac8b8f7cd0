//! QEMU beside the protocol: child processes such as `qemu-nbd`.
