//! Bits that flip in memory when a test says so.

use std::cell::Cell;

/// Where a bit flips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Point {
    /// In what was compressed, or encoded, before it is proved.
    Compressed,
    /// In what was proved.
    Proved,
    /// In what was encrypted.
    Sealed,
}

/// Has one bit flip for each of the next times that this thread comes to a point.
pub(super) fn next(point: Point, times: u32) {
    NEXT.set(Some((point, times)));
}

/// How many of these times are left.
pub(super) fn left() -> u32 {
    NEXT.get().map_or(0, |(_, times)| times)
}

/// Comes to a point.
pub(super) fn at(point: Point, bytes: &mut [u8]) {
    let Some((wanted, times)) = NEXT.get().filter(|(_, times)| *times > 0) else {
        return;
    };
    let middle = bytes.len() / 2;
    if wanted == point
        && let Some(byte) = bytes.get_mut(middle)
    {
        *byte ^= 0x10;
        NEXT.set(Some((wanted, times - 1)));
    }
}

thread_local! {
    static NEXT: Cell<Option<(Point, u32)>> = const { Cell::new(None) };
}
