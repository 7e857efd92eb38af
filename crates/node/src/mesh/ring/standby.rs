//! Hosts that stand by: with `--standby` a driver has a second host for each stage for which there is one, which holds the same
//! layers and is given the same rows, and takes the place of the first when that is lost.
//!
//! It is told of sessions what the first one is told, and hidden states come to it from the host of the stage before, which
//! writes them to both. What it computes it keeps and hands to nobody. Nobody waits for it: one that falls behind is given up,
//! and may be had anew. So it holds nothing that has to be right: when it steps in, sessions are opened anew as after any loss,
//! and it says what it has of them, which is nearly everything.
//!
//! It also tells sooner than any silence when the first one is lost: see [`super::lag`]. A first one that has not done what it has done is
//! asked whether it is there, and is lost if it does not say so.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use murmur_gguf::LayerRange;
use murmur_protocol::{
    frame::{Frame, FrameError, Header, Kind},
    mesh::{NodeId, RingId},
    stage::RouteTo,
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, sleep_until, timeout, timeout_at},
};

use super::{
    DETOUR_MIN, Opened, Ring, Seat, alive,
    carry::{self, Room, Waiting},
    hear,
    host::Terms,
    lag::{Deadlines, LAG_MIN},
    offers::Offer,
    show_the_way, show_the_way_around,
    successor::Successors,
    vacancy, wishes,
};
use crate::{
    Node,
    mesh::{MeshNode, both},
};

/// How often it is looked whether there is a node to stand by.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A node that refused, or stood by and was given up, is asked again after this.
const AGAIN: Duration = Duration::from_secs(10);
/// How soon a host that owes something and is there is asked again whether it is.
const ASKED_EVERY: Duration = Duration::from_millis(100);
/// What waits to be written to one that stands by, bytes. With more it has fallen behind.
const WAITING_BYTES_MAX: u32 = 32 << 20;

/// Who stands by for a stage.
pub(super) struct Standby {
    pub(super) to: RouteTo,
    /// Rows that it has computed.
    computed_rows: u64,
    room: Room,
    words: mpsc::UnboundedSender<Waiting>,
    /// Ends when there are no more words, or with the connection.
    carrier: JoinHandle<Option<Opened>>,
}

impl Standby {
    /// False: it has fallen behind, or is gone.
    pub(super) fn send(&self, frame: Frame) -> bool {
        self.room.try_take(frame).is_some_and(|waiting| self.words.send(waiting).is_ok())
    }

    /// Its connection, once everything is written that it was to be told.
    async fn steps_in(self, mesh: &MeshNode) -> Option<(RouteTo, Opened)> {
        drop(self.words);
        let patience = alive::patience(mesh, self.to.node);
        let opened = timeout(patience, self.carrier).await.ok()?.ok()??;
        Some((self.to, opened))
    }
}

/// Who stands by, for people and programs.
pub(crate) struct View {
    pub(crate) node: NodeId,
    /// Rows that it has computed for this driver.
    pub(crate) computed_rows: u64,
}

/// Gives somebody up who stands by for a stage. False: it was somebody else.
pub(super) fn give_up(seat: &mut Seat, to: &RouteTo) -> bool {
    let given_up = seat.standby.take_if(|standby| standby.to == *to);
    if let Some(Standby { to, .. }) = &given_up {
        tracing::debug!(node = %to.node.short(), layers = %seat.range, "it does not stand by any more");
        seat.unfit = Some((to.node, Instant::now()));
        seat.lag.close_all();
    }
    given_up.is_some()
}

impl Ring {
    /// Who stands by for a stage.
    pub(crate) fn standby(&self, range: LayerRange) -> Option<View> {
        let seats = self.seats();
        let standby = seats.iter().find(|seat| seat.range == range)?.standby.as_ref()?;
        Some(View { node: standby.to.node, computed_rows: standby.computed_rows })
    }

    /// Whoever stands by for a stage that is lost: from now on it holds it.
    pub(super) async fn steps_in(&self, index: usize) -> Option<(RouteTo, Opened)> {
        let mesh = self.mesh.upgrade()?;
        let standby = self.seats()[index].standby.take()?;
        let to = standby.to;
        let opened = standby.steps_in(&mesh).await;
        if opened.is_none() {
            tracing::debug!(node = %to.node.short(), "it stood by, and is lost as well");
            show_the_way_around(&self.seats(), index);
        }
        opened
    }

