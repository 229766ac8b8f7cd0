//! What check, repair and copy say, as JSON and as text.

use std::fmt::Write;

use indicatif::HumanBytes;
use serde::Serialize;

use super::text::printable;
use crate::engine::{
    CheckOutcome, Checked, CopiedSnapshot, CopyOutcome, DamagedFile, DamagedRange, RepairOutcome,
};

#[derive(Serialize)]
pub(super) struct CheckResult {
    repository: String,
    keyless: bool,
    #[serde(flatten)]
    checked: CheckedResult,
    duration_seconds: f64,
}

impl From<&CheckOutcome> for CheckResult {
    fn from(o: &CheckOutcome) -> Self {
        Self {
            repository: o.repository.clone(),
            keyless: o.keyless,
            checked: (&o.checked).into(),
            duration_seconds: o.duration.as_secs_f64(),
        }
    }
}

#[derive(Serialize)]
struct CheckedResult {
    snapshots: u64,
    map_nodes: u64,
    chunks: u64,
    packs: u64,
    pack_bytes: u64,
    read_packs: u64,
    read_bytes: u64,
    damaged_files: Vec<DamagedFileResult>,
    damaged_files_total: u64,
    damaged_ranges: Vec<DamagedRangeResult>,
    damaged_ranges_total: u64,
    damaged_bytes: u64,
    parity_packs: u64,
    damaged_parity: Vec<DamagedParityResult>,
    damaged_parity_total: u64,
    marked_records: u64,
    index_rebuilt: bool,
    strange_files: Vec<String>,
}

impl From<&Checked> for CheckedResult {
    fn from(c: &Checked) -> Self {
        Self {
            snapshots: c.snapshots,
            map_nodes: c.nodes,
            chunks: c.chunks,
            packs: c.packs,
            pack_bytes: c.pack_bytes,
            read_packs: c.read_packs,
            read_bytes: c.read_bytes,
            damaged_files: c.files.iter().take(LISTED).map(Into::into).collect(),
            damaged_files_total: c.files_total,
            damaged_ranges: c.ranges.iter().take(LISTED).map(Into::into).collect(),
            damaged_ranges_total: c.ranges_total,
            damaged_bytes: c.lost_bytes,
            parity_packs: c.parity_files,
            damaged_parity: c.parity.iter().take(LISTED).map(Into::into).collect(),
            damaged_parity_total: c.parity_total,
            marked_records: c.marked,
            index_rebuilt: c.index_rebuilt,
            strange_files: c.strangers.clone(),
        }
    }
}

#[derive(Serialize)]
struct DamagedFileResult {
    file: String,
    problem: String,
    repaired: bool,
    parity_mends: Option<bool>,
}

impl From<&DamagedFile> for DamagedFileResult {
    fn from(f: &DamagedFile) -> Self {
        Self {
            file: f.file.clone(),
            problem: f.problem.clone(),
            repaired: f.repaired,
            parity_mends: f.parity,
        }
    }
}

#[derive(Serialize)]
struct DamagedParityResult {
    file: String,
    problem: String,
}

impl From<&DamagedFile> for DamagedParityResult {
    fn from(f: &DamagedFile) -> Self {
        Self {
            file: f.file.clone(),
            problem: f.problem.clone(),
        }
    }
}

#[derive(Serialize)]
struct DamagedRangeResult {
    snapshot: String,
    disk: String,
    offset_bytes: u64,
    length_bytes: u64,
    file: String,
    file_offset_bytes: u64,
}

impl From<&DamagedRange> for DamagedRangeResult {
    fn from(r: &DamagedRange) -> Self {
        Self {
            snapshot: r.snapshot.to_string(),
            disk: r.disk.clone(),
            offset_bytes: r.offset,
            length_bytes: r.len,
            file: r.file.clone(),
            file_offset_bytes: r.at,
        }
    }
}

#[derive(Serialize)]
pub(super) struct RepairResult {
    repository: String,
    from: Option<String>,
    mended: Vec<String>,
    fetched: Vec<String>,
    fetched_bytes: u64,
    whole: Vec<String>,
    failed: Vec<FailedResult>,
    parity_made: Vec<String>,
    check: CheckedResult,
}

#[derive(Serialize)]
struct FailedResult {
    what: String,
    problem: String,
}

impl From<&RepairOutcome> for RepairResult {
    fn from(o: &RepairOutcome) -> Self {
        let failed = o.repaired.failed.iter();
        Self {
            repository: o.repository.clone(),
            from: o.from.clone(),
            mended: o.repaired.mended.clone(),
            fetched: o.repaired.fetched.clone(),
            fetched_bytes: o.repaired.fetched_bytes,
            whole: o.repaired.whole.clone(),
            failed: failed
                .map(|(file, error)| FailedResult {
                    what: file.clone(),
                    problem: error.to_string(),
                })
                .collect(),
            parity_made: o.parity_made.clone(),
            check: (&o.checked).into(),
        }
    }
}

#[derive(Serialize)]
pub(super) struct CopyResult {
    repository: String,
    to: String,
    copied: Vec<CopiedResult>,
    skipped: Vec<String>,
    failed: Vec<FailedResult>,
    duration_seconds: f64,
}

#[derive(Serialize)]
struct CopiedResult {
    from: String,
    to: String,
    name: String,
    read_bytes: u64,
    chunks_new: u64,
    new_bytes: u64,
    stored_bytes: u64,
}

