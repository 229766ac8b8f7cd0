//! Holds the table of peers in `docs/testing.md` to the tests that there are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The rows of the table, heading left out.
fn rows() -> Vec<Vec<String>> {
    let document = fs::read_to_string(Path::new(ROOT).join("docs/testing.md")).unwrap();
    let (_, section) = document.split_once("\n## Peers\n").expect("Peers");
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| "));
    let cells = |row: &str| {
        let cells = row.trim_matches('|').split(" | ");
        cells.map(|cell| cell.trim().to_owned()).collect()
    };
    rows.skip(1).map(cells).collect()
}

/// What stands in backquotes and is a path of tests.
fn tests_named(cell: &str) -> impl Iterator<Item = &str> {
    let quoted = cell.split('`').skip(1).step_by(2);
    quoted.filter(|name| name.contains("::"))
}

/// The file of a path such as `interop::tls::psk::name`, and what remains of the path inside it.
fn file_of(path: &str) -> (PathBuf, Vec<&str>) {
    let mut file = Path::new(ROOT).join("tests");
    let mut rest = path.split("::");
    for part in rest.by_ref() {
        file.push(part);
        if file.with_extension("rs").is_file() {
            return (file.with_extension("rs"), rest.collect());
        }
    }
    panic!("{path} is in no file");
}

/// The names of the tests in a file.
fn tests_in(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let after = text.split("#[test]\n").skip(1);
    let names = after.map(|text| {
        let (name, _) = text.split_once('(').unwrap();
        name.trim().trim_start_matches("fn ").to_owned()
    });
    names.collect()
}

#[test]
fn every_cell_of_the_table_names_a_test_that_exists_or_says_why_not() {
    let rows = rows();
    assert!(rows.len() > 20);
    for row in rows {
        assert_eq!(row.len(), 5, "{row:?}");
        assert!(row.iter().all(|cell| !cell.is_empty()), "{row:?}");
        assert!(tests_named(&row[2]).count() > 0, "{row:?}");
        for test in row[2..].iter().flat_map(|cell| tests_named(cell)) {
            let (file, inside) = file_of(test);
            let Some(name) = inside.last() else {
                continue;
            };
            assert!(
                tests_in(&file).iter().any(|known| known == name),
                "{test} does not exist"
            );
        }
    }
}

#[test]
fn every_test_of_a_peer_stands_in_the_table() {
    let rows = rows();
    let named: BTreeSet<&str> = rows.iter().flatten().flat_map(|c| tests_named(c)).collect();
    let folder = Path::new(ROOT).join("tests/interop/peers");
    for entry in fs::read_dir(folder).unwrap() {
        let file = entry.unwrap().path();
        let module = file.file_stem().unwrap().to_str().unwrap();
        if module == "table" || file.extension().is_none_or(|e| e != "rs") {
            continue;
        }
        for test in tests_in(&file) {
            let path = format!("interop::peers::{module}::{test}");
            assert!(named.contains(path.as_str()), "{path} is in no row");
        }
    }
}
