//! Where passwords and key files come from: files, commands, the environment, a systemd credential, or a terminal.

use std::ffi::OsString;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use zeroize::Zeroizing;

use super::args::{CopyArgs, Global, NewSecret};
use crate::engine::EngineError;
use crate::repo::{PasswordCost, Secret};

/// Finds the secret that opens the repository, as far as one is given without asking.
pub(super) fn given(global: &Global) -> Result<Option<Secret>, EngineError> {
    let typed = Sources {
        file: global.password_file.clone(),
        command: global.password_command.clone(),
        key_file: global.key_file.clone(),
    };
    if let Some(secret) = typed.read()? {
        return Ok(Some(secret));
    }
    let set = Sources {
        file: variable("NBDBACKUP_PASSWORD_FILE").map(PathBuf::from),
        command: variable("NBDBACKUP_PASSWORD_COMMAND"),
        key_file: variable("NBDBACKUP_KEY_FILE").map(PathBuf::from),
    };
    if let Some(secret) = set.read()? {
        return Ok(Some(secret));
    }
    if let Some(text) = variable("NBDBACKUP_PASSWORD") {
        let text = Zeroizing::new(text.into_encoded_bytes());
        return password(&text, "NBDBACKUP_PASSWORD").map(Some);
    }
    if let Some(folder) = variable("CREDENTIALS_DIRECTORY") {
        let path = Path::new(&folder).join(CREDENTIAL);
        if path.exists() {
            return from_file(&path).map(Some);
        }
    }
    Ok(None)
}

/// Finds the secret that opens the repository which is copied to.
pub(super) fn given_for_target(args: &CopyArgs) -> Result<Option<Secret>, EngineError> {
    let typed = Sources {
        file: args.to_password_file.clone(),
        command: args.to_password_command.clone(),
        key_file: args.to_key_file.clone(),
    };
    if let Some(secret) = typed.read()? {
        return Ok(Some(secret));
    }
    let set = Sources {
        file: variable("NBDBACKUP_TO_PASSWORD_FILE").map(PathBuf::from),
        command: variable("NBDBACKUP_TO_PASSWORD_COMMAND"),
        key_file: variable("NBDBACKUP_TO_KEY_FILE").map(PathBuf::from),
    };
    if let Some(secret) = set.read()? {
        return Ok(Some(secret));
    }
    match variable("NBDBACKUP_TO_PASSWORD") {
        None => Ok(None),
        Some(text) => {
            let text = Zeroizing::new(text.into_encoded_bytes());
            password(&text, "NBDBACKUP_TO_PASSWORD").map(Some)
        }
    }
}

/// Asks for the password on a terminal; `None` where there is none.
pub(super) fn ask() -> Result<Option<Secret>, EngineError> {
    if !std::io::stdin().is_terminal() {
        return Ok(None);
    }
    let text = prompt("password of the repository: ")?;
    password(&text, "the terminal").map(Some)
}

/// Asks for a new password, twice, on a terminal; `None` where there is none.
pub(super) fn ask_new() -> Result<Option<Secret>, EngineError> {
    if !std::io::stdin().is_terminal() {
        return Ok(None);
    }
    let text = prompt("new password: ")?;
    match *prompt("new password, again: ")? == *text {
        true => password(&text, "the terminal").map(Some),
        false => Err(usage("the two passwords differ")),
    }
}

/// Finds the secret for a new key slot.
pub(super) fn new_secret(args: &NewSecret) -> Result<Secret, EngineError> {
    let typed = Sources {
        file: args.new_password_file.clone(),
        command: args.new_password_command.clone(),
        key_file: args.new_key_file.clone(),
    };
    if let Some(secret) = typed.read()? {
        return Ok(secret);
    }
    ask_new()?.ok_or_else(|| {
        usage("no new password: give --new-password-file, --new-password-command or --new-key-file")
    })
}

/// Reads what a guess at a password is to cost.
pub(super) fn cost(
    memory_bytes: Option<u64>,
    passes: Option<u32>,
) -> Result<PasswordCost, EngineError> {
    let usual = PasswordCost::default();
    let memory_kib = match memory_bytes {
        None => Some(usual.memory_kib()),
        Some(bytes) => u32::try_from(bytes >> 10).ok(),
    };
    memory_kib
        .and_then(|kib| PasswordCost::new(kib, passes.unwrap_or(usual.passes())))
        .ok_or_else(|| {
            usage("a password's cost is 1MiB to 1GiB of memory, and 1 to 16 passes over it")
        })
}

/// Places of one rank, of which one may be given.
struct Sources {
    file: Option<PathBuf>,
    command: Option<OsString>,
    key_file: Option<PathBuf>,
}

impl Sources {
    fn read(self) -> Result<Option<Secret>, EngineError> {
        match (self.file, self.command, self.key_file) {
            (None, None, None) => Ok(None),
            (Some(path), None, None) => from_file(&path).map(Some),
            (None, Some(command), None) => from_command(&command).map(Some),
            (None, None, Some(path)) => {
                let bytes = read_file(&path)?;
                let secret = Secret::key_file(bytes.to_vec());
                secret
                    .map(Some)
                    .map_err(|e| usage(&format!("{}: {e}", path.display())))
            }
            _ => Err(usage(
                "give one of a password file, a password command and a key file",
            )),
        }
    }
}

fn from_file(path: &Path) -> Result<Secret, EngineError> {
    password(&read_file(path)?, &path.display().to_string())
}

fn read_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, EngineError> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(MOST_BYTES));
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(MOST_BYTES as u64).read_to_end(&mut bytes));
    match read {
        Ok(len) if len < MOST_BYTES => Ok(bytes),
        Ok(_) => Err(usage(&format!("{} is too long", path.display()))),
        Err(e) => Err(usage(&format!("cannot read {}: {e}", path.display()))),
    }
}

/// Runs a command in the shell and takes what it writes to stdout.
fn from_command(command: &OsString) -> Result<Secret, EngineError> {
    let output = Command::new("/bin/sh")
        .arg("-c")
        .arg(command)
        .stdin(Stdio::inherit())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| usage(&format!("the password command cannot be run: {e}")))?;
    let text = Zeroizing::new(output.stdout);
    match output.status.success() {
        true => password(&text, "the password command"),
        false => Err(usage(&format!(
            "the password command failed: {}",
            output.status
        ))),
    }
}

/// Takes a password without the end of its line.
fn password(text: &[u8], from: &str) -> Result<Secret, EngineError> {
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    Secret::password(text.to_vec()).map_err(|e| usage(&format!("{e}: it came from {from}")))
}

fn prompt(words: &str) -> Result<Zeroizing<Vec<u8>>, EngineError> {
    rpassword::prompt_password(words)
        .map(|text| Zeroizing::new(text.into_bytes()))
        .map_err(|e| usage(&format!("no password came from the terminal: {e}")))
}

fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

fn usage(text: &str) -> EngineError {
    EngineError::Usage(text.to_owned())
}

const CREDENTIAL: &str = "nbdbackup.password";

/// Far above any password or key file.
const MOST_BYTES: usize = 1 << 20;
