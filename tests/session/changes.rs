//! Writes, zeros, trims and flushes, from our client through our server to a disk.

use std::sync::Arc;

use bytes::Bytes;
use nbdbackup::nbd::client::{Client, ClientErrorKind, ClientOptions};
use nbdbackup::nbd::server::{MemoryDisk, Server, ServerOptions};
use nbdbackup::nbd::session::Zeroing;
use nbdbackup::nbd::wire::ErrorCode;
use nbdbackup::range::ByteRange;
use tokio::io::AsyncWriteExt;

use crate::disk::{BLOCK, Disk};
use crate::script::{client_of, in_time, joined, received};

async fn client(disk: Arc<MemoryDisk>) -> Client {
    let server = Server::new(vec![("d".into(), disk)], ServerOptions::default()).unwrap();
    let (near, far) = tokio::io::duplex(100_000);
    tokio::spawn(async move { server.serve_stream(far).await });
    Client::over(near, "d", &ClientOptions::default())
        .await
        .unwrap()
}

fn r(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

#[tokio::test]
async fn random_changes_and_reads_agree_with_a_model() {
    const SIZE: usize = 3 << 20;
    let disk = Arc::new(MemoryDisk::new(SIZE as u64));
    disk.add_bitmap("b");
    let client = client(disk.clone()).await;
    let mut model = vec![0_u8; SIZE];
    let mut seed = 7_u64;
    let mut next = |below: usize| {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (seed >> 33) as usize % below
    };
    for round in 0..300 {
        let start = next(SIZE);
        let end = SIZE.min(start + 1 + next(200_000));
        let range = r(start as u64, end as u64);
        match next(5) {
            0 => {
                let how = Zeroing {
                    durable: next(2) == 0,
                    keep_allocated: next(2) == 0,
                    fast: next(2) == 0,
                };
                client.write_zeroes(range, how).await.unwrap();
                model[start..end].fill(0);
            }
            1 => {
                client.trim(range, next(2) == 0).await.unwrap();
                model[start..end].fill(0);
            }
            2 => client.cache(range).await.unwrap(),
            3 => client.flush().await.unwrap(),
            _ => {
                let data = vec![round as u8 | 1; end - start];
                client
                    .write(range.start(), data.clone().into(), next(2) == 0)
                    .await
                    .unwrap();
                model[start..end].copy_from_slice(&data);
            }
        }
    }
    let all = r(0, SIZE as u64);
    let reply = client.read(all, Vec::new()).await.unwrap();
    assert!(reply.data == model);
    assert!(disk.bytes() == model);
    client.close().await.unwrap();
}

#[tokio::test]
async fn write_longer_than_the_greatest_block_is_split_and_many_run_at_once() {
    let disk = Arc::new(MemoryDisk::new(80 << 20));
    let client = client(disk.clone()).await;
    let bytes: Vec<u8> = (0..70 << 20).map(|i: u32| (i >> 9) as u8).collect();
    let bytes = Bytes::from(bytes);
    client.write(5 << 20, bytes.clone(), false).await.unwrap();
    assert!(disk.bytes()[5 << 20..75 << 20] == bytes);
    let writes = (0..64_u64).map(|i| {
        let data = Bytes::from(vec![i as u8; 100_000]);
        client.write(i * 100_000, data, false)
    });
    for written in futures::future::join_all(writes).await {
        written.unwrap();
    }
    let bytes = disk.bytes();
    for i in 0..64 {
        assert!(
            bytes[i * 100_000..(i + 1) * 100_000]
                .iter()
                .all(|b| *b == i as u8)
        );
    }
}

#[tokio::test]
async fn dropped_write_leaves_the_connection_sound() {
    let disk = Arc::new(MemoryDisk::new(8 << 20));
    let client = client(disk.clone()).await;
    for i in 0..20 {
        let write = client.write(0, vec![i; 1 << 20].into(), false);
        let _ = tokio::time::timeout(std::time::Duration::from_micros(50), write).await;
    }
    client
        .write(4 << 20, vec![9; 100].into(), true)
        .await
        .unwrap();
    assert_eq!(disk.bytes()[4 << 20..(4 << 20) + 100], [9; 100]);
    client.close().await.unwrap();
}

#[tokio::test]
async fn client_changes_nothing_that_it_must_not() {
    let disk = Arc::new(Disk::new(8 * BLOCK));
    let server = Server::new(vec![("d".into(), disk)], ServerOptions::default()).unwrap();
    let (near, far) = tokio::io::duplex(100_000);
    tokio::spawn(async move { server.serve_stream(far).await });
    let client = Client::over(near, "d", &ClientOptions::default())
        .await
        .unwrap();
    let some = r(0, BLOCK);
    let zeroing = Zeroing::default();
    for fault in [
        client.write(0, vec![1].into(), false).await.unwrap_err(),
        client.write_zeroes(some, zeroing).await.unwrap_err(),
        client.trim(some, false).await.unwrap_err(),
    ] {
        assert!(matches!(fault.kind, ClientErrorKind::ReadOnly), "{fault}");
    }
    client.flush().await.unwrap();
    client.cache(some).await.unwrap();
    // A server that can neither trim nor zero nor write durably, with blocks of 512 bytes.
    let writable =
        b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\0\0\0\0\0\0\0\x01\0\0\0\x01";
    let mut script = crate::script::STRUCTURED.to_vec();
    script[6] = writable;
    let (client, mut far) = client_of(&joined(&script)).await;
    let client = client.unwrap();
    received(&mut far, joined(crate::script::CLIENT).len()).await;
    for fault in [
        client.write_zeroes(some, zeroing).await.unwrap_err(),
        client.trim(some, false).await.unwrap_err(),
        client
            .write(0, vec![1; 512].into(), true)
            .await
            .unwrap_err(),
    ] {
        assert!(fault.is_unsupported(), "{fault}");
    }
    let fault = client.write(1, vec![1; 512].into(), false).await;
    assert!(matches!(
        fault.unwrap_err().kind,
        ClientErrorKind::Misuse(_)
    ));
    let fault = client.write(0x10000, vec![1; 512].into(), false).await;
    assert!(matches!(
        fault.unwrap_err().kind,
        ClientErrorKind::PastEnd { .. }
    ));
    // Nothing of all that was sent: the first request is this one.
    far.write_all(b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\0")
        .await
        .unwrap();
    let fault = in_time(client.write(512, vec![1; 512].into(), false)).await;
    match fault.unwrap_err().kind {
        ClientErrorKind::Request(failed) => assert_eq!(failed.code, ErrorCode::ENOSPC),
        other => panic!("{other}"),
    }
    let sent = received(&mut far, 28 + 512).await;
    assert_eq!(
        sent[..28],
        *b"\x25\x60\x95\x13\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x02\0\0\0\x02\0"
    );
    assert_eq!(sent[28..], [1; 512]);
}
