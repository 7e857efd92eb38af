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
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::{
    SIGN_OF_LIFE,
    carry::{self, Drain, FrameReader},
    form,
};
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
/// When the way to the next host breaks, its driver mostly loses that host as well, and names another way. If it has not within
/// this, it does not know: this stage ends, and so it does.
const WAY_BROKEN_MAX: Duration = Duration::from_secs(2);
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

impl Held {
    /// Whether drivers use it, or one is about to.
    fn is_used(&self) -> bool {
        self.host.as_ref().is_some_and(|host| host.guests() > 0 || Arc::strong_count(host) > 1)
    }
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
async fn hold(node: &Arc<Node>, mesh: &MeshNode, at: usize, terms: Terms) -> Result<Arc<Host>, String> {
    let model = &node.models[at];
    let refused =
        |there: Terms| Err(format!("this node holds layers {} of it for others, on other terms", there.range));
    let other = || model.holding().held().as_ref().map(|held| (held.terms, held.host.is_some()));
    // Another one need not wait for that load.
    if let Some((there, false)) = other().filter(|(there, _)| *there != terms) {
        return refused(there);
    }
    let turn = Arc::clone(&model.holding().loading).lock_owned().await;
    let is_spare = match other() {
        Some((there, _)) if there != terms => is_spare(node, mesh, model, there).await,
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
        load(&node, at, terms)
    });
    loading.await.map_err(|_| "this node is stopping".to_owned())?
}

/// Whether another node holds the same layers as this one, so that they can be given up for some that nobody holds. Of those
/// that hold the same, the one with the lowest id keeps them.
async fn is_spare(node: &Node, mesh: &MeshNode, model: &Model, there: Terms) -> bool {
    let Some(identity) = model.identity() else { return false };
    let own = mesh.mesh().node_id();
    for other in form::offers(node, mesh, &identity.digest).iter().filter(|other| other.node < own) {
        // A node that died a moment ago is still listed.
        let answer = || timeout(SIGN_OF_LIFE, mesh.mesh().ping(other.node));
        if other.is_ready() && other.terms() == there && matches!(answer().await, Ok(Ok(_))) {
            return true;
        }
    }
    false
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
        Ok((at, terms)) => held_while_told(&node, &mesh, at, terms, &mut drain).await,
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
    let loaded = Frame::message(Header::new(Kind::Loaded, 0), host.loaded())?;
    // The stage may be given up while it is used: then this ends.
    drop(host);
    carry::write(&mut drain, &[loaded]).await?;
    let (routes, route) = watch::channel(None);
    tokio::select! {
        ended = inward(reader, &guest, &routes) => ended,
        ended = outward(answered, drain, Hop { mesh: Arc::downgrade(&mesh), route, way: Way::Driver }) => ended,
    }
}

/// Loads what the driver wants, and tells it meanwhile that it is worked on.
async fn held_while_told(
    node: &Arc<Node>,
    mesh: &MeshNode,
    at: usize,
    terms: Terms,
    drain: &mut Drain,
) -> Result<Arc<Host>, String> {
    let mut ticks = tokio::time::interval(HEARTBEAT);
    let holding = hold(node, mesh, at, terms);
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
            frames.drain(..).partition(|frame| frame.header.kind == Kind::Hidden && hop.is_another());
        hop.write(&onward).await?;
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
    way: Way,
}

enum Way {
    /// Through the driver, which hands on what comes back to it.
    Driver,
    Open(Drain),
    /// What goes there is lost.
    Broken(Instant),
}

impl Hop {
    fn is_another(&self) -> bool {
        !matches!(self.way, Way::Driver)
    }

    /// Takes another way if the driver has named one. One that cannot be had is as good as none.
    async fn renew(&mut self) {
        if !self.route.has_changed().unwrap_or(false) {
            return;
        }
        let to = *self.route.borrow_and_update();
        self.way = Way::Driver;
        let (Some(to), Some(mesh)) = (to, self.mesh.upgrade()) else { return };
        let opened = async {
            let (mut send, recv) = mesh.mesh().open_work(to.node).await.ok()?;
            stream::write(&mut send, &Work::Hop(to.ring)).await.ok()?;
            // Without an answer nobody may be there: a connection outlives the node at its other end by some seconds.
            FrameReader::new(Box::pin(recv), &[]).next().await.ok()??;
            Some(send)
        };
        match timeout(SIGN_OF_LIFE, opened).await {
            Ok(Some(send)) => self.way = Way::Open(Box::pin(send)),
            _ => tracing::debug!(node = %to.node.short(), "the next host cannot be reached"),
        }
    }

    /// Hands hidden states on. A host that takes no more is waited for until the driver names another way: then sessions are
    /// opened again, and what was lost on the way goes once more.
    async fn write(&mut self, frames: &[Frame]) -> Result<(), FrameError> {
        if let Way::Open(drain) = &mut self.way
            && !frames.is_empty()
        {
            let is_written = tokio::select! {
                written = carry::write(drain, frames) => written.is_ok(),
                Ok(()) = self.route.changed() => {
                    self.route.mark_changed();
                    false
                }
            };
            if !is_written {
                self.way = Way::Broken(Instant::now());
            }
        }
        match self.way {
            Way::Broken(since) if since.elapsed() > WAY_BROKEN_MAX => {
                Err(FrameError::Io(std::io::Error::new(std::io::ErrorKind::BrokenPipe, "the next host takes nothing")))
            }
            _ => Ok(()),
        }
    }
}

/// Takes hidden states of another host for a driver's ring.
pub(crate) async fn hop(
    mesh: &MeshNode,
    ring: RingId,
    mut reader: FrameReader,
    mut drain: Drain,
) -> Result<(), FrameError> {
    let Some(guest) = mesh.rings.rings().get(&ring).map(Arc::downgrade) else {
        return Err(FrameError::Malformed("nobody here has a ring of this name"));
    };
    carry::write(&mut drain, &[heartbeat()]).await?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_host_that_takes_nothing_is_waited_for_until_the_driver_names_another_way() {
        let (routes, route) = watch::channel(None);
        let (way, next) = tokio::io::duplex(16);
        let mut hop = Hop { mesh: Weak::new(), route, way: Way::Open(Box::pin(way)) };
        let frames = vec![Frame { header: Header::new(Kind::Hidden, 1), payload: vec![0; 1000] }];
        {
            let writing = hop.write(&frames);
            tokio::pin!(writing);
            assert!(tokio::time::timeout(HEARTBEAT, &mut writing).await.is_err());
            routes.send_replace(None);
            writing.await.unwrap();
        }
        assert!(matches!(hop.way, Way::Broken(_)));
        hop.renew().await;
        assert!(matches!(hop.way, Way::Driver));
        drop(next);
    }

    #[tokio::test]
    async fn a_way_that_breaks_is_no_error_at_once_and_one_if_the_driver_does_not_know() {
        let (_routes, route) = watch::channel(None);
        let (way, next) = tokio::io::duplex(16);
        drop(next);
        let mut hop = Hop { mesh: Weak::new(), route, way: Way::Open(Box::pin(way)) };
        hop.write(&[Frame { header: Header::new(Kind::Hidden, 1), payload: vec![0; 1000] }]).await.unwrap();
        assert!(hop.is_another(), "the driver does not get what it has named a way for");
        hop.way = Way::Broken(Instant::now().checked_sub(2 * WAY_BROKEN_MAX).unwrap());
        assert!(hop.write(&[]).await.is_err());
    }
}
