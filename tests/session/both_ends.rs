//! Our client against our server.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nbdbackup::nbd::client::{Client, ClientErrorKind, ClientOptions, ReadReply, list};
use nbdbackup::nbd::server::{Server, ServerOptions};
use nbdbackup::nbd::session::BlockSize;
use nbdbackup::nbd::transport::Listener;
use nbdbackup::nbd::uri::{Endpoint, NbdUri};
use nbdbackup::nbd::wire::{ErrorCode, OptionReplyCode};
use nbdbackup::range::ByteRange;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, oneshot};

use crate::disk::{BLOCK, Disk};
use crate::script::in_time;

fn r(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

fn options() -> ClientOptions {
    ClientOptions {
        contexts: vec![
            "qemu:dirty-bitmap:b".into(),
            "qemu:dirty-bitmap:missing".into(),
            "base:allocation".into(),
        ],
        ..ClientOptions::default()
    }
}

/// Joins a client and a server through memory.
async fn joined(disk: &Arc<Disk>, options: &ClientOptions) -> Client {
    let server = Server::new(
        vec![("disk".into(), disk.clone())],
        ServerOptions::default(),
    )
    .unwrap();
    let (near, far) = tokio::io::duplex(100_000);
    tokio::spawn(async move { server.serve_stream(far).await });
    Client::over(near, "disk", options).await.unwrap()
}

fn assert_is(disk: &Disk, range: ByteRange, reply: &ReadReply) {
    if reply.all_hole {
        assert!(disk.slice(range).iter().all(|b| *b == 0), "{range}");
        assert_eq!(reply.holes, [range]);
        assert!(reply.data.is_empty());
    } else {
        assert!(reply.data == disk.slice(range), "{range} differs");
    }
    for hole in &reply.holes {
        assert!(disk.slice(*hole).iter().all(|b| *b == 0), "{hole}");
    }
}

#[tokio::test]
async fn export_is_described_and_contexts_are_granted_by_name() {
    let disk = Arc::new(Disk::new(30 * BLOCK));
    let client = joined(&disk, &options()).await;
    let export = client.export();
    assert_eq!(export.size_bytes, 30 * BLOCK);
    assert_eq!(export.name, "disk");
    assert_eq!(export.description.as_deref(), Some("a disk in memory"));
    assert_eq!(export.contexts, ["qemu:dirty-bitmap:b", "base:allocation"]);
    assert_eq!(export.context("base:allocation"), Some(1));
    assert!(export.structured);
    client.close().await.unwrap();
}

#[tokio::test]
async fn any_range_reads_as_it_is_and_holes_stay_holes() {
    let disk = Arc::new(Disk::new(30 * BLOCK + 77));
    let client = joined(&disk, &options()).await;
    let size = disk.bytes.len() as u64;
    let mut buf = Vec::new();
    for start in [
        0,
        1,
        BLOCK,
        2 * BLOCK,
        2 * BLOCK + 5,
        3 * BLOCK - 1,
        size - 78,
    ] {
        for len in [0, 1, 100, BLOCK - 5, BLOCK, 3 * BLOCK, size - start] {
            let range = r(start, size.min(start + len));
            let reply = client.read(range, buf).await.unwrap();
            assert_is(&disk, range, &reply);
            buf = reply.data;
        }
    }
    let hole = client.read(r(2 * BLOCK, 3 * BLOCK), buf).await.unwrap();
    assert!(hole.all_hole);
    client.close().await.unwrap();
}

#[tokio::test]
async fn many_tasks_read_at_once_and_the_server_works_on_no_more_than_its_bound() {
    let mut disk = Disk::new(3000 * BLOCK);
    let gate = Arc::new(Semaphore::new(0));
    disk.gate = Some(gate.clone());
    let disk = Arc::new(disk);
    let mut options = options();
    options.requests_per_connection = 50;
    let client = Arc::new(joined(&disk, &options).await);
    let mut tasks = Vec::new();
    for i in 0..200 {
        let (client, disk) = (client.clone(), disk.clone());
        tasks.push(tokio::spawn(async move {
            let range = r(i * 13 * BLOCK, i * 13 * BLOCK + 20_000);
            let reply = client.read(range, Vec::new()).await.unwrap();
            assert_is(&disk, range, &reply);
        }));
    }
    while disk.most_at_once.load(Ordering::SeqCst) < 16 {
        tokio::task::yield_now().await;
    }
    gate.add_permits(1000);
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(disk.most_at_once.load(Ordering::SeqCst), 16);
}

#[tokio::test]
async fn read_longer_than_the_greatest_block_is_split() {
    let mut disk = Disk::new(100 * BLOCK);
    disk.block_size = BlockSize::new(512, 4096, 3 * 4096).unwrap();
    let disk = Arc::new(disk);
    let client = joined(&disk, &options()).await;
    for range in [r(0, 100 * BLOCK), r(700, 50 * BLOCK + 3), r(8192, 12288)] {
        let reply = client.read(range, vec![7; 10]).await.unwrap();
        assert_is(&disk, range, &reply);
    }
    assert!(disk.reads.load(Ordering::SeqCst) > 40);
}

#[tokio::test]
async fn extents_of_each_context_cover_the_range() {
    let disk = Arc::new(Disk::new(30 * BLOCK));
    let client = joined(&disk, &options()).await;
    let range = r(100, 10 * BLOCK + 9);
    let lists = client.block_status(range).await.unwrap();
    assert_eq!(lists.len(), 2);
    for list in &lists {
        assert_eq!(list.extents[0].range.start(), range.start());
        assert_eq!(list.end(), Some(range.end()));
        for extent in &list.extents {
            let hole = disk.slice(extent.range).iter().all(|b| *b == 0);
            let flags = match client.export().contexts[list.context].as_str() {
                "base:allocation" if hole => 3,
                "base:allocation" => 0,
                _ => u64::from(!hole),
            };
            assert_eq!(extent.flags, flags);
        }
    }
}

#[tokio::test]
async fn first_extent_of_each_context_is_told_alone() {
    let disk = Arc::new(Disk::new(30 * BLOCK));
    let client = joined(&disk, &options()).await;
    let range = r(100, 10 * BLOCK + 9);
    let all = client.block_status(range).await.unwrap();
    assert!(all.iter().all(|list| list.extents.len() > 1));
    let first = client.first_block_status(range).await.unwrap();
    for (first, all) in first.iter().zip(&all) {
        let [one] = &first.extents[..] else {
            panic!("{first:?}");
        };
        // Neighbours that are alike may have been told as one there.
        assert_eq!(one.range.start(), range.start());
        assert!(all.extents[0].range.contains(one.range));
        assert_eq!(one.flags, all.extents[0].flags);
    }
    assert_eq!(first.len(), all.len());
}

#[tokio::test]
async fn fault_of_the_disk_reaches_the_caller_and_the_connection_lives_on() {
    let mut disk = Disk::new(30 * BLOCK);
    disk.broken = Some(r(5 * BLOCK, 6 * BLOCK));
    disk.panics = Some(r(9 * BLOCK, 10 * BLOCK));
    let disk = Arc::new(disk);
    let client = joined(&disk, &options()).await;
    for (range, text) in [
        (r(4 * BLOCK, 7 * BLOCK), "sector not found"),
        (
            r(9 * BLOCK, 9 * BLOCK + 1),
            "the server failed at this request",
        ),
    ] {
        let fault = client.read(range, Vec::new()).await.unwrap_err();
        match &fault.kind {
            ClientErrorKind::Request(failed) => {
                assert_eq!((failed.code, failed.text.as_str()), (ErrorCode::EIO, text));
                assert_eq!(failed.range, range);
            }
            other => panic!("{other}"),
        }
    }
    let range = r(0, 4 * BLOCK);
    assert_is(&disk, range, &client.read(range, Vec::new()).await.unwrap());
    let fault = client.read(r(0, 31 * BLOCK), Vec::new()).await.unwrap_err();
    assert!(matches!(fault.kind, ClientErrorKind::PastEnd { .. }));
    client.close().await.unwrap();
}

#[tokio::test]
async fn dropped_read_leaves_the_connection_sound() {
    let mut disk = Disk::new(300 * BLOCK);
    let gate = Arc::new(Semaphore::new(0));
    disk.gate = Some(gate.clone());
    let disk = Arc::new(disk);
    let client = joined(&disk, &options()).await;
    for _ in 0..5 {
        let read = client.read(r(0, 100 * BLOCK), Vec::new());
        assert!(
            tokio::time::timeout(Duration::from_millis(1), read)
                .await
                .is_err()
        );
    }
    while disk.reads.load(Ordering::SeqCst) < 5 {
        tokio::task::yield_now().await;
    }
    gate.add_permits(100);
    let range = r(100 * BLOCK, 200 * BLOCK);
    let reply = client.read(range, Vec::new()).await.unwrap();
    assert_is(&disk, range, &reply);
    client.close().await.unwrap();
}

#[tokio::test]
async fn unknown_export_is_refused_in_the_server_s_words() {
    let disk = Arc::new(Disk::new(BLOCK));
    let server = Server::new(
        vec![("disk".into(), disk.clone())],
        ServerOptions::default(),
    );
    let server = server.unwrap();
    for name in ["other", &"x".repeat(4096)] {
        let server = server.clone();
        let (near, far) = tokio::io::duplex(1000);
        let served = tokio::spawn(async move { server.serve_stream(far).await });
        let fault = Client::over(near, name, &options()).await.err().unwrap();
        match &fault.kind {
            ClientErrorKind::Refused(refused) => {
                assert_eq!(refused.code, OptionReplyCode::ERR_UNKNOWN);
                assert!(refused.text.contains("no export") && refused.text.len() < 200);
            }
            other => panic!("{other}"),
        }
        served.await.unwrap().unwrap();
    }
    assert_eq!(disk.reads.load(Ordering::SeqCst), 0);
}

async fn serve_at(
    endpoint: &Endpoint,
    server: Server,
) -> (Endpoint, oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
    let listener = Listener::bind(endpoint).await.unwrap();
    let place = listener.endpoint().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let served = tokio::spawn(async move {
        server
            .serve(listener, async {
                let _ = stopped.await;
            })
            .await;
    });
    (place, stop, served)
}

#[tokio::test]
async fn several_connections_share_the_reads_over_tcp() {
    let disk = Arc::new(Disk::new(3000 * BLOCK));
    let server = Server::new(vec![("d".into(), disk.clone())], ServerOptions::default()).unwrap();
    let any = Endpoint::Tcp {
        host: "127.0.0.1".into(),
        port: 0,
    };
    let (endpoint, stop, served) = serve_at(&any, server).await;
    let uri = NbdUri {
        endpoint,
        export: "d".into(),
        tls: None,
    };
    let mut options = options();
    options.connections = 3;
    let client = Client::connect(&uri, &options).await.unwrap();
    assert_eq!(client.export().connections, 3);
    let reads = (0..100).map(|i| {
        let (client, disk) = (&client, &disk);
        async move {
            let range = r(i * 100_000, i * 100_000 + 90_000);
            assert_is(disk, range, &client.read(range, Vec::new()).await.unwrap());
        }
    });
    futures::future::join_all(reads).await;
    client.close().await.unwrap();
    stop.send(()).unwrap();
    served.await.unwrap();
}

#[tokio::test]
async fn exports_are_listed_over_more_connections_than_one() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(Disk::new(BLOCK));
    let exports = (0..25).map(|i| (format!("disk {i}"), disk.clone() as _));
    let server = Server::new(exports.collect(), ServerOptions::default()).unwrap();
    let socket = Endpoint::Unix(folder.path().join("s"));
    let (endpoint, stop, served) = serve_at(&socket, server).await;
    let uri = NbdUri {
        endpoint,
        export: String::new(),
        tls: None,
    };
    let exports = list(&uri, &ClientOptions::default()).await.unwrap();
    assert_eq!(exports.len(), 25);
    for (i, export) in exports.iter().enumerate() {
        assert_eq!(export.name, format!("disk {i}"));
        assert_eq!(export.details.as_ref().unwrap().size, BLOCK);
        assert_eq!(export.contexts, ["base:allocation", "qemu:dirty-bitmap:b"]);
    }
    stop.send(()).unwrap();
    served.await.unwrap();
    assert!(!folder.path().join("s").exists());
}

