//! Certificates: the files of QEMU's and libnbd's folders, and what rustls makes of them.

use std::path::Path;
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::{TlsError, files};

/// Sets a client up from a folder; without one it trusts whom the system trusts, and has no certificate of its own.
pub(super) fn client(folder: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let (roots, revoked) = match folder {
        Some(folder) => (authorities(folder)?, revocations(folder)?),
        None => (trusted_by_the_system()?, Vec::new()),
    };
    let failed = settings(folder);
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .with_crls(revoked)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| failed(rustls::Error::General(e.to_string())))?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(&failed)?
        .with_webpki_verifier(verifier);
    let mut config = match folder.map(own_certificate).transpose()?.flatten() {
        Some((chain, key)) => config.with_client_auth_cert(chain, key).map_err(&failed)?,
        None => config.with_no_client_auth(),
    };
    // Each connection proves itself anew.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Sets a server up from a folder; `verify_peer` demands a certificate of each client.
pub(super) fn server(folder: &Path, verify_peer: bool) -> Result<ServerConfig, TlsError> {
    let provider = provider();
    let failed = settings(Some(folder));
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(&failed)?;
    let config = if verify_peer {
        let roots = Arc::new(authorities(folder)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
            .with_crls(revocations(folder)?)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| failed(rustls::Error::General(e.to_string())))?;
        config.with_client_cert_verifier(verifier)
    } else {
        config.with_no_client_auth()
    };
    let chain = certificates(&folder.join("server-cert.pem"))?;
    let key = key(&folder.join("server-key.pem"))?;
    let mut config = config.with_single_cert(chain, key).map_err(&failed)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn settings(folder: Option<&Path>) -> impl Fn(rustls::Error) -> TlsError + use<> {
    let from = match folder {
        Some(folder) => folder.display().to_string(),
        None => "the system".to_owned(),
    };
    move |source| TlsError::Settings {
        from: from.clone(),
        source,
    }
}

/// The authorities that may vouch for a peer.
fn authorities(folder: &Path) -> Result<RootCertStore, TlsError> {
    let file = folder.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&file)? {
        roots
            .add(certificate)
            .map_err(|fault| files::content(&file, fault.to_string()))?;
    }
    Ok(roots)
}

fn trusted_by_the_system() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    for fault in &found.errors {
        tracing::debug!(%fault, "a trusted certificate cannot be read");
    }
    let mut roots = RootCertStore::empty();
    match roots.add_parsable_certificates(found.certs) {
        (0, _) => Err(TlsError::NoTrust),
        _ => Ok(roots),
    }
}

/// The certificates that an authority has taken back, where the folder tells.
fn revocations(folder: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let file = folder.join("ca-crl.pem");
    let Some(text) = files::read_if_any(&file)? else {
        return Ok(Vec::new());
    };
    let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&text).collect();
    match lists {
        Ok(lists) if !lists.is_empty() => Ok(lists),
        Ok(_) => Err(files::content(&file, "holds no revocation list")),
        Err(fault) => Err(files::content(&file, fault.to_string())),
    }
}

type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// A client's own certificate, where the folder has one.
fn own_certificate(folder: &Path) -> Result<Option<Own>, TlsError> {
    let [chain, secret] = ["client-cert.pem", "client-key.pem"].map(|name| folder.join(name));
    match (exists(&chain)?, exists(&secret)?) {
        (false, false) => Ok(None),
        (true, false) => Err(files::content(
            &chain,
            "client-key.pem is missing beside it",
        )),
        (false, true) => Err(files::content(
            &secret,
            "client-cert.pem is missing beside it",
        )),
        (true, true) => Ok(Some((certificates(&chain)?, key(&secret)?))),
    }
}

fn exists(file: &Path) -> Result<bool, TlsError> {
    file.try_exists().map_err(|source| TlsError::File {
        file: file.to_owned(),
        source: Arc::new(source),
    })
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = files::read(file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(files::content(file, "holds no certificate")),
        Err(fault) => Err(files::content(file, fault.to_string())),
    }
}

/// A private key of any of the usual forms; what stands before it, such as certtool's description, is passed over.
fn key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let text = files::read_secret(file)?;
    // The parser's own words could quote the file.
    PrivateKeyDer::from_pem_slice(&text)
        .map_err(|_| files::content(file, "holds no private key that is not encrypted"))
}