    /// Gives whoever stands by a copy of what a stage is told.
    pub(super) fn copy(&self, index: usize, frame: &Frame) {
        let mut seats = self.seats();
        let seat = &mut seats[index];
        let Header { kind, session, epoch, .. } = frame.header;
        let is_over = |(.., since): (NodeId, NodeId, Instant)| since.elapsed() >= DETOUR_MIN;
        let is_straight =
            kind == Kind::Open && seat.lag.is_idle() && seat.detour.take_if(|detour| is_over(*detour)).is_some();
        match kind {
            Kind::Open | Kind::Rewind => seat.lag.open(session, epoch),
            Kind::Close => seat.lag.close(session),
            Kind::Tokens | Kind::Hidden | Kind::Sessions => {}
            _ => return,
        }
        if let Some(Standby { to, .. }) = seat.standby.as_ref().filter(|standby| !standby.send(frame.clone())) {
            let to = *to;
            give_up(seat, &to);
            show_the_way_around(&seats, index);
        }
        if is_straight {
            show_the_way(&seats, index);
        }
    }

    /// Notes what the host of a stage says that it has computed.
    pub(super) fn note(&self, index: usize, header: &Header) {
        if let Kind::Done | Kind::Sampled = header.kind {
            self.seats()[index].lag.holder_has(header, Instant::now());
        }
    }

    fn note_standby(&self, index: usize, to: &RouteTo, header: &Header) {
        let mut seats = self.seats();
        let seat = &mut seats[index];
        if let (Kind::Done | Kind::Sampled, Some(standby)) = (header.kind, &mut seat.standby)
            && standby.to == *to
        {
            standby.computed_rows += u64::from(header.rows);
            seat.lag.standby_has(header, Instant::now());
            seat.lags.notify_one();
        }
    }

    /// Returns when the host of a stage owes for too long what whoever stands by has computed, or owes it and is not there.
    pub(super) async fn lags(&self, index: usize, host: NodeId) {
        let news = Arc::clone(&self.seats()[index].lags);
        loop {
            let deadlines = self.seats()[index].lag.deadlines();
            let Some(Deadlines { doubtful, too_late }) = deadlines else {
                news.notified().await;
                continue;
            };
            until(doubtful).await;
            let Some(mesh) = self.mesh.upgrade() else { return };
            if !self.owes(index, |it| it.doubtful) {
                continue;
            }
            let answer = alive::is_there(&mesh, host, alive::WITH_STANDBY);
            // It is not given up later for having been asked.
            let is_there = timeout_at(too_late.into(), answer).await.unwrap_or(true);
            if is_there {
                until(too_late.min(Instant::now() + ASKED_EVERY)).await;
            }
            if self.owes(index, |it| if is_there { it.too_late } else { it.doubtful }) {
                self.seats()[index].lag.give_up();
                return;
            }
        }
    }

    /// Whether the host of a stage owes something at this deadline.
    fn owes(&self, index: usize, deadline: impl Fn(Deadlines) -> Instant) -> bool {
        let deadlines = self.seats()[index].lag.deadlines();
        deadlines.is_some_and(|it| deadline(it) <= Instant::now())
    }

    /// A stage for which somebody is to stand by, and whom to ask.
    fn wants_standby(
        &self,
        node: &Node,
        mesh: &MeshNode,
        refused: &HashMap<NodeId, Instant>,
    ) -> Option<(usize, NodeId)> {
        let (offers, facts) = self.offered(node, mesh)?;
        let successors = Successors::new(&offers, facts, self.wanted(node, mesh));
        let seats = self.seats();
        // The ring itself comes first.
        let holders: Vec<NodeId> = seats.iter().map(Seat::holder).collect::<Option<_>>()?;
        let standbys = seats.iter().filter_map(|seat| Some(seat.standby.as_ref()?.to.node));
        // Who loses this machine loses what it drives as well.
        let own = mesh.mesh().node_id();
        let busy: Vec<NodeId> = holders.iter().copied().chain(standbys).chain([own]).collect();
        let wishes = &node.options().ring;
        let is_wanting = |seat: &Seat| {
            let replaceable = |holder| holder != own && !wishes::is_pinned(wishes, holder);
            seat.standby.is_none() && seat.holder().is_some_and(replaceable)
        };
        let wanting = seats.iter().enumerate().filter(|(_, seat)| is_wanting(seat));
        let mut asked = wanting.filter_map(|(index, seat)| {
            let vacancy = vacancy(&seats, index);
            let is_unfit = |node| seat.unfit.is_some_and(|(unfit, at)| unfit == node && at.elapsed() < AGAIN);
            let might = |offer: &&Offer| {
                let is_left_out = busy.contains(&offer.node) || refused.contains_key(&offer.node);
                let is_allowed = !is_left_out && !is_unfit(offer.node) && wishes::allow(wishes, offer);
                is_allowed
                    && successors.allows(&vacancy, offer.node)
                    && could_stand_by(offer, Terms { range: seat.range, ..self.whole })
            };
            let asked: Vec<&Offer> = offers.iter().filter(might).collect();
            let least_us = successors.least_us(&vacancy, asked.iter().copied());
            let best = asked.into_iter().min_by_key(|offer| successors.rank(&vacancy, offer, least_us))?;
            Some((index, best.node))
        });
        asked.next()
    }

