//! Where the hidden states of a stage go: to the host of the next one, to one that stands by for it, or back to the driver.
//!
//! Every session that runs has a QUIC stream of its own to each of the two, so that a packet that is lost holds up only those
//! whose rows were in it; QUIC lets streams that have something to send take turns. Rows that wait to be written while their session
//! ends or is rewound are not written any more. The next host is waited for when it takes nothing. One that stands by is not: when it falls behind it is given up.
//!
//! Two hosts may lose each other while the driver reaches both. So each that hands rows on sees to it that the other is there, and
//! tells the driver when it is not, who then has the rows go through itself, and those repeated that were lost.

use std::{
    borrow::Borrow,
    collections::HashMap,
    error::Error,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use murmur_net::stream;
use murmur_protocol::{
    frame::{FLAG_HOLD, FLAG_NEVER_TAKEN, Frame, FrameError, Header, Kind},
    mesh::{NodeId, RingId, Work},
    stage::{Route, RouteTo, Sessions},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    alive::{self, SILENCE_MAX},
    carry::{self, Drain, FrameReader, Room, Waiting},
    host::heartbeat,
};
use crate::mesh::MeshNode;

/// Streams of one way. Of more sessions, some share one.
const STREAMS_MAX: usize = 64;
/// Streams by which hidden states for one driver come in: those of two hosts, while one of them stands by for the other, and as
/// many again while ways change.
pub(super) const STREAMS_IN_MAX: usize = 4 * STREAMS_MAX;
/// Streams for each request that a stage runs at once: another one may begin before all rows of the last are written.
const STREAMS_PER_REQUEST: usize = 2;
/// Hidden states that wait to be written on one way, bytes.
const WAITING_BYTES_MAX: u32 = 32 << 20;
/// Frames that are written at once.
const FRAMES_AT_ONCE: usize = 16;

/// Which stream each session of a driver takes, by number, and what of it is still worth sending.
pub(super) struct Streams {
    streams_max: usize,
    of: HashMap<u64, Taken>,
    /// The stream that was taken last: the next one has had the most time to get rid of what waits there.
    newest: usize,
}

/// What a session takes.
#[derive(Clone, Copy)]
struct Taken {
    stream: usize,
    /// Rows of earlier ones are in vain.
    epoch: u32,
}

impl Streams {
    /// For a stage that runs so many requests at once.
    pub(super) fn new(parallel: u32) -> Streams {
        let streams_max = (STREAMS_PER_REQUEST * parallel as usize).clamp(1, STREAMS_MAX);
        Streams { streams_max, of: HashMap::new(), newest: streams_max - 1 }
    }

    /// Notes what a driver says of its sessions. They are as many as the stage itself lets it have: whoever says more is sent away.
    pub(super) fn note(&mut self, frame: &Frame) {
        let Header { kind, session, epoch, .. } = frame.header;
        match kind {
            Kind::Open if !self.of.contains_key(&session) => {
                let is_free = |stream: &usize| self.of.values().all(|taken| taken.stream != *stream);
                let in_turn = (1..=self.streams_max).map(|further| (self.newest + further) % self.streams_max);
                let shared = (session % self.streams_max as u64) as usize;
                let stream = { in_turn }.find(is_free).unwrap_or(shared);
                self.newest = stream;
                self.of.insert(session, Taken { stream, epoch });
            }
            Kind::Close if !frame.header.has(FLAG_HOLD) => drop(self.of.remove(&session)),
            Kind::Open | Kind::Close | Kind::Rewind => {
                self.of.entry(session).and_modify(|taken| taken.epoch = taken.epoch.max(epoch));
            }
            Kind::Sessions => {
                let open = frame.decode::<Sessions>().map(|sessions| sessions.open).unwrap_or_default();
                self.of.retain(|session, _| open.contains(session));
            }
            _ => {}
        }
    }

    /// `None`: the session is over.
    fn of(&self, session: u64) -> Option<usize> {
        self.of.get(&session).map(|taken| taken.stream)
    }

    /// Whether anybody waits for these rows.
    fn is_current(&self, header: &Header) -> bool {
        self.of.get(&header.session).is_some_and(|taken| taken.epoch <= header.epoch)
    }
}

/// Where hidden states go.
pub(super) struct Hop {
    mesh: Weak<MeshNode>,
    route: watch::Receiver<Route>,
    streams: Arc<Mutex<Streams>>,
    next: Next,
    standby: Option<Way>,
    is_standby: bool,
}

/// The host of the next stage.
enum Next {
    /// Not named, or out of reach: the driver hands on what comes back to it.
    Driver,
    Way(Way),
    /// What was on its way is lost. So is what follows, until the driver has named another way and begun again.
    Lost,
}

impl Hop {
    pub(super) fn new(mesh: Weak<MeshNode>, route: watch::Receiver<Route>, streams: Arc<Mutex<Streams>>) -> Hop {
        Hop { mesh, route, streams, next: Next::Driver, standby: None, is_standby: false }
    }

    /// Takes another way if the driver has named one. One that cannot be had is as good as none, which the driver is to be told: the
    /// answer. Ways that stand stay, whatever their hosts are now.
    pub(super) async fn renew(&mut self) -> Option<Frame> {
        if !self.route.has_changed().unwrap_or(false) {
            return None;
        }
        let route = *self.route.borrow_and_update();
        let next = match std::mem::replace(&mut self.next, Next::Driver) {
            Next::Way(way) => Some(way),
            Next::Driver | Next::Lost => None,
        };
        let mut standing: Vec<Way> = next.into_iter().chain(self.standby.take()).collect();
        let (mesh, streams) = (&self.mesh, &self.streams);
        let mut way = |to: RouteTo| match standing.iter().position(|way| way.to == to) {
            Some(at) => standing.swap_remove(at),
            None => Way::new(mesh.clone(), streams.clone(), to),
        };
        self.is_standby = route.is_standby;
        self.standby = route.standby.map(&mut way);
        let mut way = route.next.map(&mut way)?;
        if way.is_answered().await {
            self.next = Next::Way(way);
            return None;
        }
        tracing::debug!(node = %way.to.node.short(), "the next host cannot be reached");
        route_lost(&way.to, FLAG_NEVER_TAKEN).ok()
    }

    /// Changes of the route, and ways that are lost: whose. Nothing is lost if it is dropped before it is done.
    pub(super) async fn change(&mut self) -> Option<RouteTo> {
        let next = async {
            match &mut self.next {
                Next::Way(way) => way.lost().await,
                Next::Driver | Next::Lost => std::future::pending().await,
            }
        };
        let standby = async {
            match &mut self.standby {
                Some(way) => way.lost().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Ok(()) = self.route.changed() => {
                self.route.mark_changed();
                None
            }
            to = next => {
                self.next = Next::Lost;
                Some(to)
            }
            to = standby => {
                self.standby = None;
                Some(to)
            }
        }
    }

    /// Hands hidden states on. A host that takes no more is waited for until the driver names another way: then sessions are
    /// opened again, and what was lost goes once more. `back` gets what is for the driver.
    pub(super) async fn send(&mut self, frame: Frame, back: &mut Vec<Frame>) -> Result<(), FrameError> {
        if self.is_standby {
            return Ok(());
        }
        let stream = lock(&self.streams).of(frame.header.session);
        if let (Some(way), Some(stream)) = (&mut self.standby, stream) {
            match way.room.try_take(frame.clone()) {
                Some(waiting) => way.send(stream, waiting),
                None => {
                    back.push(route_lost(&way.to, 0)?);
                    self.standby = None;
                }
            }
        }
        match (&mut self.next, stream) {
            (Next::Driver, _) => back.push(frame),
            (Next::Way(way), Some(stream)) => tokio::select! {
                Some(waiting) = way.room.take(frame) => way.send(stream, waiting),
                Ok(()) = self.route.changed() => {
                    self.route.mark_changed();
                    self.next = Next::Lost;
                }
            },
            (Next::Way(_), None) | (Next::Lost, _) => {}
        }
        Ok(())
    }
}

fn lock(streams: &Mutex<Streams>) -> MutexGuard<'_, Streams> {
    streams.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells a driver that what goes there does not arrive, or with [`FLAG_NEVER_TAKEN`] that nothing can.
pub(super) fn route_lost(to: &RouteTo, flags: u16) -> Result<Frame, FrameError> {
    Frame::message(Header { flags, ..Header::new(Kind::RouteLost, 0) }, to)
}

/// Streams to one host.
struct Way {
    mesh: Weak<MeshNode>,
    sessions: Arc<Mutex<Streams>>,
    to: RouteTo,
    room: Room,
    /// Whether that host is there.
    answered: watch::Sender<bool>,
    /// Whether something went there since it was last asked for a sign of life.
    is_used: Arc<AtomicBool>,
    streams: HashMap<usize, mpsc::UnboundedSender<Waiting>>,
    /// One for each stream. The first that ends is the end of all.
    carriers: JoinSet<()>,
}

impl Way {
    fn new(mesh: Weak<MeshNode>, sessions: Arc<Mutex<Streams>>, to: RouteTo) -> Way {
        let mut way = Way {
            mesh,
            sessions,
            to,
            room: Room::new(WAITING_BYTES_MAX),
            answered: watch::Sender::new(false),
            is_used: Arc::default(),
            streams: HashMap::new(),
            carriers: JoinSet::new(),
        };
        let first = way.stream();
        way.streams.insert(0, first);
        let (mesh, is_used) = (way.mesh.clone(), Arc::clone(&way.is_used));
        way.carriers.spawn(async move {
            silence(&mesh, to.node, &is_used).await;
            tracing::debug!(node = %to.node.short(), "another host does not answer");
        });
        way
    }

    /// A connection outlives the node at its other end by some seconds: without an answer nobody may be there.
    async fn is_answered(&mut self) -> bool {
        let patience = self.mesh.upgrade().map(|mesh| alive::patience(&mesh, self.to.node));
        let Some(patience) = patience else { return false };
        let mut answered = self.answered.subscribe();
        let answer = answered.wait_for(|is_answered| *is_answered);
        tokio::select! {
            answer = timeout(patience, answer) => matches!(answer, Ok(Ok(_))),
            _ = self.carriers.join_next() => false,
        }
    }

    /// Waits until it is lost.
    async fn lost(&mut self) -> RouteTo {
        self.carriers.join_next().await;
        self.to
    }

    fn send(&mut self, stream: usize, waiting: Waiting) {
        self.is_used.store(true, Ordering::Relaxed);
        if !self.streams.contains_key(&stream) {
            let opened = self.stream();
            self.streams.insert(stream, opened);
        }
        // One that has ended is the end of the way, which is about to be noticed.
        let _ = self.streams[&stream].send(waiting);
    }

    fn stream(&mut self) -> mpsc::UnboundedSender<Waiting> {
        // Bounded by the room that there is.
        let (frames, waiting) = mpsc::unbounded_channel();
        let (mesh, sessions, to, answered) = (self.mesh.clone(), self.sessions.clone(), self.to, self.answered.clone());
        self.carriers.spawn(async move {
            if let Err(error) = carry_stream(&mesh, &sessions, to, &answered, waiting).await {
                tracing::debug!(node = %to.node.short(), %error, "a way to another host has ended");
            }
        });
        frames
    }
}

/// Carries hidden states on one stream until its other end is gone.
async fn carry_stream(
    mesh: &Weak<MeshNode>,
    sessions: &Mutex<Streams>,
    to: RouteTo,
    answered: &watch::Sender<bool>,
    mut waiting: mpsc::UnboundedReceiver<Waiting>,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mesh = mesh.upgrade().ok_or("this node is stopping")?;
    let (mut send, recv) = mesh.mesh().open_work(to.node).await?;
    drop(mesh);
    stream::write(&mut send, &Work::Hop(to.ring)).await?;
    let (mut drain, mut reader): (Drain, _) = (Box::pin(send), FrameReader::new(Box::pin(recv), &[]));
    let hearing = async {
        loop {
            reader.next().await?.ok_or("it has hung up")?;
            answered.send_replace(true);
        }
    };
    let telling = async {
        // Once the host is known to be there, further streams wait for nothing.
        let _ = answered.subscribe().wait_for(|is_answered| *is_answered).await;
        let mut frames = Vec::new();
        while waiting.recv_many(&mut frames, FRAMES_AT_ONCE).await > 0 {
            leave_out(&mut frames, sessions);
            carry::write(&mut drain, &frames).await?;
            frames.clear();
        }
        Ok(())
    };
    tokio::select! {
        ended = hearing => ended,
        ended = telling => ended,
    }
}

/// Leaves out rows that nobody waits for any more: on a slow link, many may have waited.
fn leave_out(frames: &mut Vec<Waiting>, sessions: &Mutex<Streams>) {
    let sessions = lock(sessions);
    frames.retain(|waiting| sessions.is_current(&Borrow::<Frame>::borrow(waiting).header));
}

/// Returns when another host to which something goes gives no sign of life any more.
async fn silence(mesh: &Weak<MeshNode>, node: NodeId, is_used: &AtomicBool) {
    loop {
        sleep(SILENCE_MAX).await;
        let Some(mesh) = mesh.upgrade() else { return };
        if is_used.swap(false, Ordering::Relaxed) && !alive::is_there(&mesh, node, alive::ALONE).await {
            return;
        }
    }
}

/// Takes hidden states of another host for a driver's ring.
pub(crate) async fn take_hidden(
    mesh: &MeshNode,
    ring: RingId,
    mut reader: FrameReader,
    mut drain: Drain,
) -> Result<(), FrameError> {
    let Some((guest, places)) = mesh.rings.find(&ring) else {
        return Err(FrameError::Malformed("nobody here has a ring of this name"));
    };
    let Ok(_place) = places.try_acquire() else {
        return Err(FrameError::Malformed("more streams than two hosts need"));
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Long enough for what does not happen not to happen.
    const A_WHILE: Duration = Duration::from_millis(100);

    fn word(kind: Kind, session: u64) -> Frame {
        Frame { header: Header::new(kind, session), payload: Vec::new() }
    }

    fn hidden(session: u64) -> Frame {
        Frame { payload: vec![0; 1000], ..word(Kind::Hidden, session) }
    }

    /// A way whose streams lead to the receiver, and room for so many bytes on it.
    fn way(bytes: u32) -> (Way, mpsc::UnboundedReceiver<Waiting>) {
        let to = RouteTo { node: NodeId::from_bytes([1; 32]), ring: RingId::from_bytes([2; 16]) };
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut carriers = JoinSet::new();
        carriers.spawn(std::future::pending());
        let streams = HashMap::from([(0, sender)]);
        let (room, answered, is_used) = (Room::new(bytes), watch::Sender::new(true), Arc::default());
        let sessions = Arc::new(Mutex::new(Streams::new(1)));
        let way = Way { mesh: Weak::new(), sessions, to, room, answered, is_used, streams, carriers };
        (way, receiver)
    }

    fn hop(route: watch::Receiver<Route>) -> Hop {
        let mut streams = Streams::new(1);
        streams.note(&word(Kind::Open, 1));
        Hop::new(Weak::new(), route, Arc::new(Mutex::new(streams)))
    }

    #[test]
    fn sessions_that_run_have_a_stream_each_and_keep_it_and_more_than_there_are_share_some() {
        let mut streams = Streams::new(2);
        for session in 10..14 {
            streams.note(&word(Kind::Open, session));
        }
        let taken: Vec<_> = (10..14).map(|session| streams.of(session).unwrap()).collect();
        assert_eq!(taken, [0, 1, 2, 3]);
        streams.note(&word(Kind::Open, 15));
        assert_eq!(streams.of(15), Some(3));
        // What is held goes on where it was, and so does what is opened again.
        let mut hold = word(Kind::Close, 11);
        hold.header.flags = FLAG_HOLD;
        streams.note(&hold);
        streams.note(&word(Kind::Close, 12));
        streams.note(&word(Kind::Open, 16));
        streams.note(&word(Kind::Open, 11));
        assert_eq!((streams.of(11), streams.of(12), streams.of(16)), (Some(1), None, Some(2)));
    }

    #[test]
    fn sessions_that_a_driver_does_not_have_any_more_take_no_streams() {
        let mut streams = Streams::new(2);
        let only = |open: Vec<u64>| Frame::message(Header::new(Kind::Sessions, 0), &Sessions { open }).unwrap();
        for round in 0..1_000 {
            for session in 4 * round..4 * round + 4 {
                streams.note(&word(Kind::Open, session));
            }
            streams.note(&only(vec![4 * round + 1]));
            assert_eq!((streams.of.len(), streams.of(4 * round)), (1, None));
        }
        assert!((0..4).contains(&streams.of(3_997).unwrap()));
        streams.note(&only(Vec::new()));
        assert!(streams.of.is_empty());
    }

    #[test]
    fn rows_that_wait_while_their_session_is_rewound_or_ends_are_not_written() {
        let sessions = Mutex::new(Streams::new(2));
        let note = |kind, session, epoch, flags| {
            lock(&sessions)
                .note(&Frame { header: Header { epoch, flags, ..Header::new(kind, session) }, payload: Vec::new() });
        };
        let written = || {
            let room = Room::new(100_000);
            let rows =
                |(session, epoch)| Frame { header: Header { epoch, ..hidden(session).header }, ..hidden(session) };
            let all = [(1, 0), (1, 1), (2, 0), (2, 1)].map(|of| room.try_take(rows(of)).unwrap());
            let mut frames: Vec<Waiting> = all.into_iter().collect();
            leave_out(&mut frames, &sessions);
            let of = |waiting: &Waiting| {
                (Borrow::<Frame>::borrow(waiting).header.session, Borrow::<Frame>::borrow(waiting).header.epoch)
            };
            frames.iter().map(of).collect::<Vec<_>>()
        };
        note(Kind::Open, 1, 0, 0);
        note(Kind::Open, 2, 0, 0);
        assert_eq!(written(), [(1, 0), (1, 1), (2, 0), (2, 1)]);
        note(Kind::Rewind, 1, 1, 0);
        assert_eq!(written(), [(1, 1), (2, 0), (2, 1)]);
        note(Kind::Close, 2, 1, FLAG_HOLD);
        assert_eq!(written(), [(1, 1), (2, 1)]);
        note(Kind::Close, 1, 1, 0);
        assert_eq!(written(), [(2, 1)]);
    }

    #[test]
    fn a_stream_that_has_become_free_is_the_last_to_be_taken_again() {
        let mut streams = Streams::new(1);
        for (session, stream) in [(1, 0), (2, 1), (3, 0)] {
            streams.note(&word(Kind::Open, session));
            assert_eq!(streams.of(session), Some(stream));
            streams.note(&word(Kind::Close, session));
        }
    }

    #[tokio::test]
    async fn a_host_that_takes_nothing_is_waited_for_until_the_driver_names_another_way() {
        let (routes, route) = watch::channel(Route::default());
        let mut hop = hop(route);
        let (next, _taken) = way(1500);
        hop.next = Next::Way(next);
        let mut back = Vec::new();
        hop.send(hidden(1), &mut back).await.unwrap();
        {
            let sending = hop.send(hidden(1), &mut back);
            tokio::pin!(sending);
            assert!(timeout(A_WHILE, &mut sending).await.is_err());
            routes.send_replace(Route::default());
            sending.await.unwrap();
        }
        // The driver does not get what it has named a way for.
        assert!(matches!(hop.next, Next::Lost) && back.is_empty());
        hop.renew().await;
        hop.send(hidden(1), &mut back).await.unwrap();
        assert_eq!(back, [hidden(1)]);
    }

    #[tokio::test]
    async fn one_that_stands_by_is_not_waited_for_and_given_up_when_it_falls_behind() {
        let (_routes, route) = watch::channel(Route::default());
        let mut hop = hop(route);
        let ((next, mut taken), (standby, mut taken_too)) = (way(10_000), way(1500));
        let to = standby.to;
        (hop.next, hop.standby) = (Next::Way(next), Some(standby));
        let mut back = Vec::new();
        for _ in 0..3 {
            hop.send(hidden(1), &mut back).await.unwrap();
        }
        assert_eq!(back, [route_lost(&to, 0).unwrap()]);
        assert!((0..3).all(|_| taken.try_recv().is_ok()));
        assert!(taken_too.try_recv().is_ok() && taken_too.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_way_that_ends_is_told_to_the_driver_and_what_follows_is_lost() {
        let (_routes, route) = watch::channel(Route::default());
        let mut hop = hop(route);
        let (mut next, _taken) = way(10_000);
        let to = next.to;
        next.carriers.spawn(async {});
        hop.next = Next::Way(next);
        assert_eq!(hop.change().await, Some(to));
        let mut back = Vec::new();
        hop.send(hidden(1), &mut back).await.unwrap();
        assert!(matches!(hop.next, Next::Lost) && back.is_empty());
    }

    #[tokio::test]
    async fn a_way_that_cannot_be_had_is_told_to_the_driver_who_loses_nothing_by_it() {
        let (routes, route) = watch::channel(Route::default());
        let mut hop = hop(route);
        let (way, _taken) = way(10_000);
        routes.send_replace(Route { next: Some(way.to), ..Route::default() });
        let said = hop.renew().await.unwrap();
        assert!(said.header.kind == Kind::RouteLost && said.header.has(FLAG_NEVER_TAKEN));
        assert_eq!(said.decode::<RouteTo>().unwrap(), way.to);
        let mut back = Vec::new();
        hop.send(hidden(1), &mut back).await.unwrap();
        assert_eq!((back, hop.renew().await), (vec![hidden(1)], None));
    }

    #[tokio::test]
    async fn who_stands_by_sends_nothing_on_and_no_session_that_is_over_does() {
        let (routes, route) = watch::channel(Route::default());
        let mut hop = hop(route);
        let (next, mut taken) = way(10_000);
        hop.next = Next::Way(next);
        let mut back = Vec::new();
        hop.send(hidden(2), &mut back).await.unwrap();
        routes.send_replace(Route { is_standby: true, ..Route::default() });
        hop.renew().await;
        hop.send(hidden(1), &mut back).await.unwrap();
        assert!(taken.try_recv().is_err() && back.is_empty());
    }
}
