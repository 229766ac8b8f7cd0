//! Clients that know nothing but the oldstyle handshake: they get the newstyle greeting, no disk, and keep nobody out.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::with_a_snapshot;
use crate::support::disk::assert_same;
use crate::support::process::tool;

/// The magic that such a client waits for behind `NBDMAGIC`, and the one that it gets.
const CLISERV: [u8; 8] = 0x0000_4202_8186_1253_u64.to_be_bytes();
const IHAVEOPT: [u8; 8] = *b"IHAVEOPT";

/// Reads the greeting as an oldstyle client does, up to the magic that tells it that it is in the wrong place.
fn greeted(socket: &str) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut greeting = [0; 16];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting[..8], *b"NBDMAGIC");
    assert_ne!(greeting[8..], CLISERV);
    assert_eq!(greeting[8..], IHAVEOPT);
    stream
}

#[test]
fn client_that_leaves_at_the_greeting_or_goes_on_regardless_is_shown_nothing() {
    let (lab, snapshot, image) = with_a_snapshot(1);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let (_, socket) = uri.split_once("socket=").unwrap();
    drop(greeted(socket));
    // A read of 512 bytes, as if in transmission already: its magic is no set of flags that a client may send.
    let mut stream = greeted(socket);
    let mut request = [0; 28];
    request[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    request[24..].copy_from_slice(&512_u32.to_be_bytes());
    stream.write_all(&request).unwrap();
    let mut rest = Vec::new();
    // The end may come as a reset, since the request was not read to its end.
    let _ = stream.read_to_end(&mut rest);
    assert_eq!(rest.len(), 2, "more than the greeting's flags: {rest:?}");
    let out = lab.file("out.raw");
    tool("nbdcopy", &[&uri, &out]);
    assert_same(&out, &image);
}
