//! The cells of the table over TLS that `interop::tls` leaves open: TCP, every tool, certificates and keys.

use std::path::Path;

use nbdbackup::nbd::tls::TlsServer;

use super::writable::Writable;
use super::{SIZE, backs_up_by_bitmap, backs_up_whole, libnbd::nbdsh, restores_into};
use crate::support::certificates::Authority;
use crate::support::disk::assert_same;
use crate::support::lab::Lab;
use crate::support::process::tool;
use crate::support::program::text;
use crate::support::server::{Server, Serving, nbdinfo};

/// A way of proving who one is, in the words of each program.
struct Means {
    /// For `nbdbackup restore --serve`.
    ours: Vec<String>,
    /// A parameter of URIs, ours and libnbd's.
    parameter: String,
    /// The user's name in URIs of libnbd, which ends in `@`, or nothing.
    user: &'static str,
    /// Of QEMU's object, without the end that it is for.
    object: String,
    /// For nbdkit.
    nbdkit: Vec<String>,
}

/// What a test needs of where the servers listen.
#[derive(Clone, Copy, PartialEq)]
enum At {
    Unix,
    Tcp,
}

fn certificates(lab: &Lab) -> Means {
    let pki = Authority::with_both(lab.file("pki"));
    let folder = pki.path();
    Means {
        ours: ["--tls-certificates", folder, "--tls-verify-peer"]
            .map(str::to_owned)
            .to_vec(),
        parameter: format!("tls-certificates={folder}"),
        user: "",
        object: format!("tls-creds-x509,id=tls0,dir={folder}"),
        nbdkit: vec![
            "--tls=require".to_owned(),
            format!("--tls-certificates={folder}"),
            "--tls-verify-peer".to_owned(),
        ],
    }
}

#[cfg(feature = "tls-psk")]
fn keys(lab: &Lab) -> Means {
    let folder = lab.file("keys");
    std::fs::create_dir_all(&folder).unwrap();
    let file = format!("{folder}/keys.psk");
    crate::support::certificates::add_key(&file, "alice");
    Means {
        ours: vec!["--tls-psk-file".to_owned(), file.clone()],
        parameter: format!("tls-psk-file={file}"),
        user: "alice@",
        object: format!("tls-creds-psk,id=tls0,dir={folder}"),
        nbdkit: vec!["--tls=require".to_owned(), format!("--tls-psk={file}")],
    }
}

impl Means {
    /// The URI over TLS for the one of a server in the clear, or of ours.
    fn uri(&self, uri: &str) -> String {
        let uri = match uri.starts_with("nbds") {
            true => uri.to_owned(),
            false => uri.replacen("nbd", "nbds", 1),
        };
        let uri = uri.replacen("://", &format!("://{}", self.user), 1);
        let join = if uri.contains('?') { '&' } else { '?' };
        format!("{uri}{join}{}", self.parameter)
    }

    /// As [`Means::uri`] for libnbd, which has to be told the host's name behind a Unix socket.
    fn libnbd_uri(&self, uri: &str) -> String {
        match self.user.is_empty() && uri.contains("+unix") {
            true => format!("{}&tls-hostname=localhost", self.uri(uri)),
            false => self.uri(uri),
        }
    }

    /// QEMU's object for a client.
    fn client_object(&self) -> String {
        let object = format!("{},endpoint=client", self.object);
        match self.user.strip_suffix('@') {
            Some(user) => format!("{object},username={user}"),
            None => object,
        }
    }

    /// QEMU's node for our export behind a server, which has to be told the host's name as libnbd has.
    fn qemu_node(&self, at: At, server: &str) -> String {
        let name = match (self.user, at) {
            ("", At::Unix) => ",tls-hostname=localhost",
            _ => "",
        };
        format!("driver=nbd,{server},export=vda,tls-creds=tls0{name}")
    }
}

