//! Our client against servers that reply wrongly, late or never.

use std::time::Duration;

use nbdbackup::nbd::client::{Client, ClientError, ClientErrorKind, ReadReply};
use nbdbackup::nbd::session::PeerMisbehaved as Fault;
use nbdbackup::nbd::wire::ErrorCode;
use nbdbackup::range::ByteRange;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::Instant;

use crate::script::{
    SIMPLE, chunk, client_of, data, hole, in_time, joined, options, received, structured,
};

const AT: u64 = 0x2000;

fn asked() -> ByteRange {
    ByteRange::at(AT, 0x400).unwrap()
}

/// Reads 1 KiB at 8 KiB from a server that replies with these bytes.
async fn read(reply: &[u8]) -> Result<ReadReply, ClientError> {
    let (client, mut far) = structured().await;
    far.write_all(reply).await.unwrap();
    let found = in_time(client.read(asked(), Vec::new())).await;
    assert_eq!(
        received(&mut far, 28).await,
        b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0\x04\0"
    );
    found
}

async fn misbehaved(reply: &[u8]) -> Fault {
    match read(reply).await.expect_err("the client took it").kind {
        ClientErrorKind::Misbehaved(fault) => fault,
        other => panic!("{other}"),
    }
}

/// Asks for the extents of 1 KiB at 8 KiB of a server that replies with these bytes.
async fn status(reply: &[u8]) -> Result<Vec<(u64, u64, u64)>, ClientErrorKind> {
    let (client, mut far) = structured().await;
    far.write_all(reply).await.unwrap();
    let lists = in_time(client.block_status(asked())).await;
    let lists = lists.map_err(|fault| fault.kind)?;
    assert_eq!(lists.len(), 1);
    let extents = lists[0].extents.iter();
    Ok(extents
        .map(|e| (e.range.start(), e.range.end(), e.flags))
        .collect())
}

