//! Serving a snapshot's disks over NBD: to anybody at an address, or to one child process.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::EngineError;
use super::catalog::{Catalog, disk_of};
use super::disk::Disk;
use super::event::{Event, Observer, ServedExport};
use super::export::SnapshotExport;
use super::outcome::ServeOutcome;
use crate::nbd::server::{ExportSource, Server, ServerOptions};
use crate::nbd::tls::{TlsError, TlsServer};
use crate::nbd::transport::Listener;
use crate::nbd::uri::{DEFAULT_PORT, Endpoint, NbdUri, TlsParameters};

/// What is to be served, and where.
#[derive(Clone, Debug)]
pub struct ServeRequest {
    /// The words that address the snapshot.
    pub snapshot: String,
    /// One disk; `None` serves all.
    pub disk: Option<String>,
    /// `unix:PATH`, `HOST:PORT`, or an NBD URI without an export's name.
    pub address: String,
    /// What the server and its clients are authenticated with; without it, the disks are served in the clear.
    pub tls: Option<ServeTls>,
    /// Whether to serve beyond this machine without TLS.
    pub insecure: bool,
}

/// How a server and its clients know each other.
#[derive(Clone, Debug)]
pub enum ServeTls {
    /// By the certificates in a folder.
    Certificates {
        /// The folder that holds `server-cert.pem`, `server-key.pem` and, to know clients, `ca-cert.pem`.
        folder: PathBuf,
        /// Whether clients need a certificate too.
        verify_peer: bool,
    },
    /// By the keys in a file.
    PreSharedKeys(PathBuf),
}

impl ServeTls {
    fn load(&self) -> Result<TlsServer, TlsError> {
        match self {
            Self::Certificates {
                folder,
                verify_peer,
            } => TlsServer::certificates(folder, *verify_peer),
            Self::PreSharedKeys(file) => TlsServer::pre_shared_keys(file),
        }
    }
}

/// Serves a snapshot's disks, each as an export of its name, until `ended`.
///
/// # Errors
/// When the snapshot or the disk is unknown, or the address is wrong, taken, or open to other machines without TLS, or
/// when TLS cannot be set up.
pub async fn serve(
    catalog: &Catalog,
    request: ServeRequest,
    observer: Arc<dyn Observer>,
    ended: impl Future<Output = ()> + Send,
) -> Result<ServeOutcome, EngineError> {
    let clock = Instant::now();
    let endpoint = endpoint(&request.address, request.tls.is_some())?;
    let failed = |cause: io::Error| EngineError::Serve {
        address: request.address.clone(),
        cause,
    };
    let tls = request.tls.as_ref().map(ServeTls::load).transpose();
    let options = ServerOptions {
        tls: tls.map_err(|e| failed(io::Error::other(e)))?,
        ..ServerOptions::default()
    };
    let snapshot = catalog.find(&request.snapshot).await?;
    let _pin = catalog.pin(&snapshot).await?;
    let records: Vec<_> = match &request.disk {
        Some(name) => vec![disk_of(&snapshot, Some(name))?],
        None => snapshot.draft.disks.iter().collect(),
    };
    let mut exports: Vec<(String, Arc<dyn ExportSource>)> = Vec::new();
    for record in &records {
        exports.push((
            record.disk.clone(),
            Arc::new(SnapshotExport::new(catalog, &snapshot, record)?),
        ));
    }
    let secure = options.tls.is_some();
    let server = Server::new(exports, options).map_err(|e| failed(io::Error::other(e)))?;
    let listener = bind(&endpoint, secure || request.insecure)
        .await
        .map_err(failed)?;
    let bound = listener.endpoint().map_err(failed)?;
    let served = records.iter().map(|record| ServedExport {
        name: record.disk.clone(),
        uri: NbdUri {
            endpoint: bound.clone(),
            export: record.disk.clone(),
            tls: secure.then(TlsParameters::default),
        }
        .to_string(),
        size_bytes: record.size_bytes,
    });
    observer.observe(Event::Serving(served.collect()));
    server.serve(listener, ended).await;
    Ok(ServeOutcome {
        repository: catalog.path().to_owned(),
        snapshot: snapshot.id.to_string(),
        address: request.address,
        duration: clock.elapsed(),
    })
}

