//! Every command and flag that changes a disk, from libnbd and QEMU through our server to a writable disk in memory.

use std::path::PathBuf;
use std::sync::Arc;

use nbdbackup::nbd::server::{MemoryDisk, Server, ServerOptions};
use nbdbackup::nbd::tls::TlsServer;
use nbdbackup::nbd::transport::Listener;
use nbdbackup::nbd::uri::Endpoint;
use tokio::runtime::Runtime;

use super::{SIZE, libnbd::nbdsh};
use crate::support::disk::assert_same;
use crate::support::lab::Lab;
use crate::support::process::{Process, tool};
use crate::support::server::{nbdinfo, uri};

/// Our server with a writable disk, `vda`; ended when dropped.
pub(super) struct Writable {
    _runtime: Runtime,
    disk: Arc<MemoryDisk>,
    /// The URI in the clear, whether or not it is served so.
    pub(super) uri: String,
}

impl Writable {
    fn start(lab: &Lab) -> Self {
        Self::start_with(lab, None)
    }

    pub(super) fn start_with(lab: &Lab, tls: Option<TlsServer>) -> Self {
        let options = ServerOptions {
            tls,
            ..ServerOptions::default()
        };
        let socket = lab.socket();
        let disk = Arc::new(MemoryDisk::new(SIZE));
        let server = Server::new(vec![("vda".into(), disk.clone())], options).unwrap();
        let runtime = Runtime::new().unwrap();
        let endpoint = Endpoint::Unix(PathBuf::from(&socket));
        let listener = runtime.block_on(Listener::bind(&endpoint)).unwrap();
        runtime.spawn(async move { server.serve(listener, std::future::pending()).await });
        Self {
            _runtime: runtime,
            disk,
            uri: uri(&socket, "vda"),
        }
    }

    /// The disk's bytes as a file.
    pub(super) fn dump(&self, lab: &Lab) -> String {
        let file = lab.file("dump.raw");
        std::fs::write(&file, self.disk.bytes()).unwrap();
        file
    }
}

#[test]
fn all_abilities_are_offered() {
    let lab = Lab::new();
    let info = nbdinfo(&Writable::start(&lab).uri);
    assert_eq!(info["is_read_only"], false);
    for ability in [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ] {
        assert_eq!(info[ability], true, "{ability}");
    }
}

#[test]
fn libnbd_changes_it_by_every_command_with_every_flag() {
    let lab = Lab::new();
    let served = Writable::start(&lab);
    let script = "
size = h.get_size()
disk = bytearray(size)
def check():
  assert bytes(h.pread(size, 0)) == bytes(disk)
for n, flags in enumerate([0, nbd.CMD_FLAG_FUA]):
  at = 65536 * (n + 1) + 7
  h.pwrite(b'w' * 100000, at, flags); disk[at:at + 100000] = b'w' * 100000
  check()
zeroing = [0, nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO]
zeroing += [nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO]
for n, flags in enumerate(zeroing):
  at = 70000 + n * 10001
  h.zero(5000, at, flags); disk[at:at + 5000] = bytes(5000)
  check()
for n, flags in enumerate([0, nbd.CMD_FLAG_FUA]):
  at = 131072 + n * 16384
  h.trim(8192, at, flags); disk[at:at + 8192] = bytes(8192)
  check()
h.cache(size, 0)
h.flush()
h.pwrite(b'end', size - 3); disk[-3:] = b'end'
check()
# Zeroing the whole disk is one command.
h.zero(size, 0, nbd.CMD_FLAG_FAST_ZERO); disk = bytearray(size)
check()
map = []
h.block_status(size, 0, lambda context, offset, entries, error: map.append(list(entries)))
assert map == [[size, 3]], map
h.zero(size, 0, nbd.CMD_FLAG_NO_HOLE)
map = []
h.block_status(size, 0, lambda context, offset, entries, error: map.append(list(entries)))
assert map[0][1] & 1 == 0, map
check()
";
    nbdsh(&served.uri, script);
    assert!(served.disk.bytes().iter().all(|b| *b == 0));
}

