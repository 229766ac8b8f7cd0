//! What can be typed: commands, flags and their help.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::repo::Parity;

/// Incremental, deduplicated backups of QEMU/KVM disks over NBD dirty bitmaps.
#[derive(Debug, Parser)]
#[command(
    name = "nbdbackup",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The repository: a directory.
    #[arg(
        short,
        long,
        global = true,
        env = "NBDBACKUP_REPOSITORY",
        value_name = "PATH"
    )]
    pub(crate) repo: Option<PathBuf>,
    /// A file whose content is the repository's password, without the end of its line [env: NBDBACKUP_PASSWORD_FILE, or
    /// the password itself in NBDBACKUP_PASSWORD].
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) password_file: Option<PathBuf>,
    /// A shell command that prints the repository's password [env: NBDBACKUP_PASSWORD_COMMAND].
    #[arg(long, global = true, value_name = "COMMAND")]
    pub(crate) password_command: Option<OsString>,
    /// A file of at least 32 random bytes that opens the repository [env: NBDBACKUP_KEY_FILE].
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) key_file: Option<PathBuf>,
    /// Prints one JSON object a line on stdout; the last one is the result or the error.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Prints nothing but results, warnings and errors.
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Says more on stderr; twice for debugging.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// The form of log lines on stderr.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
    /// When to draw a progress bar on stderr.
    #[arg(long, global = true, value_enum, default_value_t = When::Auto, value_name = "WHEN")]
    pub(crate) progress: When,
    /// The least time between two JSON progress lines, in seconds.
    #[arg(long, global = true, default_value_t = 0.5, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) progress_interval: f64,
    /// Uses no colours; so does the environment variable NO_COLOR.
    #[arg(long, global = true)]
    pub(crate) no_color: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum When {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Creates the repository.
    Init(Init),
    /// Reads every allocated range of the sources and stores a snapshot.
    Full(Full),
    /// Reads only what is dirty since the parent snapshot and stores a snapshot that is complete in itself.
    Incremental(Incremental),
    /// Writes a snapshot's disk to a file or stdout, or serves its disks as NBD exports.
    Restore(Restore),
    /// Lists snapshots.
    Snapshots(Snapshots),
    /// Shows one snapshot.
    Show(Show),
    /// Shows what a source offers: exports, sizes, contexts, flags, extents.
    Info(Info),
    /// Lists the ranges that differ between two snapshots of a disk.
    Diff(Diff),
    /// Forgets snapshots by retention rules, for each disk of each machine, or by name.
    Forget(Forget),
    /// Frees what no snapshot needs; safe beside running backups.
    Prune(Prune),
    /// Proves that the repository is whole, and names what is damaged by snapshot, disk and range.
    Check(Check),
    /// Mends what is damaged, from parity or from a copy of the repository's files.
    Repair(RepairArgs),
    /// Copies snapshots to another repository, sending only what it lacks.
    Copy(CopyArgs),
    /// Lists, adds, removes or changes the passwords and key files that open the repository.
    Key(Key),
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// The size of chunks, the unit of deduplication: a power of two from 64KiB to 4MiB.
    #[arg(long, default_value = "128KiB", value_name = "SIZE", value_parser = size)]
    pub(crate) chunk_size: u64,
    #[command(flatten)]
    pub(crate) compression: CompressionArg,
    /// How the repository is encrypted (default: with the password or key file that is given; without one, `none` must be
    /// said aloud).
    #[arg(long, value_enum, value_name = "HOW")]
    pub(crate) encryption: Option<Encryption>,
    #[command(flatten)]
    pub(crate) cost: CostArgs,
    /// How many damaged parts of a pack, of 64, `repair` can compute again: 0 (no parity) to 16. Each takes 1.6 % more
    /// room.
    #[arg(long, default_value_t = Parity::default(), value_name = "PARTS", value_parser = parity)]
    pub(crate) parity: Parity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Encryption {
    /// AES-256-GCM, opened by a password.
    Password,
    /// AES-256-GCM, opened by a key file.
    KeyFile,
    /// Whoever can read the files can read the disks.
    None,
}

#[derive(Debug, Args)]
pub(crate) struct CostArgs {
    /// The memory that a guess at the password costs: 1MiB to 1GiB (default: 256MiB).
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) argon2_memory: Option<u64>,
    /// How often a guess at the password goes over that memory: 1 to 16 times (default: 3).
    #[arg(long, value_name = "N")]
    pub(crate) argon2_passes: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct Key {
    #[command(subcommand)]
    pub(crate) command: KeyCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Lists the key slots.
    List,
    /// Adds a password or key file.
    Add(NewSecret),
    /// Removes a password or key file; never the last one.
    Remove {
        /// The slot's number, as `key list` shows it.
        slot: u32,
    },
    /// Puts a password or key file in the place of the one that opens the repository now.
    Change(NewSecret),
}

#[derive(Debug, Args)]
pub(crate) struct NewSecret {
    /// A file whose content is the new password, without the end of its line.
    #[arg(long, value_name = "PATH")]
    pub(crate) new_password_file: Option<PathBuf>,
    /// A shell command that prints the new password.
    #[arg(long, value_name = "COMMAND")]
    pub(crate) new_password_command: Option<OsString>,
    /// A new key file: at least 32 random bytes.
    #[arg(long, value_name = "PATH")]
    pub(crate) new_key_file: Option<PathBuf>,
    /// What to call it in `key list`.
    #[arg(long, value_name = "TEXT")]
    pub(crate) label: Option<String>,
    #[command(flatten)]
    pub(crate) cost: CostArgs,
}

#[derive(Debug, Args)]
pub(crate) struct CompressionArg {
    /// How chunks are compressed: `none`, `zstd` or `zstd:LEVEL` with a level from 1 to 19.
    #[arg(long, value_name = "HOW")]
    pub(crate) compression: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Full {
    #[command(flatten)]
    pub(crate) backup: Backup,
}

#[derive(Debug, Args)]
pub(crate) struct Incremental {
    #[command(flatten)]
    pub(crate) backup: Backup,
    /// Asserts the parent: the bitmap covers every write since this snapshot.
    #[arg(long, value_name = "SNAPSHOT")]
    pub(crate) parent: Option<String>,
    /// Fails with exit code 21, and writes nothing, where a disk would have to be read in full.
    #[arg(long)]
    pub(crate) no_fallback: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// NBD URIs or image files, each a disk of the snapshot.
    #[arg(required = true, value_name = "SOURCE")]
    pub(crate) sources: Vec<String>,
    /// The machine's name (default: the first disk's name).
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// The disk's name, once for each source (default: the export's or the file's name).
    #[arg(long, value_name = "DISK")]
    pub(crate) disk: Vec<String>,
    /// The dirty bitmap: for a full, the one that starts recording at this point in time; for an incremental, the one to follow.
    #[arg(long, value_name = "BITMAP")]
    pub(crate) bitmap: Option<String>,
    /// Another bitmap that starts recording at this point in time, for callers that rotate names.
    #[arg(long, value_name = "BITMAP")]
    pub(crate) starts: Vec<String>,
    /// The image's format, such as raw or qcow2 (default: by the file's name and first bytes, which must agree).
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
    /// A label of the snapshot; can be given more than once.
    #[arg(long, value_name = "TAG")]
    pub(crate) tag: Vec<String>,
    /// The most connections to one export; more than one only where the server allows it.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) connections: u8,
    /// How long to try to reach a source again after its connections were lost, in seconds; 0 takes each failure as final.
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) retry_time: f64,
    /// Keeps what was stored for the next run, should this one be interrupted, each time it is this much more; 0 for never.
    #[arg(long, default_value = "1GiB", value_name = "SIZE", value_parser = size)]
    pub(crate) checkpoint_interval: u64,
    #[command(flatten)]
    pub(crate) compression: CompressionArg,
    /// Does not decode again what was compressed or encrypted before it is written: a third less processor time for new
    /// chunks, and a bit that flips in memory meanwhile is found only by the next check or restore.
    #[arg(long)]
    pub(crate) no_verify_writes: bool,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("where").required(true).args(["to", "serve"]))]
