//! The models of a node: those it loads when it starts, and those it loads when somebody asks.
//!
//! A model on demand is loaded by the first request for it; further ones wait with it. It is let go when nobody has asked for
//! a while, or earlier when another one needs the room and this is the one that was used longest ago. Room is what
//! [`crate::fit`] says: nothing is loaded that does not fit.

use std::{
    ops::{Deref, Index},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use murmur_engine::{SessionEvent, SessionRequest, SessionStream, StartError};
use tokio::{sync::watch, time::MissedTickBehavior};

use crate::{
    LoadProgress, ModelSpec, NodeError, NodeOptions,
    contents::wanted::Supply,
    mesh::{
        ModelIdentity,
        ring::host::{self, Terms},
    },
    model::{self, LoadedModel, Model, RingOptions, Room, with_causes},
};

/// How often it is looked whether a model was not used for a while.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often it is written down which files are used.
const REMEMBER_EVERY: Duration = Duration::from_secs(600);
/// How often those who wait for a load hear how far it is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// An answer whose ring is gone waits so long for the next one.
const NEXT_RING_MAX: Duration = Duration::from_secs(60);

/// Models in the order in which they are listed. It grows and never shrinks, so that a model keeps its place.
#[derive(Default)]
pub(crate) struct List(boxcar::Vec<Model>);

impl List {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Model> {
        self.0.iter().map(|(_, model)| model)
    }

    pub(crate) fn get(&self, at: usize) -> Option<&Model> {
        self.0.get(at)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.count()
    }
}

impl Index<usize> for List {
    type Output = Model;

    fn index(&self, at: usize) -> &Model {
        &self.0[at]
    }
}

/// All of them.
pub(crate) struct Models {
    list: List,
    options: NodeOptions,
    /// Held while it is found out whether one more fits, so that two do not count on the same room.
    planning: Mutex<()>,
}

impl Deref for Models {
    type Target = List;

    fn deref(&self) -> &List {
        &self.list
    }
}

impl Models {
    /// Reads the headers of the models' files. Blocks.
    pub(crate) fn open(options: NodeOptions) -> Result<Models, NodeError> {
        let list = List::default();
        for spec in &options.models {
            if list.iter().any(|model| model.id() == spec.id) {
                return Err(NodeError::SameName(spec.id.clone()));
            }
            list.0.push(Model::open(spec, &options, false)?);
        }
        for spec in &options.on_demand {
            if list.iter().any(|model| model.id() == spec.id) {
                continue;
            }
            match Model::open(spec, &options, true) {
                Ok(model) => {
                    list.0.push(model);
                }
                Err(error) => tracing::warn!("{} is not offered: {}", spec.id, with_causes(&error)),
            }
        }
        Ok(Models { list, options, planning: Mutex::default() })
    }

    pub(crate) fn options(&self) -> &NodeOptions {
        &self.options
    }

    /// Where the model of this name is in the list.
    pub(crate) fn find(&self, id: &str) -> Option<usize> {
        self.list.iter().position(|model| model.id() == id)
    }

    /// One more. Only its header has to be here, where it is `supplied` by others. Returns its place. Blocks.
    pub(crate) fn add(&self, spec: &ModelSpec, supplied: Option<(ModelIdentity, Supply)>) -> Result<usize, NodeError> {
        let model = Model::open(spec, &self.options, false)?;
        if let Some((identity, supply)) = supplied {
            model.identify(Some(identity));
            model.supplied_by(supply);
        }
        let _planning = self.planning.lock().unwrap_or_else(PoisonError::into_inner);
        match self.find(&spec.id) {
            Some(_) => Err(NodeError::SameName(spec.id.clone())),
            None => Ok(self.list.0.push(model)),
        }
    }

    /// Finds out who guesses for those that are served from the start, now that who was named is here. Blocks.
    pub(crate) fn settle_guessing(&self) -> Result<(), NodeError> {
        self.list.iter().try_for_each(|model| model.settle_guessing(&self.options))
    }

    /// Loads those that are not on demand, one after the other. Blocks. The first that cannot be loaded ends it.
    pub(crate) fn load(&self, progress: &dyn Fn(LoadProgress)) -> Result<(), NodeError> {
        for model in self.list.iter().filter(|model| !model.is_on_demand()) {
            self.load_one(model, progress)?;
        }
        self.tidy_slices();
        Ok(())
    }

    /// Loads a model, or spreads it over the mesh. Blocks.
    pub(crate) fn load_one(&self, model: &Model, progress: &dyn Fn(LoadProgress)) -> Result<(), NodeError> {
        if self.is_beyond_share(model)? {
            return Ok(());
        }
        let planned = self.plan(model);
        // What does not fit this node is one for the mesh; what would but for the model that guesses is not.
        if let (Err(NodeError::Fit { shortage, .. }), true) = (&planned, self.options.spread)
            && !shortage.fits_without_draft
            && model.spread_over_mesh(&self.options, shortage.to_string())?
        {
            return Ok(());
        }
        match planned? {
            Some(plan) => model.load(plan, &self.options, progress),
            None => Ok(()),
        }
    }

    /// Whether a model is one for the mesh, because this node is not to hold it whole.
    fn is_beyond_share(&self, model: &Model) -> Result<bool, NodeError> {
        let options = &self.options;
        match options.layers_max.filter(|&max| options.spread && max < model.layers()) {
            None => Ok(false),
            Some(max) => {
                let reason = format!("of its {} layers this node contributes {max} at most", model.layers());
                model.spread_over_mesh(options, reason)
            }
        }
    }

    /// Sets memory aside for layers of a model.
    pub(crate) fn set_aside(&self, at: usize, terms: Terms) -> Result<u64, NodeError> {
        let _planning = self.planning.lock().unwrap_or_else(PoisonError::into_inner);
        let (model, none) = (&self.list[at], || NodeError::Interrupted);
        let spread = model.spread().ok_or_else(none)?;
        let available_bytes = model.available_bytes(&self.options, &Room::of(&self.list));
        Self::fits(model, terms, (spread.stage_bytes(terms), available_bytes))
    }

    /// Sets memory aside for a model that guesses for other nodes, beside its own engine. Blocks.
    pub(crate) fn set_aside_lent(&self, at: usize, terms: Terms) -> Result<u64, NodeError> {
        let _planning = self.planning.lock().unwrap_or_else(PoisonError::into_inner);
        let model = &self.list[at];
        Self::fits(model, terms, model.lent_bytes(terms, &self.options, &self.list)?)
    }

    fn fits(model: &Model, terms: Terms, (needed_bytes, available_bytes): (u64, u64)) -> Result<u64, NodeError> {
        if needed_bytes > available_bytes {
            return Err(NodeError::StageFit {
                model: model.id().to_owned(),
                layers: terms.range,
                needed_bytes,
                available_bytes,
            });
        }
        Ok(needed_bytes)
    }

    /// Sets memory aside for the stages of a ring that are here. `None`: the model is being loaded.
    pub(crate) fn plan_ring(&self, at: usize, ring: RingOptions) -> Result<Option<model::Plan>, NodeError> {
        let _planning = self.planning.lock().unwrap_or_else(PoisonError::into_inner);
        let model = &self.list[at];
        let (context_tokens, parallel, exact) = (ring.context_tokens, ring.parallel, self.options.exact);
        let bytes = |range| {
            let spread = model.spread().ok_or(NodeError::Interrupted)?;
            Ok((range, spread.stage_bytes(Terms { range, context_tokens, parallel, exact })))
        };
        let here = ring.here().map(bytes).collect::<Result<Vec<_>, NodeError>>()?;
        let needed_bytes: u64 = here.iter().map(|(_, bytes)| bytes).sum();
        let held_bytes = model.holding().held().as_ref().map_or(0, |held| held.memory_bytes);
        let available_bytes = model.available_bytes(&self.options, &Room::of(&self.list)).saturating_sub(held_bytes);
        match here.first() {
            Some(&(layers, _)) if needed_bytes > available_bytes => {
                Err(NodeError::StageFit { model: model.id().to_owned(), layers, needed_bytes, available_bytes })
            }
            _ => model.plan_ring(ring, &self.options, (needed_bytes, available_bytes.saturating_sub(needed_bytes))),
        }
    }

    /// Makes room for a model and sets it aside. Blocks.
    fn plan(&self, model: &Model) -> Result<Option<model::Plan>, NodeError> {
        let _planning = self.planning.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let shortage = match model.plan(&self.options, &self.list) {
                Err(error @ NodeError::Fit { .. }) => error,
                planned => return planned,
            };
            // Those that were used longest ago go first, as many as it takes.
            let mut unused: Vec<&Model> = self.list.iter().collect();
            unused.sort_by_key(|model| model.last_used());
            let Some(loaded) = unused.into_iter().find_map(|model| model.let_go(Duration::ZERO)) else {
                return Err(shortage);
            };
            tracing::info!("{} makes room for {}", loaded.card.id, model.id());
            // Its processes are gone when this returns.
            drop(loaded);
        }
    }

    /// Begins to load a model unless it is loaded, or being loaded. Returns once it is clear whether it fits.
    pub(crate) async fn wake(self: &Arc<Self>, at: usize) -> Result<Waking, NodeError> {
        self.options.draft.is_here().await;
        let waking = Waking::new(Arc::clone(self), at);
        let models = Arc::clone(self);
        let planned = tokio::task::spawn_blocking(move || models.list.get(at).map(|model| models.plan(model)));
        let plan = planned.await.map_err(|_| NodeError::Interrupted)?.ok_or(NodeError::Interrupted)??;
        if let Some(plan) = plan {
            let models = Arc::clone(self);
            // It goes on when the request that began it is gone: others may wait for it. Model::stop ends it.
            tokio::task::spawn_blocking(move || {
                let Some(model) = models.list.get(at) else { return };
                if let Err(error) = model.load(plan, &models.options, &|_| ()) {
                    tracing::error!("{} could not be loaded: {}", model.id(), with_causes(&error));
                }
            });
        }
        Ok(waking)
    }

    fn tidy_slices(&self) {
        let held = self.list.iter().filter_map(|model| model.holding().file());
        let loaded = self.list.iter().filter_map(Model::loaded);
        let used = loaded.flat_map(|model| model.engine.files()).chain(held).collect();
        let folder = model::slices_dir(&self.options);
        let freed_bytes = murmur_engine::prune_slices(&folder, &used, murmur_engine::UNUSED_SLICES_BYTES_MAX);
        if freed_bytes > 0 {
            tracing::info!(freed_bytes, "removed slices of models that are not used any more");
        }
    }
}

