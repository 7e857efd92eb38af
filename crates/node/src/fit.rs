//! Does a model fit this machine, and with how much context? Estimates are on the safe side: a refusal with a reason is
//! better than an out-of-memory kill in the middle of an answer.

use murmur_core::planner::size;
use murmur_engine::Keep;
use murmur_gguf::Facts;

/// Context per request when the user does not say.
pub const DEFAULT_CONTEXT_TOKENS: u32 = 8192;
/// A context below this is of no use.
pub const CONTEXT_TOKENS_MIN: u32 = 256;
/// Code, tables, thread stacks of the child processes.
const PROCESS_BYTES: u64 = 48 << 20;

/// What running a model takes besides its file, where no more than its length is known: contexts and buffers.
const BESIDES_BYTES: u64 = 512 << 20;
/// And so much of the file's own size.
const BESIDES_PART: u64 = 8;

/// What runs with a file of so many bytes would take, about: only the file's header would say it exactly.
pub fn estimated_bytes(file_bytes: u64) -> u64 {
    file_bytes.saturating_add(file_bytes / BESIDES_PART).saturating_add(BESIDES_BYTES)
}

/// What loading a model takes.
#[derive(Debug, Clone)]
pub struct Demand {
    /// Bytes of weights.
    pub weights_bytes: u64,
    /// KV cache bytes per token, over all layers.
    pub kv_bytes_per_token: u64,
    /// Buffers for computing one batch.
    pub compute_bytes: u64,
    /// Attention scores of a batch, bytes per token of context: without flash attention they are written out.
    pub score_bytes_per_token: u64,
    /// Requests of full length at once.
    pub parallel: u32,
    /// The model's own limit.
    pub trained_context_tokens: u32,
    /// What the model takes that guesses for this one, if one does.
    pub draft: Option<Box<Demand>>,
}

impl Demand {
    /// From a model's facts. `batch_rows`: rows of the largest batch; `parallel`: requests, each with room for its logits.
    pub fn of(facts: &Facts, weights_bytes: u64, parallel: u32, batch_rows: u32, stages: u32) -> Demand {
        let per_layer = facts.kv_bytes_per_token_per_layer();
        let width = 8 * u64::from(facts.embedding_length) + 4 * u64::from(facts.feed_forward_length);
        let logits = u64::from(facts.vocabulary) * u64::from(parallel) * 4;
        // Stages keep what they have handed on, for one that comes after another that died; the last hands nothing on.
        let rows_bytes = 4 * u64::from(facts.embedding_length) * u64::from(facts.context_length) * u64::from(parallel);
        let kept = Keep::default().memory_bytes.min(rows_bytes) * u64::from(stages.saturating_sub(1));
        Demand {
            weights_bytes,
            // With the attention mask: two bytes for each row of a batch, twice where some layers have a window.
            kv_bytes_per_token: per_layer * u64::from(facts.layers)
                + 4 * u64::from(batch_rows) * u64::from(stages.max(1)),
            score_bytes_per_token: 0,
            compute_bytes: (u64::from(batch_rows) * width * 4 + logits + PROCESS_BYTES) * u64::from(stages.max(1))
                + kept,
            parallel,
            trained_context_tokens: facts.context_length,
            draft: None,
        }
    }

    /// An embedding model computes a whole sequence at once, and llama.cpp sets logits aside for every row of it.
    pub fn whole_sequences(&mut self, facts: &Facts) {
        let width = 8 * u64::from(facts.embedding_length) + 4 * u64::from(facts.feed_forward_length);
        self.kv_bytes_per_token += 4 * (width + 2 * u64::from(facts.vocabulary));
    }

    /// Exact mode has no flash attention: scores of `batch_rows` rows with every cell of a sequence, for every head, before
    /// and after the softmax.
    pub fn exact(&mut self, facts: &Facts, batch_rows: u32, stages: u32) {
        const SCORE_BYTES: u64 = 2 * 4;
        self.score_bytes_per_token =
            SCORE_BYTES * u64::from(facts.heads) * u64::from(batch_rows) * u64::from(stages.max(1));
    }

    /// Bytes for a context of so many tokens per request.
    pub fn bytes(&self, context_tokens: u32) -> u64 {
        let scores = self.score_bytes_per_token * u64::from(context_tokens);
        let own = self.weights_bytes + self.compute_bytes + self.kv_bytes(context_tokens) + scores;
        own + self.draft_bytes(context_tokens)
    }

