//! TLS in both directions against the peers: certificates always, pre-shared keys where they are built in.

use std::path::Path;

use serde_json::Value;

use crate::support::MIB;
use crate::support::certificates::{Authority, Role, Says};
use crate::support::disk::{add_bitmap, assert_same, reference, scatter};
use crate::support::lab::Lab;
use crate::support::process::{Process, tool, try_tool};
use crate::support::program::{nbdbackup, text};
use crate::support::server::{Server, Serving, nbdinfo};

const SIZE: u64 = 12 * MIB;

fn pki(lab: &Lab) -> Authority {
    Authority::with_both(lab.file("pki"))
}

/// The URI for a server's export over TLS.
fn secure(uri: &str, parameters: &str) -> String {
    let uri = uri.replacen("nbd", "nbds", 1);
    let join = if uri.contains('?') { '&' } else { '?' };
    format!("{uri}{join}{parameters}")
}

fn with_certificates(uri: &str, folder: impl AsRef<Path>) -> String {
    let folder = folder.as_ref().display();
    secure(uri, &format!("tls-certificates={folder}"))
}

/// `qemu-nbd` over TLS for an image with a bitmap.
fn qemu_nbd(lab: &Lab, image: &str, credentials: &str) -> Server {
    let object = format!("{credentials},id=tls0,endpoint=server");
    let args = [
        "--object",
        &object,
        "--tls-creds",
        "tls0",
        "-f",
        "qcow2",
        "-B",
        "bm0",
        image,
    ];
    Server::qemu_nbd(&lab.socket(), "vda", &args)
}

/// Backs a qcow2 image up in full, changes it, backs the increment up, and restores both.
fn back_up_twice(lab: &Lab, credentials: &str, parameters: &str) {
    let image = lab.qcow2("vda.qcow2", SIZE, 1);
    add_bitmap(&image, "bm0");
    let server = qemu_nbd(lab, &image, credentials);
    let uri = secure(server.uri(), parameters);
    let full = lab.backup("full", &uri, &["--bitmap", "bm0"]);
    drop(server);
    let raw = lab.file("reference.raw");
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&full, "snapshot"), &raw);
    scatter(&image, "qcow2", SIZE, 10, 2);
    let server = qemu_nbd(lab, &image, credentials);
    let uri = secure(server.uri(), parameters);
    let next = lab.backup("incremental", &uri, &["--bitmap", "bm0"]);
    assert_eq!(next["disks"][0]["kind"], "incremental", "{next}");
    drop(server);
    reference(&image, "qcow2", &raw);
    lab.assert_restores(&text(&next, "snapshot"), &raw);
}

/// A source that must be refused with exit code 20 and these words, and leave no snapshot.
#[track_caller]
fn assert_refused(lab: &Lab, uri: &str, words: &str) {
    let error = lab.try_backup("full", uri, &[]).error(20);
    let message = text(&error, "message");
    assert!(message.contains(words), "{uri}: {message}");
    assert!(lab.snapshots().is_empty(), "{uri}");
}

#[test]
fn qemu_nbd_with_certificates_is_a_source() {
    for verify_peer in ["yes", "no"] {
        let lab = Lab::new();
        let pki = pki(&lab);
        let credentials = format!(
            "tls-creds-x509,dir={},verify-peer={verify_peer}",
            pki.path()
        );
        back_up_twice(
            &lab,
            &credentials,
            &format!("tls-certificates={}", pki.path()),
        );
    }
}

#[test]
fn nbdkit_with_certificates_is_a_source() {
    let lab = Lab::new();
    let pki = pki(&lab);
    let image = lab.raw("vda.raw", SIZE, 3);
    for more in [&[][..], &["--tls-verify-peer"]] {
        let certificates = format!("--tls-certificates={}", pki.path());
        let args = [
            &["--tls=require", &certificates, "-r"],
            more,
            &["file", &image],
        ]
        .concat();
        let server = lab.nbdkit(&args);
        let full = lab.backup("full", &with_certificates(server.uri(), pki.path()), &[]);
        lab.assert_restores(&text(&full, "snapshot"), &image);
    }
}

