//! Any bytes, for the decoders of NBD's messages.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdbackup::nbd::wire::fuzz::message(data));
