//! This node as the host of a stage: it loads the layers that a driver asks for, and computes for every driver that asks for
//! the same.
//!
//! Of each model a node holds one range at a time. It loads it for the first driver, and lets it go some time after the last
//! has left. Hidden states go straight on to the host of the next stage, on a stream of their own; a driver that has not said
//! who that is gets them itself.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use murmur_engine::{Guest, Host, Speed};
use murmur_gguf::LayerRange;
use murmur_net::stream;
use murmur_protocol::{
    frame::{Frame, FrameError, Header, Kind},
    mesh::{RingId, StageOpen, Work},
    stage::Route,
};
use tokio::sync::{mpsc, watch};

use super::carry::{self, Drain, FrameReader};
use crate::{
    Node,
    mesh::MeshNode,
    model::{Model, with_causes},
};

/// Layers that no driver uses are let go after this.
pub(super) const UNUSED_MAX: Duration = Duration::from_secs(60);
/// Answers that may wait for a driver to take them. One that leaves more unread is no driver any more.
const ANSWERS_MAX: usize = 1024;
/// Answers that are written at once.
const ANSWERS_AT_ONCE: usize = 64;
/// How often a driver hears that its stage is there, or is being loaded.
const HEARTBEAT: Duration = Duration::from_millis(250);

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

/// The place for them in a model.
#[derive(Default)]
pub(crate) struct Holding {
    held: Mutex<Option<Held>>,
    /// Taken by whoever loads.
    loading: Arc<tokio::sync::Mutex<()>>,
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
    pub(super) fn let_go(&self, unused_for: Duration) -> Option<Held> {
        let mut held = self.held();
        let gone = held.as_mut().is_some_and(|held| match &held.host {
            None => false,
            Some(host) if host.guests() > 0 => {
                held.last_used = Instant::now();
                false
            }
            Some(host) => host.is_dead() || held.last_used.elapsed() >= unused_for,
        });
        if gone { held.take() } else { None }
    }
}

/// Drivers at this node's stages, by the names of their rings: where hidden states of other hosts go.
#[derive(Default)]
pub(crate) struct Rings(Mutex<HashMap<RingId, Arc<Guest>>>);

impl Rings {
    fn rings(&self) -> MutexGuard<'_, HashMap<RingId, Arc<Guest>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
async fn hold(node: &Arc<Node>, at: usize, terms: Terms) -> Result<Arc<Host>, String> {
    let model = &node.models[at];
    let turn = Arc::clone(&model.holding().loading).lock_owned().await;
    let unwanted = {
        let mut held = model.holding().held();
        let usable = held.as_ref().and_then(|held| held.host.clone()).filter(|host| !host.is_dead());
        match (held.as_ref().map(|held| held.terms), usable) {
            (Some(there), Some(host)) if there == terms => return Ok(host),
            (Some(there), Some(host)) if host.guests() > 0 => {
                return Err(format!("this node holds layers {} of it for others, on other terms", there.range));
            }
            _ => held.take(),
        }
    };
    let node = Arc::clone(node);
    // It goes on when the driver that began it is gone: others may want the same.
    let loading = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        // Its memory is free when it is gone.
        drop(unwanted);
        load(&node, at, terms)
    });
    loading.await.map_err(|_| "this node is stopping".to_owned())?
}

fn load(node: &Node, at: usize, terms: Terms) -> Result<Arc<Host>, String> {
    let model = &node.models[at];
    let memory_bytes = node.models.set_aside(at, terms).map_err(|error| with_causes(&error))?;
    *model.holding().held() = Some(Held { terms, host: None, memory_bytes, last_used: Instant::now() });
    let loaded = model.load_stage(terms, node.options());
    let mut held = model.holding().held();
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
    let options = node.options();
    if options.layers_max.is_some_and(|max| open.end - open.first > max) {
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
        Ok((at, terms)) => held_while_told(&node, at, terms, &mut drain).await,
        Err(reason) => Err(reason),
    };
    let host = match host {
        Ok(host) => host,
        Err(reason) => {
            return carry::write(&mut drain, &[Frame::text(Header::new(Kind::LoadFailed, 0), &reason)]).await;
        }
    };
    let (answers, answered) = mpsc::channel(ANSWERS_MAX);
    let answers = Mutex::new(Some(answers));
    let guest = Arc::new(host.enter(move |frame| {
        let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
        // An answer that is lost would be waited for in vain: it is the end.
        if answers.as_ref().is_some_and(|answers| answers.try_send(frame).is_err()) {
            *answers = None;
        }
    }));
    mesh.rings.rings().insert(open.ring, guest.clone());
    let _listed = Listed { rings: &mesh.rings, ring: open.ring };
    carry::write(&mut drain, &[Frame::message(Header::new(Kind::Loaded, 0), host.loaded())?]).await?;
    let (routes, route) = watch::channel(None);
    tokio::select! {
        ended = inward(reader, &guest, &routes) => ended,
        ended = outward(answered, drain, Hop { mesh: Arc::downgrade(&mesh), route, open: None }) => ended,
    }
}