#[test]
fn tcp_source_s_certificate_has_to_name_its_host() {
    let lab = Lab::new();
    let pki = Authority::new(lab.file("pki"));
    let says = Says {
        dns_name: None,
        ..Says::default()
    };
    pki.issue(Role::Server, &says);
    let image = lab.raw("vda.raw", SIZE, 4);
    let object = format!(
        "tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir={}",
        pki.path()
    );
    let args = [
        "--object",
        &object,
        "--tls-creds",
        "tls0",
        "-f",
        "raw",
        &image,
    ];
    let server = Server::qemu_nbd_tcp(&lab.file("log"), "vda", &args);
    let uri = with_certificates(server.uri(), pki.path());
    let named = uri.replace("127.0.0.1", "localhost");
    for uri in [&uri, &format!("{named}&tls-hostname=127.0.0.1")] {
        let full = lab.backup("full", uri, &[]);
        lab.assert_restores(&text(&full, "snapshot"), &image);
    }
    let lab = Lab::new();
    assert_refused(&lab, &named, "localhost");
    let other = format!("{uri}&tls-hostname=db.example.com");
    assert_refused(&lab, &other, "db.example.com");
}

#[test]
fn without_a_folder_those_are_trusted_whom_the_system_trusts() {
    let lab = Lab::new();
    let pki = pki(&lab);
    let image = lab.raw("vda.raw", SIZE, 5);
    let certificates = format!("--tls-certificates={}", pki.path());
    let server = lab.nbdkit(&["--tls=require", &certificates, "-r", "file", &image]);
    let uri = server.uri().replacen("nbd", "nbds", 1);
    let info = |file: &str| {
        let mut command = nbdbackup(&["--json", "info", &uri]);
        command
            .env("SSL_CERT_FILE", file)
            .env_remove("SSL_CERT_DIR");
        let run = Process::start(command).finish();
        (run.status.code(), String::from_utf8(run.stdout).unwrap())
    };
    let (code, said) = info(&pki.file("ca-cert.pem"));
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("\"tls\":true"), "{said}");
    let stranger = Authority::new(lab.file("stranger"));
    let (code, said) = info(&stranger.file("ca-cert.pem"));
    assert_eq!(code, Some(20), "{said}");
}

#[test]
fn server_that_cannot_prove_its_name_is_no_source() {
    let lab = Lab::new();
    let pki = pki(&lab);
    let image = lab.raw("vda.raw", MIB, 6);
    let serve = |pki: &Authority| {
        let certificates = format!("--tls-certificates={}", pki.path());
        lab.nbdkit(&["--tls=require", &certificates, "-r", "file", &image])
    };
    let stranger = Authority::new(lab.file("stranger"));
    let server = serve(&pki);
    assert_refused(
        &lab,
        &with_certificates(server.uri(), stranger.path()),
        "UnknownIssuer",
    );
    let uri = with_certificates(server.uri(), pki.path());
    assert_refused(
        &lab,
        &format!("{uri}&tls-hostname=db.example.com"),
        "db.example.com",
    );
    let says = Says {
        expired: true,
        ..Says::default()
    };
    let late = Authority::new(lab.file("late"));
    late.issue(Role::Server, &says);
    let server = serve(&late);
    assert_refused(
        &lab,
        &with_certificates(server.uri(), late.path()),
        "expired",
    );
    pki.issue_self_signed();
    let server = serve(&pki);
    assert_refused(
        &lab,
        &with_certificates(server.uri(), pki.path()),
        "UnknownIssuer",
    );
}

#[test]
fn client_without_a_certificate_is_told_that_the_server_wants_one() {
    let lab = Lab::new();
    let pki = pki(&lab);
    let nobody = pki.copy(&["ca-cert.pem"], lab.file("nobody"));
    let image = lab.qcow2("vda.qcow2", MIB, 7);
    add_bitmap(&image, "bm0");
    let credentials = format!("tls-creds-x509,dir={},verify-peer=yes", pki.path());
    let qemu = qemu_nbd(&lab, &image, &credentials);
    let certificates = format!("--tls-certificates={}", pki.path());
    let nbdkit = lab.nbdkit(&["--tls=require", "--tls-verify-peer", &certificates, "null"]);
    for server in [&qemu, &nbdkit] {
        let uri = with_certificates(server.uri(), &nobody);
        assert_refused(&lab, &uri, "credentials rejected by the server");
    }
}

