//! One model: what its file says, how far loading is, its engine once loaded, and what clients see of it. What it takes is in
//! [`memory`].

mod memory;

use std::{
    error::Error,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use murmur_api::backend::{ModelCard, ModelKind, ModelState};
use murmur_engine::{Draft, Engine, EngineError, EngineOptions, Host, Keep, Patience, RemoteStage, Stop};
use murmur_gguf::{Facts, Gguf, LayerRange};
use murmur_protocol::codec::Codec;
use murmur_sampling::Vocabulary;
use murmur_store::{Hold, Store};
use tokio::{runtime::Handle, sync::watch};

pub(crate) use memory::{Room, layer_facts};

use crate::{
    LoadProgress, ModelSpec, NodeError, NodeOptions, Threads,
    contents::wanted::Supply,
    draft::Guessing,
    fit,
    mesh::{
        ModelIdentity,
        ring::{
            Ring, Search, Spread,
            host::{Holding, Terms},
        },
    },
    models::List,
};
use memory::guessing_bytes;

/// Prompt rows per chunk. A long prompt delays running streams by one chunk; larger chunks read the weights less often.
const CHUNK_ROWS: u32 = 256;
/// The same in exact mode, where the attention scores of a chunk are written out.
const CHUNK_ROWS_EXACT: u32 = 128;
/// A process that computes for others, owes them an answer and is silent is ended after this at the earliest: they have somebody else to
/// go to, so a false alarm costs them a moment.
const HOSTED_SILENCE_FLOOR: Duration = Duration::from_secs(4);
/// Requests that may wait for their turn; more are refused with 429.
const QUEUE_MAX: usize = 64;
/// Loading progress is counted in so many parts.
const PROGRESS_PARTS: f32 = 1000.0;

const fn chunk_rows(exact: bool) -> u32 {
    if exact { CHUNK_ROWS_EXACT } else { CHUNK_ROWS }
}

/// Where a node keeps slices.
pub(crate) fn slices_dir(options: &NodeOptions) -> PathBuf {
    options.data_dir.join("slices")
}

/// A model of this node.
pub(crate) struct Model {
    spec: ModelSpec,
    /// Its file is used: nobody removes it to make room. `None`: it was removed while it was opened.
    _held: Option<Hold>,
    /// Loaded when somebody asks for it, and let go when nobody has for a while.
    on_demand: bool,
    layers: u32,
    /// What clients see until it is loaded.
    card: Arc<ModelCard>,
    /// What loading needs of the file, where it was read already; taken by it.
    file: Mutex<Option<ModelFile>>,
    /// How far loading is, in parts of [`PROGRESS_PARTS`].
    progress: AtomicU32,
    /// How long the last load took, in milliseconds; 0: none yet.
    load_ms: AtomicU32,
    life: Mutex<Life>,
    /// Changes when a load has ended.
    loads: watch::Sender<()>,
    /// What it is to other nodes; `None` inside: it cannot be offered.
    identity: OnceLock<Option<ModelIdentity>>,
    /// Where its bytes come from, if the file is not all here.
    supply: OnceLock<Supply>,
    /// Who guesses for it; for one on demand, once it is to be loaded, and where who guesses is on its way, once it is here.
    guessing: OnceLock<Guessing>,
    /// Why and how it is spread over the mesh, if it is.
    spread: OnceLock<Spread>,
    ring: Mutex<RingState>,
    /// For a ring, or a better one.
    search: Mutex<Search>,
    /// Layers of it that this node holds for rings.
    holding: Holding,
    /// All of it, in a process that guesses for other nodes.
    lent: Holding,
    /// Of what is held, and lent.
    holding_stop: Stop,
}

/// How far a model that is spread has got.
#[derive(Default)]
struct RingState {
    /// Why there is no ring yet.
    waiting: Option<String>,
    ring: Option<Arc<Ring>>,
}

/// Where a model is between its file and its engine.
struct Life {
    loaded: Option<Arc<LoadedModel>>,
    /// Engines of rings that were left for better ones: what runs on them ends there.
    left: Vec<Arc<LoadedModel>>,
    is_loading: bool,
    /// What loading it takes, from its beginning to the end of the engine; else 0.
    planned_bytes: u64,
    /// Of the load that is going on, or of the engine.
    stop: Stop,
    /// The node ends: nothing is loaded any more.
    is_ended: bool,
    /// Why the last load failed.
    failure: Option<String>,
    last_used: Instant,
}

impl Life {
    fn engines(&self) -> Vec<Arc<LoadedModel>> {
        self.loaded.iter().chain(&self.left).cloned().collect()
    }

    /// Memory that is set aside for engines.
    fn claimed_bytes(&self) -> u64 {
        let replaced = self.loaded.iter().filter(|_| self.is_loading);
        replaced.chain(&self.left).map(|loaded| loaded.memory_bytes).sum::<u64>() + self.planned_bytes
    }
}

/// A file that was checked.
pub(crate) struct ModelFile {
    pub(crate) gguf: Gguf,
    pub(crate) facts: Facts,
    pub(crate) embedding: bool,
}

/// A load for which memory has been set aside.
pub(crate) struct Plan {
    file: ModelFile,
    ranges: Vec<LayerRange>,
    parallel: u32,
    context_tokens: u32,
    /// Who finds the stages; empty: they are here.
    elsewhere: Vec<Option<Arc<dyn RemoteStage>>>,
    /// How hidden states leave each stage; f32 where nothing is said.
    codecs: Vec<Codec>,
    /// How long a frame is on its way around them, us.
    travel_us: u64,
    draft: Draft,
    stop: Stop,
}

/// What an engine is to be whose stages are in the mesh.
pub(crate) struct RingOptions {
    pub(crate) context_tokens: u32,
    pub(crate) parallel: u32,
    /// The layers of the stages, and who finds those that are not here.
    pub(crate) stages: Vec<(LayerRange, Option<Arc<dyn RemoteStage>>)>,
    /// How hidden states leave each stage.
    pub(crate) codecs: Vec<Codec>,
    /// How long a frame is on its way around them, as predicted, us.
    pub(crate) travel_us: u64,
    /// Who guesses where nothing here does. `None`: that is not wished.
    pub(crate) guessing_elsewhere: Option<Draft>,
}

impl RingOptions {
    /// Layers that are here.
    pub(crate) fn here(&self) -> impl Iterator<Item = LayerRange> {
        self.stages.iter().filter(|(_, elsewhere)| elsewhere.is_none()).map(|(range, _)| *range)
    }
}

/// A model that is loaded. It is not let go while anybody holds it.
pub(crate) struct LoadedModel {
    pub(crate) card: Arc<ModelCard>,
    pub(crate) engine: Engine,
    pub(crate) memory_bytes: u64,
}

impl ModelFile {
    pub(crate) fn read(path: &Path) -> Result<ModelFile, NodeError> {
        let gguf = Gguf::open(path)?;
        gguf.validate_for_engine()?;
        let facts = Facts::of(&gguf).map_err(|reason| NodeError::Unusable { path: path.to_owned(), reason })?;
        let embedding = is_pooling(&gguf);
        Ok(ModelFile { gguf, facts, embedding })
    }
}

impl Model {
    /// Reads a file's header and checks that it can be run.
    pub(crate) fn open(spec: &ModelSpec, options: &NodeOptions, on_demand: bool) -> Result<Model, NodeError> {
        let held = Hold::on(&spec.path);
        let file = ModelFile::read(&spec.path)?;
        // What the user has named to guess must do for what is served from the start; what is still on its way is looked at when it is here.
        let guessing = match on_demand || options.draft.is_awaited() {
            true => OnceLock::new(),
            false => Guessing::of(options, &spec.id, &file)?.into(),
        };
        let ModelFile { gguf, facts, embedding } = &file;
        let context_tokens = options.ctx_tokens.unwrap_or(fit::DEFAULT_CONTEXT_TOKENS).min(facts.context_length);
        let state = match on_demand {
            true => ModelState::Available { loading: None },
            false => ModelState::Loading { fraction: 0.0 },
        };
        let card = ModelCard {
            id: spec.id.clone(),
            created: unix_seconds(),
            kind: if *embedding { ModelKind::Embed } else { ModelKind::Generate },
            context_tokens,
            chat_template: gguf.str("tokenizer.chat_template").map(str::to_owned),
            bos_text: String::new(),
            eos_text: String::new(),
            state,
            details: details(gguf, facts),
        };
        Ok(Model {
            spec: spec.clone(),
            _held: held,
            on_demand,
            layers: facts.layers,
            card: Arc::new(card),
            // A vocabulary is large, and it may be long until this one is wanted.
            file: Mutex::new((!on_demand).then_some(file)),
            progress: AtomicU32::new(0),
            load_ms: AtomicU32::new(0),
            life: Mutex::new(Life {
                loaded: None,
                left: Vec::new(),
                is_loading: false,
                planned_bytes: 0,
                stop: Stop::new(),
                is_ended: false,
                failure: None,
                last_used: Instant::now(),
            }),
            loads: watch::Sender::new(()),
            identity: OnceLock::new(),
            supply: OnceLock::new(),
            guessing,
            spread: OnceLock::new(),
            ring: Mutex::default(),
            search: Mutex::new(Search::new()),
            holding: Holding::default(),
            lent: Holding::default(),
            holding_stop: Stop::new(),
        })
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name clients use.
    pub(crate) fn id(&self) -> &str {
        &self.spec.id
    }

    /// Its file.
    pub(crate) fn path(&self) -> &Path {
        &self.spec.path
    }

    /// Whether it is loaded when somebody asks for it.
    pub(crate) fn is_on_demand(&self) -> bool {
        self.on_demand
    }

    /// What it is to other nodes, once that is known.
    pub(crate) fn identity(&self) -> Option<&ModelIdentity> {
        self.identity.get()?.as_ref()
    }

    /// Whether it was found out what it is to other nodes.
    pub(crate) fn is_identified(&self) -> bool {
        self.identity.get().is_some()
    }

    /// Says what it is to other nodes, if it can be offered to them. The first word counts.
    pub(crate) fn identify(&self, identity: Option<ModelIdentity>) {
        let _ = self.identity.set(identity);
    }

    /// Says where its bytes come from. The first word counts.
    pub(crate) fn supplied_by(&self, supply: Supply) {
        let _ = self.supply.set(supply);
    }

    /// Whether its bytes come from others.
    pub(crate) fn is_supplied(&self) -> bool {
        self.supply.get().is_some()
    }

    /// Its layers.
    pub(crate) fn layers(&self) -> u32 {
        self.layers
    }

    /// What it can be asked for.
    pub(crate) fn kind(&self) -> ModelKind {
        self.card.kind
    }

    /// The model, while it is loaded.
    pub(crate) fn loaded(&self) -> Option<Arc<LoadedModel>> {
        self.life().loaded.clone()
    }

    /// The model for a request, if it is loaded.
    pub(crate) fn used(&self) -> Option<Arc<LoadedModel>> {
        let mut life = self.life();
        life.last_used = Instant::now();
        life.loaded.clone()
    }

    /// Writes down that its file is used. Blocks.
    pub(crate) fn mark_used(&self, options: &NodeOptions) {
        Store::at(&options.data_dir).mark_used(&self.spec.path);
    }

    /// How long loading it took last, in milliseconds; 0: it was not loaded yet.
    pub(crate) fn load_ms(&self) -> u32 {
        self.load_ms.load(Ordering::Relaxed)
    }

    /// Changes when a load has ended.
    pub(crate) fn loads(&self) -> watch::Receiver<()> {
        self.loads.subscribe()
    }

    /// How far loading is: 0 to 1.
    pub(crate) fn fraction(&self) -> f32 {
        (self.progress.load(Ordering::Relaxed) as f32 / PROGRESS_PARTS).min(1.0)
    }

    /// Why the load that somebody waited for has ended without the model.
    pub(crate) fn failure(&self) -> Option<String> {
        let life = self.life();
        (!life.is_loading).then(|| life.failure.clone().unwrap_or_else(|| "it was let go again".to_owned()))
    }

    /// Whether it can be asked now.
    pub(crate) fn state(&self) -> ModelState {
        let (loaded, is_loading, failure) = {
            let life = self.life();
            (life.loaded.clone(), life.is_loading, life.failure.clone())
        };
        match loaded {
            None if self.on_demand => ModelState::Available { loading: is_loading.then(|| self.fraction()) },
            None if self.is_spread() => {
                let waiting = self.ring().0;
                ModelState::Waiting { reason: waiting.unwrap_or_else(|| "other nodes are being looked for".to_owned()) }
            }
            None => match failure.filter(|_| !is_loading) {
                Some(reason) => ModelState::Failed { reason },
                None => ModelState::Loading { fraction: self.fraction() },
            },
            Some(loaded) => match loaded.engine.status().unavailable {
                None => ModelState::Ready,
                Some(reason) => ModelState::Failed { reason },
            },
        }
    }

    /// What clients see of it now.
    pub(crate) fn card(&self) -> Arc<ModelCard> {
        let card = self.loaded().map_or_else(|| self.card.clone(), |loaded| loaded.card.clone());
        match self.state() {
            state if state == card.state => card,
            state => Arc::new(ModelCard { state, ..(*card).clone() }),
        }
    }

    /// Ends what runs or loads, for good and without waiting.
    pub(crate) fn stop(&self) {
        let (stop, engines) = {
            let mut life = self.life();
            life.is_ended = true;
            (life.stop.clone(), life.engines())
        };
        stop.stop();
        self.holding_stop.stop();
        engines.iter().for_each(|loaded| loaded.engine.stop());
    }

    /// Spreads it over the mesh from now on. False: its layers cannot be cut apart, or it gives no text.
    pub(crate) fn spread_over_mesh(&self, options: &NodeOptions, reason: String) -> Result<bool, NodeError> {
        let Some((facts, context_tokens_max)) = layer_facts(&self.spec.path, options.exact, options.parallel)? else {
            return Ok(false);
        };
        let context_tokens = options.ctx_tokens.unwrap_or(fit::DEFAULT_CONTEXT_TOKENS).min(context_tokens_max);
        tracing::info!("{} is spread over the mesh: {reason}", self.id());
        Ok(self.spread.set(Spread { facts, context_tokens, reason }).is_ok())
    }

    /// Why and how it is spread over the mesh, if it is.
    pub(crate) fn spread(&self) -> Option<&Spread> {
        self.spread.get()
    }

    /// Whether it is spread over the mesh.
    pub(crate) fn is_spread(&self) -> bool {
        self.spread.get().is_some()
    }

    /// Layers of it that this node holds for rings.
    pub(crate) fn holding(&self) -> &Holding {
        &self.holding
    }

    /// All of it, where it guesses for other nodes.
    pub(crate) fn lent(&self) -> &Holding {
        &self.lent
    }

    /// What its search for a ring remembers.
    pub(crate) fn search(&self) -> MutexGuard<'_, Search> {
        self.search.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring_state(&self) -> MutexGuard<'_, RingState> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a ring is to be made for it now.
    pub(crate) fn needs_ring(&self) -> bool {
        let life = self.life();
        self.is_spread() && !life.is_loading && !life.is_ended && life.loaded.is_none()
    }

    /// Its engine, while all stages of that are up and no other is being loaded.
    pub(crate) fn in_use(&self) -> Option<Arc<LoadedModel>> {
        let life = self.life();
        life.loaded.clone().filter(|loaded| !life.is_loading && loaded.engine.is_ready())
    }

    /// Whether requests run or wait.
    pub(crate) fn is_working(&self) -> bool {
        self.loaded().is_some_and(|loaded| loaded.engine.is_working())
    }

    /// Whether requests wait although fewer run than could: other drivers' requests are in their places.
    pub(crate) fn is_crowded(&self) -> bool {
        self.in_use().is_some_and(|loaded| {
            let status = loaded.engine.status();
            status.queued > 0 && status.running < loaded.engine.options().parallel as usize
        })
    }

    /// Notes why there is none.
    pub(crate) fn wait_for_ring(&self, reason: String) {
        let mut state = self.ring_state();
        if state.waiting.as_ref() != Some(&reason) {
            tracing::info!("{} waits: {reason}", self.id());
        }
        (state.waiting, state.ring) = (Some(reason), None);
    }

    /// Notes that there is one.
    pub(crate) fn has_ring(&self, ring: Arc<Ring>) {
        let mut state = self.ring_state();
        (state.waiting, state.ring) = (None, Some(ring));
    }

    /// Why there is no ring for it, and the ring if there is one.
    pub(crate) fn ring(&self) -> (Option<String>, Option<Arc<Ring>>) {
        let state = self.ring_state();
        (state.waiting.clone(), state.ring.clone())
    }

    /// Takes out an engine that does not find its stages any more: another ring may.
    pub(crate) fn let_go_failed(&self) -> Option<Arc<LoadedModel>> {
        let mut life = self.life();
        let failed = life.loaded.as_ref().is_some_and(|loaded| loaded.engine.status().unavailable.is_some());
        if !failed || life.is_ended {
            return None;
        }
        // While another one is loaded, it is that one's.
        if !life.is_loading {
            life.planned_bytes = 0;
        }
        life.loaded.take()
    }

    /// Takes out engines that were left for others and on which nothing runs any more.
    pub(crate) fn let_go_left(&self) -> Vec<Arc<LoadedModel>> {
        self.life().left.extract_if(.., |loaded| Arc::strong_count(loaded) == 1).collect()
    }

    /// Takes the model out if nobody holds it, and nobody has asked for it for so long.
    pub(crate) fn let_go(&self, unused_for: Duration) -> Option<Arc<LoadedModel>> {
        let mut life = self.life();
        let in_use = life.loaded.as_ref().is_some_and(|loaded| Arc::strong_count(loaded) > 1);
        if in_use {
            life.last_used = Instant::now();
        }
        if !self.on_demand || in_use || life.last_used.elapsed() < unused_for {
            return None;
        }
        let loaded = life.loaded.take()?;
        life.planned_bytes = 0;
        Some(loaded)
    }

    /// When somebody has asked for it last.
    pub(crate) fn last_used(&self) -> Instant {
        self.life().last_used
    }

    /// Sets memory aside for a load, beside the other models of the node. `None`: it is loaded, or somebody loads it.
    /// Callers see to it that one plan is made at a time.
    pub(crate) fn plan(&self, options: &NodeOptions, models: &List) -> Result<Option<Plan>, NodeError> {
        {
            let life = self.life();
            if life.is_ended {
                return Err(NodeError::Interrupted);
            }
            if life.is_loading || life.loaded.is_some() {
                return Ok(None);
            }
        }
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner).take();
        let file = file.map_or_else(|| ModelFile::read(&self.spec.path), Ok)?;
        let ranges = if file.embedding || options.stages <= 1 {
            vec![LayerRange::new(0, file.facts.layers)]
        } else {
            murmur_gguf::even_cuts(&file.gguf, options.stages)?
        };
        let parallel = if file.embedding { 1 } else { options.parallel };
        let (demand, context_tokens, draft) = self.fit(&file, options, (parallel, ranges.len() as u32), models)?;
        let stop = self.begin(demand.bytes(context_tokens)).ok_or(NodeError::Interrupted)?;
        Ok(Some(Plan {
            file,
            ranges,
            parallel,
            context_tokens,
            elsewhere: Vec::new(),
            codecs: Vec::new(),
            travel_us: 0,
            draft,
            stop,
        }))
    }

    /// A load of stages in the mesh, beside the engine that there is. `None`: it is being loaded. `planned_bytes`: for stages that
    /// are here; `spare_bytes`: what is available besides. A model that guesses and does not fit into that is done without.
    pub(crate) fn plan_ring(
        &self,
        ring: RingOptions,
        options: &NodeOptions,
        (mut planned_bytes, spare_bytes): (u64, u64),
    ) -> Result<Option<Plan>, NodeError> {
        let RingOptions { context_tokens, parallel, stages, codecs, travel_us, guessing_elsewhere } = ring;
        let file = ModelFile::read(&self.spec.path)?;
        let guessing = self.guessing(options, &file);
        let draft_bytes = guessing_bytes(guessing, options, parallel, context_tokens);
        let has_room = draft_bytes <= spare_bytes.saturating_add(self.reserved_bytes(options));
        if !has_room {
            tracing::warn!("{}: there is no room beside its ring for the model that guesses", self.id());
        }
        let draft = match guessing {
            Guessing::Model(_) if has_room => {
                planned_bytes += draft_bytes;
                guessing.draft()
            }
            Guessing::Off => Draft::Off,
            Guessing::Model(_) | Guessing::Lookup => guessing_elsewhere.unwrap_or(Draft::Lookup),
        };
        let (ranges, elsewhere) = stages.into_iter().unzip();
        let plan = |stop| Plan { file, ranges, parallel, context_tokens, elsewhere, codecs, travel_us, draft, stop };
        Ok(self.begin(planned_bytes).map(plan))
    }

    /// Who guesses for it. What the user has named and does not do for a model on demand does no harm.
    fn guessing(&self, options: &NodeOptions, file: &ModelFile) -> &Guessing {
        self.guessing.get_or_init(|| {
            Guessing::of(options, self.id(), file).unwrap_or_else(|error| {
                tracing::info!("{}", with_causes(&error));
                Guessing::Lookup
            })
        })
    }

    /// Finds out who guesses for it, unless that is known, or it is on demand. Blocks.
    pub(crate) fn settle_guessing(&self, options: &NodeOptions) -> Result<(), NodeError> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(file), None) = (file.as_ref(), self.guessing.get()) {
            let _ = self.guessing.set(Guessing::of(options, self.id(), file)?);
        }
        Ok(())
    }

    /// Notes that a load begins, unless one goes on or the node ends.
    fn begin(&self, planned_bytes: u64) -> Option<Stop> {
        let stop = Stop::new();
        let mut life = self.life();
        if life.is_ended || life.is_loading {
            return None;
        }
        life.is_loading = true;
        life.failure = None;
        life.planned_bytes = planned_bytes;
        life.stop = stop.clone();
        self.progress.store(0, Ordering::Relaxed);
        Some(stop)
    }

    /// Loads layers of it for rings. Blocks, in a runtime.
    pub(crate) fn load_stage(&self, terms: Terms, options: &NodeOptions) -> Result<Host, NodeError> {
        let Terms { range, context_tokens, parallel, exact } = terms;
        if let Some(supply) = self.supply.get() {
            supply.fetch(&Gguf::open(&self.spec.path)?, &[range], &|_| ())?;
        }
        let patience = Patience { silence_floor: HOSTED_SILENCE_FLOOR, ..Patience::default() };
        let engine_options = EngineOptions {
            exact,
            chunk_rows: chunk_rows(exact),
            patience,
            ..self.engine_options(options, vec![range], context_tokens, parallel)
        };
        let host = Host::load(&engine_options, range, &self.holding_stop, &Handle::current(), |_| {});
        self.mark_used(options);
        host.map_err(|source| NodeError::Engine { model: self.spec.id.clone(), source })
    }

    /// Splits and loads it as planned. Blocks.
    pub(crate) fn load(
        &self,
        plan: Plan,
        options: &NodeOptions,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<(), NodeError> {
        let started = Instant::now();
        let outcome = self.load_engine(plan, options, progress);
        self.mark_used(options);
        let mut life = self.life();
        life.is_loading = false;
        life.last_used = Instant::now();
        let outcome = match outcome {
            Ok(engine) => {
                let card = Arc::new(self.loaded_card(&engine));
                let loaded = LoadedModel { card, engine, memory_bytes: life.planned_bytes };
                self.load_ms.store(u32::try_from(started.elapsed().as_millis()).unwrap_or(u32::MAX), Ordering::Relaxed);
                if let Some(before) = life.loaded.replace(Arc::new(loaded)) {
                    before.engine.send_waiting_away("another ring is used now");
                    life.left.push(before);
                }
                // Stopped in the last moment, before there was an engine to tell.
                if life.is_ended { Err(NodeError::Interrupted) } else { Ok(()) }
            }
            Err(error) => {
                life.planned_bytes = life.loaded.as_ref().map_or(0, |loaded| loaded.memory_bytes);
                life.failure = Some(with_causes(&error));
                Err(error)
            }
        };
        let is_ended = life.is_ended;
        drop(life);
        if is_ended {
            self.stop();
        }
        self.loads.send_replace(());
        outcome
    }

    fn load_engine(
        &self,
        plan: Plan,
        options: &NodeOptions,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Engine, NodeError> {
        let Plan { file, ranges, parallel, context_tokens, elsewhere, codecs, travel_us, draft, stop } = plan;
        if let Some(supply) = self.supply.get() {
            let is_here = |at: &usize| elsewhere.get(*at).is_none_or(Option::is_none);
            let here: Vec<LayerRange> = (0..ranges.len()).filter(is_here).map(|at| ranges[at]).collect();
            let heard = |fraction: f32| self.progress.store((fraction * PROGRESS_PARTS) as u32, Ordering::Relaxed);
            supply.fetch(&file.gguf, &here, &heard)?;
        }
        let engine_options = EngineOptions {
            embedding: file.embedding,
            codecs,
            travel_us,
            draft,
            ..self.engine_options(options, ranges, context_tokens, parallel)
        };
        let stages = engine_options.ranges.len();
        // Stages are loaded one after the other.
        let heard = |stage: usize, fraction: f32| {
            let share = (stage as f32 + fraction.clamp(0.0, 1.0)) / stages as f32;
            self.progress.store((share * PROGRESS_PARTS) as u32, Ordering::Relaxed);
            progress(LoadProgress { model: self.spec.id.clone(), stage, fraction });
        };
        let engine = Engine::load_spread(engine_options, &elsewhere, stop, heard);
        engine.map_err(|source| match source {
            EngineError::Stopped => NodeError::Interrupted,
            source => NodeError::Engine { model: self.spec.id.clone(), source },
        })
    }

    fn engine_options(
        &self,
        options: &NodeOptions,
        ranges: Vec<LayerRange>,
        context_tokens: u32,
        parallel: u32,
    ) -> EngineOptions {
        EngineOptions {
            program: options.engine_program.clone(),
            model: self.spec.path.clone(),
            content_addressed: self.is_supplied(),
            slices_dir: slices_dir(options),
            embedding: false,
            ranges,
            context_tokens,
            parallel,
            queue_max: QUEUE_MAX,
            chunk_rows: chunk_rows(options.exact),
            threads: match options.threads {
                Threads::Auto => None,
                Threads::Fixed(n) => Some(n),
            },
            exact: options.exact,
            gpu_layers: options.gpu_layers,
            patience: Patience::default(),
            keep: Keep::default(),
            codecs: Vec::new(),
            draft: Draft::Off,
            travel_us: 0,
        }
    }

    fn loaded_card(&self, engine: &Engine) -> ModelCard {
        let options = engine.options();
        let mut details = self.card.details.clone();
        details["context_tokens"] = options.context_tokens.into();
        details["parallel"] = options.parallel.into();
        details["exact"] = options.exact.into();
        details["stages"] = options.ranges.iter().map(|r| format!("{}-{}", r.first, r.end)).collect();
        ModelCard {
            context_tokens: options.context_tokens,
            state: ModelState::Ready,
            details,
            ..with_texts(&self.card, engine.vocabulary())
        }
    }
}

/// Models that pool their outputs give embeddings, not text.
fn is_pooling(gguf: &Gguf) -> bool {
    gguf.arch_u32("pooling_type").is_some_and(|kind| kind > 0) || gguf.architecture() == "bert"
}

/// What the file alone says.
fn details(gguf: &Gguf, facts: &Facts) -> serde_json::Value {
    serde_json::json!({
        "architecture": gguf.architecture(),
        "name": gguf.name(),
        "layers": facts.layers,
        "embedding_length": facts.embedding_length,
        "vocabulary": facts.vocabulary,
        "trained_context_tokens": facts.context_length,
        "file_bytes": gguf.file_bytes(),
    })
}

/// An error and what led to it, in one line.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let (mut text, mut next) = (error.to_string(), error.source());
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// A card with the texts of the tokens that begin and end a sequence.
pub(crate) fn with_texts(card: &ModelCard, vocabulary: &Vocabulary) -> ModelCard {
    let text = |token: Option<i32>| {
        token.map(|token| String::from_utf8_lossy(vocabulary.bytes(token)).into_owned()).unwrap_or_default()
    };
    ModelCard { bos_text: text(vocabulary.bos()), eos_text: text(vocabulary.eos()), ..card.clone() }
}

/// The wall clock, which is only shown.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
