//! The embedded server, as libnbd, QEMU and fio see it.

use std::net::TcpListener;
use std::os::unix::net::UnixStream;

use crate::support::MIB;
use crate::support::disk::assert_same;
use crate::support::lab::{Lab, SIZE};
use crate::support::process::{Process, tool, try_tool};
use crate::support::program::{finish, text};
use crate::support::server::{Serving, extents, nbdinfo, uri};

/// Runs a script against an export with libnbd's Python bindings as `h`.
#[track_caller]
fn nbdsh(uri: &str, script: &str) {
    let program = format!(
        "import nbd, errno, hashlib\nh = nbd.NBD()\nh.add_meta_context('base:allocation')\nh.connect_uri('{uri}')\n{script}"
    );
    let run = try_tool("/usr/bin/python3", &["-c", &program]);
    assert!(run.status.success(), "{}", run.stderr);
}

#[test]
fn export_has_what_its_readers_look_for() {
    let (lab, snapshot, _) = Lab::with_a_snapshot(1);
    let serving = lab.serve(&snapshot);
    let info = nbdinfo(&serving.uri("vda"));
    assert_eq!(info["export-size"], SIZE);
    for flag in [
        "is_read_only",
        "can_df",
        "can_flush",
        "can_multi_conn",
        "can_cache",
    ] {
        assert_eq!(info[flag], true, "{flag} in {info}");
    }
    for flag in ["can_trim", "can_zero", "is_rotational"] {
        assert_eq!(info[flag], false, "{flag} in {info}");
    }
    assert_eq!(info["contexts"][0], "base:allocation");
    assert!(
        text(&info, "description").contains(&snapshot[..12]),
        "{info}"
    );
}

#[test]
fn exports_are_listed_and_no_other_name_is_served() {
    let (lab, snapshot, _) = Lab::with_a_snapshot(2);
    let address = lab.socket();
    let repository = lab.repository();
    let form = format!("unix:{address}");
    let _serving = Serving::start(&[
        "-r",
        &repository,
        "--json",
        "restore",
        &snapshot,
        "--serve",
        &form,
    ]);
    let list = tool("nbdinfo", &["--list", "--json", &uri(&address, "")]);
    let list: serde_json::Value = serde_json::from_slice(&list).unwrap();
    let names: Vec<&serde_json::Value> = list["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["export-name"])
        .collect();
    assert_eq!(names, ["vda"]);
    assert!(
        !try_tool("nbdinfo", &[&uri(&address, "vdb")])
            .status
            .success()
    );
    let qemu = tool("qemu-nbd", &["--list", "-k", &address]);
    assert!(String::from_utf8_lossy(&qemu).contains("vda"));
}

#[test]
fn map_covers_the_disk_and_promises_zeros_only_where_they_are() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(3);
    let serving = lab.serve(&snapshot);
    let map = extents(&serving.uri("vda"), "base:allocation");
    let mut end = 0;
    for extent in &map {
        assert_eq!(extent.offset, end, "{map:?}");
        assert!(extent.length > 0);
        end += extent.length;
    }
    assert_eq!(end, SIZE);
    let bytes = std::fs::read(image).unwrap();
    let zeros = map.iter().filter(|e| e.flags & 2 != 0);
    let mut zero_bytes = 0;
    for extent in zeros {
        assert!(
            bytes[extent.offset as usize..][..extent.length as usize]
                .iter()
                .all(|b| *b == 0),
            "{extent:?}"
        );
        zero_bytes += extent.length;
    }
    assert!(zero_bytes > MIB, "the map calls next to nothing zero");
}

#[test]
fn reads_at_any_offset_and_length_are_right_in_one_piece_and_in_many() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(4);
    let serving = lab.serve(&snapshot);
    let script = format!(
        "import random\n\
         r = random.Random(4); d = open('{image}', 'rb').read(); z = h.get_size()\n\
         assert z == len(d)\n\
         for n in range(300):\n\
         \x20 o = r.randrange(z); l = min(r.choice([1, 511, 4096, 65536, 131072, 300000, 4 << 20]), z - o)\n\
         \x20 assert bytes(h.pread(l, o)) == d[o:o + l], (o, l)\n\
         \x20 c = []; h.pread_structured(l, o, lambda b, at, s, e: c.append((at, bytes(b))))\n\
         \x20 c.sort(); assert b''.join(b for _, b in c) == d[o:o + l], (o, l)\n\
         \x20 k = []; l = min(l, 65536); h.pread_structured(l, o, lambda b, at, s, e: k.append(s), nbd.CMD_FLAG_DF)\n\
         \x20 assert len(k) == 1, k\n"
    );
    nbdsh(&serving.uri("vda"), &script);
}

