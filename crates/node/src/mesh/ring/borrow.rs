//! A model of a node nearby that guesses for a ring, where this machine has none that can.
//!
//! It goes on by itself behind what it has guessed, and only the first guess after a wrong one takes a way there and back. That comes on
//! top of the way around the ring, so the node must be much nearer than the ring is long ([`NEARER`]). It is looked for when requests run,
//! and left alone when none has for a while. Nobody waits for it: while there is none, or when it dies, what can be looked
//! up is guessed, or nothing. It sees the tokens of requests, as the host of a ring's first stage does.

use std::{
    cmp::Ordering,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use murmur_engine::{Answers, Connection, Draft, FarEnd, PeerDraft, RemoteStage, Stop};
use murmur_net::PeerView;
use murmur_protocol::{
    frame::{Frame, FrameError, Kind},
    mesh::{Capabilities, DraftOpen, GuessOffer, ModelDigest, ModelState, NodeId, VocabularyId, Work},
};
use tokio::{runtime::Handle, sync::mpsc, time::sleep};

use super::{AVOIDED, NotHeld, Opened, Ring, ask, carry, hear, until_loaded, while_wanted, wishes};
use crate::{
    Node,
    draft::{DraftWish, FOUND_PART},
    mesh::{MeshNode, both},
    model::Model,
};

/// The way around the ring takes so many times as long as the one to a node that guesses for it and back, at least. Beyond, guesses come
/// too late to be many.
const NEARER: f64 = 4.0;
/// How often it is looked whether requests run, and who could guess for them.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A node is left alone when no request has run for so long.
const UNUSED_MAX: Duration = Duration::from_secs(60);

/// A model that another node would have guess.
#[derive(Debug, Clone, PartialEq)]
struct Lender {
    node: NodeId,
    model: ModelDigest,
    name: String,
    offer: GuessOffer,
    /// Round trip, us.
    rtt_us: f64,
}

/// What a ring wants of whoever guesses for it.
#[derive(Debug, Clone, PartialEq)]
struct Need {
    vocabulary: VocabularyId,
    /// Of the model that is guessed for.
    file_bytes: u64,
    /// The name of the only model that will do, where the user has given one: then it may be as large and as far as it is.
    name: Option<String>,
}

impl Need {
    /// Whether a model will do for a ring that takes `around_us`.
    fn is_met_by(&self, lender: &Lender, around_us: f64) -> bool {
        let is_wanted = match &self.name {
            Some(name) => lender.name == *name,
            None => lender.offer.file_bytes <= self.file_bytes / FOUND_PART && NEARER * lender.rtt_us <= around_us,
        };
        is_wanted && lender.offer.vocabulary == self.vocabulary
    }

    /// Those that will do, the nearest first, of one node the smallest.
    fn best_of(&self, mut lenders: Vec<Lender>, around_us: f64) -> Vec<Lender> {
        lenders.retain(|lender| self.is_met_by(lender, around_us));
        let order = |a: &Lender, b: &Lender| match a.rtt_us.total_cmp(&b.rtt_us) {
            Ordering::Equal => a.offer.file_bytes.cmp(&b.offer.file_bytes),
            nearer => nearer,
        };
        lenders.sort_by(order);
        lenders
    }
}

/// Looks for a node nearby that guesses for a ring, and carries the frames.
pub(super) struct Borrower {
    node: Weak<Node>,
    mesh: Weak<MeshNode>,
    runtime: Handle,
    ring: Weak<Ring>,
    /// Where the model that is guessed for is in the list.
    at: usize,
    need: Need,
    /// What part of its guesses is made wrong, 0 to 1.
    spoilt: f64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lender: Option<Lender>,
    /// Who was lost or has refused, and when.
    avoided: Vec<(NodeId, Instant)>,
}

impl Borrower {
    /// For a ring of the model at this place. `None`: the user does not wish that, or nobody could.
    pub(super) fn of(node: &Arc<Node>, ring: &Arc<Ring>, at: usize) -> Option<Arc<Borrower>> {
        let (name, spoilt) = match &node.options().draft {
            DraftWish::Off | DraftWish::Lookup => return None,
            DraftWish::Auto(_) | DraftWish::Model { .. } | DraftWish::Wanted(_) => (None, 0.0),
            DraftWish::Peer { name, spoilt } => (Some(name.clone()), spoilt.unwrap_or(0.0)),
        };
        let GuessOffer { vocabulary, file_bytes } = node.models[at].identity()?.guesses?;
        Some(Arc::new(Borrower {
            node: Weak::clone(&ring.node),
            mesh: Weak::clone(&ring.mesh),
            runtime: Handle::clone(&ring.runtime),
            ring: Arc::downgrade(ring),
            at,
            need: Need { vocabulary, file_bytes, name },
            spoilt,
            state: Mutex::default(),
        }))
    }

    /// As the engine wants it.
    pub(super) fn draft(self: &Arc<Self>) -> Draft {
        Draft::Peer(PeerDraft { stage: Arc::new(Seat(Arc::clone(self))), spoilt: self.spoilt })
    }

    /// Which model of which node guesses now, if one does.
    pub(super) fn lender(&self) -> Option<(String, NodeId)> {
        self.state().lender.as_ref().map(|lender| (lender.name.clone(), lender.node))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_working(&self, node: &Node) -> bool {
        node.models.get(self.at).is_some_and(Model::is_working)
    }

    /// Looks until somebody guesses. Errors are for people.
    async fn connect(self: &Arc<Self>) -> Result<Connection, String> {
        loop {
            sleep(LOOK_EVERY).await;
            let (node, mesh) = both(&self.node, &self.mesh).ok_or("this node is stopping")?;
            let ring = self.ring.upgrade().ok_or("the ring is not used any more")?;
            if !self.is_working(&node) {
                continue;
            }
            let peers = mesh.mesh().peers();
            let around_us = ring.around_us(&mesh, &peers) as f64;
            for lender in self.need.best_of(self.lenders(&node, &peers), around_us) {
                match self.open(&mesh, &ring, &lender).await {
                    Ok(opened) => return Ok(self.seat(lender, opened)),
                    Err(reason) => {
                        tracing::debug!("{} does not guess with {}: {reason}", lender.node.short(), lender.name);
                        self.avoid(lender.node);
                    }
                }
            }
        }
    }

    fn avoid(&self, node: NodeId) {
        self.state().avoided.push((node, Instant::now()));
    }

    /// What others would have guess, of those whom this node may ask and to whom it knows the way.
    fn lenders(&self, node: &Node, peers: &[PeerView]) -> Vec<Lender> {
        let wishes = &node.options().ring;
        let avoided: Vec<NodeId> = {
            let mut state = self.state();
            state.avoided.retain(|(_, since)| since.elapsed() < AVOIDED);
            state.avoided.iter().map(|(node, _)| *node).collect()
        };
        let asked = peers.iter().filter(|peer| {
            let record = peer.record();
            record.capabilities.contains(Capabilities::GUESSES)
                && wishes::may_be_used(wishes, &record.node, &record.region)
                && !avoided.contains(&record.node)
        });
        let of_peer = asked.filter_map(|peer| Some((peer.record(), 1e3 * peer.rtt_ms?)));
        let lenders = of_peer.flat_map(|(record, rtt_us)| {
            let is_there = |state| matches!(state, ModelState::Ready | ModelState::Available | ModelState::Loading);
            record.models.iter().filter(move |served| is_there(served.state)).filter_map(move |served| {
                let (node, model, name) = (record.node, served.digest, served.name.clone());
                Some(Lender { node, model, name, offer: served.guesses?, rtt_us })
            })
        });
        lenders.collect()
    }

    async fn open(&self, mesh: &MeshNode, ring: &Ring, lender: &Lender) -> Result<Opened, NotHeld> {
        let open = DraftOpen {
            model: lender.model,
            vocabulary: lender.offer.vocabulary,
            context_tokens: ring.whole.context_tokens,
            parallel: ring.whole.parallel,
        };
        let (reader, drain) = ask(mesh, lender.node, &Work::Draft(open)).await?;
        until_loaded(mesh, lender.node, reader, drain).await
    }

    /// Notes who guesses, and carries frames from now on.
    fn seat(self: &Arc<Self>, lender: Lender, opened: Opened) -> Connection {
        let (engines, ours) = murmur_engine::connection();
        let to = lender.node;
        tracing::info!("{} guesses with {} from now on", to.short(), lender.name);
        self.state().lender = Some(lender);
        let borrower = Arc::clone(self);
        tokio::spawn(async move {
            let FarEnd { questions, answers } = ours;
            let ended = borrower.carry(to, (&answers, questions), opened).await;
            tracing::debug!(node = %to.short(), ?ended, "a node does not guess any more");
            borrower.state().lender = None;
            if ended.is_err() {
                borrower.avoid(to);
            }
        });
        engines
    }

    /// Carries frames between the engine of this driver and the node that guesses, until either has enough.
    async fn carry(
        &self,
        to: NodeId,
        (engine, mut questions): (&Answers, mpsc::UnboundedReceiver<Frame>),
        opened: Opened,
    ) -> Result<(), FrameError> {
        let Opened { reader: mut answers, drain: mut lender, loaded } = opened;
        engine.give([loaded]);
        let outward = async {
            while let Some(frame) = questions.recv().await {
                carry::write(&mut lender, &[frame]).await?;
            }
            Ok(())
        };
        let inward = async {
            while let Some(mesh) = self.mesh.upgrade() {
                let Some(frame) = hear(&mesh, to, &mut answers).await? else { break };
                // A sign of life is no answer.
                if frame.header.kind != Kind::Progress {
                    engine.give([frame]);
                }
            }
            Ok(())
        };
        tokio::select! {
            ended = outward => ended,
            ended = inward => ended,
            () = self.is_unused() => Ok(()),
        }
    }

    /// Until no request has run for a while.
    async fn is_unused(&self) {
        let mut used = Instant::now();
        while used.elapsed() < UNUSED_MAX {
            sleep(LOOK_EVERY).await;
            let Some(node) = self.node.upgrade() else { return };
            if self.is_working(&node) {
                used = Instant::now();
            }
        }
    }
}

/// How the engine finds the model that guesses.
struct Seat(Arc<Borrower>);

impl RemoteStage for Seat {
    fn connect(&self, stop: &Stop) -> Result<Connection, String> {
        while_wanted(&self.0.runtime, stop, self.0.connect())
    }

    fn lost_because(&self) -> String {
        "the node that guesses is gone, or was not needed any more".to_owned()
    }

    /// Whoever it was, another one is looked for at once.
    fn is_unreachable(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCABULARY: VocabularyId = VocabularyId::from_bytes([7; 8]);
    const FILE_BYTES: u64 = 4_000;

    fn lender(number: u8, name: &str, file_bytes: u64, rtt_us: f64) -> Lender {
        Lender {
            node: NodeId::from_bytes([number; 32]),
            model: ModelDigest::from_bytes([number; 32]),
            name: name.to_owned(),
            offer: GuessOffer { vocabulary: VOCABULARY, file_bytes },
            rtt_us,
        }
    }

    fn need(name: Option<&str>) -> Need {
        Need { vocabulary: VOCABULARY, file_bytes: FILE_BYTES, name: name.map(str::to_owned) }
    }

    fn names(need: &Need, lenders: &[Lender], around_us: f64) -> Vec<String> {
        need.best_of(lenders.to_vec(), around_us).into_iter().map(|lender| lender.name).collect()
    }

    #[test]
    fn small_models_of_nodes_much_nearer_than_the_ring_is_long_are_found_the_nearest_first() {
        let lenders = [
            lender(1, "near", 1_000, 9_000.0),
            lender(2, "nearest, and larger", 800, 2_000.0),
            lender(2, "nearest", 500, 2_000.0),
            lender(3, "too far", 500, 10_001.0),
            lender(4, "too large", 1_001, 2_000.0),
        ];
        assert_eq!(names(&need(None), &lenders, 40_000.0), ["nearest", "nearest, and larger", "near"]);
        // A ring on a local network has nobody who is much nearer.
        assert!(names(&need(None), &lenders, 1_000.0).is_empty());
    }

    #[test]
    fn a_model_that_the_user_names_may_be_large_and_far_but_not_speak_of_other_tokens() {
        let mut lenders = [lender(1, "it", 2 * FILE_BYTES, 90_000.0), lender(2, "another", 500, 100.0)];
        assert_eq!(names(&need(Some("it")), &lenders, 1_000.0), ["it"]);
        lenders[0].offer.vocabulary = VocabularyId::from_bytes([8; 8]);
        assert!(names(&need(Some("it")), &lenders, 1_000.0).is_empty());
    }
}