#[tokio::test]
async fn server_that_stops_finishes_what_is_in_flight_and_leaves_no_client_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let mut disk = Disk::new(300 * BLOCK);
    let gate = Arc::new(Semaphore::new(0));
    disk.gate = Some(gate.clone());
    let disk = Arc::new(disk);
    // Only the wish to stop may end what this test starts.
    let patient = ServerOptions {
        handshake_timeout: Duration::from_secs(1000),
        shutdown_timeout: Duration::from_secs(1000),
        ..ServerOptions::default()
    };
    let server = Server::new(vec![("d".into(), disk.clone())], patient).unwrap();
    let socket = Endpoint::Unix(folder.path().join("s"));
    let (endpoint, stop, served) = serve_at(&socket, server).await;
    let uri = NbdUri {
        endpoint,
        export: "d".into(),
        tls: None,
    };
    let mut options = options();
    options.connections = 1;
    let client = Client::connect(&uri, &options).await.unwrap();
    let mut idle = tokio::net::UnixStream::connect(folder.path().join("s"))
        .await
        .unwrap();
    let mut greeting = [0; 18];
    idle.read_exact(&mut greeting).await.unwrap();
    idle.write_all(&[0, 0, 0, 3, b'I']).await.unwrap();
    let range = r(0, 50 * BLOCK);
    let read = client.read(range, Vec::new());
    let stopping = async {
        while disk.reads.load(Ordering::SeqCst) < 1 {
            tokio::task::yield_now().await;
        }
        stop.send(()).unwrap();
        assert_eq!(idle.read(&mut greeting).await.unwrap(), 0);
        gate.add_permits(1);
    };
    let (reply, ()) = in_time(async { tokio::join!(read, stopping) }).await;
    assert_is(&disk, range, &reply.unwrap());
    in_time(served).await.unwrap();
    let fault = client.read(range, Vec::new()).await.unwrap_err();
    assert!(
        matches!(
            fault.kind,
            ClientErrorKind::Closed | ClientErrorKind::Io { .. }
        ),
        "{fault}"
    );
    assert!(fault.to_string().contains("nbd+unix:///d?socket="));
}
