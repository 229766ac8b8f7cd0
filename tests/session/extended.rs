//! Extended headers: our client and our server against peers in literal bytes, and against each other.

use std::sync::Arc;

use nbdbackup::nbd::client::{Client, ClientErrorKind, ClientOptions};
use nbdbackup::nbd::server::{MemoryDisk, Server, ServerOptions};
use nbdbackup::nbd::session::PeerMisbehaved as Fault;
use nbdbackup::nbd::wire::{ErrorCode, TransmissionFlags};
use nbdbackup::range::ByteRange;
use tokio::io::{AsyncWriteExt, DuplexStream};

use crate::script::{EXTENDED, EXTENDED_CLIENT, client_of, in_time, joined, received};

const TIB: u64 = 1 << 40;

/// A client of the 1 TiB export that [`EXTENDED`] describes.
async fn extended() -> (Client, DuplexStream) {
    let (client, mut far) = client_of(&joined(EXTENDED)).await;
    let wanted = joined(EXTENDED_CLIENT);
    assert_eq!(received(&mut far, wanted.len()).await, wanted);
    let client = client.unwrap();
    assert!(client.export().extended && client.export().structured);
    assert!(client.export().asks_one_context());
    assert_eq!(client.export().size_bytes, TIB);
    (client, far)
}

