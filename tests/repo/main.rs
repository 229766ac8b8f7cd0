//! The repository as a whole: round trips, maps against a model, damage, crashes, concurrency and scale.

mod round_trip;
mod support;
