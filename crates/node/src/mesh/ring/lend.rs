//! A model of this node that guesses what the model of a driver nearby will say: a stage of a ring of its own, which is all of it.
//!
//! It runs in a process of its own, beside the engine that may answer with the same model: an engine's sequences are its driver's. It is
//! loaded for the first driver, and let go some time after the last has left. For this node a driver is a request of another node: it
//! counts towards `--max-requests`, is taken in its hours only, and is sent away when it has asked for nothing for a while, or the node
//! pauses. A driver does without guesses then and comes back when it likes.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use murmur_engine::{Guest, Host};
use murmur_gguf::LayerRange;
use murmur_protocol::{
    frame::{Frame, FrameError, Header, Kind},
    mesh::{DraftOpen, NodeId},
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use super::{
    alive::silent,
    carry::{self, Drain, FrameReader},
    host::{self, ANSWERS_AT_ONCE, HEARTBEAT, Terms},
};
use crate::{
    Node,
    mesh::MeshNode,
    model::with_causes,
    requests::{Asker, Request},
};

/// Drivers for which one model guesses at once.
const DRIVERS_MAX: usize = 4;
/// Requests of all drivers together for which it guesses at once. Others are answered without guesses.
const PARALLEL_MAX: u32 = 8;
/// A driver that has asked for nothing for so long leaves its place to others.
const UNASKED_MAX: Duration = Duration::from_secs(120);

/// When a driver has asked for something last.
struct LastAsked(Mutex<Instant>);

impl LastAsked {
    fn now() -> LastAsked {
        LastAsked(Mutex::new(Instant::now()))
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn elapsed(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

/// Guesses for a driver, until either has enough.
pub(crate) async fn serve(
    node: Arc<Node>,
    mesh: Arc<MeshNode>,
    driver: NodeId,
    open: DraftOpen,
    reader: FrameReader,
    mut drain: Drain,
) -> Result<(), FrameError> {
    let begun = match admit(&node, driver, &open) {
        Ok((at, terms, listed)) => {
            host::while_told(&mut drain, lent(&node, at, terms)).await.map(|host| (host, listed))
        }
        Err(reason) => Err(reason),
    };
    let (host, listed) = match begun {
        Ok(begun) => begun,
        Err(reason) => {
            return carry::write(&mut drain, &[Frame::text(Header::new(Kind::LoadFailed, 0), &reason)]).await;
        }
    };
    let (guest, answered) = host::enter(&host);
    let loaded = Frame::message(Header::new(Kind::Loaded, 0), host.loaded())?;
    drop(host);
    carry::write(&mut drain, &[loaded]).await?;
    let asked = LastAsked::now();
    tokio::select! {
        ended = inward(reader, &guest, &asked) => ended,
        ended = outward(answered, drain, &listed, mesh.lease) => ended,
        () = sent_away(&node, &asked) => Ok(()),
    }
}

/// Which model is meant, and what it is loaded for. Errors are for people.
fn admit(node: &Node, driver: NodeId, open: &DraftOpen) -> Result<(usize, Terms, Request), String> {
    if let Some(reason) = node.gate.paused() {
        return Err(format!("this node pauses: {reason}"));
    }
    let is_meant = |at: &usize| node.models[*at].identity().is_some_and(|identity| identity.digest == open.model);
    let at = (0..node.models.len()).find(is_meant).filter(|&at| !node.models[at].is_spread());
    let at = at.ok_or("this model is not served here as a whole")?;
    let model = &node.models[at];
    let offer = model.identity().and_then(|identity| identity.guesses);
    if offer.is_none_or(|offer| offer.vocabulary != open.vocabulary) {
        return Err("this model has another vocabulary here".to_owned());
    }
    let listed = node.requests.begin_within(node.gate.requests_max(), model.id(), Asker::Node(driver), 0);
    let listed = listed.ok_or("this node has as many requests of others as it takes")?;
    let range = LayerRange::new(0, model.layers());
    let parallel = open.parallel.min(PARALLEL_MAX);
    Ok((at, Terms { range, context_tokens: open.context_tokens, parallel, exact: false }, listed))
}

/// The model's process for a driver, loaded if needed. Errors are for people.
async fn lent(node: &Arc<Node>, at: usize, terms: Terms) -> Result<Arc<Host>, String> {
    let turn = Arc::clone(&node.models[at].lent().loading).lock_owned().await;
    let unwanted = {
        let mut held = node.models[at].lent().held();
        let there = held.as_ref().and_then(|held| Some((held, held.host.as_ref().filter(|host| !host.is_dead())?)));
        match there {
            Some((_, host)) if host.guests() >= DRIVERS_MAX => {
                return Err(format!("it guesses for {DRIVERS_MAX} nodes already"));
            }
            Some((there, host)) if there.terms.context_tokens >= terms.context_tokens => return Ok(Arc::clone(host)),
            Some((there, _)) if there.is_used() => {
                let most = there.terms.context_tokens;
                return Err(format!("it guesses for others, in requests of {most} tokens at most"));
            }
            _ => held.take(),
        }
    };
    let node = Arc::clone(node);
    let loading = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        // Its memory is free when it is gone.
        drop(unwanted);
        let model = &node.models[at];
        let memory_bytes = node.models.set_aside_lent(at, terms).map_err(|error| with_causes(&error))?;
        host::load(&node, model, model.lent(), terms, memory_bytes)
    });
    loading.await.map_err(|_| "this node is stopping".to_owned())?
}

/// What a driver says, to the child.
async fn inward(mut reader: FrameReader, guest: &Guest, asked: &LastAsked) -> Result<(), FrameError> {
    while let Some(frame) = reader.next().await? {
        asked.note();
        if let Err(error) = guest.send(frame) {
            tracing::debug!(%error, "a driver is sent away");
            break;
        }
    }
    Ok(())
}

/// What the child says, to the driver, which has the `lease` to take it.
async fn outward(
    mut answers: mpsc::Receiver<Frame>,
    mut drain: Drain,
    listed: &Request,
    lease: Duration,
) -> Result<(), FrameError> {
    let mut frames = Vec::new();
    loop {
        tokio::select! {
            count = answers.recv_many(&mut frames, ANSWERS_AT_ONCE) => if count == 0 {
                return Ok(());
            },
            () = sleep(HEARTBEAT) => frames.push(host::heartbeat()),
        }
        let guesses = frames.iter().filter(|frame| frame.header.kind == Kind::Sampled);
        guesses.for_each(|_| listed.token());
        let written = timeout(lease, carry::write(&mut drain, &frames)).await;
        written.map_err(|_| silent("it does not read what it has asked for"))??;
        frames.clear();
    }
}

/// Until the node has a reason to guess for a driver no longer.
async fn sent_away(node: &Node, asked: &LastAsked) {
    while node.gate.paused().is_none() && asked.elapsed() < UNASKED_MAX {
        sleep(HEARTBEAT).await;
    }
}
