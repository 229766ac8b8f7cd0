//! A repository in a local directory: written aside, synced, then renamed to its name without replacing.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::super::ids::to_hex;
use super::{FileInfo, Hold, NewFile, Storage, StorageError};
use crate::file;

/// Files in a directory of a local file system.
///
/// Files that are being written lie in `tmp/`, each locked by its writer, so that [`Storage::sweep`] knows the
/// leftovers of a killed process at once, by no clock.
#[derive(Debug)]
pub struct LocalStorage {
    root: PathBuf,
    folders: Arc<Folders>,
    open: Arc<Mutex<OpenFiles>>,
    /// Whether anything is made durable.
    durable: bool,
}

impl LocalStorage {
    /// Uses a directory that exists.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StorageError> {
        let root = root.into();
        let shown = root.display().to_string();
        let meta = fs::metadata(&root).map_err(|e| StorageError::from_io("open", &shown, e))?;
        if !meta.is_dir() {
            let fault = io::Error::from(io::ErrorKind::NotADirectory);
            return Err(StorageError::from_io("open", &shown, fault));
        }
        Ok(Self {
            folders: Arc::new(Folders {
                root: root.clone(),
                state: Mutex::default(),
                syncing: Mutex::new(()),
            }),
            open: Arc::default(),
            durable: true,
            root,
        })
    }

    /// Uses a directory whose files nobody wants after a power failure: nothing is made durable.
    pub(crate) fn temporary(root: impl Into<PathBuf>) -> Result<Self, StorageError> {
        let durable = false;
        Self::open(root).map(|storage| Self { durable, ..storage })
    }

    /// Uses a directory and makes it first when it is not there.
    pub fn create(root: impl Into<PathBuf>) -> Result<Self, StorageError> {
        let root = root.into();
        let shown = root.display().to_string();
        fs::create_dir_all(&root).map_err(|e| StorageError::from_io("create", &shown, e))?;
        if let Some(parent) = root.parent().filter(|p| !p.as_os_str().is_empty()) {
            File::open(parent)
                .and_then(|f| f.sync_all())
                .map_err(|e| StorageError::from_io("sync", &parent.display().to_string(), e))?;
        }
        Self::open(root)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn file(&self, name: &str) -> Result<Arc<File>, StorageError> {
        if let Some(file) = lock(&self.open).find(name) {
            return Ok(file);
        }
        let (file, _) = self.open_file(name)?;
        let file = Arc::new(file);
        lock(&self.open).add(name, &file);
        Ok(file)
    }

    /// Opens a file to read it, and tells its length; a pipe or device in its place is never waited for.
    fn open_file(&self, name: &str) -> Result<(File, u64), StorageError> {
        let opened = file::open(&self.path(name));
        let file = opened.map_err(|e| StorageError::from_io("open", name, e))?;
        let len = len_of_file(name, file.metadata())?;
        Ok((file, len))
    }

    /// Makes a file in `tmp/` that is locked by this process.
    fn locked_file(&self) -> Result<LocalFile, StorageError> {
        let folder = self.root.join(TMP);
        loop {
            let mut random = [0; 16];
            getrandom::fill(&mut random)
                .map_err(|e| StorageError::from_io("draw a name in", TMP, e.into()))?;
            let path = folder.join(to_hex(&random));
            let shown = path.display().to_string();
            let file = match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    fs::create_dir(&folder)
                        .or_else(|e| match e.kind() {
                            io::ErrorKind::AlreadyExists => Ok(()),
                            _ => Err(e),
                        })
                        .map_err(|e| StorageError::from_io("create", TMP, e))?;
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(StorageError::from_io("create", &shown, e)),
            };
            // Between create and lock another session may take this for a leftover: then the lock is taken, or
            // the file is gone although the lock was free.
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                // Without locks a sweep cannot tell what is left over, and takes nothing.
                Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
                Err(TryLockError::Error(e)) => {
                    return Err(StorageError::from_io("lock", &shown, e));
                }
            }
            let links = file.metadata().map(|m| m.nlink());
            if links.map_err(|e| StorageError::from_io("look at", &shown, e))? == 0 {
                continue;
            }
            return Ok(LocalFile {
                file,
                path,
                folders: Arc::clone(&self.folders),
                open: Arc::clone(&self.open),
                durable: self.durable,
                published: false,
            });
        }
    }
}