/// Serves a snapshot by ourselves and reads it with each tool.
fn every_tool_reads_a_snapshot(at: At, means: impl Fn(&Lab) -> Means) {
    let lab = Lab::new();
    let means = means(&lab);
    let image = lab.raw("vda.raw", SIZE, 1);
    let snapshot = text(&lab.backup("full", &image, &[]), "snapshot");
    let address = match at {
        At::Unix => format!("unix:{}", lab.socket()),
        At::Tcp => "127.0.0.1:0".to_owned(),
    };
    let repository = lab.repository();
    let args = ["-r", &repository, "--json", "restore", &snapshot];
    let own: Vec<&str> = means.ours.iter().map(String::as_str).collect();
    let serving = Serving::start(&[&args[..], &["--serve", &address], &own].concat());
    let plain = serving.uri("vda");
    let uri = means.libnbd_uri(&plain);

    let info = nbdinfo(&uri);
    assert_eq!(info["export-size"], SIZE);
    let map = tool("nbdinfo", &["--map", "--json", &uri]);
    let map: serde_json::Value = serde_json::from_slice(&map).unwrap();
    assert!(map.as_array().unwrap().len() > 1, "{map}");
    for connections in ["1", "4"] {
        let out = lab.file("nbdcopy.raw");
        tool("nbdcopy", &["-C", connections, &uri, &out]);
        assert_same(&out, &image);
    }
    let script = format!(
        "assert h.get_tls_negotiated()\nassert bytes(h.pread({SIZE}, 0)) == open({image:?}, 'rb').read()"
    );
    nbdsh(
        &uri,
        &format!(
            "{script}\nh.set_strict_mode(0)\nfails([errno.EPERM, errno.EINVAL], lambda: h.pwrite(b'x' * 4096, 0))\nh.pread(512, 0)"
        ),
    );
    let object = means.client_object();
    let server = match plain.split_once("socket=") {
        Some((_, socket)) => format!("server.type=unix,server.path={socket}"),
        None => {
            let address = plain.trim_start_matches("nbds://").split('/').next();
            let (host, port) = address.unwrap().rsplit_once(':').unwrap();
            format!("server.type=inet,server.host={host},server.port={port}")
        }
    };
    let node = means.qemu_node(at, &server);
    let out = lab.file("qemu.raw");
    let convert = ["convert", "--object", &object, "--image-opts", "-O", "raw"];
    tool("qemu-img", &[&convert[..], &[&node, &out]].concat());
    assert_same(&out, &image);
    // Ourselves.
    let again = lab.run(&["full", &means.uri(&plain)]).result();
    assert_eq!(again["disks"][0]["size_bytes"], SIZE);
}

/// Backs up behind `qemu-nbd` and nbdkit at TCP ports.
fn every_server_at_a_tcp_port_is_backed_up(means: impl Fn(&Lab) -> Means) {
    let lab = Lab::new();
    let means = means(&lab);
    let object = format!("{},endpoint=server,verify-peer=yes", means.object);
    backs_up_by_bitmap(&lab, 2, |image| {
        let args = ["--object", &object, "--tls-creds", "tls0"];
        let image = ["-f", "qcow2", "-B", "bm0", image];
        let args = [&args[..], &image].concat();
        let server = Server::qemu_nbd_tcp(&lab.file("log"), "vda", &args);
        let uri = means.uri(server.uri());
        (server, uri)
    });
    let image = lab.raw("vda.raw", SIZE, 3);
    let args: Vec<&str> = means.nbdkit.iter().map(String::as_str).collect();
    let args = [&args[..], &["-r", "file", &image]].concat();
    let server = Server::nbdkit_tcp(&lab.file("nbdkit"), &args);
    let more = ["--connections", "4"];
    backs_up_whole(&lab, &means.uri(server.uri()), &image, &more);
}

/// Backs up behind the older `qemu-nbd`.
fn old_qemu_nbd_is_backed_up(means: impl Fn(&Lab) -> Means) {
    let lab = Lab::new();
    let means = means(&lab);
    let object = format!("{},endpoint=server,verify-peer=yes", means.object);
    backs_up_by_bitmap(&lab, 4, |image| {
        let args = ["--object", &object, "--tls-creds", "tls0"];
        let image = ["-f", "qcow2", "-B", "bm0", image];
        let server = Server::old_qemu_nbd(&lab.socket(), "vda", &[&args[..], &image].concat());
        let uri = means.uri(server.uri());
        (server, uri)
    });
}

