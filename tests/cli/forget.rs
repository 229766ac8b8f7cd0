//! Forgetting and pruning from the command line.

use serde_json::Value;

use crate::support::MIB;
use crate::support::lab::Lab;
use crate::support::program::{number, text};

/// Takes a full of each image's present content as disks of one snapshot, and returns its id.
fn full(lab: &Lab, images: &[&str], disks: &[&str], more: &[&str]) -> String {
    let mut args = vec!["full"];
    args.extend(images);
    args.extend(["--name", "web1"]);
    for disk in disks {
        args.extend(["--disk", disk]);
    }
    args.extend(more);
    text(&lab.run(&args).result(), "snapshot")
}

fn ids(value: &Value) -> Vec<String> {
    let all = value.as_array().unwrap().iter();
    all.map(|s| text(s, "id")).collect()
}

#[test]
fn rules_are_applied_for_each_disk_and_say_why() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", MIB, 1);
    let both = full(&lab, &[&image, &image], &["vda", "vdb"], &[]);
    let tagged = full(&lab, &[&image], &["vda"], &["--tag", "gold"]);
    let middle = full(&lab, &[&image], &["vda"], &[]);
    let last = full(&lab, &[&image], &["vda"], &[]);
    let rules = ["forget", "--keep-last", "1", "--keep-tag", "gold"];
    let dry = lab.run(&[&rules[..], &["--dry-run"]].concat()).result();
    assert_eq!(dry["dry_run"], true);
    assert_eq!(ids(&dry["forgotten"]), std::slice::from_ref(&middle));
    assert_eq!(lab.snapshots().len(), 4);
    let done = lab.run(&rules).result();
    assert_eq!(ids(&done["forgotten"]), std::slice::from_ref(&middle));
    let kept: Vec<(String, Value)> = done["kept"]
        .as_array()
        .unwrap()
        .iter()
        .map(|k| (text(&k["snapshot"], "id"), k["reasons"].clone()))
        .collect();
    let reason = |disk: &str, rule: &str| serde_json::json!([{"disk": disk, "rule": rule}]);
    let want = [
        (both.clone(), reason("vdb", "last")),
        (tagged.clone(), reason("vda", "tag")),
        (last.clone(), reason("vda", "last")),
    ];
    assert_eq!(kept, want);
    assert_eq!(lab.snapshots(), [both, tagged, last]);
    lab.run(&["show", &middle]).error(1);
    lab.run(&["forget", "--undelete", &middle[..8]]).result();
    assert_eq!(lab.snapshots().len(), 4);
    lab.assert_restores(&middle, &image);
    let shown = lab.run_text(&["forget", "--keep-last", "2", "--dry-run"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("would forget"), "{shown}");
}

#[test]
fn last_snapshot_of_a_disk_stays_unless_forced() {
    let lab = Lab::new();
    let image = lab.raw("vda.raw", MIB, 2);
    let one = full(&lab, &[&image, &image], &["vda", "vdb"], &[]);
    full(&lab, &[&image], &["vda"], &[]);
    let error = lab.run(&["forget", &one]).error(1);
    assert_eq!(error["code"], "last-snapshot");
    assert!(text(&error, "message").contains("vdb"), "{error}");
    assert_eq!(lab.snapshots().len(), 2);
    lab.run(&["forget", &one, "--force"]).result();
    assert_eq!(lab.snapshots().len(), 1);
}

