//! Our server where TLS is wanted, against clients that want to go without it, and both our ends over TLS.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nbdbackup::nbd::client::{Client, ClientError, ClientErrorKind, ClientOptions, list};
use nbdbackup::nbd::server::{ServeError, Server, ServerOptions};
use nbdbackup::nbd::session::{PeerIncompatible, SessionError};
use nbdbackup::nbd::tls::{TlsError, TlsServer};
use nbdbackup::nbd::transport::Listener;
use nbdbackup::nbd::uri::{Endpoint, NbdUri, TlsParameters};
use nbdbackup::range::ByteRange;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::certificates::{Authority, Role, Says};
use crate::disk::{BLOCK, Disk};
use crate::script::{in_time, received};

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
const ACK: &[u8] = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x05\0\0\0\x01\0\0\0\0";

fn server(disk: &Arc<Disk>, tls: TlsServer) -> Server {
    let options = ServerOptions {
        tls: Some(tls),
        ..ServerOptions::default()
    };
    Server::new(vec![("d".to_owned(), disk.clone() as _)], options).unwrap()
}

/// A client of a server with TLS that has seen the greeting and sent its flags.
async fn greeted(authority: &Authority) -> (DuplexStream, JoinHandle<Result<(), ServeError>>) {
    let disk = Arc::new(Disk::new(16 * BLOCK));
    let tls = TlsServer::certificates(&authority.folder, false).unwrap();
    let server = server(&disk, tls);
    let (mut near, far) = tokio::io::duplex(1 << 20);
    let served = tokio::spawn(async move {
        let ended = server.serve_stream(far).await;
        assert_eq!(disk.reads.load(Ordering::SeqCst), 0);
        ended
    });
    assert_eq!(received(&mut near, 18).await, GREETING);
    near.write_all(b"\0\0\0\x03").await.unwrap();
    (near, served)
}

