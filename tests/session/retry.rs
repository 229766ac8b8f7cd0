//! Our client when its connection is lost, or the disk behind it fails.

use std::sync::Arc;
use std::time::Duration;

use nbdbackup::nbd::client::{Client, ClientErrorKind, ClientOptions};
use nbdbackup::nbd::server::{Server, ServerOptions};
use nbdbackup::nbd::transport::Listener;
use nbdbackup::nbd::uri::{Endpoint, NbdUri};
use nbdbackup::nbd::wire::ErrorCode;
use nbdbackup::range::ByteRange;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::disk::{BLOCK, Disk};
use crate::script::in_time;

fn r(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

fn options() -> ClientOptions {
    ClientOptions {
        contexts: vec!["base:allocation".into()],
        retry_time: Duration::from_secs(30),
        connections: 1,
        ..ClientOptions::default()
    }
}

/// A server of one disk, behind a wire that a test can cut.
struct Lab {
    folder: tempfile::TempDir,
    cut: Arc<Notify>,
    relay: Option<JoinHandle<()>>,
}

impl Lab {
    async fn new(disk: Arc<Disk>) -> Self {
        let lab = Self {
            folder: tempfile::tempdir().unwrap(),
            cut: Arc::new(Notify::new()),
            relay: None,
        };
        lab.serve("behind", disk).await;
        lab
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn uri(&self) -> NbdUri {
        NbdUri {
            endpoint: Endpoint::Unix(self.path("front")),
            export: "d".into(),
            tls: None,
        }
    }

    async fn serve(&self, name: &str, disk: Arc<Disk>) {
        let server = Server::new(vec![("d".into(), disk)], ServerOptions::default()).unwrap();
        let endpoint = Endpoint::Unix(self.path(name));
        let listener = Listener::bind(&endpoint).await.unwrap();
        tokio::spawn(async move { server.serve(listener, std::future::pending()).await });
    }

    /// Passes bytes between the front and a server until the wire is cut, again and again.
    fn relay_to(&mut self, name: &str) {
        let listener = UnixListener::bind(self.path("front")).unwrap();
        let (behind, cut) = (self.path(name), Arc::clone(&self.cut));
        self.relay = Some(tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let (behind, cut) = (behind.clone(), Arc::clone(&cut));
                tokio::spawn(async move {
                    let mut far = UnixStream::connect(behind).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                        () = cut.notified() => {}
                    }
                });
            }
        }));
    }

    /// Nobody listens any more, and all connections are cut.
    async fn down(&mut self) {
        if let Some(relay) = self.relay.take() {
            relay.abort();
            let _ = relay.await;
        }
        std::fs::remove_file(self.path("front")).unwrap();
        self.cut.notify_waiters();
    }

    /// Hangs up at so many who try to connect while nobody serves.
    async fn hang_up_at(&self, tries: usize) {
        let listener = UnixListener::bind(self.path("front")).unwrap();
        for _ in 0..tries {
            drop(listener.accept().await.unwrap());
        }
        std::fs::remove_file(self.path("front")).unwrap();
    }
}

#[tokio::test]
async fn reads_in_flight_are_made_again_on_a_new_connection() {
    let mut disk = Disk::new(300 * BLOCK);
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    disk.gate = Some(gate.clone());
    let disk = Arc::new(disk);
    let mut lab = Lab::new(disk.clone()).await;
    lab.relay_to("behind");
    let client = Client::connect(&lab.uri(), &options()).await.unwrap();
    let reads = (0..20).map(|i| {
        let (client, disk) = (&client, &disk);
        async move {
            let range = r(i * 12 * BLOCK, i * 12 * BLOCK + 9 * BLOCK);
            let reply = client.read(range, Vec::new()).await.unwrap();
            assert!(reply.data == disk.slice(range));
        }
    });
    let trouble = async {
        while disk.reads.load(std::sync::atomic::Ordering::SeqCst) < 16 {
            tokio::task::yield_now().await;
        }
        lab.down().await;
        lab.hang_up_at(2).await;
        gate.add_permits(10_000);
        lab.relay_to("behind");
    };
    in_time(async { tokio::join!(futures::future::join_all(reads), trouble) }).await;
    assert_eq!(client.reconnects(), 1);
    let lists = client.block_status(r(0, BLOCK)).await.unwrap();
    assert_eq!(lists.len(), 1);
    lab.cut.notify_waiters();
    let lists = in_time(client.block_status(r(0, BLOCK))).await.unwrap();
    assert_eq!(lists.len(), 1);
    assert_eq!(client.reconnects(), 2);
    client.close().await.unwrap();
}

#[tokio::test]
async fn another_export_at_the_same_place_is_not_read() {
    let mut lab = Lab::new(Arc::new(Disk::new(30 * BLOCK))).await;
    lab.serve("larger", Arc::new(Disk::new(31 * BLOCK))).await;
    let mut other = Disk::new(30 * BLOCK);
    other.contexts.clear();
    lab.serve("poorer", Arc::new(other)).await;
    for another in ["larger", "poorer"] {
        lab.relay_to("behind");
        let client = Client::connect(&lab.uri(), &options()).await.unwrap();
        client.read(r(0, BLOCK), Vec::new()).await.unwrap();
        lab.down().await;
        lab.relay_to(another);
        let fault = in_time(client.read(r(0, BLOCK), Vec::new())).await;
        let kind = fault.unwrap_err().kind;
        assert!(matches!(kind, ClientErrorKind::Changed), "{kind}");
        lab.down().await;
    }
}