async fn status_fault(reply: &[u8]) -> Fault {
    match status(reply).await.expect_err("the client took it") {
        ClientErrorKind::Misbehaved(fault) => fault,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn chunks_in_any_order_make_the_range() {
    let pieces = [
        hole(false, AT + 0x300, 0x80),
        data(false, AT + 0x200, &[3; 0x100]),
        data(false, AT, &[1; 0x100]),
        hole(false, AT + 0x100, 0x100),
        hole(true, AT + 0x380, 0x80),
    ];
    let reply = read(&pieces.concat()).await.unwrap();
    let mut wanted = vec![1; 0x100];
    wanted.extend([0; 0x100]);
    wanted.extend([3; 0x100]);
    wanted.extend([0; 0x100]);
    assert_eq!(reply.data, wanted);
    let r = |a, b| ByteRange::new(AT + a, AT + b).unwrap();
    assert_eq!(reply.holes, [r(0x100, 0x200), r(0x300, 0x400)]);
}

#[tokio::test]
async fn end_of_a_reply_may_be_a_chunk_of_its_own() {
    let reply = [data(false, AT, &[9; 0x400]), chunk(true, 0, b"")].concat();
    assert_eq!(read(&reply).await.unwrap().data, [9; 0x400]);
}

#[tokio::test]
async fn server_ends_a_read_before_all_bytes_came() {
    for reply in [
        data(true, AT, &[1; 0x200]),
        [data(false, AT, &[1; 0x3ff]), chunk(true, 0, b"")].concat(),
        chunk(true, 0, b""),
        hole(true, AT + 1, 0x3ff),
    ] {
        assert!(matches!(misbehaved(&reply).await, Fault::ShortRead { .. }));
    }
}

#[tokio::test]
async fn server_sends_bytes_that_were_not_asked_for() {
    for reply in [
        data(true, AT - 1, &[1; 0x400]),
        data(true, AT + 1, &[1; 0x400]),
        data(true, 0, &[1; 0x400]),
        hole(true, AT, 0x401),
        hole(true, AT, u32::MAX),
        data(true, AT + 0x400, &[1; 1]),
    ] {
        assert!(matches!(
            misbehaved(&reply).await,
            Fault::ChunkOutside { .. }
        ));
    }
    let reply = data(true, u64::MAX, &[1; 2]);
    assert!(matches!(
        misbehaved(&reply).await,
        Fault::ChunkPastEnd { .. }
    ));
}

#[tokio::test]
async fn server_sends_bytes_twice() {
    for second in [
        data(true, AT + 0x1ff, &[1; 0x201]),
        hole(true, AT, 1),
        data(true, AT, &[1; 0x400]),
    ] {
        let reply = [data(false, AT, &[1; 0x200]), second].concat();
        assert!(matches!(
            misbehaved(&reply).await,
            Fault::ChunkOverlap { .. }
        ));
    }
}

#[tokio::test]
async fn server_sends_chunks_of_wrong_lengths() {
    let claims = |kind: u8, length: u32| {
        let mut bytes = vec![0x66, 0x8e, 0x33, 0xef, 0, 1, 0, kind];
        bytes.extend([0; 8]);
        bytes.extend(length.to_be_bytes());
        bytes
    };
    for reply in [
        claims(0, 1),
        claims(1, 0),
        claims(1, 8),
        claims(1, 8 + 0x401),
        claims(1, u32::MAX),
        claims(2, 11),
        claims(2, 13),
        claims(2, u32::MAX),
        chunk(true, 0x8001, b"\0\0\0\x05\0"),
        chunk(true, 0x8001, &[0; 5000]),
        chunk(true, 0x8077, &[0; 5000]),
    ] {
        assert!(matches!(
            misbehaved(&reply).await,
            Fault::ChunkLength { .. }
        ));
    }
    assert!(matches!(
        misbehaved(&hole(true, AT, 0)).await,
        Fault::EmptyHole { .. }
    ));
    assert!(matches!(
        misbehaved(&chunk(false, 0, b"")).await,
        Fault::NoneWithoutDone
    ));
}

#[tokio::test]
async fn server_sends_chunks_of_wrong_types() {
    for kind in [3, 4, 6, 7, 99, 0x7fff] {
        let fault = misbehaved(&chunk(true, kind, b"12345678")).await;
        assert!(matches!(fault, Fault::UnknownChunk { .. }), "{kind}");
    }
    let extents = chunk(true, 5, b"\0\0\0\x05\0\0\x04\0\0\0\0\0");
    assert!(matches!(
        misbehaved(&extents).await,
        Fault::WrongChunk { .. }
    ));
    let bytes = data(true, AT, &[1; 0x400]);
    assert!(matches!(
        status_fault(&bytes).await,
        Fault::WrongChunk { .. }
    ));
}

#[tokio::test]
async fn server_replies_simply_to_a_read_under_structured_replies() {
    for code in [0, 5] {
        let mut reply = vec![0x67, 0x44, 0x66, 0x98, 0, 0, 0, code];
        reply.extend([0; 8 + 0x400]);
        assert!(matches!(
            misbehaved(&reply).await,
            Fault::SimpleReply { .. }
        ));
    }
}

#[tokio::test]
async fn server_replies_to_no_request() {
    for cookie in [1, 1 << 32, u64::MAX] {
        let mut reply = chunk(true, 0, b"");
        reply[8..16].copy_from_slice(&u64::to_be_bytes(cookie));
        let fault = misbehaved(&reply).await;
        assert!(matches!(fault, Fault::UnknownCookie { cookie: c } if c == cookie));
    }
}

#[tokio::test]
async fn server_replies_twice_to_one_request() {
    let (client, mut far) = structured().await;
    let reply = data(true, AT, &[1; 0x400]);
    far.write_all(&[reply.clone(), reply].concat())
        .await
        .unwrap();
    in_time(client.read(asked(), Vec::new())).await.unwrap();
    // Nobody waits for the second one, so only the next request can tell.
    let fault = in_time(client.read(asked(), Vec::new())).await.unwrap_err();
    assert!(matches!(
        fault.kind,
        ClientErrorKind::Misbehaved(Fault::UnknownCookie { .. })
    ));
    assert!(matches!(
        client.close().await.unwrap_err().kind,
        ClientErrorKind::Misbehaved(_)
    ));
}

#[tokio::test]
async fn server_sends_a_wrong_magic() {
    let fault = read(&[0x77; 20]).await.unwrap_err();
    assert!(matches!(fault.kind, ClientErrorKind::Decode(_)));
    let extended = b"\x6e\x8a\x27\x8c\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0\0";
    let fault = read(extended).await.unwrap_err();
    assert!(matches!(fault.kind, ClientErrorKind::Decode(_)));
}

#[tokio::test]
async fn server_fails_a_request_and_the_connection_lives_on() {
    let failures = [
        chunk(true, 0x8001, b"\0\0\0\x05\0\x03bad"),
        // The offset of an error that lies outside the request is dropped.
        chunk(true, 0x8002, b"\0\0\0\x05\0\x03bad\0\0\0\0\0\0\0\x01"),
        chunk(true, 0x8077, b"\0\0\0\x05\0\x03badwhatever"),
        [
            data(false, AT, &[1; 0x100]),
            chunk(false, 0x8001, b"\0\0\0\x05\0\x03bad"),
            data(false, AT + 0x100, &[1; 0x100]),
            chunk(true, 0x8001, b"\0\0\0\x16\0\x05later"),
        ]
        .concat(),
        [
            data(false, AT, &[1; 0x400]),
            chunk(true, 0x8001, b"\0\0\0\x05\0\x03bad"),
        ]
        .concat(),
    ];
    for failure in failures {
        let (client, mut far) = structured().await;
        far.write_all(&failure).await.unwrap();
        let fault = in_time(client.read(asked(), Vec::new())).await.unwrap_err();
        match fault.kind {
            ClientErrorKind::Request(failed) => {
                assert_eq!((failed.code, failed.text.as_str()), (ErrorCode::EIO, "bad"));
                assert_eq!(failed.offset, None);
            }
            other => panic!("{other}"),
        }
        // The slot's next cookie.
        let mut reply = data(true, AT, &[4; 0x400]);
        reply[8..16].copy_from_slice(b"\0\0\0\x01\0\0\0\0");
        far.write_all(&reply).await.unwrap();
        let reply = in_time(client.read(asked(), Vec::new())).await.unwrap();
        assert_eq!(reply.data, [4; 0x400]);
    }
}

#[tokio::test]
async fn server_names_the_place_of_a_fault_and_an_error_of_zero() {
    let reply = chunk(true, 0x8002, b"\0\0\0\x05\0\0\0\0\0\0\0\0\x21\0");
    match read(&reply).await.unwrap_err().kind {
        ClientErrorKind::Request(failed) => assert_eq!(failed.offset, Some(0x2100)),
        other => panic!("{other}"),
    }
    match read(&chunk(true, 0x8001, b"\0\0\0\0\0\0"))
        .await
        .unwrap_err()
        .kind
    {
        ClientErrorKind::Request(failed) => assert_eq!(failed.code, ErrorCode::EINVAL),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn server_sends_errors_without_end() {
    let reply: Vec<u8> = (0..70)
        .flat_map(|_| chunk(false, 0x8001, b"\0\0\0\x05\0\0"))
        .collect();
    assert!(matches!(
        misbehaved(&reply).await,
        Fault::TooManyErrors { .. }
    ));
}

#[tokio::test]
async fn extents_are_clamped_and_merged() {
    // 256 bytes of data, then a hole twice and far past the request.
    let reply = chunk(
        true,
        5,
        b"\0\0\0\x05\0\0\x02\0\0\0\0\0\0\0\0\x80\0\0\0\x03\xff\xff\xff\xff\0\0\0\x03",
    );
    assert_eq!(
        status(&reply).await.unwrap(),
        [(AT, AT + 0x200, 0), (AT + 0x200, AT + 0x400, 3)]
    );
    let short = chunk(true, 5, b"\0\0\0\x05\0\0\x02\x10\0\0\0\x01");
    assert_eq!(status(&short).await.unwrap(), [(AT, AT + 0x200, 1)]);
}

#[tokio::test]
async fn server_sends_a_status_that_makes_no_sense() {
    let good: &[u8] = b"\0\0\0\x05\0\0\x04\0\0\0\0\0";
    let unknown = chunk(true, 5, b"\0\0\0\x06\0\0\x04\0\0\0\0\0");
    assert!(matches!(
        status_fault(&unknown).await,
        Fault::UnknownContext { id: 6 }
    ));
    let twice = [chunk(false, 5, good), chunk(true, 5, good)].concat();
    assert!(matches!(
        status_fault(&twice).await,
        Fault::StatusTwice { id: 5 }
    ));
    assert!(matches!(
        status_fault(&chunk(true, 0, b"")).await,
        Fault::StatusMissing { id: 5, .. }
    ));
    assert!(matches!(
        status_fault(&chunk(true, 5, b"\0\0\0\x05")).await,
        Fault::NoExtent { id: 5 }
    ));
    let empty = chunk(true, 5, b"\0\0\0\x05\0\0\0\0\0\0\0\0");
    assert!(matches!(
        status_fault(&empty).await,
        Fault::EmptyExtent { id: 5, .. }
    ));
    let dust = chunk(true, 5, b"\0\0\0\x05\0\0\0\x10\0\0\0\0");
    assert!(matches!(
        status_fault(&dust).await,
        Fault::NoProgress { id: 5, .. }
    ));
    let odd = chunk(true, 5, b"\0\0\0\x05\0\0\x04\0\0\0\0");
    assert!(matches!(
        status(&odd).await,
        Err(ClientErrorKind::Decode(_))
    ));
    let wide = chunk(
        true,
        6,
        b"\0\0\0\x05\0\0\0\x01\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\0\0",
    );
    assert!(matches!(
        status_fault(&wide).await,
        Fault::UnknownChunk { .. }
    ));
    let simple = b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\0";
    assert!(matches!(
        status_fault(simple).await,
        Fault::SimpleReply { .. }
    ));
}

#[tokio::test]
async fn server_fails_a_status_even_late() {
    let good: &[u8] = b"\0\0\0\x05\0\0\x04\0\0\0\0\0";
    for reply in [
        [
            chunk(false, 5, good),
            chunk(true, 0x8001, b"\0\0\0\x05\0\0"),
        ]
        .concat(),
        b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\0".to_vec(),
    ] {
        match status(&reply).await {
            Err(ClientErrorKind::Request(failed)) => assert_eq!(failed.code, ErrorCode::EIO),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn simple_replies_carry_data_and_errors() {
    let (client, mut far) = client_of(&joined(SIMPLE)).await;
    let client = client.unwrap();
    let mut reply = b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    reply.extend([5; 0x400]);
    far.write_all(&reply).await.unwrap();
    let found = in_time(client.read(asked(), Vec::new())).await.unwrap();
    assert_eq!(found.data, [5; 0x400]);
    let error = b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\x01\0\0\0\0";
    far.write_all(error).await.unwrap();
    let fault = in_time(client.read(asked(), Vec::new())).await.unwrap_err();
    assert!(matches!(fault.kind, ClientErrorKind::Request(_)));
    far.write_all(&chunk(true, 0, b"")).await.unwrap();
    let fault = in_time(client.read(asked(), Vec::new())).await.unwrap_err();
    assert!(matches!(fault.kind, ClientErrorKind::Decode(_)));
}

#[tokio::test]
async fn server_hangs_up_and_every_waiting_request_hears_of_it() {
    let (client, far) = structured().await;
    let reads = (0..10).map(|_| client.read(asked(), Vec::new()));
    let hang_up = async move { drop(far) };
    let both = async { tokio::join!(futures::future::join_all(reads), hang_up) };
    for fault in in_time(both).await.0 {
        let fault = fault.unwrap_err();
        assert!(
            matches!(
                fault.kind,
                ClientErrorKind::Closed | ClientErrorKind::Io { .. }
            ),
            "{fault}"
        );
        assert!(fault.to_string().contains("\"d\""));
    }
}

fn impatient() -> nbdbackup::nbd::client::ClientOptions {
    let mut options = options();
    options.reply_timeout = Duration::from_secs(5);
    options
}

async fn impatient_client() -> (Client, DuplexStream) {
    let (near, mut far) = tokio::io::duplex(1 << 20);
    far.write_all(&joined(crate::script::STRUCTURED))
        .await
        .unwrap();
    let client = Client::over(near, "d", &impatient()).await.unwrap();
    (client, far)
}

#[tokio::test(start_paused = true)]
async fn server_falls_silent_before_a_reply_or_within_it() {
    for sent in [0, 100] {
        let (client, mut far) = impatient_client().await;
        tokio::time::sleep(Duration::from_secs(1000)).await;
        let start = Instant::now();
        let reply = data(true, AT, &[1; 0x400]);
        far.write_all(&reply[..sent]).await.unwrap();
        let fault = client.read(asked(), Vec::new()).await.unwrap_err();
        assert!(
            matches!(fault.kind, ClientErrorKind::TimedOut { .. }),
            "{fault}"
        );
        let waited = start.elapsed();
        assert!(
            (5..6).contains(&waited.as_secs()),
            "gave up after {waited:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn server_that_is_slow_but_sends_is_waited_for() {
    let (client, mut far) = impatient_client().await;
    let trickle = async {
        for byte in data(true, AT, &[1; 0x400]) {
            tokio::time::sleep(Duration::from_secs(4)).await;
            far.write_all(&[byte]).await.unwrap();
        }
    };
    let (reply, ()) = tokio::join!(client.read(asked(), Vec::new()), trickle);
    assert_eq!(reply.unwrap().data, [1; 0x400]);
}

#[tokio::test(start_paused = true)]
async fn client_says_goodbye_once_everything_has_come() {
    let (client, mut far) = structured().await;
    let read = client.read(asked(), Vec::new());
    assert!(
        tokio::time::timeout(Duration::from_millis(1), read)
            .await
            .is_err()
    );
    let close = tokio::spawn(client.close());
    let mut request = [0; 28];
    far.read_exact(&mut request).await.unwrap();
    let mut early = [0; 1];
    let nothing = tokio::time::timeout(Duration::from_secs(1), far.read(&mut early)).await;
    assert!(nothing.is_err(), "goodbye before the reply");
    far.write_all(&data(true, AT, &[1; 0x400])).await.unwrap();
    far.read_exact(&mut request).await.unwrap();
    assert_eq!(&request[..8], b"\x25\x60\x95\x13\0\0\0\x02");
    // The server does not hang up; the client does not wait for ever.
    close.await.unwrap().unwrap();
}
