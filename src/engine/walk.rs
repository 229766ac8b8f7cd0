//! Walks the extents of an export, window by window, and turns them into steps.

use super::EngineError;
use super::plan::{Geometry, Step, WindowPlan};
use crate::nbd::client::Client;
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

/// The length of a window: what one BLOCK_STATUS request asks for, a multiple of each chunk size.
pub(crate) const WINDOW: u64 = 1 << 31;

/// Asks for the extents of a window until each context has covered it, and plans its chunks.
///
/// A reply may stop short in one context and not in another, so that each advances by what it was answered.
pub(crate) async fn walk(
    client: &Client,
    disk: &str,
    contexts: Contexts,
    geometry: Geometry,
    window: ByteRange,
    inheritable: u64,
    again: &[std::ops::Range<u64>],
) -> Result<Walked, EngineError> {
    let failed = |range: ByteRange, cause: super::Cause| EngineError::SourceFailed {
        disk: disk.to_owned(),
        doing: "asking the extents of",
        range,
        cause,
    };
    let mut plan = WindowPlan::new(geometry, window, contexts.dirty.is_some());
    plan.again(again);
    let mut dirty_at = if contexts.dirty.is_some() {
        window.start()
    } else {
        window.end()
    };
    let mut zero_at = if contexts.allocation.is_some() {
        window.start()
    } else {
        window.end()
    };
    loop {
        let from = dirty_at.min(zero_at);
        let Some(rest) = ByteRange::new(from, window.end()).filter(|r| !r.is_empty()) else {
            break;
        };
        let answered = client
            .block_status(rest)
            .await
            .map_err(|e| failed(rest, Box::new(e)))?;
        for context in &answered {
            let (at, bitmap) = if contexts.dirty == Some(context.context) {
                (&mut dirty_at, true)
            } else if contexts.allocation == Some(context.context) {
                (&mut zero_at, false)
            } else {
                continue;
            };
            for extent in &context.extents {
                let Some(news) = ByteRange::new(*at, window.end())
                    .and_then(|ahead| extent.range.intersect(ahead))
                else {
                    continue;
                };
                *at = news.end();
                if bitmap && extent.flags & DIRTY != 0 {
                    plan.dirty(news);
                } else if !bitmap && extent.flags & ZERO != 0 {
                    plan.zero(news);
                }
            }
        }
        if dirty_at.min(zero_at) == from {
            return Err(failed(rest, "the server's answer does not advance".into()));
        }
    }
    Ok(Walked {
        dirty_bytes: plan.dirty_bytes(),
        steps: plan.finish(inheritable),
    })
}

/// Bit 0 of `qemu:dirty-bitmap:NAME`.
pub(crate) const DIRTY: u64 = 1;
/// Bit 1 of `base:allocation`, NBD_STATE_ZERO: HOLE alone says nothing about the content.
pub(crate) const ZERO: u64 = 2;