impl Storage for LocalStorage {
    fn create(&self) -> Result<Box<dyn NewFile>, StorageError> {
        Ok(Box::new(self.locked_file()?))
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, StorageError> {
        let (file, len) = self.open_file(name)?;
        let too_long = || StorageError::TooLong {
            name: name.to_owned(),
            limit,
        };
        if len > limit {
            return Err(too_long());
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| too_long())?];
        read_exact_at(&file, name, &mut bytes, 0)?;
        Ok(bytes)
    }

    fn read_at(&self, name: &str, at: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        read_exact_at(&*self.file(name)?, name, buf, at)
    }

    fn len(&self, name: &str) -> Result<u64, StorageError> {
        len_of_file(name, fs::metadata(self.path(name)))
    }

    fn list(&self, prefix: &str) -> Result<Vec<FileInfo>, StorageError> {
        let mut found = Vec::new();
        let mut folders = vec![prefix.trim_end_matches('/').to_owned()];
        while let Some(folder) = folders.pop() {
            let fault = |e| StorageError::from_io("list", &folder, e);
            let entries = match fs::read_dir(self.path(&folder)) {
                Ok(entries) => entries,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(fault(e)),
            };
            for entry in entries {
                let entry = entry.map_err(fault)?;
                let Ok(name) = entry.file_name().into_string() else {
                    continue;
                };
                let name = match folder.as_str() {
                    "" => name,
                    folder => format!("{folder}/{name}"),
                };
                let kind = entry.file_type().map_err(fault)?;
                if kind.is_dir() {
                    // `lost+found` belongs to the file system; `tmp` holds nothing that is published.
                    if name != TMP && name != "lost+found" {
                        folders.push(name);
                    }
                    continue;
                }
                let meta = match entry.metadata() {
                    Ok(meta) => meta,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(fault(e)),
                };
                found.push(FileInfo {
                    name,
                    len: meta.len(),
                    modified: meta.modified().ok(),
                });
            }
        }
        Ok(found)
    }

    fn remove(&self, name: &str) -> Result<(), StorageError> {
        lock(&self.open).forget(name);
        let removed = fs::remove_file(self.path(name));
        // Also when it was gone: whoever removed it may not have made that durable, and the caller may rely on it.
        if self
            .path(name)
            .parent()
            .is_some_and(|folder| folder.is_dir())
        {
            self.folders.changed(name);
        }
        removed.map_err(|e| StorageError::from_io("remove", name, e))
    }

    fn barrier(&self) -> Result<(), StorageError> {
        match self.durable {
            true => self.folders.sync(),
            false => Ok(()),
        }
    }

    fn hold(&self, name: &str) -> Result<Box<dyn Hold>, StorageError> {
        // It gets its name while it is locked, so that nobody sees it free.
        let mut file = self.locked_file()?;
        let path = self.root.join(TMP).join(name);
        rename_new(&file.path, &path).map_err(|e| StorageError::from_io("hold", name, e))?;
        file.path = path;
        Ok(Box::new(file))
    }

    fn is_held(&self, name: &str) -> Result<Option<bool>, StorageError> {
        let file = match open_to_lock(&self.root.join(TMP).join(name)) {
            Ok(file) => file,
            // Let go, or its holder is dead and its file was swept.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Some(false)),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
            Err(e) => return Err(StorageError::from_io("open", name, e)),
        };
        match file.try_lock() {
            Ok(()) => Ok(Some(false)),
            Err(TryLockError::WouldBlock) => Ok(Some(true)),
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => Ok(None),
            Err(TryLockError::Error(e)) => Err(StorageError::from_io("lock", name, e)),
        }
    }

