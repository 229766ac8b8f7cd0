//! Writable exports over a snapshot: QEMU, libnbd, fio and our own client write, and the server is killed meanwhile.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use futures::future::join_all;
use nbdbackup::nbd::client::{Client, ClientOptions};
use nbdbackup::nbd::uri::NbdUri;
use nbdbackup::range::ByteRange;
use serde_json::Value;

use crate::support::disk::{Random, assert_same, scatter};
use crate::support::lab::{Lab, SIZE};
use crate::support::process::{Process, tool, try_tool};
use crate::support::program::{finish, text};
use crate::support::server::{Serving, dirty, extents, nbdinfo};
use crate::support::{KIB, MIB};

/// A laboratory with a snapshot, and a folder for what is written over it.
struct Overlaid {
    lab: Lab,
    snapshot: String,
    image: String,
    folder: String,
}

impl Overlaid {
    fn new(seed: u64) -> Self {
        let (lab, snapshot, image) = Lab::with_a_snapshot(seed);
        Self {
            snapshot,
            folder: lab.file("overlays"),
            image,
            lab,
        }
    }

    fn serve(&self) -> Serving {
        let address = format!("unix:{}", self.lab.socket());
        let repository = self.lab.repository();
        let args = self.args(&address);
        Serving::start(&[&["--repo", &repository, "--json"], &args[..]].concat())
    }

    fn args<'a>(&'a self, address: &'a str) -> [&'a str; 6] {
        let (snapshot, folder) = (&self.snapshot, &self.folder);
        [
            "restore",
            snapshot,
            "--serve",
            address,
            "--writable",
            folder,
        ]
    }
}

fn qemu_io(uri: &str, commands: &[&str]) {
    let args: Vec<&str> = commands.iter().flat_map(|c| ["-c", c]).collect();
    let out = tool(
        "qemu-io",
        &[&["-f", "raw", "-d", "unmap"], &args[..], &[uri]].concat(),
    );
    let out = String::from_utf8_lossy(&out);
    assert!(!out.contains("verification failed"), "{out}");
}

/// Ends a server as a person does.
fn end(serving: Serving) {
    serving.process.signal("TERM");
    finish(serving.process).result();
}

#[test]
fn what_qemu_writes_is_there_after_a_restart_and_the_snapshot_is_as_it_was() {
    let overlaid = Overlaid::new(1);
    let Overlaid { lab, image, .. } = &overlaid;
    let serving = overlaid.serve();
    let uri = serving.uri("vda");
    let export = &serving.line["exports"][0];
    assert_eq!(export["writable"], true);
    let overlay = text(export, "overlay");
    assert_eq!(overlay, format!("{}/vda.overlay", overlaid.folder));
    let info = nbdinfo(&uri);
    for (flag, set) in [
        ("is_read_only", false),
        ("can_trim", true),
        ("can_zero", true),
        ("can_fast_zero", true),
        ("can_fua", true),
        ("can_multi_conn", true),
    ] {
        assert_eq!(info[flag], set, "{flag} in {info}");
    }
    let changes = [
        "write -P 7 1M 64k",
        "write -P 8 2097664 1000",
        "write -z 3M 100k",
        "discard 5M 1M",
        "write -f -P 9 12599808 512",
        "flush",
    ];
    let looks = [
        "read -P 7 1M 64k",
        "read -P 8 2097664 1000",
        "read -P 0 3M 100k",
        "read -P 0 5M 1M",
        "read -P 9 12599808 512",
    ];
    qemu_io(&uri, &changes);
    qemu_io(&uri, &looks);
    let reference = lab.file("reference.raw");
    std::fs::copy(image, &reference).unwrap();
    qemu_io(&reference, &changes);
    end(serving);

    let serving = overlaid.serve();
    let uri = serving.uri("vda");
    qemu_io(&uri, &looks);
    let out = lab.file("out.raw");
    tool("nbdcopy", &[&uri, &out]);
    assert_same(&out, &reference);
    tool(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &uri, &reference],
    );
    // What the map promises to be zeros is zeros, whoever made them so.
    let bytes = std::fs::read(&reference).unwrap();
    let zeros = extents(&uri, "base:allocation");
    let zeros: Vec<_> = zeros.iter().filter(|e| e.flags & 2 != 0).collect();
    for extent in &zeros {
        let place = extent.offset as usize..(extent.offset + extent.length) as usize;
        assert!(bytes[place].iter().all(|byte| *byte == 0), "{extent:?}");
    }
    assert!(
        zeros
            .iter()
            .any(|e| e.offset <= 5 * MIB && 6 * MIB <= e.offset + e.length)
    );
    end(serving);
    lab.assert_restores(&overlaid.snapshot, image);
}

