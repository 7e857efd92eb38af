//! This node as the host of a stage: it loads the layers that a driver asks for, and computes for every driver that asks for
//! the same.
//!
//! Of each model a node holds one range at a time. It loads it for the first driver, and lets it go some time after the last
//! has left. Hidden states go straight on to the host of the next stage ([`super::hop`]); a driver that has not said who that is
//! gets them itself.

use std::{
    collections::{HashMap, hash_map::Entry},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt, stream::FuturesUnordered};
use murmur_engine::{Guest, Host, Speed};
use murmur_gguf::LayerRange;
use murmur_protocol::{
    frame::{FLAG_HANDED_ON, FLAG_PREFILL, FLAG_WATCHED, Frame, FrameError, Header, Kind},
    mesh::{ModelState, RingId, StageOpen},
    stage::Route,
};
use tokio::sync::{Semaphore, mpsc, watch};

use super::{
    alive,
    carry::{self, Drain, FrameReader},
    hop::{self, Hop, STREAMS_IN_MAX, Streams},
    offers::{self, Offer},
};
use crate::{
    Node, NodeOptions,
    mesh::MeshNode,
    model::{Model, with_causes},
};

/// Layers that no driver uses are let go after this.
pub(crate) const UNUSED_MAX: Duration = Duration::from_secs(60);
/// Answers that may wait for a driver to take them. One that leaves more unread is no driver any more.
const ANSWERS_MAX: usize = 1024;
/// Answers that are written at once.
pub(super) const ANSWERS_AT_ONCE: usize = 64;
/// How long a driver does not hear of single rows that went on to the next host. It would be told of each in a packet of its own.
const ACCOUNTS_DELAY: Duration = Duration::from_millis(20);
/// How often a driver hears that its stage is there, or is being loaded.
pub(super) const HEARTBEAT: Duration = Duration::from_millis(250);

/// What a driver and its host must agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Terms {
    /// The layers.
    pub(crate) range: LayerRange,
    /// Tokens per request.
    pub(crate) context_tokens: u32,
    /// Requests at once.
    pub(crate) parallel: u32,
    /// Bit-equal results.
    pub(crate) exact: bool,
}

/// Layers of a model that this node holds, or is loading.
pub(crate) struct Held {
    pub(crate) terms: Terms,
    /// `None`: being loaded.
    pub(crate) host: Option<Arc<Host>>,
    /// Memory that was set aside.
    pub(crate) memory_bytes: u64,
    last_used: Instant,
}

impl Held {
    /// Whether drivers use it, or one is about to.
    pub(super) fn is_used(&self) -> bool {
        self.host.as_ref().is_some_and(|host| host.guests() > 0 || Arc::strong_count(host) > 1)
    }
}

/// The place for them in a model.
#[derive(Default)]
pub(crate) struct Holding {
    held: Mutex<Option<Held>>,
    /// Taken by whoever loads.
    pub(super) loading: Arc<tokio::sync::Mutex<()>>,
}

impl Holding {
    pub(crate) fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file that its process has loaded.
    pub(crate) fn file(&self) -> Option<PathBuf> {
        self.held().as_ref()?.host.as_ref().map(|host| host.file().to_owned())
    }

    /// Lets go what died, or was not used for so long. What is returned is to be dropped where one may wait.
    pub(crate) fn let_go(&self, unused_for: Duration) -> Option<Held> {
        let mut held = self.held();
        let gone = held.as_mut().is_some_and(|held| {
            if held.is_used() {
                held.last_used = Instant::now();
            }
            let is_over = |host: &Arc<Host>| host.is_dead() || held.last_used.elapsed() >= unused_for;
            held.host.as_ref().is_some_and(is_over)
        });
        if gone { held.take() } else { None }
    }
}

/// Drivers at this node's stages, by the names of their rings: where hidden states of other hosts go.
#[derive(Default)]
pub(crate) struct Rings(Mutex<HashMap<RingId, Entrance>>);

/// Where those for one driver come in.
struct Entrance {
    guest: Arc<Guest>,
    /// One for each stream.
    places: Arc<Semaphore>,
}

