//! Restores that are given up.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use nbdbackup::engine::{self, Event, Observer, RestoreRequest, Target};

use crate::rig::{CHUNK, Rig};

/// Says when the first bytes were written, and holds the restore there until it is told to go on.
struct Gate {
    reached: Mutex<Sender<()>>,
    go_on: Mutex<Receiver<()>>,
}

impl Observer for Gate {
    fn observe(&self, _: Event) {
        let _ = self.reached.lock().unwrap().send(());
        // An error means that the gate was opened for good.
        let _ = self.go_on.lock().unwrap().recv();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn restore_that_is_given_up_removes_what_it_created() {
    let rig = Rig::of_size(400 * CHUNK as usize);
    for chunk in (0..400).step_by(2) {
        rig.disk.write(chunk * CHUNK, &chunk.to_le_bytes());
    }
    rig.backup(None, &[]).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let request = RestoreRequest {
        snapshot: "latest".to_owned(),
        disk: None,
        target: Target::Raw(path.clone()),
        overwrite: false,
    };
    let (reached, wait) = channel();
    let (gate, go_on) = channel();
    let gate_keeper = Arc::new(Gate {
        reached: Mutex::new(reached),
        go_on: Mutex::new(go_on),
    });
    let observer = Arc::downgrade(&gate_keeper);
    let restoring = tokio::spawn({
        let catalog = rig.catalog.clone();
        async move { engine::restore(&catalog, request, gate_keeper).await }
    });
    tokio::task::spawn_blocking(move || wait.recv())
        .await
        .unwrap()
        .unwrap();
    assert!(path.exists());
    restoring.abort();
    assert!(restoring.await.unwrap_err().is_cancelled());
    drop(gate);
    // The blocking part lets go of the observer as its last deed.
    while observer.strong_count() > 0 {
        tokio::task::yield_now().await;
    }
    assert!(!path.exists());
}
