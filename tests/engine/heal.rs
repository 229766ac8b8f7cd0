//! Damage that a check has marked: the next backup reads it again, whatever the bitmap says.

use nbdbackup::engine::{BackupKind, EngineError};
use nbdbackup::repo::{CheckOptions, Checked, Storage};

use crate::rig::{CHUNK, Rig};

async fn rig() -> Rig {
    let rig = Rig::of_size(300 * CHUNK as usize + 5);
    for chunk in 0..300 {
        rig.disk.write(chunk * CHUNK, &(chunk + 1).to_le_bytes());
    }
    rig
}

fn check(rig: &Rig, repair: bool) -> Checked {
    let options = CheckOptions {
        read_data_percent: Some(100.0),
        repair,
        now_unix_nanos: 1,
    };
    rig.catalog
        .repository()
        .check(&options, &|_, _| {})
        .unwrap()
}

/// Flips a bit in the first record of each file of a folder.
fn damage(rig: &Rig, folder: &str) {
    for file in rig.storage.list(folder).unwrap() {
        let mut bytes = rig.storage.read(&file.name, u64::MAX).unwrap();
        bytes[80] ^= 1;
        rig.storage.damage(&file.name, bytes);
    }
}

#[tokio::test]
async fn incremental_reads_damaged_ranges_although_the_bitmap_calls_them_clean() {
    for folder in ["packs/", "meta/"] {
        let mut rig = rig().await;
        rig.disk.add_bitmap("bm0");
        let full = rig.backup(None, &["bm0"]).await.unwrap();
        let before = rig.disk.bytes();
        damage(&rig, folder);
        rig.reopen();
        let error = rig.restore(&full.snapshot).await.unwrap_err();
        assert!(matches!(error, EngineError::Unrestorable { .. }), "{error}");
        let found = check(&rig, true);
        assert_eq!(found.ranges_total, 1, "{folder}: {found:?}");
        let lost = found.lost_bytes;
        // Something else changes.
        rig.disk.write(250 * CHUNK, b"new");
        rig.reopen();
        let healing = rig.backup(Some("bm0"), &[]).await.unwrap();
        let disk = &healing.disks[0];
        assert_eq!(disk.kind, BackupKind::Incremental);
        assert_eq!(disk.reread_bytes, lost, "{folder}");
        assert!(disk.read_bytes <= lost + CHUNK, "{folder}: {disk:?}");
        assert_eq!(healing.warnings.len(), 1, "{:?}", healing.warnings);
        rig.reopen();
        assert!(rig.restore("latest").await.unwrap() == rig.disk.bytes());
        assert!(
            rig.restore(&full.snapshot).await.unwrap() == before,
            "{folder}: the old snapshot is not healed"
        );
        assert!(check(&rig, true).is_whole(), "{folder}");
        // And that is that.
        let quiet = rig.backup(Some("bm0"), &[]).await.unwrap();
        assert_eq!(quiet.disks[0].reread_bytes, 0);
        assert!(quiet.warnings.is_empty(), "{:?}", quiet.warnings);
    }
}

#[tokio::test]
async fn range_that_changed_since_is_right_in_the_new_snapshot_and_lost_in_the_old() {
    let mut rig = rig().await;
    rig.disk.add_bitmap("bm0");
    let full = rig.backup(None, &["bm0"]).await.unwrap();
    damage(&rig, "packs/");
    rig.reopen();
    let found = check(&rig, true);
    let at = found.ranges[0].offset;
    rig.disk.write(at, b"other bytes");
    rig.reopen();
    rig.backup(Some("bm0"), &[]).await.unwrap();
    rig.reopen();
    assert!(rig.restore("latest").await.unwrap() == rig.disk.bytes());
    let error = rig.restore(&full.snapshot).await.unwrap_err();
    assert!(matches!(error, EngineError::Unrestorable { .. }), "{error}");
    let found = check(&rig, true);
    let lost: Vec<String> = found
        .ranges
        .iter()
        .map(|r| r.snapshot.to_string())
        .collect();
    assert_eq!(lost, [full.snapshot]);
    // The new one's chain has nothing to read again.
    let next = rig.backup(Some("bm0"), &[]).await.unwrap();
    assert_eq!(next.disks[0].reread_bytes, 0);
}
