//! A sorted set of identifiers that may be larger than memory: runs are sorted, spilled to a file, and merged.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};

use crate::repo::error::RepoError;
use crate::repo::format::segment::Prefix;

/// Takes identifiers in any order.
#[derive(Debug)]
pub(crate) struct IdSorter {
    run: Vec<Prefix>,
    /// How many are held in memory.
    most: usize,
    runs: Vec<File>,
}

impl IdSorter {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            run: Vec::new(),
            most: most.max(1),
            runs: Vec::new(),
        }
    }

    pub(crate) fn push(&mut self, id: Prefix) -> Result<(), RepoError> {
        self.run.push(id);
        match self.run.len() >= self.most {
            true => self.shrink(),
            false => Ok(()),
        }
    }

    pub(crate) fn finish(mut self) -> SortedIds {
        self.sort();
        SortedIds {
            run: self.run,
            runs: self.runs,
        }
    }

    fn sort(&mut self) {
        self.run.sort_unstable();
        self.run.dedup();
    }

    /// Drops what is there twice, and writes a run when that does not help.
    fn shrink(&mut self) -> Result<(), RepoError> {
        self.sort();
        if self.run.len() <= self.most / 2 {
            return Ok(());
        }
        let file = spill(&self.run).map_err(failed)?;
        self.runs.push(file);
        self.run.clear();
        Ok(())
    }
}

/// Identifiers in order, each once; can be gone through again and again.
#[derive(Debug)]
pub(crate) struct SortedIds {
    run: Vec<Prefix>,
    runs: Vec<File>,
}

impl SortedIds {
    /// Goes through all from the start.
    pub(crate) fn iter(&mut self) -> Result<Ids<'_>, RepoError> {
        let mut runs = Vec::with_capacity(self.runs.len() + 1);
        for file in &mut self.runs {
            file.seek(SeekFrom::Start(0)).map_err(failed)?;
            runs.push(Run::file(file));
        }
        runs.push(Run::Memory(self.run.iter()));
        let mut ids = Ids {
            heads: BinaryHeap::with_capacity(runs.len()),
            runs,
        };
        for number in 0..ids.runs.len() {
            ids.advance(number)?;
        }
        Ok(ids)
    }
}

/// Goes through identifiers in order.
pub(crate) struct Ids<'a> {
    runs: Vec<Run<'a>>,
    /// The next identifier of each run that has one, with the run's number.
    heads: BinaryHeap<Reverse<(Prefix, usize)>>,
}

impl Ids<'_> {
    pub(crate) fn next(&mut self) -> Result<Option<Prefix>, RepoError> {
        let Some(Reverse((next, number))) = self.heads.pop() else {
            return Ok(None);
        };
        self.advance(number)?;
        while let Some(Reverse((same, number))) = self.heads.peek().copied() {
            if same != next {
                break;
            }
            self.heads.pop();
            self.advance(number)?;
        }
        Ok(Some(next))
    }

    fn advance(&mut self, number: usize) -> Result<(), RepoError> {
        if let Some(id) = self.runs[number].next()? {
            self.heads.push(Reverse((id, number)));
        }
        Ok(())
    }
}

/// What is left of a sorted run.
enum Run<'a> {
    Memory(std::slice::Iter<'a, Prefix>),
    File(BufReader<&'a mut File>),
}

impl<'a> Run<'a> {
    fn file(file: &'a mut File) -> Self {
        Self::File(BufReader::with_capacity(BUFFER, file))
    }

    fn next(&mut self) -> Result<Option<Prefix>, RepoError> {
        match self {
            Self::Memory(rest) => Ok(rest.next().copied()),
            Self::File(file) => {
                let mut bytes = [0; 16];
                match file.read_exact(&mut bytes) {
                    Ok(()) => Ok(Some(Prefix::from_le_bytes(bytes))),
                    Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
                    Err(e) => Err(failed(e)),
                }
            }
        }
    }
}

fn spill(run: &[Prefix]) -> io::Result<File> {
    let mut file = BufWriter::with_capacity(BUFFER, tempfile::tempfile()?);
    for id in run {
        file.write_all(&id.to_le_bytes())?;
    }
    file.into_inner().map_err(io::IntoInnerError::into_error)
}

fn failed(error: io::Error) -> RepoError {
    RepoError::io("use a temporary file for sorting", error)
}

const BUFFER: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_id_comes_once_and_in_order(ids: Vec<u8>, most in 1..20_usize) {
            let mut sorter = IdSorter::new(most);
            for id in &ids {
                sorter.push(Prefix::from(*id) << 99).unwrap();
            }
            let mut sorted = sorter.finish();
            let want: std::collections::BTreeSet<u8> = ids.into_iter().collect();
            for _ in 0..2 {
                let mut iter = sorted.iter().unwrap();
                let mut got = Vec::new();
                while let Some(id) = iter.next().unwrap() {
                    got.push((id >> 99) as u8);
                }
                prop_assert!(got.iter().eq(want.iter()), "{got:?}");
            }
        }
    }
}
