//! Runs processes that share a storage step by step, in every order that few switches between them can make.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nbdbackup::repo::{FileInfo, Hold, MemoryStorage, NewFile, Repository, Storage, StorageError};

/// What a process does; what it returns is looked at when all are done.
pub(crate) type Process<T> = Box<dyn FnOnce(Arc<Repository>) -> T + Send>;

/// How processes run and what they are told.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rules {
    /// How often a process that could go on is made to wait for another one.
    pub(crate) switches: usize,
    /// Of the orders with the most switches, only one in this many is run; 0 runs all.
    pub(crate) one_in: usize,
    /// Whether nobody seems to hold what it holds, as where locks lie.
    pub(crate) locks_lie: bool,
    /// The process that is killed, and before which of its steps.
    pub(crate) kill: Option<(usize, usize)>,
}

/// Runs the processes in every order within the rules; `start` makes the storage and the processes for each run, and
/// `check` looks at what they left. Returns the number of runs.
pub(crate) fn explore<T: Send + 'static>(
    rules: Rules,
    start: impl Fn() -> (MemoryStorage, Vec<Process<T>>),
    check: impl Fn(&MemoryStorage, &[T], &str),
) -> usize {
    let mut open: Vec<Vec<usize>> = vec![Vec::new()];
    let (mut runs, mut skipped) = (0, 0);
    while let Some(prefix) = open.pop() {
        let (storage, processes) = start();
        let (results, trace) = run(rules, &storage, processes, &prefix);
        runs += 1;
        let told: Vec<String> = trace
            .iter()
            .map(|t| format!("{} {}", t.chosen, t.step))
            .collect();
        check(&storage, &results, &told.join("\n"));
        // Each other choice after the prefix begins an order that no other prefix makes.
        let mut switches = 0;
        for (at, turn) in trace.iter().enumerate() {
            if at >= prefix.len() {
                for other in turn.enabled.iter().filter(|p| **p != turn.chosen) {
                    let forced = turn.current.is_some_and(|c| turn.enabled.contains(&c));
                    let needed = switches + usize::from(forced);
                    skipped += usize::from(needed == rules.switches);
                    let taken = needed < rules.switches || skipped % rules.one_in.max(1) == 0;
                    if needed <= rules.switches && taken {
                        let mut next: Vec<usize> = trace[..at].iter().map(|t| t.chosen).collect();
                        next.push(*other);
                        open.push(next);
                    }
                }
            }
            let left = turn.current.filter(|c| turn.enabled.contains(c));
            switches += usize::from(left.is_some_and(|c| c != turn.chosen));
        }
    }
    runs
}

/// One decision.
struct Turn {
    current: Option<usize>,
    enabled: Vec<usize>,
    chosen: usize,
    step: String,
}

