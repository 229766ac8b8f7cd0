//! Both ends of an NBD session in memory, and each end against a peer that is scripted byte by byte.

mod both_ends;
mod disk;
