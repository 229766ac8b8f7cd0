//! A private `qemu-nbd` child that serves one image read-only on a Unix socket of its own.
//!
//! It is not told to persist, so that it ends with its last client even where this process was killed.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::error::QemuError;
use super::image::absolute;

/// A running `qemu-nbd`; dropping it ends the process and removes its socket.
#[derive(Debug)]
pub struct QemuNbd {
    child: Child,
    socket: PathBuf,
    said: Arc<Mutex<Vec<u8>>>,
    listener: JoinHandle<()>,
    _folder: TempDir,
}

impl QemuNbd {
    /// Starts `qemu-nbd` on an image; the socket accepts connections at once.
    ///
    /// The listening socket is made here and handed down by socket activation, so that there is nothing to wait
    /// for: a connection made before the child is ready waits in the socket's queue, and is closed if the child ends.
    ///
    /// # Errors
    /// When the socket cannot be made or the program cannot be started.
    pub fn start(
        image: &Path,
        format: &str,
        bitmap: Option<&str>,
        connections: u8,
    ) -> Result<Self, QemuError> {
        let failed = |source| QemuError::Socket {
            program: PROGRAM,
            source,
        };
        let folder = tempfile::Builder::new()
            .prefix("nbdbackup-")
            .tempdir()
            .map_err(failed)?;
        let socket = folder.path().join("nbd");
        let listener: OwnedFd = UnixListener::bind(&socket).map_err(failed)?.into();
        let image = absolute(image).map_err(|source| QemuError::Image {
            path: image.to_owned(),
            source,
        })?;

        // Socket activation wants the listener as descriptor 3 and the child's own process id in LISTEN_PID;
        // the shell knows both, since exec keeps its id.
        let mut command = Command::new("/bin/sh");
        command
            .args([
                "-c",
                "exec env LISTEN_PID=$$ LISTEN_FDS=1 \"$@\" 3<&0 </dev/null",
                "sh",
                PROGRAM,
            ])
            .args([
                "--read-only",
                "--persistent",
                "--format",
                format,
                "--export-name=",
            ])
            .arg(format!("--shared={connections}"))
            .args(bitmap.map(|b| format!("--bitmap={b}")))
            .arg("--")
            .arg(image)
            .stdin(Stdio::from(listener))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|source| QemuError::Start {
            program: PROGRAM,
            source,
        })?;

        let said = Arc::new(Mutex::new(Vec::new()));
        let mut stderr = child.stderr.take().expect("stderr is a pipe");
        let words = Arc::clone(&said);
        let listener = tokio::spawn(async move {
            let mut piece = [0; 1024];
            while let Ok(len @ 1..) = stderr.read(&mut piece).await {
                let mut words = words.lock().expect("no holder panics");
                words.extend_from_slice(&piece[..len]);
                let excess = words.len().saturating_sub(MOST_WORDS);
                words.drain(..excess);
            }
        });
        Ok(Self {
            child,
            socket,
            said,
            listener,
            _folder: folder,
        })
    }

    /// The socket's path; the export's name is empty.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns why the process ended, if it did; for use when a connection to it failed.
    pub async fn into_failure(mut self) -> Option<QemuError> {
        // The connection's end and the process's are two events: the process that closed its socket is about to end.
        let ended = tokio::time::timeout(ENDING, self.child.wait())
            .await
            .is_ok();
        if !ended {
            return None;
        }
        let _ = self.listener.await;
        let message = last_words(&self.said.lock().expect("no holder panics"));
        Some(QemuError::Failed {
            program: PROGRAM,
            message,
        })
    }
}

/// Returns the last of what a program said, as one line.
pub(super) fn last_words(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    match lines.len() {
        0 => "it said nothing".to_owned(),
        n => lines[n.saturating_sub(3)..].join("; "),
    }
}

const PROGRAM: &str = "qemu-nbd";
const MOST_WORDS: usize = 4096;
const ENDING: std::time::Duration = std::time::Duration::from_secs(5);
