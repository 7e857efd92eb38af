//! Looking for models on a hub.

use std::sync::Arc;

use serde::Deserialize;
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    HubConfig,
    client::Client,
    repo::{Answer, Repo},
    select,
};
use crate::{error::StoreError, reference::HubRef};

/// Repositories that one search describes, at most.
pub const HUB_SEARCH_MAX: usize = 100;
/// Pages of the hub's list that are read for one search.
const PAGES_MAX: usize = 5;
/// Repositories that are looked at at the same time.
const AT_ONCE_MAX: usize = 4;
/// Longer searches find nothing.
const TEXT_BYTES_MAX: usize = 256;

/// A repository with models, as the hub describes it now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubModel {
    /// `owner/repo`.
    pub repo: String,
    /// Under which licence; `None`: the hub does not say.
    pub licence: Option<String>,
    /// Whether its licence has to be accepted on its page before it can be pulled.
    pub is_gated: bool,
    /// How often it was downloaded lately, as the hub counts.
    pub downloads: Option<u64>,
    /// Models that can be pulled, the smallest first.
    pub files: Vec<HubModelFile>,
    /// Which of `files` is taken when no quantisation is named; `None`: one has to be named.
    pub preferred: Option<usize>,
}

/// A model in a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubModelFile {
    /// Path in the repository.
    pub file: String,
    /// As its name tells, such as `Q4_K_M`.
    pub quantization: Option<String>,
    /// Its size; `None`: the hub does not say.
    pub bytes: Option<u64>,
}

/// Asks a hub for repositories with models whose name has `text` in it, those that are downloaded most first. At most `repos_max`, and
/// [`HUB_SEARCH_MAX`]; those in which there is nothing to pull are left out.
pub async fn search(config: &HubConfig, text: &str, repos_max: usize) -> Result<Vec<HubModel>, StoreError> {
    let client = Arc::new(Client::new(config)?);
    if text.len() > TEXT_BYTES_MAX {
        let why = format!("a search has {TEXT_BYTES_MAX} bytes at most");
        return Err(StoreError::BadReference { text: text.chars().take(80).collect(), why });
    }
    let repos = names(&client, text, repos_max.min(HUB_SEARCH_MAX)).await?;
    let places = Arc::new(Semaphore::new(AT_ONCE_MAX));
    let mut looks = JoinSet::new();
    for (at, repo) in repos.into_iter().enumerate() {
        let (client, places) = (Arc::clone(&client), Arc::clone(&places));
        looks.spawn(async move {
            // Nobody closes it.
            let _place = places.acquire_owned().await;
            (at, describe(&client, repo).await)
        });
    }
    let (mut found, mut failed) = (Vec::new(), None);
    for (at, outcome) in looks.join_all().await {
        match outcome {
            Ok(model) => found.push((at, model)),
            Err(error) => {
                tracing::warn!(%error, "a repository that the hub has found cannot be looked at");
                failed = Some(error);
            }
        }
    }
    // One that cannot be looked at is no reason to show none.
    if let (true, Some(error)) = (found.is_empty(), failed) {
        return Err(error);
    }
    found.sort_by_key(|(at, _)| *at);
    Ok(found.into_iter().map(|(_, model)| model).filter(|model| !model.files.is_empty()).collect())
}

/// Names of repositories, over as many pages as it takes.
async fn names(client: &Client, text: &str, repos_max: usize) -> Result<Vec<HubRef>, StoreError> {
    #[derive(Deserialize)]
    struct Named {
        id: String,
    }
    let limit = repos_max.to_string();
    let query = [("search", text), ("filter", "gguf"), ("sort", "downloads"), ("direction", "-1"), ("limit", &limit)];
    let what = format!("models with '{text}' in their name");
    let mut repos: Vec<HubRef> = Vec::new();
    let mut next = Some(client.url_with("api/models", &query)?);
    for _ in 0..PAGES_MAX {
        let Some(url) = next.take().filter(|_| repos.len() < repos_max) else { break };
        let (page, after) = client.document::<Vec<Named>>(url, &what).await?;
        // What cannot be written as a reference could not be pulled either.
        repos.extend(page.into_iter().filter_map(|named| named.id.parse().ok()));
        next = after;
    }
    repos.truncate(repos_max);
    Ok(repos)
}

async fn describe(client: &Client, wanted: HubRef) -> Result<HubModel, StoreError> {
    let url = client.url_with(&format!("api/models/{}", wanted.repo), &[("blobs", "true")])?;
    let (answer, _) = client.document::<Answer>(url, &wanted.to_string()).await?;
    let repo = Repo::from(answer);
    let preferred = repo.choose(None, "", "").ok().map(str::to_owned);
    let models = repo.models();
    let model = |file: &str| HubModelFile {
        quantization: select::quantization(file),
        file: file.to_owned(),
        bytes: repo.bytes(file),
    };
    let mut files: Vec<HubModelFile> = models.into_iter().map(model).collect();
    files.sort_by(|a, b| (a.bytes, &a.file).cmp(&(b.bytes, &b.file)));
    let preferred = preferred.and_then(|path| files.iter().position(|file| file.file == path));
    let Repo { licence, is_gated, downloads, .. } = repo;
    Ok(HubModel { repo: wanted.repo, licence, is_gated, downloads, files, preferred })
}
