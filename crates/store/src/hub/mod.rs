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
//! A [`HubFile`] gives ranges of a file, to whoever can verify them otherwise: a hub is one more source for what comes from peers.

mod client;
mod config;
pub(crate) mod layout;
mod range;
pub(crate) mod select;
mod transfer;

use std::{sync::Arc, time::Duration};

use self::{client::Client, layout::RepoCache};
pub use self::{
    config::HubConfig,
    range::{HubFile, RangeError},
};
use crate::{
    error::StoreError,
    files::{self, FileLock},
    index::{ModelEntry, Origin},
    inspect,
    reference::{HubRef, ModelName},
    store::{Store, unix_now_s},
};

/// What a pull is doing, for a progress display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullEvent {
    /// The file is chosen.
    Chosen {
        /// Path in the repository.
        file: String,
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
        let (commit, file) = client.choose(wanted).await?;
        let name = match name {
            Some(name) => name,
            None => ModelName::from_file_name(file.rsplit('/').next().unwrap_or(&file))?,
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
            files::demand_space(&partial, remote.size_bytes - resumed_bytes, "HF_HOME")?;
            on_event(PullEvent::Chosen { file: file.clone(), total_bytes: remote.size_bytes, resumed_bytes });
            transfer::download(&client, &remote, &partial, on_event.as_ref()).await?;
            cache.complete(&remote.etag)?;
            true
        };
        cache.link(&remote.etag, &commit, &file)?;
        inspect::check_model_file(&path)?;
        let origin = Origin::Hub {
            repo: wanted.repo.clone(),
            revision: wanted.revision.clone(),
            commit,
            file,
            sha256: remote.sha256,
            downloaded,
        };
        self.add(ModelEntry {
            name,
            path,
            size_bytes: remote.size_bytes,
            added_unix_s: unix_now_s(),
            origin,
            pinned: false,
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