#[tokio::test]
async fn outage_longer_than_the_retry_time_and_one_after_a_write_are_final() {
    let mut lab = Lab::new(Arc::new(Disk::new(30 * BLOCK))).await;
    lab.relay_to("behind");
    let options = ClientOptions {
        retry_time: Duration::from_millis(300),
        ..options()
    };
    let client = Client::connect(&lab.uri(), &options).await.unwrap();
    lab.down().await;
    for _ in 0..3 {
        let fault = in_time(client.read(r(0, BLOCK), Vec::new())).await;
        assert!(fault.is_err());
    }
    // What was given up stays so.
    lab.relay_to("behind");
    assert!(client.read(r(0, BLOCK), Vec::new()).await.is_err());
    lab.down().await;

    let memory = Arc::new(nbdbackup::nbd::server::MemoryDisk::new(BLOCK));
    let server = Server::new(vec![("d".into(), memory)], ServerOptions::default()).unwrap();
    let listener = Listener::bind(&Endpoint::Unix(lab.path("memory"))).await;
    let listener = listener.unwrap();
    tokio::spawn(async move { server.serve(listener, std::future::pending()).await });
    lab.relay_to("memory");
    let client = Client::connect(&lab.uri(), &options).await.unwrap();
    client.write(0, vec![1].into(), false).await.unwrap();
    lab.cut.notify_waiters();
    let mut lost = client.flush().await;
    while lost.is_ok() {
        lost = client.flush().await;
    }
    assert!(client.read(r(0, 1), Vec::new()).await.is_err());
    assert_eq!(client.reconnects(), 0);
}

#[tokio::test]
async fn bad_range_is_found_and_named_and_what_recovers_is_read() {
    let mut disk = Disk::new(300 * BLOCK);
    disk.broken = Some(r(100 * BLOCK + 1024, 100 * BLOCK + 2560));
    let disk = Arc::new(disk);
    let mut lab = Lab::new(disk.clone()).await;
    lab.relay_to("behind");
    let client = Client::connect(&lab.uri(), &options()).await.unwrap();
    let fault = client.read(r(0, 300 * BLOCK), Vec::new()).await;
    let fault = fault.unwrap_err();
    match &fault.kind {
        ClientErrorKind::Request(failed) => {
            assert_eq!(failed.code, ErrorCode::EIO);
            assert_eq!(Some(failed.range), disk.broken);
        }
        other => panic!("{other}"),
    }
    assert_eq!(fault.range(), disk.broken);
    assert_eq!(client.reconnects(), 0);
    let whole = r(101 * BLOCK, 300 * BLOCK);
    let reply = client.read(whole, Vec::new()).await.unwrap();
    assert!(reply.data == disk.slice(whole));
}

/// Serves `d`, 64 KiB of sevens, with structured replies and DF, as QEMU does: a plain read of the bad sector hangs up.
async fn qemu_like(listener: UnixListener, bad: ByteRange, answers_df: bool) {
    loop {
        let (mut near, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            near.write_all(&crate::script::STRUCTURED.concat())
                .await
                .unwrap();
            let mut options = vec![0; crate::script::CLIENT.concat().len()];
            near.read_exact(&mut options).await.unwrap();
            let mut request = [0; 28];
            while near.read_exact(&mut request).await.is_ok() {
                let offset = u64::from_be_bytes(request[16..24].try_into().unwrap());
                let length = u32::from_be_bytes(request[24..].try_into().unwrap());
                if request[7] != 0 {
                    return;
                }
                let range = ByteRange::at(offset, u64::from(length)).unwrap();
                let mut reply = b"\x66\x8e\x33\xef\0\x01".to_vec();
                match range.intersect(bad) {
                    None => {
                        reply.extend([0, 1]);
                        reply.extend(&request[8..16]);
                        reply.extend((length + 8).to_be_bytes());
                        reply.extend(offset.to_be_bytes());
                        reply.extend(vec![7; length as usize]);
                    }
                    Some(_) if request[5] == 4 && answers_df => {
                        reply.extend([0x80, 1]);
                        reply.extend(&request[8..16]);
                        reply.extend([0, 0, 0, 6, 0, 0, 0, 5, 0, 0]);
                    }
                    Some(_) => return,
                }
                near.write_all(&reply).await.unwrap();
            }
        });
    }
}

#[tokio::test]
async fn server_that_hangs_up_at_a_bad_sector_is_made_to_tell_which() {
    let bad = r(40_960 + 512, 40_960 + 1024);
    for answers_df in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let server = tokio::spawn(qemu_like(
            UnixListener::bind(&path).unwrap(),
            bad,
            answers_df,
        ));
        let uri = NbdUri {
            endpoint: Endpoint::Unix(path),
            export: "d".into(),
            tls: None,
        };
        let client = Client::connect(&uri, &options()).await.unwrap();
        let reads = (0..8).map(|i| client.read(r(i * 8192, (i + 1) * 8192), Vec::new()));
        let replies = in_time(futures::future::join_all(reads)).await;
        for (i, reply) in replies.into_iter().enumerate() {
            match (i, reply) {
                (5, Err(fault)) => assert_eq!(fault.range(), Some(bad), "{fault}"),
                (5, Ok(_)) => panic!("a bad sector was read"),
                (_, reply) => assert_eq!(reply.unwrap().data, [7; 8192], "{i}"),
            }
        }
        server.abort();
    }
}
