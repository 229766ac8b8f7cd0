//! Maps against a vector of chunks: random updates on random parents, growing and shrinking, and what differs.

use std::ops::Range;
use std::sync::Arc;

use nbdbackup::repo::{
    ChunkEntry, Comparison, MapReader, MapRoot, RepoError, Repository, Run, Session, SnapshotId,
    changed,
};

use crate::support::*;

/// A disk as the model has it; a chunk's content is its number here, 0 for zeros.
#[derive(Clone, Default)]
struct Model {
    chunks: Vec<u32>,
    /// The bytes that the last chunk lacks.
    short: u64,
}

impl Model {
    fn bytes(&self) -> u64 {
        (self.chunks.len() * CHUNK) as u64 - self.short
    }
}

#[test]
fn random_updates_read_as_the_model_has_them() {
    for seed in 0..40 {
        let mut rng = Rng(seed);
        let (_, repo) = new_repo();
        let mut states: Vec<(Model, MapRoot)> = Vec::new();
        let mut ids = Vec::new();
        for step in 0..8 {
            let session = repo.begin(&session_after(&ids)).unwrap();
            let parent = match states.is_empty() || rng.below(8) == 0 {
                true => None,
                false => Some(states[rng.below(states.len() as u64) as usize].clone()),
            };
            let (model, root) = random_child(&mut rng, &session, parent.as_ref());
            let snapshot = session.commit(draft("d", model.bytes(), root)).unwrap();
            assert_reads_as(&repo, &snapshot.id, &model, &mut rng);
            ids.push(snapshot.id);
            if let Some((before, before_root)) = &parent {
                assert_differs_as(&repo, (before, before_root), (&model, &root), &mut rng);
            }
            // A map of the same content has the same identifier, however it was written.
            let session = repo.begin(&small_session()).unwrap();
            let again = write_afresh(&session, &model);
            assert_eq!(again.id(), root.id(), "seed {seed} step {step}");
            states.push((model, root));
        }
    }
}

/// Writes a random child of a parent, telling as little as it can or as much as it likes.
fn random_child(
    rng: &mut Rng,
    session: &Session,
    parent: Option<&(Model, MapRoot)>,
) -> (Model, MapRoot) {
    let len = match (rng.below(4), parent) {
        (0..2, Some((parent, _))) => parent.chunks.len() as u64,
        (2, _) => rng.below(300),
        _ => rng.below(40_000),
    };
    let short = match parent {
        Some((parent, _)) if parent.chunks.len() as u64 == len && rng.below(2) == 0 => parent.short,
        _ if len == 0 => 0,
        _ => rng.below(2) * rng.below(CHUNK as u64),
    };
    let mut model = Model {
        chunks: vec![0; len as usize],
        short,
    };
    let given = parent.map(|(model, root)| (root, model.bytes()));
    let mut map = session.map_writer(given, model.bytes()).unwrap();
    assert_eq!(map.chunks(), len);
    while map.position() < len {
        let at = map.position();
        let most = len - at;
        let span = 1 + match rng.below(3) {
            0 => rng.below(most),
            1 => rng.below(most.min(200)),
            _ => rng.below(most.min(20_000)),
        };
        let range = at..at + span;
        match rng.below(3) {
            0 => map.zero(range).unwrap(),
            1 if range.end <= map.keepable() => {
                let (parent, _) = parent.unwrap();
                let span = range.start as usize..range.end as usize;
                model.chunks[span.clone()].copy_from_slice(&parent.chunks[span]);
                map.keep(range).unwrap();
            }
            1 => {
                assert!(map.keep(range.clone()).is_err(), "{range:?} was kept");
            }
            _ => {
                for number in at..at + span.min(40) {
                    let content = 1 + rng.below(5) as u32;
                    model.chunks[number as usize] = content;
                    map.put(number, entry(session, &model, number)).unwrap();
                }
            }
        }
    }
    (model, map.finish().unwrap())
}

fn write_afresh(session: &Session, model: &Model) -> MapRoot {
    let mut map = session.map_writer(None, model.bytes()).unwrap();
    for (number, content) in model.chunks.iter().enumerate() {
        let number = number as u64;
        match content {
            0 => map.zero(number..number + 1).unwrap(),
            _ => map.put(number, entry(session, model, number)).unwrap(),
        }
    }
    map.finish().unwrap()
}

/// Stores the chunk that the model has at a place.
fn entry(session: &Session, model: &Model, number: u64) -> ChunkEntry {
    let stored = session.store_chunk(&content(model, number)).unwrap();
    stored.entry.unwrap()
}

