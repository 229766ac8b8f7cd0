//! Both ends of an NBD session in memory, and each end against a peer that is scripted byte by byte.

mod both_ends;
#[allow(dead_code)] // the tests with other programs use more of it
#[path = "../support/certificates.rs"]
mod certificates;
mod changes;
mod client_faults;
mod client_handshake;
mod crowd;
mod disk;
#[path = "../support/fuzz.rs"]
mod drive;
mod extended;
mod fuzz;
mod protocol_doc;
mod random_split;
mod retry;
mod script;
mod server_handshake;
mod server_requests;
mod tls_client;
mod tls_server;
