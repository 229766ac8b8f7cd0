//! Our server against clients that go through the handshake oddly, wrongly or not at all.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nbdbackup::nbd::server::{ServeError, Server, ServerOptions};
use nbdbackup::nbd::transport::Listener;
use nbdbackup::nbd::uri::Endpoint;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use crate::disk::{BLOCK, Disk};
use crate::script::{in_time, joined, received};

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
const FLAGS: &[u8] = b"\0\0\0\x03";
const ACK_STRUCTURED: &[u8] = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\0\0\0\0";
const STRUCTURED: &[u8] = b"IHAVEOPT\0\0\0\x08\0\0\0\0";
const ABORT: &[u8] = b"IHAVEOPT\0\0\0\x02\0\0\0\0";

fn server(disk: &Arc<Disk>) -> Server {
    let exports = vec![
        ("d".to_owned(), disk.clone() as _),
        ("other".to_owned(), disk.clone() as _),
    ];
    Server::new(exports, ServerOptions::default()).unwrap()
}

fn start(disk: &Arc<Disk>) -> (DuplexStream, JoinHandle<Result<(), ServeError>>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let server = server(disk);
    (
        near,
        tokio::spawn(async move { server.serve_stream(far).await }),
    )
}

fn disk() -> Arc<Disk> {
    Arc::new(Disk::new(16 * BLOCK))
}

