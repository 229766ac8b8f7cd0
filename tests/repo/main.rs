//! The repository as a whole: round trips, maps against a model, damage, crashes, concurrency and scale.

mod check;
mod copying;
mod crash;
mod damage;
#[path = "../support/fuzz.rs"]
mod drive;
mod encryption;
mod faults;
mod fetch;
mod format_doc;
mod fuzz;
mod golden;
mod growth;
mod hostile;
mod interleave;
mod map_model;
mod medium;
mod mending;
#[path = "../support/named.rs"]
mod named;
mod parity;
mod prune;
mod races;
mod refused;
mod replay;
mod resume;
mod round_trip;
mod scale;
mod scheduler;
mod support;
mod sweeps;
mod system;
