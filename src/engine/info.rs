//! What a source offers: its exports, and the extents of its contexts.

use std::time::Duration;

use super::EngineError;
use super::source::{OpenSource, Place, SourceSpec};
use super::walk::{DIRTY, ZERO};
use crate::nbd::client::{Client, ClientOptions, Export, list};
use crate::nbd::session::BlockSize;
use crate::nbd::wire::TransmissionFlags;
use crate::range::ByteRange;

/// What is asked of a source.
#[derive(Clone, Debug)]
pub struct InfoRequest {
    /// The source; an NBD URI without an export's name asks about all exports.
    pub source: SourceSpec,
    /// Whether to walk the extents.
    pub map: bool,
    /// A bitmap whose dirty bytes are counted.
    pub bitmap: Option<String>,
}

/// What a source offers.
#[derive(Clone, Debug)]
pub struct InfoOutcome {
    /// The source as the user named it.
    pub source: String,
    /// Its exports.
    pub exports: Vec<ExportInfo>,
    /// The extents of each context, where they were asked for.
    pub maps: Option<Vec<ContextMap>>,
    /// The bitmap that was asked about.
    pub bitmap: Option<BitmapInfo>,
}

/// One export.
#[derive(Clone, Debug)]
pub struct ExportInfo {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The server's text for people.
    pub description: Option<String>,
    /// The names of its transmission flags.
    pub flags: Vec<&'static str>,
    /// Its block sizes.
    pub block_size: BlockSizeInfo,
    /// The metadata contexts that it offers.
    pub contexts: Vec<String>,
    /// Whether the server speaks structured replies; `None` where only its list was asked for.
    pub structured_replies: Option<bool>,
    /// Whether the connection is encrypted.
    pub tls: bool,
}

/// The block sizes of an export, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizeInfo {
    /// The least, to whose multiples requests are aligned.
    pub minimum: u32,
    /// What works best.
    pub preferred: u32,
    /// The longest request.
    pub maximum: u32,
}

/// The extents of one context, over the whole disk, neighbours with different flags.
#[derive(Clone, Debug, Default)]
pub struct ContextMap {
    /// The context's name.
    pub context: String,
    /// Each extent with its flags.
    pub extents: Vec<(ByteRange, u64)>,
}

/// A bitmap and the price of the next incremental.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// The bytes that it calls dirty.
    pub dirty_bytes: u64,
}

/// Asks a source what it offers.
///
/// # Errors
/// When the source cannot be reached or lacks the export, or when the bitmap is not offered.
pub async fn info(request: &InfoRequest) -> Result<InfoOutcome, EngineError> {
    let source = &request.source;
    let mut outcome = InfoOutcome {
        source: source.text().to_owned(),
        exports: listed(source).await?,
        maps: None,
        bitmap: None,
    };
    if outcome.exports.is_empty() || request.map || request.bitmap.is_some() {
        let context = request
            .bitmap
            .as_ref()
            .map(|b| format!("qemu:dirty-bitmap:{b}"));
        let contexts = [ALLOCATION.to_owned()]
            .into_iter()
            .chain(context.clone())
            .collect();
        let open = source
            .open(contexts, request.bitmap.as_deref(), 1, Duration::ZERO)
            .await?;
        let asked = ask(request, &open, context.as_deref(), &mut outcome).await;
        open.close().await;
        asked?;
    }
    Ok(outcome)
}

/// Lists a server's exports, or the one that the URI names; nothing where the server does not list it.
async fn listed(source: &SourceSpec) -> Result<Vec<ExportInfo>, EngineError> {
    let Place::Nbd(uri) = source.place() else {
        return Ok(Vec::new());
    };
    let found = match list(uri, &ClientOptions::default()).await {
        Ok(found) => found,
        // Some servers list nothing and yet serve what is named.
        Err(error) if uri.export.is_empty() => return Err(source.unreachable(error)),
        Err(_) => return Ok(Vec::new()),
    };
    let exports = found
        .into_iter()
        .filter(|e| uri.export.is_empty() || e.name == uri.export);
    Ok(exports
        .filter_map(|e| {
            let details = e.details.ok()?;
            Some(ExportInfo {
                name: e.name,
                size_bytes: details.size,
                description: e.description,
                flags: flag_names(details.flags),
                block_size: details.block_size.into(),
                contexts: e.contexts,
                structured_replies: None,
                tls: uri.tls.is_some(),
            })
        })
        .collect())
}

