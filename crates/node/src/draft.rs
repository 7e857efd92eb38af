//! Who guesses what a model will say: what the user wishes, and what that comes to for each model.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use murmur_core::planner::size;
use murmur_engine::{Draft, DraftModel};
use murmur_gguf::{Facts, same_vocabulary};
use murmur_protocol::mesh::NodeId;
use murmur_store::Hold;
use tokio::sync::SetOnce;

use crate::{
    Node, NodeError, NodeOptions,
    contents::{Sought, pull},
    fit::Demand,
    model::ModelFile,
};

/// A model that guesses unasked has at most this part of the bytes of the one that it guesses for: it computes a step for each guess.
pub(crate) const FOUND_PART: u64 = 4;

/// Who is to guess what models will say.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum DraftWish {
    /// Nobody.
    #[default]
    Off,
    /// What has followed the same tokens before.
    Lookup,
    /// That, and the smallest suitable one of these files and the node's own models, where there is one. For a ring also one of a node
    /// nearby, where there is none here.
    Auto(Vec<PathBuf>),
    /// That, and for a ring the model that a node of the mesh serves under this name.
    Peer {
        /// The name.
        name: String,
        /// The part of its guesses that is spoilt, from 0 to 1, for tests and measurements.
        spoilt: Option<f64>,
    },
    /// That, and this model.
    Model {
        /// Its GGUF file.
        path: PathBuf,
        /// The part of its guesses that is spoilt, from 0 to 1, for tests and measurements; it may then be as large as the model
        /// that it guesses for.
        spoilt: Option<f64>,
    },
    /// That, and this model, which is not on this machine.
    Wanted(WantedDraft),
}

/// A model that is to guess, and comes from other nodes or the hub before anything is loaded. Clones are of one and the same.
#[derive(Debug, Clone, PartialEq)]
pub struct WantedDraft {
    sought: Sought,
    signed_by: Option<NodeId>,
    spoilt: Option<f64>,
    /// Its file, once it is here.
    path: Arc<SetOnce<PathBuf>>,
}

impl WantedDraft {
    /// One that is not here yet. `signed_by`: the key that must have signed it; `spoilt` as for [`DraftWish::Model`].
    pub fn new(sought: Sought, signed_by: Option<NodeId>, spoilt: Option<f64>) -> WantedDraft {
        WantedDraft { sought, signed_by, spoilt, path: Arc::default() }
    }
}

impl DraftWish {
    /// Waits until a model that was named is on this machine.
    pub(crate) async fn is_here(&self) {
        if let DraftWish::Wanted(wanted) = self {
            wanted.path.wait().await;
        }
    }

    /// Whether a model that was named is still on its way.
    pub(crate) fn is_awaited(&self) -> bool {
        matches!(self, DraftWish::Wanted(wanted) if !wanted.path.initialized())
    }
}

impl Node {
    /// Fetches the model that is to guess, if it is not on this machine, and makes sure that it can.
    pub(crate) async fn fetch_draft(self: &Arc<Self>) -> Result<(), NodeError> {
        let DraftWish::Wanted(wanted) = &self.options().draft else { return Ok(()) };
        let mesh = self.mesh.get().ok_or_else(|| NodeError::Nowhere(wanted.sought.to_string()))?;
        tracing::info!("{} is fetched, which is to guess", wanted.sought);
        let path = pull::fetch(self, mesh, &wanted.sought, wanted.signed_by).await?;
        // The first word counts.
        let _ = wanted.path.set(path);
        let models = Arc::clone(&self.models);
        let settled = tokio::task::spawn_blocking(move || models.settle_guessing());
        settled.await.map_err(|_| NodeError::Interrupted)?
    }
}

/// Who guesses for one model.
#[derive(Debug)]
pub(crate) enum Guessing {
    Off,
    Lookup,
    Model(Guesser),
}

/// A model that guesses for another one.
#[derive(Debug)]
pub(crate) struct Guesser {
    draft: DraftModel,
    facts: Facts,
    file_bytes: u64,
    /// Its file is used: nobody removes it to make room.
    _held: Option<Hold>,
    /// By the user. One that was only found takes nothing from the model that it guesses for.
    pub(crate) is_named: bool,
}

impl Guessing {
    /// What the user's wish comes to for a model. Blocks. An error: the model that the user has named cannot guess for this one.
    pub(crate) fn of(options: &NodeOptions, id: &str, file: &ModelFile) -> Result<Guessing, NodeError> {
        Ok(match &options.draft {
            _ if file.embedding => Guessing::Off,
            DraftWish::Off => Guessing::Off,
            DraftWish::Lookup | DraftWish::Peer { .. } => Guessing::Lookup,
            DraftWish::Auto(others) => {
                let own = options.models.iter().chain(&options.on_demand).map(|spec| &spec.path);
                let found = Guesser::find(others.iter().chain(own), file);
                let whom = found.as_ref().map_or("nothing smaller", |guesser| guesser.name());
                tracing::info!("{id}: {whom} was found to guess what it will say");
                found.map_or(Guessing::Lookup, Guessing::Model)
            }
            DraftWish::Model { path, spoilt } => Guessing::Model(Guesser::named(path, *spoilt, id, file)?),
            DraftWish::Wanted(wanted) => match wanted.path.get() {
                Some(path) => Guessing::Model(Guesser::named(path, wanted.spoilt, id, file)?),
                None => Guessing::Lookup,
            },
        })
    }

    /// As the engine wants it.
    pub(crate) fn draft(&self) -> Draft {
        match self {
            Guessing::Off => Draft::Off,
            Guessing::Lookup => Draft::Lookup,
            Guessing::Model(guesser) => Draft::Model(guesser.draft.clone()),
        }
    }
}