fn run<T: Send + 'static>(
    rules: Rules,
    storage: &MemoryStorage,
    processes: Vec<Process<T>>,
    prefix: &[usize],
) -> (Vec<T>, Vec<Turn>) {
    let scheduler = Arc::new(Scheduler::default());
    let count = processes.len();
    let opened: Vec<Arc<Repository>> = (0..count)
        .map(|process| {
            let stepped = SteppedStorage {
                inner: storage.clone(),
                process,
                rules,
                scheduler: Arc::clone(&scheduler),
            };
            super::support::open_any(Arc::new(stepped)).unwrap()
        })
        .collect();
    scheduler.lock().started = true;
    let mut trace = Vec::new();
    let results = std::thread::scope(|scope| {
        let threads: Vec<_> = processes
            .into_iter()
            .zip(opened)
            .map(|(process, repo)| {
                let scheduler = Arc::clone(&scheduler);
                scope.spawn(move || {
                    let result = process(repo);
                    scheduler.lock().finished += 1;
                    scheduler.changed.notify_all();
                    result
                })
            })
            .collect();
        let mut current = None;
        while let Some(enabled) = scheduler.quiet(count) {
            let steps: Vec<usize> = enabled.keys().copied().collect();
            let wanted = prefix.get(trace.len()).copied().or(current);
            let chosen = wanted.filter(|p| steps.contains(p)).unwrap_or(steps[0]);
            trace.push(Turn {
                current,
                step: enabled[&chosen].clone(),
                enabled: steps,
                chosen,
            });
            current = Some(chosen);
            scheduler.grant(chosen);
        }
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    (results, trace)
}

/// Lets one step at a time happen.
#[derive(Debug, Default)]
struct Scheduler {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    started: bool,
    /// The steps that processes wait to take.
    waiting: BTreeMap<usize, String>,
    granted: Option<usize>,
    finished: usize,
    steps: BTreeMap<usize, usize>,
}

impl Scheduler {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Waits for the turn to take a step, and returns its number among those of its process.
    fn step(&self, process: usize, step: String) -> usize {
        let mut state = self.lock();
        if !state.started {
            return 0;
        }
        state.waiting.insert(process, step);
        self.changed.notify_all();
        while state.granted != Some(process) {
            state = self.changed.wait(state).unwrap();
        }
        state.granted = None;
        state.waiting.remove(&process);
        let count = state.steps.entry(process).or_default();
        *count += 1;
        *count
    }

    /// Waits until each process waits or is done; `None` when all are done.
    fn quiet(&self, count: usize) -> Option<BTreeMap<usize, String>> {
        let mut state = self.lock();
        while state.granted.is_some() || state.waiting.len() + state.finished < count {
            let (next, timeout) = self
                .changed
                .wait_timeout(state, Duration::from_secs(60))
                .unwrap();
            assert!(!timeout.timed_out(), "a process hangs: {next:?}");
            state = next;
        }
        (!state.waiting.is_empty()).then(|| state.waiting.clone())
    }

    fn grant(&self, process: usize) {
        self.lock().granted = Some(process);
        self.changed.notify_all();
    }
}

/// Storage whose calls that others can notice, or that notice others, are steps.
#[derive(Debug)]
struct SteppedStorage {
    inner: MemoryStorage,
    process: usize,
    rules: Rules,
    scheduler: Arc<Scheduler>,
}

impl SteppedStorage {
    fn step(&self, what: &str, name: &str) -> Result<(), StorageError> {
        let number = self.scheduler.step(self.process, format!("{what} {name}"));
        match self.rules.kill {
            Some((process, at)) if process == self.process && number >= at => {
                let dead = std::io::ErrorKind::Other.into();
                Err(StorageError::from_io(what, name, dead))
            }
            _ => Ok(()),
        }
    }
}

impl Storage for SteppedStorage {
    fn create(&self) -> Result<Box<dyn NewFile>, StorageError> {
        Ok(Box::new(SteppedFile {
            inner: self.inner.create()?,
            storage: Self {
                inner: self.inner.clone(),
                process: self.process,
                rules: self.rules,
                scheduler: Arc::clone(&self.scheduler),
            },
        }))
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, StorageError> {
        self.step("read", name)?;
        self.inner.read(name, limit)
    }

    fn read_at(&self, name: &str, at: u64, buf: &mut [u8]) -> Result<(), StorageError> {
        // Parts of one file are read one after the other: it goes before the first or not at all.
        if at < 4096 {
            self.step("read part of", name)?;
        }
        self.inner.read_at(name, at, buf)
    }

    fn len(&self, name: &str) -> Result<u64, StorageError> {
        self.step("len", name)?;
        self.inner.len(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<FileInfo>, StorageError> {
        self.step("list", prefix)?;
        self.inner.list(prefix)
    }

    fn remove(&self, name: &str) -> Result<(), StorageError> {
        self.step("remove", name)?;
        self.inner.remove(name)
    }

    fn barrier(&self) -> Result<(), StorageError> {
        self.inner.barrier()
    }

    fn hold(&self, name: &str) -> Result<Box<dyn Hold>, StorageError> {
        self.inner.hold(name)
    }

    fn is_held(&self, name: &str) -> Result<Option<bool>, StorageError> {
        self.step("is held", name)?;
        match self.rules.locks_lie {
            true => Ok(Some(false)),
            false => self.inner.is_held(name),
        }
    }

    fn sweep(&self) -> Result<u64, StorageError> {
        self.inner.sweep()
    }

    fn place(&self) -> String {
        self.inner.place()
    }
}

struct SteppedFile {
    inner: Box<dyn NewFile>,
    storage: SteppedStorage,
}

impl NewFile for SteppedFile {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        self.inner.write(bytes)
    }

    fn publish(self: Box<Self>, name: &str) -> Result<(), StorageError> {
        self.storage.step("publish", name)?;
        self.inner.publish(name)
    }

    fn replace(self: Box<Self>, name: &str) -> Result<(), StorageError> {
        self.storage.step("replace", name)?;
        self.inner.replace(name)
    }
}
