//! Retention: which snapshots the rules keep, decided for each disk of each machine by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, Datelike, Timelike, Utc};

use crate::repo::{Snapshot, SnapshotId};

/// What is kept; a snapshot that any rule keeps for any of its disks stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The newest, so many.
    pub last: usize,
    /// The newest of each hour that has one, for so many hours.
    pub hourly: usize,
    /// The same for days.
    pub daily: usize,
    /// The same for weeks, which begin on Mondays.
    pub weekly: usize,
    /// The same for months.
    pub monthly: usize,
    /// The same for years.
    pub yearly: usize,
    /// All that are not older than this, counted from the newest.
    pub within: Option<Duration>,
    /// All that have one of these tags.
    pub tags: Vec<String>,
}

impl Rules {
    /// Whether they keep anything at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why a snapshot stays: the rule, and the disk that it was kept for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kept {
    /// The disk.
    pub disk: String,
    /// `last`, `hourly`, `daily`, `weekly`, `monthly`, `yearly`, `within`, `tag`, or `clock` where its time is no help.
    pub rule: &'static str,
}

/// Decides which snapshots stay, and why. Periods are those of UTC.
///
/// What is new is told by generations, not by clocks. A snapshot whose time does not fit that order, or lies in the
/// future, was taken with a wrong clock: it stays, and counts for no rule that goes by time.
pub(crate) fn keep(
    snapshots: &[Snapshot],
    rules: &Rules,
    now: DateTime<Utc>,
) -> BTreeMap<SnapshotId, BTreeSet<Kept>> {
    let mut groups: BTreeMap<(&str, &str), Vec<Dated<'_>>> = BTreeMap::new();
    for snapshot in snapshots {
        for disk in &snapshot.draft.disks {
            let key = (snapshot.draft.name.as_str(), disk.disk.as_str());
            groups.entry(key).or_default().push(Dated {
                generation: disk.generation,
                started: snapshot.draft.started_unix_nanos,
                snapshot,
            });
        }
    }
    let mut kept: BTreeMap<SnapshotId, BTreeSet<Kept>> = BTreeMap::new();
    for ((_, disk), mut group) in groups {
        group.sort_by_key(|d| (d.generation, d.started, d.snapshot.id));
        for (id, rule) in keep_of_disk(&group, rules, now) {
            let disk = disk.to_owned();
            kept.entry(id).or_default().insert(Kept { disk, rule });
        }
    }
    kept
}

/// A snapshot of a disk, with what orders them.
#[derive(Clone, Copy)]
struct Dated<'a> {
    generation: u64,
    started: i64,
    snapshot: &'a Snapshot,
}

