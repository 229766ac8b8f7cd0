//! What commands cost as snapshots get more: calls of the storage and bytes, which no busy machine disturbs.

use std::sync::Arc;

use nbdbackup::repo::{
    ChunkSize, InitOptions, MapRoot, MemoryStorage, PackKind, PruneOptions, Repository, SnapshotId,
};

use crate::prune::at_once;
use crate::support::*;

const DISK: u64 = 10 << 40;

/// What something cost.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    calls: u64,
    read_bytes: u64,
}

/// Opens the repository, does something, and says what both cost.
fn cost<T>(storage: &MemoryStorage, what: impl FnOnce(&Arc<Repository>) -> T) -> (Cost, T) {
    let counting = FaultStorage::new(Arc::new(storage.clone()), u64::MAX, Fault::Once);
    let repo = Repository::open(Arc::new(counting.clone())).unwrap();
    let done = what(&repo);
    let cost = Cost {
        calls: counting.calls(),
        read_bytes: counting.read_bytes(),
    };
    (cost, done)
}

/// A disk of 10 TiB with a chunk every 20 GiB, and snapshots that each change one chunk more.
struct Growing {
    storage: MemoryStorage,
    last: (SnapshotId, MapRoot),
    /// All but the last.
    older: Vec<SnapshotId>,
}

impl Growing {
    fn new() -> Self {
        let storage = MemoryStorage::new();
        let options = InitOptions {
            chunk_size: ChunkSize::default(),
            ..InitOptions::default()
        };
        let repo = Repository::init(Arc::new(storage.clone()), &options).unwrap();
        repo.make_reserve().unwrap();
        let session = repo.begin(&small_session()).unwrap();
        let mut map = session.map_writer(None, DISK).unwrap();
        let chunks = repo.chunk_size().count(DISK);
        for number in (0..chunks).step_by(163_840) {
            map.zero(map.position()..number).unwrap();
            let stored = session.store_chunk(&content(&repo, number)).unwrap();
            map.put(number, stored.entry.unwrap()).unwrap();
        }
        map.zero(map.position()..chunks).unwrap();
        let root = map.finish().unwrap();
        let id = session.commit(draft("vda", DISK, root)).unwrap().id;
        Self {
            storage,
            last: (id, root),
            older: Vec::new(),
        }
    }

    /// Takes an incremental of one dirty chunk; returns its cost and the bytes of nodes that it stored.
    fn incremental(&mut self, number: u64) -> (Cost, u64) {
        let (parent, root) = self.last;
        let (cost, snapshot) = cost(&self.storage, |repo| {
            let session = repo.begin(&session_after(&[parent])).unwrap();
            let chunks = repo.chunk_size().count(DISK);
            // All over the disk, and never twice the same place.
            let dirty = number * 7_919 * 128 % chunks;
            let mut map = session.map_writer(Some((&root, DISK)), DISK).unwrap();
            map.keep(0..dirty).unwrap();
            let stored = session
                .store_chunk(&content(repo, 1 << 40 | number))
                .unwrap();
            map.put(dirty, stored.entry.unwrap()).unwrap();
            map.keep(dirty + 1..chunks).unwrap();
            assert!(map.nodes_written() <= 4);
            let root = map.finish().unwrap();
            let mut draft = draft("vda", DISK, root);
            draft.disks[0].generation = number + 2;
            session.commit(draft).unwrap()
        });
        let packs = snapshot.packs.iter();
        let nodes = packs.filter(|p| p.kind == PackKind::Meta).map(|p| p.len);
        self.older.push(self.last.0);
        self.last = (snapshot.id, snapshot.draft.disks[0].root);
        (cost, nodes.sum())
    }
}

fn content(repo: &Repository, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; repo.chunk_size().bytes() as usize];
    Rng(seed).fill(&mut bytes);
    bytes
}

#[test]
fn cost_follows_what_changed_and_not_how_much_there_is() {
    let mut growing = Growing::new();
    let mut rows: Vec<(u64, [Cost; 6])> = Vec::new();
    let mut number = 0;
    println!(
        "| snapshots | incremental | snapshots | forget one | prune it | prune again | ends a prune |"
    );
    for count in [10, 100, 1000] {
        let (mut last, mut nodes) = (Cost::default(), 0);
        while growing.older.len() < count {
            (last, nodes) = growing.incremental(number);
            number += 1;
            // A node of each level; that of the top has some 5 KiB.
            assert!(nodes < 32 << 10, "{nodes}");
        }
        let storage = growing.storage.after_power_failure(|_| true);
        let (list, listed) = cost(&storage, |repo| repo.snapshots().unwrap());
        assert_eq!(listed.snapshots.len(), count + 1);
        let gone = growing.older[count / 2];
        let (forget, ()) = cost(&storage, |repo| repo.forget(&[gone], 1).unwrap());
        let lazy = PruneOptions {
            max_unused_percent: 100.0,
            ..at_once()
        };
        // A session holds the generation up, so that its end is counted by itself.
        let holder = Repository::open(Arc::new(storage.clone())).unwrap();
        let session = holder.begin(&session_after(&[growing.last.0])).unwrap();
        let (begins, begun) = cost(&storage, |repo| repo.prune(&lazy).unwrap());
        assert_eq!(begun.waiting_for.len(), 1);
        let (_, root) = growing.last;
        let chunks = holder.chunk_size().count(DISK);
        let mut map = session.map_writer(Some((&root, DISK)), DISK).unwrap();
        let stored = session.store_chunk(&content(&holder, 5)).unwrap();
        map.keep(0..9).unwrap();
        map.put(9, stored.entry.unwrap()).unwrap();
        map.keep(10..chunks).unwrap();
        let root = map.finish().unwrap();
        session.commit(draft("vda", DISK, root)).unwrap();
        let (ends, ended) = cost(&storage, |repo| repo.prune(&lazy).unwrap());
        assert_eq!((ended.snapshots_removed, ended.packs_removed), (1, 0));
        let (again, nothing) = cost(&storage, |repo| repo.prune(&lazy).unwrap());
        assert_eq!(nothing.packs_removed + nothing.packs_repacked, 0);
        let row = [last, list, forget, begins, again, ends];
        let cells: Vec<String> = row
            .iter()
            .map(|c| format!("{} calls, {} KiB", c.calls, c.read_bytes >> 10))
            .collect();
        println!("| {count} | {} | nodes: {nodes} bytes", cells.join(" | "));
        rows.push((count as u64, row));
    }
    let [few, more, most] = &rows[..] else {
        unreachable!()
    };
    let at = |row: &(u64, [Cost; 6]), what: usize| row.1[what];
    // An incremental opens at most eight segments of each level, and merges some now and then.
    assert!(at(most, 0).calls < at(few, 0).calls + 200, "{rows:?}");
    // A listing reads each snapshot once, forgetting by id only its own.
    assert!(at(most, 1).calls < most.0 + 30, "{rows:?}");
    assert_eq!(at(few, 2).calls, at(most, 2).calls);
    // A prune reads each snapshot, its own nodes and the index's pages a fixed number of times each.
    for (row, what) in [
        (more, 3),
        (most, 3),
        (more, 4),
        (most, 4),
        (more, 5),
        (most, 5),
    ] {
        let beyond = at(row, what).calls - at(few, what).calls;
        assert!(beyond < 13 * (row.0 - few.0), "{what}: {rows:?}");
    }
}