impl Rings {
    fn rings(&self) -> MutexGuard<'_, HashMap<RingId, Entrance>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver of a ring, and places for the streams that lead to it.
    pub(super) fn find(&self, ring: &RingId) -> Option<(Weak<Guest>, Arc<Semaphore>)> {
        let rings = self.rings();
        rings.get(ring).map(|entrance| (Arc::downgrade(&entrance.guest), Arc::clone(&entrance.places)))
    }

    /// Lists a driver. `None`: there is a ring of this name. Drivers name theirs by chance, so whoever comes with a name that is taken
    /// has heard it as a host, and is to have nothing of what goes to the other.
    fn list(&self, ring: RingId, guest: &Arc<Guest>) -> Option<Listed<'_>> {
        match self.rings().entry(ring) {
            Entry::Occupied(_) => None,
            Entry::Vacant(vacant) => {
                let (guest, places) = (Arc::clone(guest), Arc::new(Semaphore::new(STREAMS_IN_MAX)));
                vacant.insert(Entrance { guest, places });
                Some(Listed { rings: self, ring })
            }
        }
    }
}

/// A driver's entry in them; dropped, it is out.
struct Listed<'a> {
    rings: &'a Rings,
    ring: RingId,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.rings.rings().remove(&self.ring);
    }
}

/// The range for a driver, loaded if needed. Errors are for people.
async fn hold(node: &Arc<Node>, mesh: &MeshNode, at: usize, terms: Terms) -> Result<Arc<Host>, String> {
    let model = &node.models[at];
    let refused = |there: Terms| {
        let Terms { range, context_tokens, parallel, exact } = there;
        let how = if exact { " with --exact" } else { "" };
        Err(format!("this node holds layers {range} of it for others, for {parallel} x {context_tokens} tokens{how}"))
    };
    let other = || model.holding().held().as_ref().map(|held| (held.terms, held.host.is_some()));
    // Another one need not wait for that load.
    if let Some((there, false)) = other().filter(|(there, _)| *there != terms) {
        return refused(there);
    }
    let turn = Arc::clone(&model.holding().loading).lock_owned().await;
    let is_spare = match other() {
        Some((there, _)) if there != terms => is_spare(node, mesh, model, there, terms).await,
        _ => false,
    };
    let unwanted = {
        let mut held = model.holding().held();
        match held.as_ref().and_then(|held| Some((held, held.host.as_ref().filter(|host| !host.is_dead())?))) {
            Some((there, host)) if there.terms == terms => return Ok(host.clone()),
            Some((there, _)) if there.is_used() && !is_spare => return refused(there.terms),
            _ => held.take(),
        }
    };
    let node = Arc::clone(node);
    // It goes on when the driver that began it is gone: others may want the same.
    let loading = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        // Its memory is free when it is gone.
        drop(unwanted);
        let model = &node.models[at];
        let memory_bytes = node.models.set_aside(at, terms).map_err(|error| with_causes(&error))?;
        load(&node, model, model.holding(), terms, memory_bytes)
    });
    loading.await.map_err(|_| "this node is stopping".to_owned())?
}

/// Whether what is held here is held elsewhere too, and what is asked for nowhere: then the one can be given up for the other. Of
/// those that hold the same, the one with the lowest id keeps it. A driver may ask for what somebody holds: it has lost sight of that
/// node for a moment. That is no reason to interrupt others.
async fn is_spare(node: &Node, mesh: &MeshNode, model: &Model, there: Terms, asked: Terms) -> bool {
    let Some(identity) = model.identity() else { return false };
    let (own, offers) = (mesh.mesh().node_id(), offers::allowed(node, mesh, &identity.digest));
    let keeps_it = offers.iter().filter(|other| other.node < own && other.is_used() && other.terms() == there);
    let have_it = offers.iter().filter(|other| other.node != own && other.is_loaded() && other.terms() == asked);
    let (is_kept, is_to_be_had) = tokio::join!(any_is_there(mesh, keeps_it), any_is_there(mesh, have_it));
    is_kept && !is_to_be_had
}

/// Whether one of those answers. One that died a moment ago is still listed.
async fn any_is_there<'a>(mesh: &MeshNode, listed: impl Iterator<Item = &'a Offer>) -> bool {
    let mut asked: FuturesUnordered<_> = listed.map(|offer| alive::is_there(mesh, offer.node, alive::ALONE)).collect();
    while let Some(is_there) = asked.next().await {
        if is_there {
            return true;
        }
    }
    false
}

