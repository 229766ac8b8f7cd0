//! Both ends joined in memory by a relay that cuts the stream at random places, for every command and its replies.

use std::sync::Arc;

use bytes::Bytes;
use nbdbackup::nbd::client::{Client, ClientOptions};
use nbdbackup::nbd::server::{MemoryDisk, Server, ServerOptions};
use nbdbackup::nbd::session::Zeroing;
use nbdbackup::range::ByteRange;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::script::in_time;

const SIZE: usize = 40_000;

/// Forwards in pieces of one to `most` bytes, whose lengths the seed says.
async fn relay(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    most: usize,
    mut seed: u64,
) {
    let mut piece = vec![0; most];
    loop {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let length = 1 + (seed >> 33) as usize % most;
        match from.read(&mut piece[..length]).await {
            Ok(0) | Err(_) => break,
            Ok(read) if to.write_all(&piece[..read]).await.is_err() => break,
            Ok(_) => tokio::task::yield_now().await,
        }
    }
    let _ = to.shutdown().await;
}

async fn life(most: usize, seed: u64) {
    let disk = Arc::new(MemoryDisk::new(SIZE as u64));
    disk.add_bitmap("b");
    let exports = vec![("d".to_owned(), disk as _)];
    let server = Server::new(exports, ServerOptions::default()).unwrap();
    let (near, relayed) = tokio::io::duplex(1 << 16);
    let (far, relaying) = tokio::io::duplex(1 << 16);
    let (from_client, to_client) = tokio::io::split(relayed);
    let (from_server, to_server) = tokio::io::split(relaying);
    tokio::spawn(relay(from_client, to_server, most, seed));
    tokio::spawn(relay(from_server, to_client, most, !seed));
    tokio::spawn(async move { server.serve_stream(far).await });
    let options = ClientOptions {
        contexts: vec!["base:allocation".into(), "qemu:dirty-bitmap:b".into()],
        ..ClientOptions::default()
    };
    let client = Client::over(near, "d", &options).await.unwrap();
    assert_eq!(client.export().contexts.len(), 2);

    let r = |start, end| ByteRange::new(start, end).unwrap();
    let bytes: Vec<u8> = (0..9000_u32).map(|n| n as u8 | 1).collect();
    let mut model = vec![0; SIZE];
    client
        .write(5000, Bytes::from(bytes.clone()), true)
        .await
        .unwrap();
    model[5000..14_000].copy_from_slice(&bytes);
    client
        .write_zeroes(r(6000, 7000), Zeroing::default())
        .await
        .unwrap();
    model[6000..7000].fill(0);
    client.trim(r(9000, 10_000), false).await.unwrap();
    model[9000..10_000].fill(0);
    client.cache(r(0, 4096)).await.unwrap();
    client.flush().await.unwrap();
    let all = ByteRange::first(SIZE as u64);
    let reads = [all, r(4999, 6001), r(20_000, 30_000)].map(|range| client.read(range, Vec::new()));
    for reply in futures::future::join_all(reads).await {
        let reply = reply.unwrap();
        if reply.data.len() == SIZE {
            assert!(reply.data == model);
        }
    }
    let lists = client.block_status(all).await.unwrap();
    assert_eq!(lists.len(), 2);
    assert_eq!(
        client.block_status_of(1, all).await.unwrap()[0].extents,
        lists[1].extents
    );
    assert_eq!(client.first_block_status(all).await.unwrap().len(), 2);
    // An error in the middle leaves all of it in step.
    client
        .write(SIZE as u64 - 1, Bytes::from_static(b"past the end"), false)
        .await
        .unwrap_err();
    assert!(client.read(all, Vec::new()).await.unwrap().data == model);
    client.close().await.unwrap();
}

#[tokio::test]
async fn stream_between_both_ends_may_be_cut_at_any_places() {
    for most in [1, 2, 3, 7, 16, 28, 33, 100, 3000] {
        for seed in 0..12 {
            in_time(life(most, seed)).await;
        }
    }
}
