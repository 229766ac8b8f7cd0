//! The measures of all rounds as a table for people and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// What was measured, in the order of its first measurement.
#[derive(Default)]
pub(crate) struct Report {
    measures: Vec<Measure>,
}

struct Measure {
    row: &'static str,
    name: String,
    values: Vec<f64>,
}

impl Report {
    /// Adds one round's value of a measure.
    pub(crate) fn add(&mut self, row: &'static str, name: &str, value: f64) {
        eprintln!("  {row}: {name} {value:.3}");
        let known = self
            .measures
            .iter_mut()
            .find(|measure| measure.row == row && measure.name == name);
        match known {
            Some(measure) => measure.values.push(value),
            None => self.measures.push(Measure {
                row,
                name: name.to_owned(),
                values: vec![value],
            }),
        }
    }

    /// Whether anything was measured for a row.
    pub(crate) fn has(&self, row: &str) -> bool {
        self.measures.iter().any(|measure| measure.row == row)
    }

    /// A Markdown table with a line for each measure.
    pub(crate) fn table(&self) -> String {
        let mut table = String::from(
            "| row | measure | median | min | max | target | |\n|---|---|---|---|---|---|---|\n",
        );
        for measure in &self.measures {
            let [low, median, high] = measure.spread();
            let (target, met) = match measure.target() {
                None => (String::new(), ""),
                Some(Target::AtMost(most)) => (format!("<= {most}"), met(median <= most)),
                Some(Target::AtLeast(least)) => (format!(">= {least}"), met(median >= least)),
            };
            let Measure { row, name, .. } = measure;
            let [low, median, high] = [low, median, high].map(shown);
            // Writing to a string does not fail.
            let _ = writeln!(
                table,
                "| {row} | {name} | {median} | {low} | {high} | {target} | {met} |"
            );
        }
        table
    }

    /// All values as JSON.
    pub(crate) fn json(&self) -> String {
        let measures: Vec<Value> = self
            .measures
            .iter()
            .map(|measure| {
                let [min, median, max] = measure.spread();
                json!({
                    "row": measure.row, "measure": measure.name,
                    "median": median, "min": min, "max": max, "values": measure.values,
                })
            })
            .collect();
        format!("{:#}\n", json!({ "schema": 1, "measures": measures }))
    }
}

impl Measure {
    fn spread(&self) -> [f64; 3] {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        };
        [sorted[0], median, sorted[sorted.len() - 1]]
    }

    fn target(&self) -> Option<Target> {
        TARGETS
            .iter()
            .find(|(row, name, _)| *row == self.row && *name == self.name)
            .map(|(_, _, target)| *target)
    }
}

#[derive(Clone, Copy)]
enum Target {
    AtMost(f64),
    AtLeast(f64),
}

fn met(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

fn shown(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// What each measure should come to; `docs/performance.md` says where the numbers are from.
const TARGETS: &[(&str, &str, Target)] = &[
    ("full", "wall / floor", Target::AtMost(1.1)),
    ("full", "peak MiB", Target::AtMost(150.0)),
    ("full", "stored MiB / used MiB", Target::AtMost(0.46)),
    ("again", "speed / full", Target::AtLeast(1.5)),
    ("again", "stored MiB", Target::AtMost(1.0)),
    ("incremental", "wall / push", Target::AtMost(2.0)),
    ("incremental", "read / dirty chunks", Target::AtMost(1.3)),
    ("incremental", "stored MiB", Target::AtMost(100.0)),
    ("huge", "wall s", Target::AtMost(0.2)),
    ("huge", "peak MiB", Target::AtMost(50.0)),
    ("restore", "wall / floor", Target::AtMost(0.7)),
    ("serve", "speed / qemu-nbd", Target::AtLeast(0.8)),
    (
        "random",
        "warm, depth 1, rate / qemu-nbd",
        Target::AtLeast(0.5),
    ),
    (
        "random",
        "warm, depth 32, rate / qemu-nbd",
        Target::AtLeast(0.5),
    ),
    ("random", "cold, depth 1, median ms", Target::AtMost(0.6)),
    ("encrypted", "wall / plain", Target::AtMost(1.1)),
    ("tls", "full, wall / nbdcopy", Target::AtMost(1.0)),
];
