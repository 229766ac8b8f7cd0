//! Drives the fuzz functions with a small corpus and with mutations of it: 20,000 for each target, or as many as
//! `NBDBACKUP_FUZZ_RUNS` says. The same number tries the same bytes.

use std::fs;

use nbdbackup::nbd::{session, wire};

/// Calls a target with each file of its corpus, then with mutations.
fn drive(name: &str, target: fn(&[u8])) {
    let folder = format!("{}/tests/fuzz/{name}", env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    assert!(corpus.len() > 3);
    corpus.iter().for_each(|bytes| target(bytes));
    let runs = std::env::var("NBDBACKUP_FUZZ_RUNS");
    let runs: u64 = runs.map_or(20_000, |n| n.parse().expect("a number of runs"));
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::new();
    for run in 0..runs {
        bytes.clear();
        bytes.extend_from_slice(&corpus[random.below(corpus.len())]);
        for _ in 0..=random.below(6) {
            mutate(&mut bytes, &corpus, &mut random);
        }
        let ended = std::panic::catch_unwind(|| target(&bytes));
        assert!(ended.is_ok(), "{name}, run {run}: {}", hex(&bytes));
    }
}

fn mutate(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    if bytes.is_empty() {
        bytes.push(random.next() as u8);
    }
    let at = random.below(bytes.len());
    match random.below(9) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.next() as u8,
        2 => bytes.truncate(at),
        3 => drop(bytes.remove(at)),
        4 => bytes.insert(at, random.next() as u8),
        5 => {
            let end = (at + 1 + random.below(64)).min(bytes.len());
            let again = bytes[at..end].to_vec();
            bytes.splice(at..at, again);
        }
        6 => {
            let other = &corpus[random.below(corpus.len())];
            let from = random.below(other.len());
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
        7 => put(bytes, at, &(interesting(random) as u32).to_be_bytes()),
        _ => put(bytes, at, &interesting(random).to_be_bytes()),
    }
}

/// A number at which lengths and offsets tend to go wrong.
fn interesting(random: &mut Random) -> u64 {
    let near = 1_u64.checked_shl(random.below(65) as u32).unwrap_or(0);
    near.wrapping_add(random.below(5) as u64).wrapping_sub(2)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..]
        .iter_mut()
        .zip(value)
        .for_each(|(to, from)| *to = *from);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0 >> 32
    }

    fn below(&mut self, below: usize) -> usize {
        self.next() as usize % below
    }
}

#[test]
fn any_bytes_of_a_server_leave_the_client_sound() {
    drive("client", session::fuzz::client);
}

#[test]
fn any_bytes_of_a_client_leave_the_server_sound() {
    drive("server", session::fuzz::server);
}

#[test]
fn any_bytes_leave_the_decoders_sound() {
    drive("message", wire::fuzz::message);
}
