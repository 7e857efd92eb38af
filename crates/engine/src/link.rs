//! The parent's end of a child process: spawn, send without blocking, receive until it dies.

use std::{
    collections::VecDeque,
    io::{self, BufReader, Read},
    os::{fd::OwnedFd, unix::net::UnixStream, unix::process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use murmur_protocol::{
    frame::{Frame, FrameError, HEADER_BYTES, Header, Kind},
    stage::{Load, Loaded},
};
use rustix::net::SendFlags;

/// Hidden subcommand of the binary that runs [`crate::child::run`] on standard input.
pub const CHILD_SUBCOMMAND: &str = "engine-child";
/// Bytes of a child's standard error that are kept for the message about its death.
const STDERR_BYTES_KEPT: usize = 4096;

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
    /// The process died while loading.
    #[error("the engine process died while loading ({status}){stderr}")]
    Died {
        /// Exit status or signal.
        status: String,
        /// The end of what it printed.
        stderr: String,
    },
    /// The connection failed or carried something else.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// A running child. Dropping it kills the process.
pub struct Link {
    process: Mutex<Child>,
    sender: Arc<Sender>,
    stderr: Arc<Mutex<Vec<u8>>>,
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
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, mut bytes: &[u8]) {
        let mut backlog = self.lock();
        if backlog.closed {
            return;
        }
        while backlog.bytes.is_empty() && !backlog.writing && !bytes.is_empty() {
            match rustix::net::send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => bytes = &bytes[n..],
                Err(rustix::io::Errno::INTR) => {}
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
            let failed = io::Write::write_all(&mut &self.socket, &bytes).is_err();
            backlog = self.lock();
            backlog.closed |= failed;
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.filled.notify_one();
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.sender.close();
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = process.kill();
        let _ = process.wait();
    }
}

/// The receiving half of a [`Link`].
pub struct Receiver(BufReader<UnixStream>);

impl Receiver {
    /// The next frame, and whether more have arrived already; `None` when the child is gone.
    pub fn receive(&mut self) -> Option<(Frame, bool)> {
        let frame = Frame::read_from(&mut self.0).ok().flatten()?;
        Some((frame, self.0.buffer().len() >= HEADER_BYTES))
    }
}

impl Link {
    /// Starts `program` as a child and has it load; `progress` hears fractions.
    pub fn spawn(
        program: &Path,
        load: &Load,
        progress: &mut dyn FnMut(f32),
    ) -> Result<(Link, Receiver, Loaded), LinkError> {
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
        let sender = Arc::new(Sender {
            socket: ours.try_clone().map_err(FrameError::from)?,
            backlog: Mutex::default(),
            filled: Condvar::new(),
        });
        let writer = sender.clone();
        thread::Builder::new().name("engine-writer".into()).spawn(move || writer.write_backlog()).map_err(failed)?;
        let link = Link { process: Mutex::new(process), sender, stderr };
        link.send(&[Frame::message(Header::new(Kind::Load, 0), load)?])?;
        let mut receiver = Receiver(BufReader::with_capacity(1 << 16, ours));
        loop {
            let Some((frame, _)) = receiver.receive() else { return Err(link.died()) };
            match frame.header.kind {
                Kind::Loaded => {
                    let loaded = frame.decode()?;
                    return Ok((link, receiver, loaded));
                }
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

    /// Sends frames, in order, without blocking.
    pub fn send(&self, frames: &[Frame]) -> Result<(), FrameError> {
        let mut bytes = Vec::with_capacity(frames.iter().map(|f| HEADER_BYTES + f.payload.len()).sum());
        for frame in frames {
            frame.append_to(&mut bytes)?;
        }
        self.sender.send(&bytes);
        Ok(())
    }

    /// The child's process id.
    pub fn process_id(&self) -> u32 {
        self.process.lock().unwrap_or_else(PoisonError::into_inner).id()
    }

    /// How the child ended; waits for it.
    pub fn died(&self) -> LinkError {
        self.sender.close();
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        // The socket is closed, so it ends by itself or has ended; a hung one does not.
        let _ = process.kill();
        let status = process.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
        let tail = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        let tail = String::from_utf8_lossy(&tail);
        let stderr = if tail.trim().is_empty() { String::new() } else { format!(": {}", tail.trim()) };
        LinkError::Died { status, stderr }
    }
}

fn keep_tail(mut pipe: impl Read, kept: &Mutex<Vec<u8>>) {
    let mut buffer = [0u8; 1024];
    while let Ok(n @ 1..) = pipe.read(&mut buffer) {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(&buffer[..n]);
        let excess = kept.len().saturating_sub(STDERR_BYTES_KEPT);
        kept.drain(..excess);
    }
}