    fn draft_bytes(&self, context_tokens: u32) -> u64 {
        self.draft.as_ref().map_or(0, |draft| draft.bytes(context_tokens))
    }

    fn kv_bytes(&self, context_tokens: u32) -> u64 {
        self.kv_bytes_per_token * u64::from(context_tokens) * u64::from(self.parallel)
    }

    /// The context to use: `asked`, or the largest up to the default that fits in `available_bytes`.
    pub fn context(&self, asked: Option<u32>, available_bytes: u64) -> Result<u32, DoesNotFit> {
        let most = match asked {
            Some(tokens) => tokens.min(self.trained_context_tokens.max(1)),
            None => DEFAULT_CONTEXT_TOKENS.min(self.trained_context_tokens.max(1)),
        };
        // Bytes grow evenly with the context.
        let fixed = self.bytes(0);
        let per_token = (self.bytes(1) - fixed).max(1);
        let fits = (available_bytes.saturating_sub(fixed) / per_token).min(u64::from(most)) as u32;
        let fits = if fits < most { fits / 256 * 256 } else { fits };
        let enough = match asked {
            Some(_) => fits >= most,
            None => fits >= most.min(CONTEXT_TOKENS_MIN),
        };
        if enough {
            return Ok(fits);
        }
        Err(DoesNotFit {
            needed_bytes: self.bytes(most),
            weights_bytes: self.weights_bytes,
            kv_bytes: self.kv_bytes(most),
            context_tokens: most,
            parallel: self.parallel,
            available_bytes,
            fitting_context_tokens: (fits >= CONTEXT_TOKENS_MIN).then_some(fits),
            draft_bytes: self.draft_bytes(most),
            fits_without_draft: self.draft.is_some()
                && Demand { draft: None, ..self.clone() }.context(asked, available_bytes).is_ok(),
        })
    }
}

/// A model does not fit, and what would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DoesNotFit {
    /// Bytes it needs as asked.
    pub needed_bytes: u64,
    /// Of these, weights.
    pub weights_bytes: u64,
    /// Of these, KV cache.
    pub kv_bytes: u64,
    /// Context that was asked for.
    pub context_tokens: u32,
    /// Full-length requests at once.
    pub parallel: u32,
    /// Bytes there are.
    pub available_bytes: u64,
    /// A context that would fit.
    pub fitting_context_tokens: Option<u32>,
    /// Of the bytes it needs, those of the model that guesses for it; 0: none does.
    pub draft_bytes: u64,
    /// It would fit as asked without that model.
    pub fits_without_draft: bool,
}

impl std::fmt::Display for DoesNotFit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { context_tokens, parallel, .. } = self;
        let draft = match self.draft_bytes {
            0 => String::new(),
            bytes => format!(", {} for the model that guesses (--draft)", size(bytes)),
        };
        write!(
            f,
            "it needs {} ({} of weights, {} of KV cache for {parallel} x {context_tokens} tokens{draft}) and {} are available. ",
            size(self.needed_bytes),
            size(self.weights_bytes),
            size(self.kv_bytes),
            size(self.available_bytes),
        )?;
        if self.fits_without_draft {
            f.write_str("Without the model that guesses it would fit: --draft lookup does without. ")?;
        }
        match self.fitting_context_tokens {
            Some(tokens) => write!(f, "--ctx {tokens} would fit, or a lower --parallel"),
            None if self.fits_without_draft => f.write_str("Or let a smaller model guess"),
            None => {
                // What quantisation would fit: the same weights at proportionally fewer bits.
                let room = self.available_bytes.saturating_sub(self.needed_bytes - self.weights_bytes - self.kv_bytes);
                let share = 100 * room / self.weights_bytes.max(1);
                write!(
                    f,
                    "Even the smallest context does not fit beside the weights: take a quantisation of at most {share} % of this \
                     file's size, a smaller model, or free memory"
                )
            }
        }
    }
}

impl std::error::Error for DoesNotFit {}

/// Memory that can be had without pushing others out: the kernel's estimate, or the control group's limit if lower.
pub fn available_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let free = line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024;
    let read = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok();
    let group = read("memory.max").map(|max| max.saturating_sub(read("memory.current").unwrap_or(0)));
    Some(group.map_or(free, |group| group.min(free)))
}

