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
    uri: String,
}

impl Serving {
    /// Serves an image by `qemu-nbd`, with a bitmap if one is named.
    pub(crate) fn qemu_nbd(
        scratch: &Path,
        image: &Path,
        bitmap: Option<&str>,
    ) -> Result<Self, Fault> {
        let socket = scratch.join("qemu.sock");
        let uri = format!("nbd+unix:///vda?socket={}", socket.display());
        let command = qemu_nbd(image, bitmap, &socket);
        Self::start(command, socket, uri, scratch)
    }

    /// Serves an image with its `bm0` by `qemu-nbd`, over TLS with certificates that are made here.
    pub(crate) fn qemu_nbd_tls(scratch: &Path, image: &Path) -> Result<Self, Fault> {
        let folder = scratch.join("certificates");
        std::fs::create_dir_all(&folder)?;
        certify(&folder, "ca", "CA:TRUE", "keyCertSign", &[])?;
        let by = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"];
        let usage = "digitalSignature,keyEncipherment";
        certify(&folder, "server", "CA:FALSE", usage, &by)?;
        let socket = scratch.join("tls.sock");
        let uri = format!(
            "nbds+unix:///vda?socket={}&tls-certificates={}&tls-hostname=localhost",
            socket.display(),
            folder.display()
        );
        let mut command = qemu_nbd(image, Some("bm0"), &socket);
        command
            .arg("--object")
            .arg(format!(
                "tls-creds-x509,id=tls,endpoint=server,verify-peer=no,dir={}",
                folder.display()
            ))
            .arg("--tls-creds=tls");
        Self::start(command, socket, uri, scratch)
    }

    /// Serves a raw image by `nbdkit`, which waits so long before each read.
    pub(crate) fn slow(scratch: &Path, image: &Path, millis: u32) -> Result<Self, Fault> {
        let file = format!("file={}", image.display());
        let delay = format!("rdelay={millis}ms");
        Self::nbdkit(scratch, &["--filter=delay", "file", &file, &delay])
    }

    /// Serves a disk of noise and holes by `nbdkit`, which computes both.
    pub(crate) fn quarter_full(scratch: &Path, size: &str) -> Result<Self, Fault> {
        let size = format!("size={size}");
        Self::nbdkit(
            scratch,
            &[
                "sparse-random",
                &size,
                "seed=1",
                "percent=25",
                "random-content=true",
            ],
        )
    }

    /// Serves a repository's newest snapshot.
    pub(crate) fn snapshot(
        scratch: &Path,
        program: &Path,
        repository: &Path,
    ) -> Result<Self, Fault> {
        let socket = scratch.join("snapshot.sock");
        let uri = format!("nbd+unix:///vda?socket={}", socket.display());
        let mut command = Command::new(program);
        command
            .arg("--repo")
            .arg(repository)
            .args(["restore", "latest", "--serve"])
            .arg(format!("unix:{}", socket.display()));
        Self::start(command, socket, uri, scratch)
    }

    /// The address of its export.
    pub(crate) fn uri(&self) -> String {
        self.uri.clone()
    }

    fn nbdkit(scratch: &Path, words: &[&str]) -> Result<Self, Fault> {
        let socket = scratch.join("nbdkit.sock");
        let uri = format!("nbd+unix:///vda?socket={}", socket.display());
        let mut command = Command::new("nbdkit");
        command
            .args(["--foreground", "--readonly", "--unix"])
            .arg(&socket)
            .args(words);
        Self::start(command, socket, uri, scratch)
    }

    fn start(
        mut command: Command,
        socket: PathBuf,
        uri: String,
        scratch: &Path,
    ) -> Result<Self, Fault> {
        let _ = std::fs::remove_file(&socket);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(scratch.join("server.stderr"))?)
            .spawn()?;
        let mut serving = Self { child, socket, uri };
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

/// The server that everything is measured with: read-only, for several connections at once.
fn qemu_nbd(image: &Path, bitmap: Option<&str>, socket: &Path) -> Command {
    let format = match image.extension() {
        Some(ending) if ending == "qcow2" => "qcow2",
        _ => "raw",
    };
    let mut command = Command::new("qemu-nbd");
    command
        .args(["--read-only", "--persistent", "--shared=16", "--format"])
        .args([format, "--export-name=vda", "--socket"])
        .arg(socket)
        .args(bitmap.map(|name| format!("--bitmap={name}")))
        .arg(image);
    command
}

/// Makes a key and a certificate of `localhost`, signed by itself or as told.
fn certify(
    folder: &Path,
    name: &str,
    basic: &str,
    usage: &str,
    signed: &[&str],
) -> Result<(), Fault> {
    let made = Command::new("openssl")
        .current_dir(folder)
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ])
        .args(["-subj", "/CN=localhost"])
        .args(["-addext", "subjectAltName=DNS:localhost", "-addext"])
        .arg(format!("basicConstraints=critical,{basic}"))
        .arg("-addext")
        .arg(format!("keyUsage=critical,{usage}"))
        .args(["-keyout", &format!("{name}-key.pem")])
        .args(["-out", &format!("{name}-cert.pem")])
        .args(signed)
        .output()?;
    match made.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&made.stderr).into()),
    }
}
