//! A fixed set of threads for hashing and compression, awaited from async code.

use std::num::NonZeroUsize;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::EngineError;

/// A handle to the threads; they end with the last handle.
#[derive(Clone)]
pub(crate) struct Workers {
    pool: Arc<rayon::ThreadPool>,
}

impl Workers {
    /// Starts one thread for each processor that this process may use.
    ///
    /// # Panics
    /// When the system refuses to start a thread.
    pub(crate) fn start() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|n| format!("worker-{n}"))
            .build()
            .expect("the system starts threads");
        Self {
            pool: Arc::new(pool),
        }
    }

    /// Runs work that spreads itself over the threads by rayon's iterators, and waits for it.
    pub(crate) fn install<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.pool.install(work)
    }

    /// Runs blocking work on one of the threads and waits for what it returns.
    ///
    /// # Errors
    /// [`EngineError::WorkerLost`] when the work panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, EngineError> {
        let (done, result) = oneshot::channel();
        self.pool.spawn(move || {
            // Nobody listens any more when the run was given up: then the result is not wanted.
            let _ = done.send(work());
        });
        result.await.map_err(|_| EngineError::WorkerLost)
    }
}

/// Runs blocking work, such as a call of the repository, beside the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, EngineError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| EngineError::WorkerLost)
}
