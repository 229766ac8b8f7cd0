//! Which options a client sends and in which order, until it may send requests.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::super::session::client::{
    Abort, AskExport, AwaitExportName, AwaitGreeting, ExportDetails, ExtendedHeaders, Heard,
    NotFixed, Opened, OptionCall, Options, SetContexts, StartTls, StructuredReply,
};
use super::super::session::{PeerIncompatible, Refused};
use super::super::tls::{TlsClient, TlsError};
use super::super::transport::{ReadHalf, Stream, WriteHalf};
use super::super::wire::{Dialect, MetaContext, OptionCode, OptionReplyCode};
use super::ClientErrorKind;

/// What both sides agreed on.
pub(super) struct Agreed {
    pub(super) details: ExportDetails,
    pub(super) dialect: Dialect,
    pub(super) contexts: Vec<MetaContext>,
}

/// A connection in the handshake; exactly the bytes of one message are read at a time.
pub(super) struct Wire {
    stream: Stream,
    /// Whether TLS has started and the server has not said anything since.
    unheard: bool,
}

impl Wire {
    /// Greets a server, and starts TLS if that is wanted: then there is no way on without it.
    pub(super) async fn open(
        stream: Stream,
        tls: Option<&TlsClient>,
    ) -> Result<(Self, Opened), ClientErrorKind> {
        let mut wire = Self {
            stream,
            unheard: false,
        };
        let opened = wire.greet().await?;
        let Some(tls) = tls else {
            return Ok((wire, opened));
        };
        let options = fixed(opened, OptionCode::STARTTLS)?;
        let (options, answer) = wire.call(options, StartTls).await?;
        if let Err(refused) = answer {
            wire.abort(options).await;
            return Err(ClientErrorKind::Refused(refused));
        }
        // Nothing lies in a buffer: whatever came behind the acknowledgement goes into the TLS handshake.
        let stream = tls.connect(wire.stream).await?;
        let wire = Self {
            stream,
            unheard: true,
        };
        Ok((wire, Opened::Fixed(options)))
    }

    /// Splits the connection for the transmission phase.
    pub(super) fn split(self) -> (ReadHalf, WriteHalf) {
        self.stream.split()
    }

    /// Goes through the handshake to the transmission phase of an export.
    pub(super) async fn agree(
        &mut self,
        opened: Opened,
        export: &str,
        contexts: &[String],
    ) -> Result<Agreed, ClientErrorKind> {
        let mut options = match opened {
            Opened::Fixed(options) => options,
            Opened::NotFixed(state) => return self.agree_unfixed(state, export).await,
        };
        options = self.modern(options).await?;
        let mut granted = Vec::new();
        // The choice of contexts has to be the last option before GO and name the same export: some servers drop it.
        if options.dialect() != Dialect::Simple && !contexts.is_empty() {
            let answer;
            (options, answer) = self
                .call(options, SetContexts::new(export, contexts))
                .await?;
            match answer {
                Ok(contexts) => granted = contexts,
                Err(refused) => tracing::debug!(%refused, "no metadata contexts"),
            }
        }
        let (options, answer) = self.call(options, AskExport::go(export)).await?;
        let dialect = options.dialect();
        let details = match answer {
            Ok(details) => details,
            // Behind extended headers a server has to close at EXPORT_NAME, and knows GO.
            Err(refused)
                if refused.code == OptionReplyCode::ERR_UNSUP && dialect != Dialect::Extended =>
            {
                let mut out = Vec::new();
                let wait = options.export_name(export, &mut out)?;
                self.send(&out).await?;
                self.export_name(wait).await?
            }
            Err(refused) => {
                self.abort(options).await;
                return Err(ClientErrorKind::Refused(refused));
            }
        };
        Ok(Agreed {
            details,
            dialect,
            contexts: granted,
        })
    }

    /// Asks for the newest headers that the server has; a refusal, whatever its code, means that it has them not.
    pub(super) async fn modern(&mut self, options: Options) -> Result<Options, ClientErrorKind> {
        let (options, extended) = self.call(options, ExtendedHeaders).await?;
        if extended.is_ok() {
            return Ok(options);
        }
        let (options, _) = self.call(options, StructuredReply).await?;
        Ok(options)
    }

    /// Sends one option and waits for its answers.
    pub(super) async fn call<C: OptionCall>(
        &mut self,
        options: Options,
        call: C,
    ) -> Result<(Options, Result<C::Answer, Refused>), ClientErrorKind> {
        let mut out = Vec::new();
        let mut sent = options.send(call, &mut out)?;
        self.send(&out).await?;
        loop {
            let bytes = self.receive(sent.wanted()).await?;
            match sent.handle(&bytes)? {
                Heard::More(more) => sent = more,
                Heard::Done(options, answer) => return Ok((options, answer)),
            }
        }
    }

    /// Says goodbye; the server's answer, if it gives one, is of no use.
    pub(super) async fn abort(&mut self, options: Options) {
        let mut out = Vec::new();
        if options.send(Abort, &mut out).is_ok() && self.send(&out).await.is_ok() {
            let _ = self.stream.shutdown().await;
        }
    }

    async fn greet(&mut self) -> Result<Opened, ClientErrorKind> {
        let state = AwaitGreeting;
        let bytes = self.receive(state.wanted()).await?;
        let mut out = Vec::new();
        let opened = state.handle(&bytes, &mut out)?;
        self.send(&out).await?;
        Ok(opened)
    }

    async fn agree_unfixed(
        &mut self,
        state: NotFixed,
        export: &str,
    ) -> Result<Agreed, ClientErrorKind> {
        let mut out = Vec::new();
        let wait = state.export_name(export, &mut out)?;
        self.send(&out).await?;
        Ok(Agreed {
            details: self.export_name(wait).await?,
            dialect: Dialect::Simple,
            contexts: Vec::new(),
        })
    }

    async fn export_name(
        &mut self,
        wait: AwaitExportName,
    ) -> Result<ExportDetails, ClientErrorKind> {
        let bytes = self.receive(wait.wanted()).await?;
        Ok(wait.handle(&bytes)?)
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), ClientErrorKind> {
        let sent = match self.stream.write_all(bytes).await {
            Ok(()) => self.stream.flush().await,
            failed => failed,
        };
        sent.map_err(|fault| self.io("sending in the handshake", fault))
    }

    /// Reads exactly what a state wants, which `limits` bound.
    async fn receive(&mut self, wanted: usize) -> Result<Vec<u8>, ClientErrorKind> {
        let mut bytes = vec![0; wanted];
        let received = self.stream.read_exact(&mut bytes).await;
        received.map_err(|fault| self.io("receiving in the handshake", fault))?;
        self.unheard = false;
        Ok(bytes)
    }

    fn io(&self, during: &'static str, fault: io::Error) -> ClientErrorKind {
        match self.unheard {
            true => ClientErrorKind::Tls(TlsError::of_client(fault)),
            false => ClientErrorKind::io(during, fault),
        }
    }
}

/// Goes on with a server that takes any option.
pub(super) fn fixed(opened: Opened, wanted: OptionCode) -> Result<Options, ClientErrorKind> {
    match opened {
        Opened::Fixed(options) => Ok(options),
        Opened::NotFixed(_) => Err(ClientErrorKind::Incompatible(PeerIncompatible::NotFixed {
            wanted,
        })),
    }
}
