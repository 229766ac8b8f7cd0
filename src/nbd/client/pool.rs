//! The connections of one client: which of them takes a request, and new ones for those that were lost.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use super::super::tls::TlsClient;
use super::super::uri::NbdUri;
use super::connection::Connection;
use super::{ClientError, ClientErrorKind, ClientOptions, Export, Phase};

/// The connections of one client.
pub(super) struct Pool {
    peer: Arc<str>,
    connections: RwLock<Vec<Arc<Connection>>>,
    redial: Option<Redial>,
    /// Whether something was written: what a lost connection took along of it cannot be made up for.
    changed: AtomicBool,
    reconnects: AtomicU32,
}

/// How a lost connection is made anew.
pub(super) struct Redial {
    pub(super) uri: NbdUri,
    pub(super) tls: Option<TlsClient>,
    pub(super) options: ClientOptions,
    /// What each new connection has to see.
    pub(super) export: Export,
    /// The numbers that its contexts have to have.
    pub(super) context_ids: Vec<u32>,
    /// Held by the one who dials; then why it was given up.
    pub(super) gave_up: Mutex<Option<ClientError>>,
}

impl Pool {
    pub(super) fn new(
        peer: Arc<str>,
        connections: Vec<Connection>,
        redial: Option<Redial>,
    ) -> Self {
        Self {
            peer,
            connections: RwLock::new(connections.into_iter().map(Arc::new).collect()),
            redial,
            changed: AtomicBool::new(false),
            reconnects: AtomicU32::new(0),
        }
    }

    /// Picks the live connection with the fewest requests.
    pub(super) fn pick(&self) -> Result<Arc<Connection>, ClientError> {
        let connections = self
            .connections
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let live = connections.iter().filter(|c| c.is_alive());
        match live.min_by_key(|c| c.load()) {
            Some(connection) => Ok(Arc::clone(connection)),
            None => Err(match connections.first() {
                Some(dead) => dead.fault(),
                None => ClientErrorKind::Closed.at(&self.peer, Phase::Transmission),
            }),
        }
    }

    /// How often the export was connected to anew.
    pub(super) fn reconnects(&self) -> u32 {
        self.reconnects.load(Ordering::Relaxed)
    }

    /// Notes that something was written, after which a lost connection is final: what it took along is unknown.
    pub(super) fn note_change(&self) {
        self.changed.store(true, Ordering::Relaxed);
    }

    /// Whether a request that met this fault may be made again.
    pub(super) fn may_retry(&self, fault: &ClientError) -> bool {
        self.redial.is_some() && fault.is_loss() && !self.changed.load(Ordering::Relaxed)
    }

    /// Makes sure that a connection lives, for as long as the options allow.
    pub(super) async fn revive(&self, fault: ClientError) -> Result<(), ClientError> {
        let Some(redial) = &self.redial else {
            return Err(fault);
        };
        let mut gave_up = redial.gave_up.lock().await;
        if self.pick().is_ok() {
            return Ok(());
        }
        if let Some(fault) = gave_up.clone() {
            return Err(fault);
        }
        tracing::warn!(%fault, "connection lost; connecting again");
        match self.dial(redial).await {
            Ok(()) => Ok(()),
            Err(fault) => Err(gave_up.insert(fault).clone()),
        }
    }

    async fn dial(&self, redial: &Redial) -> Result<(), ClientError> {
        let options = &redial.options;
        let deadline = Instant::now() + options.retry_time;
        let mut pause = FIRST_PAUSE;
        let first = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = options.connect_timeout.min(left.max(LEAST_WAIT));
            match self.dial_once(redial, wait).await {
                Ok(connection) => break connection,
                Err(fault) if matches!(fault.kind, ClientErrorKind::Changed) => return Err(fault),
                Err(fault) if Instant::now() + pause >= deadline => return Err(fault),
                Err(fault) => tracing::info!(%fault, "not connected yet"),
            }
            sleep(pause).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
        };
        let mut connections = vec![first];
        let more = (1..redial.export.connections).map(|_| self.dial_once(redial, MORE_WAIT));
        for more in futures::future::join_all(more).await {
            match more {
                Ok(more) => connections.push(more),
                Err(fault) => tracing::debug!(%fault, "no further connection"),
            }
        }
        self.reconnects.fetch_add(1, Ordering::Relaxed);
        let connections = connections.into_iter().map(Arc::new).collect();
        *self
            .connections
            .write()
            .unwrap_or_else(PoisonError::into_inner) = connections;
        Ok(())
    }

    async fn dial_once(&self, redial: &Redial, wait: Duration) -> Result<Connection, ClientError> {
        let opened = Connection::dial(
            &redial.uri,
            redial.tls.as_ref(),
            &self.peer,
            &redial.options,
            wait,
        )
        .await?;
        let found = Export::of(&redial.uri.export, &opened);
        let ids = opened.contexts.iter().map(|context| context.id);
        match redial.export.is_same_disk(&found) && ids.eq(redial.context_ids.iter().copied()) {
            true => Ok(opened.connection),
            false => Err(ClientErrorKind::Changed.at(&self.peer, Phase::Handshake)),
        }
    }

    /// Closes all connections in order.
    pub(super) async fn close(&self) -> Result<(), ClientError> {
        let connections = {
            let mut connections = self
                .connections
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *connections)
        };
        let ends = connections.iter().map(|connection| connection.close());
        futures::future::join_all(ends).await.into_iter().collect()
    }
}

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The last try, too, gets some time.
const LEAST_WAIT: Duration = Duration::from_millis(500);
/// How long connections beyond the first may take.
const MORE_WAIT: Duration = Duration::from_secs(3);