#[test]
fn server_without_tls_is_no_source_where_tls_was_asked_for() {
    let lab = Lab::new();
    let pki = pki(&lab);
    let image = lab.qcow2("vda.qcow2", MIB, 8);
    let qemu = lab.serve_qcow2(&image, &[]);
    let nbdkit = lab.nbdkit(&["--tls=off", "null", "1M"]);
    let oldstyle = lab.nbdkit(&["-o", "null", "1M"]);
    let unfixed = lab.nbdkit(&["--mask-handshake=0", "null", "1M"]);
    for (server, words) in [
        (&qemu, "refused STARTTLS"),
        (&nbdkit, "refused STARTTLS"),
        (&oldstyle, "oldstyle"),
        (&unfixed, "STARTTLS cannot be asked for"),
    ] {
        assert_refused(&lab, &with_certificates(server.uri(), pki.path()), words);
    }
}

#[test]
fn server_with_tls_is_no_source_without() {
    let lab = Lab::new();
    let pki = pki(&lab);
    let certificates = format!("--tls-certificates={}", pki.path());
    let server = lab.nbdkit(&["--tls=require", &certificates, "null", "1M"]);
    assert_refused(&lab, server.uri(), "ERR_TLS_REQD");
}

#[test]
fn dummy_for_clients_without_tls_is_never_taken_for_the_disk() {
    let lab = Lab::new();
    let pki = pki(&lab);
    let stranger = Authority::with_both(lab.file("stranger"));
    let image = lab.raw("vda.raw", SIZE, 9);
    let certificates = format!("--tls-certificates={}", pki.path());
    let server = lab.nbdkit(&[
        "--tls=on",
        &certificates,
        "--filter=tls-fallback",
        "-r",
        "file",
        &image,
    ]);
    let dummy = nbdinfo(server.uri());
    assert_eq!(dummy["export-size"], 512, "{dummy}");
    assert_refused(
        &lab,
        &with_certificates(server.uri(), stranger.path()),
        "UnknownIssuer",
    );
    let full = lab.backup("full", &with_certificates(server.uri(), pki.path()), &[]);
    assert_eq!(full["disks"][0]["size_bytes"], SIZE);
    lab.assert_restores(&text(&full, "snapshot"), &image);
}

/// A laboratory with one snapshot of a raw image, served over TLS.
fn serving(lab: &Lab, address: &str, more: &[&str]) -> (Serving, String) {
    let image = lab.raw("vda.raw", SIZE, 10);
    let full = lab.backup("full", &image, &[]);
    let (repository, snapshot) = (lab.repository(), text(&full, "snapshot"));
    let args = [
        "-r",
        &repository,
        "--json",
        "restore",
        &snapshot,
        "--serve",
        address,
    ];
    (Serving::start(&[&args, more].concat()), image)
}

/// Reads a served disk with `qemu-img` and this TLS object.
fn qemu_img(lab: &Lab, socket: &str, credentials: &str, node: &str) -> Result<String, String> {
    let out = lab.file("qemu.raw");
    let run = try_tool(
        "qemu-img",
        &[
            "convert",
            "--object",
            &format!("{credentials},id=tls0,endpoint=client"),
            "--image-opts",
            "-O",
            "raw",
            &format!(
                "driver=nbd,server.type=unix,server.path={socket},export=vda,tls-creds=tls0{node}"
            ),
            &out,
        ],
    );
    match run.status.success() {
        true => Ok(out),
        false => Err(run.stderr),
    }
}

