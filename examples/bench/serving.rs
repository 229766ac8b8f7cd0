//! Servers that run beside what is measured: `qemu-nbd`, and this program.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::Fault;

/// A server on a Unix socket; killed when dropped.
pub(crate) struct Serving {
    child: Child,
    socket: PathBuf,
    export: &'static str,
}

impl Serving {
    /// Serves an image by `qemu-nbd`, with a bitmap if one is named.
    pub(crate) fn qemu_nbd(
        scratch: &Path,
        image: &Path,
        bitmap: Option<&str>,
    ) -> Result<Self, Fault> {
        let socket = scratch.join("qemu.sock");
        let format = match image.extension() {
            Some(ending) if ending == "qcow2" => "qcow2",
            _ => "raw",
        };
        let mut command = Command::new("qemu-nbd");
        command
            .args(["--read-only", "--persistent", "--shared=16", "--format"])
            .args([format, "--export-name=vda", "--socket"])
            .arg(&socket)
            .args(bitmap.map(|name| format!("--bitmap={name}")))
            .arg(image);
        Self::start(command, socket, "vda", scratch)
    }

    /// Serves a repository's newest snapshot.
    pub(crate) fn snapshot(
        scratch: &Path,
        program: &Path,
        repository: &Path,
    ) -> Result<Self, Fault> {
        let socket = scratch.join("snapshot.sock");
        let mut command = Command::new(program);
        command
            .arg("--repo")
            .arg(repository)
            .args(["restore", "latest", "--serve"])
            .arg(format!("unix:{}", socket.display()));
        Self::start(command, socket, "vda", scratch)
    }

    /// The address of its export.
    pub(crate) fn uri(&self) -> String {
        format!(
            "nbd+unix:///{}?socket={}",
            self.export,
            self.socket.display()
        )
    }

    fn start(
        mut command: Command,
        socket: PathBuf,
        export: &'static str,
        scratch: &Path,
    ) -> Result<Self, Fault> {
        let _ = std::fs::remove_file(&socket);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(scratch.join("server.stderr"))?)
            .spawn()?;
        let mut serving = Self {
            child,
            socket,
            export,
        };
        let clock = Instant::now();
        while UnixStream::connect(&serving.socket).is_err() {
            if serving.child.try_wait()?.is_some() || clock.elapsed() > Duration::from_secs(20) {
                let said = std::fs::read_to_string(scratch.join("server.stderr"))?;
                return Err(format!("{command:?} does not serve: {said}").into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(serving)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}
