//! How a snapshot is addressed: an id's first characters, `latest`, NAME, `NAME@latest` or `NAME@TIME`.

use chrono::{DateTime, NaiveDate, NaiveTime};

use super::EngineError;
use crate::repo::Snapshot;

/// Finds the one snapshot that the words address, among snapshots in any order.
///
/// # Errors
/// When none, or more than one by its id, is addressed.
pub(crate) fn select<'a>(
    snapshots: &'a [Snapshot],
    words: &str,
) -> Result<&'a Snapshot, EngineError> {
    let not_found = || EngineError::SnapshotNotFound(words.to_owned());
    if words == "latest" {
        return latest(snapshots.iter()).ok_or_else(not_found);
    }
    if words.len() >= LEAST_PREFIX && words.bytes().all(|b| b.is_ascii_hexdigit()) {
        let prefix = words.to_ascii_lowercase();
        let found: Vec<&Snapshot> = snapshots
            .iter()
            .filter(|s| s.id.to_string().starts_with(&prefix))
            .collect();
        match found[..] {
            [] => {}
            [one] => return Ok(one),
            _ => {
                return Err(EngineError::SnapshotAmbiguous {
                    selector: words.to_owned(),
                    count: found.len(),
                });
            }
        }
    }
    if let Some(found) = latest(snapshots.iter().filter(|s| s.draft.name == words)) {
        return Ok(found);
    }
    let Some((name, when)) = words.rsplit_once('@') else {
        return Err(not_found());
    };
    let named = snapshots.iter().filter(|s| s.draft.name == name);
    if when == "latest" {
        return latest(named).ok_or_else(not_found);
    }
    let Some(until) = time(when) else {
        // Without snapshots of that name, the whole words are a name that does not exist.
        return Err(match latest(named) {
            None => not_found(),
            Some(_) => EngineError::Usage(format!(
                "`{when}` is not a time: use 2026-11-22, or 2026-11-22T02:00:00Z"
            )),
        });
    };
    latest(named.filter(|s| s.draft.started_unix_nanos <= until)).ok_or_else(not_found)
}

fn latest<'a>(snapshots: impl Iterator<Item = &'a Snapshot>) -> Option<&'a Snapshot> {
    snapshots.max_by_key(|s| (s.draft.started_unix_nanos, s.id))
}

/// Reads a time in RFC 3339 as nanoseconds since 1970; a day alone means its end, in UTC.
fn time(text: &str) -> Option<i64> {
    let time = match text.parse::<NaiveDate>() {
        Ok(day) => day.succ_opt()?.and_time(NaiveTime::MIN).and_utc(),
        Err(_) => DateTime::parse_from_rfc3339(text).ok()?.to_utc(),
    };
    time.timestamp_nanos_opt()
}

const LEAST_PREFIX: usize = 4;