/// Loads layers of a model into the place for them. Blocks. `memory_bytes`: what is set aside for that.
pub(super) fn load(
    node: &Node,
    model: &Model,
    place: &Holding,
    terms: Terms,
    memory_bytes: u64,
) -> Result<Arc<Host>, String> {
    *place.held() = Some(Held { terms, host: None, memory_bytes, last_used: Instant::now() });
    let loaded = model.load_stage(terms, node.options());
    let mut held = place.held();
    match loaded {
        Ok(host) => {
            let host = Arc::new(host);
            *held = Some(Held { terms, host: Some(host.clone()), memory_bytes, last_used: Instant::now() });
            tracing::info!("{}: layers {} are loaded for others", model.id(), terms.range);
            Ok(host)
        }
        Err(error) => {
            *held = None;
            Err(with_causes(&error))
        }
    }
}

/// Layers of a model that this node holds for others at most, where there is a limit: the ends that it keeps for its own ring are
/// among those that it contributes.
pub(crate) fn layers_max(options: &NodeOptions) -> Option<u32> {
    let kept = options.ring.keep_ends.unwrap_or(0).saturating_mul(2);
    options.layers_max.map(|max| max.saturating_sub(kept))
}

fn admit(node: &Node, open: &StageOpen) -> Result<(usize, Terms), String> {
    if let Some(reason) = node.gate.paused() {
        return Err(format!("this node pauses: {reason}"));
    }
    if open.build.as_ref().is_some_and(|build| *build != murmur_engine::build_id()) {
        return Err("another build of the engine runs here".to_owned());
    }
    let found = node
        .models
        .iter()
        .position(|model| model.is_spread() && model.identity().is_some_and(|identity| identity.digest == open.model));
    let at = found.ok_or("this node offers no layers of this model")?;
    if layers_max(node.options()).is_some_and(|max| open.end - open.first > max) {
        return Err("more layers than this node contributes".to_owned());
    }
    let (context_tokens, parallel, exact) = (open.context_tokens, open.parallel, open.exact);
    Ok((at, Terms { range: LayerRange::new(open.first, open.end), context_tokens, parallel, exact }))
}

/// Is the stage that a driver wants, until either has enough.
pub(crate) async fn serve(
    node: Arc<Node>,
    mesh: Arc<MeshNode>,
    open: StageOpen,
    reader: FrameReader,
    mut drain: Drain,
) -> Result<(), FrameError> {
    let host = match admit(&node, &open) {
        Ok((at, terms)) => while_told(&mut drain, hold(&node, &mesh, at, terms)).await,
        Err(reason) => Err(reason),
    };
    let host = match host {
        Ok(host) => host,
        Err(reason) => {
            return carry::write(&mut drain, &[Frame::text(Header::new(Kind::LoadFailed, 0), &reason)]).await;
        }
    };
    let (guest, answered) = enter(&host);
    let guest = Arc::new(guest);
    let Some(_listed) = mesh.rings.list(open.ring, &guest) else {
        let reason = "there is a ring of this name here already";
        return carry::write(&mut drain, &[Frame::text(Header::new(Kind::LoadFailed, 0), reason)]).await;
    };
    let loaded = Frame::message(Header::new(Kind::Loaded, 0), host.loaded())?;
    // The stage may be given up while it is used: then this ends.
    drop(host);
    carry::write(&mut drain, &[loaded]).await?;
    let (routes, route) = watch::channel(Route::default());
    let streams = Arc::new(Mutex::new(Streams::new(open.parallel)));
    let hop = Hop::new(Arc::downgrade(&mesh), route, Arc::clone(&streams));
    let is_watched = AtomicBool::new(false);
    tokio::select! {
        ended = inward(reader, &guest, (&routes, &is_watched), &streams) => ended,
        ended = outward(answered, drain, hop, &is_watched) => ended,
    }
}

