//! Our server against clients that send requests oddly or wrongly.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use nbdbackup::nbd::server::{ServeError, Server, ServerOptions};
use nbdbackup::nbd::transport::Listener;
use nbdbackup::nbd::uri::Endpoint;
use nbdbackup::range::ByteRange;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::disk::{BLOCK, Disk};
use crate::script::{in_time, received};

const SIZE: u64 = 16 * BLOCK;

/// A client that has gone through the handshake: with structured replies and both contexts, or without.
async fn connected(
    disk: Disk,
    structured: bool,
) -> (DuplexStream, JoinHandle<Result<(), ServeError>>) {
    let exports = vec![("d".to_owned(), Arc::new(disk) as _)];
    let server = Server::new(exports, ServerOptions::default()).unwrap();
    let (mut near, far) = tokio::io::duplex(1 << 20);
    let served = tokio::spawn(async move { server.serve_stream(far).await });
    near.write_all(b"\0\0\0\x03").await.unwrap();
    received(&mut near, 18).await;
    if structured {
        near.write_all(b"IHAVEOPT\0\0\0\x08\0\0\0\0").await.unwrap();
        received(&mut near, 20).await;
        near.write_all(b"IHAVEOPT\0\0\0\x0a\0\0\0\x33\0\0\0\x01d\0\0\0\x02\0\0\0\x0fbase:allocation\0\0\0\x13qemu:dirty-bitmap:b")
            .await
            .unwrap();
        received(&mut near, 24 + 15 + 24 + 19 + 20).await;
    }
    near.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x01d")
        .await
        .unwrap();
    received(&mut near, 10).await;
    (near, served)
}

fn disk() -> Disk {
    Disk::new(SIZE)
}

fn request(command: u16, flags: u16, cookie: &[u8; 8], offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = b"\x25\x60\x95\x13".to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie);
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// The error code of a structured error reply to a request.
async fn error_of(near: &mut DuplexStream, request: &[u8]) -> u32 {
    near.write_all(request).await.unwrap();
    let header = received(near, 20).await;
    assert_eq!(
        header[..8],
        *b"\x66\x8e\x33\xef\0\x01\x80\x01",
        "{header:x?}"
    );
    assert_eq!(header[8..16], request[8..16]);
    let length = u32::from_be_bytes(header[16..].try_into().unwrap());
    assert!((6..900).contains(&length));
    let payload = received(near, length as usize).await;
    u32::from_be_bytes(payload[..4].try_into().unwrap())
}

/// Shows that the connection is in step: a read of one block is answered with its bytes.
async fn alive(near: &mut DuplexStream) {
    near.write_all(&request(0, 0, b"still ok", 0, 16))
        .await
        .unwrap();
    let reply = received(near, 44).await;
    let mut wanted = b"\x66\x8e\x33\xef\0\x01\0\x01still ok\0\0\0\x18\0\0\0\0\0\0\0\0".to_vec();
    wanted.extend(disk().slice(ByteRange::first(16)));
    assert_eq!(reply, wanted);
}

#[tokio::test]
async fn requests_that_are_wrong_are_refused_and_the_connection_lives_on() {
    let (mut near, _served) = connected(disk(), true).await;
    for (sent, code, what) in [
        (request(0, 0, b"12345678", SIZE, 1), 22, "read at the end"),
        (
            request(0, 0, b"12345678", SIZE - 1, 2),
            22,
            "read past the end",
        ),
        (
            request(0, 0, b"12345678", u64::MAX, 2),
            22,
            "read past 2^64",
        ),
        (request(0, 0, b"12345678", 0, u32::MAX), 22, "read of 4 GiB"),
        (request(0, 0x80, b"12345678", 0, 1), 22, "unknown flag"),
        (request(4, 0, b"12345678", 0, 1), 1, "trim"),
        (request(6, 0, b"12345678", 0, 1), 1, "write zeroes"),
        (request(7, 0, b"12345678", 0, 0), 22, "status of nothing"),
        (
            request(7, 0, b"12345678", 0, u32::MAX),
            22,
            "status past the end",
        ),
        (request(8, 0, b"12345678", 0, 1), 22, "resize"),
        (request(99, 0, b"12345678", 0, 1), 22, "unknown command"),
    ] {
        assert_eq!(error_of(&mut near, &sent).await, code, "{what}");
        alive(&mut near).await;
    }
}

