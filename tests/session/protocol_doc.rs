//! Holds `docs/protocol.md` to the codes that the program knows.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;

use nbdbackup::nbd::wire::{
    ChunkType, Command, CommandFlags, ErrorCode, InfoCode, OptionCode, OptionReplyCode,
    ServerFlags, TransmissionFlags,
};

/// The first cells of the rows under a heading; each row has to have five cells with something in them.
fn rows(document: &str, heading: &str) -> BTreeSet<String> {
    let start = format!("\n## {heading}\n");
    let (_, section) = document.split_once(&start).expect(heading);
    let section = section.split("\n## ").next().unwrap();
    let table = section.lines().filter(|line| line.starts_with("| "));
    let rows = table.skip(1).map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        assert_eq!(cells.len(), 5, "{row}");
        assert!(cells.iter().all(|cell| !cell.is_empty()), "{row}");
        cells[0].to_owned()
    });
    rows.collect()
}

/// The first word of what a code is shown as.
fn names<T: Display>(codes: &[T]) -> BTreeSet<String> {
    let name = |code: &T| code.to_string().split(' ').next().unwrap().to_owned();
    codes.iter().map(name).collect()
}

fn flags<T>(known: &[(T, &str)]) -> BTreeSet<String> {
    known.iter().map(|(_, name)| (*name).to_owned()).collect()
}

#[test]
fn every_code_has_its_row() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/protocol.md");
    let document = fs::read_to_string(path).unwrap();
    let mut errors = names(ErrorCode::KNOWN);
    // Shown as "no error".
    assert!(errors.remove("no"));
    errors.insert("OK".to_owned());
    for (heading, known) in [
        ("Greeting flags", flags(ServerFlags::KNOWN)),
        ("Options", names(OptionCode::KNOWN)),
        ("Answers to options", names(OptionReplyCode::KNOWN)),
        ("Information", names(InfoCode::KNOWN)),
        ("Transmission flags", flags(TransmissionFlags::KNOWN)),
        ("Commands", names(Command::KNOWN)),
        ("Command flags", flags(CommandFlags::KNOWN)),
        ("Reply chunks", names(ChunkType::KNOWN)),
        ("Errors", errors),
    ] {
        assert_eq!(rows(&document, heading), known, "{heading}");
    }
}

#[test]
fn tests_that_are_named_exist() {
    let root = env!("CARGO_MANIFEST_DIR");
    let document = fs::read_to_string(format!("{root}/docs/protocol.md")).unwrap();
    let quoted = document.split('`').skip(1).step_by(2);
    for name in quoted.filter(|name| name.contains("::")) {
        let path = name.replace("::", "/");
        let file = match path.starts_with("nbd/") {
            true => format!("{root}/src/{path}.rs"),
            false => format!("{root}/tests/{path}.rs"),
        };
        assert!(fs::exists(&file).unwrap(), "{name} is no test");
    }
}
