//! Holds the table of faults in `docs/testing.md` to the tests that there are.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::named::{ROOT, assert_exists, rows, tests_in, tests_named};

#[test]
fn every_fault_names_tests_that_exist() {
    let rows = rows("Faults");
    assert!(rows.len() > 35, "{}", rows.len());
    for row in rows {
        assert_eq!(row.len(), 3, "{row:?}");
        assert!(row.iter().all(|cell| !cell.is_empty()), "{row:?}");
        assert!(tests_named(&row[1]).count() > 0, "{row:?}");
        row.iter()
            .flat_map(|cell| tests_named(cell))
            .for_each(assert_exists);
    }
}

#[test]
fn every_file_of_these_tests_stands_in_the_table() {
    let rows = rows("Faults");
    let named: BTreeSet<&str> = rows.iter().flatten().flat_map(|c| tests_named(c)).collect();
    for entry in fs::read_dir(Path::new(ROOT).join("tests/repo")).unwrap() {
        let file = entry.unwrap().path();
        let module = file.file_stem().unwrap().to_str().unwrap();
        if tests_in(&file).is_empty() || module == "faults" {
            continue;
        }
        let stands = |path: &&str| path.starts_with(&format!("repo::{module}::"));
        assert!(
            named.iter().any(stands),
            "tests/repo/{module}.rs is in no row"
        );
    }
}
