//! A stage: a layer range with its KV cache. Rows in, hidden states or sampled tokens out.
//!
//! The first stage takes token ids, the last one samples; a whole model is both. Everything here runs on the one compute
//! thread of a child process (see [`crate::child`]).

use std::{
    collections::HashMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use murmur_protocol::{
    codec::Codec,
    frame::{
        FLAG_GUESS, FLAG_HANDED_ON, FLAG_PREFILL, FLAG_WANT_OUTPUT, Frame, GUESS_ROWS_MAX, Header, Kind, NEXT_ROWS_MAX,
    },
    sampling::{Sampled, Token},
    stage::{Load, Loaded, NotOpened, Open, Opened, Role, Step},
};
use murmur_sampling::{Sampler, Vocabulary};

use crate::{
    ffi::{Batch, Context, ContextOptions, LlamaError, Model, ModelOptions},
    joining::Joining,
    kept::Kept,
    schedule::Rows,
    slots::{KvOp, NotAdmitted, Slots},
    threads::ThreadGovernor,
    vocabulary,
};

/// What a session that was told BUSY should wait, as no better figure is known yet.
const RETRY_MS: u32 = 500;

/// Rows of one session, queued for computation.
#[derive(Debug)]
pub(crate) struct Work {
    /// Header of the frame that brought them.
    pub(crate) header: Header,
    /// The KV sequence of the session.
    pub(crate) sequence: i32,
    /// Token ids, one per row.
    pub(crate) tokens: Vec<Token>,
    /// Hidden states, `[rows, n_embd]`; empty in the first stage.
    pub(crate) hidden: Vec<f32>,
}

impl Rows for Work {
    fn rows(&self) -> usize {
        self.tokens.len()
    }
    fn is_prefill(&self) -> bool {
        self.header.has(FLAG_PREFILL)
    }
    fn sequence(&self) -> i32 {
        self.sequence
    }
    fn follows(&self, before: &Work) -> bool {
        let (header, before) = (&self.header, &before.header);
        let is_next = header.position == before.position.saturating_add(before.rows);
        let is_alike = (header.session, header.epoch, header.stages) == (before.session, before.epoch, before.stages);
        // The row of a known token has the sampler agree with what it follows, which must have been sampled by then.
        is_next && is_alike && header.has(FLAG_GUESS) && before.has(FLAG_WANT_OUTPUT)
    }
}

struct Session {
    epoch: u32,
    sequence: i32,
    prompt_tokens: u32,
    sampler: Option<Sampler>,
    tail: Tail,
    /// The rows that are to follow, each once its token is sampled.
    next: Option<Header>,
    /// How its hidden states go on.
    codec: Codec,
}

/// The newest token of an answer.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Tail {
    /// Rows say which it is: it was sampled before the session was opened here, or they are of another one than was sampled.
    Elsewhere,
    /// Its position, and the token.
    At(u32, Token),
    /// The answer ends with it.
    End,
}

impl Session {
    /// Whether a row can be computed from: whether its token is the newest of the answer.
    fn is_right(&self, position: u32, token: Token) -> bool {
        self.tail == Tail::Elsewhere || self.tail == Tail::At(position, token)
    }

    /// Makes the answer that the sampler knows the one that rows from `position` on have, if they have another: who is to guess what another
    /// model says learns from its rows what it has said. Nothing to do for a model that gets what it has sampled itself.
    fn agree(&mut self, position: u32, tokens: &[Token], ends_here: bool) -> Result<(), StageError> {
        let Some(sampler) = &mut self.sampler else { return Ok(()) };
        let rows = tokens.get(self.prompt_tokens.saturating_sub(position) as usize..).unwrap_or_default();
        let first = position.saturating_sub(self.prompt_tokens) as usize;
        let answer = sampler.generated();
        let Some(known) = answer.get(first..) else {
            return Err(StageError::Protocol("rows are missing before these"));
        };
        let same = known.iter().zip(rows).take_while(|(known, row)| known == row).count();
        if same < rows.len() || ends_here {
            sampler.rollback(known.len() - same)?;
        }
        for &token in &rows[same..] {
            sampler.accept(token)?;
        }
        Ok(())
    }

