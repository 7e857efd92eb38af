//! What memory a model takes, what is set aside for it, and what is there for it.

use std::path::Path;

use murmur_core::planner::ModelFacts;
use murmur_engine::{Draft, Keep};
use murmur_gguf::{Manifest, TensorType};

use super::{Model, ModelFile, chunk_rows};
use crate::{NodeError, NodeOptions, draft::Guessing, fit, models::List};

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

    /// Memory that is set aside for it, and of that, what does not yet show as taken.
    fn claim_bytes(&self) -> (u64, u64) {
        let (engines, planned) = {
            let life = self.life();
            (life.engines(), life.claimed_bytes())
        };
        let (held_bytes, host) = {
            let held = self.holding.held();
            held.as_ref().map_or((0, None), |held| (held.memory_bytes, held.host.clone()))
        };
        let mut processes: Vec<u32> = engines.iter().flat_map(|loaded| loaded.engine.process_ids()).collect();
        processes.extend(host.and_then(|host| host.process_id()));
        (planned + held_bytes, fit::outstanding_bytes(planned + held_bytes, &processes))
    }

    /// Memory for this model, beside what the others have; for layers of one that is spread, beside what its own ring has here.
    pub(crate) fn available_bytes(&self, options: &NodeOptions, models: &List) -> u64 {
        let own = std::ptr::from_ref(self);
        let claims = models.iter().filter(|other| !std::ptr::eq(*other, own)).map(Model::claim_bytes);
        let (planned, outstanding) = claims.fold((0, 0), |sum, claim| (sum.0 + claim.0, sum.1 + claim.1));
        // What it has already is its own.
        let (taken, unshown) = self.claim_bytes();
        let reserved = self.reserved_bytes(options);
        let kept = if self.is_spread() { self.life().claimed_bytes() + reserved } else { 0 };
        let free = fit::available_bytes().map(|free| (free + taken - unshown).saturating_sub(outstanding + kept));
        let limit = options.max_memory_bytes.map(|max| max.saturating_sub(planned + kept));
        match (free, limit) {
            (Some(free), Some(limit)) => free.min(limit),
            (free, limit) => free.or(limit).unwrap_or(u64::MAX),
        }
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
        let available = self.available_bytes(options, models);
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
