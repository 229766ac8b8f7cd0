//! The numbers of the protocol: flags, options, commands, reply types and errors.

use std::fmt;
use std::ops::BitOr;

macro_rules! codes {
    ($(#[$meta:meta])* $name:ident($int:ty) { $($(#[$doc:meta])* $code:ident = $value:literal, $text:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$doc])* pub const $code: Self = Self($value);)*

            /// The values that have a name.
            pub const KNOWN: &'static [Self] = &[$(Self::$code),*];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(Self::$code => f.write_str($text),)*
                    Self(other) => write!(f, "{other:#x}"),
                }
            }
        }
    };
}

macro_rules! flags {
    ($(#[$meta:meta])* $name:ident($int:ty) { $($(#[$doc:meta])* $flag:ident = $bit:literal;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub $int);

        impl $name {
            /// No flag.
            pub const NONE: Self = Self(0);
            /// The flags that have a name, with it.
            pub const KNOWN: &'static [(Self, &'static str)] =
                &[$((Self(1 << $bit), stringify!($flag))),*];
            $($(#[$doc])* pub const $flag: Self = Self(1 << $bit);)*

            /// Whether each flag of `other` is set.
            pub const fn has(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Returns the flags that both hold.
            pub const fn both(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }

            /// Returns the flags without those of `other`.
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// Whether no flag is set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }

        impl BitOr for $name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

flags! {
    /// What the server offers in its greeting ("Handshake flags").
    ServerFlags(u16) {
        /// The server speaks fixed newstyle.
        FIXED_NEWSTYLE = 0;
        /// The server can leave out the 124 zero bytes.
        NO_ZEROES = 1;
    }
}

flags! {
    /// What the client takes of the server's offer ("Client flags").
    ClientFlags(u32) {
        /// The client speaks fixed newstyle.
        FIXED_NEWSTYLE = 0;
        /// The server has to leave out the 124 zero bytes.
        NO_ZEROES = 1;
    }
}

codes! {
    /// What a client asks for in the handshake ("Option types").
    OptionCode(u32) {
        /// Chooses an export and ends the handshake, with no way to refuse but to close.
        EXPORT_NAME = 1, "EXPORT_NAME";
        /// Ends the connection.
        ABORT = 2, "ABORT";
        /// Asks for the names of the exports.
        LIST = 3, "LIST";
        /// Starts TLS.
        STARTTLS = 5, "STARTTLS";
        /// Asks about an export.
        INFO = 6, "INFO";
        /// Asks about an export and enters the transmission phase.
        GO = 7, "GO";
        /// Asks for structured replies.
        STRUCTURED_REPLY = 8, "STRUCTURED_REPLY";
        /// Asks which metadata contexts there are.
        LIST_META_CONTEXT = 9, "LIST_META_CONTEXT";
        /// Chooses metadata contexts.
        SET_META_CONTEXT = 10, "SET_META_CONTEXT";
        /// Asks for extended headers.
        EXTENDED_HEADERS = 11, "EXTENDED_HEADERS";
    }
}

codes! {
    /// How a server answers an option ("Option reply types"); with bit 31 set it is an error.
    OptionReplyCode(u32) {
        /// The option is done.
        ACK = 1, "ACK";
        /// One export of a list.
        SERVER = 2, "SERVER";
        /// One piece of information about an export.
        INFO = 3, "INFO";
        /// One metadata context.
        META_CONTEXT = 4, "META_CONTEXT";
        /// The server does not know the option.
        ERR_UNSUP = 0x8000_0001, "ERR_UNSUP";
        /// The server's rules forbid it.
        ERR_POLICY = 0x8000_0002, "ERR_POLICY";
        /// The option is malformed or stands in the wrong place.
        ERR_INVALID = 0x8000_0003, "ERR_INVALID";
        /// The server's platform cannot do it.
        ERR_PLATFORM = 0x8000_0004, "ERR_PLATFORM";
        /// TLS has to come first.
        ERR_TLS_REQD = 0x8000_0005, "ERR_TLS_REQD";
        /// There is no such export.
        ERR_UNKNOWN = 0x8000_0006, "ERR_UNKNOWN";
        /// The server is about to end.
        ERR_SHUTDOWN = 0x8000_0007, "ERR_SHUTDOWN";
        /// The client has to ask for the block size.
        ERR_BLOCK_SIZE_REQD = 0x8000_0008, "ERR_BLOCK_SIZE_REQD";
        /// The option is too large.
        ERR_TOO_BIG = 0x8000_0009, "ERR_TOO_BIG";
        /// Extended headers have to come first.
        ERR_EXT_HEADER_REQD = 0x8000_000a, "ERR_EXT_HEADER_REQD";
    }
}

impl OptionReplyCode {
    /// Whether the option failed.
    pub const fn is_error(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

codes! {
    /// What a piece of information tells ("Information types").
    InfoCode(u16) {
        /// Size and transmission flags.
        EXPORT = 0, "EXPORT";
        /// The export's canonical name.
        NAME = 1, "NAME";
        /// A text for people.
        DESCRIPTION = 2, "DESCRIPTION";
        /// Least, preferred and greatest block size.
        BLOCK_SIZE = 3, "BLOCK_SIZE";
    }
}

flags! {
    /// What an export can do ("Transmission flags").
    TransmissionFlags(u16) {
        /// The other flags are meant.
        HAS_FLAGS = 0;
        /// The export refuses writes.
        READ_ONLY = 1;
        /// `FLUSH` works.
        SEND_FLUSH = 2;
        /// The flag `FUA` works.
        SEND_FUA = 3;
        /// The disk has spinning platters.
        ROTATIONAL = 4;
        /// `TRIM` works.
        SEND_TRIM = 5;
        /// `WRITE_ZEROES` works.
        SEND_WRITE_ZEROES = 6;
        /// The flag `DF` works.
        SEND_DF = 7;
        /// Several connections see one coherent disk.
        CAN_MULTI_CONN = 8;
        /// `RESIZE` works.
        SEND_RESIZE = 9;
        /// `CACHE` works.
        SEND_CACHE = 10;
        /// The flag `FAST_ZERO` works.
        SEND_FAST_ZERO = 11;
        /// `BLOCK_STATUS` may carry a payload that names contexts.
        BLOCK_STATUS_PAYLOAD = 12;
    }
}

codes! {
    /// What a client asks for in the transmission phase ("Request types").
    Command(u16) {
        /// Reads bytes.
        READ = 0, "READ";
        /// Writes bytes.
        WRITE = 1, "WRITE";
        /// Ends the connection.
        DISC = 2, "DISC";
        /// Makes what was written durable.
        FLUSH = 3, "FLUSH";
        /// Gives a range up.
        TRIM = 4, "TRIM";
        /// Asks to load a range into the cache.
        CACHE = 5, "CACHE";
        /// Zeroes a range.
        WRITE_ZEROES = 6, "WRITE_ZEROES";
        /// Asks for the extents of the chosen contexts.
        BLOCK_STATUS = 7, "BLOCK_STATUS";
        /// Changes the export's size.
        RESIZE = 8, "RESIZE";
    }
}

flags! {
    /// How a command is to be done ("Command flags").
    CommandFlags(u16) {
        /// Durable before the reply.
        FUA = 0;
        /// Zeroes must stay allocated.
        NO_HOLE = 1;
        /// The reply to a read must be one chunk.
        DF = 2;
        /// One extent per context is enough.
        REQ_ONE = 3;
        /// Zeroing must be fast, or fail.
        FAST_ZERO = 4;
        /// A payload follows the extended header.
        PAYLOAD_LEN = 5;
    }
}

flags! {
    /// What holds for a reply chunk ("Structured reply flags").
    ChunkFlags(u16) {
        /// The last chunk of its reply.
        DONE = 0;
    }
}

codes! {
    /// What a reply chunk carries ("Structured reply types"); with bit 15 set it is an error.
    ChunkType(u16) {
        /// Nothing.
        NONE = 0, "NONE";
        /// Bytes of the disk.
        OFFSET_DATA = 1, "OFFSET_DATA";
        /// A range of zeros.
        OFFSET_HOLE = 2, "OFFSET_HOLE";
        /// Extents of one context, 32 bits each.
        BLOCK_STATUS = 5, "BLOCK_STATUS";
        /// Extents of one context, 64 bits each.
        BLOCK_STATUS_EXT = 6, "BLOCK_STATUS_EXT";
        /// An error.
        ERROR = 0x8001, "ERROR";
        /// An error at an offset.
        ERROR_OFFSET = 0x8002, "ERROR_OFFSET";
    }
}

impl ChunkType {
    /// Whether the chunk says that the request failed.
    pub const fn is_error(self) -> bool {
        self.0 & 0x8000 != 0
    }
}

codes! {
    /// Why a request failed ("Error values").
    ErrorCode(u32) {
        /// No error; never sent by us as one.
        OK = 0, "no error";
        /// Not permitted.
        EPERM = 1, "EPERM (operation not permitted)";
        /// The disk failed.
        EIO = 5, "EIO (input/output error)";
        /// The server has no memory left.
        ENOMEM = 12, "ENOMEM (out of memory)";
        /// The request is not valid.
        EINVAL = 22, "EINVAL (invalid argument)";
        /// No space left, or past the end.
        ENOSPC = 28, "ENOSPC (no space left)";
        /// The reply does not fit one chunk.
        EOVERFLOW = 75, "EOVERFLOW (value too large)";
        /// Not supported, or not fast.
        ENOTSUP = 95, "ENOTSUP (not supported)";
        /// The server is about to end.
        ESHUTDOWN = 108, "ESHUTDOWN (server is shutting down)";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_codes_survive_and_are_shown() {
        assert_eq!(OptionCode(99).to_string(), "0x63");
        assert_eq!(OptionCode::GO.to_string(), "GO");
        assert!(OptionReplyCode(0x8000_0099).is_error());
        assert!(!OptionReplyCode(0x99).is_error());
        assert!(ChunkType(0x8077).is_error());
    }

    #[test]
    fn flags_combine() {
        let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY;
        assert_eq!(flags.0, 3);
        assert!(flags.has(TransmissionFlags::READ_ONLY));
        assert!(!flags.has(TransmissionFlags::READ_ONLY | TransmissionFlags::SEND_DF));
        assert_eq!(flags.without(TransmissionFlags::HAS_FLAGS).0, 2);
    }
}