    /// The token for `position`, which becomes the newest.
    fn sample(&mut self, logits: &mut [f32], position: u32) -> Result<Sampled, StageError> {
        let sampler = self.sampler.as_mut().ok_or(StageError::Protocol("no sampler"))?;
        let sampled = sampler.sample(logits, position)?;
        sampler.accept(sampled.token)?;
        let is_end = sampled.grammar_ended || sampler.ends(sampled.token);
        self.tail = if is_end { Tail::End } else { Tail::At(position, sampled.token) };
        Ok(sampled)
    }

    /// Further rows are to follow.
    fn go_on(&mut self, further: Header) {
        match &mut self.next {
            Some(next) if next.position.saturating_add(next.rows) == further.position => {
                next.rows = next.rows.saturating_add(further.rows);
            }
            next => *next = Some(further),
        }
    }

    /// The row that follows, when its token is there.
    fn follow(&mut self) -> Option<Work> {
        let Tail::At(position, token) = self.tail else { return None };
        let next = self.next.take_if(|next| next.position == position)?;
        self.next = Some(Header { position: position + 1, rows: next.rows - 1, ..next }).filter(|left| left.rows > 0);
        let header = Header { rows: 1, ..next };
        Some(Work { header, sequence: self.sequence, tokens: vec![token], hidden: Vec::new() })
    }
}

/// A layer range with its KV cache.
pub(crate) struct Stage {
    context: Context,
    first: bool,
    last: bool,
    slots: Slots,
    sessions: HashMap<u64, Session>,
    /// What went on to the next stage, if there is one.
    kept: Option<Kept>,
    vocabulary: Option<Arc<Vocabulary>>,
    governor: ThreadGovernor,
    joining: Joining,
    batch: Batch,
    facts: Loaded,
    /// Rows that sampled tokens have made ready.
    following: Vec<Work>,
}

