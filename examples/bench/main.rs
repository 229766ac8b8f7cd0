//! Measures this program beside its floor and its peers, paired in one run, and prints ratios.
//!
//! `cargo run --release --example bench -- [--rounds N] [--disks DIR] [--json FILE] [ROW...]`
//!
//! Ratios count, not seconds: each row runs right beside what it is compared with, in turns, round after round.

mod disks;
mod fio;
mod growth;
mod peers;
mod push;
mod report;
mod rows;
mod run;
mod serving;

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;

use disks::Disks;
use report::Report;
use rows::{Bench, ROWS};

/// What went wrong, in words for whoever runs this.
pub(crate) type Fault = Box<dyn Error>;

fn main() -> Result<(), Fault> {
    let asked = Asked::parse(std::env::args().skip(1))?;
    let program = program()?;
    let disks = Disks::make(&asked.disks)?;
    let scratch = tempfile::Builder::new()
        .prefix("scratch-")
        .tempdir_in(&asked.disks)?;
    let bench = Bench::new(program, disks, scratch.path().to_owned());
    let mut report = Report::default();
    for round in 0..asked.rounds {
        eprintln!("round {} of {}", round + 1, asked.rounds);
        bench.round(round, &asked.rows, &mut report)?;
    }
    print!("{}", report.table());
    if let Some(file) = asked.json {
        std::fs::write(&file, report.json())?;
    }
    Ok(())
}

struct Asked {
    rounds: usize,
    disks: PathBuf,
    json: Option<PathBuf>,
    rows: Vec<String>,
}

impl Asked {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, Fault> {
        let mut asked = Self {
            rounds: 3,
            disks: PathBuf::from("target/bench"),
            json: None,
            rows: Vec::new(),
        };
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} wants a value"));
            match word.as_str() {
                "--rounds" => asked.rounds = value()?.parse()?,
                "--disks" => asked.disks = value()?.into(),
                "--json" => asked.json = Some(value()?.into()),
                row if ROWS.contains(&row) => asked.rows.push(word),
                _ => return Err(format!("{word} is no row; there are: {}", ROWS.join(" ")).into()),
            }
        }
        if asked.rows.is_empty() {
            asked.rows = ROWS.iter().map(|&row| row.to_owned()).collect();
        }
        Ok(asked)
    }
}

/// Builds the program with this very profile, and returns where it is.
fn program() -> Result<PathBuf, Fault> {
    if cfg!(debug_assertions) {
        return Err("measure a release build: cargo run --release --example bench".into());
    }
    if let Some(cargo) = std::env::var_os("CARGO") {
        let built = Command::new(cargo)
            .args(["build", "--quiet", "--release", "--locked", "--bins"])
            .status()?;
        if !built.success() {
            return Err("the program cannot be built".into());
        }
    }
    let own = std::env::current_exe()?;
    let folder = own.ancestors().nth(2).ok_or("this program has no folder")?;
    Ok(folder.join("nbdbackup"))
}