pub(crate) struct Restore {
    /// The snapshot: an id's first characters (4 or more), `latest`, NAME, `NAME@latest` or `NAME@TIME`.
    pub(crate) snapshot: String,
    /// The disk; needed with --to where the snapshot has several.
    #[arg(long, value_name = "DISK")]
    pub(crate) disk: Option<String>,
    /// Where the disk goes: a file, a block device, the URI of a writable NBD export, or `-` for stdout.
    #[arg(long, value_name = "TARGET")]
    pub(crate) to: Option<String>,
    /// The target's format: raw, or any that qemu-img writes, such as qcow2.
    #[arg(long, default_value = "raw", value_name = "FORMAT", requires = "to")]
    pub(crate) format: String,
    /// Overwrites the target's existing content.
    #[arg(long, requires = "to")]
    pub(crate) force: bool,
    /// Serves the disks as NBD exports at `unix:PATH` or `HOST:PORT` until SIGINT or SIGTERM.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) serve: Option<String>,
    /// Lets clients write: what they write is kept in this folder, and the repository stays as it is.
    #[arg(long, requires = "serve", value_name = "DIR")]
    pub(crate) writable: Option<PathBuf>,
    /// Ends by itself after this long without a client, in seconds.
    #[arg(long, requires = "serve", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) idle_exit: Option<f64>,
    /// Serves over TLS only, with server-cert.pem and server-key.pem of this folder.
    #[arg(long, requires = "serve", value_name = "DIR")]
    pub(crate) tls_certificates: Option<PathBuf>,
    /// Demands of each client a certificate from an authority in the folder's ca-cert.pem.
    #[arg(long, requires = "tls_certificates")]
    pub(crate) tls_verify_peer: bool,
    /// Serves over TLS only, to clients with a key in this file of IDENTITY:KEY lines, as psktool writes it.
    #[arg(
        long,
        requires = "serve",
        conflicts_with = "tls_certificates",
        value_name = "FILE"
    )]
    pub(crate) tls_psk_file: Option<PathBuf>,
    /// Allows serving without TLS beyond loopback and Unix sockets.
    #[arg(long, requires = "serve")]
    pub(crate) insecure: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Snapshots {
    /// Only those of this machine.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Only those that hold this disk.
    #[arg(long, value_name = "DISK")]
    pub(crate) disk: Option<String>,
    /// Only those with this tag.
    #[arg(long, value_name = "TAG")]
    pub(crate) tag: Option<String>,
    /// Only the newest N of each machine.
    #[arg(long, value_name = "N")]
    pub(crate) latest: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The snapshot.
    pub(crate) snapshot: String,
}