/// Why rows were not computed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StageError {
    /// llama.cpp failed.
    #[error(transparent)]
    Llama(#[from] LlamaError),
    /// The token could not be chosen.
    #[error(transparent)]
    Sampling(#[from] murmur_sampling::SamplingError),
    /// The file's vocabulary is unusable.
    #[error(transparent)]
    Vocabulary(#[from] murmur_sampling::VocabularyError),
    /// A frame that does not fit the session's state.
    #[error("{0}")]
    Protocol(&'static str),
    /// A frame that does not decode.
    #[error(transparent)]
    Frame(#[from] murmur_protocol::frame::FrameError),
}

impl Stage {
    /// Loads a layer range. `load.role` must be [`Role::Stage`].
    pub(crate) fn load(load: &Load, progress: &mut dyn FnMut(f32) -> bool) -> Result<Stage, StageError> {
        let Role::Stage { first, last } = load.role else {
            return Err(StageError::Protocol("not the role of a stage"));
        };
        let started = Instant::now();
        let options = ModelOptions { vocabulary_only: false, repack: !load.exact, gpu_layers: load.gpu_layers };
        let model = Arc::new(Model::load(&load.path, &options, progress)?);
        let vocabulary = if last { Some(Arc::new(vocabulary::from_facts(model.vocabulary())?)) } else { None };
        if let Some(vocabulary) = vocabulary.clone() {
            // Tables for grammars take a second for a large vocabulary: not when the first grammar comes.
            let prepare = move || vocabulary.prepare_grammars();
            let _ = std::thread::Builder::new().name("grammars".into()).spawn(prepare);
        }
        let context = Context::new(
            model.clone(),
            &ContextOptions {
                kv_cells: load.kv_cells,
                sequences: load.sequences,
                batch_rows: load.chunk_rows.max(load.sequences),
                exact: load.exact,
                embeddings: false,
                threads_max: load.threads_max,
                tap: load.tap.clone(),
                inject: load.inject.clone(),
            },
        )?;
        #[cfg(target_os = "linux")]
        model.let_go(&load.path);
        let facts = Loaded {
            n_embd: model.n_embd() as u32,
            n_layer: model.n_layer(),
            kv_cells: context.kv_cells(),
            load_ms: started.elapsed().as_millis() as u64,
            weight_bytes: model.weight_bytes(),
            vocabulary: None,
        };
        let slots = Slots::new(context.kv_cells() / load.sequences.max(1), load.sequences, load.chunk_rows, load.exact);
        let governor = ThreadGovernor::new(load.threads_max, load.threads);
        let folder = load.path.parent().unwrap_or(Path::new("."));
        let kept = (!last).then(|| Kept::new(model.n_embd(), load.keep, folder));
        Ok(Stage {
            context,
            first,
            last,
            slots,
            sessions: HashMap::new(),
            kept,
            vocabulary,
            governor,
            joining: Joining::default(),
            batch: Batch::default(),
            facts,
            following: Vec::new(),
        })
    }

    /// What was loaded.
    pub(crate) fn facts(&self) -> &Loaded {
        &self.facts
    }

    /// Rows of one batch at most.
    pub(crate) fn batch_rows(&self) -> usize {
        self.context.batch_rows()
    }

    /// Admits a session, or goes on with one that was held.
    pub(crate) fn open(&mut self, header: &Header, open: &Open) -> Result<Opened, NotOpened> {
        let sampler = self.sampler(open)?;
        let mut tokens = open.prompt.clone();
        tokens.extend_from_slice(&open.generated);
        let held = self.sessions.get(&header.session).map(|session| session.sequence);
        let (sequence, cached_tokens) = match held {
            Some(sequence) => {
                let length = self.slots.common(sequence, &tokens);
                let is_cut = self.context.truncate(sequence, length);
                (sequence, self.usable(sequence, is_cut, length))
            }
            None => self.admit(header.session, &tokens, open.reserve_cells)?,
        };
        let session = Session {
            epoch: header.epoch,
            sequence,
            prompt_tokens: open.prompt.len() as u32,
            sampler,
            tail: Tail::Elsewhere,
            next: None,
            codec: open.codec,
        };
        self.sessions.insert(header.session, session);
        let kept_tokens = self.kept.as_ref().map_or(0, |kept| kept.count(sequence, cached_tokens));
        Ok(Opened { cached_tokens, kept_tokens })
    }

    fn sampler(&self, open: &Open) -> Result<Option<Sampler>, NotOpened> {
        match (self.last, &open.sampling, &self.vocabulary) {
            (true, Some(params), Some(vocabulary)) => {
                let bad = |error: murmur_sampling::SamplingError| NotOpened::Bad(error.to_string());
                let mut sampler = Sampler::new(params.clone(), vocabulary.clone(), &open.prompt).map_err(bad)?;
                for &token in &open.generated {
                    sampler.accept(token).map_err(bad)?;
                }
                Ok(Some(sampler))
            }
            (true, ..) => Err(NotOpened::Bad("the last stage needs sampling parameters".into())),
            (false, ..) => Ok(None),
        }
    }

    /// A sequence for a new session, and how many of its tokens are in it already.
    fn admit(&mut self, session: u64, tokens: &[Token], reserve_cells: u32) -> Result<(i32, u32), NotOpened> {
        let admitted = self.slots.admit(session, tokens, reserve_cells).map_err(|refused| match refused {
            NotAdmitted::Busy => NotOpened::Busy { retry_ms: RETRY_MS },
            NotAdmitted::TooLarge => NotOpened::Bad(format!(
                "the request needs {reserve_cells} KV cells and each has {} at this stage: shorten it, or give the server a larger --ctx",
                self.slots.cells()
            )),
        })?;
        let is_done = admitted.kv.into_iter().all(|op| match op {
            KvOp::Truncate { sequence, from } => {
                self.kept.iter_mut().for_each(|kept| kept.claim(sequence, from));
                self.context.truncate(sequence, from)
            }
            KvOp::Copy { from, to } => {
                self.kept.iter_mut().for_each(|kept| kept.copy(from, to, admitted.cached_tokens));
                self.context.copy_sequence(from, to);
                true
            }
        });
        Ok((admitted.sequence, self.usable(admitted.sequence, is_done, admitted.cached_tokens)))
    }

    /// How many of a sequence's first `length` tokens can be built on. A memory that could not forget a part (a recurrent one),
    /// or has given one up (behind a window), begins anew.
    fn usable(&mut self, sequence: i32, is_cut: bool, length: u32) -> u32 {
        let is_usable = is_cut && (length == 0 || self.context.is_complete(sequence));
        let length = if is_usable { length } else { 0 };
        if !is_usable {
            self.context.truncate(sequence, 0);
        }
        self.kept.iter_mut().for_each(|kept| kept.claim(sequence, length));
        self.slots.truncated(sequence, length);
        length
    }

    /// Ends a session; its prefix stays unless `forget`.
    pub(crate) fn close(&mut self, session: u64, forget: bool) {
        let Some(Session { sequence, .. }) = self.sessions.remove(&session) else { return };
        self.kept.iter_mut().for_each(|kept| kept.release(sequence));
        if self.slots.release(sequence, forget) {
            self.usable(sequence, false, 0);
        }
    }

    /// Drops what is queued of a session, and keeps the rest until it goes on: when it is opened again, or at once if it is rewound.
    pub(crate) fn hold(&mut self, header: &Header) {
        if let Some(session) = self.sessions.get_mut(&header.session) {
            (session.epoch, session.next) = (header.epoch, None);
        }
    }

    /// Rows that went to the next stage, once more; `None` when their session or epoch is over. If they are not kept after all,
    /// the session has to begin anew.
    pub(crate) fn repeat(&self, header: &Header) -> Result<Option<Frame>, StageError> {
        let Some(session) = self.sessions.get(&header.session).filter(|s| s.epoch == header.epoch) else {
            return Ok(None);
        };
        let kept = self.kept.as_ref().ok_or(StageError::Protocol("the last stage keeps nothing"))?;
        let tokens = self.slots.tokens(session.sequence, header.position, header.rows);
        let frame = match tokens.zip(kept.read(session.sequence, header.position, header.rows)) {
            Some((tokens, hidden)) => {
                hidden_frame(Header { codec: session.codec, ..*header }, tokens, &hidden, self.facts.n_embd)
            }
            None => {
                let header = Header { kind: Kind::NotOpened, ..*header };
                Frame::message(header, &NotOpened::Busy { retry_ms: RETRY_MS })?
            }
        };
        Ok(Some(frame))
    }

    /// Turns a frame of rows into work; `None` when its session or epoch is over.
    pub(crate) fn accept(&mut self, frame: &Frame) -> Result<Option<Work>, StageError> {
        let header = frame.header;
        let batch_rows = self.batch_rows();
        let Some(session) = self.sessions.get_mut(&header.session).filter(|s| s.epoch == header.epoch) else {
            return Ok(None);
        };
        if header.kind == Kind::Next {
            if !(self.first && self.last && (1..=NEXT_ROWS_MAX).contains(&header.rows)) {
                return Err(StageError::Protocol("only a whole model goes on by itself, and by few rows"));
            }
            session.go_on(header);
            return Ok(session.follow());
        }
        let expected = if self.first { Kind::Tokens } else { Kind::Hidden };
        if header.rows as usize > batch_rows {
            return Err(StageError::Protocol("more rows in one frame than this stage computes at once"));
        }
        if header.has(FLAG_GUESS) && header.rows > GUESS_ROWS_MAX {
            return Err(StageError::Protocol("more guesses in one frame than may be"));
        }
        if header.kind != expected || header.rows == 0 {
            return Err(StageError::Protocol("this stage takes other rows (token ids first, hidden states later)"));
        }
        let tokens = frame.token_rows()?;
        if self.first && self.last && !header.has(FLAG_GUESS) {
            // What was sampled before may have been for the same place, behind other tokens: no row follows that.
            session.tail = Tail::Elsewhere;
        }
        let hidden = if self.first { Vec::new() } else { frame.hidden_rows(self.facts.n_embd as usize)? };
        Ok(Some(Work { header, sequence: session.sequence, tokens, hidden }))
    }

    /// True while the session and epoch of `work` are current.
    pub(crate) fn is_current(&self, work: &Work) -> bool {
        self.sessions.get(&work.header.session).is_some_and(|s| s.epoch == work.header.epoch)
    }

    /// How many of so many rows of guesses that wait behind one another are to be computed together.
    pub(crate) fn joins(&mut self, waiting: usize) -> usize {
        self.joining.rows(waiting)
    }

    /// Computes a batch. One answer per piece of work, in order; before hidden states, which the next stage gets, the account of
    /// them, which is for the driver.
    pub(crate) fn forward(&mut self, works: &[Work]) -> Vec<Frame> {
        let (ready, mut answers): (Vec<&Work>, Vec<Frame>) =
            (works.iter()).fold(Default::default(), |mut acc, work| {
                match self.rewind(work) {
                    Ok(()) => acc.0.push(work),
                    Err(error) => acc.1.push(failure(work, &error)),
                }
                acc
            });
        if ready.is_empty() {
            return answers;
        }
        match self.compute(&ready) {
            Ok((took, threads)) => self.harvest(&ready, took, threads, &mut answers),
            // One bad piece must not cost the others theirs: each is computed alone, and those fail that fail alone.
            Err(_) if ready.len() > 1 => {
                answers.extend(ready.into_iter().flat_map(|work| self.forward(std::slice::from_ref(work))));
            }
            Err(error) => answers.extend(ready.into_iter().map(|work| failure(work, &error))),
        }
        answers
    }

    /// A position below the sequence's length is a rollback; above it, frames were lost.
    fn rewind(&mut self, work: &Work) -> Result<(), StageError> {
        let length = self.slots.length(work.sequence);
        if work.header.position > length {
            return Err(StageError::Protocol("rows are missing before these"));
        }
        if let Some(session) = self.sessions.get_mut(&work.header.session)
            && !work.header.has(FLAG_GUESS)
        {
            session.agree(work.header.position, &work.tokens, work.header.has(FLAG_WANT_OUTPUT))?;
        }
        if work.header.position < length {
            if !self.context.truncate(work.sequence, work.header.position) {
                return Err(StageError::Protocol("this model's memory cannot forget a part of a sequence"));
            }
            self.slots.truncated(work.sequence, work.header.position);
        }
        // Noted here, so that a second piece of the same sequence in this batch finds the right length.
        self.slots.extended(work.sequence, &work.tokens, work.is_prefill());
        Ok(())
    }

    fn compute(&mut self, works: &[&Work]) -> Result<(Duration, u32), StageError> {
        let batch = &mut self.batch;
        batch.tokens.clear();
        batch.hidden.clear();
        batch.positions.clear();
        batch.sequences.clear();
        batch.wants_output.clear();
        for work in works {
            let rows = work.tokens.len();
            if self.first {
                batch.tokens.extend_from_slice(&work.tokens);
            } else {
                batch.hidden.extend_from_slice(&work.hidden);
            }
            batch.positions.extend((work.header.position as i32..).take(rows));
            batch.sequences.extend(std::iter::repeat_n(work.sequence, rows));
            let wants = self.last && work.header.has(FLAG_WANT_OUTPUT);
            let is_guess = work.header.has(FLAG_GUESS);
            batch.wants_output.extend((0..rows).map(|row| wants && (is_guess || row + 1 == rows)));
        }
        let rows = batch.positions.len();
        // Generated rows may have other company when they are computed again; prompt rows come in the same chunks. The kernel
        // for a lone row shares out a long KV cache among the threads.
        batch.is_exact = rows == 1 || works.iter().any(|work| !work.is_prefill());
        let threads = self.governor.choose(rows);
        self.context.set_threads(threads);
        let started = Instant::now();
        let result = self.context.decode(batch);
        let took = started.elapsed();
        if let Err(error) = result {
            for work in works {
                // What llama.cpp holds of the sequence after a failure is its own affair: begin at the known length.
                self.slots.truncated(work.sequence, work.header.position);
                self.context.truncate(work.sequence, self.slots.length(work.sequence));
            }
            return Err(error.into());
        }
        self.governor.observe(rows, took);
        Ok((took, threads))
    }

    fn harvest(&mut self, works: &[&Work], took: Duration, threads: u32, answers: &mut Vec<Frame>) {
        let batch_rows = works.iter().map(|w| w.rows()).sum::<usize>();
        let step =
            Step { sampled: Vec::new(), compute_us: took.as_micros() as u32, batch_rows: batch_rows as u32, threads };
        let (width, computed) = (self.facts.n_embd as usize, Instant::now());
        let mut row = 0;
        for work in works {
            let end = row + work.rows();
            let header = work.header;
            if let Some(kept) = &mut self.kept {
                kept.append(work.sequence, header.position, &self.context.hidden()[row * width..end * width]);
            }
            let answer = if !self.last && header.stages != 1 {
                let account = Header { kind: Kind::Done, flags: header.flags | FLAG_HANDED_ON, ..header };
                answers.extend(Frame::message(account, &step));
                let codec = self.sessions.get(&header.session).map_or(Codec::F32, |session| session.codec);
                let header = Header { stages: header.stages.saturating_sub(1), codec, ..header };
                let hidden = &self.context.hidden()[row * width..end * width];
                Ok(hidden_frame(header, &work.tokens, hidden, self.facts.n_embd))
            } else if self.last && header.has(FLAG_WANT_OUTPUT) {
                self.sample_all(work, row).and_then(|sampled| {
                    let header = Header { kind: Kind::Sampled, ..header };
                    // To choose among a hundred thousand tokens is a part of computing.
                    let compute_us = (took + computed.elapsed()).as_micros() as u32;
                    Ok(Frame::message(header, &Step { sampled, compute_us, ..step.clone() })?)
                })
            } else {
                Frame::message(Header { kind: Kind::Done, ..header }, &step).map_err(StageError::from)
            };
            answers.push(answer.unwrap_or_else(|error| failure(work, &error)));
            row = end;
        }
        if !works.iter().any(|work| work.is_prefill()) {
            self.joining.note(batch_rows, took + computed.elapsed());
        }
    }

    /// The tokens that are wanted after rows, the first of which is row `first` of the batch.
    fn sample_all(&mut self, work: &Work, first: usize) -> Result<Vec<Sampled>, StageError> {
        let is_guess = work.header.has(FLAG_GUESS);
        let session = self.sessions.get_mut(&work.header.session).ok_or(StageError::Protocol("no such session"))?;
        let mut sampled = Vec::new();
        for (at, &token) in work.tokens.iter().enumerate().skip(if is_guess { 0 } else { work.tokens.len() - 1 }) {
            let position = work.header.position + at as u32;
            if is_guess && !session.is_right(position, token) {
                break;
            }
            sampled.push(session.sample(self.context.logits(first + at)?, position + 1)?);
        }
        self.following.extend(session.follow());
        Ok(sampled)
    }

    /// Rows whose tokens were sampled since the last call: to be queued.
    pub(crate) fn following(&mut self) -> Vec<Work> {
        std::mem::take(&mut self.following)
    }

    /// Answers to what was to follow tokens that this stage has not sampled, and never will as long as it has nothing to compute.
    pub(crate) fn unfollowed(&mut self) -> Vec<Frame> {
        let in_vain = self.sessions.values_mut().filter_map(|session| session.next.take());
        let answer =
            |next| Frame::text(Header { kind: Kind::StepFailed, ..next }, "no token was sampled there to go on from");
        in_vain.map(answer).collect()
    }

    /// The KV state of a session, for another stage of the same layers.
    pub(crate) fn save(&mut self, session: u64) -> Result<Vec<u8>, StageError> {
        let sequence = self.sessions.get(&session).ok_or(StageError::Protocol("no such session"))?.sequence;
        Ok(self.context.state(sequence))
    }

    /// Puts a saved KV state of `tokens` into an open session.
    pub(crate) fn restore(&mut self, session: u64, tokens: &[Token], state: &[u8]) -> Result<(), StageError> {
        let sequence = self.sessions.get(&session).ok_or(StageError::Protocol("no such session"))?.sequence;
        self.usable(sequence, false, 0);
        self.context.restore(sequence, state)?;
        self.slots.extended(sequence, tokens, false);
        Ok(())
    }
}

/// Rows for the next stage: `hidden` has `[rows, n_embd]`.
fn hidden_frame(header: Header, tokens: &[Token], hidden: &[f32], n_embd: u32) -> Frame {
    let width = n_embd as usize;
    let mut payload = Vec::with_capacity(size_of_val(tokens) + tokens.len() * header.codec.row_bytes(width));
    payload.extend_from_slice(bytemuck::cast_slice(tokens));
    header.codec.encode(hidden, width, &mut payload);
    Frame { header: Header { kind: Kind::Hidden, ..header }, payload }
}

fn failure(work: &Work, error: &StageError) -> Frame {
    Frame::text(Header { kind: Kind::StepFailed, ..work.header }, &error.to_string())
}
