//! Both ends of an NBD session in memory, and each end against a peer that is scripted byte by byte.

mod both_ends;
mod changes;
mod client_faults;
mod client_handshake;
mod disk;
mod extended;
mod fuzz;
mod protocol_doc;
mod retry;
mod script;
mod server_handshake;
mod server_requests;
