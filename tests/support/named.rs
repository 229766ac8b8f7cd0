//! Tables in `docs/testing.md` that name tests, and the tests that there are.

use std::fs;
use std::path::{Path, PathBuf};

pub(crate) const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The rows of a section's table, heading left out.
pub(crate) fn rows(section: &str) -> Vec<Vec<String>> {
    let document = fs::read_to_string(Path::new(ROOT).join("docs/testing.md")).unwrap();
    let heading = format!("\n## {section}\n");
    let (_, section) = document.split_once(&heading).expect("the section");
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| "));
    let cells = |row: &str| {
        let cells = row.trim_matches('|').split(" | ");
        cells.map(|cell| cell.trim().to_owned()).collect()
    };
    rows.skip(1).map(cells).collect()
}

/// What stands in backquotes and is a path of tests.
pub(crate) fn tests_named(cell: &str) -> impl Iterator<Item = &str> {
    let quoted = cell.split('`').skip(1).step_by(2);
    quoted.filter(|name| name.contains("::"))
}

/// Fails unless a path such as `interop::tls::psk::name`, or `src::repo::index::name`, is one of a test, or of a file.
pub(crate) fn assert_exists(path: &str) {
    let (file, inside) = file_of(path);
    if let Some(name) = inside.last() {
        let known = tests_in(&file);
        assert!(
            known.iter().any(|known| known == name),
            "{path} does not exist"
        );
    }
}

/// The file of a path, and what remains of the path inside it.
fn file_of(path: &str) -> (PathBuf, Vec<&str>) {
    let in_source = path.starts_with("src::");
    let mut file = Path::new(ROOT).join(if in_source { "" } else { "tests" });
    let mut rest = path.split("::").peekable();
    while let Some(part) = rest.next() {
        file.push(part);
        if file.with_extension("rs").is_file() {
            return (file.with_extension("rs"), rest.collect());
        }
        let is_last_folder = rest.peek().is_some_and(|next| {
            !file.join(next).is_dir() && !file.join(next).with_extension("rs").is_file()
        });
        if is_last_folder && file.join("mod.rs").is_file() {
            return (file.join("mod.rs"), rest.collect());
        }
    }
    panic!("{path} is in no file");
}

/// The names of the tests in a file.
pub(crate) fn tests_in(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let is_test = |line: &str| line == "#[test]" || line.starts_with("#[tokio::test");
    let names = lines
        .windows(2)
        .filter(|pair| is_test(pair[0]))
        .map(|pair| {
            let (head, _) = pair[1].split_once('(').unwrap();
            head.rsplit(' ').next().unwrap().to_owned()
        });
    names.collect()
}