#[test]
fn what_was_written_is_told_as_a_bitmap_and_backed_up_as_an_increment() {
    let overlaid = Overlaid::new(2);
    let Overlaid { lab, snapshot, .. } = &overlaid;
    let serving = overlaid.serve();
    let uri = serving.uri("vda");
    let since = format!("since-{snapshot}");
    assert_eq!(dirty(&uri, &since), []);
    qemu_io(&uri, &["write -P 7 1M 64k", "discard 4M 8k", "flush"]);
    let found: Vec<_> = dirty(&uri, &since)
        .iter()
        .map(|e| (e.offset, e.length))
        .collect();
    assert_eq!(found, [(MIB, 64 * KIB), (4 * MIB, 8 * KIB)]);
    let result = lab.backup(
        "incremental",
        &uri,
        &["--bitmap", &since, "--parent", snapshot, "--no-fallback"],
    );
    assert_eq!(result["disks"][0]["dirty_bytes"], 72 * KIB);
    let out = lab.file("out.raw");
    tool("nbdcopy", &[&uri, &out]);
    lab.assert_restores(&text(&result, "snapshot"), &out);
}

#[test]
fn what_changed_since_an_earlier_snapshot_counts_what_was_written_too() {
    let mut overlaid = Overlaid::new(8);
    let first = overlaid.snapshot.clone();
    scatter(&overlaid.image, "raw", SIZE, 6, 8);
    let server = overlaid.lab.nbdkit(&["-r", "file", &overlaid.image]);
    let second = overlaid.lab.backup("full", server.uri(), &[]);
    overlaid.snapshot = text(&second, "snapshot");
    let since = format!("since-{first}");
    let blocks = |uri: &str| -> BTreeSet<u64> {
        let dirty = dirty(uri, &since);
        let blocks = dirty
            .iter()
            .flat_map(|e| e.offset / 512..(e.offset + e.length).div_ceil(512));
        blocks.collect()
    };
    let mut want = blocks(&overlaid.lab.serve(&overlaid.snapshot).uri("vda"));
    let before = want.len();
    let serving = overlaid.serve();
    let uri = serving.uri("vda");
    let contexts = [
        "base:allocation",
        &format!("qemu:dirty-bitmap:since-{}", overlaid.snapshot),
        &format!("qemu:dirty-bitmap:{since}"),
    ];
    assert_eq!(nbdinfo(&uri)["contexts"], Value::from(&contexts[..]));
    assert_eq!(blocks(&uri), want);
    // Somewhere among what is the same, since not all differs.
    for at in (0..SIZE / 4096).step_by(37) {
        qemu_io(&uri, &[&format!("write -P 7 {} 4096", at * 4096)]);
        want.extend(at * 8..at * 8 + 8);
    }
    assert!(want.len() > before);
    assert_eq!(blocks(&uri), want);
}

#[test]
fn nbdcopy_fills_an_overlay_over_many_connections() {
    let overlaid = Overlaid::new(3);
    let other = overlaid.lab.raw("other.raw", SIZE, 33);
    let serving = overlaid.serve();
    tool("nbdcopy", &["--flush", &other, &serving.uri("vda")]);
    end(serving);
    let serving = overlaid.serve();
    let out = overlaid.lab.file("out.raw");
    tool("nbdcopy", &[&serving.uri("vda"), &out]);
    assert_same(&out, &other);
}

