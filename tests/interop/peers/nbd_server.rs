//! nbd-server of the NBD project as a source: simple replies, no contexts, a size of nothing in its answer to `INFO`.

use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{SIZE, backs_up_whole, restores_into};
use crate::support::certificates::Authority;
use crate::support::lab::Lab;
use crate::support::process::{signal, tool};
use crate::support::program::number;
use crate::support::server::{nbdinfo, uri};
use crate::support::wait::until;

/// A running nbd-server with one export, `vda`; ended when dropped.
struct NbdServer {
    id: u32,
    socket: String,
}

impl NbdServer {
    fn start(lab: &Lab, image: &str, generic: &str) -> Self {
        Self::start_as(lab, image, generic, "readonly = true")
    }

    fn start_as(lab: &Lab, image: &str, generic: &str, export: &str) -> Self {
        let (socket, configuration) = (lab.socket(), lab.file("nbd-server.conf"));
        let pid = format!("{socket}.pid");
        let text = format!(
            "[generic]\nunixsock = {socket}\nallowlist = true\n{generic}\n\
             [vda]\nexportname = {image}\n{export}\n"
        );
        std::fs::write(&configuration, text).unwrap();
        // It becomes a daemon, writes its id and listens.
        tool("nbd-server", &["-C", &configuration, "-p", &pid]);
        let id = until("nbd-server writes its process id", || {
            let written = std::fs::read_to_string(&pid).unwrap_or_default();
            written.strip_suffix('\n').map(|id| id.parse().unwrap())
        });
        until("nbd-server serves", || UnixStream::connect(&socket).ok());
        Self { id, socket }
    }

    fn uri(&self) -> String {
        uri(&self.socket, "vda")
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        if Path::new(&format!("/proc/{}", self.id)).exists() {
            signal(self.id, "TERM");
        }
    }
}

#[test]
fn disk_is_read_whole_with_a_warning_over_any_number_of_connections() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 1);
    let server = NbdServer::start(&lab, &image, "");
    for connections in ["1", "4"] {
        let full = backs_up_whole(&lab, &server.uri(), &image, &["--connections", connections]);
        assert_eq!(number(&full["disks"][0], "read_bytes"), SIZE);
        assert_eq!(full["warnings"][0]["code"], "no-allocation", "{full}");
    }
}

#[test]
fn incremental_falls_back_to_a_full_since_there_are_no_bitmaps() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 2);
    let server = NbdServer::start(&lab, &image, "");
    backs_up_whole(&lab, &server.uri(), &image, &[]);
    let next = lab.backup("incremental", &server.uri(), &["--bitmap", "bm0"]);
    assert_eq!(next["disks"][0]["kind"], "full", "{next}");
    assert_eq!(number(&next["disks"][0], "read_bytes"), SIZE, "{next}");
}

#[test]
fn size_of_nothing_in_its_answer_to_info_is_not_believed() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 3);
    let server = NbdServer::start(&lab, &image, "");
    // That is what it says where the export is only asked about.
    let list = tool("nbdinfo", &["--list", "--json", &server.uri()]);
    let list: serde_json::Value = serde_json::from_slice(&list).unwrap();
    assert_eq!(list["exports"][0]["export-size"], 0, "{list}");
    for source in [server.uri(), uri(&server.socket, "")] {
        for more in [&[][..], &["--map"]] {
            if source.contains("///?") && !more.is_empty() {
                continue;
            }
            let info = lab.run(&[&["info", source.as_str()], more].concat());
            let info = info.result();
            assert_eq!(info["exports"][0]["name"], "vda", "{info}");
            assert_eq!(info["exports"][0]["size_bytes"], SIZE, "{info}");
        }
    }
}

#[test]
fn snapshot_is_restored_into_it() {
    let lab = Lab::new();
    let target = lab.file("target.raw");
    let file = std::fs::File::create(&target).unwrap();
    file.set_len(SIZE).unwrap();
    for abilities in [
        "flush = true\nfua = true\ntrim = true",
        "flush = false",
        "flush = true\nrotational = true\nsync = true",
    ] {
        file.set_len(0).unwrap();
        file.set_len(SIZE).unwrap();
        let server = NbdServer::start_as(&lab, &target, "", abilities);
        // It cannot tell that the disk is blank.
        restores_into(&lab, &server.uri(), 6, &["--force"]);
    }
}

#[test]
fn name_that_it_does_not_have_is_refused() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 4);
    let server = NbdServer::start(&lab, &image, "");
    let other = uri(&server.socket, "vdb");
    lab.try_backup("full", &other, &[]).error(20);
    assert!(lab.snapshots().is_empty());
}

#[test]
fn disk_behind_certificates_is_backed_up() {
    let lab = Lab::new();
    let pki = Authority::with_both(lab.file("pki"));
    let image = lab.raw("vda.raw", SIZE, 5);
    let generic = format!(
        "force_tls = true\ncertfile = {}\nkeyfile = {}\ncacertfile = {}",
        pki.file("server-cert.pem"),
        pki.file("server-key.pem"),
        pki.file("ca-cert.pem")
    );
    let server = NbdServer::start(&lab, &image, &generic);
    let uri = server.uri().replacen("nbd", "nbds", 1);
    let uri = format!("{uri}&tls-certificates={}", pki.path());
    assert_eq!(
        nbdinfo(&format!("{uri}&tls-hostname=localhost"))["is_read_only"],
        true
    );
    backs_up_whole(&lab, &uri, &image, &[]);
    lab.try_backup("full", &server.uri(), &[]).error(20);
}