#[derive(Debug, Args)]
pub(crate) struct Info {
    /// An NBD URI, with or without an export's name, or an image file.
    pub(crate) source: String,
    /// Shows the extents of base:allocation, and of the bitmap if one is named.
    #[arg(long)]
    pub(crate) map: bool,
    /// Shows how many bytes this bitmap calls dirty: the price of the next incremental.
    #[arg(long, value_name = "BITMAP")]
    pub(crate) bitmap: Option<String>,
    /// The image's format.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// The one snapshot.
    pub(crate) a: String,
    /// The other.
    pub(crate) b: String,
    /// The disk; needed where the snapshots share several.
    #[arg(long, value_name = "DISK")]
    pub(crate) disk: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Forget {
    /// These snapshots; without any the rules decide.
    #[arg(conflicts_with_all = ["keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly", "keep_within", "keep_tag"])]
    pub(crate) snapshots: Vec<String>,
    /// Keeps the newest N of each disk.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) keep_last: usize,
    /// Keeps the newest of each of the last N hours that have one.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) keep_hourly: usize,
    /// The same for days, in UTC.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) keep_daily: usize,
    /// The same for weeks, from Monday on.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) keep_weekly: usize,
    /// The same for months.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) keep_monthly: usize,
    /// The same for years.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) keep_yearly: usize,
    /// Keeps all that are at most this much older than the newest of their disk, such as 30d or 2w.
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) keep_within: Option<Duration>,
    /// Keeps all with this tag; can be given more than once.
    #[arg(long, value_name = "TAG")]
    pub(crate) keep_tag: Vec<String>,
    /// Only snapshots of this machine.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Only snapshots that hold this disk.
    #[arg(long, value_name = "DISK")]
    pub(crate) disk: Option<String>,
    /// Only snapshots with this tag.
    #[arg(long, value_name = "TAG")]
    pub(crate) tag: Option<String>,
    /// Forgets also the last snapshot of a disk, and lets --prune free however much forgotten snapshots held.
    #[arg(long)]
    pub(crate) force: bool,
    /// Takes back that these snapshots were forgotten, as long as no prune has begun to remove them.
    #[arg(long, requires = "snapshots", conflicts_with_all = ["force", "prune", "dry_run"])]
    pub(crate) undelete: bool,
    /// Prunes afterwards.
    #[arg(long)]
    pub(crate) prune: bool,
    /// Says what would be done, and does nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) how: PruneArgs,
}

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Reads and proves every record, or so much of all packs: those first that were not read for the longest time.
    #[arg(long, value_name = "PERCENT", num_args = 0..=1, require_equals = true, default_missing_value = "100", value_parser = percent)]
    pub(crate) read_data: Option<f64>,
    /// Mends what can be mended: copies of small files, the index; marks damaged records, so that the next backup reads and
    /// stores them again.
    #[arg(long)]
    pub(crate) repair: bool,
    /// Needs no password: compares all files with the checksums beside them, and says nothing of snapshots.
    #[arg(long, conflicts_with_all = ["read_data", "repair"])]
    pub(crate) no_key: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RepairArgs {
    /// A copy of this repository's files, made by a mirror or a snapshot of its file system: what parity cannot mend is
    /// fetched from there.
    #[arg(long, value_name = "PATH")]
    pub(crate) from: Option<PathBuf>,
    /// Does not read all records first, to find the damaged ones: mends what `check --repair` has marked, and what footers
    /// and maps tell.
    #[arg(long)]
    pub(crate) only_marked: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// The snapshots (default: all).
    #[arg(value_name = "SNAPSHOT")]
    pub(crate) snapshots: Vec<String>,
    /// The other repository: a directory; its chunks must have the same size.
    #[arg(long, value_name = "PATH")]
    pub(crate) to: PathBuf,
    /// A file whose content is the other repository's password [env: NBDBACKUP_TO_PASSWORD_FILE, or the password itself in
    /// NBDBACKUP_TO_PASSWORD].
    #[arg(long, value_name = "PATH")]
    pub(crate) to_password_file: Option<PathBuf>,
    /// A shell command that prints the other repository's password [env: NBDBACKUP_TO_PASSWORD_COMMAND].
    #[arg(long, value_name = "COMMAND")]
    pub(crate) to_password_command: Option<OsString>,
    /// A key file that opens the other repository [env: NBDBACKUP_TO_KEY_FILE].
    #[arg(long, value_name = "PATH")]
    pub(crate) to_key_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) compression: CompressionArg,
}

