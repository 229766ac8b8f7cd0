//! The engine against disks in memory, served by the embedded server.

mod chain;
mod heal;
mod model;
mod restore;
mod rig;
