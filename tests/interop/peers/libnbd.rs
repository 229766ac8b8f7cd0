//! libnbd's tools and its Python bindings as clients of a served snapshot.

use serde_json::Value;

use super::{SIZE, with_a_snapshot};
use crate::support::disk::assert_same;
use crate::support::process::{tool, try_tool};
use crate::support::server::nbdinfo;

/// Runs a script with libnbd's Python bindings, an export open as `h`, and `fails(errors, call)` at hand.
#[track_caller]
pub(super) fn nbdsh(uri: &str, script: &str) {
    nbdsh_of(&format!("h.connect_uri({uri:?})"), script);
}

/// As [`nbdsh`], with what sets `h` up.
#[track_caller]
fn nbdsh_of(connect: &str, script: &str) {
    let program = format!(
        "import nbd, errno
h = nbd.NBD()
def fails(errors, call):
  try: call()
  except nbd.Error as e: assert e.errnum in errors, e
  else: assert False, 'a wrong request succeeded'
h.add_meta_context('base:allocation')
h.set_uri_allow_local_file(True)
{connect}
{script}"
    );
    let run = try_tool("/usr/bin/python3", &["-c", &program]);
    assert!(run.status.success(), "{}", run.stderr);
}

fn json(bytes: Vec<u8>) -> Value {
    serde_json::from_slice(&bytes).unwrap()
}

#[test]
fn nbdinfo_tells_what_is_served() {
    let (lab, snapshot, _) = with_a_snapshot(1);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let all = json(tool("nbdinfo", &["--json", &uri]));
    assert_eq!(all["protocol"], "newstyle-fixed");
    assert_eq!(all["structured"], true);
    let info = nbdinfo(&uri);
    assert_eq!(info["export-size"], SIZE);
    assert_eq!(info["block_size_minimum"], 1);
    assert_eq!(info["block_size_maximum"], 32 << 20);
    let size = tool("nbdinfo", &["--size", &uri]);
    assert_eq!(size, format!("{SIZE}\n").into_bytes());
    let can = |what: &str| try_tool("nbdinfo", &["--can", what, &uri]).status.code();
    for what in ["multi-conn", "df", "flush", "cache", "structured-reply"] {
        assert_eq!(can(what), Some(0), "{what}");
    }
    for what in ["write", "trim", "zero", "fua", "fast-zero"] {
        assert_eq!(can(what), Some(2), "{what}");
    }
    let read_only = try_tool("nbdinfo", &["--is", "read-only", &uri]);
    assert_eq!(read_only.status.code(), Some(0));
}

#[test]
fn nbdinfo_lists_the_exports_of_a_machine_with_two_disks() {
    let (lab, _, image) = with_a_snapshot(2);
    let other = lab.raw("other.raw", SIZE / 2, 3);
    let args = ["full", &image, &other, "--name", "web1"];
    let disks = ["--disk", "vda", "--disk", "vdb"];
    let full = lab.run(&[&args[..], &disks].concat()).result();
    let serving = lab.serve(full["snapshot"].as_str().unwrap());
    let uri = serving.uri("vda").replacen("/vda?", "/?", 1);
    let list = json(tool("nbdinfo", &["--list", "--json", &uri]));
    let exports: Vec<(&str, u64)> = list["exports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            (
                e["export-name"].as_str().unwrap(),
                e["export-size"].as_u64().unwrap(),
            )
        })
        .collect();
    assert_eq!(exports, [("vda", SIZE), ("vdb", SIZE / 2)]);
}

#[test]
fn nbdinfo_maps_every_byte_and_its_totals_agree() {
    let (lab, snapshot, image) = with_a_snapshot(4);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    let map = json(tool("nbdinfo", &["--map", "--json", &uri]));
    let bytes = std::fs::read(image).unwrap();
    let (mut end, mut zero) = (0, 0);
    for extent in map.as_array().unwrap() {
        let number = |field: &str| extent[field].as_u64().unwrap();
        assert_eq!(number("offset"), end);
        let covered = &bytes[end as usize..][..number("length") as usize];
        end += number("length");
        match number("type") {
            0 => {}
            3 => {
                assert!(covered.iter().all(|b| *b == 0), "{extent}");
                zero += number("length");
            }
            other => panic!("type {other}"),
        }
    }
    assert_eq!(end, SIZE);
    assert!(zero > 0);
    let totals = json(tool("nbdinfo", &["--map", "--totals", "--json", &uri]));
    let of_zeros = totals.as_array().unwrap().iter().find(|t| t["type"] == 3);
    assert_eq!(of_zeros.unwrap()["size"], zero);
}

