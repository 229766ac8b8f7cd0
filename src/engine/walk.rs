//! Walks the extents of an export, window by window, and turns them into steps.

use std::ops::Range;
use std::time::Instant;

use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};

use super::EngineError;
use super::plan::{Geometry, Step, WindowPlan};
use crate::meter::Meter;
use crate::nbd::client::{Client, ClientError, ContextExtents};
use crate::range::ByteRange;

/// The contexts that a walk follows, by their place among those granted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Contexts {
    /// The bitmap's context, where the backup follows one.
    pub(crate) dirty: Option<usize>,
    /// `base:allocation`, where the export has it.
    pub(crate) allocation: Option<usize>,
}

/// The plan of one window.
#[derive(Debug)]
pub(crate) struct Walked {
    pub(crate) steps: Vec<Step>,
    pub(crate) dirty_bytes: u64,
}

/// A walk over one disk.
#[derive(Clone, Copy)]
pub(crate) struct Walk<'a> {
    pub(crate) client: &'a Client,
    pub(crate) disk: &'a str,
    pub(crate) contexts: Contexts,
    pub(crate) geometry: Geometry,
    /// The chunks that the parent has, from the disk's start.
    pub(crate) inheritable: u64,
    /// Runs of chunks that the parent has lost, and that are read whatever the bitmap says.
    pub(crate) again: &'a [Range<u64>],
    /// Where the time that the server takes is counted.
    pub(crate) meter: &'a Meter,
}

impl<'a> Walk<'a> {
    /// Returns the plans of the disk's windows, in its order.
    ///
    /// An extended request may ask for any length, so that windows are as long as memory allows; compact ones are
    /// short, and several are asked for at a time.
    pub(crate) fn windows(self) -> BoxStream<'a, Result<Walked, EngineError>> {
        let size_bytes = self.geometry.size_bytes;
        if self.client.export().extended {
            let windows = stream::try_unfold(0, move |at| async move {
                if at >= size_bytes {
                    return Ok(None);
                }
                let (walked, end) = self.stretch(at).await?;
                Ok(Some((walked, end)))
            });
            return windows.boxed();
        }
        stream::iter(ByteRange::first(size_bytes).split(WINDOW))
            .map(move |window| self.window(window))
            .buffered(WALKS)
            .boxed()
    }

    /// Plans as much as is good from `at` on; returns the plan and where it ends.
    async fn stretch(self, at: u64) -> Result<(Walked, u64), EngineError> {
        match self.contexts.dirty {
            Some(dirty) if self.client.export().asks_one_context() => {
                self.bitmap_first(dirty, at).await
            }
            _ => {
                let end = at.saturating_add(STRETCH).min(self.geometry.size_bytes);
                let window = ByteRange::new(at, end).unwrap_or(ByteRange::first(end));
                Ok((self.window(window).await?, end))
            }
        }
    }

    /// Asks the bitmap alone as far as one answer tells, then the allocation of what is dirty.
    async fn bitmap_first(self, dirty: usize, at: u64) -> Result<(Walked, u64), EngineError> {
        let size_bytes = self.geometry.size_bytes;
        let chunk_bytes = self.geometry.chunk_bytes;
        let whole_chunks = |end: u64| match end >= size_bytes {
            true => size_bytes,
            false => end - end % chunk_bytes,
        };
        let mut found: Vec<ByteRange> = Vec::new();
        let mut told = at;
        while whole_chunks(told) <= at {
            let rest = ByteRange::new(told, size_bytes).unwrap_or(ByteRange::first(size_bytes));
            let answer = self.ask(rest, Some(dirty)).await?;
            told = follow(&answer, dirty, told, size_bytes, DIRTY, |range| {
                found.push(range)
            });
            if told == rest.start() {
                return Err(self.stuck(rest));
            }
        }
        let mut end = whole_chunks(told);
        // Dirty ranges, and what the parent does not have, in whole chunks; those that are near each other as one.
        let mut spans: Vec<ByteRange> = Vec::new();
        let mut spanned = 0;
        let inherited = self.inheritable.saturating_mul(chunk_bytes).max(at);
        let dirty_of_parent = found
            .iter()
            .filter_map(|range| range.intersect(ByteRange::first(inherited.min(end))));
        for range in dirty_of_parent.chain(ByteRange::new(inherited, end)) {
            let mut range = range.round_out(chunk_bytes, size_bytes);
            match spans.last() {
                Some(last) if range.end() <= last.end() => continue,
                Some(last) if range.start() <= last.end().saturating_add(NEAR) => {
                    range = ByteRange::new(last.start(), range.end()).unwrap_or(range);
                    spanned -= last.len();
                    spans.pop();
                }
                _ => {}
            }
            if spanned + range.len() > STRETCH {
                // More than one window should hold: the next one asks for the rest again.
                end = range.start() + (STRETCH - spanned);
                end = whole_chunks(end);
                spans.extend(ByteRange::new(range.start(), end).filter(|r| !r.is_empty()));
                break;
            }
            spanned += range.len();
            spans.push(range);
        }
        let window = ByteRange::new(at, end).unwrap_or(ByteRange::first(end));
        let mut plan = WindowPlan::new(self.geometry, window, true);
        plan.again(self.again);
        found.into_iter().for_each(|range| plan.dirty(range));
        if let Some(allocation) = self.contexts.allocation {
            let mut zeros = stream::iter(spans)
                .map(|span| self.zeros_of(allocation, span))
                .buffered(WALKS);
            while let Some(zeros) = zeros.try_next().await? {
                zeros.into_iter().for_each(|range| plan.zero(range));
            }
        }
        let walked = Walked {
            dirty_bytes: plan.dirty_bytes(),
            steps: plan.finish(self.inheritable),
        };
        Ok((walked, end))
    }

    /// Finds the runs of zeros of a span of whole chunks, as far as they may fill a chunk.
    async fn zeros_of(
        self,
        allocation: usize,
        span: ByteRange,
    ) -> Result<Vec<ByteRange>, EngineError> {
        let Geometry {
            size_bytes,
            chunk_bytes,
        } = self.geometry;
        let mut runs = Vec::new();
        let mut open: Option<ByteRange> = None;
        let fills = |run: &ByteRange| run.len() >= chunk_bytes || run.end() == size_bytes;
        let mut at = span.start();
        while at < span.end() {
            let rest = ByteRange::new(at, span.end()).unwrap_or(span);
            let answer = self.ask(rest, Some(allocation)).await?;
            at = follow(&answer, allocation, at, span.end(), ZERO, |zeros| {
                open = match open {
                    Some(run) if run.end() == zeros.start() => {
                        ByteRange::new(run.start(), zeros.end())
                    }
                    before => {
                        runs.extend(before.filter(fills));
                        Some(zeros)
                    }
                };
            });
            if at == rest.start() {
                return Err(self.stuck(rest));
            }
        }
        runs.extend(open.filter(fills));
        Ok(runs)
    }

    /// Asks for the extents of a window until each context has covered it, and plans its chunks.
    ///
    /// A reply may stop short in one context and not in another, so that each advances by what it was answered.
    async fn window(self, window: ByteRange) -> Result<Walked, EngineError> {
        let Contexts { dirty, allocation } = self.contexts;
        let mut plan = WindowPlan::new(self.geometry, window, dirty.is_some());
        plan.again(self.again);
        let start = |context: Option<usize>| match context {
            Some(_) => window.start(),
            None => window.end(),
        };
        let (mut dirty_at, mut zero_at) = (start(dirty), start(allocation));
        loop {
            let from = dirty_at.min(zero_at);
            let Some(rest) = ByteRange::new(from, window.end()).filter(|r| !r.is_empty()) else {
                break;
            };
            // Only the context that lags behind is asked again, where the server can tell it alone.
            let only = match dirty_at.cmp(&zero_at) {
                std::cmp::Ordering::Less => dirty,
                std::cmp::Ordering::Equal => None,
                std::cmp::Ordering::Greater => allocation,
            };
            let answer = self.ask(rest, only).await?;
            if let Some(dirty) = dirty {
                dirty_at = follow(&answer, dirty, dirty_at, window.end(), DIRTY, |range| {
                    plan.dirty(range);
                });
            }
            if let Some(allocation) = allocation {
                zero_at = follow(&answer, allocation, zero_at, window.end(), ZERO, |range| {
                    plan.zero(range);
                });
            }
            if dirty_at.min(zero_at) == from {
                return Err(self.stuck(rest));
            }
        }
        Ok(Walked {
            dirty_bytes: plan.dirty_bytes(),
            steps: plan.finish(self.inheritable),
        })
    }

    async fn ask(
        self,
        range: ByteRange,
        only: Option<usize>,
    ) -> Result<Vec<ContextExtents>, EngineError> {
        let start = Instant::now();
        let asked = match only {
            Some(context) => self.client.block_status_of(context, range).await,
            None => self.client.block_status(range).await,
        };
        self.meter.since(start);
        asked.map_err(|fault: ClientError| self.failed(range, fault.into()))
    }

    fn stuck(self, range: ByteRange) -> EngineError {
        self.failed(range, "the server's answer does not advance".into())
    }

    fn failed(self, range: ByteRange, cause: super::Cause) -> EngineError {
        EngineError::SourceFailed {
            disk: self.disk.to_owned(),
            doing: "asking the extents of",
            range,
            cause,
        }
    }
}

