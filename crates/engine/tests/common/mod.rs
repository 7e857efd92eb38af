//! What the engine's tests share: models, engines over real child processes, and a reader of sessions.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used, clippy::panic)] // each test uses its part

pub mod spread;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use murmur_engine::{
    Draft, Ending, Engine, EngineOptions, Patience, SessionEvent, SessionRequest, SessionStream, Stop,
    link::{Link, Receiver},
};
use murmur_gguf::{
    Gguf, LayerRange,
    synth::{self, Spec, Weights},
};
use murmur_protocol::{
    sampling::{SamplingParams, Token},
    stage::{Keep, Load, Role},
};

/// Tests use their own chunk size, so that small prompts have several chunks.
pub const CHUNK_ROWS: u32 = 64;

pub struct Lab {
    pub dir: tempfile::TempDir,
    /// The engine's program by a name of this lab's own, by which its processes are told from those of other tests.
    pub program: PathBuf,
}

impl Lab {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("engine-child");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_murmur-engine-child"), &program).unwrap();
        Lab { dir, program }
    }

    /// Process ids of this lab's children of this process, loaded or not. Between its fork and its exec a child is its parent
    /// still, and the parent waits for it: such a one is no child yet.
    pub fn children(&self) -> Vec<u32> {
        let me = std::process::id().to_string();
        let parent = |pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some(stat.rsplit_once(") ")?.1.split(' ').nth(1)?.to_owned())
        };
        let runs_the_program = |pid: u32| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.split(|&byte| byte == 0).next() == Some(self.program.as_os_str().as_encoded_bytes())
        };
        let pids =
            std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter(|&pid| runs_the_program(pid) && parent(pid).as_deref() == Some(&me)).collect()
    }

    /// The new process, once there is one.
    pub fn child_besides(&self, known: &[u32]) -> u32 {
        until("there is a new process", || self.children().into_iter().find(|pid| !known.contains(pid)))
    }

    pub fn tiny(&self, preset: &str, weights: Weights) -> PathBuf {
        let path = self.dir.path().join(format!("{preset}-{weights:?}.gguf"));
        synth::write(&Spec::tiny(preset).unwrap().with_weights(weights), &path).unwrap();
        path
    }

    /// A model of which the first layer says what all of so many say.
    pub fn deep(&self, layers: u32) -> PathBuf {
        let path = self.dir.path().join(format!("deep-{layers}.gguf"));
        synth::write(&Spec::preset("bench-deep").unwrap().with_layers(layers), &path).unwrap();
        path
    }

    pub fn options(&self, model: &Path, ranges: Vec<LayerRange>, exact: bool) -> EngineOptions {
        EngineOptions {
            program: self.program.clone(),
            model: model.to_owned(),
            content_addressed: false,
            slices_dir: self.dir.path().join("slices"),
            embedding: false,
            ranges,
            context_tokens: 512,
            parallel: 8,
            queue_max: 64,
            chunk_rows: CHUNK_ROWS,
            threads: Some(1),
            exact,
            gpu_layers: 0,
            patience: Patience::default(),
            keep: Keep::default(),
            codecs: Vec::new(),
            draft: Draft::Off,
            travel_us: 0,
        }
    }

    pub fn engine(&self, model: &Path, ranges: Vec<LayerRange>, exact: bool) -> Engine {
        Engine::load(self.options(model, ranges, exact), Stop::new(), |_, _| {}).unwrap()
    }
}

/// A file from the folder of shared test models, if it is there.
pub fn shared_model(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/models").join(name);
    if !path.exists() {
        eprintln!("skipped: {name} is not there");
        return None;
    }
    Some(path)
}

pub fn ranges(bounds: &[u32]) -> Vec<LayerRange> {
    bounds.windows(2).map(|w| LayerRange::new(w[0], w[1])).collect()
}

pub fn layers(model: &Path) -> u32 {
    Gguf::open(model).unwrap().layer_count().unwrap()
}