    /// Has a host stand by from now on, unless it is not wanted any more.
    fn stand_by(self: &Arc<Self>, index: usize, to: RouteTo, opened: Opened) {
        let mut seats = self.seats();
        let seat = &mut seats[index];
        if seat.standby.is_some() || seat.holder().is_none_or(|holder| holder == to.node) {
            return;
        }
        tracing::info!("node {} stands by for layers {}", to.node.short(), seat.range);
        let (words, told) = mpsc::unbounded_channel();
        let carrier = self.runtime.spawn(carry_words(Arc::downgrade(self), self.mesh.clone(), index, to, opened, told));
        seat.standby = Some(Standby { to, computed_rows: 0, room: Room::new(WAITING_BYTES_MAX), words, carrier });
        show_the_way_around(&seats, index);
    }
}

/// Whether a node has the layers of these terms, or nothing that anybody would miss if it gave it up for them.
fn could_stand_by(offer: &Offer, terms: Terms) -> bool {
    let stage = &offer.stage;
    let is_alike = stage.exact == terms.exact && (!terms.exact || stage.build == murmur_engine::build_id());
    let is_small = stage.layers_max == 0 || terms.range.len() <= stage.layers_max;
    is_alike && (offer.terms() == terms || offer.is_free() && is_small)
}

/// Waits for a moment. If this machine was suspended meanwhile, what has come is to be read first.
async fn until(moment: Instant) {
    let moment = moment.max(Instant::now());
    sleep_until(moment.into()).await;
    if moment.elapsed() > LAG_MIN {
        sleep(LAG_MIN).await;
    }
}

/// Carries frames to a host that stands by, until there are no more, and then gives back the connection; `None`: it is lost.
async fn carry_words(
    ring: Weak<Ring>,
    mesh: Weak<MeshNode>,
    index: usize,
    to: RouteTo,
    opened: Opened,
    mut told: mpsc::UnboundedReceiver<Waiting>,
) -> Option<Opened> {
    let Opened { mut reader, mut drain, loaded } = opened;
    let outward = async {
        while let Some(waiting) = told.recv().await {
            carry::write(&mut drain, &[waiting]).await?;
        }
        Ok(())
    };
    let inward = async {
        while let Some(mesh) = mesh.upgrade() {
            let Some(frame) = hear(&mesh, to.node, &mut reader).await? else { break };
            if let Some(ring) = ring.upgrade() {
                ring.note_standby(index, &to, &frame.header);
            }
        }
        Err(FrameError::Malformed("it has hung up"))
    };
    let ended = tokio::select! {
        ended = outward => ended,
        ended = inward => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(node = %to.node.short(), %error, "who stood by is lost");
        if let Some(ring) = ring.upgrade() {
            let mut seats = ring.seats();
            if give_up(&mut seats[index], &to) {
                show_the_way_around(&seats, index);
            }
        }
        return None;
    }
    Some(Opened { reader, drain, loaded })
}

/// Has somebody stand by for each stage of a ring, one after the other, as long as there is the ring.
pub(super) async fn keep(ring: Weak<Ring>) {
    let mut refused: HashMap<NodeId, Instant> = HashMap::new();
    loop {
        let Some(ring) = ring.upgrade() else { return };
        let Some((node, mesh)) = both(&ring.node, &ring.mesh).filter(|(node, _)| node.options().standby) else {
            return;
        };
        refused.retain(|_, at| at.elapsed() < AGAIN);
        let Some((index, holder)) = ring.wants_standby(&node, &mesh, &refused) else {
            drop((ring, node, mesh));
            sleep(LOOK_EVERY).await;
            continue;
        };
        let range = ring.seats()[index].range;
        let name = RingId::from_bytes(rand::random());
        match ring.open(&node, &mesh, holder, range, name).await {
            Ok(opened) => ring.stand_by(index, RouteTo { node: holder, ring: name }, opened),
            Err(reason) => {
                tracing::debug!(node = %holder.short(), layers = %range, "it cannot stand by: {reason}");
                refused.insert(holder, Instant::now());
            }
        }
    }
}
