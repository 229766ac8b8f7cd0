//! The passwords and key files of a repository: listed, added, removed and changed.

use std::sync::Arc;

use super::catalog::Catalog;
use super::error::EngineError;
use super::workers::blocking;
use crate::repo::{PasswordCost, RepoError, Repository, Secret, SlotInfo};

/// A password or key file that is to open a repository.
#[derive(Debug)]
pub struct NewKey {
    /// The password or the key file's content.
    pub secret: Secret,
    /// What a guess at it is to cost, where it is a password.
    pub cost: PasswordCost,
    /// What to call it.
    pub label: Option<String>,
}

/// What a command on keys did, and the keys there are now.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyOutcome {
    /// Where the repository lies.
    pub repository: String,
    /// What was done.
    pub action: KeyAction,
    /// The slot that was added.
    pub added: Option<u32>,
    /// The slot that was removed.
    pub removed: Option<u32>,
    /// All slots.
    pub slots: Vec<SlotInfo>,
}

/// What is done with keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyAction {
    /// They are listed.
    List,
    /// One is added.
    Add,
    /// One is removed.
    Remove,
    /// One takes the place of the one that was used.
    Change,
}

impl KeyAction {
    /// The word for programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Change => "change",
        }
    }
}

impl Catalog {
    /// Lists the key slots.
    ///
    /// # Errors
    /// When the repository cannot be read.
    pub async fn keys(&self) -> Result<KeyOutcome, EngineError> {
        self.with_keys(KeyAction::List, |_| Ok((None, None))).await
    }

    /// Adds a key.
    ///
    /// # Errors
    /// When the repository is not encrypted, has too many slots or cannot be written.
    pub async fn add_key(&self, new: NewKey) -> Result<KeyOutcome, EngineError> {
        self.with_keys(KeyAction::Add, move |repository| {
            let slot = repository.add_key(&new.secret, new.cost, new.label.as_deref())?;
            Ok((Some(slot), None))
        })
        .await
    }

    /// Removes a key, never the last one.
    ///
    /// # Errors
    /// When there is no such slot, when it is the last, or when the repository cannot be written.
    pub async fn remove_key(&self, slot: u32) -> Result<KeyOutcome, EngineError> {
        self.with_keys(KeyAction::Remove, move |repository| {
            repository.remove_key(slot)?;
            Ok((None, Some(slot)))
        })
        .await
    }

    /// Puts a key in the place of the one that opened the repository.
    ///
    /// # Errors
    /// As for adding and removing; both keys may then be there.
    pub async fn change_key(&self, new: NewKey) -> Result<KeyOutcome, EngineError> {
        self.with_keys(KeyAction::Change, move |repository| {
            let (added, removed) =
                repository.change_key(&new.secret, new.cost, new.label.as_deref())?;
            Ok((Some(added), Some(removed)))
        })
        .await
    }

    async fn with_keys(
        &self,
        action: KeyAction,
        act: impl FnOnce(&Repository) -> Result<Slots, RepoError> + Send + 'static,
    ) -> Result<KeyOutcome, EngineError> {
        let repository = Arc::clone(self.repository());
        let ((added, removed), slots) = blocking(move || {
            let done = act(&repository)?;
            Ok((done, repository.key_slots()?))
        })
        .await?
        .map_err(self.failed())?;
        Ok(KeyOutcome {
            repository: self.path().to_owned(),
            action,
            added,
            removed,
            slots,
        })
    }
}

/// The slot that was added, and the one that was removed.
type Slots = (Option<u32>, Option<u32>);
