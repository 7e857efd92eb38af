//! What memory a model takes, what is set aside for it, and what is there for it.

use std::path::Path;

use murmur_core::planner::ModelFacts;
use murmur_engine::{Draft, Keep};
use murmur_gguf::{Manifest, TensorType};

use super::{Model, ModelFile, chunk_rows};
use crate::{NodeError, NodeOptions, draft::Guessing, fit, mesh::ring::host::Terms, models::List};

/// Memory that is set aside for a model.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Claim {
    planned_bytes: u64,
    /// Of that, what does not yet show as taken.
    unshown_bytes: u64,
}

/// The memory of a node at one moment. It is asked about for every model time and again, and what the system says of each process is
/// read once for all of them.
pub(crate) struct Room<'a, M = Model> {
    /// As the system says; `None`: it does not.
    free_bytes: Option<u64>,
    claims: Vec<(&'a M, Claim)>,
}

impl<'a> Room<'a> {
    /// That of a node with these models.
    pub(crate) fn of(models: &'a List) -> Room<'a> {
        Room::read(fit::available_bytes(), models.iter(), Model::claim)
    }
}

impl<'a, M> Room<'a, M> {
    fn read(free_bytes: Option<u64>, models: impl Iterator<Item = &'a M>, claim: impl Fn(&M) -> Claim) -> Room<'a, M> {
        Room { free_bytes, claims: models.map(|model| (model, claim(model))).collect() }
    }

    /// For one of them, beside what the others have and `kept_bytes` of its own. What it has already is its own otherwise.
    fn available_bytes(&self, model: &M, kept_bytes: u64, max_bytes: Option<u64>) -> u64 {
        let (mut own, mut others) = (Claim::default(), Claim::default());
        for (claimant, claim) in &self.claims {
            let sum = if std::ptr::eq(*claimant, model) { &mut own } else { &mut others };
            sum.planned_bytes += claim.planned_bytes;
            sum.unshown_bytes += claim.unshown_bytes;
        }
        let taken_bytes = own.planned_bytes - own.unshown_bytes;
        let free = self.free_bytes.map(|free| (free + taken_bytes).saturating_sub(others.unshown_bytes + kept_bytes));
        let limit = max_bytes.map(|max| max.saturating_sub(others.planned_bytes + kept_bytes));
        match (free, limit) {
            (Some(free), Some(limit)) => free.min(limit),
            (free, limit) => free.or(limit).unwrap_or(u64::MAX),
        }
    }
}

impl Model {
    /// Memory that stays free for the model that the user has named to guess, until a ring has it.
    pub(super) fn reserved_bytes(&self, options: &NodeOptions) -> u64 {
        match (self.spread(), self.guessing.get()) {
            (Some(spread), Some(guessing @ Guessing::Model(guesser))) if guesser.is_named => {
                let bytes = guessing_bytes(guessing, options, options.parallel, spread.context_tokens);
                bytes.saturating_sub(self.life().claimed_bytes())
            }
            _ => 0,
        }
    }

    fn claim(&self) -> Claim {
        let (engines, planned) = {
            let life = self.life();
            (life.engines(), life.claimed_bytes())
        };
        let mut processes: Vec<u32> = engines.iter().flat_map(|loaded| loaded.engine.process_ids()).collect();
        let mut planned_bytes = planned;
        for place in [&self.holding, &self.lent] {
            let held = place.held();
            planned_bytes += held.as_ref().map_or(0, |held| held.memory_bytes);
            processes.extend(held.as_ref().and_then(|held| held.host.as_ref()?.process_id()));
        }
        Claim { planned_bytes, unshown_bytes: fit::outstanding_bytes(planned_bytes, &processes) }
    }

    /// Memory to guess for other nodes: what that takes, and what there is beside its own engine. Blocks.
    pub(crate) fn lent_bytes(
        &self,
        terms: Terms,
        options: &NodeOptions,
        models: &List,
    ) -> Result<(u64, u64), NodeError> {
        let file = ModelFile::read(&self.spec.path)?;
        let batch_rows = chunk_rows(terms.exact).max(terms.parallel);
        let demand = fit::Demand::of(&file.facts, file.gguf.file_bytes(), terms.parallel, batch_rows, 1);
        let engines_bytes = self.life().claimed_bytes();
        let available_bytes = self.available_bytes(options, &Room::of(models)).saturating_sub(engines_bytes);
        Ok((demand.bytes(terms.context_tokens), available_bytes))
    }

    /// Memory for this model, beside what the others have; for layers of one that is spread, beside what its own ring has here.
    pub(crate) fn available_bytes(&self, options: &NodeOptions, room: &Room<'_>) -> u64 {
        let reserved = self.reserved_bytes(options);
        let kept = if self.is_spread() { self.life().claimed_bytes() + reserved } else { 0 };
        room.available_bytes(self, kept, options.max_memory_bytes)
    }