#[test]
fn libnbd_and_qemu_read_a_snapshot_over_tls() {
    for verify in [&[][..], &["--tls-verify-peer"]] {
        let lab = Lab::new();
        let pki = pki(&lab);
        let socket = lab.socket();
        let more = [&["--tls-certificates", pki.path()], verify].concat();
        let (serving, image) = serving(&lab, &format!("unix:{socket}"), &more);
        let uri = serving.uri("vda");
        assert!(uri.starts_with("nbds+unix:///vda?socket="), "{uri}");
        let known = format!(
            "{uri}&tls-certificates={}&tls-hostname=localhost",
            pki.path()
        );
        let info = nbdinfo(&known);
        assert_eq!(info["export-size"], SIZE);
        let out = lab.file("copy.raw");
        tool("nbdcopy", &[&known, &out]);
        assert_same(&out, &image);
        let credentials = format!("tls-creds-x509,dir={}", pki.path());
        let node = ",tls-hostname=localhost";
        let read = qemu_img(&lab, &socket, &credentials, node).unwrap();
        assert_same(&read, &image);
        // Ourselves.
        let again = lab.run(&["full", &format!("{uri}&tls-certificates={}", pki.path())]);
        assert_eq!(again.result()["disks"][0]["size_bytes"], SIZE);
        // In the clear there is nothing to be had.
        let plain = uri.replacen("nbds", "nbd", 1);
        assert!(!try_tool("nbdinfo", &[&plain]).status.success());
        assert!(!try_tool("nbdinfo", &["--list", &plain]).status.success());
    }
}

#[test]
fn clients_that_cannot_prove_themselves_read_nothing() {
    let lab = Lab::new();
    let pki = pki(&lab);
    let nobody = pki.copy(&["ca-cert.pem"], lab.file("nobody"));
    let stranger = Authority::with_both(lab.file("stranger"));
    let mixed = stranger.copy(&["client-cert.pem", "client-key.pem"], lab.file("mixed"));
    pki.copy(&["ca-cert.pem"], &mixed);
    let socket = lab.socket();
    let more = ["--tls-certificates", pki.path(), "--tls-verify-peer"];
    let (serving, _) = serving(&lab, &format!("unix:{socket}"), &more);
    for folder in [nobody, mixed] {
        let folder = folder.to_str().unwrap();
        let uri = format!(
            "{}&tls-certificates={folder}&tls-hostname=localhost",
            serving.uri("vda")
        );
        assert!(!try_tool("nbdinfo", &[&uri]).status.success(), "{folder}");
        let credentials = format!("tls-creds-x509,dir={folder}");
        qemu_img(&lab, &socket, &credentials, ",tls-hostname=localhost").unwrap_err();
    }
}

#[test]
fn over_tls_any_interface_may_be_served() {
    let lab = Lab::new();
    let pki = pki(&lab);
    let more = ["--tls-certificates", pki.path()];
    let (serving, image) = serving(&lab, "0.0.0.0:0", &more);
    let uri = serving.uri("vda");
    assert!(uri.starts_with("nbds://"), "{uri}");
    let uri = uri.replace("0.0.0.0", "localhost");
    let out = lab.file("copy.raw");
    tool("nbdcopy", &[&with_parameter(&uri, &pki), &out]);
    assert_same(&out, &image);
}

fn with_parameter(uri: &str, pki: &Authority) -> String {
    format!("{uri}?tls-certificates={}", pki.path())
}

#[test]
fn address_and_tls_settings_have_to_agree() {
    let lab = Lab::new();
    let pki = pki(&lab);
    let image = lab.raw("vda.raw", MIB, 11);
    let snapshot = text(&lab.backup("full", &image, &[]), "snapshot");
    let socket = lab.socket();
    let restore = ["restore", snapshot.as_str(), "--serve"];
    let plain = format!("nbd+unix:///?socket={socket}");
    let secure = format!("nbds+unix:///?socket={socket}");
    let own = format!("{secure}&tls-certificates={}", pki.path());
    let certificates = ["--tls-certificates", pki.path()];
    let try_with = |address: &str, more: &[&str]| -> Value {
        lab.run(&[&restore[..], &[address], more].concat()).error(2)
    };
    try_with(&secure, &[]);
    try_with(&plain, &certificates);
    try_with(&own, &certificates);
    try_with(&plain, &["--tls-verify-peer"]);
    try_with(
        &secure,
        &[&certificates[..], &["--tls-psk-file", "/f"]].concat(),
    );
    // Settings of no use.
    let nobody = pki.copy(&["ca-cert.pem"], lab.file("nobody"));
    let nobody = ["--tls-certificates", nobody.to_str().unwrap()];
    let error = lab
        .run(&[&restore[..], &[secure.as_str()], &nobody].concat())
        .error(1);
    assert!(
        text(&error, "message").contains("server-cert.pem"),
        "{error}"
    );
    assert!(!std::fs::exists(&socket).unwrap());
}

