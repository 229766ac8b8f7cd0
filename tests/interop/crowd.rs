//! A crowd of clients that say half of what they want to say: others are served meanwhile, and memory stays small.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::support::disk::assert_same;
use crate::support::lab::Lab;
use crate::support::process::{Process, tool};
use crate::support::program::{finish, text};
use crate::support::server::Serving;
use crate::support::{KIB, MIB};

const CLIENTS: usize = 1000;
/// What `docs/operations.md` promises.
const MOST_MEMORY: u64 = 150 * MIB;

fn served(lab: &Lab, more: &[&str]) -> (Serving, String, String) {
    let image = lab.raw("vda.raw", 12 * MIB, 1);
    let full = lab.backup("full", lab.nbdkit(&["-r", "file", &image]).uri(), &[]);
    let (socket, repository) = (lab.socket(), lab.repository());
    let (snapshot, address) = (text(&full, "snapshot"), format!("unix:{socket}"));
    let args = ["--repo", &repository, "--json", "restore", &snapshot];
    let serve = [&args[..], &["--serve", &address], more].concat();
    (Serving::start(&serve), socket, image)
}

/// Goes through the handshake with the export `vda`.
fn handshake(stream: &mut UnixStream) {
    stream
        .write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x03vda")
        .unwrap();
    stream.read_exact(&mut [0; 18 + 10]).unwrap();
}

/// Says half of something, and stays.
fn dawdle(socket: &str, at: usize) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    match at % 4 {
        0 => {}
        1 => {
            // Half of the longest option that is taken in.
            stream
                .write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\x01\0\0")
                .unwrap();
            stream.write_all(&[b'x'; 32 << 10]).unwrap();
        }
        2 => {
            handshake(&mut stream);
            stream.write_all(b"\x25\x60\x95\x13\0\0\0\0half a").unwrap();
        }
        _ => {
            handshake(&mut stream);
            let write = b"\x25\x60\x95\x13\0\0\0\x01a cookie\0\0\0\0\0\0\0\0\0\x10\0\0";
            stream.write_all(write).unwrap();
            stream.write_all(&[7; 32 << 10]).unwrap();
        }
    }
    stream
}

/// The most memory that a process has had, in bytes.
fn peak_memory(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * KIB
}

#[test]
fn thousand_dawdlers_keep_nobody_out_and_take_little_memory() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let overlays = folder.path().to_str().unwrap();
    for more in [&[][..], &["--writable", overlays]] {
        let lab = Lab::new();
        let (serving, socket, image) = served(&lab, more);
        let dawdlers: Vec<UnixStream> = (0..CLIENTS).map(|at| dawdle(&socket, at)).collect();
        let out = lab.file("out.raw");
        tool("nbdcopy", &[&serving.uri("vda"), &out]);
        assert_same(&out, &image);
        let peak = peak_memory(serving.process.id());
        assert!(peak < MOST_MEMORY, "{} MiB", peak / MIB);
        drop(dawdlers);
        serving.process.signal("TERM");
        finish(serving.process).result();
    }
}

#[test]
fn server_of_few_open_files_takes_who_waits_once_others_have_left() {
    let lab = Lab::new();
    let (serving, _, image) = served(&lab, &[]);
    drop(serving);
    let snapshot = lab.snapshots().pop().unwrap();
    let socket = lab.socket();
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", "ulimit -n 40; exec \"$@\"", "sh"]);
    limited.arg(env!("CARGO_BIN_EXE_nbdbackup"));
    limited.args(["--repo", &lab.repository(), "--json", "restore", &snapshot]);
    limited.args(["--serve", &format!("unix:{socket}")]);
    let mut process = Process::start(limited);
    process.next_line().expect("it serves");
    // They say nothing, and have to leave in the end.
    let idle: Vec<UnixStream> = (0..60)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    let out = lab.file("out.raw");
    let uri = crate::support::server::uri(&socket, "vda");
    tool("nbdcopy", &[&uri, &out]);
    assert_same(&out, &image);
    drop(idle);
}

#[test]
fn server_ends_by_itself_when_nobody_is_there() {
    let lab = Lab::new();
    let (serving, socket, image) = served(&lab, &["--idle-exit", "8"]);
    let out = lab.file("out.raw");
    tool("nbdcopy", &[&serving.uri("vda"), &out]);
    assert_same(&out, &image);
    assert_eq!(finish(serving.process).result()["status"], "ok");
    assert!(!std::fs::exists(socket).unwrap());
}

#[test]
fn serving_in_the_clear_beyond_this_machine_warns() {
    let lab = Lab::new();
    let (serving, _, _) = served(&lab, &[]);
    drop(serving);
    let snapshot = lab.snapshots().pop().unwrap();
    let args = [
        "restore",
        &snapshot,
        "--serve",
        "0.0.0.0:0",
        "--idle-exit",
        "0",
    ];
    let refused = lab.run(&args).error(1);
    assert!(text(&refused, "message").contains("--insecure"));
    let run = lab.run(&[&args[..], &["--insecure"]].concat());
    let warning = run.lines().remove(0);
    assert_eq!(warning["type"], "warning", "{warning}");
    assert_eq!(warning["code"], "insecure");
    run.result();
}