/// Decides for one disk, whose snapshots come oldest first.
fn keep_of_disk(
    group: &[Dated<'_>],
    rules: &Rules,
    now: DateTime<Utc>,
) -> Vec<(SnapshotId, &'static str)> {
    let mut kept: Vec<(SnapshotId, &'static str)> = Vec::new();
    let newest = group.iter().rev().take(rules.last);
    kept.extend(newest.map(|d| (d.snapshot.id, "last")));
    let latest = (now + TOLERANCE).timestamp_nanos_opt().unwrap_or(i64::MAX);
    let credible = credible(group, latest);
    let doubtful = group
        .iter()
        .zip(&credible)
        .filter(|(_, credible)| !**credible);
    kept.extend(doubtful.map(|(d, _)| (d.snapshot.id, "clock")));
    let group: Vec<&Snapshot> = group
        .iter()
        .zip(&credible)
        .rev()
        .filter_map(|(d, credible)| credible.then_some(d.snapshot))
        .collect();
    let periods: [(&'static str, usize, Period); 5] = [
        ("hourly", rules.hourly, |t| {
            (t.year(), t.ordinal() * 24 + t.hour())
        }),
        ("daily", rules.daily, |t| (t.year(), t.ordinal())),
        ("weekly", rules.weekly, |t| {
            (t.iso_week().year(), t.iso_week().week())
        }),
        ("monthly", rules.monthly, |t| (t.year(), t.month())),
        ("yearly", rules.yearly, |t| (t.year(), 0)),
    ];
    for (rule, count, period) in periods {
        let mut last = None;
        let mut left = count;
        for snapshot in &group {
            let now = period(started(snapshot));
            if left > 0 && last != Some(now) {
                kept.push((snapshot.id, rule));
                last = Some(now);
                left -= 1;
            }
        }
    }
    if let (Some(within), Some(newest)) = (rules.within, group.first()) {
        let nanos = i64::try_from(within.as_nanos()).unwrap_or(i64::MAX);
        let from = newest.draft.started_unix_nanos.saturating_sub(nanos);
        let young = group.iter().filter(|s| s.draft.started_unix_nanos >= from);
        kept.extend(young.map(|s| (s.id, "within")));
    }
    let tagged = group
        .iter()
        .filter(|s| s.draft.tags.iter().any(|t| rules.tags.contains(t)));
    kept.extend(tagged.map(|s| (s.id, "tag")));
    kept
}

/// Says of each snapshot whether its time fits the others': as many as possible whose times never go back.
fn credible(group: &[Dated<'_>], latest: i64) -> Vec<bool> {
    // The number of the last snapshot of the best series of each length, and before it in that series.
    let mut ends: Vec<usize> = Vec::new();
    let mut before: Vec<Option<usize>> = vec![None; group.len()];
    for (at, dated) in group.iter().enumerate() {
        if dated.started > latest {
            continue;
        }
        let len = ends.partition_point(|end| group[*end].started <= dated.started);
        before[at] = len.checked_sub(1).map(|last| ends[last]);
        match ends.get_mut(len) {
            Some(end) => *end = at,
            None => ends.push(at),
        }
    }
    let mut credible = vec![false; group.len()];
    let mut next = ends.last().copied();
    while let Some(at) = next {
        credible[at] = true;
        next = before[at];
    }
    credible
}

/// How far clocks may be apart that are not wrong.
const TOLERANCE: chrono::Duration = chrono::Duration::days(1);

/// A number of a period: two moments of the same period have the same.
type Period = fn(DateTime<Utc>) -> (i32, u32);

fn started(snapshot: &Snapshot) -> DateTime<Utc> {
    DateTime::from_timestamp_nanos(snapshot.draft.started_unix_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::{
        BackupKind, ChunkSize, DiskRecord, DiskStats, MapRoot, RepoUuid, SnapshotDraft,
    };

    fn snapshot(number: u8, time: &str, disks: &[&str], tags: &[&str]) -> Snapshot {
        let time: DateTime<Utc> = time.parse().unwrap();
        let disk = |name: &&str| DiskRecord {
            disk: (*name).to_owned(),
            size_bytes: 0,
            root: MapRoot::zeros(ChunkSize::default(), 0),
            kind: BackupKind::Full,
            reason: None,
            parent: None,
            bitmap_used: None,
            bitmaps_started: Vec::new(),
            bitmaps_lost: Vec::new(),
            generation: number.into(),
            source: String::new(),
            stats: DiskStats::default(),
        };
        Snapshot {
            id: SnapshotId::from_bytes([number; 16]),
            repo: RepoUuid::from_bytes([0; 16]),
            draft: SnapshotDraft {
                name: "web1".to_owned(),
                tags: tags.iter().map(|t| (*t).to_owned()).collect(),
                started_unix_nanos: time.timestamp_nanos_opt().unwrap(),
                disks: disks.iter().map(disk).collect(),
                ..SnapshotDraft::default()
            },
            packs: Vec::new(),
        }
    }

    fn kept(snapshots: &[Snapshot], rules: &Rules) -> Vec<u8> {
        let now = "2025-06-01T00:00:00Z".parse().unwrap();
        let kept = keep(snapshots, rules, now);
        kept.keys().map(|id| id.as_bytes()[0]).collect()
    }

    #[test]
    fn periods_keep_their_newest_and_count_only_those_that_have_one() {
        let at = |n, time| snapshot(n, time, &["vda"], &[]);
        let all = [
            at(1, "2024-12-30T01:00:00Z"),
            at(2, "2025-01-01T01:00:00Z"),
            at(3, "2025-01-01T23:00:00Z"),
            at(4, "2025-03-03T10:00:00Z"),
            at(5, "2025-03-03T10:59:59Z"),
            at(6, "2025-03-03T11:00:00Z"),
        ];
        let rules = |set: fn(&mut Rules)| {
            let mut rules = Rules::default();
            set(&mut rules);
            rules
        };
        assert_eq!(kept(&all, &rules(|r| r.last = 2)), [5, 6]);
        assert_eq!(kept(&all, &rules(|r| r.hourly = 3)), [3, 5, 6]);
        assert_eq!(kept(&all, &rules(|r| r.daily = 2)), [3, 6]);
        assert_eq!(kept(&all, &rules(|r| r.daily = 9)), [1, 3, 6]);
        // The first two days of that week are of the old year.
        assert_eq!(kept(&all, &rules(|r| r.weekly = 5)), [3, 6]);
        assert_eq!(kept(&all, &rules(|r| r.monthly = 2)), [3, 6]);
        assert_eq!(kept(&all, &rules(|r| r.yearly = 2)), [1, 6]);
        let day = |r: &mut Rules| r.within = Some(Duration::from_secs(3600));
        assert_eq!(kept(&all, &rules(day)), [4, 5, 6]);
        assert_eq!(kept(&all, &Rules::default()), [0; 0]);
    }

    #[test]
    fn snapshot_of_several_disks_stays_when_one_of_them_needs_it() {
        let all = [
            snapshot(1, "2025-01-01T00:00:00Z", &["vda", "vdb"], &["gold"]),
            snapshot(2, "2025-01-02T00:00:00Z", &["vda"], &[]),
            snapshot(3, "2025-01-03T00:00:00Z", &["vda"], &[]),
        ];
        let last = Rules {
            last: 1,
            ..Rules::default()
        };
        assert_eq!(kept(&all, &last), [1, 3]);
        let why = keep(&all, &last, "2025-06-01T00:00:00Z".parse().unwrap());
        let of_first = &why[&all[0].id];
        assert_eq!(of_first.iter().next().unwrap().disk, "vdb");
        let tag = Rules {
            tags: vec!["gold".to_owned()],
            ..Rules::default()
        };
        assert_eq!(kept(&all, &tag), [1]);
    }

    #[test]
    fn wrong_clock_makes_no_other_snapshot_go() {
        let day = |n: u8, time: &str| snapshot(n, time, &["vda"], &[]);
        let usual: Vec<Snapshot> = (1..=9)
            .map(|n| day(n, &format!("2025-05-0{n}T01:00:00Z")))
            .collect();
        let within = Some(Duration::from_secs(3 * 86_400));
        let all_rules = [
            Rules {
                last: 3,
                ..Rules::default()
            },
            Rules {
                daily: 3,
                ..Rules::default()
            },
            Rules {
                within,
                ..Rules::default()
            },
        ];
        for wrong_at in 1..=9 {
            for time in ["2035-05-05T01:00:00Z", "2015-05-05T01:00:00Z"] {
                let mut all = usual.clone();
                all[wrong_at - 1] = day(wrong_at as u8, time);
                for rules in &all_rules {
                    let stay = kept(&all, rules);
                    // The first of all may well be so old, and of the second it is the first that does not fit.
                    let fits = wrong_at <= 2 && time.starts_with("2015");
                    assert!(fits || stay.contains(&(wrong_at as u8)), "{time} {rules:?}");
                    let right: Vec<u8> = (1..=9).filter(|n| usize::from(*n) != wrong_at).collect();
                    for newest in right.iter().rev().take(2) {
                        assert!(
                            stay.contains(newest),
                            "{wrong_at} {time} {rules:?}: {stay:?}"
                        );
                    }
                    assert!(stay.len() <= 5, "{wrong_at} {time} {rules:?}: {stay:?}");
                }
            }
        }
    }
}