impl From<&CopiedSnapshot> for CopiedResult {
    fn from(c: &CopiedSnapshot) -> Self {
        Self {
            from: c.from.clone(),
            to: c.to.clone(),
            name: c.name.clone(),
            read_bytes: c.read_bytes,
            chunks_new: c.chunks_new,
            new_bytes: c.new_bytes,
            stored_bytes: c.stored_bytes,
        }
    }
}

impl From<&CopyOutcome> for CopyResult {
    fn from(o: &CopyOutcome) -> Self {
        Self {
            repository: o.repository.clone(),
            to: o.to.clone(),
            copied: o.copied.iter().map(Into::into).collect(),
            skipped: o.skipped.iter().map(ToString::to_string).collect(),
            failed: o
                .failed
                .iter()
                .map(|(what, problem)| FailedResult {
                    what: what.clone(),
                    problem: problem.clone(),
                })
                .collect(),
            duration_seconds: o.duration.as_secs_f64(),
        }
    }
}

pub(super) fn check(out: &mut String, o: &CheckOutcome) -> std::fmt::Result {
    let c = &o.checked;
    if o.keyless {
        writeln!(
            out,
            "{} snapshots, {} packs: {} read and compared with their checksums in {:.1} s",
            c.snapshots,
            c.packs,
            HumanBytes(c.read_bytes),
            o.duration.as_secs_f64()
        )?;
    } else {
        writeln!(
            out,
            "{} snapshots, {} map nodes, {} chunks, {} packs of {}; {} read and proved; {:.1} s",
            c.snapshots,
            c.nodes,
            c.chunks,
            c.packs,
            HumanBytes(c.pack_bytes),
            HumanBytes(c.read_bytes),
            o.duration.as_secs_f64()
        )?;
    }
    damage(out, c)
}

pub(super) fn repair(out: &mut String, o: &RepairOutcome) -> std::fmt::Result {
    for file in &o.repaired.mended {
        writeln!(out, "mended {file} from its parity")?;
    }
    for file in &o.repaired.fetched {
        writeln!(out, "fetched {file}")?;
    }
    for (file, error) in &o.repaired.failed {
        writeln!(out, "not mended: {file}: {}", printable(&error.to_string()))?;
    }
    writeln!(
        out,
        "mended {} packs from parity, fetched {} files of {}, made parity of {} packs",
        o.repaired.mended.len(),
        o.repaired.fetched.len(),
        HumanBytes(o.repaired.fetched_bytes),
        o.parity_made.len()
    )?;
    damage(out, &o.checked)
}

pub(super) fn copy(out: &mut String, o: &CopyOutcome) -> std::fmt::Result {
    for c in &o.copied {
        writeln!(
            out,
            "copied {} of {} as {}: read {}, {} chunks new, stored {} for {}",
            &c.from[..12],
            printable(&c.name),
            &c.to[..12],
            HumanBytes(c.read_bytes),
            c.chunks_new,
            HumanBytes(c.stored_bytes),
            HumanBytes(c.new_bytes)
        )?;
    }
    for (what, problem) in &o.failed {
        writeln!(out, "not copied: {what}: {}", printable(problem))?;
    }
    writeln!(
        out,
        "copied {} snapshots to {}, {} were there already, {} are damaged, in {:.1} s",
        o.copied.len(),
        printable(&o.to),
        o.skipped.len(),
        o.failed.len(),
        o.duration.as_secs_f64()
    )
}

fn damage(out: &mut String, c: &Checked) -> std::fmt::Result {
    for f in c.files.iter().take(LISTED) {
        let word = if f.repaired { "repaired" } else { "damaged" };
        let parity = match f.parity {
            Some(true) if !f.repaired => "; its parity can mend it",
            Some(false) if !f.repaired => "; its parity cannot mend it",
            _ => "",
        };
        writeln!(out, "{word}: {}: {}{parity}", f.file, printable(&f.problem))?;
    }
    for r in c.ranges.iter().take(LISTED) {
        writeln!(
            out,
            "lost: snapshot {}, disk {}, bytes {} to {} ({} at {})",
            &r.snapshot.to_string()[..12],
            printable(&r.disk),
            r.offset,
            r.offset + r.len,
            r.file,
            r.at
        )?;
    }
    for f in c.parity.iter().take(LISTED) {
        writeln!(out, "parity: {}: {}", f.file, printable(&f.problem))?;
    }
    for file in &c.strangers {
        writeln!(out, "no part of a repository: {}", printable(file))?;
    }
    if c.index_rebuilt {
        writeln!(out, "the index was made anew from the packs")?;
    }
    if c.marked > 0 {
        writeln!(
            out,
            "{} damaged records are marked: the next backup reads and stores them again",
            c.marked
        )?;
    }
    if c.parity_total > 0 {
        writeln!(
            out,
            "the parity of {} packs is damaged, missing or of no use: run nbdbackup repair, or prune",
            c.parity_total
        )?;
    }
    if c.files
        .iter()
        .any(|f| f.parity == Some(true) && !f.repaired)
    {
        writeln!(out, "run nbdbackup repair to mend what parity can mend")?;
    }
    match c.is_whole() {
        true => writeln!(out, "the repository is whole"),
        false => writeln!(
            out,
            "the repository is DAMAGED: {} files, {} ranges of disks, {} lost",
            c.open_files(),
            c.ranges_total,
            HumanBytes(c.lost_bytes)
        ),
    }
}

/// How many damaged files and ranges are listed.
const LISTED: usize = 1_000;
