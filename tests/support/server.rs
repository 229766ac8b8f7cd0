//! The peers that serve disks: qemu-nbd, nbdkit, and nbdbackup itself.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::process::{Process, tool};
use super::program::{json_line, nbdbackup};
use super::wait::until;

/// A peer that serves exports on a Unix socket; killed when dropped.
///
/// The test itself listens and hands the socket over, as systemd would: clients can connect from the start, and
/// nobody has to wait for a server to be ready.
pub(crate) struct Server {
    child: Child,
    uri: String,
    stderr: String,
}

impl Server {
    /// Starts `qemu-nbd`, read-only and with several clients, for an export on a Unix socket.
    pub(crate) fn qemu_nbd(socket: &str, export: &str, args: &[&str]) -> Self {
        let args = [QEMU_NBD, &["-x", export], args].concat();
        Self::start(
            listen(socket),
            uri(socket, export),
            socket,
            "qemu-nbd",
            &args,
        )
    }

    /// Starts `qemu-nbd` for an export that clients may write.
    pub(crate) fn qemu_nbd_writable(socket: &str, export: &str, args: &[&str]) -> Self {
        let args = [&["--persistent", "--shared=8", "-x", export], args].concat();
        Self::start(
            listen(socket),
            uri(socket, export),
            socket,
            "qemu-nbd",
            &args,
        )
    }

    /// Starts `qemu-nbd` on a TCP port of its own; `log` is where its stderr goes.
    pub(crate) fn qemu_nbd_tcp(log: &str, export: &str, args: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("nbd://{}/{export}", listener.local_addr().unwrap());
        let args = [QEMU_NBD, &["-x", export], args].concat();
        Self::start(listener.into(), uri, log, "qemu-nbd", &args)
    }

    /// Starts the `qemu-nbd` 7.2 that `tests/setup.sh` unpacked, read-only and with several clients.
    pub(crate) fn old_qemu_nbd(socket: &str, export: &str, args: &[&str]) -> Self {
        let args = [QEMU_NBD, &["-x", export], args].concat();
        Self::start(
            listen(socket),
            uri(socket, export),
            socket,
            OLD_QEMU_NBD,
            &args,
        )
    }

    /// Starts that `qemu-nbd` for an export that clients may write.
    pub(crate) fn old_qemu_nbd_writable(socket: &str, export: &str, args: &[&str]) -> Self {
        let args = [&["--persistent", "--shared=8", "-x", export], args].concat();
        Self::start(
            listen(socket),
            uri(socket, export),
            socket,
            OLD_QEMU_NBD,
            &args,
        )
    }

    /// Starts `nbdkit` with its default export on a TCP port of its own; `log` is where its stderr goes.
    pub(crate) fn nbdkit_tcp(log: &str, args: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("nbd://{}/", listener.local_addr().unwrap());
        let args = [&["--foreground"], args].concat();
        Self::start(listener.into(), uri, log, "nbdkit", &args)
    }

    /// Starts `nbdkit` with its default export on a Unix socket.
    pub(crate) fn nbdkit(socket: &str, args: &[&str]) -> Self {
        Self::start(
            listen(socket),
            uri(socket, ""),
            socket,
            "nbdkit",
            &[&["--foreground"], args].concat(),
        )
    }

    /// The export's URI.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// What the server said on stderr so far.
    pub(crate) fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap()
    }

    /// Waits until the server ends by itself.
    pub(crate) fn wait(&mut self) {
        until("the server ends", || self.child.try_wait().unwrap());
    }

    /// Ends the server at once, as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts a server that takes its socket by `LISTEN_FDS`.
    fn start(socket: OwnedFd, uri: String, log: &str, program: &str, args: &[&str]) -> Self {
        let stderr = format!("{log}.stderr");
        let child = Command::new("sh")
            .args([
                "-c",
                "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\" 3<&0 </dev/null",
                "sh",
                program,
            ])
            .args(args)
            .stdin(Stdio::from(socket))
            .stdout(Stdio::null())
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        Self { child, uri, stderr }
    }
}

/// Where `tests/setup.sh` unpacked Debian 12's own QEMU tools.
pub(crate) const OLD_QEMU_NBD: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/target/peers/qemu-7.2/usr/bin/qemu-nbd"
);

const QEMU_NBD: &[&str] = &["--read-only", "--persistent", "--shared=8"];

fn listen(socket: &str) -> OwnedFd {
    UnixListener::bind(socket)
        .unwrap_or_else(|e| panic!("{socket}: {e}"))
        .into()
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The URI of an export behind a Unix socket.
pub(crate) fn uri(socket: &str, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={socket}")
}

/// A snapshot served by nbdbackup itself.
pub(crate) struct Serving {
    pub(crate) process: Process,
    /// The line that said so.
    pub(crate) line: Value,
}

impl Serving {
    /// Starts `nbdbackup ... --json`, which must serve, and waits until it says that it does.
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut process = Process::start(nbdbackup(args));
        loop {
            let Some(line) = process.next_line() else {
                let run = process.finish();
                panic!(
                    "ended instead of serving: {}{}",
                    String::from_utf8_lossy(&run.stdout),
                    run.stderr
                );
            };
            let line = json_line(std::str::from_utf8(&line).unwrap());
            if line["type"] == "serving" {
                return Self { process, line };
            }
        }
    }

    /// The URI of an export, as the program printed it.
    pub(crate) fn uri(&self, export: &str) -> String {
        let exports = self.line["exports"]
            .as_array()
            .expect("exports is an array");
        let found = exports.iter().find(|e| e["name"] == export);
        let found = found.unwrap_or_else(|| panic!("no export {export} in {}", self.line));
        found["uri"].as_str().expect("uri is text").to_owned()
    }
}

/// One extent of a metadata context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) flags: u64,
}

/// What libnbd sees of a context.
pub(crate) fn extents(uri: &str, context: &str) -> Vec<Extent> {
    let map = tool("nbdinfo", &["--json", &format!("--map={context}"), uri]);
    let map: Vec<Value> = serde_json::from_slice(&map).unwrap();
    map.iter()
        .map(|e| Extent {
            offset: e["offset"].as_u64().unwrap(),
            length: e["length"].as_u64().unwrap(),
            flags: e["type"].as_u64().unwrap(),
        })
        .collect()
}

/// The dirty extents of a bitmap, as libnbd sees them.
pub(crate) fn dirty(uri: &str, bitmap: &str) -> Vec<Extent> {
    let mut all = extents(uri, &format!("qemu:dirty-bitmap:{bitmap}"));
    all.retain(|e| e.flags & 1 != 0);
    all
}

/// What libnbd sees of an export.
pub(crate) fn nbdinfo(uri: &str) -> Value {
    let info: Value = serde_json::from_slice(&tool("nbdinfo", &["--json", uri])).unwrap();
    info["exports"][0].clone()
}
