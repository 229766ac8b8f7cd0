//! Serving a snapshot's disks over NBD: to anybody at an address, or to one child process.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::catalog::{Catalog, disk_of};
use super::disk::Disk;
use super::event::{Event, Observer, ServedExport, Warning};
use super::export::SnapshotExport;
use super::outcome::ServeOutcome;
use super::overlay::{Belongs, OverlayExport};
use super::since::Earlier;
use super::workers::blocking;
use super::{DiskRecord, EngineError, Snapshot};
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
    /// A folder that keeps what clients write over the disks; `None` lets them only read.
    pub writable: Option<PathBuf>,
    /// After how long without a client to end; `None` goes on until it is ended.
    pub idle_exit: Option<Duration>,
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
        idle_exit: request.idle_exit,
        ..server_options()
    };
    let (snapshot, all) = catalog.find_among_all(&request.snapshot).await?;
    let _pin = catalog.pin(&snapshot).await?;
    let records: Vec<_> = match &request.disk {
        Some(name) => vec![disk_of(&snapshot, Some(name))?],
        None => snapshot.draft.disks.iter().collect(),
    };
    let mut exports: Vec<(String, Arc<dyn ExportSource>)> = Vec::new();
    let mut overlays = Vec::new();
    for record in &records {
        let earlier = Earlier::of(catalog, &all, &snapshot.draft.name, record)?;
        let export = Arc::new(SnapshotExport::new(catalog, &snapshot, record)?.since(earlier));
        let Some(folder) = &request.writable else {
            exports.push((record.disk.clone(), export));
            continue;
        };
        let (overlay, path) = overlay(catalog, &snapshot, record, export, folder).await?;
        exports.push((record.disk.clone(), Arc::clone(&overlay) as _));
        overlays.push((overlay, path));
    }
    drop(all);
    let secure = options.tls.is_some();
    let server = Server::new(exports, options).map_err(|e| failed(io::Error::other(e)))?;
    let open = !secure && !is_local(&endpoint).await.map_err(failed)?;
    if open && !request.insecure {
        return Err(failed(io::Error::other(
            "other machines could read the disks without TLS; use --tls-certificates, localhost, a Unix socket, or --insecure",
        )));
    }
    let listener = Listener::bind(&endpoint).await.map_err(failed)?;
    let bound = listener.endpoint().map_err(failed)?;
    let mut paths = overlays.iter().map(|(_, path)| path.clone());
    let served = records.iter().map(|record| ServedExport {
        overlay: paths.next(),
        name: record.disk.clone(),
        uri: NbdUri {
            endpoint: bound.clone(),
            export: record.disk.clone(),
            tls: secure.then(TlsParameters::default),
        }
        .to_string(),
        size_bytes: record.size_bytes,
    });
    let served = served.collect();
    if open {
        observer.observe(Event::Warning(Warning {
            code: "insecure",
            disk: None,
            message: format!(
                "whoever reaches {} can read the disks{}: they are served without TLS",
                request.address,
                if request.writable.is_some() {
                    ", and write over them"
                } else {
                    ""
                }
            ),
        }));
    }
    observer.observe(Event::Serving(served));
    server.serve(listener, ended).await;
    for ((overlay, _), record) in overlays.iter().zip(&records) {
        // What a client did not flush is kept too if the server ends well.
        let kept = overlay.commit().await;
        kept.map_err(|fault| overlay_failed(&request.writable, record)(io::Error::other(fault)))?;
    }
    Ok(ServeOutcome {
        repository: catalog.path().to_owned(),
        snapshot: snapshot.id.to_string(),
        address: request.address,
        duration: clock.elapsed(),
    })
}

/// Puts what clients write into a folder, over a disk that stays as it is.
async fn overlay(
    catalog: &Catalog,
    snapshot: &Snapshot,
    record: &DiskRecord,
    base: Arc<SnapshotExport>,
    folder: &Path,
) -> Result<(Arc<OverlayExport>, PathBuf), EngineError> {
    let belongs = Belongs {
        repository: *catalog.repository().uuid().as_bytes(),
        snapshot: *snapshot.id.as_bytes(),
        disk: record.disk.clone(),
    };
    let written = super::since::context(&snapshot.id);
    let folder = folder.to_owned();
    let opened = blocking(move || OverlayExport::open(&folder, belongs, base, written));
    let (overlay, path) = opened.await??;
    Ok((Arc::new(overlay), path))
}

fn overlay_failed(
    folder: &Option<PathBuf>,
    record: &DiskRecord,
) -> impl Fn(io::Error) -> EngineError {
    let folder = folder.as_deref().unwrap_or(Path::new("")).display();
    let (folder, disk) = (folder.to_string(), record.disk.clone());
    move |cause| EngineError::Overlay {
        folder: folder.clone(),
        disk: disk.clone(),
        cause,
    }
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

/// Whether only this machine can reach a place.
async fn is_local(endpoint: &Endpoint) -> io::Result<bool> {
    Ok(match endpoint {
        Endpoint::Unix(_) => true,
        Endpoint::Tcp { host, port } => {
            let mut addresses = tokio::net::lookup_host((host.as_str(), *port)).await?;
            addresses.all(|address| address.ip().is_loopback())
        }
    })
}

/// The usual options, with no more clients than this process may have open files for, of which it takes all it may.
fn server_options() -> ServerOptions {
    let options = ServerOptions::default();
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let files = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => most,
        Err(_) => limit.current.unwrap_or(u64::MAX),
    };
    let clients = (files - FILES_OF_OTHERS.min(files / 2)).max(1);
    ServerOptions {
        max_connections: options
            .max_connections
            .min(usize::try_from(clients).unwrap_or(usize::MAX)),
        ..options
    }
}

/// The open files that are left for the repository, overlays and threads.
const FILES_OF_OTHERS: u64 = 256;