    fn sweep(&self) -> Result<u64, StorageError> {
        let mut swept = 0;
        let entries = match fs::read_dir(self.root.join(TMP)) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(e) => return Err(StorageError::from_io("list", TMP, e)),
        };
        for entry in entries {
            let path = entry
                .map_err(|e| StorageError::from_io("list", TMP, e))?
                .path();
            let shown = path.display().to_string();
            let file = match open_to_lock(&path) {
                Ok(file) => file,
                Err(e) => match e.kind() {
                    // Gone by now, or another user's, who sweeps it, or nothing that a writer leaves.
                    io::ErrorKind::NotFound
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::IsADirectory => continue,
                    _ => return Err(StorageError::from_io("open", &shown, e)),
                },
            };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => continue,
                Err(TryLockError::Error(e)) => {
                    return Err(StorageError::from_io("lock", &shown, e));
                }
            }
            match fs::remove_file(&path) {
                Ok(()) => swept += 1,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(StorageError::from_io("remove", &shown, e)),
            }
        }
        Ok(swept)
    }

    fn place(&self) -> String {
        self.root.display().to_string()
    }
}

/// A locked file in `tmp/`.
#[derive(Debug)]
struct LocalFile {
    file: File,
    path: PathBuf,
    folders: Arc<Folders>,
    open: Arc<Mutex<OpenFiles>>,
    durable: bool,
    published: bool,
}

impl NewFile for LocalFile {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        self.file
            .write_all(bytes)
            .map_err(|e| StorageError::from_io("write", &self.path.display().to_string(), e))
    }

    fn publish(self: Box<Self>, name: &str) -> Result<(), StorageError> {
        (*self).put(name, rename_new)
    }

    fn replace(self: Box<Self>, name: &str) -> Result<(), StorageError> {
        let open = Arc::clone(&self.open);
        let done = (*self).put(name, |from, to| fs::rename(from, to));
        lock(&open).forget(name);
        done
    }
}

impl LocalFile {
    /// Makes the content durable, where anything is, and moves the file to its name.
    fn put(
        mut self,
        name: &str,
        rename: impl Fn(&Path, &Path) -> io::Result<()>,
    ) -> Result<(), StorageError> {
        if self.durable {
            let synced = self.file.sync_all();
            synced.map_err(|e| StorageError::from_io("sync", name, e))?;
        }
        let target = self.folders.root.join(name);
        let moved = match rename(&self.path, &target) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let folder = target.parent().unwrap_or(&target);
                fs::create_dir_all(folder).map_err(|e| StorageError::from_io("create", name, e))?;
                rename(&self.path, &target)
            }
            other => other,
        };
        // Also when the name was taken: whoever took it may not have made it durable, and the caller may rely on it.
        self.folders.changed(name);
        moved.map_err(|e| StorageError::from_io("publish", name, e))?;
        self.published = true;
        Ok(())
    }
}

impl Hold for LocalFile {}

