//! Which granules of a disk an overlay holds: pages of bits, so that memory follows what was touched.

use std::collections::BTreeMap;
use std::ops::Range;

/// Where a granule's bytes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    /// In the snapshot.
    #[default]
    Base,
    /// In the overlay's file.
    Data,
    /// Nowhere: they are zeros.
    Zero,
}

/// The state of each granule of a disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Map {
    /// Those that are not all in the snapshot.
    pages: BTreeMap<u64, Page>,
}

#[derive(Clone, Debug)]
enum Page {
    Whole(State),
    /// Two bits for each granule.
    Mixed(Box<[u64; WORDS]>),
}

impl Map {
    /// Sets some granules.
    pub(super) fn set(&mut self, granules: Range<u64>, state: State) {
        let mut at = granules.start;
        while at < granules.end {
            let (number, first) = (at / PAGE, at % PAGE);
            let last = PAGE.min(first + (granules.end - at));
            at += last - first;
            if last - first == PAGE {
                self.pages.insert(number, Page::Whole(state));
                continue;
            }
            let page = self.pages.entry(number).or_insert(Page::Whole(State::Base));
            if let Page::Whole(whole) = page {
                if *whole == state {
                    continue;
                }
                *page = Page::Mixed(Box::new([pattern(*whole); WORDS]));
            }
            if let Page::Mixed(words) = page {
                fill(words, first..last, pattern(state));
            }
        }
    }

    /// Returns the runs of granules of one state, each as long as it is, in order and without gaps.
    pub(super) fn runs(&self, granules: Range<u64>) -> impl Iterator<Item = (Range<u64>, State)> {
        let (mut at, end) = (granules.start, granules.end);
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let start = at;
            let state = self.state(start);
            at = self.end_of(state, start, end);
            Some((start..at, state))
        })
    }

    /// The runs of granules that are not in the snapshot, below a number of granules.
    pub(super) fn held(&self, granules: u64) -> impl Iterator<Item = (Range<u64>, State)> {
        self.runs(0..granules)
            .filter(|(_, state)| *state != State::Base)
    }

    fn state(&self, granule: u64) -> State {
        match self.pages.get(&(granule / PAGE)) {
            None => State::Base,
            Some(Page::Whole(state)) => *state,
            Some(Page::Mixed(words)) => {
                let at = granule % PAGE;
                match words[(at / PER_WORD) as usize] >> (at % PER_WORD * 2) & 3 {
                    1 => State::Data,
                    2 => State::Zero,
                    _ => State::Base,
                }
            }
        }
    }

    /// Finds the first granule behind `at` that is not of this state.
    fn end_of(&self, state: State, mut at: u64, end: u64) -> u64 {
        while at < end {
            let (number, first) = (at / PAGE, at % PAGE);
            match self.pages.get(&number) {
                None if state == State::Base => {
                    let next = self.pages.range(number..).next();
                    at = next.map_or(end, |(number, _)| number * PAGE);
                }
                Some(Page::Whole(whole)) if *whole == state => at = (number + 1) * PAGE,
                None | Some(Page::Whole(_)) => break,
                Some(Page::Mixed(words)) => {
                    let within = first % PER_WORD;
                    let word = words[(first / PER_WORD) as usize] ^ pattern(state);
                    let others = word >> (within * 2);
                    if others != 0 {
                        at += u64::from(others.trailing_zeros() / 2);
                        break;
                    }
                    at += PER_WORD - within;
                }
            }
        }
        at.min(end)
    }
}

fn pattern(state: State) -> u64 {
    match state {
        State::Base => 0,
        State::Data => 0x5555_5555_5555_5555,
        State::Zero => 0xaaaa_aaaa_aaaa_aaaa,
    }
}

fn fill(words: &mut [u64; WORDS], granules: Range<u64>, pattern: u64) {
    let mut at = granules.start;
    while at < granules.end {
        let within = at % PER_WORD;
        let count = (PER_WORD - within).min(granules.end - at);
        let mask = (u64::MAX >> (64 - count * 2)) << (within * 2);
        let word = &mut words[(at / PER_WORD) as usize];
        *word = *word & !mask | pattern & mask;
        at += count;
    }
}

/// The granules of a page: 64 MiB in granules of 4 KiB.
const PAGE: u64 = 16_384;
const PER_WORD: u64 = 32;
const WORDS: usize = (PAGE / PER_WORD) as usize;

#[cfg(test)]
mod tests {
    use super::super::tests::Random;
    use super::*;

    #[test]
    fn runs_are_those_of_a_vector_of_states() {
        let size = PAGE * 4 + 777;
        let mut random = Random(1);
        let (mut map, mut model) = (Map::default(), vec![State::Base; size as usize]);
        for round in 0..400 {
            let start = random.below(size);
            let longest = [3, 70, 2000, size][random.below(4) as usize];
            let end = (start + 1 + random.below(longest)).min(size);
            let state = [State::Data, State::Zero][random.below(2) as usize];
            map.set(start..end, state);
            model[start as usize..end as usize].fill(state);
            let from = random.below(size);
            let mut at = from;
            let mut last = None;
            for (run, state) in map.runs(from..size) {
                assert_eq!(run.start, at, "round {round}");
                assert_ne!(last, Some(state), "round {round}");
                assert!(
                    model[run.start as usize..run.end as usize]
                        .iter()
                        .all(|s| *s == state)
                );
                (at, last) = (run.end, Some(state));
            }
            assert_eq!(at, size);
        }
    }

    #[test]
    fn zeros_all_over_a_large_disk_take_no_bits() {
        let mut map = Map::default();
        map.set(0..PAGE * 1000, State::Zero);
        assert!(
            map.pages
                .values()
                .all(|page| matches!(page, Page::Whole(_)))
        );
        assert_eq!(map.held(PAGE * 1000).count(), 1);
    }
}