#[test]
fn prune_frees_what_is_forgotten_once_its_time_is_over() {
    let lab = Lab::new();
    let first = lab.raw("first.raw", 8 * MIB, 3);
    let second = lab.raw("second.raw", 8 * MIB, 4);
    let old = full(&lab, &[&first], &["vda"], &[]);
    let new = full(&lab, &[&second], &["vda"], &[]);
    lab.run(&["forget", &old]).result();
    let waits = lab.run(&["prune"]).result();
    assert_eq!(number(&waits, "snapshots_removed"), 0);
    let now = ["prune", "--undelete-window", "0s", "--max-unused", "0"];
    // About half of what is stored: more than a quarter wants to be asked for.
    for held in [&[][..], &["--max-freed", "5"]] {
        let held = lab.run(&[&now[..], held].concat()).error(1);
        assert_eq!(held["code"], "brake");
        assert!(text(&held, "hint").contains("--force"), "{held}");
    }
    let dry = lab.run(&[&now[..], &["--dry-run"]].concat()).result();
    let done = lab.run(&[&now[..], &["--force"]].concat()).result();
    for field in [
        "snapshots_removed",
        "packs_removed",
        "removed_bytes",
        "written_bytes",
    ] {
        assert_eq!(dry[field], done[field], "{field}");
    }
    assert_eq!(number(&done, "snapshots_removed"), 1);
    assert!(number(&done, "removed_bytes") > 0);
    assert!(done["waiting_for"].as_array().unwrap().is_empty());
    lab.assert_restores(&new, &second);
    lab.run(&["forget", "--undelete", &old]).error(1);
    // The disk's other content is stored again where it comes back.
    let again = full(&lab, &[&first], &["vda"], &[]);
    lab.assert_restores(&again, &first);
    let shown = lab.run_text(&["prune"]);
    assert!(
        String::from_utf8(shown.stdout)
            .unwrap()
            .contains("removed 0")
    );
}

#[test]
fn forget_and_prune_in_one_go() {
    let lab = Lab::new();
    let first = lab.raw("first.raw", 4 * MIB, 5);
    let second = lab.raw("second.raw", 4 * MIB, 6);
    full(&lab, &[&first], &["vda"], &[]);
    let new = full(&lab, &[&second], &["vda"], &[]);
    let args = [
        "forget",
        "--keep-last",
        "1",
        "--prune",
        "--undelete-window",
        "0s",
    ];
    // The brake holds the prune, and `--force` is for both.
    assert_eq!(lab.run(&args).error(1)["code"], "brake");
    assert_eq!(lab.snapshots(), std::slice::from_ref(&new));
    let result = lab.run(&[&args[..], &["--force"]].concat()).result();
    assert_eq!(number(&result["prune"], "snapshots_removed"), 1);
    assert_eq!(lab.snapshots(), std::slice::from_ref(&new));
    lab.assert_restores(&new, &second);
}

/// A cleared bitmap knows nothing of what was before the snapshot that it was cleared after.
#[test]
fn incremental_does_not_follow_a_bitmap_past_a_forgotten_snapshot() {
    let lab = Lab::new();
    let image = lab.qcow2("vda.qcow2", 4 * MIB, 7);
    let bitmap = |action: &str| {
        let args = ["bitmap", action, "-f", "qcow2", &image, "bm0"];
        crate::support::process::tool("qemu-img", &args);
    };
    let write = |what: &str| {
        crate::support::disk::qemu_io(&image, "qcow2", &[what.to_owned()]);
    };
    bitmap("--add");
    let name = ["--name", "web1", "--disk", "vda", "--bitmap", "bm0"];
    lab.run(&[&["full", &image], &name[..]].concat()).result();
    write("write -q -P 1 1M 100k");
    let args = [&["incremental", &image], &name[..]].concat();
    let second = text(&lab.run(&args).result(), "snapshot");
    bitmap("--clear");
    write("write -q -P 2 2M 100k");
    lab.run(&["forget", &second]).result();
    let prune = ["prune", "--undelete-window", "0s", "--force"];
    for removed in [false, true] {
        if removed {
            lab.run(&prune).result();
        }
        let result = lab.run(&args).result();
        assert_eq!(result["disks"][0]["kind"], "full");
        assert_eq!(result["disks"][0]["reason"], "parent-missing");
        let id = text(&result, "snapshot");
        let raw = lab.file("raw");
        let args = ["convert", "-f", "qcow2", "-O", "raw", &image, &raw];
        crate::support::process::tool("qemu-img", &args);
        lab.assert_restores(&id, &raw);
        lab.run(&["forget", &id]).result();
    }
}

#[test]
fn wrong_usage_of_forget_and_prune_is_2() {
    let lab = Lab::new();
    for args in [
        &["forget"][..],
        &["forget", "--prune"],
        &["forget", "latest", "--keep-last", "1"],
        &["forget", "--undelete"],
        &["forget", "--keep-within", "7"],
        &["forget", "--keep-last", "-1"],
        &["prune", "--max-unused", "101"],
        &["prune", "--undelete-window", "soon"],
        &["prune", "now"],
    ] {
        lab.run(args).error(2);
    }
    lab.run(&["forget", "--keep-last", "1"]).result();
    lab.run(&["forget", "latest"]).error(1);
}
