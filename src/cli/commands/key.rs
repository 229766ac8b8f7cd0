//! `nbdbackup key`

use crate::cli::args::{Global, Key, KeyCommand, NewSecret};
use crate::cli::{config, secret};
use crate::engine::{EngineError, NewKey};
use crate::report::Outcome;

pub(super) async fn run(global: &Global, args: Key) -> Result<Outcome, EngineError> {
    // Asked for first, so that nobody types two passwords for a repository that is not there.
    let catalog = config::open(global).await?;
    match args.command {
        KeyCommand::List => catalog.keys().await,
        KeyCommand::Add(new) => catalog.add_key(new_key(new)?).await,
        KeyCommand::Remove { slot } => catalog.remove_key(slot).await,
        KeyCommand::Change(new) => catalog.change_key(new_key(new)?).await,
    }
    .map(Outcome::Key)
}

fn new_key(args: NewSecret) -> Result<NewKey, EngineError> {
    Ok(NewKey {
        secret: secret::new_secret(&args)?,
        cost: secret::cost(args.cost.argon2_memory, args.cost.argon2_passes)?,
        label: args.label,
    })
}