impl Drop for LocalFile {
    fn drop(&mut self) {
        if !self.published {
            // A file that stays is swept by a later session.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The folders whose entries changed since they were last synced.
#[derive(Debug)]
struct Folders {
    root: PathBuf,
    state: Mutex<FolderState>,
    syncing: Mutex<()>,
}

#[derive(Debug, Default)]
struct FolderState {
    changed: BTreeSet<PathBuf>,
    known: BTreeSet<PathBuf>,
    failed: Option<StorageError>,
}

impl Folders {
    fn changed(&self, name: &str) {
        let mut state = lock(&self.state);
        let Some(mut folder) = Path::new(name).parent() else {
            return;
        };
        state.changed.insert(folder.to_owned());
        // A folder that this process did not use before may be new, and its own entry not yet durable.
        while state.known.insert(folder.to_owned()) {
            let Some(parent) = folder.parent() else {
                break;
            };
            state.changed.insert(parent.to_owned());
            folder = parent;
        }
    }

    fn sync(&self) -> Result<(), StorageError> {
        // Held to the end: a second caller must not return while folders that it changed are being synced here.
        let _one = lock(&self.syncing);
        let changed = {
            let mut state = lock(&self.state);
            if let Some(failed) = &state.failed {
                return Err(failed.clone());
            }
            std::mem::take(&mut state.changed)
        };
        for folder in changed {
            let path = self.root.join(&folder);
            if let Err(e) = File::open(&path).and_then(|f| f.sync_all()) {
                let fault = StorageError::from_io("sync", &path.display().to_string(), e);
                lock(&self.state).failed = Some(fault.clone());
                return Err(fault);
            }
        }
        Ok(())
    }
}

/// The files last read, so that a random read costs one system call.
#[derive(Debug, Default)]
struct OpenFiles {
    files: HashMap<String, Arc<File>>,
    order: VecDeque<String>,
}

impl OpenFiles {
    fn find(&self, name: &str) -> Option<Arc<File>> {
        self.files.get(name).cloned()
    }

    fn add(&mut self, name: &str, file: &Arc<File>) {
        if self
            .files
            .insert(name.to_owned(), Arc::clone(file))
            .is_none()
        {
            self.order.push_back(name.to_owned());
        }
        while self.order.len() > OPEN_FILES {
            if let Some(old) = self.order.pop_front() {
                self.files.remove(&old);
            }
        }
    }

    fn forget(&mut self, name: &str) {
        if self.files.remove(name).is_some() {
            self.order.retain(|n| n != name);
        }
    }
}

/// Opens a file for a lock; where locks are those of a network file system, that takes the right to write.
fn open_to_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // Not every file system knows the flag; a link never replaces either.
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
            fs::hard_link(from, to)?;
            fs::remove_file(from)
        }
        Err(e) => Err(e.into()),
    }
}

/// The length of what should be a file.
fn len_of_file(name: &str, found: io::Result<Metadata>) -> Result<u64, StorageError> {
    let found = found.map_err(|e| StorageError::from_io("look at", name, e))?;
    match found.is_file() {
        true => Ok(found.len()),
        false => Err(StorageError::NoFile {
            name: name.to_owned(),
        }),
    }
}

