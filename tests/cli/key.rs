//! Encrypted repositories: where passwords come from, what a wrong one does, and the commands on keys.

use serde_json::Value;

use crate::support::MIB;
use crate::support::lab::Lab;
use crate::support::process::Process;
use crate::support::program::{Run, finish, nbdbackup, number, text};

const CHEAP: [&str; 4] = ["--argon2-memory", "1MiB", "--argon2-passes", "1"];

/// Writes a file with a secret and returns its path.
fn secret(lab: &Lab, name: &str, content: &str) -> String {
    let path = lab.file(name);
    std::fs::write(&path, content).unwrap();
    path
}

/// Makes a laboratory with a repository whose password is `correct horse`, and returns the password's file.
fn encrypted() -> (Lab, String) {
    let lab = Lab::empty();
    let file = secret(&lab, "password", "correct horse\n");
    let args = [&["init", "--password-file", &file][..], &CHEAP].concat();
    let result = lab.run(&args).result();
    assert_eq!(result["encryption"], "aes-256-gcm");
    (lab, file)
}

/// Runs with more environment, which holds what the command line must not.
fn run_with(lab: &Lab, env: &[(&str, &str)], args: &[&str]) -> Run {
    let repository = lab.repository();
    let mut command = nbdbackup(&[&["--json", "--repo", &repository], args].concat());
    command.envs(env.iter().copied());
    finish(Process::start(command))
}

#[test]
fn encrypted_disk_is_backed_up_and_restored_and_not_readable_in_the_files() {
    let (lab, file) = encrypted();
    let image = lab.raw("vda.raw", 4 * MIB, 1);
    let with = |args: &[&str]| lab.run(&[&["--password-file", &file], args].concat());
    let full = [
        "full",
        &image,
        "--name",
        "the-machine",
        "--disk",
        "the-disk",
    ];
    let result = with(&full).result();
    let id = text(&result, "snapshot");
    assert!(number(&result["disks"][0], "stored_bytes") > 0);
    let target = lab.file("restored");
    with(&["restore", &id, "--to", &target]).result();
    crate::support::disk::assert_same(&target, &image);
    let piece = &std::fs::read(&image).unwrap()[..64];
    for path in lab.repository_files() {
        let bytes = std::fs::read(&path).unwrap();
        for word in [
            &b"the-machine"[..],
            b"the-disk",
            b"vda.raw",
            b"correct horse",
            piece,
        ] {
            let found =
                word.iter().any(|b| *b != 0) && bytes.windows(word.len()).any(|w| w == word);
            assert!(!found, "{} holds {word:?}", path.display());
        }
    }
}

#[test]
fn wrong_missing_and_needless_passwords_are_12() {
    let (lab, file) = encrypted();
    let wrong = secret(&lab, "wrong", "incorrect horse\n");
    let image = lab.raw("vda.raw", MIB, 2);
    let commands: &[&[&str]] = &[
        &["snapshots"],
        &["full", &image],
        &["show", "latest"],
        &["restore", "latest", "--to", "/nowhere/disk.raw"],
        &["key", "list"],
    ];
    for command in commands {
        let error = lab.run(command).error(12);
        assert_eq!(error["code"], "password-needed");
        let error = lab
            .run(&[&["--password-file", &wrong], *command].concat())
            .error(12);
        assert_eq!(error["code"], "wrong-password");
        assert_eq!(error["retryable"], false);
    }
    let plain = Lab::new();
    let error = plain
        .run(&["--password-file", &file, "snapshots"])
        .error(12);
    assert_eq!(error["code"], "not-encrypted");
}

#[test]
fn password_comes_from_each_place_and_is_never_shown() {
    let (lab, file) = encrypted();
    let credentials = lab.file("credentials");
    std::fs::create_dir(&credentials).unwrap();
    std::fs::write(format!("{credentials}/nbdbackup.password"), "correct horse").unwrap();
    let command = format!("cat {file}");
    let windows = secret(&lab, "windows", "correct horse\r\n");
    let wrong = secret(&lab, "wrong", "x");
    let (none, list) = (&[][..], &["-vv", "snapshots"][..]);
    let runs = [
        run_with(&lab, none, &["--password-file", &file, "-vv", "snapshots"]),
        run_with(
            &lab,
            none,
            &["--password-file", &windows, "-vv", "snapshots"],
        ),
        run_with(
            &lab,
            none,
            &["--password-command", &command, "-vv", "snapshots"],
        ),
        run_with(&lab, &[("NBDBACKUP_PASSWORD_FILE", &file)], list),
        run_with(&lab, &[("NBDBACKUP_PASSWORD_COMMAND", &command)], list),
        run_with(&lab, &[("NBDBACKUP_PASSWORD", "correct horse")], list),
        run_with(&lab, &[("CREDENTIALS_DIRECTORY", &credentials)], list),
        // What is typed comes before what is set.
        run_with(
            &lab,
            &[
                ("NBDBACKUP_PASSWORD_FILE", &wrong),
                ("NBDBACKUP_PASSWORD", "y"),
            ],
            &["--password-command", &command, "-vv", "snapshots"],
        ),
    ];
    for run in runs {
        run.result();
        for shown in [
            String::from_utf8_lossy(&run.stdout),
            run.stderr.as_str().into(),
        ] {
            assert!(!shown.contains("horse"), "{shown}");
        }
    }
}

