//! The pull of a model that is in several files on a hub.
//!
//! Each part is downloaded as any file is, and stays under the name of an unfinished download: it is of no use to anybody alone. When all
//! are here, they are joined into a content, and removed once that is in the index. A pull that was ended at any moment goes on
//! with the parts that are here; their checksums are compared once more.

use std::path::PathBuf;

use super::{
    HubConfig, OnPullEvent, PullEvent,
    client::{Client, RemoteFile},
    layout::RepoCache,
    repo::Repo,
    select::SplitPart,
    transfer,
};
use crate::{
    error::StoreError,
    files::{self, FileLock},
    index::{ModelEntry, Origin},
    inspect,
    reference::{HubRef, ModelName},
    store::Store,
};

/// The model that is to be pulled: its parts, all of one commit.
pub(super) struct PartsPull<'a> {
    pub(super) store: &'a Store,
    pub(super) config: &'a HubConfig,
    pub(super) client: &'a Client,
    pub(super) wanted: &'a HubRef,
    pub(super) repo: Repo,
    pub(super) commit: String,
    pub(super) on_event: OnPullEvent,
}

/// A part on the hub, and where it is to lie here.
struct Part {
    remote: RemoteFile,
    /// By this process, or one before it.
    partial: PathBuf,
    /// What another tool has downloaded, and is left where it is.
    found: Option<PathBuf>,
}

impl Part {
    fn path(&self) -> &PathBuf {
        self.found.as_ref().unwrap_or(&self.partial)
    }

    /// Bytes that are here.
    fn held_bytes(&self) -> u64 {
        std::fs::metadata(self.path()).map_or(0, |meta| meta.len()).min(self.remote.size_bytes)
    }
}

impl PartsPull<'_> {
    /// Gets the parts and joins them.
    pub(super) async fn run(self, part: &SplitPart<'_>, name: Option<ModelName>) -> Result<ModelEntry, StoreError> {
        let files = part.all();
        let place =
            HubRef { repo: self.wanted.repo.clone(), revision: self.commit.clone(), wanted: files.first().cloned() };
        let name = match name {
            Some(name) => name,
            None => ModelName::from_hub_file(&part.joined())?,
        };
        self.demand_free_name(&name, &place)?;
        let cache = RepoCache::new(self.config.cache_dir(), self.wanted);
        let parts = self.describe(&files, &cache).await?;
        if let Some(entry) = self.store.find_pulled(&place)?.filter(|entry| entry.name == name) {
            (self.on_event)(PullEvent::AlreadyThere { file: part.joined() });
            remove(&parts);
            return Ok(entry);
        }
        cache.create()?;
        let locks = parts.iter().map(|part| lock(&cache, part)).collect::<Result<Vec<_>, _>>()?;
        self.make_room(&parts, part.joined()).await?;
        self.download(&parts).await?;
        let entry = self.join(&parts, name, &place).await?;
        remove(&parts);
        parts.iter().for_each(|part| drop(std::fs::remove_file(cache.lock(&part.remote.etag))));
        drop(locks);
        Ok(entry)
    }

    async fn describe(&self, files: &[String], cache: &RepoCache) -> Result<Vec<Part>, StoreError> {
        let mut parts = Vec::new();
        for file in files {
            let what = self.wanted.to_string();
            let remote = self.client.describe(&self.wanted.repo, &self.commit, file, &what).await?;
            let found = cache.has(&remote.etag, remote.size_bytes).then(|| cache.blob(&remote.etag));
            parts.push(Part { partial: cache.partial(&remote.etag), remote, found });
        }
        Ok(parts)
    }

    /// Below the quota, and on the disks: for the parts and for what they become.
    async fn make_room(&self, parts: &[Part], file: String) -> Result<(), StoreError> {
        let total_bytes: u64 = parts.iter().map(|part| part.remote.size_bytes).sum();
        let held_bytes: u64 = parts.iter().map(Part::held_bytes).sum();
        let removed = self.store.make_room_apart(total_bytes).await?;
        if !removed.is_empty() {
            (self.on_event)(PullEvent::MadeRoom { removed });
        }
        let (cache, data) = (self.config.cache_dir(), self.store.index_path());
        let lacking_bytes = total_bytes - held_bytes;
        match files::is_same_disk(cache, &data) {
            true => self.store.demand_space(cache, lacking_bytes.saturating_add(total_bytes))?,
            false => {
                self.store.demand_space(cache, lacking_bytes)?;
                files::demand_space(&data, total_bytes, "--data-dir")?;
            }
        }
        let (licence, resumed_bytes) = (self.repo.licence.clone(), held_bytes);
        (self.on_event)(PullEvent::Chosen { file, licence, total_bytes, resumed_bytes });
        Ok(())
    }

    async fn download(&self, parts: &[Part]) -> Result<(), StoreError> {
        let total: u64 = parts.iter().map(|part| part.remote.size_bytes).sum();
        let mut before = 0;
        for part in parts {
            if part.found.is_none() {
                let on_event = |event| match event {
                    PullEvent::Progress { done_bytes, .. } => {
                        (self.on_event)(PullEvent::Progress { done_bytes: before + done_bytes, total_bytes: total });
                    }
                    event => (self.on_event)(event),
                };
                transfer::download(self.client, &part.remote, &part.partial, &on_event).await?;
            }
            before += part.remote.size_bytes;
        }
        Ok(())
    }

    async fn join(&self, parts: &[Part], name: ModelName, place: &HubRef) -> Result<ModelEntry, StoreError> {
        let (store, licence) = (self.store.clone(), self.repo.licence.clone());
        let (paths, asked_as): (Vec<_>, _) =
            (parts.iter().map(|part| part.path().clone()).collect(), place.to_string());
        let joined = tokio::task::spawn_blocking(move || {
            let content = store.join_content(&paths)?;
            // Until it has its name, nobody may take it for what is not used.
            let _held = content.hold()?;
            let mut model = inspect::check_model_file(content.path())?;
            model.licence = licence.or(model.licence);
            let origin = Origin::Mesh { digest: content.digest() };
            let entry = ModelEntry::new(name, content.path().to_owned(), origin, model);
            store.add(ModelEntry { asked_as: Some(asked_as), ..entry })
        });
        let failed = |error| StoreError::io("join the parts in", self.store.index_path())(std::io::Error::other(error));
        joined.await.map_err(failed)?
    }

    /// Refuses a name that another model has, before hours of download rather than after.
    fn demand_free_name(&self, name: &ModelName, place: &HubRef) -> Result<(), StoreError> {
        let is_it = |entry: &ModelEntry| entry.name == *name && entry.asked_as.as_ref() == Some(&place.to_string());
        match self.store.list()?.iter().any(is_it) {
            true => Ok(()),
            false => self.store.demand_unknown(name),
        }
    }
}

fn lock(cache: &RepoCache, part: &Part) -> Result<FileLock, StoreError> {
    let lock = cache.lock(&part.remote.etag);
    FileLock::try_take(&lock)?.ok_or_else(|| StoreError::PullInProgress { file: part.remote.file.clone(), lock })
}

/// Removes what was downloaded for a join that is done.
fn remove(parts: &[Part]) {
    for part in parts {
        match std::fs::remove_file(&part.partial) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %part.partial.display(), %error, "a part that was joined cannot be removed");
            }
            _ => {}
        }
    }
}