impl Guesser {
    fn new(file: ModelFile, spoilt: f64, is_named: bool) -> Guesser {
        let (held, draft) = (Hold::on(file.gguf.path()), DraftModel { path: file.gguf.path().to_owned(), spoilt });
        Guesser { draft, _held: held, file_bytes: file.gguf.file_bytes(), facts: file.facts, is_named }
    }

    /// The one that the user has named, if it can guess for a model.
    fn named(path: &Path, spoilt: Option<f64>, id: &str, file: &ModelFile) -> Result<Guesser, NodeError> {
        let guesser = ModelFile::read(path)?;
        let bytes = [&guesser.gguf, &file.gguf].map(|gguf| gguf.file_bytes());
        let reason = if guesser.embedding {
            "it gives embeddings, not text".to_owned()
        } else if !same_vocabulary(&guesser.gguf, &file.gguf) {
            "it has another vocabulary, so its tokens mean something else".to_owned()
        } else if bytes[0] >= bytes[1] && spoilt.is_none() {
            let [own, other] = bytes.map(size);
            format!("it has {own} and the model {other}, so a guess would take as long as what it is to save")
        } else {
            return Ok(Guesser::new(guesser, spoilt.unwrap_or(0.0), true));
        };
        Err(NodeError::Draft { path: path.to_owned(), model: id.to_owned(), reason })
    }

    /// The smallest that can guess for a model and is small enough for it. What cannot be read cannot guess.
    fn find<'a>(paths: impl Iterator<Item = &'a PathBuf>, file: &ModelFile) -> Option<Guesser> {
        let sized = paths.filter_map(|path| Some((path.metadata().ok()?.len(), path)));
        let mut small: Vec<_> = sized.filter(|(bytes, _)| *bytes <= file.gguf.file_bytes() / FOUND_PART).collect();
        small.sort_unstable();
        small.dedup();
        let mut guessers = small.into_iter().filter_map(|(_, path)| ModelFile::read(path).ok());
        let suits = |guesser: &ModelFile| !guesser.embedding && same_vocabulary(&guesser.gguf, &file.gguf);
        guessers.find(suits).map(|found| Guesser::new(found, 0.0, false))
    }

    /// Its file.
    pub(crate) fn name(&self) -> &str {
        self.draft.path.file_name().and_then(|name| name.to_str()).unwrap_or("a model")
    }

    /// What loading it takes, for as many requests as the model that it guesses for.
    pub(crate) fn demand(&self, parallel: u32, batch_rows: u32) -> Demand {
        Demand::of(&self.facts, self.file_bytes, parallel, batch_rows, 1)
    }
}

#[cfg(test)]
mod tests {
    use murmur_gguf::synth::{self, Spec, Weights};

    use super::*;

    /// A folder of models of one vocabulary, the largest first, and one of another vocabulary.
    struct Folder(PathBuf);

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    impl Folder {
        fn new(test: &str) -> Folder {
            let folder = std::env::temp_dir().join(format!("murmur-draft-{test}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            for (name, layers) in [("large", 8), ("half", 4), ("small", 1)] {
                let spec = Spec::tiny("llama").unwrap().with_layers(layers).with_weights(Weights::Q8_0);
                synth::write(&spec, folder.join(name)).unwrap();
            }
            let mut other = Spec::tiny("llama").unwrap().with_layers(1).with_weights(Weights::Q8_0);
            other.facts.vocabulary = 512;
            synth::write(&other, folder.join("other")).unwrap();
            Folder(folder)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }

        fn found(&self, model: &str, among: &[&str]) -> Option<String> {
            let paths: Vec<PathBuf> = among.iter().map(|name| self.path(name)).collect();
            let found = Guesser::find(paths.iter(), &ModelFile::read(&self.path(model)).unwrap())?;
            Some(found.name().to_owned())
        }

        fn named(&self, draft: &str, spoilt: Option<f64>, model: &str) -> Result<Guesser, NodeError> {
            Guesser::named(&self.path(draft), spoilt, model, &ModelFile::read(&self.path(model)).unwrap())
        }
    }

    #[test]
    fn the_smallest_model_of_the_same_vocabulary_is_found_if_it_is_small_enough() {
        let folder = Folder::new("found");
        let all = ["large", "half", "small", "other", "absent"];
        assert_eq!(folder.found("large", &all).as_deref(), Some("small"));
        assert_eq!(folder.found("large", &["large", "half", "other"]), None);
        assert_eq!(folder.found("small", &all), None);
    }

    #[test]
    fn a_model_that_cannot_guess_is_refused_with_the_reason() {
        let folder = Folder::new("named");
        let refused = |draft, model| folder.named(draft, None, model).unwrap_err().to_string();
        assert!(folder.named("half", None, "large").is_ok());
        assert!(refused("other", "large").contains("another vocabulary"), "{}", refused("other", "large"));
        assert!(refused("large", "large").contains("as long as"), "{}", refused("large", "large"));
        assert!(refused("large", "half").contains("as long as"));
        assert!(refused("absent", "large").contains("no such file"));
        assert!(folder.named("large", Some(0.3), "large").is_ok());
    }

    #[test]
    fn its_memory_is_counted() {
        let folder = Folder::new("memory");
        let guesser = folder.named("half", None, "large").unwrap();
        let bytes = |parallel, context| guesser.demand(parallel, 256).bytes(context);
        assert!(bytes(1, 0) > folder.path("half").metadata().unwrap().len());
        let per_token = guesser.facts.kv_bytes_per_token_per_layer() * 4;
        assert!(bytes(4, 1024) - bytes(4, 0) >= 4 * 1024 * per_token);
    }
}
