//! Pre-shared keys, which rustls does not have, through OpenSSL.

use std::io;
use std::path::Path;
use std::pin::Pin;

use openssl::error::ErrorStack;
use openssl::ssl::{
    self, Ssl, SslContext, SslContextBuilder, SslMethod, SslOptions, SslSessionCacheMode,
    SslVerifyMode, SslVersion,
};
use tokio_openssl::SslStream;

use super::super::transport::Stream;
use super::keys::{Key, Keys};
use super::{TlsError, files};

/// A client with one key.
#[derive(Clone)]
pub(super) struct PskClient {
    context: SslContext,
}

/// A server that knows a key for each of its clients.
#[derive(Clone)]
pub(super) struct PskServer {
    context: SslContext,
}

impl PskClient {
    pub(super) fn load(file: &Path, identity: Option<&str>) -> Result<Self, TlsError> {
        let key = Keys::read(file)?.take(identity)?;
        let context = Self::context(key).map_err(|e| files::content(file, e.to_string()))?;
        Ok(Self { context })
    }

    fn context(key: Key) -> Result<SslContext, ErrorStack> {
        let mut builder = common(SslMethod::tls_client())?;
        // A server may answer a TLS 1.3 client that offers a key with a certificate instead. Nobody is trusted to vouch
        // for one, so that it fails.
        builder.set_verify(SslVerifyMode::PEER);
        builder.set_psk_client_callback(move |_, _, identity, secret| {
            let Key {
                identity: ours,
                secret: key,
            } = &key;
            // C wants to see a zero byte behind the identity.
            let places = (identity.get_mut(..ours.len()), secret.get_mut(..key.len()));
            let (Some(place), Some(room)) = places else {
                return Ok(0);
            };
            place.copy_from_slice(ours);
            room.copy_from_slice(key);
            match identity.get_mut(ours.len()) {
                Some(end) => *end = 0,
                None => return Ok(0),
            }
            Ok(key.len())
        });
        Ok(builder.build())
    }

    pub(super) async fn connect(&self, stream: Stream) -> io::Result<SslStream<Stream>> {
        let mut stream = start(&self.context, stream)?;
        Pin::new(&mut stream).connect().await.map_err(failure)?;
        if stream.ssl().peer_certificate().is_some() {
            return Err(io::Error::other(
                "the server showed a certificate instead of knowing the key",
            ));
        }
        Ok(stream)
    }
}

impl PskServer {
    pub(super) fn load(file: &Path) -> Result<Self, TlsError> {
        let keys = Keys::read(file)?;
        let context = Self::context(keys).map_err(|e| files::content(file, e.to_string()))?;
        Ok(Self { context })
    }

    fn context(keys: Keys) -> Result<SslContext, ErrorStack> {
        let mut builder = common(SslMethod::tls_server())?;
        // GnuTLS's clients prefer a cipher that costs twice as much here.
        builder.set_options(SslOptions::CIPHER_SERVER_PREFERENCE);
        builder.set_psk_server_callback(move |_, identity, secret| {
            let key = identity.and_then(|identity| keys.find(identity));
            let Some(Key { secret: key, .. }) = key else {
                return Ok(0);
            };
            let Some(room) = secret.get_mut(..key.len()) else {
                return Ok(0);
            };
            room.copy_from_slice(key);
            Ok(key.len())
        });
        Ok(builder.build())
    }

    pub(super) async fn accept(&self, stream: Stream) -> io::Result<SslStream<Stream>> {
        let mut stream = start(&self.context, stream)?;
        Pin::new(&mut stream).accept().await.map_err(failure)?;
        Ok(stream)
    }
}

/// What both sides have in common: ciphers that a key alone authenticates, and no way around the handshake.
fn common(method: SslMethod) -> Result<SslContextBuilder, ErrorStack> {
    let mut builder = SslContext::builder(method)?;
    builder.set_min_proto_version(Some(SslVersion::TLS1_2))?;
    builder.set_ciphersuites(TLS13)?;
    builder.set_cipher_list(TLS12)?;
    builder.set_session_cache_mode(SslSessionCacheMode::OFF);
    builder.set_num_tickets(0)?;
    builder.set_options(
        SslOptions::NO_TICKET
            | SslOptions::NO_RENEGOTIATION
            | SslOptions::NO_COMPRESSION
            // NBD's messages tell their lengths; see `Secured`.
            | SslOptions::IGNORE_UNEXPECTED_EOF,
    );
    Ok(builder)
}

fn start(context: &SslContext, stream: Stream) -> io::Result<SslStream<Stream>> {
    Ok(SslStream::new(Ssl::new(context)?, stream)?)
}

