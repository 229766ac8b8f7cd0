//! Lists the exports of a server with what it tells of each.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::super::session::Refused;
use super::super::session::client::{
    AskExport, ExportDetails, List, ListContexts, Options, StructuredReply,
};
use super::super::tls::TlsClient;
use super::super::transport::Stream;
use super::super::uri::NbdUri;
use super::super::wire::{self, OptionCode};
use super::handshake::{Wire, fixed};
use super::{ClientError, ClientErrorKind, ClientOptions, Phase, load_tls};

/// One export of a server's list.
#[derive(Clone, Debug)]
pub struct ListedExport {
    /// The name.
    pub name: String,
    /// The server's text for people.
    pub description: Option<String>,
    /// What the server tells when asked about it; or why it refuses to.
    pub details: Result<ExportDetails, Refused>,
    /// The names of the metadata contexts.
    pub contexts: Vec<String>,
}

/// Lists the exports of a server; the export that the URI names does not matter.
///
/// It takes more than one connection if there are more than a few exports, since some servers answer few options on one.
pub async fn list(uri: &NbdUri, options: &ClientOptions) -> Result<Vec<ListedExport>, ClientError> {
    let peer: Arc<str> = uri.to_string().into();
    let tls = load_tls(uri, &peer).await?;
    let tls = tls.as_ref();
    let wait = options.connect_timeout;
    let (mut wire, mut state) = open(uri, tls, &peer, wait).await?;
    let names;
    (state, names) = in_time(wait, &peer, names_of(&mut wire, state)).await?;
    let mut exports = Vec::new();
    for listed in names {
        if state.left() < OPTIONS_PER_EXPORT {
            wire.abort(state).await;
            (wire, state) = open(uri, tls, &peer, wait).await?;
        }
        let export;
        (state, export) = in_time(wait, &peer, describe(&mut wire, state, listed)).await?;
        exports.push(export);
    }
    wire.abort(state).await;
    Ok(exports)
}

async fn open(
    uri: &NbdUri,
    tls: Option<&TlsClient>,
    peer: &Arc<str>,
    wait: Duration,
) -> Result<(Wire, Options), ClientError> {
    let stream = match timeout(wait, Stream::connect(&uri.endpoint)).await {
        Ok(stream) => stream.map_err(|fault| ClientErrorKind::io("connecting", fault)),
        Err(_) => Err(ClientErrorKind::TimedOut {
            during: "connecting",
            after: wait,
        }),
    };
    let stream = stream.map_err(|e| e.at(peer, Phase::Connect))?;
    let greet = async {
        let (mut wire, opened) = Wire::open(stream, tls).await?;
        let state = fixed(opened, OptionCode::LIST)?;
        // Some servers tell of contexts only after this; whether they grant it does not matter here.
        let (state, _) = wire.call(state, StructuredReply).await?;
        Ok((wire, state))
    };
    in_time(wait, peer, greet).await
}

async fn names_of(
    wire: &mut Wire,
    state: Options,
) -> Result<(Options, Vec<wire::ListedExport>), ClientErrorKind> {
    let (state, names) = wire.call(state, List::default()).await?;
    Ok((state, names.map_err(ClientErrorKind::Refused)?))
}

async fn describe(
    wire: &mut Wire,
    state: Options,
    listed: wire::ListedExport,
) -> Result<(Options, ListedExport), ClientErrorKind> {
    let name = listed.name;
    let (mut state, details) = wire.call(state, AskExport::info(&name)).await?;
    let told = details.as_ref().ok().and_then(|d| d.description.clone());
    let mut contexts = Vec::new();
    // Without a query all should come; an old QEMU keeps its own back then.
    for query in [None, Some("qemu:")] {
        if query.is_some() && contexts.iter().any(|c: &String| c.starts_with("qemu:")) {
            break;
        }
        let answer;
        (state, answer) = wire.call(state, ListContexts::new(&name, query)).await?;
        // A server without contexts refuses; that is the same as none.
        contexts.extend(answer.unwrap_or_default());
    }
    let export = ListedExport {
        description: told.or(Some(listed.description).filter(|text| !text.is_empty())),
        name,
        details,
        contexts,
    };
    Ok((state, export))
}

async fn in_time<T>(
    wait: Duration,
    peer: &Arc<str>,
    work: impl Future<Output = Result<T, ClientErrorKind>>,
) -> Result<T, ClientError> {
    let result = timeout(wait, work).await.unwrap_or_else(|_| {
        Err(ClientErrorKind::TimedOut {
            during: "waiting for the list of exports",
            after: wait,
        })
    });
    result.map_err(|kind| kind.at(peer, Phase::Handshake))
}

/// INFO and LIST_META_CONTEXT twice, and one to say goodbye.
const OPTIONS_PER_EXPORT: u32 = 4;
