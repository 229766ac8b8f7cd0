//! A disk's map: a Merkle radix tree by chunk number, where absent children are zeros.

mod diff;
mod nodes;
mod reader;
mod walker;
mod writer;

pub use diff::{Compared, Comparison, changed};
pub use reader::{MapReader, Run, Runs};
pub use writer::MapWriter;

pub(crate) use nodes::Nodes;
pub(crate) use walker::node_ref;
