//! A connection to a stage elsewhere, within this process: whoever carries the frames has one end, the engine the other.
//!
//! Nothing is written to a socket and read again, and no thread wakes up another one for a token: the answers are taken where they
//! arrive, by the thread that brings them.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex},
};

use murmur_protocol::frame::Frame;
use tokio::sync::mpsc;

use super::lock;

/// The engine's end of a connection. Dropped, or when the stage is ended, it ends.
pub struct Connection {
    pub(super) questions: mpsc::UnboundedSender<Frame>,
    pub(super) inbox: Arc<Inbox>,
}

/// The end of whoever carries the frames.
pub struct FarEnd {
    /// What the driver says, in order. It ends when the engine has enough.
    pub questions: mpsc::UnboundedReceiver<Frame>,
    /// Where the answers go.
    pub answers: Answers,
}

/// Where the answers of a stage go. Dropped, the stage is lost.
pub struct Answers(Arc<Inbox>);

/// Both ends of a new connection.
pub fn connection() -> (Connection, FarEnd) {
    let (questions, asked) = mpsc::unbounded_channel();
    let inbox = Arc::<Inbox>::default();
    let answers = Answers(inbox.clone());
    (Connection { questions, inbox }, FarEnd { questions: asked, answers })
}

impl Answers {
    /// Hands over frames that have come together, and what follows from them happens in this thread. That takes no longer than
    /// making up the next frames, and does not wait for anybody.
    pub fn give(&self, frames: impl IntoIterator<Item = Frame>) {
        let mut frames = frames.into_iter().peekable();
        while let Some(frame) = frames.next() {
            self.0.give(frame, frames.peek().is_some());
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Takes frames, each with the word whether more have come with it.
pub(super) type Taker = Box<dyn Fn(Frame, bool) + Send>;

/// What has come and is not taken yet, and who takes what comes.
#[derive(Default)]
pub(super) struct Inbox {
    /// Held while something is taken.
    taker: Mutex<Option<Taker>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(Frame, bool)>,
    is_closed: bool,
}

impl Inbox {
    fn give(&self, frame: Frame, more: bool) {
        let taker = lock(&self.taker);
        let mut state = lock(&self.state);
        match &*taker {
            _ if state.is_closed => {}
            Some(take) => {
                drop(state);
                take(frame, more);
            }
            None => {
                state.waiting.push_back((frame, more));
                self.changed.notify_all();
            }
        }
    }

    /// Nothing more is taken.
    pub(super) fn close(&self) {
        lock(&self.state).is_closed = true;
        self.changed.notify_all();
    }

    /// Waits for the next frame. `None`: there is none any more.
    pub(super) fn next(&self) -> Option<(Frame, bool)> {
        let state = lock(&self.state);
        let waited = self.changed.wait_while(state, |state| state.waiting.is_empty() && !state.is_closed);
        waited.unwrap_or_else(std::sync::PoisonError::into_inner).waiting.pop_front()
    }

    /// Has everything taken until the connection ends, and waits for that. When it is over, nothing is being taken any more.
    pub(super) fn all(&self, take: Taker) {
        {
            let mut taker = lock(&self.taker);
            let waiting = std::mem::take(&mut lock(&self.state).waiting);
            waiting.into_iter().for_each(|(frame, more)| take(frame, more));
            *taker = Some(take);
        }
        let state = lock(&self.state);
        drop(self.changed.wait_while(state, |state| !state.is_closed));
        *lock(&self.taker) = None;
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use murmur_protocol::frame::{Header, Kind};

    use super::*;

    fn frame(session: u64) -> Frame {
        Frame { header: Header::new(Kind::Sampled, session), payload: Vec::new() }
    }

    fn sessions(taken: &[(Frame, bool)]) -> Vec<(u64, bool)> {
        taken.iter().map(|(frame, more)| (frame.header.session, *more)).collect()
    }

    #[test]
    fn what_came_before_anybody_took_it_and_what_comes_later_are_taken_in_order() {
        let (Connection { inbox, .. }, FarEnd { answers, .. }) = connection();
        answers.give([frame(1), frame(2)]);
        assert_eq!(sessions(&[inbox.next().unwrap()]), [(1, true)]);
        let (took, taken) = mpsc::channel();
        let taking = thread::spawn(move || inbox.all(Box::new(move |frame, more| took.send((frame, more)).unwrap())));
        let first = taken.recv().unwrap();
        answers.give([frame(3), frame(4)]);
        drop(answers);
        taking.join().unwrap();
        let rest: Vec<_> = taken.iter().collect();
        assert_eq!(sessions(&[&[first][..], &rest].concat()), [(2, false), (3, true), (4, false)]);
    }

    #[test]
    fn of_a_stage_that_was_ended_nothing_is_taken_any_more_and_whoever_carries_frames_learns_of_it() {
        let (Connection { inbox, questions }, FarEnd { answers, questions: mut asked }) = connection();
        questions.send(frame(1)).unwrap();
        drop(questions);
        inbox.close();
        answers.give([frame(2)]);
        assert_eq!(inbox.next(), None);
        assert_eq!(asked.blocking_recv(), Some(frame(1)));
        assert_eq!(asked.blocking_recv(), None);
    }

    #[test]
    fn a_frame_that_is_being_taken_when_the_stage_ends_is_taken_before_the_end_is_told() {
        let (Connection { inbox, .. }, FarEnd { answers, .. }) = connection();
        let (begins, begun) = mpsc::channel();
        let (ended, end) = mpsc::channel();
        let taking = thread::spawn({
            let (inbox, ended) = (inbox.clone(), ended.clone());
            move || {
                let take = move |_: Frame, _| {
                    begins.send(()).unwrap();
                    thread::sleep(Duration::from_millis(50));
                    ended.send("taken").unwrap();
                };
                inbox.all(Box::new(take));
            }
        });
        let giving = thread::spawn(move || answers.give([frame(1)]));
        begun.recv().unwrap();
        inbox.close();
        taking.join().unwrap();
        ended.send("over").unwrap();
        giving.join().unwrap();
        assert_eq!(end.try_iter().collect::<Vec<_>>(), ["taken", "over"]);
    }
}