/// Remembers that the files of models that are loaded are used, for as long as there is a node: when it has ended, they go later than others.
pub(crate) async fn remember_use(models: Weak<Models>) {
    let mut ticks = tokio::time::interval(REMEMBER_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(models) = models.upgrade() else { return };
        // A store that is slow or cannot be written to holds nobody up.
        let _ = tokio::task::spawn_blocking(move || {
            let used = models.iter().filter(|model| model.loaded().is_some() || model.holding().held().is_some());
            used.for_each(|model| model.mark_used(&models.options));
        })
        .await;
    }
}

/// Lets go what was not used for a while, for as long as there is a node.
pub(crate) async fn tend(models: Weak<Models>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(models) = models.upgrade() else { return };
        let lent = models.iter().filter_map(|model| model.lent().let_go(host::UNUSED_MAX)).collect::<Vec<_>>();
        if !lent.is_empty() {
            let _ = tokio::task::spawn_blocking(move || drop(lent)).await;
        }
        let unused: Vec<_> = models.iter().filter_map(|model| model.let_go(models.options.idle)).collect();
        for loaded in unused {
            tracing::info!("{} was not used for a while and is let go", loaded.card.id);
            // Dropping an engine waits for its processes.
            let _ = tokio::task::spawn_blocking(move || drop(loaded)).await;
        }
    }
}

