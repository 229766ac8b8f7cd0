//! What a fuzzer calls with any bytes, for both state machines: as a client's whole life, and as a server's.

use super::client::{
    AskExport, Asked, AwaitGreeting, Event, ExtendedHeaders, Heard, InFlight, Opened, OptionCall,
    Options, Outcome, Replies, SetContexts, StructuredReply,
};
use super::server::{Catalog, Handshake, Offer, Rules, Step, Tls, Verdict};
use super::{BlockSize, Refused, SessionError, limits};
use crate::nbd::wire::{Dialect, TransmissionFlags};
use crate::range::ByteRange;

/// Takes bytes as all that a client sends to a server, to one without TLS and to one that requires it.
pub fn server(data: &[u8]) {
    server_life(Tls::Off, data);
    server_life(Tls::Required, data);
}

fn server_life(tls: Tls, data: &[u8]) {
    let Ok(catalog) = Catalog::new(vec![offer("d", 1 << 20), offer("other", 1 << 50)]) else {
        return;
    };
    let mut bytes = Bytes(data);
    let mut out = Vec::new();
    let mut state = Handshake::start(tls, &mut out);
    let mut secure = tls == Tls::Off;
    let agreed = loop {
        let wanted = state.wanted();
        assert!(wanted > 0 && wanted <= limits::MAX_OPTION as usize);
        let Some(taken) = bytes.take(wanted) else {
            return;
        };
        out.clear();
        match state.handle(taken, &catalog, &mut out) {
            Ok(Step::Next(next)) => state = next,
            Ok(Step::StartTls(next)) => {
                assert!(tls == Tls::Required && !secure);
                secure = true;
                state = next;
            }
            Ok(Step::Transmit(agreed)) => break agreed,
            Ok(Step::Close) | Err(_) => return,
        }
    };
    assert!(secure, "an export was told of before TLS");
    let Some(offer) = catalog.offers().get(agreed.export) else {
        panic!("an export that is not offered was agreed on");
    };
    let rules = Rules {
        dialect: agreed.dialect,
        size: offer.size,
        block_size: offer.block_size,
        flags: offer.flags(agreed.dialect),
        contexts: agreed.contexts,
    };
    while let Some(header) = bytes.take(rules.wanted()) {
        let Ok(judged) = rules.judge(header) else {
            return;
        };
        assert!(judged.payload <= u64::from(offer.block_size.max()).saturating_mul(2));
        let Some(payload) = usize::try_from(judged.payload)
            .ok()
            .and_then(|length| bytes.take(length))
        else {
            return;
        };
        let verdict = match judged.verdict {
            Verdict::StatusOf { offset, one } => rules.judge_filter(offset, one, payload),
            verdict => verdict,
        };
        let disk = ByteRange::first(offer.size);
        match verdict {
            Verdict::Read { range, .. } => {
                assert!(disk.contains(range));
                assert!(range.len() <= u64::from(offer.block_size.max()));
            }
            Verdict::Write { range, .. } => {
                assert!(disk.contains(range) && range.len() == judged.payload);
            }
            Verdict::Zero { range, .. } | Verdict::Trim { range, .. } => {
                assert!(disk.contains(range));
            }
            Verdict::Status {
                range, contexts, ..
            } => {
                assert!(disk.contains(range) && !range.is_empty());
                assert!(contexts.iter().all(|at| rules.contexts.contains(at)));
            }
            Verdict::StatusOf { .. } => panic!("a filter was judged to be one to be judged"),
            Verdict::Flush | Verdict::Nothing | Verdict::Refuse(..) => {}
            Verdict::Disconnect => return,
        }
    }
}

/// Takes bytes as all that a server sends to a client, which makes some requests at once.
pub fn client(data: &[u8]) {
    // A fault is what most bytes lead to.
    let _ = client_life(&mut Bytes(data));
}