#[test]
fn wrong_requests_are_answered_with_errors_and_the_connection_lives_on() {
    let (lab, snapshot, _) = Lab::with_a_snapshot(5);
    let serving = lab.serve(&snapshot);
    let script = "\
h.set_strict_mode(0); z = h.get_size()
def fails(errors, call):
  try: call()
  except nbd.Error as e: assert e.errnum in errors, e
  else: assert False, 'a wrong request succeeded'
fails([errno.EINVAL], lambda: h.pread(512, z))
fails([errno.EINVAL], lambda: h.pread(1024, z - 512))
fails([errno.EPERM, errno.EINVAL], lambda: h.pwrite(b'x' * 512, 0))
fails([errno.EPERM, errno.EINVAL], lambda: h.pwrite(b'x' * (1 << 20), 0))
fails([errno.EPERM, errno.EINVAL], lambda: h.zero(512, 0))
fails([errno.EPERM, errno.EINVAL], lambda: h.trim(512, 0))
fails([errno.EINVAL], lambda: h.pread(512, 0, 0x80))
h.flush()
h.pread(512, 0)
";
    nbdsh(&serving.uri("vda"), script);
}

#[test]
fn qemu_boots_from_an_overlay_on_the_export() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(6);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let overlay = lab.file("overlay.qcow2");
    tool(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", &uri, "-F", "raw", &overlay,
        ],
    );
    let commands = [
        "read 0 1M",
        "write -P 7 1M 64k",
        "read -P 7 1M 64k",
        "flush",
    ];
    let args: Vec<&str> = commands.iter().flat_map(|c| ["-c", c]).collect();
    tool(
        "qemu-io",
        &[&["-f", "qcow2"], &args[..], &[&overlay]].concat(),
    );
    tool(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &uri, &image],
    );
    let map: serde_json::Value = serde_json::from_slice(&tool(
        "qemu-img",
        &["map", "--output=json", "-f", "raw", &uri],
    ))
    .unwrap();
    let covered: u64 = map
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["length"].as_u64().unwrap())
        .sum();
    assert_eq!(covered, SIZE);
}

#[test]
fn readers_at_random_places_all_get_their_bytes() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(7);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let fio = Process::start({
        let mut fio = std::process::Command::new("fio");
        fio.current_dir(lab.file("")).args([
            "--name=read",
            "--ioengine=nbd",
            "--rw=randread",
            "--bs=4k-64k",
        ]);
        fio.args([
            "--iodepth=16",
            "--size=12M",
            "--loops=2",
            &format!("--uri={uri}"),
        ]);
        fio
    });
    let copies: Vec<(String, Process)> = (0..4)
        .map(|n| {
            let out = lab.file(&format!("copy{n}.raw"));
            let mut copy = std::process::Command::new("nbdcopy");
            copy.args([&uri, &out]);
            (out, Process::start(copy))
        })
        .collect();
    for (out, copy) in copies {
        let copy = copy.finish();
        assert!(copy.status.success(), "{}", copy.stderr);
        assert_same(&out, &image);
    }
    let fio = fio.finish();
    assert!(
        fio.status.success(),
        "{}{}",
        String::from_utf8_lossy(&fio.stdout),
        fio.stderr
    );
}

#[test]
fn idle_clients_keep_nobody_out_and_do_not_hold_up_the_end() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(8);
    let socket = lab.socket();
    let repository = lab.repository();
    let address = format!("unix:{socket}");
    let serving = Serving::start(&[
        "-r",
        &repository,
        "--json",
        "restore",
        &snapshot,
        "--serve",
        &address,
    ]);
    let idle: Vec<UnixStream> = (0..60)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    let out = lab.file("out.raw");
    tool("nbdcopy", &[&serving.uri("vda"), &out]);
    assert_same(&out, &image);
    serving.process.signal("TERM");
    let run = finish(serving.process);
    assert!(
        matches!(run.code, Some(0 | 143)),
        "{:?} {}",
        run.code,
        run.stderr
    );
    run.lines();
    drop(idle);
    assert!(
        !std::fs::exists(&socket).unwrap(),
        "the socket was left behind"
    );
}

#[test]
fn address_may_be_a_uri_or_a_host_and_port() {
    let (lab, snapshot, image) = Lab::with_a_snapshot(9);
    let repository = lab.repository();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    for address in [uri(&lab.socket(), ""), port.to_string()] {
        let serving = Serving::start(&[
            "-r",
            &repository,
            "--json",
            "restore",
            &snapshot,
            "--serve",
            &address,
        ]);
        let out = lab.file("out.raw");
        tool("nbdcopy", &[&serving.uri("vda"), &out]);
        assert_same(&out, &image);
    }
}

#[test]
fn plain_tcp_beyond_loopback_wants_to_be_asked_for() {
    let (lab, snapshot, _) = Lab::with_a_snapshot(10);
    let error = lab.run(&["restore", &snapshot, "--serve", "0.0.0.0:0"]);
    assert_ne!(error.code, Some(0));
    assert!(text(error.lines().last().unwrap(), "message").contains("--insecure"));
}

#[test]
fn address_in_use_is_refused() {
    let (lab, snapshot, _) = Lab::with_a_snapshot(11);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let error = lab
        .run(&["restore", &snapshot, "--serve", &address])
        .error(1);
    assert!(text(&error, "message").contains(&address), "{error}");
    let socket = lab.socket();
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    lab.run(&["restore", &snapshot, "--serve", &format!("unix:{socket}")])
        .error(1);
    drop(listener);
    assert!(
        std::fs::exists(&socket).unwrap(),
        "another server's socket was removed"
    );
}