#[test]
fn nbdcopy_copies_it_over_one_and_four_connections() {
    let (lab, snapshot, image) = with_a_snapshot(5);
    let serving = lab.serve(&snapshot);
    let uri = serving.uri("vda");
    for more in [
        &["-C", "1"][..],
        &["-C", "4", "-T", "4"],
        &["--synchronous"],
        &["--no-extents", "-C", "4"],
        &["--request-size", "4096"],
    ] {
        let out = lab.file("out.raw");
        tool("nbdcopy", &[more, &[&uri, &out]].concat());
        assert_same(&out, &image);
        std::fs::remove_file(out).unwrap();
    }
    let piped = tool("nbdcopy", &[&uri, "-"]);
    assert!(piped == std::fs::read(&image).unwrap());
}

#[test]
fn every_read_only_command_is_answered_with_every_flag() {
    let (lab, snapshot, image) = with_a_snapshot(6);
    let serving = lab.serve(&snapshot);
    let script = format!(
        "
disk = open({image:?}, 'rb').read(); size = h.get_size()
assert size == len(disk)
for at, length in [(0, 1), (0, 512), (511, 2), (12345, 67890), (size - 1, 1), (0, size)]:
  want = disk[at:at + length]
  assert bytes(h.pread(length, at)) == want
  pieces = []
  h.pread_structured(length, at, lambda b, o, s, e: pieces.append((o, bytes(b), s)))
  pieces.sort(); assert b''.join(b for _, b, _ in pieces) == want
  for _, b, status in pieces:
    assert status == nbd.READ_DATA or (status == nbd.READ_HOLE and not any(b)), status
  if length <= 65536:
    one = []
    h.pread_structured(length, at, lambda b, o, s, e: one.append((o, bytes(b), s)), nbd.CMD_FLAG_DF)
    assert len(one) == 1 and one[0][:2] == (at, want), one
def status(length, at, flags=0):
  found = []
  def seen(context, offset, entries, error):
    assert context == 'base:allocation' and offset == at
    found.extend(zip(entries[::2], entries[1::2]))
  h.block_status(length, at, seen, flags)
  return found
extents = status(size, 0)
assert sum(l for l, _ in extents) == size and len(extents) > 3, extents
at = 0
for length, flags in extents:
  assert flags in (0, 3)
  assert flags == 0 or not any(disk[at:at + length])
  alone = status(size - at, at, nbd.CMD_FLAG_REQ_ONE)
  assert len(alone) == 1 and alone[0][1] == flags and 0 < alone[0][0] <= size - at, alone
  at += length
# No longer than what was asked for.
assert status(512, 0, nbd.CMD_FLAG_REQ_ONE)[0][0] == 512
h.cache(size, 0)
h.flush()
"
    );
    nbdsh(&serving.uri("vda"), &script);
}

#[test]
fn many_requests_at_once_are_each_answered_with_their_own_bytes() {
    let (lab, snapshot, image) = with_a_snapshot(7);
    let serving = lab.serve(&snapshot);
    let script = format!(
        "
import random
disk = open({image:?}, 'rb').read(); r = random.Random(7); waiting = []
for n in range(200):
  length = r.choice([512, 4096, 65536, 262144]); at = r.randrange(len(disk) - length)
  buffer = nbd.Buffer(length)
  waiting.append((h.aio_pread(buffer, at), buffer, at, length))
while waiting:
  h.poll(-1)
  still = []
  for cookie, buffer, at, length in waiting:
    if h.aio_command_completed(cookie): assert buffer.to_bytearray() == disk[at:at + length], at
    else: still.append((cookie, buffer, at, length))
  waiting = still
h.shutdown()
"
    );
    nbdsh(&serving.uri("vda"), &script);
}