fn option(code: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(code.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Sends an option and returns the code of its one answer.
async fn answer(
    near: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin),
    code: u32,
    payload: &[u8],
) -> u32 {
    near.write_all(&option(code, payload)).await.unwrap();
    near.flush().await.unwrap();
    let mut header = [0; 20];
    in_time(near.read_exact(&mut header)).await.unwrap();
    assert_eq!(header[..8], *b"\0\x03\xe8\x89\x04\x55\x65\xa9");
    assert_eq!(header[8..12], code.to_be_bytes());
    let length = u32::from_be_bytes(header[16..].try_into().unwrap());
    let mut text = vec![0; length as usize];
    near.read_exact(&mut text).await.unwrap();
    u32::from_be_bytes(header[12..16].try_into().unwrap())
}

/// What a server says until it hangs up.
async fn rest(near: &mut (impl AsyncReadExt + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    in_time(near.read_to_end(&mut bytes)).await.unwrap();
    bytes
}

fn authority() -> (TempDir, Authority) {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::with_both(folder.path().join("pki"));
    (folder, authority)
}

const INVALID: u32 = 0x8000_0003;
const TLS_REQD: u32 = 0x8000_0005;

#[tokio::test]
async fn nothing_is_told_before_tls() {
    let (_folder, authority) = authority();
    let (mut near, served) = greeted(&authority).await;
    for code in [0, 3, 4, 6, 7, 8, 9, 10, 11, 99, u32::MAX] {
        for payload in [&b""[..], b"\0\0\0\x01d\0\0", &[b'I'; 200_000]] {
            assert_eq!(
                answer(&mut near, code, payload).await,
                TLS_REQD,
                "option {code} of {} bytes",
                payload.len()
            );
        }
    }
    for length in [1, 60_000, 200_000] {
        let payload = vec![0; length];
        assert_eq!(answer(&mut near, 5, &payload).await, INVALID, "{length}");
    }
    assert_eq!(answer(&mut near, 2, b"whatever").await, 1);
    assert_eq!(rest(&mut near).await, b"");
    in_time(served).await.unwrap().unwrap();
}

#[tokio::test]
async fn export_name_before_tls_is_answered_by_hanging_up() {
    let (_folder, authority) = authority();
    for name in [&b"d"[..], b"", b"unknown"] {
        let (mut near, served) = greeted(&authority).await;
        near.write_all(&option(1, name)).await.unwrap();
        assert_eq!(rest(&mut near).await, b"");
        assert!(matches!(
            in_time(served).await.unwrap(),
            Err(ServeError::Session(SessionError::Incompatible(
                PeerIncompatible::WithoutTls
            )))
        ));
    }
}

#[tokio::test]
async fn words_put_in_behind_starttls_are_never_answered() {
    let (_folder, authority) = authority();
    for injected in [option(8, b""), option(7, b"\0\0\0\x01d\0\0"), vec![0; 5000]] {
        let (mut near, served) = greeted(&authority).await;
        let bytes = [option(5, b""), injected].concat();
        near.write_all(&bytes).await.unwrap();
        assert_eq!(received(&mut near, 20).await, ACK);
        let rest = rest(&mut near).await;
        // At most TLS's alert.
        assert!(rest.is_empty() || rest[0] == 0x15, "{rest:x?}");
        assert!(rest.len() < 20, "{rest:x?}");
        assert!(matches!(
            in_time(served).await.unwrap(),
            Err(ServeError::Tls(TlsError::Handshake { .. }))
        ));
    }
}

/// Starts TLS and goes through its handshake.
async fn secured(mut near: DuplexStream, authority: &Authority) -> TlsStream<DuplexStream> {
    assert_eq!(answer(&mut near, 5, b"").await, 1);
    let mut roots = RootCertStore::empty();
    let trusted = std::fs::read(authority.file("ca-cert.pem")).unwrap();
    roots
        .add(CertificateDer::from_pem_slice(&trusted).unwrap())
        .unwrap();
    let config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    in_time(connector.connect(name, near)).await.unwrap()
}

#[tokio::test]
async fn handshake_begins_anew_over_tls_and_tls_begins_once() {
    let (_folder, authority) = authority();
    let (near, served) = greeted(&authority).await;
    let mut near = secured(near, &authority).await;
    assert_eq!(answer(&mut near, 5, b"").await, INVALID);
    assert_eq!(answer(&mut near, 5, &[0; 100_000]).await, INVALID);
    assert_eq!(answer(&mut near, 10, b"\0\0\0\x01d\0\0\0\0").await, INVALID);
    assert_eq!(answer(&mut near, 99, b"").await, 0x8000_0001);
    assert_eq!(answer(&mut near, 8, b"").await, 1);
    assert_eq!(answer(&mut near, 2, b"").await, 1);
    assert_eq!(rest(&mut near).await, b"");
    in_time(served).await.unwrap().unwrap();
}

#[tokio::test]
async fn client_that_leaves_without_tls_s_goodbye_leaves_in_order() {
    let (_folder, authority) = authority();
    let (near, served) = greeted(&authority).await;
    let mut near = secured(near, &authority).await;
    near.write_all(&option(7, b"\0\0\0\x01d\0\0"))
        .await
        .unwrap();
    near.flush().await.unwrap();
    // BLOCK_SIZE, EXPORT, DESCRIPTION, ACK
    let mut answers = [0; 34 + 32 + 38 + 20];
    in_time(near.read_exact(&mut answers)).await.unwrap();
    assert_eq!(answers[104..], [&ACK[..11], b"\x07", &ACK[12..]].concat());
    drop(near);
    in_time(served).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn client_that_dawdles_in_the_tls_handshake_is_cut_off_with_the_others() {
    let (_folder, authority) = authority();
    let (mut near, served) = greeted(&authority).await;
    near.write_all(&option(5, b"")).await.unwrap();
    near.write_all(b"\x16\x03\x01\x02").await.unwrap();
    assert_eq!(received(&mut near, 20).await, ACK);
    let wait = ServerOptions::default().handshake_timeout;
    match served.await.unwrap() {
        Err(ServeError::HandshakeTimedOut(after)) => assert_eq!(after, wait),
        other => panic!("{other:?}"),
    }
}

/// Our server at a socket, and the URI with which our client comes from a folder.
struct Served {
    folder: TempDir,
    authority: Authority,
    disk: Arc<Disk>,
    _task: JoinHandle<()>,
}

impl Served {
    async fn new(authority: (TempDir, Authority), verify_peer: bool) -> Self {
        let (folder, authority) = authority;
        let disk = Arc::new(Disk::new(3000 * BLOCK));
        let tls = TlsServer::certificates(&authority.folder, verify_peer).unwrap();
        let server = server(&disk, tls);
        let endpoint = Endpoint::Unix(folder.path().join("s"));
        let listener = Listener::bind(&endpoint).await.unwrap();
        let task =
            tokio::spawn(async move { server.serve(listener, std::future::pending()).await });
        Self {
            folder,
            authority,
            disk,
            _task: task,
        }
    }

    fn uri(&self, certificates: &Path, hostname: Option<&str>) -> NbdUri {
        NbdUri {
            endpoint: Endpoint::Unix(self.folder.path().join("s")),
            export: "d".into(),
            tls: Some(TlsParameters {
                certificates: Some(certificates.to_owned()),
                hostname: hostname.map(str::to_owned),
                ..TlsParameters::default()
            }),
        }
    }

    /// Reads something as a client with the certificates of a folder.
    async fn read_as(
        &self,
        certificates: &Path,
        hostname: Option<&str>,
    ) -> Result<(), ClientError> {
        let uri = self.uri(certificates, hostname);
        let client = in_time(Client::connect(&uri, &ClientOptions::default())).await?;
        let range = ByteRange::first(9000);
        let read = in_time(client.read(range, Vec::new())).await?;
        assert_eq!(read.data, self.disk.slice(range));
        in_time(client.close()).await
    }

    async fn own(&self) -> Result<(), ClientError> {
        self.read_as(&self.authority.folder, None).await
    }
}

/// The whole chain of causes.
fn chain(fault: &ClientError) -> String {
    let mut text = fault.to_string();
    let mut next = std::error::Error::source(fault);
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[tokio::test]
async fn several_connections_read_over_tls() {
    let served = Served::new(authority(), true).await;
    let uri = served.uri(&served.authority.folder, None);
    let options = ClientOptions {
        contexts: vec!["base:allocation".into()],
        ..ClientOptions::default()
    };
    let client = Client::connect(&uri, &options).await.unwrap();
    assert_eq!(client.export().connections, 4);
    let reads = (0..100).map(|i| {
        let (client, disk) = (&client, &served.disk);
        async move {
            let range = ByteRange::new(i * 100_000, i * 100_000 + 90_000).unwrap();
            let read = client.read(range, Vec::new()).await.unwrap();
            assert!(read.data == disk.slice(range), "{range} differs");
        }
    });
    in_time(futures::future::join_all(reads)).await;
    let extents = client.block_status(ByteRange::first(BLOCK)).await.unwrap();
    assert_eq!(extents.len(), 1);
    client.close().await.unwrap();
    let listed = list(&uri, &options).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].name, "d");
}

#[tokio::test]
async fn keys_of_each_kind_work_on_both_sides() {
    for key_type in ["rsa", "ecdsa", "ed25519"] {
        let (folder, authority) = authority();
        for role in [Role::Server, Role::Client] {
            let says = Says {
                key_type,
                ..Says::default()
            };
            authority.issue(role, &says);
        }
        let served = Served::new((folder, authority), true).await;
        let read = served.own().await;
        read.unwrap_or_else(|e| panic!("{key_type}: {}", chain(&e)));
    }
}

#[tokio::test]
async fn server_that_cannot_prove_its_name_is_refused() {
    let served = Served::new(authority(), false).await;
    served.own().await.unwrap();
    let fault = |fault: ClientError| {
        assert!(
            matches!(fault.kind, ClientErrorKind::Tls(TlsError::Handshake { .. })),
            "{}",
            chain(&fault)
        );
        chain(&fault)
    };
    // Another name, by URI; a stranger's authority.
    let own = served.authority.folder.clone();
    let text = fault(
        served
            .read_as(&own, Some("db.example.com"))
            .await
            .unwrap_err(),
    );
    assert!(text.contains("db.example.com"), "{text}");
    served.read_as(&own, Some("127.0.0.1")).await.unwrap();
    let stranger = Authority::new(served.folder.path().join("stranger"));
    let text = fault(served.read_as(&stranger.folder, None).await.unwrap_err());
    assert!(text.contains("UnknownIssuer"), "{text}");
    // Certificates that were never good or are not any more.
    let says =
        |says: Says<'static>| move |authority: &Authority| authority.issue(Role::Server, &says);
    type Spoil = Box<dyn Fn(&Authority)>;
    let spoilt: [(Spoil, &str); 5] = [
        (Box::new(Authority::issue_self_signed), "UnknownIssuer"),
        (
            Box::new(says(Says {
                expired: true,
                ..Says::default()
            })),
            "expired",
        ),
        // The common name does not count.
        (
            Box::new(says(Says {
                dns_name: None,
                ip_address: None,
                ..Says::default()
            })),
            "localhost",
        ),
        (
            Box::new(says(Says {
                dns_name: Some("db.example.com"),
                ip_address: None,
                ..Says::default()
            })),
            "db.example.com",
        ),
        (
            Box::new(|authority: &Authority| authority.revoke(Role::Server)),
            "Revoked",
        ),
    ];
    for (spoil, words) in spoilt {
        let (folder, authority) = authority();
        spoil(&authority);
        let served = Served::new((folder, authority), false).await;
        let text = fault(served.own().await.unwrap_err());
        assert!(text.contains(words), "{words}: {text}");
        assert_eq!(served.disk.reads.load(Ordering::SeqCst), 0);
    }
}

#[tokio::test]
async fn client_that_cannot_prove_itself_is_refused_and_told_so() {
    let served = Served::new(authority(), true).await;
    served.own().await.unwrap();
    let place = served.folder.path();
    let nobody = served
        .authority
        .copy(&["ca-cert.pem"], place.join("nobody"));
    // Another authority's certificate.
    let stranger = Authority::with_both(place.join("other"));
    let stranger = stranger.copy(
        &["client-cert.pem", "client-key.pem"],
        place.join("stranger"),
    );
    served.authority.copy(&["ca-cert.pem"], &stranger);
    // One that was good once.
    let says = Says {
        expired: true,
        ..Says::default()
    };
    served.authority.issue(Role::Client, &says);
    let late = served.authority.folder.clone();
    for folder in [nobody, stranger, late] {
        let fault = served.read_as(&folder, None).await.unwrap_err();
        assert!(
            matches!(fault.kind, ClientErrorKind::Tls(TlsError::Rejected { .. })),
            "{folder:?}: {}",
            chain(&fault)
        );
    }
    assert_eq!(served.disk.reads.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn plain_client_of_a_server_with_tls_learns_nothing() {
    let served = Served::new(authority(), false).await;
    let mut uri = served.uri(Path::new("/"), None);
    uri.tls = None;
    let fault = Client::connect(&uri, &ClientOptions::default()).await;
    let fault = fault.err().unwrap();
    assert!(fault.to_string().contains("ERR_TLS_REQD"), "{fault}");
    assert!(list(&uri, &ClientOptions::default()).await.is_err());
}

#[tokio::test]
async fn settings_of_no_use_are_named_before_anybody_is_connected_to() {
    let (folder, authority) = authority();
    let place = folder.path();
    let client = async |certificates: &Path| {
        let uri = NbdUri {
            endpoint: Endpoint::Unix(place.join("nobody listens")),
            export: String::new(),
            tls: Some(TlsParameters {
                certificates: Some(certificates.to_owned()),
                ..TlsParameters::default()
            }),
        };
        let options = ClientOptions {
            connect_timeout: Duration::from_secs(5),
            ..ClientOptions::default()
        };
        chain(&Client::connect(&uri, &options).await.err().unwrap())
    };
    assert!(client(&authority.folder).await.contains("connecting"));
    assert!(
        client(&place.join("missing"))
            .await
            .contains("ca-cert.pem cannot be read")
    );
    let lonely = authority.copy(&["ca-cert.pem", "client-cert.pem"], place.join("lonely"));
    assert!(client(&lonely).await.contains("client-key.pem is missing"));
    std::fs::write(lonely.join("client-key.pem"), "no key").unwrap();
    assert!(client(&lonely).await.contains("holds no private key"));
    authority.copy(&["server-key.pem"], &lonely);
    std::fs::rename(lonely.join("server-key.pem"), lonely.join("client-key.pem")).unwrap();
    assert!(client(&lonely).await.contains("do not work together"));
    std::fs::write(lonely.join("ca-cert.pem"), "no certificate").unwrap();
    assert!(client(&lonely).await.contains("holds no certificate"));
    assert!(TlsServer::certificates(&lonely, false).is_err());
    std::fs::remove_file(authority.file("ca-cert.pem")).unwrap();
    TlsServer::certificates(&authority.folder, false).unwrap();
    assert!(TlsServer::certificates(&authority.folder, true).is_err());
}
