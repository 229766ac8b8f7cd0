//! Any bytes of a server, for the client's state machine.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdbackup::nbd::session::fuzz::client(data));
