//! The driver's end of a stage: send without blocking, receive until it is lost. Mostly the stage is a child process, which
//! is started here and ended when it hangs; it may be on another machine, and then somebody carries the frames there.

mod far;
mod watch;

use std::{
    collections::VecDeque,
    io::{self, BufReader, Read},
    os::{fd::OwnedFd, unix::net::UnixStream, unix::process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use murmur_protocol::{
    frame::{Frame, FrameError, HEADER_BYTES, Header, Kind},
    stage::{Load, Loaded},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::SendFlags,
};
use tokio::{sync::mpsc, time::timeout};
use watch::Watch;

pub use far::{Answers, Connection, FarEnd, connection};

use crate::{FrameReader, Stop};

/// Hidden subcommand of the binary that runs [`crate::child::run`] on standard input.
pub const CHILD_SUBCOMMAND: &str = "engine-child";
/// Bytes of a child's standard error that are kept for the message about its death.
const STDERR_BYTES_KEPT: usize = 4096;
/// Bytes read from a child at once.
const RECEIVE_BYTES: usize = 1 << 16;

/// Why a child could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The process could not be started.
    #[error("the engine process could not be started ({program}): {source}")]
    Spawn {
        /// Which program.
        program: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The engine said why it could not load.
    #[error("{0}")]
    Load(String),
    /// The process died.
    #[error("the engine process died ({status}){stderr}")]
    Died {
        /// Exit status or signal.
        status: String,
        /// The end of what it printed.
        stderr: String,
    },
    /// The process was killed because it gave no answer.
    #[error("the engine process gave no answer for {} s, far longer than before, and was killed", .silence.as_secs())]
    Hung {
        /// For how long it had said nothing.
        silence: Duration,
    },
    /// The stage is on another machine, and lost.
    #[error("{0}")]
    Lost(String),
    /// The connection failed or carried something else.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// A stage on another machine, or one that may be: whoever implements this finds it and carries the frames.
pub trait RemoteStage: Send + Sync {
    /// Connects to whoever holds the layers now: frames go both ways as between a driver and its child, what to load left out. It
    /// ends when the stage is lost. Blocks, until `stop` at most.
    ///
    /// # Errors
    /// Why nobody holds them, for people.
    fn connect(&self, stop: &Stop) -> Result<Connection, String>;

    /// Why the last connection ended, for people.
    fn lost_because(&self) -> String;

    /// Whether it ended because the other machine could not be reached any more, and not because the stage there has ended:
    /// no request is to blame for that.
    fn is_unreachable(&self) -> bool {
        false
    }
}

/// A frame that cannot be sent, alone; the session it belongs to cannot go on.
#[derive(Debug)]
pub struct Unsendable {
    /// Which session.
    pub session: u64,
    /// Why.
    pub error: FrameError,
}

/// A stage that runs. Dropping it kills the process.
pub struct Link(Far);

/// What is at the other end.
enum Far {
    /// A process of ours.
    Child { process: Mutex<Child>, sender: Arc<Sender>, stderr: Arc<Mutex<Vec<u8>>>, watch: Arc<Mutex<Watch>> },
    /// A stage on another machine. Whether it hangs is for those to find out who run it.
    Elsewhere {
        stage: Arc<dyn RemoteStage>,
        /// `None`: it was ended.
        questions: Mutex<Option<mpsc::UnboundedSender<Frame>>>,
        inbox: Arc<far::Inbox>,
    },
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends frames in order and never blocks the caller: what the socket does not take at once, a thread writes later.
struct Sender {
    socket: UnixStream,
    backlog: Mutex<Backlog>,
    filled: Condvar,
}

#[derive(Default)]
struct Backlog {
    bytes: VecDeque<u8>,
    /// The writer thread holds bytes it has taken out.
    writing: bool,
    closed: bool,
}

impl Sender {
    fn lock(&self) -> MutexGuard<'_, Backlog> {
        lock(&self.backlog)
    }

    fn send(&self, mut bytes: &[u8]) {
        let mut backlog = self.lock();
        if backlog.closed {
            return;
        }
        while backlog.bytes.is_empty() && !backlog.writing && !bytes.is_empty() {
            match rustix::net::send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        if !bytes.is_empty() {
            backlog.bytes.extend(bytes);
            self.filled.notify_one();
        }
    }

    fn write_backlog(&self) {
        let mut backlog = self.lock();
        loop {
            while backlog.bytes.is_empty() && !backlog.closed {
                backlog.writing = false;
                backlog = self.filled.wait(backlog).unwrap_or_else(PoisonError::into_inner);
            }
            if backlog.closed {
                return;
            }
            let bytes: Vec<u8> = std::mem::take(&mut backlog.bytes).into();
            backlog.writing = true;
            drop(backlog);
            let failed = self.write_all(&bytes).is_err();
            backlog = self.lock();
            backlog.closed |= failed;
        }
    }

    /// Blocks, whether the socket does or not.
    fn write_all(&self, mut bytes: &[u8]) -> Result<(), Errno> {
        while !bytes.is_empty() {
            match rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => drop(poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], None)),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn close(&self) {
        self.lock().closed = true;
        self.filled.notify_one();
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.kill();
        if let Far::Child { process, .. } = &self.0 {
            let _ = lock(process).wait();
        }
    }
}

/// The receiving half of a [`Link`].
pub struct Receiver(Source);

enum Source {
    Child(BufReader<Watched>),
    Elsewhere(Arc<far::Inbox>),
}

/// Reads from a stage and ends when a child hangs, as if it were dead.
struct Watched {
    socket: UnixStream,
    watch: Arc<Mutex<Watch>>,
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.socket.read(buffer) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if lock(&self.watch).tick() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                read => return read,
            }
        }
    }
}

/// The next frame of a child, whatever it says; `None` when the child is gone, or hangs.
fn heard(child: &mut BufReader<Watched>) -> Option<Frame> {
    let frame = Frame::read_from(child).ok().flatten()?;
    unless_hung(&child.get_ref().watch, frame)
}

/// A frame that has come, which the watch is told; `None` when the child hangs.
fn unless_hung(watch: &Mutex<Watch>, frame: Frame) -> Option<Frame> {
    let mut watch = lock(watch);
    watch.received(&frame.header, Instant::now());
    watch.hung().is_none().then_some(frame)
}

impl Receiver {
    fn of_child(socket: UnixStream, watch: Arc<Mutex<Watch>>) -> Receiver {
        Receiver(Source::Child(BufReader::with_capacity(RECEIVE_BYTES, Watched { socket, watch })))
    }

    /// The next frame, and whether more have arrived already; `None` when the child is gone, or hangs.
    pub fn receive(&mut self) -> Option<(Frame, bool)> {
        let child = match &mut self.0 {
            Source::Child(child) => child,
            Source::Elsewhere(inbox) => return inbox.next(),
        };
        loop {
            let frame = heard(child)?;
            if frame.header.kind == Kind::Alive {
                continue;
            }
            // Signs of life are not taken by anybody: whoever waits for what has arrived with this frame must not wait for what
            // comes after them.
            while matches!(Frame::header(child.buffer()), Ok(Some(next)) if next.kind == Kind::Alive) {
                heard(child)?;
            }
            return Some((frame, child.buffer().len() >= HEADER_BYTES));
        }
    }

    /// Has all further frames taken, each with the word whether more have arrived already, until the stage is lost. Blocks; what comes
    /// from another machine is taken by the thread that brings it.
    pub fn receive_all(&mut self, take: impl Fn(Frame, bool) + Send + 'static) {
        if let Source::Elsewhere(inbox) = &self.0 {
            return inbox.all(Box::new(take));
        }
        while let Some((frame, more)) = self.receive() {
            take(frame, more);
        }
    }

    /// Waits until the child has loaded; `progress` hears fractions.
    pub fn loaded(&mut self, link: &Link, progress: &mut dyn FnMut(f32)) -> Result<Loaded, LinkError> {
        loop {
            let Some((frame, _)) = self.receive() else { return Err(link.died()) };
            match frame.header.kind {
                Kind::Loaded => return Ok(frame.decode()?),
                Kind::LoadFailed => return Err(LinkError::Load(frame.as_text())),
                Kind::Progress => {
                    if let Ok(bytes) = frame.payload.try_into() {
                        progress(f32::from_le_bytes(bytes));
                    }
                }
                _ => {}
            }
        }
    }
}

/// Frames of a child, for who waits in a runtime.
pub struct Frames {
    reader: FrameReader<tokio::net::UnixStream>,
    watch: Arc<Mutex<Watch>>,
}

impl Receiver {
    /// Goes on in the runtime that the caller is in. Only for a child of ours.
    pub fn into_frames(self) -> io::Result<Frames> {
        let Source::Child(child) = self.0 else { return Err(io::ErrorKind::Unsupported.into()) };
        let begun = child.buffer().to_vec();
        let Watched { socket, watch } = child.into_inner();
        socket.set_nonblocking(true)?;
        let socket = tokio::net::UnixStream::from_std(socket)?;
        Ok(Frames { reader: FrameReader::new(socket, &begun), watch })
    }
}

impl Frames {
    /// The next frame; `None` when the child is gone, or hangs. Nothing is lost if it is dropped before it is done.
    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            let tick = lock(&self.watch).tick_every();
            match timeout(tick, self.reader.next()).await {
                Ok(Ok(Some(frame))) => {
                    let frame = unless_hung(&self.watch, frame)?;
                    if frame.header.kind != Kind::Alive {
                        return Some(frame);
                    }
                }
                Err(_) if !lock(&self.watch).tick() => {}
                Ok(_) | Err(_) => return None,
            }
        }
    }
}