#[test]
fn fio_finds_what_it_wrote() {
    let overlaid = Overlaid::new(4);
    let serving = overlaid.serve();
    let sizes = ["--bs=512-64k", "--bs_unaligned=1", "--iodepth=16"];
    let all = [&sizes[..], &["--do_verify=1", "--fsync=16"]].concat();
    fio(&overlaid, &serving, &all).unwrap();
}

#[test]
fn fio_finds_all_that_it_flushed_after_the_server_was_killed() {
    let overlaid = Overlaid::new(7);
    let serving = overlaid.serve();
    let sizes = ["--bs=16k", "--iodepth=1"];
    let write = [&sizes[..], &["--do_verify=0", "--fsync=16"]].concat();
    fio(&overlaid, &serving, &write).unwrap();
    // fio flushes before a write only; a flush of another connection covers its last ones.
    qemu_io(&serving.uri("vda"), &["flush"]);
    crate::support::process::signal(serving.process.id(), "KILL");
    drop(serving);

    let serving = overlaid.serve();
    let verify = [&sizes[..], &["--do_verify=1", "--verify_only=1"]].concat();
    fio(&overlaid, &serving, &verify).unwrap();
    // It would have found anything else.
    qemu_io(&serving.uri("vda"), &["write -P 7 1M 16k"]);
    fio(&overlaid, &serving, &verify).unwrap_err();
    end(serving);
}

/// Writes all of the disk at random places by fio, or looks whether what it writes is there; what it said if it failed.
fn fio(overlaid: &Overlaid, serving: &Serving, more: &[&str]) -> Result<(), String> {
    let uri = format!("--uri={}", serving.uri("vda"));
    let mut fio = Command::new("fio");
    // fio leaves a file with the state of its job where it runs.
    fio.current_dir(overlaid.lab.file(""))
        .args(["--name=v", "--ioengine=nbd", &uri, "--rw=randwrite"])
        .args(["--size=12M", "--verify=crc32c", "--verify_fatal=1"])
        .args(more);
    let run = Process::start(fio).finish();
    let out = String::from_utf8_lossy(&run.stdout).into_owned();
    match run.status.success() {
        true => Ok(()),
        false => Err(format!("{out}{}", run.stderr)),
    }
}

#[test]
fn overlay_of_another_snapshot_or_in_use_is_refused() {
    let mut overlaid = Overlaid::new(5);
    let address = format!("unix:{}", overlaid.lab.socket());
    let serving = overlaid.serve();
    let error = overlaid.lab.run(&overlaid.args(&address)).error(1);
    assert_eq!(error["code"], "overlay-failed");
    assert!(
        text(&error, "message").contains("another process"),
        "{error}"
    );
    end(serving);
    let image = overlaid.lab.raw("other.raw", SIZE, 55);
    let server = overlaid.lab.nbdkit(&["-r", "file", &image]);
    let other = overlaid.lab.backup("full", server.uri(), &[]);
    overlaid.snapshot = text(&other, "snapshot");
    let error = overlaid.lab.run(&overlaid.args(&address)).error(1);
    assert!(
        text(&error, "message").contains("belongs to disk vda"),
        "{error}"
    );
    // A client that wants to write where only reading is offered.
    let serving = overlaid.lab.serve(&overlaid.snapshot);
    assert_eq!(serving.line["exports"][0]["writable"], false);
    assert_eq!(serving.line["exports"][0]["overlay"], Value::Null);
    let write = ["-f", "raw", "-c", "write 0 512", &serving.uri("vda")];
    assert!(!try_tool("qemu-io", &write).status.success());
}

/// What each sector may hold after the server was killed.
struct Sectors {
    durable: Vec<u32>,
    since: Vec<Vec<u32>>,
    now: Vec<u32>,
}

const SECTOR: u64 = 512;

impl Sectors {
    fn of(bytes: &[u8]) -> Self {
        // A sector of the image counts by its first bytes; one that is written holds nothing else.
        let tags = bytes.chunks(SECTOR as usize);
        let tags: Vec<u32> = tags
            .map(|sector| u32::from_le_bytes(sector[..4].try_into().unwrap()))
            .collect();
        Self {
            since: vec![Vec::new(); tags.len()],
            now: tags.clone(),
            durable: tags,
        }
    }