    /// What loading takes, the context that memory allows, and who guesses. A model that was only found to guess is done without if
    /// the context would be shorter with it.
    pub(super) fn fit(
        &self,
        file: &ModelFile,
        options: &NodeOptions,
        (parallel, stages): (u32, u32),
        models: &List,
    ) -> Result<(fit::Demand, u32, Draft), NodeError> {
        let weights_bytes = file.gguf.file_bytes();
        let batch_rows = chunk_rows(options.exact).max(parallel);
        let mut demand = fit::Demand::of(&file.facts, weights_bytes, parallel, batch_rows, stages);
        if options.exact {
            demand.exact(&file.facts, batch_rows, stages);
        }
        if file.embedding {
            demand.whole_sequences(&file.facts);
        }
        let available = self.available_bytes(options, &Room::of(models));
        let guessing = self.guessing(options, file);
        let mut context = demand.context(options.ctx_tokens, available);
        let mut draft = guessing.draft();
        if let Guessing::Model(guesser) = guessing {
            let with_draft =
                fit::Demand { draft: Some(Box::new(guesser.demand(parallel, batch_rows))), ..demand.clone() };
            let shorter = with_draft.context(options.ctx_tokens, available);
            if guesser.is_named || shorter == context {
                (demand, context) = (with_draft, shorter);
            } else {
                tracing::info!("{}: there is no room for {} to guess for it", self.id(), guesser.name());
                draft = Draft::Lookup;
            }
        }
        let refused = |shortage| NodeError::Fit { model: self.spec.id.clone(), shortage };
        Ok((demand, context.map_err(refused)?, draft))
    }
}

/// What a file's layers take, for the planner, and the longest context. `None`: its layers cannot be cut apart, or it gives
/// no text. Blocks.
pub(crate) fn layer_facts(path: &Path, exact: bool, parallel: u32) -> Result<Option<(ModelFacts, u32)>, NodeError> {
    let file = ModelFile::read(path)?;
    let outline = Manifest::outline(&file.gguf);
    if file.embedding || outline.allowed_cuts.is_empty() {
        return Ok(None);
    }
    let batch_rows = chunk_rows(exact).max(parallel);
    let mut demand = fit::Demand::of(&file.facts, 0, parallel, batch_rows, 1);
    if exact {
        demand.exact(&file.facts, batch_rows, 1);
    }
    let per_token = demand.kv_bytes_per_token - outline.kv_bytes_per_token_per_layer * u64::from(file.facts.layers);
    let mut facts = ModelFacts::of(&outline, demand.compute_bytes, per_token + demand.score_bytes_per_token);
    facts.kept_bytes = Keep::default().memory_bytes;
    let is_rearranged = |embedding: &&murmur_gguf::TensorInfo| {
        !exact && !matches!(embedding.ty, TensorType::F32 | TensorType::F16 | TensorType::BF16 | TensorType::Q8_0)
    };
    // Weights of some types are rearranged in memory for faster computing, the embedding with them. Else it stays in the file.
    if file.gguf.tensor("token_embd.weight").filter(is_rearranged).is_some() {
        let embedding_bytes = outline.embedding.as_ref().map_or(0, |embedding| embedding.bytes);
        facts.layers.iter_mut().take(1).for_each(|layer| layer.weight_bytes += embedding_bytes);
    }
    Ok(Some((facts, file.facts.context_length)))
}

/// Memory of the model that guesses, if one does.
pub(super) fn guessing_bytes(guessing: &Guessing, options: &NodeOptions, parallel: u32, context_tokens: u32) -> u64 {
    match guessing {
        Guessing::Model(guesser) => {
            guesser.demand(parallel, chunk_rows(options.exact).max(parallel)).bytes(context_tokens)
        }
        Guessing::Off | Guessing::Lookup => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_the_system_says_of_each_model_is_read_once_whichever_is_asked_about() {
        let (models, read) = (Vec::from_iter(0..15u64), Cell::new(0));
        let claim = |model: &u64| {
            read.set(read.get() + 1);
            Claim { planned_bytes: 100 + model, unshown_bytes: 40 }
        };
        let room = Room::read(Some(5_000), models.iter(), claim);
        let planned: u64 = models.iter().map(|model| 100 + model).sum();
        for model in &models {
            let own = 100 + model;
            assert_eq!(room.available_bytes(model, 7, None), 5_000 + own - 40 - 14 * 40 - 7);
            assert_eq!(room.available_bytes(model, 0, Some(planned)), own);
        }
        assert_eq!(read.get(), 15);
        let silent = Room::read(None, models.iter(), |_| Claim::default());
        assert_eq!(
            (silent.available_bytes(&models[0], 0, None), silent.available_bytes(&models[0], 0, Some(9))),
            (u64::MAX, 9)
        );
    }
}
