//! NBD URIs: where a server is, which export is meant, and what TLS needs.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use super::session::limits;

/// The place, export and TLS settings that an NBD URI names (the NBD project's `uri.md`).
///
/// ```
/// use nbdbackup::nbd::uri::{Endpoint, NbdUri};
/// let uri: NbdUri = "nbd+unix:///disk0?socket=/run/qemu.sock".parse().unwrap();
/// assert_eq!(uri.endpoint, Endpoint::Unix("/run/qemu.sock".into()));
/// assert_eq!(uri.export, "disk0");
/// assert_eq!(uri.to_string(), "nbd+unix:///disk0?socket=/run/qemu.sock");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// Where the server listens.
    pub endpoint: Endpoint,
    /// The export's name; empty for the server's default.
    pub export: String,
    /// What TLS needs; `None` for the schemes without TLS.
    pub tls: Option<TlsParameters>,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// A host name or address, IPv6 without brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

/// The TLS settings of an `nbds` URI.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsParameters {
    /// The folder that holds `ca-cert.pem`, `client-cert.pem` and `client-key.pem`.
    pub certificates: Option<PathBuf>,
    /// The file that holds pre-shared keys.
    pub psk_file: Option<PathBuf>,
    /// The name to look for in the server's certificate, if not the host's.
    pub hostname: Option<String>,
    /// The identity that goes with a pre-shared key.
    pub username: Option<String>,
}

/// A text that is no usable NBD URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// The scheme is none of NBD's.
    #[error(
        "{0:?} is no NBD URI: it has to start with nbd://, nbds://, nbd+unix:// or nbds+unix://"
    )]
    Scheme(String),
    /// A Unix scheme without a socket.
    #[error("an NBD URI for a Unix socket needs ?socket=PATH")]
    NoSocket,
    /// A parameter that the scheme does not have.
    #[error("parameter {0:?} does not go with this NBD URI's scheme")]
    Misplaced(&'static str),
    /// A parameter given twice or without a value.
    #[error("parameter {0:?} is empty or given twice")]
    Parameter(&'static str),
    /// A host that could pass for an option or is malformed.
    #[error("{0:?} is no host name")]
    Host(String),
    /// A port that is no number up to 65535.
    #[error("{0:?} is no TCP port")]
    Port(String),
    /// A percent sign without two hexadecimal digits.
    #[error("{0:?} has a % that two hexadecimal digits do not follow")]
    Percent(String),
    /// A name that is not UTF-8, holds a zero byte or is too long.
    #[error("{0} is not UTF-8, holds a zero byte or is longer than {max} bytes", max = limits::MAX_STRING)]
    Name(&'static str),
    /// A host where none may stand.
    #[error("an NBD URI for a Unix socket has no host, but this one has {0:?}")]
    HostWithSocket(String),
    /// A fragment.
    #[error("an NBD URI has no #fragment; write # in a name as %23")]
    Fragment,
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let scheme_error = || UriError::Scheme(text.to_owned());
        let (scheme, rest) = text.split_once("://").ok_or_else(scheme_error)?;
        let (unix, secure) = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => (false, false),
            "nbds" => (false, true),
            "nbd+unix" => (true, false),
            "nbds+unix" => (true, true),
            _ => return Err(scheme_error()),
        };
        if rest.contains('#') {
            return Err(UriError::Fragment);
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        let parameters = Parameters::parse(query)?;
        let endpoint = if unix {
            if !host.is_empty() {
                return Err(UriError::HostWithSocket(host.to_owned()));
            }
            Endpoint::Unix(path_of(parameters.socket.ok_or(UriError::NoSocket)?))
        } else {
            if parameters.socket.is_some() {
                return Err(UriError::Misplaced("socket"));
            }
            tcp(host)?
        };
        let username = user.map(|user| name("user name", user)).transpose()?;
        let tls = TlsParameters {
            certificates: parameters.certificates.map(path_of),
            psk_file: parameters.psk_file.map(path_of),
            hostname: parameters.hostname,
            username: username.filter(|user| !user.is_empty()),
        };
        Ok(Self {
            endpoint,
            export: name("export name", path)?,
            tls: match secure {
                true => Some(tls),
                false if tls.certificates.is_some() => {
                    return Err(UriError::Misplaced("tls-certificates"));
                }
                false if tls.psk_file.is_some() => {
                    return Err(UriError::Misplaced("tls-psk-file"));
                }
                false if tls.hostname.is_some() => {
                    return Err(UriError::Misplaced("tls-hostname"));
                }
                false => None,
            },
        })
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let secure = if self.tls.is_some() { "s" } else { "" };
        let tls = self.tls.clone().unwrap_or_default();
        let user = match &tls.username {
            Some(user) => encoded(user.as_bytes(), b"") + "@",
            None => String::new(),
        };
        let export = encoded(self.export.as_bytes(), b"/:");
        let mut query = Vec::new();
        match &self.endpoint {
            Endpoint::Unix(socket) => {
                write!(f, "nbd{secure}+unix://{user}/{export}")?;
                query.push(("socket", encoded(socket.as_os_str().as_bytes(), b"/:")));
            }
            endpoint @ Endpoint::Tcp { .. } => {
                write!(f, "nbd{secure}://{user}{endpoint}/{export}")?;
            }
        }
        if let Some(path) = &tls.certificates {
            let value = encoded(path.as_os_str().as_bytes(), b"/:");
            query.push(("tls-certificates", value));
        }
        if let Some(path) = &tls.psk_file {
            query.push(("tls-psk-file", encoded(path.as_os_str().as_bytes(), b"/:")));
        }
        if let Some(hostname) = &tls.hostname {
            query.push(("tls-hostname", encoded(hostname.as_bytes(), b":")));
        }
        for (at, (key, value)) in query.iter().enumerate() {
            write!(f, "{}{key}={value}", if at == 0 { '?' } else { '&' })?;
        }
        Ok(())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp { host, port } => {
                match host.contains(':') {
                    true => write!(f, "[{host}]")?,
                    false => write!(f, "{host}")?,
                }
                match *port {
                    DEFAULT_PORT => Ok(()),
                    port => write!(f, ":{port}"),
                }
            }
        }
    }
}