    fn check(&self, found: &Self) {
        for (at, tag) in found.now.iter().enumerate() {
            assert!(
                self.durable[at] == *tag || self.since[at].contains(tag),
                "sector {at} holds {tag:#x} in the place of {:#x} or one of {:x?}",
                self.durable[at],
                self.since[at]
            );
        }
    }
}

/// Writes at random over four connections and flushes now and then; the server is killed at a random moment.
async fn write_until_killed(
    uri: &NbdUri,
    random: &mut Random,
    sectors: &mut Sectors,
    kill: impl Fn() + Send + Clone + 'static,
) {
    let options = ClientOptions {
        connections: 4,
        connect_timeout: Duration::from_secs(60),
        ..ClientOptions::default()
    };
    let client = Client::connect(uri, &options).await.unwrap();
    assert_eq!(client.export().connections, 4);
    let (last, flush_every) = (4 + random.below(40), 1 + random.below(6));
    for round in 0.. {
        let share = sectors.now.len() as u64 / 16;
        let writes: Vec<(u64, u64, u32)> = (0..16)
            .map(|n| {
                let start = n * share + random.below(share);
                let end = (start + 1 + random.below(100)).min((n + 1) * share);
                (start, end, random.next() as u32)
            })
            .collect();
        let killer = (round == last).then(|| {
            let kill = kill.clone();
            tokio::task::spawn_blocking(kill)
        });
        let done = join_all(writes.iter().map(|(start, end, tag)| {
            let data = tag
                .to_le_bytes()
                .repeat(((end - start) * SECTOR / 4) as usize);
            client.write(start * SECTOR, data.into(), false)
        }))
        .await;
        for ((start, end, tag), done) in writes.into_iter().zip(&done) {
            for sector in start as usize..end as usize {
                sectors.since[sector].push(tag);
                if done.is_ok() {
                    sectors.now[sector] = tag;
                }
            }
        }
        if round % flush_every == 0 && client.flush().await.is_ok() {
            sectors.durable.clone_from(&sectors.now);
            sectors.since.iter_mut().for_each(Vec::clear);
        }
        if let Some(killer) = killer {
            killer.await.unwrap();
        }
        if done.iter().any(Result::is_err) {
            return;
        }
    }
}

#[test]
fn killed_server_loses_nothing_that_was_flushed() {
    let overlaid = Overlaid::new(6);
    let mut random = Random::new(6);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut sectors = Sectors::of(&std::fs::read(&overlaid.image).unwrap());
    for _ in 0..8 {
        let serving = overlaid.serve();
        let uri: NbdUri = serving.uri("vda").parse().unwrap();
        let id = serving.process.id();
        let kill = move || crate::support::process::signal(id, "KILL");
        runtime.block_on(write_until_killed(&uri, &mut random, &mut sectors, kill));
        drop(serving);

        let serving = overlaid.serve();
        let out = overlaid.lab.file("out.raw");
        tool("nbdcopy", &[&serving.uri("vda"), &out]);
        let found = Sectors::of(&std::fs::read(&out).unwrap());
        sectors.check(&found);
        sectors = found;
        end(serving);
    }
}

#[test]
fn client_that_reads_what_others_write_sees_whole_writes_of_its_own() {
    let overlaid = Overlaid::new(7);
    let serving = overlaid.serve();
    let uri: NbdUri = serving.uri("vda").parse().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = Client::connect(&uri, &ClientOptions::default())
            .await
            .unwrap();
        // Eight writers share each granule, and none may take back what another wrote.
        for round in 0..20_u64 {
            let writes = (0..64_u64).map(|n| {
                let data = vec![(round + n) as u8 | 1; 512];
                client.write(MIB + n * 512, data.into(), n % 8 == 0)
            });
            for done in join_all(writes).await {
                done.unwrap();
            }
            let range = ByteRange::at(MIB, 64 * 512).unwrap();
            let found = client.read(range, Vec::new()).await.unwrap();
            let bytes = found.data;
            for (n, sector) in bytes.chunks(512).enumerate() {
                let want = (round + n as u64) as u8 | 1;
                assert!(sector.iter().all(|byte| *byte == want), "{round} {n}");
            }
        }
    });
}