/// A model that is being loaded for somebody.
pub(crate) struct Waking {
    models: Arc<Models>,
    at: usize,
    loads: watch::Receiver<()>,
    ticks: tokio::time::Interval,
}

/// How a wait for a model goes on.
pub(crate) enum Awaited {
    /// It does: so far.
    Loading(f32),
    /// It is over.
    Loaded(Arc<LoadedModel>),
    /// It is over, and there is no model.
    Failed(String),
}

impl Waking {
    fn new(models: Arc<Models>, at: usize) -> Waking {
        let loads = models.list.get(at).map_or_else(|| watch::Sender::new(()).subscribe(), Model::loads);
        let mut ticks = tokio::time::interval(TELL_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Waking { models, at, loads, ticks }
    }

    /// The next that is known of it; at once the first time. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Awaited {
        tokio::select! {
            _ = self.loads.changed() => {}
            _ = self.ticks.tick() => {}
        }
        let Some(model) = self.models.list.get(self.at) else { return Awaited::Failed("it is gone".to_owned()) };
        // In this order: a load that ends in between has left the model.
        let failure = model.failure();
        match (model.used(), failure) {
            (Some(loaded), _) => Awaited::Loaded(loaded),
            (None, None) => Awaited::Loading(model.fraction()),
            (None, Some(reason)) => Awaited::Failed(reason),
        }
    }