#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Says what would be done, and does nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Frees however much forgotten snapshots held.
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) how: PruneArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// The part of the stored bytes that may stay although nobody needs them, rather than write packs anew.
    #[arg(long, default_value = "10", value_name = "PERCENT", value_parser = percent)]
    pub(crate) max_unused: f64,
    /// Fails rather than free more than this part of the stored bytes for forgotten snapshots, unless --force.
    #[arg(long, default_value_t = 25, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) max_freed: u8,
    /// How long a forgotten snapshot can be had back, such as 7d or 12h.
    #[arg(long, default_value = "7d", value_name = "DURATION", value_parser = duration)]
    pub(crate) undelete_window: Duration,
}

/// Parses a size such as `131072`, `128K`, `128KiB` or `4M`; units are powers of 1024.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("`{text}` is not a size; try 128KiB"))?;
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        unit => {
            return Err(format!(
                "`{unit}` is not a unit of size; use KiB, MiB, GiB or TiB"
            ));
        }
    };
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("`{text}` is too large"))
}

/// Parses a duration such as `90s`, `30min`, `12h`, `7d`, `2w` or `1y`, or several of them such as `1d12h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let fault = || format!("`{text}` is not a duration; try 12h, 7d, 2w or 1y");
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(fault)?;
        let (digits, tail) = rest.split_at(unit_at);
        let next = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(next);
        let seconds: u64 = match unit {
            "s" => 1,
            "min" => 60,
            "h" => 3600,
            "d" => 86_400,
            "w" => 7 * 86_400,
            "y" => 365 * 86_400,
            _ => return Err(fault()),
        };
        let number: u64 = digits.parse().map_err(|_| fault())?;
        total = number
            .checked_mul(seconds)
            .and_then(|s| total.checked_add(s))
            .ok_or_else(fault)?;
        rest = tail;
    }
    match text.is_empty() {
        true => Err(fault()),
        false => Ok(Duration::from_secs(total)),
    }
}

fn percent(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').parse::<f64>() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err(format!("`{text}` is not a percentage")),
    }
}

fn parity(text: &str) -> Result<Parity, String> {
    let known = text.parse().ok().and_then(Parity::new);
    known.ok_or_else(|| format!("`{text}` is not a number from 0 to 16"))
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds.is_finite() && (0.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!("`{text}` is not a number of seconds")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_have_units() {
        let seconds = |text| duration(text).map(|d| d.as_secs()).ok();
        assert_eq!(seconds("7d"), Some(604_800));
        assert_eq!(seconds("1d12h30min5s"), Some(131_405));
        assert_eq!(seconds("2w"), seconds("14d"));
        assert_eq!(seconds("0d"), Some(0));
        for wrong in [
            "",
            "7",
            "d",
            "7m",
            "-1d",
            "7 d",
            "99999999999999999999d",
            "1d2",
        ] {
            assert_eq!(seconds(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn sizes_take_binary_units_only() {
        assert_eq!(size("131072"), Ok(131_072));
        assert_eq!(size("128KiB"), Ok(131_072));
        assert_eq!(size("4m"), Ok(4 << 20));
        assert!(size("4MB").is_err());
        assert!(size("").is_err());
        assert!(size("99999999999T").is_err());
    }
}
