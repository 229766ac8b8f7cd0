//! Holds the table of peers in `docs/testing.md` to the tests that there are.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::support::named::{ROOT, assert_exists, rows, tests_in, tests_named};

#[test]
fn every_cell_of_the_table_names_a_test_that_exists_or_says_why_not() {
    let rows = rows("Peers");
    assert!(rows.len() > 20);
    for row in rows {
        assert_eq!(row.len(), 5, "{row:?}");
        assert!(row.iter().all(|cell| !cell.is_empty()), "{row:?}");
        assert!(tests_named(&row[2]).count() > 0, "{row:?}");
        for test in row[2..].iter().flat_map(|cell| tests_named(cell)) {
            assert_exists(test);
        }
    }
}

#[test]
fn every_test_of_a_peer_stands_in_the_table() {
    let rows = rows("Peers");
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