fn read_exact_at(file: &File, name: &str, buf: &mut [u8], at: u64) -> Result<(), StorageError> {
    match file.read_exact_at(buf, at) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(StorageError::Short {
            name: name.to_owned(),
            end: at.saturating_add(buf.len() as u64),
        }),
        Err(e) => Err(StorageError::from_io("read", name, e)),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these locks guard is whole after each statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const TMP: &str = "tmp";
const OPEN_FILES: usize = 64;

#[cfg(test)]
mod tests {
    use rustix::fs::{FileType, mknodat};

    use super::*;

    fn new_file(storage: &LocalStorage, bytes: &[u8], name: &str) -> Result<(), StorageError> {
        let mut file = Storage::create(storage).unwrap();
        file.write(bytes).unwrap();
        file.publish(name)
    }

    #[test]
    fn publish_never_replaces_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let storage = LocalStorage::open(dir.path()).unwrap();
        new_file(&storage, b"one", "a/b/c").unwrap();
        assert_eq!(lock(&storage.folders.state).changed.len(), 3);
        storage.barrier().unwrap();
        let again = new_file(&storage, b"two", "a/b/c");
        assert!(
            matches!(again, Err(StorageError::Exists { .. })),
            "{again:?}"
        );
        assert_eq!(storage.read("a/b/c", 10).unwrap(), b"one");
        assert_eq!(fs::read_dir(dir.path().join(TMP)).unwrap().count(), 0);
        // Somebody else's file may not be durable yet, and is relied on.
        assert_eq!(lock(&storage.folders.state).changed.len(), 1);
        storage.barrier().unwrap();
        assert!(lock(&storage.folders.state).changed.is_empty());
    }

    #[test]
    fn replace_takes_the_place_of_a_file_that_is_open_or_of_none() {
        let dir = tempfile::tempdir().unwrap();
        let storage = LocalStorage::open(dir.path()).unwrap();
        new_file(&storage, b"old", "a/b").unwrap();
        storage.barrier().unwrap();
        let mut buf = [0; 3];
        storage.read_at("a/b", 0, &mut buf).unwrap();
        for name in ["a/b", "c/d"] {
            let mut file = Storage::create(&storage).unwrap();
            file.write(b"new").unwrap();
            file.replace(name).unwrap();
            storage.read_at(name, 0, &mut buf).unwrap();
            assert_eq!(&buf, b"new", "{name}");
            assert!(!lock(&storage.folders.state).changed.is_empty());
            storage.barrier().unwrap();
        }
        assert_eq!(fs::read_dir(dir.path().join(TMP)).unwrap().count(), 0);
    }

    #[test]
    fn sweep_takes_leftovers_and_spares_files_being_written() {
        let dir = tempfile::tempdir().unwrap();
        let storage = LocalStorage::open(dir.path()).unwrap();
        let mut live = Storage::create(&storage).unwrap();
        live.write(b"alive").unwrap();
        fs::write(dir.path().join(TMP).join("dead"), b"dead").unwrap();
        assert_eq!(storage.sweep().unwrap(), 1);
        live.publish("x").unwrap();
        assert_eq!(storage.read("x", 10).unwrap(), b"alive");
    }

    #[test]
    fn held_name_is_seen_until_it_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let storage = LocalStorage::open(dir.path()).unwrap();
        let other = LocalStorage::open(dir.path()).unwrap();
        assert_eq!(other.is_held("x").unwrap(), Some(false));
        let hold = storage.hold("x").unwrap();
        assert_eq!(other.is_held("x").unwrap(), Some(true));
        assert_eq!(other.sweep().unwrap(), 0);
        assert!(other.hold("x").is_err());
        drop(hold);
        assert_eq!(other.is_held("x").unwrap(), Some(false));
        // What a killed process leaves is free, and swept.
        fs::write(dir.path().join(TMP).join("x"), b"").unwrap();
        assert_eq!(other.is_held("x").unwrap(), Some(false));
        assert_eq!(other.sweep().unwrap(), 1);
    }

    #[test]
    fn reads_past_the_end_and_past_the_limit_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let storage = LocalStorage::open(dir.path()).unwrap();
        new_file(&storage, b"12345", "x").unwrap();
        let mut buf = [0; 4];
        storage.read_at("x", 1, &mut buf).unwrap();
        assert_eq!(&buf, b"2345");
        let short = storage.read_at("x", 2, &mut buf);
        assert!(matches!(short, Err(StorageError::Short { .. })));
        assert!(matches!(
            storage.read("x", 4),
            Err(StorageError::TooLong { .. })
        ));
        assert!(matches!(
            storage.len("y"),
            Err(StorageError::Missing { .. })
        ));
    }

    #[test]
    fn folder_or_pipe_in_the_place_of_a_file_is_told_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let storage = LocalStorage::open(dir.path()).unwrap();
        fs::create_dir(dir.path().join("folder")).unwrap();
        let (user, device) = (rustix::fs::Mode::RWXU, 0);
        let pipe = dir.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, user, device).unwrap();
        // Open for both, so that whoever reads it like a file fails here and does not hang.
        let _both = open_to_lock(&pipe).unwrap();
        for name in ["folder", "pipe"] {
            let errors = [
                storage.read(name, 10).map(drop),
                storage.read_at(name, 0, &mut [0]),
                storage.len(name).map(drop),
            ];
            for error in errors {
                let told = matches!(error, Err(StorageError::NoFile { .. }));
                assert!(told, "{name}: {error:?}");
            }
        }
    }

    #[test]
    fn changed_folders_hold_each_new_ancestor_once() {
        let folders = Folders {
            root: PathBuf::new(),
            state: Mutex::default(),
            syncing: Mutex::new(()),
        };
        folders.changed("packs/aa/x");
        let names = |f: &Folders| -> Vec<String> {
            std::mem::take(&mut lock(&f.state).changed)
                .into_iter()
                .map(|p| p.display().to_string())
                .collect()
        };
        assert_eq!(names(&folders), ["", "packs", "packs/aa"]);
        folders.changed("packs/aa/y");
        assert_eq!(names(&folders), ["packs/aa"]);
        folders.changed("packs/bb/y");
        assert_eq!(names(&folders), ["packs", "packs/bb"]);
    }
}
