//! Backup, restore, verify and diff: the only place that names NBD, the repository and QEMU together.
