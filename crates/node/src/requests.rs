//! The answers in progress, and how many tokens come per second: what one sees of a node at work.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use murmur_protocol::mesh::NodeId;
use serde_json::{Value, json};

/// Tokens per second are an average over so many whole seconds.
const WINDOW_S: u64 = 5;

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asker {
    /// Somebody at this node's own API.
    Api,
    /// Another node.
    Node(NodeId),
}

/// All answers in progress.
#[derive(Default)]
pub(crate) struct Requests(Mutex<Running>);

#[derive(Default)]
struct Running {
    by_id: BTreeMap<u64, Arc<Progress>>,
    next_id: u64,
    for_api: Rate,
    for_nodes: Rate,
}

/// How far one answer is. Dropped, it is over.
pub(crate) struct Request {
    requests: Arc<Requests>,
    id: u64,
    progress: Arc<Progress>,
}

/// The same, for those who only tell.
pub(crate) struct Progress {
    model: String,
    asker: Asker,
    prompt_tokens: u32,
    prompt_tokens_done: AtomicU32,
    generated_tokens: AtomicU32,
    begun: Instant,
    /// When the first token came.
    first_token: Mutex<Option<Instant>>,
    /// Which node computes it; `None`: none yet, or this one.
    at: Mutex<Option<NodeId>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Requests {
    /// Lists a new answer.
    pub(crate) fn begin(self: &Arc<Self>, model: &str, asker: Asker, prompt_tokens: u32) -> Request {
        self.list_in(&mut lock(&self.0), Progress::new(model, asker, prompt_tokens))
    }

    /// Lists a new answer for another node, unless `most` of those are in progress.
    pub(crate) fn begin_within(
        self: &Arc<Self>,
        most: usize,
        model: &str,
        asker: Asker,
        prompt_tokens: u32,
    ) -> Option<Request> {
        let mut running = lock(&self.0);
        let has_room = running.of_others() < most;
        has_room.then(|| self.list_in(&mut running, Progress::new(model, asker, prompt_tokens)))
    }

    fn list_in(self: &Arc<Self>, running: &mut Running, progress: Progress) -> Request {
        let progress = Arc::new(progress);
        let id = running.next_id;
        running.next_id += 1;
        running.by_id.insert(id, Arc::clone(&progress));
        Request { requests: Arc::clone(self), id, progress }
    }

    /// How many answers are in progress for other nodes.
    pub(crate) fn of_others(&self) -> usize {
        lock(&self.0).of_others()
    }

    /// For `/api/status`: the answers in progress, the oldest first.
    pub(crate) fn list(&self) -> Vec<Value> {
        lock(&self.0).by_id.values().map(|progress| progress.view()).collect()
    }

    /// For `/api/status`: tokens per second, by who asked.
    pub(crate) fn tokens_per_s(&self, now: Instant) -> Value {
        let running = lock(&self.0);
        json!({"api": running.for_api.per_second(now), "nodes": running.for_nodes.per_second(now)})
    }
}

impl Request {
    pub(crate) fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// So much of the prompt has been read.
    pub(crate) fn prefilled(&self, done_tokens: u32) {
        self.progress.prompt_tokens_done.store(done_tokens, Ordering::Relaxed);
    }

    /// A token has come.
    pub(crate) fn token(&self) {
        let (progress, now) = (&self.progress, Instant::now());
        progress.prompt_tokens_done.store(progress.prompt_tokens, Ordering::Relaxed);
        if progress.generated_tokens.fetch_add(1, Ordering::Relaxed) == 0 {
            *lock(&progress.first_token) = Some(now);
        }
        let mut running = lock(&self.requests.0);
        match progress.asker {
            Asker::Api => running.for_api.note(now),
            Asker::Node(_) => running.for_nodes.note(now),
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        lock(&self.requests.0).by_id.remove(&self.id);
    }
}

impl Running {
    fn of_others(&self) -> usize {
        self.by_id.values().filter(|progress| progress.asker != Asker::Api).count()
    }
}

impl Progress {
    fn new(model: &str, asker: Asker, prompt_tokens: u32) -> Progress {
        Progress {
            model: model.to_owned(),
            asker,
            prompt_tokens,
            prompt_tokens_done: AtomicU32::new(0),
            generated_tokens: AtomicU32::new(0),
            begun: Instant::now(),
            first_token: Mutex::default(),
            at: Mutex::default(),
        }
    }

