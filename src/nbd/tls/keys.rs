//! Files of pre-shared keys, as psktool writes them.

use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::{TlsError, files};

/// The keys of a file, each with the identity that goes with it.
pub(super) struct Keys {
    file: PathBuf,
    keys: Vec<Key>,
}

/// One pre-shared key.
pub(super) struct Key {
    pub(super) identity: Vec<u8>,
    pub(super) secret: Zeroizing<Vec<u8>>,
}

impl Keys {
    /// Reads a file, or `keys.psk` of a folder as QEMU has it.
    pub(super) fn read(path: &Path) -> Result<Self, TlsError> {
        let file = match path.is_dir() {
            true => path.join("keys.psk"),
            false => path.to_owned(),
        };
        let text = files::read_secret(&file)?;
        let keys = parse(&text).map_err(|problem| files::content(&file, problem))?;
        Ok(Self { file, keys })
    }

    /// Finds the key that goes with an identity.
    pub(super) fn find(&self, identity: &[u8]) -> Option<&Key> {
        self.keys.iter().find(|key| key.identity == identity)
    }

    /// Takes a client's key: that of the identity, or the only one there is.
    pub(super) fn take(mut self, identity: Option<&str>) -> Result<Key, TlsError> {
        match identity {
            Some(name) => {
                let found = self
                    .keys
                    .into_iter()
                    .find(|k| k.identity == name.as_bytes());
                found.ok_or_else(|| TlsError::NoKey {
                    file: self.file,
                    identity: name.to_owned(),
                })
            }
            None => match (self.keys.pop(), self.keys.len()) {
                (Some(key), 0) => Ok(key),
                (_, others) => Err(TlsError::WhichKey {
                    file: self.file,
                    count: others + 1,
                }),
            },
        }
    }
}

/// Reads `identity:key` lines; a complaint names the line, and nothing of what stands in it.
fn parse(text: &[u8]) -> Result<Vec<Key>, String> {
    let mut keys: Vec<Key> = Vec::new();
    for (at, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii_end();
        if line.is_empty() {
            continue;
        }
        let fault = |problem: &str| format!("line {}: {problem}", at + 1);
        let key = parse_line(line).map_err(fault)?;
        if keys.iter().any(|other| other.identity == key.identity) {
            return Err(fault("its identity has a key already"));
        }
        keys.push(key);
    }
    match keys.is_empty() {
        true => Err("holds no key".to_owned()),
        false => Ok(keys),
    }
}

fn parse_line(line: &[u8]) -> Result<Key, &'static str> {
    // A key has no colon, an identity may have some.
    let colon = line.iter().rposition(|byte| *byte == b':');
    let (identity, secret) = match colon {
        Some(at) => (&line[..at], &line[at + 1..]),
        None => return Err("is not of the form IDENTITY:KEY"),
    };
    let identity = match identity.strip_prefix(b"#").and_then(unhex) {
        // What psktool could not write as it is.
        Some(bytes) if !bytes.is_empty() => bytes.to_vec(),
        _ => identity.to_vec(),
    };
    if identity.is_empty() || identity.len() > LONGEST_IDENTITY || identity.contains(&0) {
        return Err("its identity is empty, longer than 255 bytes or has a zero byte");
    }
    let secret = unhex(secret).ok_or("its key is not an even number of hexadecimal digits")?;
    if secret.len() < SHORTEST_KEY || secret.len() > LONGEST_KEY {
        return Err("its key has less than 16 bytes or more than 512");
    }
    Ok(Key { identity, secret })
}

fn unhex(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (pairs, odd) = text.as_chunks::<2>();
    if !odd.is_empty() {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut bytes = Zeroizing::new(Vec::with_capacity(pairs.len()));
    for [high, low] in pairs {
        bytes.push((digit(*high)? << 4 | digit(*low)?) as u8);
    }
    Some(bytes)
}

/// OpenSSL has room for 256 bytes, the last of which is zero.
const LONGEST_IDENTITY: usize = 255;
/// 128 bits: what is shorter can be guessed by whoever has recorded a handshake.
const SHORTEST_KEY: usize = 16;
/// What OpenSSL has room for, and the longest that psktool makes.
const LONGEST_KEY: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "00112233445566778899aabbccddEEFF";

    fn parsed(text: &str) -> Vec<(Vec<u8>, usize)> {
        let keys = parse(text.as_bytes()).unwrap_or_else(|e| panic!("{text}: {e}"));
        let pairs = keys.into_iter().map(|k| (k.identity, k.secret.len()));
        pairs.collect()
    }

    #[test]
    fn lines_are_identities_and_keys() {
        let text = format!("alice:{KEY}\r\n\n  bob:{KEY}{KEY}  \n");
        let wanted = [(b"alice".to_vec(), 16), (b"  bob".to_vec(), 32)];
        assert_eq!(parsed(&text), wanted);
        let keys = parse(format!("a:{KEY}").as_bytes()).unwrap();
        assert_eq!(keys[0].secret[..3], [0, 0x11, 0x22]);
        assert_eq!(keys[0].secret[14..], [0xee, 0xff]);
    }

    #[test]
    fn identities_may_have_colons_and_be_written_in_hexadecimal() {
        assert_eq!(parsed(&format!("a:b:{KEY}"))[0].0, b"a:b");
        assert_eq!(parsed(&format!("#77653a6972:{KEY}"))[0].0, b"we:ir");
        // psktool writes these as they are.
        assert_eq!(parsed(&format!("#x:{KEY}"))[0].0, b"#x");
        assert_eq!(parsed(&format!("#:{KEY}"))[0].0, b"#");
    }

    #[test]
    fn lines_of_no_use_are_named_without_their_secrets() {
        let secret = "c0ffee";
        for (line, problem) in [
            (format!("alice{secret}"), "IDENTITY:KEY"),
            (format!("alice:{secret}"), "less than 16"),
            (format!("alice:{KEY}{secret}0"), "even number"),
            (format!("alice:{KEY}{secret}zz"), "even number"),
            (format!(":{KEY}{secret}"), "identity is empty"),
            (format!("#00:{KEY}{secret}"), "zero byte"),
            (format!("{}:{KEY}{secret}", "i".repeat(256)), "255"),
            (format!("a:{}{secret}", KEY.repeat(32)), "more than 512"),
            (format!("bob:{KEY}{secret}"), "already"),
        ] {
            let Err(text) = parse(format!("bob:{KEY}\n{line}\n").as_bytes()) else {
                panic!("{line} was taken");
            };
            assert!(text.contains(problem) && text.contains("line 2"), "{text}");
            assert!(!text.contains(secret) && !text.contains("0011"), "{text}");
        }
        assert!(parse(b"\n\n").is_err());
    }

    #[test]
    fn client_takes_the_named_key_or_the_only_one() {
        let keys = |text: &str| Keys {
            file: "f".into(),
            keys: parse(text.as_bytes()).unwrap(),
        };
        let both = format!("alice:{KEY}\nbob:{KEY}{KEY}\n");
        assert_eq!(keys(&both).take(Some("bob")).unwrap().secret.len(), 32);
        assert!(matches!(
            keys(&both).take(Some("eve")),
            Err(TlsError::NoKey { .. })
        ));
        assert!(matches!(
            keys(&both).take(None),
            Err(TlsError::WhichKey { count: 2, .. })
        ));
        let one = format!("alice:{KEY}");
        assert_eq!(keys(&one).take(None).unwrap().identity, b"alice");
    }
}