/// A disk that is served on a socket that only this user can reach.
pub(super) struct Private {
    uri: String,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
    fault: Arc<Mutex<Option<EngineError>>>,
    _folder: TempDir,
}

/// Serves a disk to a child process of ours.
pub(super) fn private(disk: Disk) -> io::Result<Private> {
    let folder = tempfile::Builder::new().prefix("nbdbackup-").tempdir()?;
    let path = folder.path().join("nbd");
    let listener = tokio::net::UnixListener::bind(&path)?.into();
    let export = SnapshotExport::of(disk, String::new());
    let fault = export.fault();
    let exports: Vec<(String, Arc<dyn ExportSource>)> = vec![(String::new(), Arc::new(export))];
    let server = Server::new(exports, ServerOptions::default()).map_err(io::Error::other)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let serving =
        tokio::spawn(async move { server.serve(listener, async { drop(stopped.await) }).await });
    let uri = NbdUri {
        endpoint: Endpoint::Unix(path),
        export: String::new(),
        tls: None,
    }
    .to_string();
    Ok(Private {
        uri,
        stop,
        serving,
        fault,
        _folder: folder,
    })
}

impl Private {
    pub(super) fn uri(&self) -> &str {
        &self.uri
    }

    /// Ends the server; returns the first failure to read the disk.
    pub(super) async fn close(self) -> Option<EngineError> {
        drop(self.stop);
        let _ = self.serving.await;
        self.fault.lock().expect("no holder panics").take()
    }
}

/// Reads `unix:PATH`, `HOST:PORT` or an NBD URI.
fn endpoint(address: &str, secure: bool) -> Result<Endpoint, EngineError> {
    let usage = |problem: &str| EngineError::Usage(format!("address {address}: {problem}"));
    let unix = |path: &Path| match std::path::absolute(path) {
        Ok(path) => Ok(Endpoint::Unix(path)),
        Err(error) => Err(usage(&error.to_string())),
    };
    if let Some(path) = address.strip_prefix("unix:") {
        return unix(Path::new(path));
    }
    if address.contains("://") {
        let uri: NbdUri = address.parse().map_err(|e| usage(&format!("{e}")))?;
        return match uri {
            NbdUri { tls: Some(_), .. } if !secure => Err(usage(
                "name the server's certificates or keys with --tls-certificates or --tls-psk-file",
            )),
            NbdUri { tls: None, .. } if secure => Err(usage(
                "with TLS, the URI begins with nbds:// or nbds+unix://",
            )),
            NbdUri { tls: Some(tls), .. } if tls != TlsParameters::default() => Err(usage(
                "a server's TLS settings stand in --tls-certificates or --tls-psk-file",
            )),
            NbdUri { export, .. } if !export.is_empty() => {
                Err(usage("each export has its disk's name; give none here"))
            }
            NbdUri {
                endpoint: Endpoint::Unix(path),
                ..
            } => unix(&path),
            NbdUri { endpoint, .. } => Ok(endpoint),
        };
    }
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) => (
            host,
            port.parse()
                .map_err(|_| usage("use unix:PATH or HOST:PORT"))?,
        ),
        None => (address, DEFAULT_PORT),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() {
        return Err(usage("name the host; localhost serves this machine only"));
    }
    Ok(Endpoint::Tcp {
        host: host.to_owned(),
        port,
    })
}

/// Listens, where other machines cannot reach or may.
async fn bind(endpoint: &Endpoint, anywhere: bool) -> io::Result<Listener> {
    if let Endpoint::Tcp { host, port } = endpoint {
        let mut addresses = tokio::net::lookup_host((host.as_str(), *port)).await?;
        if !anywhere && !addresses.all(|a| a.ip().is_loopback()) {
            return Err(io::Error::other(
                "other machines could read the disks without TLS; use --tls-certificates, localhost, a Unix socket, or --insecure",
            ));
        }
    }
    Listener::bind(endpoint).await
}