    /// Another node computes it now.
    pub(crate) fn moved_to(&self, node: NodeId) {
        *lock(&self.at) = Some(node);
    }

    fn view(&self) -> Value {
        let generated = self.generated_tokens.load(Ordering::Relaxed);
        let first_token = *lock(&self.first_token);
        let per_second = |since: Instant| f64::from(generated.saturating_sub(1)) / since.elapsed().as_secs_f64();
        json!({
            "model": self.model,
            "from": match self.asker {
                Asker::Api => None,
                Asker::Node(node) => Some(node.to_string()),
            },
            "at": lock(&self.at).map(|node| node.to_string()),
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_done": self.prompt_tokens_done.load(Ordering::Relaxed),
            "generated_tokens": generated,
            "tokens_per_s": first_token.filter(|_| generated > 1).map(per_second),
            "age_ms": self.begun.elapsed().as_millis() as u64,
        })
    }
}

/// Tokens of the last seconds.
struct Rate {
    epoch: Instant,
    /// Seconds since the epoch, with their tokens.
    seconds: VecDeque<(u64, u32)>,
}

impl Default for Rate {
    fn default() -> Self {
        Rate { epoch: Instant::now(), seconds: VecDeque::new() }
    }
}

impl Rate {
    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_secs()
    }

    fn note(&mut self, now: Instant) {
        let second = self.second(now);
        match self.seconds.back_mut() {
            Some((last, tokens)) if *last >= second => *tokens += 1,
            _ => self.seconds.push_back((second, 1)),
        }
        while self.seconds.front().is_some_and(|(first, _)| first + WINDOW_S < second) {
            self.seconds.pop_front();
        }
    }

    /// Over the last [`WINDOW_S`] whole seconds; the one that is not over does not count.
    fn per_second(&self, now: Instant) -> f64 {
        let second = self.second(now);
        let counted = self.seconds.iter().filter(|(at, _)| (at + 1..=at + WINDOW_S).contains(&second));
        counted.map(|(_, tokens)| u64::from(*tokens)).sum::<u64>() as f64 / WINDOW_S as f64
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_whole_seconds() {
        let mut rate = Rate::default();
        let at = |ms: u64| rate.epoch + Duration::from_millis(ms);
        let (moments, looks) = ([100, 200, 1_100, 1_200, 9_000].map(at), [900, 2_000, 5_900, 7_000, 9_999].map(at));
        let mut seen = Vec::new();
        for moment in &moments[..4] {
            rate.note(*moment);
        }
        seen.extend(looks[..4].iter().map(|look| rate.per_second(*look)));
        rate.note(moments[4]);
        seen.push(rate.per_second(looks[4]));
        assert_eq!(seen, [0.0, 0.8, 0.8, 0.0, 0.0]);
        // A negative zero is shown as such.
        assert!(seen.iter().all(|rate| rate.is_sign_positive()), "{seen:?}");
        assert_eq!(rate.per_second(looks[4] + Duration::from_millis(1)), 0.2);
    }

    #[test]
    fn an_answer_is_listed_until_it_is_dropped() {
        let requests = Arc::new(Requests::default());
        let other = NodeId::from_bytes([7; 32]);
        let first = requests.begin("m", Asker::Api, 10);
        let second = requests.begin("m", Asker::Node(other), 3);
        first.prefilled(4);
        first.progress().moved_to(other);
        second.token();
        let list = requests.list();
        assert_eq!((&list[0]["from"], &list[0]["at"]), (&Value::Null, &json!(other.to_string())));
        assert_eq!((&list[0]["prompt_tokens_done"], &list[0]["generated_tokens"]), (&json!(4), &json!(0)));
        assert_eq!((&list[1]["from"], &list[1]["prompt_tokens_done"]), (&json!(other.to_string()), &json!(3)));
        assert_eq!(requests.of_others(), 1);
        assert!(requests.begin_within(1, "m", Asker::Node(other), 1).is_none());
        assert!(requests.begin_within(2, "m", Asker::Node(other), 1).is_some());
        drop(second);
        assert_eq!((requests.of_others(), requests.list().len()), (0, 1));
    }
}
