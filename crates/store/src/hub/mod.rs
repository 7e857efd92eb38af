//! Models from a hub: Hugging Face, or whatever mirror `HF_ENDPOINT` names.
//!
//! The cache layout is the hub's own, through the `hf-hub` crate, so that a file pulled here is found by every other tool and the
//! other way round. The transfer is not `hf-hub`'s. Version 0.5 of it appends whatever a server answers to its partial file, also
//! a whole file from a server that ignored the `Range` header; it compares no checksum, has no time limit for a server that
//! stalls, and does not read `HF_TOKEN`. Version 1.0 brings the Xet stack, and starts a broken download anew. So `transfer` does
//! it, over the same HTTP client that the node has for its peers.
//!
//! The order of a pull: list the repository at one commit, choose a file, ask for its size and checksum, check the
//! disk, download with resume, compare the SHA-256, and only then give the file its name in the cache.
//!
//! [`search()`] looks for models. A [`HubFile`] gives ranges of a file, to whoever can verify them otherwise: a hub is one more source for what comes from peers.

mod client;
mod config;
pub(crate) mod layout;
mod parts;
mod range;
mod repo;
mod search;
pub(crate) mod select;
mod transfer;

use std::{path::Path, sync::Arc, time::Duration};

pub(crate) use self::transfer::sha256_of;
use self::{client::Client, layout::RepoCache, parts::PartsPull};
pub use self::{
    config::HubConfig,
    range::{HubFile, RangeError, Transfer},
    search::{HUB_SEARCH_MAX, HubModel, HubModelFile, search},
};
use crate::{
    error::StoreError,
    files::{self, FileLock},
    index::{ModelEntry, Origin},
    inspect,
    quota::Download,
    reference::{HubRef, ModelName},
    store::Store,
};

/// What a pull is doing, for a progress display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullEvent {
    /// The file is chosen.
    Chosen {
        /// Path in the repository.
        file: String,
        /// Under which licence, where the hub says so.
        licence: Option<String>,
        /// Its size.
        total_bytes: u64,
        /// Bytes that an earlier, interrupted pull left.
        resumed_bytes: u64,
    },
    /// It was in the cache already, whole.
    AlreadyThere {
        /// Path in the repository.
        file: String,
    },
    /// Downloads that had to go for it, so that the store stays below its quota.
    MadeRoom {
        /// What was removed.
        removed: Vec<Download>,
    },
    /// Bytes on the disk by now. May go down, when a server cannot resume and the download starts anew.
    Progress {
        /// Bytes on the disk.
        done_bytes: u64,
        /// The file's size.
        total_bytes: u64,
    },
    /// The transfer broke off and goes on after a pause.
    Retrying {
        /// The pause.
        pause: Duration,
        /// What happened.
        why: String,
    },
}

/// Where pull events go.
pub type OnPullEvent = Arc<dyn Fn(PullEvent) + Send + Sync>;

impl Store {
    /// Gets a model from a hub and adds it under `name`, or under its file's name.
    ///
    /// Dropping the future is safe at any time: what was transferred stays and the next pull goes on from there. File writes
    /// happen on the calling task, at most one network buffer at a time.
    pub async fn pull(
        &self,
        config: &HubConfig,
        wanted: &HubRef,
        name: Option<ModelName>,
        on_event: OnPullEvent,
    ) -> Result<ModelEntry, StoreError> {
        let client = Client::new(config)?;
        let what = wanted.to_string();
        let (repo, commit) = client.repo(wanted).await?;
        let file = client.file_of(&repo, wanted)?;
        if let Some(part) = select::split_part(&file) {
            let (store, client) = (self, &client);
            return PartsPull { store, config, client, wanted, repo, commit, on_event }.run(&part, name).await;
        }
        let name = match name {
            Some(name) => name,
            None => ModelName::from_hub_file(&file)?,
        };
        self.demand_free_name(&name, &wanted.repo, &file)?;

        let remote = client.describe(&wanted.repo, &commit, &file, &what).await?;
        let cache = RepoCache::new(config.cache_dir(), wanted);
        let path = cache.snapshot(&commit, &file);
        let downloaded = if cache.has(&remote.etag, remote.size_bytes) {
            on_event(PullEvent::AlreadyThere { file: file.clone() });
            false
        } else {
            cache.create()?;
            let lock = cache.lock(&remote.etag);
            let Some(_lock) = FileLock::try_take(&lock)? else {
                return Err(StoreError::PullInProgress { file, lock });
            };
            let partial = cache.partial(&remote.etag);
            let resumed_bytes = std::fs::metadata(&partial).map_or(0, |meta| meta.len()).min(remote.size_bytes);
            let removed = self.make_room_apart(remote.size_bytes).await?;
            if !removed.is_empty() {
                on_event(PullEvent::MadeRoom { removed });
            }
            self.demand_space(&partial, remote.size_bytes - resumed_bytes)?;
            on_event(PullEvent::Chosen {
                file: file.clone(),
                licence: repo.licence.clone(),
                total_bytes: remote.size_bytes,
                resumed_bytes,
            });
            transfer::download(&client, &remote, &partial, on_event.as_ref()).await?;
            cache.complete(&remote.etag)?;
            true
        };
        cache.link(&remote.etag, &commit, &file)?;
        let mut model = inspect::check_model_file(&path)?;
        model.licence = repo.licence.or(model.licence);
        let origin = Origin::Hub {
            repo: wanted.repo.clone(),
            revision: wanted.revision.clone(),
            commit,
            file,
            sha256: remote.sha256,
            downloaded,
        };
        self.add(ModelEntry::new(name, path, origin, model))
    }

    /// Makes room for a download, on a thread on which that may take a while.
    async fn make_room_apart(&self, needs_bytes: u64) -> Result<Vec<Download>, StoreError> {
        let store = self.clone();
        let made = tokio::task::spawn_blocking(move || store.make_room(needs_bytes));
        match made.await {
            Ok(collected) => Ok(collected?.removed),
            Err(error) => {
                let failed = StoreError::io("make room in", self.index_path());
                Err(failed(std::io::Error::other(error)))
            }
        }
    }

    /// Refuses a download for which the disk has no room, with what could make some.
    fn demand_space(&self, partial: &Path, needs_bytes: u64) -> Result<(), StoreError> {
        files::demand_space(partial, needs_bytes, "HF_HOME").map_err(|error| match error {
            StoreError::NoSpace { path, needs, available, place, kept } => {
                let could_go = self.could_go().map(|names| format!(" What was downloaded earlier could go: {names}."));
                StoreError::NoSpace { path, needs, available, place, kept: kept + &could_go.unwrap_or_default() }
            }
            error => error,
        })
    }

    /// Refuses a name that another model has, before hours of download rather than after.
    fn demand_free_name(&self, name: &ModelName, wanted_repo: &str, wanted_file: &str) -> Result<(), StoreError> {
        let taken = self.list()?.into_iter().find(|entry| entry.name == *name);
        match taken {
            Some(ModelEntry { origin: Origin::Hub { repo, file, .. }, .. })
                if repo == wanted_repo && file == wanted_file =>
            {
                Ok(())
            }
            Some(entry) => Err(StoreError::NameTaken { name: name.to_string(), path: entry.path }),
            None => Ok(()),
        }
    }
}
