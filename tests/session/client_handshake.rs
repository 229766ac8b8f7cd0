//! Our client against servers that answer the handshake oddly, wrongly or not at all.

use std::time::Duration;

use nbdbackup::nbd::client::{Client, ClientError, ClientErrorKind, Phase};
use nbdbackup::nbd::session::{PeerIncompatible, PeerMisbehaved};
use nbdbackup::range::ByteRange;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::script::{
    CLIENT, SIMPLE, STRUCTURED, chunk, client_of, data, in_time, joined, options, received,
};

async fn fault_of(bytes: &[u8]) -> ClientError {
    let fault = client_of(bytes).await.0.err().expect("the client took it");
    assert_eq!(fault.phase, Phase::Handshake);
    fault
}

/// The script with one of its messages replaced.
fn with(script: &[&[u8]], at: usize, message: &[u8]) -> Vec<u8> {
    let mut script = script.to_vec();
    script[at] = message;
    joined(&script)
}

#[tokio::test]
async fn what_the_server_tells_is_understood() {
    let (client, _far) = client_of(&joined(STRUCTURED)).await;
    let client = client.unwrap();
    let export = client.export();
    assert_eq!(export.size_bytes, 0x10000);
    assert_eq!(export.contexts, ["base:allocation"]);
    assert_eq!(export.block_size.min(), 512);
    assert_eq!(export.block_size.max(), 65536);
    assert!(export.structured);
    assert_eq!(export.name, "d");
}

#[tokio::test]
async fn server_knows_no_structured_replies() {
    let (client, _far) = client_of(&joined(SIMPLE)).await;
    let client = client.unwrap();
    assert!(!client.export().structured);
    assert!(client.export().contexts.is_empty());
    let all = ByteRange::first(512);
    let fault = client.block_status(all).await.unwrap_err();
    assert!(matches!(fault.kind, ClientErrorKind::Misuse(_)));
}

#[tokio::test]
async fn server_grants_no_context_or_refuses_all() {
    for answer in [
        &b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x01\0\0\0\0"[..],
        b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\x80\0\0\x01\0\0\0\x02no",
    ] {
        let script = [&STRUCTURED[..3], &[answer], &STRUCTURED[5..]].concat();
        let client = client_of(&joined(&script)).await.0.unwrap();
        assert!(client.export().contexts.is_empty());
        assert!(client.export().structured);
    }
}

#[tokio::test]
async fn server_knows_no_go() {
    let unsup = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x01\0\0\0\0";
    let export = b"\0\0\0\0\0\x02\0\0\0\x03";
    let script = [&STRUCTURED[..5], &[unsup, export]].concat();
    let (client, mut far) = client_of(&joined(&script)).await;
    let client = client.unwrap();
    assert_eq!(client.export().size_bytes, 0x20000);
    let sent = received(&mut far, joined(CLIENT).len() + 17).await;
    assert!(sent.ends_with(b"IHAVEOPT\0\0\0\x01\0\0\0\x01d"));
}

#[tokio::test]
async fn server_is_not_fixed_newstyle() {
    let mut script = b"NBDMAGICIHAVEOPT\0\0\0\0\0\0\0\x02\0\0\0\x03".to_vec();
    script.extend([0; 124]);
    let (client, mut far) = client_of(&script).await;
    assert_eq!(client.unwrap().export().size_bytes, 0x20000);
    let sent = received(&mut far, 21).await;
    assert_eq!(sent, b"\0\0\0\0IHAVEOPT\0\0\0\x01\0\0\0\x01d");
}

