//! Any bytes, for NBD's decoders and state machines.

use nbdbackup::nbd::{session, wire};

use crate::drive::drive;

#[test]
fn any_bytes_of_a_server_leave_the_client_sound() {
    drive("client", session::fuzz::client);
}

#[test]
fn any_bytes_of_a_client_leave_the_server_sound() {
    drive("server", session::fuzz::server);
}

#[test]
fn any_bytes_leave_the_decoders_sound() {
    drive("message", wire::fuzz::message);
}