#[test]
fn changes_that_are_wrong_are_refused_and_the_connection_lives_on() {
    let lab = Lab::new();
    let served = Writable::start(&lab);
    let script = "
size = h.get_size()
h.set_strict_mode(0)
h.pwrite(b'k' * 4096, 0)
fails([errno.ENOSPC, errno.EINVAL], lambda: h.pwrite(b'x' * 512, size))
fails([errno.ENOSPC, errno.EINVAL], lambda: h.pwrite(b'x' * 512, size - 511))
fails([errno.ENOSPC, errno.EINVAL], lambda: h.zero(512, size - 511))
fails([errno.ENOSPC, errno.EINVAL], lambda: h.trim(512, size - 511))
for flag in [nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO, 0x80]:
  fails([errno.EINVAL], lambda: h.pwrite(b'x' * 512, 0, flag))
  fails([errno.EINVAL], lambda: h.trim(512, 0, flag))
  if flag not in [nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO]:
    fails([errno.EINVAL], lambda: h.zero(512, 0, flag))
assert bytes(h.pread(4096, 0)) == b'k' * 4096
";
    nbdsh(&served.uri, script);
    assert!(served.disk.bytes()[4096..].iter().all(|b| *b == 0));
}

#[test]
fn what_one_connection_wrote_and_flushed_another_reads() {
    let lab = Lab::new();
    let served = Writable::start(&lab);
    let script = format!(
        "
other = nbd.NBD(); other.connect_uri('{}')
for n in range(50):
  at = n * 9973
  h.pwrite(bytes([n + 1]) * 5000, at); h.flush()
  assert bytes(other.pread(5000, at)) == bytes([n + 1]) * 5000
",
        served.uri
    );
    nbdsh(&served.uri, &script);
}

#[test]
fn nbdcopy_fills_it_over_one_and_four_connections() {
    for connections in ["1", "4"] {
        let lab = Lab::new();
        let image = lab.raw("vda.raw", SIZE, 1);
        let served = Writable::start(&lab);
        tool(
            "nbdcopy",
            &["-C", connections, "--flush", &image, &served.uri],
        );
        assert_same(&served.dump(&lab), &image);
    }
}

#[test]
fn qemu_img_fills_it() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", SIZE, 2);
    let served = Writable::start(&lab);
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw", "-W"];
    tool("qemu-img", &[&convert[..], &[&image, &served.uri]].concat());
    assert_same(&served.dump(&lab), &image);
    tool(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &image, &served.uri],
    );
}

#[test]
fn qemu_io_changes_it() {
    let lab = Lab::new();
    let served = Writable::start(&lab);
    let commands = [
        "write -P 7 1M 128k",
        "write -f -P 8 2M 64k",
        "write -z 1M 4k",
        "write -z -u 1028k 4k",
        "write -z -u -f 1032k 4k",
        "write -z -n 1036k 4k",
        "discard 1040k 4k",
        "aio_write -P 9 3M 64k",
        "aio_flush",
        "flush",
        "read -P 0 1M 20k",
        "read -P 7 1044k 108k",
        "read -P 8 2M 64k",
        "read -P 9 3M 64k",
    ];
    let commands = commands.iter().flat_map(|c| ["-c", c]);
    let args = ["-f", "raw", "-d", "unmap"].into_iter().chain(commands);
    let args: Vec<&str> = args.chain([served.uri.as_str()]).collect();
    let said = String::from_utf8(tool("qemu-io", &args)).unwrap();
    assert!(!said.contains("failed"), "{said}");
    let bytes = served.disk.bytes();
    assert!(bytes[1 << 20..][..20 << 10].iter().all(|b| *b == 0));
    assert!(
        bytes[(1 << 20) + (20 << 10)..][..108 << 10]
            .iter()
            .all(|b| *b == 7)
    );
}

#[test]
fn fio_verifies_what_it_writes() {
    let lab = Lab::new();
    let served = Writable::start(&lab);
    let mut fio = std::process::Command::new("fio");
    fio.current_dir(lab.file("")).args([
        "--name=verify",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bs=4k-64k",
        "--iodepth=16",
        "--size=8M",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        &format!("--uri={}", served.uri),
    ]);
    let fio = Process::start(fio).finish();
    assert!(
        fio.status.success(),
        "{}{}",
        String::from_utf8_lossy(&fio.stdout),
        fio.stderr
    );
}
