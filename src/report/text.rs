//! Results as text for people.

use std::fmt::Write;

use chrono::DateTime;
use indicatif::HumanBytes;

use super::Outcome;
use super::check;
use super::json::kind;
use crate::engine::{
    BackupOutcome, DiffOutcome, ForgetOutcome, InfoOutcome, KeyOutcome, Progress, PruneOutcome,
    Pruned, ServedExport, Snapshot, SnapshotsOutcome,
};

/// Writes the text of an outcome; writing to a string cannot fail.
pub(super) fn outcome(out: &mut String, outcome: &Outcome) {
    let _ = match outcome {
        Outcome::Init(o) => writeln!(
            out,
            "created repository {} at {}: chunks of {}, compression {}, encryption {}, parity {}",
            o.uuid,
            o.repository,
            HumanBytes(o.chunk_bytes),
            o.compression,
            o.encryption,
            match o.parity {
                0 => "none".to_owned(),
                parts => format!("for {parts} of 64 parts"),
            }
        ),
        Outcome::Backup(o) => backup(out, o),
        Outcome::Restore(o) if o.target == "-" => Ok(()),
        Outcome::Restore(o) => writeln!(
            out,
            "restored disk {} of snapshot {} to {}: {} of data, {} of zeros, in {:.1} s",
            printable(&o.disk),
            o.snapshot,
            printable(&o.target),
            HumanBytes(o.written_bytes),
            HumanBytes(o.zero_bytes),
            o.duration.as_secs_f64()
        ),
        Outcome::Serve(o) => {
            writeln!(
                out,
                "served snapshot {} for {:.0} s",
                o.snapshot,
                o.duration.as_secs_f64()
            )
        }
        Outcome::Snapshots(o) => snapshots(out, o),
        Outcome::Show(s) => show(out, s),
        Outcome::Info(o) => info(out, o),
        Outcome::Diff(o) => diff(out, o),
        Outcome::Forget(o) => forget(out, o),
        Outcome::Prune(o) => prune(out, o),
        Outcome::Key(o) => keys(out, o),
        Outcome::Check(o) => check::check(out, o),
        Outcome::Repair(o) => check::repair(out, o),
        Outcome::Copy(o) => check::copy(out, o),
    };
}

/// Makes text from a peer or a disk safe for a terminal: control characters are shown escaped.
pub(super) fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\n' {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

pub(super) fn progress_line(p: &Progress) -> String {
    let percent = (p.done_bytes * 100)
        .checked_div(p.total_bytes)
        .unwrap_or(100);
    format!(
        "disk {}: {percent}% of {}, moved {}, new {}\n",
        printable(&p.disk),
        HumanBytes(p.total_bytes),
        HumanBytes(p.moved_bytes),
        HumanBytes(p.new_bytes)
    )
}

pub(super) fn serving(exports: &[ServedExport]) -> String {
    exports
        .iter()
        .map(|e| {
            let overlay = e.overlay.as_ref().map(|path| path.display().to_string());
            let kept = overlay.map_or(String::new(), |path| {
                format!(", writes go to {}", printable(&path))
            });
            format!("{} ({}{kept})\n", e.uri, HumanBytes(e.size_bytes))
        })
        .collect()
}

fn backup(out: &mut String, o: &BackupOutcome) -> std::fmt::Result {
    writeln!(
        out,
        "snapshot {} of {} in {:.1} s",
        o.snapshot,
        printable(&o.name),
        o.duration.as_secs_f64()
    )?;
    for d in &o.disks {
        write!(out, "  {}: {}", printable(&d.disk), kind(d.kind))?;
        if let Some(reason) = d.reason {
            write!(out, " ({reason}: {})", reason.explain())?;
        }
        if let Some(dirty) = d.dirty_bytes {
            write!(out, ", dirty {}", HumanBytes(dirty))?;
        }
        writeln!(
            out,
            ", read {} of {}, {} of {} chunks new, stored {} for {}",
            HumanBytes(d.read_bytes),
            HumanBytes(d.size_bytes),
            d.chunks_new,
            d.chunks_total,
            HumanBytes(d.stored_bytes),
            HumanBytes(d.new_bytes)
        )?;
    }
    if o.resumed_bytes > 0 {
        let resumed = HumanBytes(o.resumed_bytes);
        writeln!(out, "  an interrupted run had stored {resumed} of it")?;
    }
    Ok(())
}

