//! The chain rule: what an incremental inherits from, and when it must not.

use nbdbackup::engine::{BackupKind, BackupOutcome, EngineError, Follow, Reason};

use crate::rig::{CHUNK, Rig};

fn kind(outcome: &BackupOutcome) -> (BackupKind, Option<Reason>) {
    (outcome.disks[0].kind, outcome.disks[0].reason)
}

async fn rig() -> Rig {
    let rig = Rig::of_size(8 * CHUNK as usize);
    rig.disk.write(0, &vec![7; 8 * CHUNK as usize]);
    rig
}

#[tokio::test]
async fn incremental_without_a_snapshot_reads_in_full() {
    let rig = rig().await;
    rig.disk.add_bitmap("bm0");
    let outcome = rig.backup(Some("bm0"), &[]).await.unwrap();
    assert_eq!(kind(&outcome), (BackupKind::Full, Some(Reason::NoParent)));
    // That run used the bitmap, which recorded all along: the next one may follow it.
    rig.disk.write(0, b"x");
    let outcome = rig.backup(Some("bm0"), &[]).await.unwrap();
    assert_eq!(kind(&outcome), (BackupKind::Incremental, None));
    assert_eq!(rig.restore("latest").await.unwrap(), rig.disk.bytes());
}

#[tokio::test]
async fn bitmap_of_another_name_is_no_proof() {
    let rig = rig().await;
    rig.disk.add_bitmap("bm0");
    rig.backup(None, &["bm0"]).await.unwrap();
    rig.disk.write(0, b"x");
    rig.disk.add_bitmap("bm1");
    let outcome = rig.backup(Some("bm1"), &[]).await.unwrap();
    assert_eq!(kind(&outcome), (BackupKind::Full, Some(Reason::NoParent)));
    assert_eq!(rig.restore("latest").await.unwrap(), rig.disk.bytes());
}

#[tokio::test]
async fn bitmap_that_was_lost_and_came_back_is_another_one() {
    let rig = rig().await;
    rig.disk.add_bitmap("bm0");
    rig.backup(None, &["bm0"]).await.unwrap();
    rig.disk.write(0, b"written while recorded");
    rig.disk.remove_bitmap("bm0");
    rig.disk.write(CHUNK, b"written while nobody recorded");
    let outcome = rig.backup(Some("bm0"), &[]).await.unwrap();
    assert_eq!(
        kind(&outcome),
        (BackupKind::Full, Some(Reason::BitmapMissing))
    );
    rig.disk
        .write(2 * CHUNK, b"written while nobody recorded, again");
    rig.disk.add_bitmap("bm0");
    let outcome = rig.backup(Some("bm0"), &[]).await.unwrap();
    assert_eq!(kind(&outcome), (BackupKind::Full, Some(Reason::NoParent)));
    assert_eq!(rig.restore("latest").await.unwrap(), rig.disk.bytes());
    let outcome = rig.backup(Some("bm0"), &[]).await.unwrap();
    assert_eq!(kind(&outcome), (BackupKind::Incremental, None));
}

#[tokio::test]
async fn no_fallback_fails_and_writes_nothing() {
    let rig = rig().await;
    let follow = |parent: Option<&str>| {
        Some(Follow {
            bitmap: "bm0".to_owned(),
            parent: parent.map(str::to_owned),
            no_fallback: true,
        })
    };
    rig.disk.add_bitmap("bm0");
    let error = rig.backup_with(follow(None), &[]).await.unwrap_err();
    assert!(
        matches!(
            error,
            EngineError::IncrementalImpossible {
                reason: Reason::NoParent,
                ..
            }
        ),
        "{error}"
    );
    let error = rig
        .backup_with(follow(Some("0123")), &[])
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            EngineError::IncrementalImpossible {
                reason: Reason::ParentMissing,
                ..
            }
        ),
        "{error}"
    );
    assert!(matches!(
        rig.restore("latest").await,
        Err(EngineError::SnapshotNotFound(_))
    ));
}

#[tokio::test]
async fn asserted_parent_is_believed() {
    let rig = rig().await;
    let first = rig.backup(None, &[]).await.unwrap();
    rig.disk.add_bitmap("other");
    rig.disk.write(3 * CHUNK + 5, b"x");
    let follow = Follow {
        bitmap: "other".to_owned(),
        parent: Some(first.snapshot[..8].to_owned()),
        no_fallback: true,
    };
    let outcome = rig.backup_with(Some(follow), &[]).await.unwrap();
    assert_eq!(outcome.disks[0].parent.as_deref(), Some(&*first.snapshot));
    assert_eq!(outcome.disks[0].read_bytes, CHUNK);
    assert_eq!(rig.restore("latest").await.unwrap(), rig.disk.bytes());
}

#[tokio::test]
async fn started_bitmaps_let_a_caller_rotate_names() {
    let rig = rig().await;
    rig.disk.add_bitmap("a");
    rig.backup(None, &["a"]).await.unwrap();
    rig.disk.write(CHUNK, b"one");
    rig.disk.add_bitmap("b");
    rig.backup(Some("a"), &["b"]).await.unwrap();
    rig.disk.remove_bitmap("a");
    rig.disk.write(5 * CHUNK, b"two");
    let outcome = rig.backup(Some("b"), &[]).await.unwrap();
    assert_eq!(kind(&outcome), (BackupKind::Incremental, None));
    assert_eq!(outcome.disks[0].read_bytes, CHUNK);
    assert_eq!(rig.restore("latest").await.unwrap(), rig.disk.bytes());
}