#[test]
fn places_that_give_no_password_are_wrong_usage() {
    let (lab, file) = encrypted();
    let empty = secret(&lab, "empty", "\n");
    let missing = lab.file("missing");
    for args in [
        ["--password-file", &missing],
        ["--password-file", &empty],
        ["--password-command", "exit 3"],
        ["--password-command", "true"],
        ["--key-file", &file],
        ["--key-file", &missing],
    ] {
        let error = lab.run(&[&args[..], &["snapshots"]].concat()).error(2);
        assert!(!text(&error, "message").contains("horse"), "{error}");
    }
    let both = [
        "--password-file",
        &file,
        "--password-command",
        "true",
        "snapshots",
    ];
    lab.run(&both).error(2);
}

#[test]
fn init_without_a_password_wants_none_said_aloud() {
    let lab = Lab::empty();
    let key = secret(&lab, "key", &"k".repeat(32));
    let password = secret(&lab, "password", "p");
    for args in [
        &["init"][..],
        &["init", "--encryption", "password"],
        &["init", "--encryption", "key-file"],
        &["init", "--encryption", "none", "--key-file", &key],
        &["init", "--encryption", "none", "--password-file", &password],
        &["init", "--encryption", "password", "--key-file", &key],
        &[
            "init",
            "--encryption",
            "key-file",
            "--password-file",
            &password,
        ],
        &[
            "init",
            "--password-file",
            &password,
            "--argon2-memory",
            "2GiB",
        ],
        &["init", "--password-file", &password, "--argon2-passes", "0"],
    ] {
        let error = lab.run(args).error(2);
        assert!(!std::fs::exists(lab.repository()).unwrap(), "{error}");
    }
    lab.run(&["init", "--key-file", &key]).result();
    lab.run(&["snapshots"]).error(12);
    lab.run(&["--key-file", &key, "snapshots"]).result();
}

#[test]
fn keys_are_added_listed_changed_and_removed() {
    let (lab, first) = encrypted();
    let second = secret(&lab, "second", "battery staple\n");
    let third = secret(&lab, "third", "another one\n");
    let key_file = secret(&lab, "key", &"k".repeat(64));
    let as_first = |args: &[&str]| lab.run(&[&["--password-file", &first], args].concat());

    as_first(&["key", "remove", "0"]).error(1);
    let add = [
        "key",
        "add",
        "--new-password-file",
        &second,
        "--label",
        "cron",
    ];
    let added = as_first(&[&add[..], &CHEAP].concat()).result();
    assert_eq!(added["added"], 1);
    as_first(&["key", "add", "--new-key-file", &key_file]).result();
    let listed = as_first(&["key", "list"]).result();
    let slots = listed["slots"].as_array().unwrap();
    let field = |name: &str| {
        slots
            .iter()
            .map(|s| s[name].clone())
            .collect::<Vec<Value>>()
    };
    assert_eq!(field("slot"), [0, 1, 2].map(Value::from));
    assert_eq!(
        field("kind"),
        ["password", "password", "key-file"].map(Value::from)
    );
    assert_eq!(field("label"), [Value::Null, "cron".into(), Value::Null]);
    assert_eq!(field("current"), [true, false, false].map(Value::from));
    assert_eq!(slots[1]["argon2_memory_bytes"], MIB);
    let shown = lab.run_text(&["--password-file", &second, "key", "list"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(
        shown.contains("*  1  password") && shown.contains("cron"),
        "{shown}"
    );

    let change = [
        "--password-file",
        &second,
        "key",
        "change",
        "--new-password-file",
        &third,
    ];
    let changed = lab.run(&[&change[..], &CHEAP].concat()).result();
    assert_eq!(
        (number(&changed, "added"), number(&changed, "removed")),
        (3, 1)
    );
    lab.run(&["--password-file", &second, "snapshots"])
        .error(12);
    as_first(&["key", "remove", "1"]).error(1);
    lab.run(&["--key-file", &key_file, "key", "remove", "0"])
        .result();
    as_first(&["snapshots"]).error(12);
    lab.run(&["--password-file", &third, "snapshots"]).result();
    let args = ["--password-file", &third, "key", "add"];
    lab.run(&args).error(2);
    let plain = Lab::new();
    plain
        .run(&["key", "add", "--new-key-file", &key_file])
        .error(12);
    assert_eq!(
        plain.run(&["key", "list"]).result()["slots"],
        Value::Array(Vec::new())
    );
}

#[test]
fn usual_cost_of_a_password_is_a_quarter_of_a_gibibyte() {
    let lab = Lab::empty();
    let file = secret(&lab, "password", "correct horse");
    lab.run(&["init", "--encryption", "password", "--password-file", &file])
        .result();
    let listed = lab.run(&["--password-file", &file, "key", "list"]).result();
    assert_eq!(listed["slots"][0]["argon2_memory_bytes"], 256 * MIB);
    assert_eq!(listed["slots"][0]["argon2_passes"], 3);
}