#[tokio::test]
async fn server_refuses_the_export() {
    let refusal = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x06\0\0\0\x08no \x1b[2mx";
    let script = [&STRUCTURED[..5], &[refusal]].concat();
    let fault = fault_of(&joined(&script)).await;
    match &fault.kind {
        ClientErrorKind::Refused(refused) => assert_eq!(refused.text, "no \x1b[2mx"),
        other => panic!("{other}"),
    }
    let shown = fault.to_string();
    assert!(
        !shown.contains('\x1b') && shown.contains("ERR_UNKNOWN"),
        "{shown}"
    );
}

#[tokio::test]
async fn server_is_no_nbd_server() {
    let fault = fault_of(b"SSH-2.0-OpenSSH_9.2p1 Debian").await;
    assert!(matches!(fault.kind, ClientErrorKind::Decode(_)));
    let fault = fault_of(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0\0\0\0\0\0\0").await;
    assert!(matches!(
        fault.kind,
        ClientErrorKind::Incompatible(PeerIncompatible::Oldstyle)
    ));
}

#[tokio::test]
async fn server_answers_wrongly() {
    let go = |code: &[u8; 4], payload: &[u8]| {
        let mut message = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07".to_vec();
        message.extend(code);
        message.extend((payload.len() as u32).to_be_bytes());
        message.extend(payload);
        message
    };
    let size = |size: u64| [&[0, 0][..], &size.to_be_bytes(), &[0, 0x8f]].concat();
    for (bytes, what) in [
        (with(STRUCTURED, 2, STRUCTURED[7]), "another option"),
        (
            with(
                STRUCTURED,
                2,
                b"\0\x03\xe8\x89\x04\x55\x65\xaa\0\0\0\x08\0\0\0\x01\0\0\0\0",
            ),
            "a wrong magic",
        ),
        (
            with(
                STRUCTURED,
                2,
                b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\xff\xff\xff\xff",
            ),
            "an endless answer",
        ),
        (
            with(
                STRUCTURED,
                3,
                b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x0a\0\0\0\x04\0\0\0\x07\0\0\0\x05a:b",
            ),
            "a context not asked for",
        ),
        (
            joined(&[&STRUCTURED[..4], &STRUCTURED[3..]].concat()),
            "a context twice",
        ),
        (
            with(STRUCTURED, 6, &go(b"\0\0\0\x63", b"")),
            "an unknown code",
        ),
        (with(STRUCTURED, 6, b""), "no size"),
        (
            with(STRUCTURED, 6, &go(b"\0\0\0\x03", &size(1 << 63))),
            "2^63",
        ),
        (
            with(STRUCTURED, 6, &go(b"\0\0\0\x03", &size(u64::MAX))),
            "2^64",
        ),
        (
            with(STRUCTURED, 6, &go(b"\0\0\0\x03", b"\0\0\0")),
            "half a size",
        ),
        (
            with(
                STRUCTURED,
                5,
                &go(b"\0\0\0\x03", b"\0\x03\0\0\0\x03\0\0\x10\0\0\x01\0\0"),
            ),
            "a block size of 3",
        ),
    ] {
        let fault = fault_of(&bytes).await;
        assert!(
            matches!(
                fault.kind,
                ClientErrorKind::Decode(_) | ClientErrorKind::Misbehaved(_)
            ),
            "{what}: {fault}"
        );
    }
}

#[tokio::test]
async fn server_answers_without_end() {
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let endless = async {
        far.write_all(&joined(&STRUCTURED[..5])).await.unwrap();
        while far.write_all(STRUCTURED[6]).await.is_ok() {}
    };
    let client = async {
        let options = options();
        Client::over(near, "d", &options).await.err()
    };
    let (fault, ()) = in_time(async { tokio::join!(client, endless) }).await;
    assert!(matches!(
        fault.unwrap().kind,
        ClientErrorKind::Misbehaved(PeerMisbehaved::TooManyAnswers { .. })
    ));
}

#[tokio::test]
async fn server_hangs_up_after_each_byte() {
    let reply = [
        data(false, 0, &[7; 512]),
        chunk(true, 2, b"\0\0\0\0\0\0\x02\0\0\0\x02\0"),
    ]
    .concat();
    let mut script = joined(STRUCTURED);
    let handshake = script.len();
    script.extend(reply);
    for end in 0..=script.len() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        far.write_all(&script[..end]).await.unwrap();
        far.shutdown().await.unwrap();
        let ended = in_time(async {
            let client = Client::over(near, "d", &options()).await?;
            client.read(ByteRange::first(1024), Vec::new()).await
        })
        .await;
        match ended {
            Ok(reply) => {
                assert_eq!(end, script.len());
                assert_eq!(reply.data[..512], [7; 512]);
            }
            Err(fault) => {
                assert!(
                    matches!(fault.kind, ClientErrorKind::Closed),
                    "{end}: {fault}"
                );
                let phase = match end < handshake {
                    true => Phase::Handshake,
                    false => Phase::Transmission,
                };
                assert_eq!(fault.phase, phase, "{end}");
            }
        }
    }
}

#[tokio::test]
async fn stream_may_be_cut_at_any_place() {
    let mut script = joined(STRUCTURED);
    script.extend(data(false, 0, &[7; 700]));
    script.extend(chunk(true, 2, b"\0\0\0\0\0\0\x02\xbc\0\0\x01\x44"));
    for cut in 0..script.len() {
        let (near, mut far) = tokio::io::duplex(if cut == 0 { 1 } else { 1 << 20 });
        let (first, rest) = script.split_at(cut);
        let server = async {
            far.write_all(first).await.unwrap();
            for _ in 0..5 {
                tokio::task::yield_now().await;
            }
            far.write_all(rest).await.unwrap();
            let mut sent = Vec::new();
            let _ = far.read_to_end(&mut sent).await;
        };
        let client = async {
            let client = Client::over(near, "d", &options()).await.unwrap();
            let reply = client
                .read(ByteRange::first(1024), Vec::new())
                .await
                .unwrap();
            drop(client);
            reply
        };
        // With a pipe of one byte the server must read while it writes.
        let reply = match cut {
            0 => {
                let (near, far) = tokio::io::duplex(1);
                one_byte_at_a_time(near, far, &script).await
            }
            _ => in_time(async { tokio::join!(client, server) }).await.0,
        };
        assert_eq!(reply.data.len(), 1024);
        assert_eq!(reply.data[..700], [7; 700]);
        assert_eq!(reply.data[700..], [0; 324]);
        assert_eq!(reply.holes, [ByteRange::new(700, 1024).unwrap()]);
    }
}

async fn one_byte_at_a_time(
    near: tokio::io::DuplexStream,
    far: tokio::io::DuplexStream,
    script: &[u8],
) -> nbdbackup::nbd::client::ReadReply {
    let (mut read, mut write) = tokio::io::split(far);
    let server = async {
        tokio::join!(
            async {
                write.write_all(script).await.unwrap();
                write.shutdown().await.unwrap();
            },
            async {
                let mut sent = Vec::new();
                let _ = read.read_to_end(&mut sent).await;
            }
        )
    };
    let client = async {
        let client = Client::over(near, "d", &options()).await.unwrap();
        client
            .read(ByteRange::first(1024), Vec::new())
            .await
            .unwrap()
    };
    in_time(async { tokio::join!(client, server) }).await.0
}

#[tokio::test(start_paused = true)]
async fn server_never_greets() {
    let (near, _far) = tokio::io::duplex(100);
    let mut options = options();
    options.connect_timeout = Duration::from_secs(7);
    let fault = Client::over(near, "d", &options).await.err().unwrap();
    assert!(matches!(
        fault.kind,
        ClientErrorKind::TimedOut { after, .. } if after == Duration::from_secs(7)
    ));
}
