//! Our server against clients that dawdle, stall, or want more than their share.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nbdbackup::nbd::server::{ServeError, Server, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::disk::{BLOCK, Disk};
use crate::script::received;

const SIZE: u64 = 64 * BLOCK;

/// A client of a server, through the handshake without structured replies; `room` bytes fit between the two.
async fn connected(
    server: &Server,
    room: usize,
) -> (DuplexStream, JoinHandle<Result<(), ServeError>>) {
    let server = server.clone();
    let (mut near, far) = tokio::io::duplex(room);
    let served = tokio::spawn(async move { server.serve_stream(far).await });
    near.write_all(b"\0\0\0\x03").await.unwrap();
    received(&mut near, 18).await;
    near.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x01d")
        .await
        .unwrap();
    received(&mut near, 10).await;
    (near, served)
}

fn server(disk: &Arc<Disk>, options: ServerOptions) -> Server {
    Server::new(vec![("d".to_owned(), disk.clone() as _)], options).unwrap()
}

/// A request of a block, at the cookie's place.
fn request(command: u8, cookie: u8, length: u32) -> Vec<u8> {
    let mut bytes = b"\x25\x60\x95\x13\0\0\0".to_vec();
    bytes.push(command);
    bytes.extend([cookie; 8]);
    bytes.extend((u64::from(cookie) * BLOCK).to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

#[tokio::test(start_paused = true)]
async fn client_that_ends_no_message_is_let_go_and_an_idle_one_stays() {
    let disk = Arc::new(Disk::new(SIZE));
    let server = server(&disk, ServerOptions::default());
    let half_header = request(0, 1, 512)[..14].to_vec();
    // A write of a read-only export is read past, and has to come all the same.
    let half_payload = [request(1, 1, 4096), vec![7; 2000]].concat();
    for half in [half_header, half_payload] {
        let (mut near, served) = connected(&server, 1 << 16).await;
        near.write_all(&half).await.unwrap();
        let ended = served.await.unwrap();
        assert!(
            matches!(ended, Err(ServeError::MessageTimedOut(_))),
            "{ended:?}"
        );
    }
    let (mut near, _served) = connected(&server, 1 << 16).await;
    tokio::time::sleep(Duration::from_secs(7 * 86_400)).await;
    near.write_all(&request(0, 1, 16)).await.unwrap();
    received(&mut near, 16 + 16).await;
}

#[tokio::test(start_paused = true)]
async fn payload_that_comes_slowly_but_steadily_is_taken() {
    let disk = Arc::new(Disk::new(SIZE));
    let server = server(&disk, ServerOptions::default());
    let (mut near, _served) = connected(&server, 1 << 16).await;
    near.write_all(&request(1, 1, 8 << 20)).await.unwrap();
    // 128 KiB a second are more than the least.
    for _ in 0..64 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        near.write_all(&[7; 128 << 10]).await.unwrap();
    }
    let reply = received(&mut near, 16).await;
    assert_eq!(reply[4..8], [0, 0, 0, 1], "no EPERM");
}

#[tokio::test(start_paused = true)]
async fn client_that_takes_no_replies_is_let_go() {
    let disk = Arc::new(Disk::new(SIZE));
    let server = server(&disk, ServerOptions::default());
    let (mut near, served) = connected(&server, 1000).await;
    near.write_all(&request(0, 1, 4096)).await.unwrap();
    let ended = served.await.unwrap();
    match ended {
        Err(ServeError::Io { source, .. }) => {
            assert_eq!(source.kind(), std::io::ErrorKind::TimedOut);
        }
        other => panic!("{other:?}"),
    }
    // One that takes a little at a time stays.
    let (mut near, _served) = connected(&server, 1000).await;
    near.write_all(&request(0, 1, 4096)).await.unwrap();
    let mut taken = 0;
    while taken < 16 + 4096 {
        tokio::time::sleep(Duration::from_secs(20)).await;
        taken += near.read(&mut [0; 500]).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn clients_together_have_no_more_than_the_total() {
    for options in [
        ServerOptions {
            requests_in_total: 3,
            ..ServerOptions::default()
        },
        ServerOptions {
            bytes_per_connection: 2000,
            bytes_in_total: 3 * 1024,
            ..ServerOptions::default()
        },
    ] {
        let mut disk = Disk::new(SIZE);
        disk.gate = Some(Arc::new(Semaphore::new(0)));
        let disk = Arc::new(disk);
        let server = server(&disk, options);
        let mut clients = Vec::new();
        for _ in 0..4 {
            let (mut near, served) = connected(&server, 1 << 20).await;
            for cookie in 0..8 {
                near.write_all(&request(0, cookie, 1024)).await.unwrap();
            }
            clients.push((near, served));
        }
        // All has come as far as it can.
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(disk.reads.load(Ordering::SeqCst), 3);
        disk.gate.as_ref().unwrap().add_permits(1000);
        for (near, _) in &mut clients {
            received(near, 8 * (16 + 1024)).await;
        }
        assert_eq!(disk.most_at_once.load(Ordering::SeqCst), 3);
    }
}
