//! Our client where TLS is wanted, against servers that refuse it, put words in before it, or break it off.

use std::path::PathBuf;
use std::sync::Arc;

use nbdbackup::nbd::client::{Client, ClientError, ClientErrorKind, ClientOptions, Phase, list};
use nbdbackup::nbd::session::PeerIncompatible;
use nbdbackup::nbd::tls::TlsError;
use nbdbackup::nbd::uri::{Endpoint, NbdUri, TlsParameters};
use nbdbackup::range::ByteRange;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::certificates::Authority;
use crate::script::{CLIENT, STRUCTURED, data, in_time, joined};

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
const ACK: &[u8] = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0";
const FLAGS: &[u8] = b"\0\0\0\x03";
const STARTTLS: &[u8] = b"IHAVEOPT\0\0\0\x05\0\0\0\0";
const ABORT: &[u8] = b"IHAVEOPT\0\0\0\x02\0\0\0\0";

/// A place where a test's server listens, and the certificates to trust.
struct Place {
    _folder: TempDir,
    authority: Authority,
    socket: PathBuf,
    listener: UnixListener,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        Self {
            authority: Authority::with_both(folder.path().join("pki")),
            listener: UnixListener::bind(&socket).unwrap(),
            socket,
            _folder: folder,
        }
    }

    fn uri(&self) -> NbdUri {
        NbdUri {
            endpoint: Endpoint::Unix(self.socket.clone()),
            export: "d".into(),
            tls: Some(TlsParameters {
                certificates: Some(self.authority.folder.clone()),
                ..TlsParameters::default()
            }),
        }
    }

    async fn connect(&self) -> Result<Client, ClientError> {
        let options = ClientOptions {
            contexts: vec!["base:allocation".into()],
            ..ClientOptions::default()
        };
        in_time(Client::connect(&self.uri(), &options)).await
    }

    /// Sends a script to a client, and returns what it did and how it took it.
    async fn fails(&self, script: &[u8]) -> (ClientError, Vec<u8>) {
        let server = async {
            let mut stream = self.listener.accept().await.unwrap().0;
            stream.write_all(script).await.unwrap();
            let mut sent = Vec::new();
            // A client that leaves bytes unread resets the connection.
            let _ = stream.read_to_end(&mut sent).await;
            sent
        };
        let (client, sent) = tokio::join!(self.connect(), server);
        let fault = client.err().expect("the client took it");
        (fault, sent)
    }

    /// Accepts a client and goes through the handshake of NBD and TLS with it.
    async fn secured(&self) -> TlsStream<UnixStream> {
        let mut stream = self.listener.accept().await.unwrap().0;
        stream.write_all(GREETING).await.unwrap();
        let mut sent = vec![0; FLAGS.len() + STARTTLS.len()];
        stream.read_exact(&mut sent).await.unwrap();
        assert_eq!(sent, [FLAGS, STARTTLS].concat());
        stream.write_all(ACK).await.unwrap();
        let file = |name| std::fs::read(self.authority.file(name)).unwrap();
        let chain = CertificateDer::from_pem_slice(&file("server-cert.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_slice(&file("server-key.pem")).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![chain], key);
        let acceptor = TlsAcceptor::from(Arc::new(config.unwrap()));
        acceptor.accept(stream).await.unwrap()
    }
}

fn refusal(code: u32) -> Vec<u8> {
    let mut bytes = GREETING.to_vec();
    bytes.extend(&ACK[..12]);
    bytes.extend(code.to_be_bytes());
    bytes.extend(b"\0\0\0\x02no");
    bytes
}

#[tokio::test]
async fn server_refuses_tls_in_each_way_and_hears_nothing_more() {
    let place = Place::new();
    for code in (0x8000_0001..=0x8000_000a).chain([0xffff_ffff]) {
        let (fault, sent) = place.fails(&refusal(code)).await;
        match &fault.kind {
            ClientErrorKind::Refused(refused) => assert_eq!(refused.code.0, code),
            _ => panic!("{fault}"),
        }
        assert!(fault.to_string().contains("STARTTLS"), "{fault}");
        assert_eq!(sent, [FLAGS, STARTTLS, ABORT].concat(), "{code:x}");
    }
}

#[tokio::test]
async fn server_refuses_tls_to_a_client_that_lists() {
    let place = Place::new();
    let server = async {
        let mut stream = place.listener.accept().await.unwrap().0;
        stream.write_all(&refusal(0x8000_0002)).await.unwrap();
        let mut sent = Vec::new();
        let _ = stream.read_to_end(&mut sent).await;
        sent
    };
    let (uri, options) = (place.uri(), ClientOptions::default());
    let (listed, sent) = tokio::join!(in_time(list(&uri, &options)), server);
    assert!(matches!(
        listed.unwrap_err().kind,
        ClientErrorKind::Refused(_)
    ));
    assert_eq!(sent, [FLAGS, STARTTLS, ABORT].concat());
}

#[tokio::test]
async fn server_is_too_old_for_tls() {
    let place = Place::new();
    let mut unfixed = b"NBDMAGICIHAVEOPT\0\0\0\0\0\0\0\x02\0\0\0\x03".to_vec();
    unfixed.extend([0; 124]);
    let (fault, sent) = place.fails(&unfixed).await;
    assert!(
        matches!(
            fault.kind,
            ClientErrorKind::Incompatible(PeerIncompatible::NotFixed { .. })
        ),
        "{fault}"
    );
    assert_eq!(sent, b"\0\0\0\0");
    let mut oldstyle = b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0\0\0\0\x02\0\0\0\0\0\x03".to_vec();
    oldstyle.extend([0; 124]);
    let (fault, sent) = place.fails(&oldstyle).await;
    assert!(
        matches!(
            fault.kind,
            ClientErrorKind::Incompatible(PeerIncompatible::Oldstyle)
        ),
        "{fault}"
    );
    assert!(sent.is_empty());
}

#[tokio::test]
async fn server_answers_something_else_than_starttls() {
    let place = Place::new();
    let with_payload = [&ACK[..16], b"\0\0\0\x01x"].concat();
    let information = [&ACK[..12], b"\0\0\0\x03\0\0\0\0"].concat();
    for answer in [
        STRUCTURED[1],
        STRUCTURED[6],
        with_payload.as_slice(),
        information.as_slice(),
    ] {
        // What else it says, as if all were well.
        let script = [GREETING, answer, &joined(&STRUCTURED[1..])].concat();
        let (fault, sent) = place.fails(&script).await;
        assert!(
            matches!(fault.kind, ClientErrorKind::Misbehaved(_)),
            "{fault}"
        );
        assert_eq!(sent, [FLAGS, STARTTLS].concat());
    }
}

#[tokio::test]
async fn words_put_in_behind_the_acknowledgement_are_never_taken_for_the_server_s() {
    let place = Place::new();
    let script = [GREETING, ACK, &joined(&STRUCTURED[1..])].concat();
    let (fault, sent) = place.fails(&script).await;
    assert!(
        matches!(fault.kind, ClientErrorKind::Tls(TlsError::Handshake { .. })),
        "{fault}"
    );
    let clear = FLAGS.len() + STARTTLS.len();
    assert_eq!(sent[..clear], [FLAGS, STARTTLS].concat());
    // All that follows are TLS records: a handshake, and perhaps an alert.
    assert_eq!(sent[clear], 0x16);
    assert!(!sent[clear..].windows(8).any(|w| w == b"IHAVEOPT"));
}

#[tokio::test]
async fn server_hangs_up_before_in_and_right_after_the_tls_handshake() {
    let place = Place::new();
    for script in [&b""[..], GREETING, &[GREETING, &ACK[..19]].concat()] {
        let server = async {
            let mut stream = place.listener.accept().await.unwrap().0;
            stream.write_all(script).await.unwrap();
            stream.shutdown().await.unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let (client, ()) = tokio::join!(place.connect(), server);
        let fault = client.err().unwrap();
        assert!(matches!(fault.kind, ClientErrorKind::Closed), "{fault}");
    }
    let server = async {
        let mut stream = place.listener.accept().await.unwrap().0;
        let script = [GREETING, ACK].concat();
        stream.write_all(&script).await.unwrap();
        stream.shutdown().await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    };
    let (client, ()) = tokio::join!(place.connect(), server);
    assert_rejected(&client.err().unwrap());
    // Once with TLS's goodbye, once without.
    for goodbye in [true, false] {
        let server = async {
            let mut stream = place.secured().await;
            if goodbye {
                stream.shutdown().await.unwrap();
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        };
        let (client, ()) = tokio::join!(place.connect(), server);
        assert_rejected(&client.err().unwrap());
    }
}

fn assert_rejected(fault: &ClientError) {
    assert!(
        matches!(fault.kind, ClientErrorKind::Tls(TlsError::Rejected { .. })),
        "{fault}"
    );
    assert_eq!(fault.phase, Phase::Handshake);
}

/// Serves the handshake of the scripted export over TLS.
async fn opened(place: &Place) -> TlsStream<UnixStream> {
    let mut stream = place.secured().await;
    stream.write_all(&joined(&STRUCTURED[1..])).await.unwrap();
    stream.flush().await.unwrap();
    stream
}

#[tokio::test]
async fn stream_that_is_cut_within_a_reply_is_no_reply() {
    let place = Place::new();
    let reply = data(true, 0, &[7; 512]);
    for goodbye in [true, false] {
        for end in [0, 10, reply.len() - 1, reply.len()] {
            let server = async {
                let mut stream = opened(&place).await;
                let mut sent = vec![0; 28 + joined(CLIENT).len() - FLAGS.len()];
                stream.read_exact(&mut sent).await.unwrap();
                stream.write_all(&reply[..end]).await.unwrap();
                stream.flush().await.unwrap();
                if goodbye {
                    let _ = stream.shutdown().await;
                }
            };
            let client = async {
                let client = place.connect().await.unwrap();
                in_time(client.read(ByteRange::first(512), Vec::new())).await
            };
            let (read, ()) = tokio::join!(client, server);
            match read {
                Ok(read) => {
                    assert_eq!(end, reply.len());
                    assert_eq!(read.data, [7; 512]);
                }
                Err(fault) => {
                    assert!(end < reply.len(), "{fault}");
                    assert!(matches!(fault.kind, ClientErrorKind::Closed), "{fault}");
                }
            }
        }
    }
}

#[tokio::test]
async fn server_that_leaves_without_tls_s_goodbye_after_ours_is_no_fault() {
    let place = Place::new();
    let server = async {
        let mut stream = opened(&place).await;
        let mut sent = vec![0; 28 + joined(CLIENT).len() - FLAGS.len()];
        stream.read_exact(&mut sent).await.unwrap();
        assert_eq!(sent[sent.len() - 22..][..2], [0, 2], "no DISC");
    };
    let client = async {
        let client = place.connect().await.unwrap();
        in_time(client.close()).await
    };
    let (closed, ()) = tokio::join!(client, server);
    closed.unwrap();
}
