//! Any bytes of a client, for the server's state machine.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdbackup::nbd::session::fuzz::server(data));