    /// Starts an answer on it.
    pub(crate) fn start(&self, loaded: Arc<LoadedModel>, request: SessionRequest) -> Result<LocalStream, StartError> {
        LocalStream::start(&self.models, self.at, loaded, request)
    }

    /// Waits for its end.
    pub(crate) async fn loaded(mut self) -> Result<Arc<LoadedModel>, String> {
        loop {
            match self.next().await {
                Awaited::Loading(_) => {}
                Awaited::Loaded(loaded) => return Ok(loaded),
                Awaited::Failed(reason) => return Err(reason),
            }
        }
    }
}

/// An answer of this machine's own engine. The model is not let go before it is over. When stages of a ring are lost and nobody can hold
/// them, the answer goes on around the next ring; so does one that has still to begin when there is another ring.
pub(crate) struct LocalStream {
    models: Arc<Models>,
    at: usize,
    /// What another engine would be asked for: with the tokens that have come.
    request: SessionRequest,
    place: Place,
    /// An engine has told what is known of the prompt.
    is_prompt_told: bool,
    /// The one before has: this one says it again.
    was_prompt_told: bool,
}

/// Where an answer is made.
enum Place {
    Engine {
        stream: SessionStream,
        _model: Arc<LoadedModel>,
    },
    /// Nowhere, until there is another ring, or until then.
    Waiting {
        reason: String,
        until: Instant,
    },
}

impl LocalStream {
    /// Starts one on the model at this place, which is loaded.
    pub(crate) fn start(
        models: &Arc<Models>,
        at: usize,
        loaded: Arc<LoadedModel>,
        request: SessionRequest,
    ) -> Result<LocalStream, StartError> {
        let stream = loaded.engine.start(request.clone())?;
        let place = Place::Engine { stream, _model: loaded };
        let models = Arc::clone(models);
        Ok(LocalStream { models, at, request, place, is_prompt_told: false, was_prompt_told: false })
    }

    /// The next event. Nothing is lost if it is dropped before it is done.
    pub(crate) async fn next(&mut self) -> Option<SessionEvent> {
        loop {
            match &mut self.place {
                Place::Engine { stream, .. } => match stream.next().await? {
                    SessionEvent::Lost(reason) if self.models[self.at].is_spread() => {
                        self.place = Place::Waiting { reason, until: Instant::now() + NEXT_RING_MAX };
                    }
                    SessionEvent::Lost(reason) => return Some(SessionEvent::Failed(reason)),
                    SessionEvent::Prefill { .. } if self.was_prompt_told => {}
                    event => {
                        self.is_prompt_told |= matches!(event, SessionEvent::Prefill { .. });
                        if let SessionEvent::Token(sampled) = &event {
                            self.request.generated.push(sampled.token);
                        }
                        return Some(event);
                    }
                },
                Place::Waiting { reason, until } => {
                    if *until <= Instant::now() {
                        let (reason, waited_s) = (reason.clone(), NEXT_RING_MAX.as_secs());
                        return Some(SessionEvent::Failed(format!("{reason}; no other ring within {waited_s} s")));
                    }
                    if let Err(error) = self.goes_on().await {
                        return Some(SessionEvent::Failed(error.to_string()));
                    }
                }
            }
        }
    }

    /// Goes on with another engine if there is one, else waits for a moment.
    async fn goes_on(&mut self) -> Result<(), StartError> {
        let model = &self.models[self.at];
        let mut loads = model.loads();
        if let Some(loaded) = model.used() {
            match loaded.engine.start(self.request.clone()) {
                Ok(stream) => {
                    self.place = Place::Engine { stream, _model: loaded };
                    self.was_prompt_told = self.is_prompt_told;
                    return Ok(());
                }
                Err(StartError::Unavailable(_) | StartError::QueueFull(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let _ = tokio::time::timeout(TELL_EVERY, loads.changed()).await;
        Ok(())
    }
}