impl Link {
    /// Starts `program` as a child and tells it what to load. It is killed when it owes an answer and is silent for
    /// much longer than before, and never sooner than after `silence_floor`.
    pub fn start(program: &Path, load: &Load, silence_floor: Duration) -> Result<(Link, Receiver), LinkError> {
        let (ours, theirs) = UnixStream::pair().map_err(FrameError::from)?;
        let failed = |source| LinkError::Spawn { program: program.display().to_string(), source };
        let mut process = Command::new(program)
            .arg(CHILD_SUBCOMMAND)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A Ctrl-C in the terminal is for the node, which then ends its children in order.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let stderr = Arc::new(Mutex::new(Vec::new()));
        if let Some(pipe) = process.stderr.take() {
            let kept = stderr.clone();
            thread::Builder::new()
                .name("engine-stderr".into())
                .spawn(move || keep_tail(pipe, &kept))
                .map_err(failed)?;
        }
        ours.set_read_timeout(Some(Watch::tick_interval(silence_floor))).map_err(FrameError::from)?;
        let watch = Arc::new(Mutex::new(Watch::new(silence_floor)));
        let sender = Arc::new(Sender {
            socket: ours.try_clone().map_err(FrameError::from)?,
            backlog: Mutex::default(),
            filled: Condvar::new(),
        });
        let (process, writer) = (Mutex::new(process), sender.clone());
        let link = Link(Far::Child { process, sender, stderr, watch: watch.clone() });
        let started = thread::Builder::new().name("engine-writer".into()).spawn(move || writer.write_backlog());
        started.map_err(FrameError::from)?;
        if let Some(unsendable) = link.send(&[Frame::message(Header::new(Kind::Load, 0), load)?]).pop() {
            return Err(unsendable.error.into());
        }
        Ok((link, Receiver::of_child(ours, watch)))
    }