/// The port of an NBD server that names none.
pub const DEFAULT_PORT: u16 = 10809;

#[derive(Default)]
struct Parameters {
    socket: Option<Vec<u8>>,
    certificates: Option<Vec<u8>>,
    psk_file: Option<Vec<u8>>,
    hostname: Option<String>,
}

impl Parameters {
    /// Takes the parameters that NBD knows and passes over the others, as the standard wants.
    fn parse(query: &str) -> Result<Self, UriError> {
        let mut found = Self::default();
        for pair in query.split(['&', ';']) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "socket" => set(&mut found.socket, "socket", decoded(value)?)?,
                "tls-certificates" => {
                    set(&mut found.certificates, "tls-certificates", decoded(value)?)?;
                }
                "tls-psk-file" => set(&mut found.psk_file, "tls-psk-file", decoded(value)?)?,
                "tls-hostname" => {
                    let value = name("tls-hostname", value)?;
                    if value.is_empty() || found.hostname.replace(value).is_some() {
                        return Err(UriError::Parameter("tls-hostname"));
                    }
                }
                _ => {}
            }
        }
        Ok(found)
    }
}

fn set(slot: &mut Option<Vec<u8>>, key: &'static str, value: Vec<u8>) -> Result<(), UriError> {
    if value.is_empty() || value.contains(&0) || slot.replace(value).is_some() {
        return Err(UriError::Parameter(key));
    }
    Ok(())
}

fn tcp(authority: &str) -> Result<Endpoint, UriError> {
    let host_error = || UriError::Host(authority.to_owned());
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or_else(host_error)?;
        host.parse::<std::net::Ipv6Addr>()
            .map_err(|_| host_error())?;
        match rest.strip_prefix(':') {
            None if !rest.is_empty() => return Err(host_error()),
            port => (host.to_owned(), port),
        }
    } else {
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        };
        (name("host", host)?, port)
    };
    // A name like `-oProxyCommand=` must never reach a program's command line.
    let lawful = |c: char| c.is_alphanumeric() || "-._:".contains(c);
    if host.starts_with('-') || !host.chars().all(lawful) {
        return Err(host_error());
    }
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(text) if text.bytes().all(|b| b.is_ascii_digit()) => {
            text.parse().map_err(|_| UriError::Port(text.to_owned()))?
        }
        Some(text) => return Err(UriError::Port(text.to_owned())),
    };
    let host = match host.as_str() {
        "" => "localhost".to_owned(),
        _ => host,
    };
    Ok(Endpoint::Tcp { host, port })
}

