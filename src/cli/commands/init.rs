//! `nbdbackup init`

use crate::cli::args::{Encryption, Global, Init};
use crate::cli::{config, secret};
use crate::engine::{Catalog, EngineError, InitRequest};
use crate::repo::{PasswordCost, Secret, SecretKind};
use crate::report::Outcome;

pub(super) async fn run(global: &Global, args: &Init) -> Result<Outcome, EngineError> {
    let compression = match &args.compression.compression {
        Some(text) => Some(config::compression(text)?),
        None => None,
    };
    let path = config::repository_path(global)?;
    let request = InitRequest {
        chunk_bytes: args.chunk_size,
        compression,
        secret: secret_of(global, args)?,
        parity: args.parity,
    };
    Catalog::init(path, request).await.map(Outcome::Init)
}

/// Finds the secret of a new repository; `None` only where that is said aloud.
fn secret_of(global: &Global, args: &Init) -> Result<Option<(Secret, PasswordCost)>, EngineError> {
    let usage = |text: &str| Err(EngineError::Usage(text.to_owned()));
    let given = secret::given(global)?;
    if args.encryption == Some(Encryption::None) {
        return match given {
            None => Ok(None),
            Some(_) => usage("a password or key file is given, but --encryption none takes none"),
        };
    }
    let secret = match given {
        Some(secret) => secret,
        None if args.encryption == Some(Encryption::KeyFile) => {
            return usage("no key file: give --key-file or set NBDBACKUP_KEY_FILE");
        }
        None => match secret::ask_new()? {
            Some(secret) => secret,
            None => {
                return usage(
                    "no password: give --password-file, --password-command or --key-file, or say --encryption none",
                );
            }
        },
    };
    match (args.encryption, secret.kind()) {
        (Some(Encryption::Password), SecretKind::KeyFile) => {
            usage("a key file is given, but --encryption password wants a password")
        }
        (Some(Encryption::KeyFile), SecretKind::Password) => {
            usage("a password is given, but --encryption key-file wants a key file")
        }
        _ => {
            let cost = secret::cost(args.cost.argon2_memory, args.cost.argon2_passes)?;
            Ok(Some((secret, cost)))
        }
    }
}