    /// Connects to a stage on another machine. Blocks.
    pub(crate) fn connect(stage: &Arc<dyn RemoteStage>, stop: &Stop) -> Result<(Link, Receiver), LinkError> {
        let Connection { questions, inbox } = stage.connect(stop).map_err(LinkError::Lost)?;
        let (stage, questions) = (stage.clone(), Mutex::new(Some(questions)));
        let receiver = Receiver(Source::Elsewhere(inbox.clone()));
        Ok((Link(Far::Elsewhere { stage, questions, inbox }), receiver))
    }

    /// Sends frames, in order, without blocking. Those that are no valid frames are left out and given back.
    pub fn send(&self, frames: &[Frame]) -> Vec<Unsendable> {
        let unsendable = |frame: &Frame, error| Unsendable { session: frame.header.session, error };
        match &self.0 {
            Far::Child { sender, watch, .. } => {
                let mut bytes = Vec::with_capacity(frames.iter().map(|f| HEADER_BYTES + f.payload.len()).sum());
                let mut left_out = Vec::new();
                {
                    let (mut watch, now) = (lock(watch), Instant::now());
                    for frame in frames {
                        match frame.append_to(&mut bytes) {
                            Ok(()) => watch.sent(&frame.header, now),
                            Err(error) => left_out.push(unsendable(frame, error)),
                        }
                    }
                }
                sender.send(&bytes);
                left_out
            }
            Far::Elsewhere { questions, .. } => {
                let questions = lock(questions);
                let send = |frame: &Frame| {
                    frame.check().map_err(|error| unsendable(frame, error))?;
                    // When nobody carries them any more, the stage is about to be lost.
                    questions.as_ref().map(|questions| questions.send(frame.clone()));
                    Ok(())
                };
                frames.iter().filter_map(|frame| send(frame).err()).collect()
            }
        }
    }