/// Whole, even and uneven splits that the model allows.
pub fn splits(model: &Path) -> Vec<Vec<LayerRange>> {
    let gguf = Gguf::open(model).unwrap();
    let n = gguf.layer_count().unwrap();
    let cuts = murmur_gguf::allowed_cuts(&gguf);
    let mut splits = vec![ranges(&[0, n])];
    for stages in [2, 4] {
        if let Ok(even) = murmur_gguf::even_cuts(&gguf, stages) {
            splits.push(even);
        }
    }
    let inner: Vec<u32> = cuts.into_iter().filter(|&c| c > 0 && c < n).collect();
    if let (Some(&first), Some(&last)) = (inner.first(), inner.last()) {
        splits.push(ranges(&[0, first, n]));
        if last != first {
            splits.push(ranges(&[0, first, last, n]));
        }
    }
    splits
}

pub fn prompt(length: usize, salt: i32) -> Vec<Token> {
    (0..length as i32).map(|i| 3 + (i * 7 + salt * 13 + i * i % 11) % 250).collect()
}

pub fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ignore_eos: true, top_logprobs: Some(5), ..SamplingParams::default() }
}

pub fn sampled(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 0.9, top_p: 0.95, repeat_penalty: 1.1, seed, ..greedy() }
}

pub fn request(prompt: Vec<Token>, max_tokens: u32, sampling: SamplingParams) -> SessionRequest {
    SessionRequest { prompt, generated: vec![], max_tokens, sampling }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub tokens: Vec<Token>,
    /// The log-probabilities of the five best tokens at every position, as bits: equal only if the logits are.
    pub logprob_bits: Vec<Vec<(Token, u32)>>,
    pub ending: Ending,
    pub cached_tokens: u32,
}

pub async fn read(stream: SessionStream) -> Result<Answer, String> {
    read_while(stream, |_| {}).await
}

/// Reads, and something happens after each token, by how many there are.
pub async fn read_while(mut stream: SessionStream, mut happens: impl FnMut(usize)) -> Result<Answer, String> {
    let mut answer = Answer { tokens: vec![], logprob_bits: vec![], ending: Ending::Length, cached_tokens: 0 };
    while let Some(event) = stream.next().await {
        match event {
            SessionEvent::Prefill { cached_tokens, .. } => answer.cached_tokens = cached_tokens,
            SessionEvent::Guesses { .. } => {}
            SessionEvent::Token(sampled) => {
                answer.tokens.push(sampled.token);
                answer.logprob_bits.push(sampled.top.iter().map(|&(id, p)| (id, p.to_bits())).collect());
                happens(answer.tokens.len());
            }
            SessionEvent::Ended(ending) => {
                answer.ending = ending;
                return Ok(answer);
            }
            SessionEvent::Failed(reason) | SessionEvent::Lost(reason) => return Err(reason),
        }
    }
    Err("the stream ended without an ending".into())
}

pub async fn run(engine: &Engine, request: SessionRequest) -> Answer {
    read(engine.start(request).unwrap()).await.unwrap()
}

/// Far longer than anything here takes on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Asks again and again until there is an answer. For what nothing announces.
#[track_caller]
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(started.elapsed() < LIMIT, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Kills a process and everything it held.
pub fn kill(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

/// Makes a process hang.
pub fn stop_process(pid: u32) {
    signal(pid, rustix::process::Signal::STOP);
}

/// Has it go on.
pub fn continue_process(pid: u32) {
    signal(pid, rustix::process::Signal::CONT);
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

pub fn stage_pid(engine: &Engine, stage: usize) -> Option<u32> {
    engine.status().stages[stage].process_id
}

/// What a child that is spoken to directly is told.
pub fn load(path: &Path, role: Role) -> Load {
    Load {
        path: path.to_owned(),
        role,
        kv_cells: 1024,
        context_tokens: 512,
        sequences: 8,
        chunk_rows: CHUNK_ROWS,
        threads: Some(1),
        threads_max: 1,
        exact: false,
        gpu_layers: 0,
        tap: None,
        inject: None,
        keep: Keep::default(),
    }
}

/// A child that is spoken to directly, loaded.
pub fn start_child(load: &Load) -> (Link, Receiver) {
    let program = Path::new(env!("CARGO_BIN_EXE_murmur-engine-child"));
    let (link, mut receiver) = Link::start(program, load, Patience::default().silence_floor).unwrap();
    receiver.loaded(&link, &mut |_| {}).unwrap();
    (link, receiver)
}