#[cfg(not(feature = "tls-psk"))]
#[test]
fn build_without_pre_shared_keys_says_so() {
    let lab = Lab::new();
    let uri = secure(
        &crate::support::server::uri(&lab.socket(), ""),
        "tls-psk-file=/f",
    );
    assert_refused(&lab, &uri, "tls-psk");
}

/// With pre-shared keys.
#[cfg(feature = "tls-psk")]
mod psk {
    use super::*;
    use crate::support::certificates::add_key;
    use crate::support::program::run;

    /// A folder with a file of keys, as QEMU wants it, and the file.
    fn keys(lab: &Lab, folder: &str, identities: &[&str]) -> (String, String) {
        let folder = lab.file(folder);
        std::fs::create_dir_all(&folder).unwrap();
        let file = format!("{folder}/keys.psk");
        for identity in identities {
            add_key(&file, identity);
        }
        (folder, file)
    }

    fn as_user(uri: &str, user: &str, file: &str) -> String {
        secure(uri, &format!("tls-psk-file={file}")).replacen("://", &format!("://{user}@"), 1)
    }

    #[test]
    fn qemu_nbd_with_keys_is_a_source() {
        let lab = Lab::new();
        let (folder, _) = keys(&lab, "keys", &["qemu"]);
        let credentials = format!("tls-creds-psk,dir={folder}");
        // A folder, and the only key in it.
        back_up_twice(&lab, &credentials, &format!("tls-psk-file={folder}"));
    }

    #[test]
    fn nbdkit_with_keys_is_a_source_over_each_version_of_tls() {
        let lab = Lab::new();
        let (_, file) = keys(&lab, "keys", &["alice", "we:ird", "bob"]);
        let image = lab.raw("vda.raw", SIZE, 12);
        let server = lab.nbdkit(&[
            "--tls=require",
            &format!("--tls-psk={file}"),
            "-r",
            "file",
            &image,
        ]);
        for user in ["alice", "bob", "we%3Aird"] {
            let full = lab.backup("full", &as_user(server.uri(), user, &file), &[]);
            lab.assert_restores(&text(&full, "snapshot"), &image);
        }
        let (folder, file) = keys(&lab, "old", &["qemu"]);
        let image = lab.qcow2("vda.qcow2", SIZE, 13);
        add_bitmap(&image, "bm0");
        let credentials = format!("tls-creds-psk,dir={folder},priority=NORMAL:-VERS-TLS1.3");
        let server = qemu_nbd(&lab, &image, &credentials);
        let full = lab.backup("full", &as_user(server.uri(), "qemu", &file), &[]);
        let raw = lab.file("reference.raw");
        reference(&image, "qcow2", &raw);
        lab.assert_restores(&text(&full, "snapshot"), &raw);
    }