fn failure(fault: ssl::Error) -> io::Error {
    match fault.code() {
        // With the option above, an end in the middle looks like one in order.
        ssl::ErrorCode::ZERO_RETURN => io::ErrorKind::UnexpectedEof.into(),
        _ => match fault.into_io_error() {
            Ok(fault) => fault,
            Err(fault) if fault.ssl_error().is_none() => io::ErrorKind::UnexpectedEof.into(),
            Err(fault) => io::Error::other(fault),
        },
    }
}

/// A key from outside goes with SHA-256 only.
const TLS13: &str = "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256";
/// A key that leaks must not open what was recorded before: only with an exchange of fresh keys.
const TLS12: &str = "ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES128-CBC-SHA256:\
    DHE-PSK-AES128-GCM-SHA256:DHE-PSK-CHACHA20-POLY1305";

#[cfg(test)]
mod tests {
    use openssl::asn1::Asn1Time;
    use openssl::hash::MessageDigest;
    use openssl::pkey::{PKey, Private};
    use openssl::rsa::Rsa;
    use openssl::x509::{X509, X509NameBuilder};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const ALICE: &str = "alice:000102030405060708090a0b0c0d0e0f";
    const BOB: &str = "bob:101112131415161718191a1b1c1d1e1f2021222324252627";

    fn client(line: &str) -> PskClient {
        PskClient::load(file(line).path(), None).unwrap()
    }

    fn server(lines: &str) -> PskServer {
        PskServer::load(file(lines).path()).unwrap()
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    async fn joined(
        client: &PskClient,
        server: &PskServer,
    ) -> (io::Result<SslStream<Stream>>, io::Result<SslStream<Stream>>) {
        let (near, far) = tokio::io::duplex(1 << 16);
        tokio::join!(
            client.connect(Stream::other(near)),
            server.accept(Stream::other(far))
        )
    }

    #[tokio::test]
    async fn both_ends_meet_over_each_version() {
        let server = server(&format!("{ALICE}\n{BOB}\n"));
        for line in [ALICE, BOB] {
            let (near, far) = joined(&client(line), &server).await;
            let (mut near, mut far) = (near.unwrap(), far.unwrap());
            assert_eq!(near.ssl().version_str(), "TLSv1.3");
            assert_eq!(
                near.ssl().current_cipher().unwrap().name(),
                "TLS_AES_128_GCM_SHA256"
            );
            near.write_all(b"hello").await.unwrap();
            let mut heard = [0; 5];
            far.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"hello");
        }
        let old = Keys::read(file(ALICE).path()).unwrap().take(None).unwrap();
        let mut builder = common(SslMethod::tls_client()).unwrap();
        builder
            .set_max_proto_version(Some(SslVersion::TLS1_2))
            .unwrap();
        builder.set_psk_client_callback(move |_, _, identity, secret| {
            identity[..6].copy_from_slice(b"alice\0");
            secret[..16].copy_from_slice(&old.secret);
            Ok(16)
        });
        let context = builder.build();
        let (near, far) = joined(&PskClient { context }, &server).await;
        assert_eq!(near.unwrap().ssl().version_str(), "TLSv1.2");
        far.unwrap();
    }

    #[tokio::test]
    async fn wrong_key_and_unknown_identity_meet_nobody() {
        let server = server(ALICE);
        let stranger = ALICE.replace("alice", "mallory");
        for line in [BOB, "alice:ffffffffffffffffffffffffffffffff", &stranger] {
            let (near, far) = joined(&client(line), &server).await;
            assert!(near.is_err() && far.is_err(), "{line}");
            let fault = TlsError::of_client(near.err().unwrap());
            let texts = format!("{fault:?} {fault} {}", far.err().unwrap());
            assert!(
                !texts.contains("0102") && !texts.contains("ffff"),
                "{texts}"
            );
        }
    }

    #[tokio::test]
    async fn server_with_a_certificate_instead_of_the_key_is_refused() {
        let (certificate, key) = self_signed();
        let mut builder = SslContext::builder(SslMethod::tls_server()).unwrap();
        builder.set_certificate(&certificate).unwrap();
        builder.set_private_key(&key).unwrap();
        let context = builder.build();
        let (near, _) = joined(&client(ALICE), &PskServer { context }).await;
        let fault = near.err().expect("a certificate was taken for the key");
        assert!(fault.to_string().contains("certificate"), "{fault}");
    }

    fn self_signed() -> (X509, PKey<Private>) {
        let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
        let mut name = X509NameBuilder::new().unwrap();
        name.append_entry_by_text("CN", "localhost").unwrap();
        let name = name.build();
        let mut builder = X509::builder().unwrap();
        builder.set_version(2).unwrap();
        builder.set_subject_name(&name).unwrap();
        builder.set_issuer_name(&name).unwrap();
        builder.set_pubkey(&key).unwrap();
        let (from, to) = (Asn1Time::days_from_now(0), Asn1Time::days_from_now(1));
        builder.set_not_before(&from.unwrap()).unwrap();
        builder.set_not_after(&to.unwrap()).unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        (builder.build(), key)
    }
}