fn snapshots(out: &mut String, o: &SnapshotsOutcome) -> std::fmt::Result {
    if o.snapshots.is_empty() {
        writeln!(out, "no snapshots")?;
    }
    for s in &o.snapshots {
        let disks: Vec<String> = s
            .draft
            .disks
            .iter()
            .map(|d| {
                format!(
                    "{} {} {}",
                    printable(&d.disk),
                    HumanBytes(d.size_bytes),
                    kind(d.kind)
                )
            })
            .collect();
        write!(
            out,
            "{}  {}  {}  {}",
            &s.id.to_string()[..12],
            DateTime::from_timestamp_nanos(s.draft.started_unix_nanos)
                .format("%Y-%m-%d %H:%M:%S UTC"),
            printable(&s.draft.name),
            disks.join(", ")
        )?;
        if !s.draft.tags.is_empty() {
            write!(out, "  [{}]", printable(&s.draft.tags.join(", ")))?;
        }
        out.push('\n');
    }
    for name in &o.unreadable {
        writeln!(out, "unreadable: {}", printable(name))?;
    }
    Ok(())
}

fn show(out: &mut String, s: &Snapshot) -> std::fmt::Result {
    writeln!(out, "snapshot {}", s.id)?;
    writeln!(out, "name     {}", printable(&s.draft.name))?;
    writeln!(
        out,
        "started  {}",
        DateTime::from_timestamp_nanos(s.draft.started_unix_nanos).format("%Y-%m-%d %H:%M:%S UTC")
    )?;
    writeln!(
        out,
        "finished {}",
        DateTime::from_timestamp_nanos(s.draft.finished_unix_nanos).format("%Y-%m-%d %H:%M:%S UTC")
    )?;
    if let Some(origin) = &s.draft.origin {
        let (snapshot, repo) = (origin.snapshot, origin.repo);
        writeln!(out, "copy of  {snapshot} of repository {repo}")?;
    }
    if !s.draft.tags.is_empty() {
        writeln!(out, "tags     {}", printable(&s.draft.tags.join(", ")))?;
    }
    for d in &s.draft.disks {
        writeln!(out, "disk {}", printable(&d.disk))?;
        writeln!(
            out,
            "  size     {} ({} bytes)",
            HumanBytes(d.size_bytes),
            d.size_bytes
        )?;
        match &d.reason {
            Some(reason) => writeln!(out, "  kind     {} ({reason})", kind(d.kind))?,
            None => writeln!(out, "  kind     {}", kind(d.kind))?,
        }
        if let Some(parent) = d.parent {
            writeln!(out, "  parent   {parent}")?;
        }
        if let Some(bitmap) = &d.bitmap_used {
            writeln!(out, "  bitmap   {}", printable(bitmap))?;
        }
        if !d.bitmaps_started.is_empty() {
            writeln!(
                out,
                "  starts   {}",
                printable(&d.bitmaps_started.join(", "))
            )?;
        }
        writeln!(out, "  source   {}", printable(&d.source))?;
        let st = &d.stats;
        writeln!(
            out,
            "  read {}, zero {}, {} of {} chunks new, stored {} for {}",
            HumanBytes(st.read_bytes),
            HumanBytes(st.zero_bytes),
            st.chunks_new,
            st.chunks_total,
            HumanBytes(st.stored_bytes),
            HumanBytes(st.new_bytes)
        )?;
    }
    Ok(())
}

fn info(out: &mut String, o: &InfoOutcome) -> std::fmt::Result {
    for e in &o.exports {
        writeln!(out, "export \"{}\"", printable(&e.name))?;
        writeln!(
            out,
            "  size        {} ({} bytes)",
            HumanBytes(e.size_bytes),
            e.size_bytes
        )?;
        if let Some(description) = &e.description {
            writeln!(out, "  description {}", printable(description))?;
        }
        writeln!(out, "  flags       {}", e.flags.join(" "))?;
        let b = &e.block_size;
        writeln!(
            out,
            "  block size  {} minimum, {} preferred, {} maximum",
            b.minimum, b.preferred, b.maximum
        )?;
        writeln!(out, "  contexts    {}", printable(&e.contexts.join(" ")))?;
        if let Some(structured) = e.structured_replies {
            writeln!(
                out,
                "  replies     {}",
                if structured { "structured" } else { "simple" }
            )?;
        }
        if e.tls {
            writeln!(out, "  encrypted   by TLS")?;
        }
    }
    for map in o.maps.iter().flatten() {
        writeln!(out, "{}", printable(&map.context))?;
        for (range, flags) in &map.extents {
            writeln!(
                out,
                "  {:>16} {:>16} {}",
                range.start(),
                range.len(),
                map.describe(*flags)
            )?;
        }
    }
    if let Some(bitmap) = &o.bitmap {
        writeln!(
            out,
            "bitmap {}: {} dirty",
            printable(&bitmap.name),
            HumanBytes(bitmap.dirty_bytes)
        )?;
    }
    Ok(())
}