#[test]
fn changes_and_wrong_flags_are_refused_and_the_connection_lives_on() {
    let (lab, snapshot, image) = with_a_snapshot(8);
    let serving = lab.serve(&snapshot);
    let script = "
h.set_strict_mode(0); size = h.get_size()
first = h.pread(512, 0)
refused = [errno.EPERM, errno.EINVAL]
for flags in [0, nbd.CMD_FLAG_FUA]:
  fails(refused, lambda: h.pwrite(b'x' * 512, 0, flags))
  fails(refused, lambda: h.pwrite(b'x' * (1 << 20), 0, flags))
  fails(refused, lambda: h.trim(512, 0, flags))
for flags in [0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO]:
  fails(refused, lambda: h.zero(512, 0, flags))
for flags in [nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO, 0x80]:
  fails([errno.EINVAL], lambda: h.pread(512, 0, flags))
for flags in [nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_DF, 0x80]:
  fails([errno.EINVAL], lambda: h.block_status(512, 0, lambda *_: 0, flags))
fails([errno.EINVAL], lambda: h.pread(512, size))
fails([errno.EINVAL], lambda: h.pread(1024, size - 512))
fails([errno.EINVAL], lambda: h.block_status(512, size, lambda *_: 0))
fails([errno.EINVAL], lambda: h.cache(512, size))
assert h.pread(512, 0) == first
h.shutdown()
";
    nbdsh(&serving.uri("vda"), script);
    let out = lab.file("out.raw");
    tool("nbdcopy", &[&serving.uri("vda"), &out]);
    assert_same(&out, &image);
}

#[test]
fn client_of_every_older_kind_reads_the_disk() {
    let (lab, snapshot, image) = with_a_snapshot(9);
    let serving = lab.serve(&snapshot);
    let read = format!("assert bytes(h.pread(h.get_size(), 0)) == open({image:?}, 'rb').read()");
    let connect = format!("h.connect_uri({:?})", serving.uri("vda"));
    for (kind, structured) in [
        ("h.set_request_structured_replies(False)", false),
        (
            "h.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)",
            true,
        ),
        // Without the fixed newstyle there is but `EXPORT_NAME`, with and without its zeros.
        ("h.set_handshake_flags(nbd.HANDSHAKE_FLAG_NO_ZEROES)", false),
        ("h.set_handshake_flags(0)", false),
    ] {
        let negotiated = match structured {
            true => "assert h.get_structured_replies_negotiated()",
            false => "assert not h.get_structured_replies_negotiated()",
        };
        nbdsh_of(
            &format!("{kind}\n{connect}"),
            &format!("{negotiated}\n{read}"),
        );
    }
}

#[test]
fn options_may_come_in_any_order_and_be_taken_back() {
    let (lab, snapshot, _) = with_a_snapshot(10);
    let serving = lab.serve(&snapshot);
    let connect = format!(
        "h.set_opt_mode(True)\nh.connect_uri({:?})",
        serving.uri("vda")
    );
    let script = "
names = []
for _ in range(3):
  names.clear(); h.opt_list(lambda name, text: names.append(name)); assert names == ['vda'], names
contexts = []
h.opt_list_meta_context(lambda name: contexts.append(name)); assert contexts == ['base:allocation'], contexts
h.opt_info(); size = h.get_size(); assert size > 0 and h.is_read_only()
h.set_export_name('nothing')
fails([errno.ENOENT, errno.EINVAL], h.opt_info)
fails([errno.ENOENT, errno.EINVAL], h.opt_go)
h.set_export_name('vda')
h.opt_go()
assert h.get_size() == size and h.can_meta_context('base:allocation')
h.pread(512, 0)
";
    nbdsh_of(&connect, script);
    nbdsh_of(&connect, "h.opt_abort()");
    // The default export is the only disk there is, or none.
    nbdsh_of(
        &connect,
        "h.set_export_name('')\ntry: h.opt_go(); h.pread(512, 0)\nexcept nbd.Error: h.opt_abort()",
    );
}