/// Loads what the driver wants, and tells it meanwhile that it is worked on.
async fn held_while_told(node: &Arc<Node>, at: usize, terms: Terms, drain: &mut Drain) -> Result<Arc<Host>, String> {
    let mut ticks = tokio::time::interval(HEARTBEAT);
    let holding = hold(node, at, terms);
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

fn heartbeat() -> Frame {
    Frame { header: Header::new(Kind::Progress, 0), payload: 0f32.to_le_bytes().to_vec() }
}

/// What a driver says, to the child.
async fn inward(
    mut reader: FrameReader,
    guest: &Guest,
    routes: &watch::Sender<Option<murmur_protocol::stage::RouteTo>>,
) -> Result<(), FrameError> {
    while let Some(frame) = reader.next().await? {
        if frame.header.kind == Kind::Route {
            routes.send_replace(frame.decode::<Route>()?.next);
        } else if let Err(error) = guest.send(frame) {
            tracing::debug!(%error, "a driver is sent away");
            break;
        }
    }
    Ok(())
}

/// What the child says, to the driver or the host of the next stage.
async fn outward(mut answers: mpsc::Receiver<Frame>, mut drain: Drain, mut hop: Hop) -> Result<(), FrameError> {
    let mut frames = Vec::new();
    let mut said = Instant::now();
    loop {
        let due = tokio::time::sleep_until((said + HEARTBEAT).into());
        tokio::select! {
            count = answers.recv_many(&mut frames, ANSWERS_AT_ONCE) => if count == 0 {
                return Ok(());
            },
            () = due => frames.push(heartbeat()),
        }
        hop.renew().await;
        let (onward, back): (Vec<Frame>, Vec<Frame>) =
            frames.drain(..).partition(|frame| frame.header.kind == Kind::Hidden && hop.open.is_some());
        if let Some(next) = hop.open.as_mut().filter(|_| !onward.is_empty()) {
            carry::write(next, &onward).await?;
        }
        if !back.is_empty() {
            carry::write(&mut drain, &back).await?;
            said = Instant::now();
        }
    }
}

/// The way to the host of the next stage.
struct Hop {
    mesh: Weak<MeshNode>,
    route: watch::Receiver<Option<murmur_protocol::stage::RouteTo>>,
    open: Option<Drain>,
}

impl Hop {
    /// Takes another way if the driver has named one. One that cannot be had is as good as none: the driver itself hands on
    /// what comes back to it.
    async fn renew(&mut self) {
        if !self.route.has_changed().unwrap_or(false) {
            return;
        }
        let to = *self.route.borrow_and_update();
        self.open = None;
        let (Some(to), Some(mesh)) = (to, self.mesh.upgrade()) else { return };
        let opened = async {
            let (mut send, _) = mesh.mesh().open_work(to.node).await?;
            stream::write(&mut send, &Work::Hop(to.ring)).await?;
            Ok::<_, murmur_net::NetError>(send)
        };
        match opened.await {
            Ok(send) => self.open = Some(Box::pin(send)),
            Err(error) => tracing::debug!(node = %to.node.short(), %error, "the next host cannot be reached"),
        }
    }
}

/// Takes hidden states of another host for a driver's ring.
pub(crate) async fn hop(mesh: &MeshNode, ring: RingId, mut reader: FrameReader) -> Result<(), FrameError> {
    let Some(guest) = mesh.rings.rings().get(&ring).map(Arc::downgrade) else {
        return Err(FrameError::Malformed("nobody here has a ring of this name"));
    };
    while let Some(frame) = reader.next().await? {
        let Some(guest) = guest.upgrade() else { break };
        if frame.header.kind != Kind::Hidden || guest.send(frame).is_err() {
            return Err(FrameError::Malformed("only hidden states come from another host"));
        }
    }
    Ok(())
}

/// The layers of a model that this node holds, whether they are ready, and how fast they are.
pub(crate) fn held(model: &Model) -> Option<(Terms, bool, Speed)> {
    let held = model.holding().held();
    held.as_ref().map(|held| {
        let speed = held.host.as_ref().map(|host| host.speed()).unwrap_or_default();
        (held.terms, held.host.is_some(), speed)
    })
}
