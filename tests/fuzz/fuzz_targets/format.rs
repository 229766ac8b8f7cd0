//! Any bytes, for the repository's formats at rest.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdbackup::repo::fuzz::format(data));
