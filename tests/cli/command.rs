//! Exit codes of the world outside: repositories and sources that are missing, refuse or are not what they should be.

use crate::support::MIB;
use crate::support::lab::Lab;
use crate::support::process::tool;
use crate::support::program::{number, text};
use crate::support::server::{Server, uri};

#[test]
fn repository_that_does_not_exist_is_10_for_every_command() {
    let lab = Lab::empty();
    let image = lab.raw("vda.raw", MIB, 1);
    let commands: &[&[&str]] = &[
        &["full", &image],
        &["incremental", &image, "--bitmap", "bm0"],
        &["restore", "latest", "--to", "out.raw"],
        &["restore", "latest", "--serve", "unix:socket"],
        &["snapshots"],
        &["show", "latest"],
        &["diff", "latest", "latest"],
    ];
    for command in commands {
        let error = lab.run(command).error(10);
        assert!(
            text(&error, "message").contains(&lab.repository()),
            "{error}"
        );
        assert_eq!(error["retryable"], false);
        assert!(
            !std::fs::exists(lab.repository()).unwrap(),
            "{command:?} made a repository"
        );
    }
    std::fs::create_dir(lab.repository()).unwrap();
    lab.run(&["snapshots"]).error(10);
}

#[test]
fn init_makes_a_repository_once() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", MIB, 2);
    let snapshot = text(&lab.backup("full", &image, &[]), "snapshot");
    let files = lab.repository_files();
    lab.run(&["init", "--encryption", "none"]).error(1);
    assert_eq!(lab.repository_files(), files);
    lab.assert_restores(&snapshot, &image);
}

#[test]
fn init_leaves_a_folder_with_other_things_alone() {
    let lab = Lab::empty();
    std::fs::create_dir(lab.repository()).unwrap();
    std::fs::write(lab.file("repository/precious"), "photos").unwrap();
    lab.run(&["init", "--encryption", "none"]).error(1);
    assert_eq!(lab.repository_files().len(), 1);
}

#[test]
fn init_says_what_it_made() {
    let lab = Lab::empty();
    let result = lab
        .run(&["init", "--encryption", "none", "--chunk-size", "256KiB"])
        .result();
    assert_eq!(number(&result, "chunk_bytes"), 256 << 10);
    assert!(!text(&result, "uuid").is_empty());
    assert_eq!(text(&result, "repository"), lab.repository());
}

#[test]
fn source_out_of_reach_is_20_and_worth_a_retry() {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", MIB, 3);
    let server = lab.serve_qcow2(&image, &[]);
    let no_export = server.uri().replace("/vda?", "/vdb?");
    let nobody = uri(&lab.socket(), "vda");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = format!("nbd://{}/vda", listener.local_addr().unwrap());
    drop(listener);
    for source in [
        &no_export,
        &nobody,
        &refused,
        "nbd://no-such-host.invalid/vda",
    ] {
        for command in [
            &["full", source][..],
            &["incremental", source, "--bitmap", "bm0"],
            &["info", source],
        ] {
            let error = lab.run(command).error(20);
            assert_eq!(error["retryable"], true, "{error}");
            assert!(text(&error, "message").contains(source), "{error}");
        }
    }
    assert!(lab.snapshots().is_empty());
}

#[test]
fn source_that_is_no_disk_is_20_and_not_waited_for() {
    let lab = Lab::new();
    let (pipe, folder) = (lab.file("pipe.raw"), lab.file("folder.raw"));
    tool("mkfifo", &[&pipe]);
    std::fs::create_dir(&folder).unwrap();
    for source in [&pipe, &folder, "/dev/zero"] {
        for command in [&["full", source][..], &["full", source, "--format", "raw"]] {
            let error = lab.run(command).error(20);
            let message = text(&error, "message");
            assert!(message.contains("neither a file nor"), "{message}");
            assert!(message.contains(source), "{message}");
        }
    }
    assert!(lab.snapshots().is_empty());
}

#[test]
fn source_that_hangs_up_or_speaks_something_else_is_20() {
    let lab = Lab::new();
    for words in [
        &b""[..],
        b"NBDMAGIC",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        &[0; 4096],
    ] {
        let socket = lab.socket();
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let server = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            std::io::Write::write_all(&mut client, words).unwrap();
        });
        lab.run(&["full", &uri(&socket, "vda")]).error(20);
        server.join().unwrap();
    }
}

#[test]
fn info_tells_what_an_export_offers() {
    let lab = Lab::empty();
    let image = lab.qcow2("vda.qcow2", 8 * MIB, 4);
    tool(
        "qemu-img",
        &["bitmap", "--add", "-f", "qcow2", &image, "bm0"],
    );
    crate::support::disk::qemu_io(&image, "qcow2", &["write -q -P 1 1M 100k".to_owned()]);
    let server = Server::qemu_nbd(
        &lab.socket(),
        "vda",
        &["-f", "qcow2", "-B", "bm0", "-D", "the root disk", &image],
    );
    let result = lab
        .run(&["info", server.uri(), "--map", "--bitmap", "bm0"])
        .result();
    let export = &result["exports"][0];
    assert_eq!(export["name"], "vda");
    assert_eq!(number(export, "size_bytes"), 8 * MIB);
    assert_eq!(export["description"], "the root disk");
    assert_eq!(export["structured_replies"], true);
    assert_eq!(export["tls"], false);
    let contexts: Vec<&str> = export["contexts"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|c| c.as_str())
        .collect();
    assert!(
        contexts.contains(&"base:allocation") && contexts.contains(&"qemu:dirty-bitmap:bm0"),
        "{contexts:?}"
    );
    assert_eq!(number(&export["block_size"], "maximum_bytes"), 32 << 20);
    let dirty = crate::support::server::dirty(server.uri(), "bm0");
    assert_eq!(
        number(&result["bitmap"], "dirty_bytes"),
        dirty.iter().map(|e| e.length).sum::<u64>()
    );
    for map in result["maps"].as_array().unwrap() {
        let covered: u64 = map["extents"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| number(e, "length_bytes"))
            .sum();
        assert_eq!(covered, 8 * MIB, "{}", map["context"]);
    }
    let text = lab.run_text(&["info", server.uri(), "--map", "--bitmap", "bm0"]);
    let text = String::from_utf8(text.stdout).unwrap();
    for word in [
        "vda",
        "the root disk",
        "8388608",
        "base:allocation",
        "qemu:dirty-bitmap:bm0",
    ] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
}

#[test]
fn info_of_an_address_lists_its_exports() {
    let lab = Lab::empty();
    let image = lab.qcow2("vda.qcow2", MIB, 5);
    let server = lab.serve_qcow2(&image, &[]);
    let address = server.uri().replace("/vda?", "/?");
    let result = lab.run(&["info", &address]).result();
    assert_eq!(
        result["exports"].as_array().map(Vec::len),
        Some(1),
        "{result}"
    );
    assert_eq!(result["exports"][0]["name"], "vda");
}