fn option(code: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(code.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A client's answer to one option: the code and the payload of each reply, the last of which is no information.
async fn answers(near: &mut DuplexStream, code: u32) -> Vec<(u32, Vec<u8>)> {
    let mut all = Vec::new();
    loop {
        let header = received(near, 20).await;
        assert_eq!(header[..8], *b"\0\x03\xe8\x89\x04\x55\x65\xa9");
        assert_eq!(header[8..12], code.to_be_bytes());
        let reply = u32::from_be_bytes(header[12..16].try_into().unwrap());
        let length = u32::from_be_bytes(header[16..].try_into().unwrap());
        all.push((reply, received(near, length as usize).await));
        if reply == 1 || reply & 0x8000_0000 != 0 {
            return all;
        }
    }
}

/// A client that has seen the greeting and sent its flags.
async fn greeted() -> (DuplexStream, JoinHandle<Result<(), ServeError>>) {
    let (mut near, served) = start(&disk());
    assert_eq!(received(&mut near, 18).await, GREETING);
    near.write_all(FLAGS).await.unwrap();
    (near, served)
}

async fn ask(near: &mut DuplexStream, code: u32, payload: &[u8]) -> Vec<(u32, Vec<u8>)> {
    near.write_all(&option(code, payload)).await.unwrap();
    answers(near, code).await
}

/// The one refusal that an option gets.
async fn refusal(near: &mut DuplexStream, code: u32, payload: &[u8]) -> u32 {
    let answers = ask(near, code, payload).await;
    assert_eq!(answers.len(), 1, "option {code}: {answers:x?}");
    assert!(answers[0].1.len() < 900);
    answers[0].0
}

const UNSUP: u32 = 0x8000_0001;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;
const EXT_HEADER_REQD: u32 = 0x8000_000a;

#[tokio::test]
async fn go_tells_block_sizes_before_the_size() {
    let (mut near, _served) = greeted().await;
    ask(&mut near, 8, b"").await;
    let wanted = b"\0\0\0\x01d\0\x01\0\x01";
    for code in [6, 7] {
        let answers = ask(&mut near, code, wanted).await;
        let wanted: &[(u32, &[u8])] = &[
            (3, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0"),
            (3, b"\0\0\0\0\0\0\0\x01\0\0\x05\x87"),
            (3, b"\0\x02a disk in memory"),
            (3, b"\0\x01d"),
            (1, b""),
        ];
        let answers: Vec<_> = answers.iter().map(|(c, p)| (*c, p.as_slice())).collect();
        assert_eq!(answers, wanted);
    }
}

#[tokio::test]
async fn list_tells_names_and_descriptions_again_and_again() {
    let (mut near, _served) = greeted().await;
    for _ in 0..3 {
        let answers = ask(&mut near, 3, b"").await;
        assert_eq!(answers[0], (2, b"\0\0\0\x01da disk in memory".to_vec()));
        assert_eq!(answers[1].0, 2);
        assert_eq!(answers[2], (1, Vec::new()));
    }
}

#[tokio::test]
async fn unknown_options_are_refused_and_their_payload_is_passed_over() {
    let (mut near, served) = greeted().await;
    for code in [0, 4, 12, 99, u32::MAX] {
        assert_eq!(refusal(&mut near, code, b"").await, UNSUP, "{code}");
        assert_eq!(refusal(&mut near, code, &[b'I'; 60_000]).await, UNSUP);
        assert_eq!(refusal(&mut near, code, &[b'I'; 200_000]).await, UNSUP);
    }
    assert_eq!(ask(&mut near, 2, b"").await, [(1, Vec::new())]);
    in_time(served).await.unwrap().unwrap();
}

#[tokio::test]
async fn tls_that_is_not_set_up_is_refused_as_policy() {
    let (mut near, _served) = greeted().await;
    for length in [0, 1, 60_000, 200_000] {
        let payload = vec![b'I'; length];
        assert_eq!(refusal(&mut near, 5, &payload).await, POLICY, "{length}");
    }
    assert_eq!(ask(&mut near, 7, b"\0\0\0\x01d\0\0").await.len(), 4);
}

#[tokio::test]
async fn malformed_options_are_refused_and_the_handshake_goes_on() {
    let (mut near, _served) = greeted().await;
    assert_eq!(refusal(&mut near, 3, b"x").await, INVALID);
    assert_eq!(refusal(&mut near, 8, b"x").await, INVALID);
    assert_eq!(
        refusal(&mut near, 10, b"\0\0\0\x01d\0\0\0\0").await,
        INVALID
    );
    assert_eq!(ask(&mut near, 8, b"").await, [(1, Vec::new())]);
    assert_eq!(refusal(&mut near, 8, b"").await, INVALID);
    assert_eq!(refusal(&mut near, 11, b"x").await, INVALID);
    assert_eq!(ask(&mut near, 11, b"").await, [(1, Vec::new())]);
    assert_eq!(refusal(&mut near, 11, b"").await, INVALID);
    assert_eq!(refusal(&mut near, 8, b"").await, EXT_HEADER_REQD);
    for code in [6, 7] {
        assert_eq!(refusal(&mut near, code, b"").await, INVALID);
        assert_eq!(refusal(&mut near, code, b"\0\0\0\x01d\0\0x").await, INVALID);
        assert_eq!(
            refusal(&mut near, code, b"\0\0\0\x01d\0\x02\0\x03").await,
            INVALID
        );
        assert_eq!(
            refusal(&mut near, code, b"\xff\xff\xff\xffd\0\0").await,
            INVALID
        );
        assert_eq!(
            refusal(&mut near, code, b"\0\0\0\x02d\0\0\0").await,
            INVALID
        );
        assert_eq!(
            refusal(&mut near, code, b"\0\0\0\x01\xff\0\0").await,
            INVALID
        );
    }
    for code in [9, 10] {
        assert_eq!(
            refusal(&mut near, code, b"\0\0\0\x01d\xff\xff\xff\xff").await,
            INVALID
        );
        assert_eq!(
            refusal(&mut near, code, b"\0\0\0\x01d\0\0\0\0x").await,
            INVALID
        );
        assert_eq!(
            refusal(&mut near, code, b"\0\0\0\x01e\0\0\0\0").await,
            UNKNOWN
        );
    }
    for length in [256, 4096] {
        let name = vec![b'x'; length];
        let payload = [&(length as u32).to_be_bytes()[..], &name, b"\0\0"].concat();
        assert_eq!(refusal(&mut near, 6, &payload).await, UNKNOWN);
    }
    let payload = [&4097_u32.to_be_bytes()[..], &[b'x'; 4097], b"\0\0"].concat();
    assert_eq!(refusal(&mut near, 6, &payload).await, INVALID);
    assert_eq!(
        refusal(&mut near, 6, &vec![0; (64 << 10) + 1]).await,
        TOO_BIG
    );
    assert_eq!(ask(&mut near, 7, b"\0\0\0\x01d\0\0").await.len(), 4);
}

fn contexts(answers: &[(u32, Vec<u8>)]) -> Vec<(u32, &str)> {
    let found = answers.iter().filter(|(code, _)| *code == 4);
    found
        .map(|(_, payload)| {
            let id = u32::from_be_bytes(payload[..4].try_into().unwrap());
            (id, std::str::from_utf8(&payload[4..]).unwrap())
        })
        .collect()
}

fn queries(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = (export.len() as u32).to_be_bytes().to_vec();
    bytes.extend(export.as_bytes());
    bytes.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        bytes.extend((query.len() as u32).to_be_bytes());
        bytes.extend(query.as_bytes());
    }
    bytes
}

#[tokio::test]
async fn contexts_are_listed_by_beginning_and_chosen_by_name() {
    let (mut near, _served) = greeted().await;
    let base = "base:allocation";
    let dirty = "qemu:dirty-bitmap:b";
    for (asked, told) in [
        (&[][..], &[base, dirty][..]),
        (&["base:"], &[base]),
        (&["qemu:"], &[dirty]),
        (&["qemu:dirty-bitmap:"], &[dirty]),
        (&[dirty, dirty, "qemu:"], &[dirty]),
        (&["base:alloc", "x:", "", "qemu:dirty-bitmap"], &[]),
    ] {
        let answers = ask(&mut near, 9, &queries("d", asked)).await;
        let wanted: Vec<_> = told.iter().map(|name| (0, *name)).collect();
        assert_eq!(contexts(&answers), wanted, "{asked:?}");
    }
    ask(&mut near, 8, b"").await;
    for (asked, told) in [
        (&[dirty, base][..], &[(0, base), (1, dirty)][..]),
        (&[dirty, dirty], &[(1, dirty)]),
        (&["base:", "qemu:", "other"], &[]),
        (&[], &[]),
    ] {
        let answers = ask(&mut near, 10, &queries("d", asked)).await;
        assert_eq!(contexts(&answers), told, "{asked:?}");
    }
}

/// Whether block status works on a connection that sent these options and then GO.
async fn has_contexts(options: &[(u32, Vec<u8>)]) -> bool {
    let (mut near, _served) = greeted().await;
    ask(&mut near, 8, b"").await;
    for (code, payload) in options {
        ask(&mut near, *code, payload).await;
    }
    ask(&mut near, 7, b"\0\0\0\x01d\0\0").await;
    near.write_all(b"\x25\x60\x95\x13\0\0\0\x07cookie!!\0\0\0\0\0\0\0\0\0\0\x10\0")
        .await
        .unwrap();
    let header = received(&mut near, 20).await;
    assert_eq!(header[8..16], *b"cookie!!");
    match (header[6], header[7]) {
        (0, 5) => true,
        (0x80, 1) => false,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn failed_choice_of_contexts_voids_the_one_before() {
    let good = (10, queries("d", &["base:allocation"]));
    assert!(has_contexts(std::slice::from_ref(&good)).await);
    assert!(
        has_contexts(&[
            good.clone(),
            (3, Vec::new()),
            (6, b"\0\0\0\x01d\0\0".to_vec())
        ])
        .await
    );
    assert!(!has_contexts(&[(10, queries("other", &["base:allocation"]))]).await);
    assert!(!has_contexts(&[]).await);
    assert!(!has_contexts(&[good.clone(), (10, queries("d", &[]))]).await);
    assert!(!has_contexts(&[good.clone(), (10, queries("e", &["base:allocation"]))]).await);
    assert!(!has_contexts(&[good, (10, b"junk".to_vec())]).await);
}

#[tokio::test]
async fn export_name_works_with_and_without_the_zero_bytes() {
    for (flags, zeros) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let (mut near, _served) = start(&disk());
        received(&mut near, 18).await;
        near.write_all(&[0, 0, 0, flags]).await.unwrap();
        near.write_all(&option(1, b"d")).await.unwrap();
        let answer = received(&mut near, 10 + zeros).await;
        assert_eq!(answer[..10], *b"\0\0\0\0\0\x01\0\0\x05\x07");
        assert!(answer[10..].iter().all(|byte| *byte == 0));
        // Nothing may follow before the first request.
        near.write_all(b"\x25\x60\x95\x13\0\0\0\x03cookie!!\0\0\0\0\0\0\0\0\0\0\0\0")
            .await
            .unwrap();
        assert_eq!(
            received(&mut near, 16).await,
            b"\x67\x44\x66\x98\0\0\0\0cookie!!"
        );
    }
}

#[tokio::test]
async fn client_that_cannot_be_answered_is_hung_up_on() {
    let long_name = [&b"IHAVEOPT\0\0\0\x01"[..], &u32::MAX.to_be_bytes()].concat();
    for (sent, what) in [
        (b"\0\0\0\x07".to_vec(), "an unknown flag"),
        (b"\x80\0\0\x03".to_vec(), "another unknown flag"),
        (
            joined(&[b"\0\0\0\x02", STRUCTURED]),
            "an option without fixed newstyle",
        ),
        (joined(&[FLAGS, &option(1, b"third")]), "an unknown export"),
        (
            joined(&[FLAGS, &option(1, b"\xff")]),
            "a name that is no name",
        ),
        (joined(&[FLAGS, &option(1, &[b'x'; 4097])]), "a long name"),
        (
            joined(&[FLAGS, &option(11, b""), &option(1, b"d")]),
            "EXPORT_NAME after EXTENDED_HEADERS",
        ),
        (joined(&[FLAGS, &long_name]), "an endless name"),
        (
            joined(&[FLAGS, b"IHAVEOPT\0\0\0\x63\x02\0\0\x01"]),
            "an option of 32 MiB + 1",
        ),
        (
            joined(&[FLAGS, b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"]),
            "an endless option",
        ),
        (
            joined(&[FLAGS, b"IHAVEOPS\0\0\0\x07\0\0\0\0"]),
            "a wrong magic",
        ),
        (
            joined(&[FLAGS, &STRUCTURED.repeat(1001)]),
            "too many options",
        ),
    ] {
        let (mut near, served) = start(&disk());
        near.write_all(&sent).await.unwrap();
        let fault = in_time(served).await.unwrap();
        assert!(
            matches!(fault, Err(ServeError::Session(_))),
            "{what}: {fault:?}"
        );
    }
}

#[tokio::test]
async fn client_says_goodbye_with_any_payload() {
    for payload in [&[][..], b"reason", &[7; 100_000]] {
        let (mut near, served) = greeted().await;
        assert_eq!(ask(&mut near, 2, payload).await, [(1, Vec::new())]);
        in_time(served).await.unwrap().unwrap();
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn client_hangs_up_after_each_byte_or_cuts_the_stream_there() {
    let script = joined(&[
        FLAGS,
        STRUCTURED,
        &option(3, b""),
        &option(10, &queries("d", &["base:allocation"])),
        &option(99, b"what"),
        &option(7, b"\0\0\0\x01d\0\0"),
        b"\x25\x60\x95\x13\0\0\0\0cookie!!\0\0\0\0\0\0\0\0\0\0\x10\0",
        b"\x25\x60\x95\x13\0\0\0\x07cookie!!\0\0\0\0\0\0\0\0\0\0\x10\0",
        b"\x25\x60\x95\x13\0\0\0\x01cookie!!\0\0\0\0\0\0\0\0\0\0\0\x04junk",
        b"\x25\x60\x95\x13\0\0\0\x02cookie!!\0\0\0\0\0\0\0\0\0\0\0\0",
    ]);
    let handshake = script.len() - 4 * 28 - 4;
    let mut whole = Vec::new();
    for cut in (0..=script.len()).rev() {
        let disk = disk();
        let (mut near, served) = start(&disk);
        near.write_all(&script[..cut]).await.unwrap();
        near.shutdown().await.unwrap();
        let mut told = Vec::new();
        in_time(near.read_to_end(&mut told)).await.unwrap();
        let _ = in_time(served).await.unwrap();
        if cut < handshake {
            assert_eq!(disk.reads.load(Ordering::SeqCst), 0, "{cut}");
        }
        if cut == script.len() {
            whole = told;
        } else {
            assert!(whole.len() >= told.len());
        }
        // The same stream in two pieces.
        let (mut near, served) = start(&disk);
        near.write_all(&script[..cut]).await.unwrap();
        for _ in 0..5 {
            tokio::task::yield_now().await;
        }
        near.write_all(&script[cut..]).await.unwrap();
        let mut told = Vec::new();
        in_time(near.read_to_end(&mut told)).await.unwrap();
        in_time(served).await.unwrap().unwrap();
        assert_eq!(told.len(), whole.len(), "{cut}");
    }
    assert!(whole.starts_with(&joined(&[GREETING, ACK_STRUCTURED])));
}

#[tokio::test(start_paused = true)]
async fn client_that_dawdles_in_the_handshake_is_hung_up_on() {
    let (mut near, served) = start(&disk());
    near.write_all(FLAGS).await.unwrap();
    near.write_all(&STRUCTURED[..15]).await.unwrap();
    let fault = served.await.unwrap();
    assert!(
        matches!(fault, Err(ServeError::HandshakeTimedOut(wait)) if wait == Duration::from_secs(10))
    );
    drop(near);
}

#[tokio::test]
async fn idle_clients_neither_keep_others_out_for_long_nor_the_server_from_stopping() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let exports = vec![("d".to_owned(), disk() as _)];
    let options = ServerOptions {
        max_connections: 3,
        handshake_timeout: Duration::from_millis(100),
        ..ServerOptions::default()
    };
    let server = Server::new(exports, options).unwrap();
    let listener = Listener::bind(&Endpoint::Unix(path.clone())).await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serve = async move {
        let stopped = async {
            let _ = stopped.await;
        };
        server.serve(listener, stopped).await;
    };
    let served = tokio::spawn(serve);
    let mut idle = Vec::new();
    for _ in 0..20 {
        idle.push(UnixStream::connect(&path).await.unwrap());
    }
    let mut client = UnixStream::connect(&path).await.unwrap();
    client.write_all(&joined(&[FLAGS, ABORT])).await.unwrap();
    let mut told = Vec::new();
    in_time(client.read_to_end(&mut told)).await.unwrap();
    assert_eq!(told.len(), 38);
    idle.push(UnixStream::connect(&path).await.unwrap());
    stop.send(()).unwrap();
    in_time(served).await.unwrap();
}