/// A driver comes. Its answers wait until they are taken, and end when too many of them do.
pub(super) fn enter(host: &Host) -> (Guest, mpsc::Receiver<Frame>) {
    let (answers, answered) = mpsc::channel(ANSWERS_MAX);
    let answers = Mutex::new(Some(answers));
    let guest = host.enter(move |frame| {
        let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
        // An answer that is lost would be waited for in vain: it is the end.
        if answers.as_ref().is_some_and(|answers| answers.try_send(frame).is_err()) {
            *answers = None;
        }
    });
    (guest, answered)
}

/// Waits for what the driver wants, and tells it meanwhile that it is worked on.
pub(super) async fn while_told(
    drain: &mut Drain,
    holding: impl Future<Output = Result<Arc<Host>, String>>,
) -> Result<Arc<Host>, String> {
    let mut ticks = tokio::time::interval(HEARTBEAT);
    tokio::pin!(holding);
    loop {
        tokio::select! {
            held = &mut holding => return held,
            _ = ticks.tick() => {
                carry::write(drain, &[heartbeat()]).await.map_err(|error| error.to_string())?;
            }
        }
    }
}

pub(super) fn heartbeat() -> Frame {
    Frame { header: Header::new(Kind::Progress, 0), payload: 0f32.to_le_bytes().to_vec() }
}

/// What a driver says, to the child.
async fn inward(
    mut reader: FrameReader,
    guest: &Guest,
    (routes, is_watched): (&watch::Sender<Route>, &AtomicBool),
    streams: &Mutex<Streams>,
) -> Result<(), FrameError> {
    while let Some(frame) = reader.next().await? {
        streams.lock().unwrap_or_else(PoisonError::into_inner).note(&frame);
        if frame.header.kind == Kind::Route {
            is_watched.store(frame.header.has(FLAG_WATCHED), Ordering::Relaxed);
            routes.send_replace(frame.decode()?);
        } else if let Err(error) = guest.send(frame) {
            tracing::debug!(%error, "a driver is sent away");
            break;
        }
    }
    Ok(())
}

/// What the child says, to the driver or the host of the next stage.
async fn outward(
    mut answers: mpsc::Receiver<Frame>,
    mut drain: Drain,
    mut hop: Hop,
    is_watched: &AtomicBool,
) -> Result<(), FrameError> {
    let (mut frames, mut back) = (Vec::new(), Vec::new());
    let mut said = Instant::now();
    loop {
        let due = said + if back.is_empty() { HEARTBEAT } else { ACCOUNTS_DELAY };
        let due = tokio::time::sleep_until(due.into());
        tokio::select! {
            count = answers.recv_many(&mut frames, ANSWERS_AT_ONCE) => if count == 0 {
                return Ok(());
            },
            lost = hop.change() => back.extend(lost.map(|to| hop::route_lost(&to, 0)).transpose()?),
            () = due => if back.is_empty() {
                back.push(heartbeat());
            },
        }
        back.extend(hop.renew().await);
        for frame in frames.drain(..) {
            match frame.header.kind {
                Kind::Hidden => hop.send(frame, &mut back).await?,
                _ => back.push(frame),
            }
        }
        let is_late = said.elapsed() >= ACCOUNTS_DELAY || is_watched.load(Ordering::Relaxed);
        let can_wait = !is_late && back.iter().all(is_account);
        if !back.is_empty() && !can_wait {
            carry::write(&mut drain, &back).await?;
            back.clear();
            said = Instant::now();
        }
    }
}

/// Whether it only says that a row, or a few guessed ones, went on to the next host.
fn is_account(frame: &Frame) -> bool {
    let header = &frame.header;
    header.kind == Kind::Done && header.has(FLAG_HANDED_ON) && !header.has(FLAG_PREFILL)
}

/// The layers of a model that this node holds, in which state, and how fast they are. Those that are loaded and that no driver uses are
/// available: they are there for whoever wants them, and are given up for others.
pub(crate) fn held(model: &Model) -> Option<(Terms, ModelState, Speed)> {
    let held = model.holding().held();
    held.as_ref().map(|held| match &held.host {
        None => (held.terms, ModelState::Loading, Speed::default()),
        Some(host) if host.guests() > 0 => (held.terms, ModelState::Ready, host.speed()),
        Some(host) => (held.terms, ModelState::Available, host.speed()),
    })
}