/// What of a model's `planned_bytes` does not yet show in [`available_bytes`] as taken. Weights that are mapped from a file
/// count as free, although the model needs them, and so does a KV cache that nothing has been written to; only what a
/// process holds in anonymous memory is gone for good.
pub fn outstanding_bytes(planned_bytes: u64, processes: &[u32]) -> u64 {
    let anonymous = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
    };
    planned_bytes.saturating_sub(processes.iter().filter_map(anonymous).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn demand() -> Demand {
        Demand {
            weights_bytes: 4 * GIB,
            kv_bytes_per_token: 128 << 10,
            compute_bytes: GIB / 4,
            score_bytes_per_token: 0,
            parallel: 4,
            trained_context_tokens: 32768,
            draft: None,
        }
    }

    #[test]
    fn a_model_that_guesses_is_counted_and_named_where_it_is_what_does_not_fit() {
        let draft = Demand { weights_bytes: GIB, kv_bytes_per_token: 16 << 10, compute_bytes: 0, ..demand() };
        let both = Demand { draft: Some(Box::new(draft.clone())), ..demand() };
        assert_eq!(both.bytes(1000), demand().bytes(1000) + draft.bytes(1000));
        let (alone, context) = (demand().context(None, 6 * GIB).unwrap(), both.context(None, 6 * GIB).unwrap());
        assert!(context < alone && both.bytes(context) <= 6 * GIB);
        let refused = both.context(Some(alone), 6 * GIB).unwrap_err();
        let text = refused.to_string();
        assert!(
            refused.fits_without_draft
                && text.contains("for the model that guesses")
                && text.contains("--draft lookup"),
            "{text}"
        );
        let refused = both.context(Some(32768), 6 * GIB).unwrap_err();
        assert!(!refused.fits_without_draft && !refused.to_string().contains("--draft lookup"), "{refused}");
    }

    #[test]
    fn scores_that_are_written_out_leave_less_room_for_context() {
        let exact = Demand { score_bytes_per_token: 128 << 10, ..demand() };
        let (most, less) = (demand().context(None, 6 * GIB).unwrap(), exact.context(None, 6 * GIB).unwrap());
        assert!(less < most && exact.bytes(less) <= 6 * GIB);
    }

    #[test]
    fn without_a_wish_the_context_is_the_largest_that_fits_up_to_the_default() {
        assert_eq!(demand().context(None, 32 * GIB).unwrap(), DEFAULT_CONTEXT_TOKENS);
        let tight = demand().context(None, 6 * GIB).unwrap();
        assert!((CONTEXT_TOKENS_MIN..DEFAULT_CONTEXT_TOKENS).contains(&tight));
        assert!(demand().bytes(tight) <= 6 * GIB);
    }

    #[test]
    fn a_wish_that_does_not_fit_is_refused_with_one_that_does() {
        let refused = demand().context(Some(32768), 10 * GIB).unwrap_err();
        let tokens = refused.fitting_context_tokens.unwrap();
        assert!(demand().context(Some(tokens), 10 * GIB).is_ok());
        let text = refused.to_string();
        assert!(
            text.contains("20.2 GiB") && text.contains("10.0 GiB") && text.contains(&format!("--ctx {tokens}")),
            "{text}"
        );
    }

    #[test]
    fn weights_that_do_not_fit_are_refused_with_the_size_that_would() {
        let refused = demand().context(None, 2 * GIB).unwrap_err();
        assert!(refused.to_string().contains("at most 43 %"), "{refused}");
    }

    #[test]
    fn what_a_process_has_taken_is_not_counted_twice_and_what_it_only_maps_is_counted() {
        let planned = 1 << 50;
        let taken = planned - outstanding_bytes(planned, &[std::process::id()]);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let resident = resident.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024;
        // The program's own text is mapped, not taken.
        assert!(taken > 0 && taken < resident, "{taken} of {resident}");
        assert_eq!(outstanding_bytes(planned, &[]), planned);
    }

    #[test]
    fn a_context_beyond_the_models_own_is_capped() {
        assert_eq!(demand().context(Some(100_000), 64 * GIB).unwrap(), 32768);
    }
}
