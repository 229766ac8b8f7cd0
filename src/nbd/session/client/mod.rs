//! The client's half of a session.
//!
//! [`AwaitGreeting`] -> [`Options`] -> [`Sent`] one option after the other -> after `GO` the transmission phase, whose
//! requests lie in [`InFlight`] and whose replies [`Replies`] checks.

mod coverage;
mod greeting;
mod in_flight;
mod info;
mod list;
mod meta;
mod options;
mod replies;
mod start_tls;

pub use greeting::{AwaitExportName, AwaitGreeting, NotFixed, Opened};
pub use in_flight::{Asked, Finished, InFlight, Outcome, RequestFailed};
pub use info::{AskExport, ExportDetails};
pub use list::{Abort, ExtendedHeaders, List, StructuredReply};
pub use meta::{ListContexts, SetContexts};
pub use options::{Heard, OptionCall, Options, Sent};
pub use replies::{Event, Replies};
pub use start_tls::StartTls;