fn client_life(bytes: &mut Bytes<'_>) -> Option<()> {
    let mut out = Vec::new();
    let greeting = bytes.take(AwaitGreeting.wanted())?;
    let opened = AwaitGreeting.handle(greeting, &mut out).ok()?;
    let Opened::Fixed(options) = opened else {
        return None;
    };
    let (mut options, extended) = call(bytes, options, ExtendedHeaders)?;
    if extended.is_err() {
        options = call(bytes, options, StructuredReply)?.0;
    }
    let names = ["base:allocation", "qemu:dirty-bitmap:b"].map(str::to_owned);
    let contexts;
    (options, contexts) = call(bytes, options, SetContexts::new("d", &names))?;
    let contexts = contexts.unwrap_or_default();
    let (options, details) = call(bytes, options, AskExport::go("d"))?;
    let details = details.ok()?;
    assert!(details.size <= limits::MAX_EXPORT_SIZE);
    let dialect = options.dialect();
    let mut replies = Replies::new(dialect, &contexts, details.block_size);
    let mut requests = InFlight::default();
    let range = ByteRange::new(512, 512 + 4096)?;
    let only = (dialect == Dialect::Extended && !contexts.is_empty()).then_some(0);
    for asked in [
        Asked::Read(range),
        Asked::Status { range, only: None },
        Asked::Status { range, only },
        Asked::Effect {
            command: crate::nbd::wire::Command::WRITE,
            range,
        },
        Asked::Read(range),
    ] {
        requests.start(asked, asked);
    }
    loop {
        let wanted = replies.wanted();
        assert!(wanted > 0 && wanted as u64 <= limits::MAX_STATUS_PAYLOAD);
        let taken = bytes.take(wanted)?;
        let mut event = replies.handle(taken, &mut requests).ok()?;
        while let Event::Data { at, length, .. } = event {
            assert!(length > 0 && at.checked_add(length)? <= range.len());
            bytes.take(usize::try_from(length).ok()?)?;
            event = replies.data_taken(&mut requests).ok()?;
        }
        let Event::Finished(finished) = event else {
            continue;
        };
        match (finished.owner, finished.outcome) {
            (_, Outcome::Failed(_)) | (Asked::Effect { .. }, Outcome::Done) => {}
            (Asked::Read(_), Outcome::Read(holes)) => {
                assert!(holes.iter().all(|hole| range.contains(*hole)));
                let apart = |pair: &[ByteRange]| matches!(pair, [a, b] if a.end() < b.start());
                assert!(holes.windows(2).all(apart));
            }
            (Asked::Status { only, .. }, Outcome::Status(lists)) => {
                assert_eq!(lists.len(), only.map_or(contexts.len(), |_| 1));
                for list in lists {
                    let mut at = range.start();
                    for extent in &list {
                        assert_eq!(extent.range.start(), at);
                        at = extent.range.end();
                        assert!(!extent.range.is_empty() && at <= range.end());
                    }
                    assert!(at > range.start());
                }
            }
            (asked, outcome) => panic!("{asked:?} ended as {outcome:?}"),
        }
    }
}

fn call<C: OptionCall>(
    bytes: &mut Bytes<'_>,
    options: Options,
    call: C,
) -> Option<(Options, Result<C::Answer, Refused>)> {
    let mut sent = options.send(call, &mut Vec::new()).ok()?;
    loop {
        let wanted = sent.wanted();
        assert!(wanted > 0 && wanted <= limits::MAX_OPTION_REPLY as usize);
        let heard: Result<_, SessionError> = sent.handle(bytes.take(wanted)?);
        match heard.ok()? {
            Heard::More(more) => sent = more,
            Heard::Done(options, answer) => return Some((options, answer)),
        }
    }
}

fn offer(name: &str, size: u64) -> Offer {
    Offer {
        name: name.to_owned(),
        description: Some("any text".to_owned()),
        size,
        block_size: BlockSize::DEFAULT,
        contexts: vec![
            "base:allocation".to_owned(),
            "qemu:dirty-bitmap:b".to_owned(),
        ],
        abilities: TransmissionFlags::SEND_TRIM
            | TransmissionFlags::SEND_WRITE_ZEROES
            | TransmissionFlags::SEND_FAST_ZERO,
    }
}

/// Bytes of a peer that are not taken yet.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}