fn content(model: &Model, number: u64) -> Vec<u8> {
    let last = number as usize + 1 == model.chunks.len();
    let len = match last {
        true => CHUNK - model.short as usize,
        false => CHUNK,
    };
    let mut bytes = vec![0; len];
    bytes[0] = model.chunks[number as usize] as u8;
    bytes
}

fn assert_reads_as(repo: &Arc<Repository>, id: &SnapshotId, model: &Model, rng: &mut Rng) {
    let snapshot = repo.snapshot(id).unwrap();
    let record = &snapshot.draft.disks[0];
    let map = repo.map(&record.root, record.size_bytes).unwrap();
    assert_runs_as(repo, &map, model, 0..model.chunks.len() as u64);
    for _ in 0..5 {
        let from = rng.below(model.chunks.len() as u64 + 1);
        let to = from + rng.below(500);
        assert_runs_as(repo, &map, model, from..to);
        let found = map.chunk(from).unwrap().is_some();
        let want = model.chunks.get(from as usize).is_some_and(|c| *c != 0);
        assert_eq!(found, want);
    }
}

fn assert_runs_as(repo: &Repository, map: &MapReader, model: &Model, range: Range<u64>) {
    let mut at = range.start;
    let mut after_hole = false;
    let mut out = Vec::new();
    for run in map.runs(range.clone()) {
        match run.unwrap() {
            Run::Hole { chunks } => {
                assert_eq!(chunks.start, at);
                assert!(!chunks.is_empty() && !after_hole, "holes are whole");
                after_hole = true;
                let span = chunks.start as usize..chunks.end as usize;
                assert!(model.chunks[span].iter().all(|c| *c == 0));
                at = chunks.end;
            }
            Run::Chunk { number, entry } => {
                assert_eq!(number, at);
                after_hole = false;
                let want = content(model, number);
                assert_ne!(want[0], 0);
                repo.read_chunk(&entry, want.len() as u32, &mut out)
                    .unwrap();
                assert!(out == want);
                at += 1;
            }
        }
    }
    assert_eq!(
        at,
        range.end.min(model.chunks.len() as u64).max(range.start)
    );
}

fn assert_differs_as(
    repo: &Repository,
    before: (&Model, &MapRoot),
    after: (&Model, &MapRoot),
    rng: &mut Rng,
) {
    let maps = [before, after].map(|(model, root)| repo.map(root, model.bytes()).unwrap());
    let mut found = Vec::new();
    changed(&maps[0], &maps[1], &mut |range| {
        assert!(found.last().is_none_or(|last| *last < range.start - 1));
        found.extend(range);
        Ok(())
    })
    .unwrap();
    let ids = |model: &Model, number: usize| match model.chunks.get(number) {
        None | Some(0) => Vec::new(),
        Some(_) => content(model, number as u64),
    };
    let len = before.0.chunks.len().max(after.0.chunks.len());
    let want: Vec<u64> = (0..len)
        .filter(|n| ids(before.0, *n) != ids(after.0, *n))
        .map(|n| n as u64)
        .collect();
    assert_eq!(found, want);
    for _ in 0..20 {
        let start = rng.below(len as u64 + 1);
        let end = start + rng.below(len as u64 + 1 - start);
        let (mut at, mut found) = (start, Vec::new());
        for run in Comparison::of(&maps[0], &maps[1], start..end) {
            let run = run.unwrap();
            assert_eq!(run.chunks.start, at);
            assert!(!run.chunks.is_empty());
            at = run.chunks.end;
            if !run.same {
                found.extend(run.chunks);
            }
        }
        assert_eq!(at, end);
        let within = want.iter().copied().filter(|n| (start..end).contains(n));
        assert_eq!(found, within.collect::<Vec<_>>(), "{start}..{end}");
    }
}

#[test]
fn updates_out_of_order_or_past_the_end_are_refused() {
    let (_, repo) = new_repo();
    let session = repo.begin(&small_session()).unwrap();
    let misuse = |result: Result<(), RepoError>| {
        assert!(
            matches!(result, Err(RepoError::Misuse { .. })),
            "{result:?}"
        );
    };
    let mut map = session.map_writer(None, 10 * CHUNK as u64).unwrap();
    misuse(map.zero(1..2));
    misuse(map.zero(0..11));
    misuse(map.keep(0..1));
    map.zero(0..5).unwrap();
    misuse(map.zero(4..6));
    let entry = session.store_chunk(&[1; CHUNK]).unwrap().entry.unwrap();
    misuse(map.put(6, entry));
    misuse(map.finish().map(drop));
}