async fn ask(
    request: &InfoRequest,
    open: &OpenSource,
    bitmap_context: Option<&str>,
    outcome: &mut InfoOutcome,
) -> Result<(), EngineError> {
    let export = open.client.export();
    let tls = matches!(request.source.place(), Place::Nbd(uri) if uri.tls.is_some());
    match outcome.exports.iter_mut().find(|e| e.name == export.name) {
        Some(known) => known.structured_replies = Some(export.structured),
        None => outcome.exports.push(described(export, tls)),
    }
    if let Some(context) = bitmap_context
        && export.context(context).is_none()
    {
        return Err(request
            .source
            .unreachable(format!("the export does not offer {context}")));
    }
    let maps = if export.contexts.is_empty() {
        Vec::new()
    } else {
        walk_all(&request.source, &open.client).await?
    };
    if let (Some(name), Some(context)) = (&request.bitmap, bitmap_context) {
        let extents = maps
            .iter()
            .filter(|m| m.context == context)
            .flat_map(|m| &m.extents);
        let dirty_bytes = extents
            .filter(|(_, flags)| flags & DIRTY != 0)
            .map(|(range, _)| range.len())
            .sum();
        outcome.bitmap = Some(BitmapInfo {
            name: name.clone(),
            dirty_bytes,
        });
    }
    outcome.maps = request.map.then_some(maps);
    Ok(())
}

/// Walks all contexts that were granted over the whole disk.
async fn walk_all(source: &SourceSpec, client: &Client) -> Result<Vec<ContextMap>, EngineError> {
    let export = client.export();
    let mut maps: Vec<ContextMap> = export
        .contexts
        .iter()
        .map(|c| ContextMap {
            context: c.clone(),
            extents: Vec::new(),
        })
        .collect();
    let mut from = 0;
    while let Some(rest) = ByteRange::new(from, export.size_bytes).filter(|r| !r.is_empty()) {
        let answered = client
            .block_status(rest)
            .await
            .map_err(|e| source.unreachable(e))?;
        for context in answered {
            let Some(map) = maps.get_mut(context.context) else {
                continue;
            };
            context
                .extents
                .iter()
                .for_each(|e| map.add(e.range, e.flags));
        }
        let reached = maps
            .iter()
            .map(ContextMap::end)
            .min()
            .unwrap_or(export.size_bytes);
        if reached <= from {
            return Err(source.unreachable(format!(
                "the server's extents do not advance past {from:#x}"
            )));
        }
        from = reached;
    }
    Ok(maps)
}

impl ContextMap {
    /// What flags mean in this context.
    pub fn describe(&self, flags: u64) -> String {
        let words: &[&str] = match self.context.as_str() {
            ALLOCATION => match flags & (ZERO | HOLE) {
                0 => &["data"],
                HOLE => &["hole", "unknown content"],
                ZERO => &["zero"],
                _ => &["hole", "zero"],
            },
            name if name.starts_with("qemu:dirty-bitmap:") => {
                if flags & DIRTY != 0 {
                    &["dirty"]
                } else {
                    &["clean"]
                }
            }
            _ => return format!("{flags:#x}"),
        };
        words.join(",")
    }

    fn end(&self) -> u64 {
        self.extents.last().map_or(0, |(range, _)| range.end())
    }

    /// Adds what lies behind the end, since an answer may repeat what is known.
    fn add(&mut self, range: ByteRange, flags: u64) {
        let Some(news) = ByteRange::new(self.end(), range.end()).filter(|r| !r.is_empty()) else {
            return;
        };
        match self.extents.last_mut() {
            Some((last, same)) if *same == flags => {
                *last = ByteRange::new(last.start(), news.end()).unwrap_or(*last);
            }
            _ => self.extents.push((news, flags)),
        }
    }
}

fn described(export: &Export, tls: bool) -> ExportInfo {
    ExportInfo {
        name: export.name.clone(),
        size_bytes: export.size_bytes,
        description: export.description.clone(),
        flags: flag_names(export.flags),
        block_size: export.block_size.into(),
        contexts: export.contexts.clone(),
        structured_replies: Some(export.structured),
        tls,
    }
}

impl From<BlockSize> for BlockSizeInfo {
    fn from(size: BlockSize) -> Self {
        Self {
            minimum: size.min(),
            preferred: size.preferred(),
            maximum: size.max(),
        }
    }
}

fn flag_names(flags: TransmissionFlags) -> Vec<&'static str> {
    const NAMES: [(TransmissionFlags, &str); 11] = [
        (TransmissionFlags::READ_ONLY, "read-only"),
        (TransmissionFlags::SEND_FLUSH, "flush"),
        (TransmissionFlags::SEND_FUA, "fua"),
        (TransmissionFlags::ROTATIONAL, "rotational"),
        (TransmissionFlags::SEND_TRIM, "trim"),
        (TransmissionFlags::SEND_WRITE_ZEROES, "write-zeroes"),
        (TransmissionFlags::SEND_DF, "df"),
        (TransmissionFlags::CAN_MULTI_CONN, "multi-conn"),
        (TransmissionFlags::SEND_CACHE, "cache"),
        (TransmissionFlags::SEND_FAST_ZERO, "fast-zero"),
        (
            TransmissionFlags::BLOCK_STATUS_PAYLOAD,
            "block-status-payload",
        ),
    ];
    NAMES
        .iter()
        .filter(|(flag, _)| flags.has(*flag))
        .map(|(_, name)| *name)
        .collect()
}

const ALLOCATION: &str = "base:allocation";
/// Bit 0 of `base:allocation`.
const HOLE: u64 = 1;
