//! A server and a client as literal bytes: nothing here uses the encoders under test.

use std::time::Duration;

use nbdbackup::nbd::client::{Client, ClientError, ClientOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::timeout;

/// What a server sends to a client that asks for `base:allocation` (granted as 5) of the export `d` of 64 KiB.
pub(crate) const STRUCTURED: &[&[u8]] = &[
    b"NBDMAGICIHAVEOPT\0\x03",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0b\x80\0\0\x01\0\0\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\0\0\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x04\0\0\0\x13\0\0\0\x05base:allocation",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x01\0\0\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0e\0\x03\0\0\x02\0\0\0\x10\0\0\x01\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\0\x01\0\0\0\x8f",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0",
];

/// The same with extended headers; contexts can be asked for one by one.
pub(crate) const EXTENDED: &[&[u8]] = &[
    b"NBDMAGICIHAVEOPT\0\x03",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0b\0\0\0\x01\0\0\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x04\0\0\0\x13\0\0\0\x05base:allocation",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x01\0\0\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\x01\0\0\0\0\0\x1d\xed",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0",
];

/// What the client sends to a server that speaks as [`EXTENDED`].
pub(crate) const EXTENDED_CLIENT: &[&[u8]] = &[
    b"\0\0\0\x03",
    b"IHAVEOPT\0\0\0\x0b\0\0\0\0",
    b"IHAVEOPT\0\0\0\x0a\0\0\0\x1c\0\0\0\x01d\0\0\0\x01\0\0\0\x0fbase:allocation",
    b"IHAVEOPT\0\0\0\x07\0\0\0\x0d\0\0\0\x01d\0\x03\0\x03\0\x01\0\x02",
];

/// The same without structured replies.
pub(crate) const SIMPLE: &[&[u8]] = &[
    b"NBDMAGICIHAVEOPT\0\x03",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0b\x80\0\0\x01\0\0\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\x80\0\0\x01\0\0\0\0",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\0\x01\0\0\0\x0f",
    b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x01\0\0\0\0",
];

/// What the client sends until it enters the transmission phase with [`STRUCTURED`].
pub(crate) const CLIENT: &[&[u8]] = &[
    b"\0\0\0\x03",
    b"IHAVEOPT\0\0\0\x0b\0\0\0\0",
    b"IHAVEOPT\0\0\0\x08\0\0\0\0",
    b"IHAVEOPT\0\0\0\x0a\0\0\0\x1c\0\0\0\x01d\0\0\0\x01\0\0\0\x0fbase:allocation",
    b"IHAVEOPT\0\0\0\x07\0\0\0\x0d\0\0\0\x01d\0\x03\0\x03\0\x01\0\x02",
];

pub(crate) fn options() -> ClientOptions {
    ClientOptions {
        contexts: vec!["base:allocation".into()],
        ..ClientOptions::default()
    }
}

/// Joins pieces of a script.
pub(crate) fn joined(pieces: &[&[u8]]) -> Vec<u8> {
    pieces.concat()
}

/// Connects a client to a server that sends these bytes at once and then nothing more, with the connection open.
pub(crate) async fn client_of(bytes: &[u8]) -> (Result<Client, ClientError>, DuplexStream) {
    let (near, mut far) = tokio::io::duplex(1 << 20);
    far.write_all(bytes).await.unwrap();
    let client = in_time(Client::over(near, "d", &options())).await;
    (client, far)
}

/// A connected client that speaks structured replies, and the server's end of its connection.
pub(crate) async fn structured() -> (Client, DuplexStream) {
    let (client, mut far) = client_of(&joined(STRUCTURED)).await;
    let wanted = joined(CLIENT);
    assert_eq!(received(&mut far, wanted.len()).await, wanted);
    (client.unwrap(), far)
}

/// Receives this many bytes.
pub(crate) async fn received(far: &mut DuplexStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    in_time(far.read_exact(&mut bytes)).await.unwrap();
    bytes
}

/// Fails a test that hangs.
pub(crate) async fn in_time<T>(work: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), work)
        .await
        .expect("the test hangs")
}

/// A structured reply chunk with the cookie of a client's first request.
pub(crate) fn chunk(done: bool, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x66, 0x8e, 0x33, 0xef, 0, u8::from(done)];
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0; 8]);
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A chunk of data at an offset.
pub(crate) fn data(done: bool, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(done, 1, &[&offset.to_be_bytes(), bytes].concat())
}

/// A chunk that is a hole at an offset.
pub(crate) fn hole(done: bool, offset: u64, length: u32) -> Vec<u8> {
    chunk(
        done,
        2,
        &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat(),
    )
}
