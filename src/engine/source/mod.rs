//! What a backup reads from: an NBD export, or an image file that is made one.

mod raw;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::{Cause, EngineError};
use crate::nbd::client::{Client, ClientError, ClientOptions};
use crate::nbd::server::{ExportSource, Server, ServerOptions};
use crate::nbd::uri::{Endpoint, NbdUri};
use crate::qemu::{ImageBitmap, ImageFormat, QemuNbd, bitmaps};
use raw::RawExport;

/// A source as the user named it.
#[derive(Clone, Debug)]
pub struct SourceSpec {
    text: String,
    place: Place,
}

#[derive(Clone, Debug)]
pub(crate) enum Place {
    Nbd(NbdUri),
    Image {
        path: PathBuf,
        format: Option<String>,
    },
}

/// A source that is open: a client, and what keeps its server alive.
pub(crate) struct OpenSource {
    pub(crate) client: Client,
    keeper: Keeper,
}

enum Keeper {
    Elsewhere,
    Process(Box<QemuNbd>),
    Embedded(JoinHandle<()>),
}

/// What an image says of the bitmap that a backup wants to follow; the names are those of [`super::Reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BitmapState {
    /// It may be followed, as far as can be seen before the export is open.
    Usable,
    Missing,
    Inconsistent,
    NotRecording,
}

impl SourceSpec {
    /// Takes the words of a command line: an NBD URI, or a path.
    ///
    /// # Errors
    /// When the URI is wrong, or names a kind of source that this version does not know.
    pub fn parse(text: &str, format: Option<&str>) -> Result<Self, EngineError> {
        let usage = |problem: &str| EngineError::Usage(format!("source {text}: {problem}"));
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        let place = match scheme {
            Some("nbd" | "nbds" | "nbd+unix" | "nbds+unix") => {
                if format.is_some() {
                    return Err(usage(
                        "--format is for image files; an NBD export is always raw",
                    ));
                }
                Place::Nbd(text.parse().map_err(|e| usage(&format!("{e}")))?)
            }
            Some("qmp" | "qmp+unix") => {
                return Err(usage(
                    "this version does not manage running QEMUs; export the disk over NBD and name its URI",
                ));
            }
            Some(_) => return Err(usage("not a kind of source: use an NBD URI or a path")),
            None if text.starts_with("libvirt:") => {
                return Err(usage(
                    "this version does not manage libvirt; export the disk over NBD and name its URI",
                ));
            }
            None => Place::Image {
                path: PathBuf::from(text),
                format: format.map(str::to_owned),
            },
        };
        Ok(Self {
            text: text.to_owned(),
            place,
        })
    }