fn path_of(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
}

fn name(what: &'static str, text: &str) -> Result<String, UriError> {
    String::from_utf8(decoded(text)?)
        .ok()
        .filter(|name| name.len() <= limits::MAX_STRING && !name.contains('\0'))
        .ok_or(UriError::Name(what))
}

fn decoded(text: &str) -> Result<Vec<u8>, UriError> {
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16));
        match (digit(), digit()) {
            (Some(high), Some(low)) => out.push((high << 4 | low) as u8),
            _ => return Err(UriError::Percent(text.to_owned())),
        }
    }
    Ok(out)
}

fn encoded(bytes: &[u8], also_plain: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) || also_plain.contains(byte) {
            out.push(char::from(*byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> NbdUri {
        let uri: NbdUri = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(uri.to_string().parse::<NbdUri>().unwrap(), uri, "{text}");
        uri
    }

    fn tcp_of(text: &str) -> (String, u16) {
        match parse(text).endpoint {
            Endpoint::Tcp { host, port } => (host, port),
            Endpoint::Unix(_) => panic!("{text} is no TCP endpoint"),
        }
    }

    #[test]
    fn tcp_forms() {
        assert_eq!(tcp_of("nbd://example.com"), ("example.com".into(), 10809));
        assert_eq!(
            tcp_of("nbd://example.com:/x"),
            ("example.com".into(), 10809)
        );
        assert_eq!(tcp_of("NBD://h:1/x"), ("h".into(), 1));
        assert_eq!(tcp_of("nbd://[::1]:2000/x"), ("::1".into(), 2000));
        assert_eq!(tcp_of("nbds://[fe80::1]"), ("fe80::1".into(), 10809));
        assert_eq!(tcp_of("nbd:///x"), ("localhost".into(), 10809));
    }

    #[test]
    fn export_names_are_decoded_behind_the_first_slash() {
        for (text, export) in [
            ("nbd://h", ""),
            ("nbd://h/", ""),
            ("nbd://h/a%20b%2Fc%3F%23%25", "a b/c?#%"),
            ("nbd://h//a/b", "/a/b"),
            ("nbd://h/%C3%A4", "\u{e4}"),
            ("nbd://h/a+b", "a+b"),
        ] {
            assert_eq!(parse(text).export, export, "{text}");
        }
    }

    #[test]
    fn unix_and_tls_forms() {
        let uri =
            parse("nbds+unix://alice@/disk?socket=/a%20b&tls-psk-file=/k&tls-hostname=h&unknown=1");
        assert_eq!(uri.endpoint, Endpoint::Unix("/a b".into()));
        let tls = uri.tls.unwrap();
        assert_eq!(tls.username.as_deref(), Some("alice"));
        assert_eq!(tls.psk_file, Some("/k".into()));
        assert_eq!(tls.hostname.as_deref(), Some("h"));
        let uri = parse("nbds://h/?tls-certificates=/certs");
        assert_eq!(uri.tls.unwrap().certificates, Some("/certs".into()));
        assert_eq!(
            parse("nbd+unix:///?socket=/%ff").endpoint,
            Endpoint::Unix(path_of(b"/\xff".to_vec()))
        );
    }

    #[test]
    fn texts_that_are_no_usable_uri_are_refused() {
        for text in [
            "",
            "disk.qcow2",
            "http://h/",
            "nbd+ssh://h/x",
            "nbd://-oProxyCommand=x/",
            "nbd://%2DoProxyCommand/",
            "nbd://a b/",
            "nbd://[::1/x",
            "nbd://[::1]x/",
            "nbd://[nonsense]/",
            "nbd://h:65536/",
            "nbd://h:+1/",
            "nbd://h/%",
            "nbd://h/%g0",
            "nbd://h/%ff",
            "nbd://h/a%00b",
            "nbd://h/x#y",
            "nbd://h/x?socket=/s",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd+unix:///x?socket=/a&socket=/b",
            "nbd+unix://h/x?socket=/a",
            "nbd://h/?tls-psk-file=/k",
        ] {
            assert!(text.parse::<NbdUri>().is_err(), "{text}");
        }
    }
}
