//! A model that a user names as the hub does (`hf:owner/repo:quant`), from nodes that have it from there.
//!
//! The hub says which file is meant, how long it is, and what its SHA-256 is; nodes say which of the files that they have are that one. Where
//! the hub cannot be reached, their word has to do. Where it can, it is a source as well, and in the end the file is the hub's, bit by bit, or
//! it is not kept.

use std::{sync::Arc, time::Duration};

use murmur_net::Table;
use murmur_protocol::mesh::ModelDigest;
use murmur_store::{HubRef, ModelName, StoreError, hub::HubFile};
use tokio::time::timeout;

use super::{
    Shelf,
    fetch::TakeError,
    wanted::{begin, blocking, contents, search_within},
};
use crate::{
    Node, NodeError,
    mesh::{MeshNode, by_count},
    model::with_causes,
};

/// A hub that has not answered after this is not waited for.
const HUB_ANSWER_MAX: Duration = Duration::from_secs(10);
/// So long it is waited for a node that has the file: who knows the hub's name for it can get it there.
const SEARCH_MAX: Duration = Duration::from_secs(5);

/// Looks for a file by its name on the hub.
pub(super) struct HubFinder {
    wanted: HubRef,
    told: Option<Told>,
}

/// What the hub says.
struct Told {
    place: HubRef,
    bytes: u64,
    /// In lower-case hex.
    sha256: Option<String>,
}

impl HubFinder {
    /// Asks the hub which file is meant, if it can be asked.
    pub(super) async fn of(node: &Node, wanted: HubRef) -> Result<HubFinder, NodeError> {
        let Some(config) = node.options().hub.as_ref().filter(|hub| !hub.is_offline()) else {
            return Ok(HubFinder { wanted, told: None });
        };
        let told = match timeout(HUB_ANSWER_MAX, HubFile::open(config, &wanted)).await {
            Ok(Ok(file)) => Some(Told {
                place: HubRef {
                    repo: wanted.repo.clone(),
                    revision: file.commit().to_owned(),
                    wanted: Some(file.file().to_owned()),
                },
                bytes: file.bytes(),
                sha256: file.sha256().map(str::to_owned),
            }),
            // What there is not, nobody can have from there.
            Ok(Err(error @ StoreError::NotOnHub { .. })) => return Err(error.into()),
            Ok(Err(error)) => {
                tracing::info!("{wanted} is looked for in the mesh alone: {}", with_causes(&error));
                None
            }
            Err(_) => {
                tracing::info!("{wanted} is looked for in the mesh alone: the hub does not answer");
                None
            }
        };
        Ok(HubFinder { wanted, told })
    }

    /// Fetches it from those who have it. `begun` hears of it as soon as it is known what comes.
    pub(super) async fn fetch(
        self,
        node: &Arc<Node>,
        mesh: &Arc<MeshNode>,
        begun: impl Fn(&Arc<Shelf>),
    ) -> Result<Arc<Shelf>, NodeError> {
        let (digest, place) = search_within(mesh, SEARCH_MAX, |table| self.find(table), &self.wanted).await?;
        let path = place.wanted.as_deref().unwrap_or_default();
        let name = ModelName::from_file_name(path.rsplit('/').next().unwrap_or(path))?;
        let shelf = begin(node, mesh, name.as_str(), digest, |shelf| {
            shelf.on_hub().said = Some(place.clone());
            begun(shelf);
        })
        .await?;
        shelf.fetch(node, mesh, &[shelf.whole()], false).await?;
        if let Some(of_hub) = self.told.and_then(|told| told.sha256) {
            shelf.rest().await;
            let (node, shelf) = (Arc::clone(node), Arc::clone(&shelf));
            blocking(move || compare(&node, &shelf, place, of_hub)).await?;
        }
        Ok(shelf)
    }

    /// The file that most nodes have from there, and where that is.
    fn find(&self, table: &Table) -> Option<(ModelDigest, HubRef)> {
        let from_there = contents(table).filter(|content| content.held_bytes > 0).filter_map(|content| {
            let place: HubRef = content.source.as_ref()?.parse().ok()?;
            let is_it = place.repo.eq_ignore_ascii_case(&self.wanted.repo)
                && match &self.told {
                    Some(told) => place.wanted == told.place.wanted && content.file_bytes == told.bytes,
                    None => self.wanted.revision == "main" || place.revision.starts_with(&self.wanted.revision),
                };
            is_it.then_some((content.digest, place))
        });
        let from_there: Vec<_> = from_there.collect();
        let file = match &self.told {
            Some(told) => told.place.wanted.as_deref()?,
            None => {
                let mut files: Vec<&str> = from_there.iter().filter_map(|(_, place)| place.wanted.as_deref()).collect();
                files.sort_unstable();
                files.dedup();
                self.wanted.choose(&files)?
            }
        };
        let is_chosen = |(_, place): &&(ModelDigest, HubRef)| place.wanted.as_deref() == Some(file);
        let digest = by_count(from_there.iter().filter(is_chosen).map(|(digest, _)| *digest)).into_iter().next()?;
        let place = match &self.told {
            Some(told) => told.place.clone(),
            None => from_there.iter().filter(is_chosen).find(|(of, _)| *of == digest)?.1.clone(),
        };
        Some((digest, place))
    }
}

/// Makes sure that a file is the hub's. Blocks.
fn compare(node: &Node, shelf: &Shelf, place: HubRef, of_hub: String) -> Result<(), NodeError> {
    let sha256 = shelf.content.sha256()?;
    if sha256 == of_hub {
        shelf.on_hub().prove(&place);
        return Ok(shelf.flush()?);
    }
    shelf.on_hub().refute(place.clone());
    if let Err(error) = node.library.forget(&shelf.digest()) {
        tracing::warn!("what came as {place} is not removed: {}", with_causes(&error));
    }
    Err(TakeError::NotTheHubs { place: place.to_string(), sha256, of_hub }.into())
}