#[tokio::test]
async fn refused_write_is_read_to_its_end() {
    let (mut near, _served) = connected(disk(), true).await;
    for length in [0, 1, 100, 300_000] {
        let mut write = request(1, 0, b"12345678", 0, length);
        write.extend(vec![b'%'; length as usize]);
        assert_eq!(error_of(&mut near, &write).await, 1);
        alive(&mut near).await;
    }
}

#[tokio::test]
async fn write_too_long_to_read_or_a_wrong_magic_ends_the_connection() {
    for sent in [
        request(1, 0, b"12345678", 0, u32::MAX),
        request(1, 0, b"12345678", 0, (64 << 20) + 1),
        vec![b'x'; 28],
    ] {
        let (mut near, served) = connected(disk(), true).await;
        near.write_all(&sent).await.unwrap();
        let fault = in_time(served).await.unwrap();
        assert!(matches!(fault, Err(ServeError::Session(_))));
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn holes_and_data_are_chunks_unless_one_is_asked_for() {
    let (mut near, _served) = connected(disk(), true).await;
    let range = ByteRange::new(BLOCK, 3 * BLOCK).unwrap();
    let bytes = disk().slice(range).to_vec();
    near.write_all(&request(0, 0, b"12345678", BLOCK, 2 * BLOCK as u32))
        .await
        .unwrap();
    let reply = received(&mut near, 28 + BLOCK as usize + 32).await;
    assert_eq!(
        reply[..28],
        *b"\x66\x8e\x33\xef\0\0\0\x0112345678\0\0\x10\x08\0\0\0\0\0\0\x10\0"
    );
    assert_eq!(reply[28..28 + BLOCK as usize], bytes[..BLOCK as usize]);
    assert_eq!(
        reply[28 + BLOCK as usize..],
        *b"\x66\x8e\x33\xef\0\x01\0\x0212345678\0\0\0\x0c\0\0\0\0\0\0\x20\0\0\0\x10\0"
    );
    near.write_all(&request(0, 4, b"12345678", BLOCK, 2 * BLOCK as u32))
        .await
        .unwrap();
    let reply = received(&mut near, 28 + 2 * BLOCK as usize).await;
    assert_eq!(
        reply[..28],
        *b"\x66\x8e\x33\xef\0\x01\0\x0112345678\0\0\x20\x08\0\0\0\0\0\0\x10\0"
    );
    assert_eq!(reply[28..], bytes);
    near.write_all(&request(0, 0, b"12345678", 0, 0))
        .await
        .unwrap();
    assert_eq!(
        received(&mut near, 20).await,
        b"\x66\x8e\x33\xef\0\x01\0\x0012345678\0\0\0\0"
    );
    alive(&mut near).await;
}

#[tokio::test]
async fn simple_replies_carry_holes_as_zeros() {
    let mut disk = disk();
    disk.broken = ByteRange::new(5 * BLOCK, 6 * BLOCK);
    let (mut near, _served) = connected(disk, false).await;
    near.write_all(&request(0, 0, b"12345678", 0, 4 * BLOCK as u32))
        .await
        .unwrap();
    let reply = received(&mut near, 16 + 4 * BLOCK as usize).await;
    assert_eq!(reply[..16], *b"\x67\x44\x66\x98\0\0\0\x0012345678");
    assert_eq!(
        reply[16..],
        *Disk::new(SIZE).slice(ByteRange::first(4 * BLOCK))
    );
    for (sent, code) in [
        (request(0, 0, b"12345678", 5 * BLOCK, 1), 5),
        (request(0, 4, b"12345678", 0, 1), 22),
        (request(7, 0, b"12345678", 0, 1), 22),
        (request(0, 0, b"12345678", 0, 0), 0),
        (request(3, 0, b"12345678", 0, 0), 0),
        (request(5, 0, b"12345678", 0, 1), 0),
    ] {
        near.write_all(&sent).await.unwrap();
        let reply = received(&mut near, 16).await;
        assert_eq!(reply[..4], *b"\x67\x44\x66\x98");
        assert_eq!(u32::from_be_bytes(reply[4..8].try_into().unwrap()), code);
    }
}

#[tokio::test]
async fn status_tells_each_chosen_context() {
    let (mut near, _served) = connected(disk(), true).await;
    near.write_all(&request(7, 0, b"12345678", BLOCK, 2 * BLOCK as u32))
        .await
        .unwrap();
    assert_eq!(
        received(&mut near, 80).await,
        *b"\x66\x8e\x33\xef\0\0\0\x0512345678\0\0\0\x14\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\0\0\0\0\x03\
           \x66\x8e\x33\xef\0\x01\0\x0512345678\0\0\0\x14\0\0\0\x01\0\0\x10\0\0\0\0\x01\0\0\x10\0\0\0\0\0"
    );
    near.write_all(&request(7, 8, b"12345678", BLOCK, 2 * BLOCK as u32))
        .await
        .unwrap();
    let reply = received(&mut near, 64).await;
    assert_eq!(reply[16..32], *b"\0\0\0\x0c\0\0\0\0\0\0\x10\0\0\0\0\0");
}

#[tokio::test]
async fn client_leaves_and_what_is_in_flight_is_still_answered() {
    for goodbye in [true, false] {
        let mut disk = disk();
        let gate = Arc::new(Semaphore::new(0));
        disk.gate = Some(gate.clone());
        let (mut near, served) = connected(disk, true).await;
        let mut sent = request(0, 0, b"12345678", 0, 16);
        if goodbye {
            sent.extend(request(2, 0xffff, b"12345678", 7, 7));
        }
        near.write_all(&sent).await.unwrap();
        if !goodbye {
            near.shutdown().await.unwrap();
        }
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        gate.add_permits(1);
        let mut told = Vec::new();
        in_time(near.read_to_end(&mut told)).await.unwrap();
        assert_eq!(told.len(), 44);
        in_time(served).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn replies_come_as_they_are_ready() {
    let mut disk = disk();
    let gate = Arc::new(Semaphore::new(0));
    disk.gate = Some(gate.clone());
    let (mut near, _served) = connected(disk, false).await;
    near.write_all(&request(0, 0, b"the slow", 0, 16))
        .await
        .unwrap();
    near.write_all(&request(3, 0, b"thequick", 0, 0))
        .await
        .unwrap();
    assert_eq!(
        received(&mut near, 16).await,
        b"\x67\x44\x66\x98\0\0\0\0thequick"
    );
    gate.add_permits(1);
    let reply = received(&mut near, 32).await;
    assert_eq!(reply[..16], *b"\x67\x44\x66\x98\0\0\0\0the slow");
}

#[tokio::test]
async fn request_that_waits_while_the_server_stops_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let mut disk = disk();
    let gate = Arc::new(Semaphore::new(0));
    disk.gate = Some(gate.clone());
    let disk = Arc::new(disk);
    let options = ServerOptions {
        requests_per_connection: 1,
        ..ServerOptions::default()
    };
    let server = Server::new(vec![("d".to_owned(), disk.clone() as _)], options).unwrap();
    let listener = Listener::bind(&Endpoint::Unix(path.clone())).await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serve = async move {
        let stopped = async { drop(stopped.await) };
        server.serve(listener, stopped).await;
    };
    let served = tokio::spawn(serve);
    let mut near = UnixStream::connect(&path).await.unwrap();
    near.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x01d")
        .await
        .unwrap();
    let slow = request(0, 0, b"the slow", 0, 16);
    let mut late = request(1, 0, b"too late", 0, 4);
    late.extend(b"junk");
    near.write_all(&[slow, late].concat()).await.unwrap();
    while disk.reads.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    stop.send(()).unwrap();
    gate.add_permits(1);
    let mut told = Vec::new();
    in_time(near.read_to_end(&mut told)).await.unwrap();
    let replies = &told[18 + 10..];
    assert_eq!(replies[..16], *b"\x67\x44\x66\x98\0\0\0\0the slow");
    assert_eq!(replies[32..], *b"\x67\x44\x66\x98\0\0\0\x6ctoo late");
    in_time(served).await.unwrap();
}