    #[test]
    fn wrong_keys_are_refused_and_never_shown() {
        let lab = Lab::new();
        let (folder, file) = keys(&lab, "keys", &["alice"]);
        let (_, wrong) = keys(&lab, "wrong", &["alice", "eve"]);
        let image = lab.qcow2("vda.qcow2", MIB, 14);
        add_bitmap(&image, "bm0");
        let qemu = qemu_nbd(&lab, &image, &format!("tls-creds-psk,dir={folder}"));
        let nbdkit = lab.nbdkit(&["--tls=require", &format!("--tls-psk={file}"), "null", "1M"]);
        let secrets: Vec<String> = [&file, &wrong]
            .iter()
            .flat_map(|f| {
                std::fs::read_to_string(f)
                    .unwrap()
                    .lines()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .map(|line| line.rsplit_once(':').unwrap().1.to_owned())
            .collect();
        for server in [&qemu, &nbdkit] {
            for user in ["alice", "eve"] {
                let uri = as_user(server.uri(), user, &wrong);
                let run = lab.run(&["-vv", "full", &uri]);
                let error = run.error(20);
                assert!(
                    text(&error, "message").contains("credentials rejected"),
                    "{error}"
                );
                let said = format!("{}{}", run.stderr, String::from_utf8_lossy(&run.stdout));
                assert!(!secrets.iter().any(|s| said.contains(s.as_str())), "{said}");
            }
        }
        let uri = as_user(nbdkit.uri(), "mallory", &file);
        assert_refused(&lab, &uri, "no key for \"mallory\"");
        let uri = secure(nbdkit.uri(), &format!("tls-psk-file={wrong}"));
        assert_refused(&lab, &uri, "2 keys");
        std::fs::write(&wrong, "alice:00112233\n").unwrap();
        assert_refused(&lab, &as_user(nbdkit.uri(), "alice", &wrong), "line 1");
    }

    #[test]
    fn server_with_certificates_does_not_pass_for_one_that_knows_the_key() {
        let lab = Lab::new();
        let pki = pki(&lab);
        let (_, file) = keys(&lab, "keys", &["alice"]);
        let certificates = format!("--tls-certificates={}", pki.path());
        let server = lab.nbdkit(&["--tls=require", &certificates, "null", "1M"]);
        assert_refused(&lab, &as_user(server.uri(), "alice", &file), "TLS");
    }

    #[test]
    fn server_without_tls_is_no_source_for_a_key() {
        let lab = Lab::new();
        let (_, file) = keys(&lab, "keys", &["alice"]);
        let server = lab.nbdkit(&["null", "1M"]);
        assert_refused(
            &lab,
            &as_user(server.uri(), "alice", &file),
            "refused STARTTLS",
        );
    }

    #[test]
    fn libnbd_and_qemu_read_a_snapshot_with_keys() {
        let lab = Lab::new();
        let (folder, file) = keys(&lab, "keys", &["alice", "we:ird", "qemu"]);
        let (wrong_folder, wrong) = keys(&lab, "wrong", &["alice", "eve", "qemu"]);
        let socket = lab.socket();
        let more = ["--tls-psk-file", &file];
        let (serving, image) = serving(&lab, &format!("unix:{socket}"), &more);
        let plain = serving.uri("vda").replacen("nbds", "nbd", 1);
        for user in ["alice", "qemu"] {
            let out = lab.file("copy.raw");
            tool("nbdcopy", &[&as_user(&plain, user, &file), &out]);
            assert_same(&out, &image);
        }
        for (credentials, user) in [
            ("", "qemu"),
            ("", "alice"),
            (",priority=NORMAL:-VERS-TLS1.3", "alice"),
        ] {
            let credentials = format!("tls-creds-psk,dir={folder},username={user}{credentials}");
            let read = qemu_img(&lab, &socket, &credentials, "").unwrap();
            assert_same(&read, &image);
        }
        for user in ["alice", "we%3Aird"] {
            let again = lab.run(&["full", &as_user(&plain, user, &file)]).result();
            assert_eq!(again["disks"][0]["size_bytes"], SIZE);
        }
        for user in ["alice", "eve"] {
            let uri = as_user(&plain, user, &wrong);
            assert!(!try_tool("nbdinfo", &[&uri]).status.success(), "{user}");
            let credentials = format!("tls-creds-psk,dir={wrong_folder},username={user}");
            qemu_img(&lab, &socket, &credentials, "").unwrap_err();
            assert_eq!(run(&["--json", "info", &uri]).code, Some(20));
        }
        assert!(!try_tool("nbdinfo", &[&plain]).status.success());
    }
}