/// A reply chunk with the cookie of a client's first request.
fn chunk(done: bool, kind: u16, offset: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x6e, 0x8a, 0x27, 0x8c, 0, u8::from(done)];
    bytes.extend(kind.to_be_bytes());
    bytes.extend([0; 8]);
    bytes.extend(offset.to_be_bytes());
    bytes.extend((payload.len() as u64).to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn extents(id: u32, claimed: u32, extents: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend(claimed.to_be_bytes());
    for (length, flags) in extents {
        bytes.extend(length.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    bytes
}

fn misbehaved(fault: ClientErrorKind) -> Fault {
    match fault {
        ClientErrorKind::Misbehaved(fault) => fault,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn client_asks_the_extents_of_the_whole_disk_at_once() {
    let (client, mut far) = extended().await;
    let told = extents(5, 2, &[(TIB - 4096, 3), (1 << 50, 0)]);
    far.write_all(&chunk(true, 6, 0, &told)).await.unwrap();
    let lists = in_time(client.block_status(ByteRange::first(TIB))).await;
    let lists = lists.unwrap();
    let found: Vec<_> = lists[0].extents.iter().collect();
    assert_eq!(found[0].range, ByteRange::first(TIB - 4096));
    assert_eq!(found[1].range.end(), TIB);
    assert_eq!(
        received(&mut far, 32).await,
        b"\x21\xe4\x1c\x71\0\0\0\x07\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0"
    );
}

#[tokio::test]
async fn client_asks_for_the_first_extent_and_takes_no_more() {
    let (client, mut far) = extended().await;
    let told = extents(5, 2, &[(4096, 3), (4096, 0)]);
    far.write_all(&chunk(true, 6, 0, &told)).await.unwrap();
    let lists = in_time(client.first_block_status(ByteRange::first(TIB))).await;
    let lists = lists.unwrap();
    assert_eq!(lists[0].extents.len(), 1);
    assert_eq!(lists[0].extents[0].range, ByteRange::first(4096));
    // The third flag, NBD_CMD_FLAG_REQ_ONE.
    assert_eq!(received(&mut far, 8).await, b"\x21\xe4\x1c\x71\0\x08\0\x07");
}

#[tokio::test]
async fn client_asks_one_context_by_a_filter() {
    let (client, mut far) = extended().await;
    let told = extents(5, 1, &[(4096, 0)]);
    far.write_all(&chunk(true, 6, 512, &told)).await.unwrap();
    let range = ByteRange::new(512, TIB).unwrap();
    let lists = in_time(client.block_status_of(0, range)).await.unwrap();
    assert_eq!((lists.len(), lists[0].context), (1, 0));
    assert_eq!(lists[0].end(), Some(512 + 4096));
    assert_eq!(
        received(&mut far, 44).await,
        b"\x21\xe4\x1c\x71\0\x20\0\x07\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\x0c\
          \0\0\0\xff\xff\xff\xfe\0\0\0\0\x05"
    );
}

#[tokio::test]
async fn client_sends_the_payload_of_a_write_with_its_flag() {
    let (client, mut far) = extended().await;
    far.write_all(&chunk(true, 0, 4096, b"")).await.unwrap();
    let written = client.write(4096, vec![7; 3].into(), true);
    in_time(written).await.unwrap();
    assert_eq!(
        received(&mut far, 35).await,
        b"\x21\xe4\x1c\x71\0\x21\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x03\x07\x07\x07"
    );
}

#[tokio::test]
async fn server_breaks_the_rules_of_extended_replies() {
    let good = extents(5, 1, &[(4096, 0)]);
    let structured = b"\x66\x8e\x33\xef\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let simple = b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let mut huge = chunk(true, 6, 0, b"");
    huge[24..].copy_from_slice(&u64::MAX.to_be_bytes());
    for (reply, is_decode) in [
        (structured.to_vec(), true),
        (simple.to_vec(), true),
        (chunk(true, 6, 0, &extents(5, 2, &[(4096, 0)])), true),
        (chunk(true, 6, 0, &extents(5, u32::MAX, &[(1, 0)])), true),
        (chunk(true, 6, 1, &good), false),
        (chunk(true, 5, 0, b"\0\0\0\x05\0\0\x10\0\0\0\0\0"), false),
        (huge, false),
        (chunk(true, 6, 0, &extents(5, 0, &[])), false),
        (chunk(true, 6, 0, &extents(5, 1, &[(0, 0)])), false),
        (chunk(true, 0, 0, b""), false),
    ] {
        let (client, mut far) = extended().await;
        far.write_all(&reply).await.unwrap();
        let fault = in_time(client.block_status(ByteRange::first(TIB))).await;
        let kind = fault.unwrap_err().kind;
        assert_eq!(matches!(kind, ClientErrorKind::Decode(_)), is_decode);
        if !is_decode {
            misbehaved(kind);
        }
    }
    let (client, mut far) = extended().await;
    far.write_all(&chunk(true, 6, 0, &good)).await.unwrap();
    let other = client.read(ByteRange::first(4096), Vec::new());
    let fault = misbehaved(in_time(other).await.unwrap_err().kind);
    assert!(matches!(fault, Fault::WrongChunk { .. }));
}

/// A client of ours behind a server of ours.
async fn both(disk: Arc<MemoryDisk>, contexts: &[&str]) -> Client {
    let server = Server::new(vec![("d".into(), disk)], ServerOptions::default()).unwrap();
    let (near, far) = tokio::io::duplex(100_000);
    tokio::spawn(async move { server.serve_stream(far).await });
    let options = ClientOptions {
        contexts: contexts.iter().map(|c| (*c).to_owned()).collect(),
        ..ClientOptions::default()
    };
    Client::over(near, "d", &options).await.unwrap()
}

#[tokio::test]
async fn both_ends_speak_extended_headers_and_filter_contexts() {
    let disk = Arc::new(MemoryDisk::new(8 << 20));
    disk.add_bitmap("b");
    disk.write(1 << 20, &[7; 4096]);
    let client = both(
        disk.clone(),
        &["qemu:dirty-bitmap:b", "base:allocation", "x:y"],
    )
    .await;
    assert!(client.export().extended);
    assert!(client.export().asks_one_context());
    let all = ByteRange::first(8 << 20);
    for (context, flags) in [(0, [0, 1, 0]), (1, [3, 0, 3])] {
        let lists = client.block_status_of(context, all).await.unwrap();
        assert_eq!(lists.len(), 1);
        assert_eq!(lists[0].context, context);
        let found: Vec<u64> = lists[0].extents.iter().map(|e| e.flags).collect();
        assert_eq!(found, flags);
        assert_eq!(lists[0].end(), Some(8 << 20));
    }
    assert_eq!(client.block_status(all).await.unwrap().len(), 2);
    let reply = client.read(all, Vec::new()).await.unwrap();
    assert_eq!(reply.data, disk.bytes());
    let none = both(disk, &[]).await;
    let flags = none.export().flags;
    assert!(none.export().extended && flags.has(TransmissionFlags::SEND_DF));
    assert!(!none.export().asks_one_context());
    client.close().await.unwrap();
}

/// A client in literal bytes that has gone to our server's transmission phase with extended headers.
async fn connected(disk: Arc<MemoryDisk>) -> DuplexStream {
    let server = Server::new(vec![("d".into(), disk)], ServerOptions::default()).unwrap();
    let (mut near, far) = tokio::io::duplex(1 << 20);
    tokio::spawn(async move { server.serve_stream(far).await });
    near.write_all(&joined(EXTENDED_CLIENT)).await.unwrap();
    // Greeting, three acknowledgements, one context; size, block sizes and name.
    received(
        &mut near,
        18 + 3 * 20 + (24 + 15) + (20 + 12) + (20 + 14) + (20 + 3),
    )
    .await;
    near
}

fn request(command: u16, flags: u16, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = b"\x21\xe4\x1c\x71".to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(b"12345678");
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// The type and payload of a reply's only chunk.
async fn reply(near: &mut DuplexStream, offset: u64) -> (u16, Vec<u8>) {
    let header = received(near, 32).await;
    assert_eq!(header[..6], *b"\x6e\x8a\x27\x8c\0\x01");
    assert_eq!(header[8..16], *b"12345678");
    assert_eq!(header[16..24], offset.to_be_bytes());
    let length = u64::from_be_bytes(header[24..].try_into().unwrap());
    let kind = u16::from_be_bytes([header[6], header[7]]);
    (kind, received(near, length as usize).await)
}

#[tokio::test]
async fn server_answers_in_extended_chunks_only() {
    let disk = Arc::new(MemoryDisk::new(1 << 20));
    let mut near = connected(disk.clone()).await;
    let mut write = request(1, 0x21, 4096, 4);
    write.extend(b"data");
    // A write without the payload's flag can mean nothing else.
    let mut careless = request(1, 0, 8192, 4);
    careless.extend(b"more");
    for (sent, offset) in [(write, 4096), (careless, 8192), (request(3, 0, 0, 0), 0)] {
        near.write_all(&sent).await.unwrap();
        assert_eq!(reply(&mut near, offset).await, (0, Vec::new()));
    }
    assert_eq!(disk.bytes()[4096..4100], *b"data");
    assert_eq!(disk.bytes()[8192..8196], *b"more");
    near.write_all(&request(0, 4, 4096, 4)).await.unwrap();
    let data = b"\0\0\0\0\0\0\x10\0data".to_vec();
    assert_eq!(reply(&mut near, 4096).await, (1, data));
    near.write_all(&request(7, 0, 0, 1 << 20)).await.unwrap();
    let told = extents(0, 3, &[(4096, 3), (8192, 0), ((1 << 20) - 3 * 4096, 3)]);
    assert_eq!(reply(&mut near, 0).await, (6, told));
    let mut filtered = request(7, 0x28, 4096, 12);
    filtered.extend(4096_u64.to_be_bytes());
    filtered.extend([0; 4]);
    near.write_all(&filtered).await.unwrap();
    assert_eq!(
        reply(&mut near, 4096).await,
        (6, extents(0, 1, &[(4096, 0)]))
    );
}

#[tokio::test]
async fn server_refuses_wrong_extended_requests_and_lives_on() {
    let disk = Arc::new(MemoryDisk::new(1 << 20));
    let mut near = connected(disk).await;
    let with = |mut request: Vec<u8>, payload: &[u8]| {
        request.extend(payload);
        request
    };
    let filter = |length: u64, id: u32| [&length.to_be_bytes()[..], &id.to_be_bytes()].concat();
    for (sent, code, what) in [
        (request(0, 0, 0, u64::MAX), 22, "a read of all there is"),
        (request(7, 0, 0, u64::MAX), 22, "a status of all there is"),
        (request(7, 0, 0, 0), 22, "a status of nothing"),
        (
            with(request(0, 0x20, 0, 5), b"bytes"),
            22,
            "a read with a payload",
        ),
        (
            with(request(3, 0x20, 0, 5), b"bytes"),
            22,
            "a flush with a payload",
        ),
        (
            with(request(7, 0x20, 0, 12), &filter(512, 9)),
            22,
            "an unknown context",
        ),
        (
            with(request(7, 0x20, 0, 12), &filter(2 << 20, 0)),
            22,
            "a filter past the end",
        ),
        (
            with(request(7, 0x20, 0, 8), &[0; 8]),
            22,
            "a filter of no context",
        ),
        (with(request(7, 0x20, 0, 11), &[0; 11]), 22, "an odd filter"),
        (
            with(request(7, 0x20, 0, 4000), &[0; 4000]),
            22,
            "a long filter",
        ),
        (
            with(request(1, 0x20, 1 << 20, 2), b"xx"),
            28,
            "a late write",
        ),
        (request(8, 0, 0, 1 << 30), 22, "a resize"),
    ] {
        let offset = u64::from_be_bytes(sent[16..24].try_into().unwrap());
        near.write_all(&sent).await.unwrap();
        let (kind, payload) = reply(&mut near, offset).await;
        assert_eq!(kind, 0x8001, "{what}");
        let code_told = u32::from_be_bytes(payload[..4].try_into().unwrap());
        assert_eq!(code_told, code, "{what}: {}", ErrorCode(code_told));
    }
}