fn forget(out: &mut String, o: &ForgetOutcome) -> std::fmt::Result {
    for (s, reasons) in &o.kept {
        let mut rules: Vec<&str> = reasons.iter().map(|r| r.rule).collect();
        rules.dedup();
        one_snapshot(out, if o.dry_run { "would keep" } else { "kept" }, s)?;
        writeln!(out, "  ({})", rules.join(", "))?;
    }
    for s in &o.forgotten {
        let word = if o.dry_run { "would forget" } else { "forgot" };
        one_snapshot(out, word, s)?;
        out.push('\n');
    }
    for s in &o.had_back {
        one_snapshot(out, "had back", s)?;
        out.push('\n');
    }
    if o.forgotten.is_empty() && o.had_back.is_empty() {
        writeln!(out, "nothing to forget")?;
    }
    match &o.prune {
        Some(p) => pruned(out, p, o.dry_run),
        None => Ok(()),
    }
}

fn one_snapshot(out: &mut String, word: &str, s: &Snapshot) -> std::fmt::Result {
    let disks: Vec<&str> = s.draft.disks.iter().map(|d| d.disk.as_str()).collect();
    write!(
        out,
        "{word} {}  {}  {}  {}",
        &s.id.to_string()[..12],
        DateTime::from_timestamp_nanos(s.draft.started_unix_nanos).format("%Y-%m-%d %H:%M:%S UTC"),
        printable(&s.draft.name),
        printable(&disks.join(", "))
    )
}

fn prune(out: &mut String, o: &PruneOutcome) -> std::fmt::Result {
    pruned(out, &o.pruned, o.dry_run)
}

fn pruned(out: &mut String, p: &Pruned, dry_run: bool) -> std::fmt::Result {
    let word = if dry_run { "would remove" } else { "removed" };
    writeln!(
        out,
        "{word} {} snapshots and {} packs of {}; {} packs written anew into {}",
        p.snapshots_removed,
        p.packs_removed,
        HumanBytes(p.removed_bytes),
        p.packs_repacked,
        HumanBytes(p.written_bytes)
    )?;
    if p.packs_waiting > 0 {
        let sessions: Vec<String> = p.waiting_for.iter().map(ToString::to_string).collect();
        writeln!(
            out,
            "{} packs of {} wait for running backups to end: {}",
            p.packs_waiting,
            HumanBytes(p.waiting_bytes),
            sessions.join(", ")
        )?;
    }
    for (_, error) in &p.damaged {
        writeln!(out, "left alone: {error}")?;
    }
    if p.no_room {
        writeln!(
            out,
            "there was no room to write packs anew: prune once more"
        )?;
    }
    Ok(())
}

fn keys(out: &mut String, o: &KeyOutcome) -> std::fmt::Result {
    if let Some(slot) = o.added {
        writeln!(out, "added key slot {slot}")?;
    }
    if let Some(slot) = o.removed {
        writeln!(out, "removed key slot {slot}")?;
    }
    if o.slots.is_empty() {
        writeln!(out, "no key slots: the repository is not encrypted")?;
    }
    for s in &o.slots {
        let mark = if s.current { '*' } else { ' ' };
        write!(out, "{mark} {:>2}  {:<8}", s.number, s.kind.as_str())?;
        if let Some(cost) = &s.cost {
            let memory = HumanBytes(u64::from(cost.memory_kib()) << 10);
            write!(out, "  argon2id {memory}, {} passes", cost.passes())?;
        }
        if let Some(label) = &s.label {
            write!(out, "  {}", printable(label))?;
        }
        out.push('\n');
    }
    Ok(())
}

fn diff(out: &mut String, o: &DiffOutcome) -> std::fmt::Result {
    for r in &o.ranges {
        writeln!(out, "{:>16} {:>16}", r.start(), r.len())?;
    }
    let bytes: u64 = o.ranges.iter().map(|r| r.len()).sum();
    writeln!(
        out,
        "disk {}: {} ranges, {} differ",
        printable(&o.disk),
        o.ranges.len(),
        HumanBytes(bytes)
    )
}