    /// The child's process id; `None`: it is on another machine.
    pub fn process_id(&self) -> Option<u32> {
        match &self.0 {
            Far::Child { process, .. } => Some(lock(process).id()),
            Far::Elsewhere { .. } => None,
        }
    }

    /// Ends the child, whatever it does, or the connection; does not wait for it.
    pub fn kill(&self) {
        match &self.0 {
            Far::Child { process, sender, .. } => {
                sender.close();
                let _ = lock(process).kill();
            }
            Far::Elsewhere { questions, inbox, .. } => {
                lock(questions).take();
                inbox.close();
            }
        }
    }

    /// Whether it has ended because another machine could not be reached any more.
    pub fn is_unreachable(&self) -> bool {
        matches!(&self.0, Far::Elsewhere { stage, .. } if stage.is_unreachable())
    }

    /// How it ended; ends it if it has not, and waits for a child.
    pub fn died(&self) -> LinkError {
        self.kill();
        let (process, stderr, watch) = match &self.0 {
            Far::Child { process, stderr, watch, .. } => (process, stderr, watch),
            Far::Elsewhere { stage, .. } => return LinkError::Lost(stage.lost_because()),
        };
        let status = lock(process).wait().map_or_else(|e| e.to_string(), |status| status.to_string());
        if let Some(silence) = lock(watch).hung() {
            return LinkError::Hung { silence };
        }
        let tail = lock(stderr);
        let tail = String::from_utf8_lossy(&tail);
        let stderr = if tail.trim().is_empty() { String::new() } else { format!(": {}", tail.trim()) };
        LinkError::Died { status, stderr }
    }
}

fn keep_tail(mut pipe: impl Read, kept: &Mutex<Vec<u8>>) {
    let mut buffer = [0u8; 1024];
    while let Ok(n @ 1..) = pipe.read(&mut buffer) {
        let mut kept = lock(kept);
        kept.extend_from_slice(&buffer[..n]);
        let excess = kept.len().saturating_sub(STDERR_BYTES_KEPT);
        kept.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn nobody_waits_for_what_comes_after_a_sign_of_life() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut receiver = Receiver::of_child(ours, Arc::new(Mutex::new(Watch::new(Duration::from_secs(30)))));
        let mut says = |kinds: &[Kind]| {
            let mut bytes = Vec::new();
            let frames = kinds.iter().map(|&kind| Frame { header: Header::new(kind, 0), payload: Vec::new() });
            frames.for_each(|frame| frame.append_to(&mut bytes).unwrap());
            theirs.write_all(&bytes).unwrap();
        };
        let mut received = || receiver.receive().map(|(frame, more)| (frame.header.kind, more));
        says(&[Kind::Alive, Kind::Sampled, Kind::Alive, Kind::Done, Kind::Alive, Kind::Alive]);
        assert_eq!(received(), Some((Kind::Sampled, true)));
        // Nothing but signs of life has come with it.
        assert_eq!(received(), Some((Kind::Done, false)));
    }
}
