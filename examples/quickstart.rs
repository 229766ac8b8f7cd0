//! The main job without QEMU: a disk with a dirty bitmap is served, backed up, written to, backed up again, and restored.
//!
//! Run it with `cargo run --release --example quickstart`.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use nbdbackup::engine::{
    self, BackupDisk, BackupOutcome, BackupRequest, Catalog, Event, Follow, InitRequest, Observer,
    RestoreRequest, SourceSpec, Target,
};
use nbdbackup::nbd::server::{MemoryDisk, Server, ServerOptions};
use nbdbackup::range::ByteRange;

const MIB: u64 = 1 << 20;

struct Silent;

impl Observer for Silent {
    fn observe(&self, _: Event) {}
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;

    let disk = Arc::new(MemoryDisk::new(256 * MIB));
    disk.write(0, &text(48 * MIB, 1));
    disk.write(100 * MIB, &noise(16 * MIB));
    disk.add_bitmap("bm0");
    let first = disk.bytes();
    println!("A disk of 256 MiB, 64 MiB of it written. Its dirty bitmap bm0 records from here on.");

    let socket = folder.path().join("disk.sock");
    let listener = tokio::net::UnixListener::bind(&socket)?;
    let server = Server::new(
        vec![("vda".to_owned(), disk.clone() as _)],
        ServerOptions::default(),
    )?;
    tokio::spawn(async move { server.serve(listener.into(), std::future::pending()).await });
    let uri = format!("nbd+unix:///vda?socket={}", socket.display());
    println!("The embedded NBD server offers it as {uri}");

    let repository = folder.path().join("repository");
    let request = InitRequest {
        chunk_bytes: 128 << 10,
        compression: None,
        secret: None,
        parity: Default::default(),
    };
    Catalog::init(repository.clone(), request).await?;
    let catalog = Catalog::open(repository, None).await?;

    let full = backup(&catalog, &uri, None).await?;
    say("Full backup", &full);

    disk.write(10 * MIB, b"a few bytes in the middle of a text");
    disk.write(40 * MIB, &noise(MIB));
    disk.write(200 * MIB, &text(MIB, 2));
    disk.discard(ByteRange::at(100 * MIB, 4 * MIB).ok_or("the range fits")?);
    let second = disk.bytes();
    println!("Three writes of 2 MiB in all, and 4 MiB discarded.");

    let incremental = backup(&catalog, &uri, Some("bm0")).await?;
    say("Incremental backup", &incremental);

    for (outcome, bytes) in [(&full, &first), (&incremental, &second)] {
        let target = folder.path().join("restored.raw");
        let restored = restore(&catalog, &outcome.snapshot, &target).await?;
        let same = std::fs::read(&target)? == *bytes;
        std::fs::remove_file(&target)?;
        println!(
            "Restored snapshot {}: {} of data written, {} left as holes: {}",
            &outcome.snapshot[..8],
            mib(restored.written_bytes),
            mib(restored.zero_bytes),
            if same { "identical" } else { "DIFFERENT" }
        );
        if !same {
            return Err("a restored disk differs from the one that was backed up".into());
        }
    }
    Ok(())
}

async fn backup(
    catalog: &Catalog,
    uri: &str,
    follow: Option<&str>,
) -> Result<BackupOutcome, engine::EngineError> {
    let request = BackupRequest {
        name: "quickstart".to_owned(),
        disks: vec![BackupDisk {
            disk: "vda".to_owned(),
            source: SourceSpec::parse(uri, None)?,
        }],
        tags: Vec::new(),
        follow: follow.map(|bitmap| Follow {
            bitmap: bitmap.to_owned(),
            parent: None,
            no_fallback: true,
        }),
        starts: if follow.is_none() {
            vec!["bm0".to_owned()]
        } else {
            Vec::new()
        },
        connections: 2,
        retry_time: std::time::Duration::ZERO,
        checkpoint_interval_bytes: 1 << 30,
        compression: None,
        verify_writes: true,
    };
    engine::backup(catalog, request, Arc::new(Silent), std::future::pending()).await
}

async fn restore(
    catalog: &Catalog,
    snapshot: &str,
    target: &Path,
) -> Result<engine::RestoreOutcome, engine::EngineError> {
    let request = RestoreRequest {
        snapshot: snapshot.to_owned(),
        disk: None,
        target: Target::Raw(target.to_owned()),
        overwrite: false,
    };
    engine::restore(catalog, request, Arc::new(Silent)).await
}

fn say(what: &str, outcome: &BackupOutcome) {
    let disk = &outcome.disks[0];
    let dirty = disk
        .dirty_bytes
        .map(|bytes| format!("{} dirty, ", mib(bytes)))
        .unwrap_or_default();
    println!(
        "{what}: {dirty}{} read, {} known to be zero, {} of {} chunks new, {} stored for {}, in {:.2} s",
        mib(disk.read_bytes),
        mib(disk.zero_bytes),
        disk.chunks_new,
        disk.chunks_total,
        mib(disk.stored_bytes),
        mib(disk.new_bytes),
        outcome.duration.as_secs_f64()
    );
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / MIB as f64)
}

/// Lines of text, which compress well.
fn text(len: u64, salt: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len as usize + 64);
    let mut line = salt << 32;
    while (bytes.len() as u64) < len {
        bytes.extend_from_slice(format!("line {line} of a file on a virtual disk\n").as_bytes());
        line += 1;
    }
    bytes.truncate(len as usize);
    bytes
}

/// Bytes that do not compress.
fn noise(len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    blake3::Hasher::new()
        .update(&len.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}
