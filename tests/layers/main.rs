//! Holds the source tree to the layers of `docs/architecture.md`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Each place, and the places of this crate that its files may name; a place may always name itself.
/// The first row whose place starts a file's path decides.
const LAYERS: &[(&str, &[&str])] = &[
    ("range.rs", &[]),
    ("meter.rs", &[]),
    ("file.rs", &[]),
    ("nbd/wire", &[]),
    ("nbd/session", &["nbd/wire", "range"]),
    ("nbd", &["nbd", "range"]),
    ("repo", &["repo", "range", "meter", "file"]),
    ("qemu", &["range", "file"]),
    ("engine", &["nbd", "repo", "qemu", "range", "meter", "file"]),
    ("report", &["engine"]),
    ("cli", &["engine", "report", "nbd", "repo", "qemu", "range"]),
    (
        "lib.rs",
        &[
            "cli", "engine", "file", "meter", "nbd", "qemu", "range", "repo", "report",
        ],
    ),
    ("main.rs", &["cli"]),
];

/// Words that a sans-io file must not hold: it touches no socket, file, clock, thread or terminal.
const NOT_SANS_IO: &[&str] = &[
    "tokio",
    "std::net",
    "std::fs",
    "std::time",
    "std::thread",
    "std::io",
    "std::process",
    "println!",
    "eprintln!",
];

#[test]
fn file_names_only_what_lies_beneath_it() {
    let mut faults = Vec::new();
    for (file, text) in sources() {
        let Some((place, may)) = LAYERS
            .iter()
            .find(|(place, _)| file == *place || file.starts_with(&format!("{place}/")))
        else {
            faults.push(format!("{file} stands in no layer of the table"));
            continue;
        };
        for name in crate_paths(&text) {
            let own = name.starts_with(place.trim_end_matches(".rs"));
            if !own
                && !may
                    .iter()
                    .any(|m| name == *m || name.starts_with(&format!("{m}/")))
            {
                faults.push(format!("{file} names {name}"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn wire_and_session_are_sans_io() {
    for (file, text) in sources() {
        if file.starts_with("nbd/wire") || file.starts_with("nbd/session") {
            for word in NOT_SANS_IO {
                assert!(!text.contains(word), "{file} holds {word}");
            }
        }
    }
}

#[test]
fn library_below_cli_prints_nothing() {
    for (file, text) in sources() {
        if !file.starts_with("cli/") && !file.starts_with("report/") {
            for word in ["println!", "eprintln!", "print!(", "std::process::exit"] {
                assert!(!text.contains(word), "{file} holds {word}");
            }
        }
    }
}

#[test]
fn file_starts_with_a_sentence_and_stays_small() {
    for (file, text) in sources().into_iter().chain(rust_files("tests")) {
        let first = text.lines().next().unwrap_or("");
        assert!(
            first.starts_with("//! "),
            "{file} does not say what lives in it"
        );
        assert!(text.lines().count() <= 800, "{file} is past 800 lines");
        assert!(text.is_ascii(), "{file} holds a character outside ASCII");
    }
}

/// Returns each `crate::a::b` of a file as `a/b`, `use crate::{a, b}` included.
fn crate_paths(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for part in text.split("crate::").skip(1) {
        if let Some(list) = part.strip_prefix('{') {
            let mut depth = 0_i32;
            let mut item = String::new();
            for c in list.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => found.push(path_of(&std::mem::take(&mut item))),
                    _ if depth == 0 => item.push(c),
                    _ => {}
                }
            }
            found.push(path_of(&item));
        } else {
            found.push(path_of(part));
        }
    }
    found.retain(|p| !p.is_empty());
    found
}

fn path_of(text: &str) -> String {
    let text = text.trim_start();
    let end = text
        .find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'))
        .unwrap_or(text.len());
    let words: Vec<&str> = text[..end]
        .split("::")
        .filter(|w| w.starts_with(|c: char| c.is_lowercase()))
        .take(2)
        .collect();
    words.join("/")
}

fn sources() -> BTreeMap<String, String> {
    rust_files("src")
}

/// Returns the text of each Rust file beneath a folder of the package, by its path in there.
fn rust_files(folder: &str) -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files = BTreeMap::new();
    let mut folders: Vec<PathBuf> = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path
                    .strip_prefix(&root)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned();
                files.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    assert!(files.len() > 5, "no sources found under {}", root.display());
    files
}

#[test]
fn crate_paths_are_found_in_lists_and_in_code() {
    assert_eq!(crate_paths("use crate::nbd::wire::Thing;"), ["nbd/wire"]);
    assert_eq!(
        crate_paths("use crate::{range::ByteRange, repo::{a, b}};"),
        ["range", "repo"]
    );
    assert_eq!(
        crate_paths("let x = crate::range::ByteRange::at(3, 4);"),
        ["range/at"]
    );
}