/// Has each tool change a writable disk in memory behind our server.
fn every_tool_changes_a_disk(means: impl Fn(&Lab) -> Means) {
    let lab = Lab::new();
    let means = means(&lab);
    let credentials = Path::new(&means.ours[1]);
    let tls = match means.user {
        "" => TlsServer::certificates(credentials, true),
        _ => TlsServer::pre_shared_keys(credentials),
    };
    let served = Writable::start_with(&lab, Some(tls.unwrap()));
    let uri = means.libnbd_uri(&served.uri);
    let image = lab.raw("vda.raw", SIZE, 7);
    for connections in ["1", "4"] {
        tool("nbdcopy", &["-C", connections, "--flush", &image, &uri]);
        assert_same(&served.dump(&lab), &image);
    }
    // What is refused has to be read past, through TLS.
    let script = "
h.set_strict_mode(0); size = h.get_size()
h.pwrite(b'w' * 100000, 5000, nbd.CMD_FLAG_FUA)
h.zero(50000, 6000, nbd.CMD_FLAG_NO_HOLE)
h.trim(8192, 8192)
fails([errno.ENOSPC, errno.EINVAL], lambda: h.pwrite(b'x' * (1 << 20), size - 512))
fails([errno.EINVAL], lambda: h.pwrite(b'x' * (1 << 20), 0, 0x80))
h.flush()
assert bytes(h.pread(100000, 5000)) == b'w' * 1000 + bytes(50000) + b'w' * 49000
";
    nbdsh(&uri, script);
    let other = lab.raw("other.raw", SIZE, 8);
    let object = means.client_object();
    let (_, socket) = served.uri.split_once("socket=").unwrap();
    let server = format!("server.type=unix,server.path={socket}");
    let node = means.qemu_node(At::Unix, &server);
    let convert = ["convert", "-n", "--object", &object, "-f", "raw"];
    let target = ["--target-image-opts", &other, &node];
    tool("qemu-img", &[&convert[..], &target].concat());
    assert_same(&served.dump(&lab), &other);
}

#[test]
fn every_tool_changes_a_disk_with_certificates() {
    every_tool_changes_a_disk(certificates);
}

#[cfg(feature = "tls-psk")]
#[test]
fn every_tool_changes_a_disk_with_keys() {
    every_tool_changes_a_disk(keys);
}

/// Restores into `qemu-nbd` and nbdkit.
fn snapshot_is_restored(means: impl Fn(&Lab) -> Means) {
    let lab = Lab::new();
    let means = means(&lab);
    let target = lab.file("target.raw");
    let file = std::fs::File::create(&target).unwrap();
    file.set_len(SIZE).unwrap();
    let object = format!("{},endpoint=server,verify-peer=yes", means.object);
    let args = [
        "--object",
        &object,
        "--tls-creds",
        "tls0",
        "-f",
        "raw",
        &target,
    ];
    let server = Server::qemu_nbd_writable(&lab.socket(), "vda", &args);
    restores_into(&lab, &means.uri(server.uri()), 5, &[]);
    let args: Vec<&str> = means.nbdkit.iter().map(String::as_str).collect();
    let size = SIZE.to_string();
    let server = lab.nbdkit(&[&args[..], &["memory", &size]].concat());
    restores_into(&lab, &means.uri(server.uri()), 6, &[]);
}

#[test]
fn snapshot_is_restored_with_certificates() {
    snapshot_is_restored(certificates);
}

#[cfg(feature = "tls-psk")]
#[test]
fn snapshot_is_restored_with_keys() {
    snapshot_is_restored(keys);
}

#[test]
fn every_tool_reads_a_snapshot_with_certificates_over_a_unix_socket() {
    every_tool_reads_a_snapshot(At::Unix, certificates);
}

#[test]
fn every_tool_reads_a_snapshot_with_certificates_over_tcp() {
    every_tool_reads_a_snapshot(At::Tcp, certificates);
}

#[test]
fn every_server_at_a_tcp_port_is_backed_up_with_certificates() {
    every_server_at_a_tcp_port_is_backed_up(certificates);
}

#[test]
fn old_qemu_nbd_is_backed_up_with_certificates() {
    old_qemu_nbd_is_backed_up(certificates);
}

#[cfg(feature = "tls-psk")]
#[test]
fn every_tool_reads_a_snapshot_with_keys_over_a_unix_socket() {
    every_tool_reads_a_snapshot(At::Unix, keys);
}

#[cfg(feature = "tls-psk")]
#[test]
fn every_tool_reads_a_snapshot_with_keys_over_tcp() {
    every_tool_reads_a_snapshot(At::Tcp, keys);
}

#[cfg(feature = "tls-psk")]
#[test]
fn every_server_at_a_tcp_port_is_backed_up_with_keys() {
    every_server_at_a_tcp_port_is_backed_up(keys);
}

#[cfg(feature = "tls-psk")]
#[test]
fn old_qemu_nbd_is_backed_up_with_keys() {
    old_qemu_nbd_is_backed_up(keys);
}