    /// The source as the user named it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The disk's name where the user gives none: the export's, or the file's without its ending.
    pub fn disk_name(&self) -> String {
        let name = match &self.place {
            Place::Nbd(uri) => uri.export.clone(),
            Place::Image { path, .. } => path
                .file_stem()
                .map(|s| s.to_string_lossy().into_owned())
                .unwrap_or_default(),
        };
        if name.is_empty() {
            "disk".to_owned()
        } else {
            name
        }
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    pub(crate) fn unreachable(&self, cause: impl Into<Cause>) -> EngineError {
        EngineError::SourceUnreachable {
            name: self.text.clone(),
            cause: cause.into(),
        }
    }

    /// Says whether a bitmap can be followed, as far as an image tells; an NBD server tells once it is connected.
    pub(crate) async fn bitmap_state(&self, bitmap: &str) -> Result<BitmapState, EngineError> {
        let Place::Image { path, format } = &self.place else {
            return Ok(BitmapState::Usable);
        };
        let ImageFormat::Qemu(format) = self.format(path, format.as_deref())? else {
            return Ok(BitmapState::Missing);
        };
        let listed = bitmaps(path, &format)
            .await
            .map_err(|e| self.unreachable(e))?;
        Ok(match listed.iter().find(|b| b.name == bitmap) {
            None => BitmapState::Missing,
            Some(ImageBitmap {
                inconsistent: true, ..
            }) => BitmapState::Inconsistent,
            Some(ImageBitmap {
                recording: false, ..
            }) => BitmapState::NotRecording,
            Some(_) => BitmapState::Usable,
        })
    }

    /// Opens the source for reading; `bitmap` is exported where the source is an image that has it.
    pub(crate) async fn open(
        &self,
        contexts: Vec<String>,
        bitmap: Option<&str>,
        connections: u8,
        retry_time: Duration,
    ) -> Result<OpenSource, EngineError> {
        let retry_time = match &self.place {
            Place::Nbd(_) => retry_time,
            // A child of ours that has ended does not come back.
            Place::Image { .. } => retry_time.min(IMAGE_RETRY),
        };
        let options = ClientOptions {
            connections: usize::from(connections),
            contexts,
            retry_time,
            ..ClientOptions::default()
        };
        match &self.place {
            Place::Nbd(uri) => {
                let client = Client::connect(uri, &options)
                    .await
                    .map_err(|e| self.unreachable(e))?;
                Ok(OpenSource {
                    client,
                    keeper: Keeper::Elsewhere,
                })
            }
            Place::Image { path, format } => match self.format(path, format.as_deref())? {
                ImageFormat::Raw => self.open_raw(path, &options).await,
                ImageFormat::Qemu(format) => {
                    let process = QemuNbd::start(path, &format, bitmap, connections)
                        .map_err(|e| self.unreachable(e))?;
                    let endpoint = Endpoint::Unix(process.socket().to_owned());
                    let uri = NbdUri {
                        endpoint,
                        export: String::new(),
                        tls: None,
                    };
                    match Client::connect(&uri, &options).await {
                        Ok(client) => Ok(OpenSource {
                            client,
                            keeper: Keeper::Process(Box::new(process)),
                        }),
                        Err(error) => Err(self.refused(process, error).await),
                    }
                }
            },
        }
    }

    /// Serves a raw file from within this process: the client then finds its holes as with any server.
    async fn open_raw(
        &self,
        path: &Path,
        options: &ClientOptions,
    ) -> Result<OpenSource, EngineError> {
        let export = RawExport::open(path).map_err(|e| self.unreachable(e))?;
        let exports: Vec<(String, Arc<dyn ExportSource>)> = vec![(String::new(), Arc::new(export))];
        let server =
            Server::new(exports, ServerOptions::default()).map_err(|e| self.unreachable(e))?;
        let (ours, theirs) = tokio::net::UnixStream::pair().map_err(|e| self.unreachable(e))?;
        let task = tokio::spawn(async move {
            // Its client is the only one, and says on its own side what went wrong.
            let _ = server.serve_stream(theirs).await;
        });
        let client = Client::over(ours, "", options)
            .await
            .map_err(|e| self.unreachable(e))?;
        Ok(OpenSource {
            client,
            keeper: Keeper::Embedded(task),
        })
    }

    fn format(&self, path: &Path, named: Option<&str>) -> Result<ImageFormat, EngineError> {
        match named {
            Some(name) => Ok(ImageFormat::named(name)),
            None => ImageFormat::detect(path).map_err(|e| self.unreachable(e)),
        }
    }

    /// Prefers the words of a `qemu-nbd` that ended over those of the connection that it took along.
    async fn refused(&self, process: QemuNbd, error: ClientError) -> EngineError {
        match process.into_failure().await {
            Some(why) => self.unreachable(why),
            None => self.unreachable(error),
        }
    }
}

impl OpenSource {
    /// Ends the connections in order, then the server where it is ours.
    ///
    /// All bytes have been read by then, so that a server which ends badly does no harm.
    pub(crate) async fn close(self) {
        if let Err(error) = self.client.close().await {
            tracing::info!("the source did not close in order: {error}");
        }
        match self.keeper {
            Keeper::Elsewhere => {}
            Keeper::Process(process) => drop(process),
            Keeper::Embedded(task) => {
                let _ = task.await;
            }
        }
    }
}

/// How long to wait for a server of our own.
const IMAGE_RETRY: Duration = Duration::from_secs(2);