/// Hands on what an answer says of one context from `at` on, where a flag is set; returns how far the context is known.
fn follow(
    answer: &[ContextExtents],
    context: usize,
    at: u64,
    end: u64,
    flag: u64,
    mut each: impl FnMut(ByteRange),
) -> u64 {
    let mut at = at;
    let lists = answer.iter().filter(|list| list.context == context);
    for extent in lists.flat_map(|list| &list.extents) {
        let ahead = ByteRange::new(at, end).and_then(|ahead| extent.range.intersect(ahead));
        let Some(news) = ahead else {
            continue;
        };
        at = news.end();
        if extent.flags & flag != 0 {
            each(news);
        }
    }
    at
}

/// Bit 0 of `qemu:dirty-bitmap:NAME`.
pub(crate) const DIRTY: u64 = 1;
/// Bit 1 of `base:allocation`, NBD_STATE_ZERO: HOLE alone says nothing about the content.
pub(crate) const ZERO: u64 = 2;
/// The length of a window where a request cannot ask for 4 GiB, a multiple of each chunk size.
const WINDOW: u64 = 1 << 31;
/// The most bytes whose allocation one window holds, a multiple of each chunk size: a server has to look each of its
/// tables up for an answer, and answers before a client gives up waiting.
const STRETCH: u64 = 32 << 30;
/// Dirty ranges as near as this are asked for as one.
const NEAR: u64 = 1 << 30;
/// Requests for extents that are under way at a time.
const WALKS: usize = 8;
