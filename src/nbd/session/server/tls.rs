//! Which options a server takes with, without and before TLS ("NOTLS mode", "FORCEDTLS mode").

use crate::nbd::wire::{OptionCode, OptionReplyCode};

/// How a server's connection stands towards TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// There is none.
    Off,
    /// Nothing is told before it has started.
    Required,
    /// It has started.
    On,
}

/// What may be done with an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Answer it.
    Pass,
    /// Acknowledge it and start TLS.
    Start,
    /// Hang up, since this option has no other refusal.
    HangUp,
    /// Refuse it.
    Refuse(OptionReplyCode, &'static str),
}

impl Tls {
    pub(super) const fn gate(self, option: OptionCode, length: u32) -> Gate {
        use Gate::{HangUp, Pass, Refuse, Start};
        match (self, option) {
            (Self::Off, OptionCode::STARTTLS) => Refuse(
                OptionReplyCode::ERR_POLICY,
                "this server is not set up for TLS",
            ),
            (Self::Required, OptionCode::STARTTLS) if length == 0 => Start,
            (Self::Required, OptionCode::STARTTLS) => {
                Refuse(OptionReplyCode::ERR_INVALID, "the option has no payload")
            }
            (Self::On, OptionCode::STARTTLS) => {
                Refuse(OptionReplyCode::ERR_INVALID, "TLS is on already")
            }
            (Self::Required, OptionCode::ABORT) => Pass,
            (Self::Required, OptionCode::EXPORT_NAME) => HangUp,
            (Self::Required, _) => Refuse(OptionReplyCode::ERR_TLS_REQD, "TLS has to come first"),
            (Self::Off | Self::On, _) => Pass,
        }
    }
}
