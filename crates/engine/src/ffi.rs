//! The only unsafe code: a narrow, owning wrapper around the llama.cpp functions that a stage needs.
//!
//! What the wrapper guarantees: pointers are non-null and freed once, a [`Context`] keeps its [`Model`] alive, arrays
//! given to llama.cpp have the lengths it will read. What it cannot guarantee: that llama.cpp does not abort; hence the
//! child process, and hence `murmur_gguf` checks every file first.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, c_char, c_void},
    path::Path,
    ptr::{self, NonNull},
    sync::{Arc, Mutex, Once, PoisonError},
};

use llama_cpp_sys_2 as sys;
use murmur_protocol::{frame::GUESS_ROWS_MAX, sampling::Token, stage::VocabularyFacts};

/// Why llama.cpp would not do something.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LlamaError {
    /// The file could not be loaded.
    #[error("llama.cpp could not load {path}: {reason}")]
    Load {
        /// Which file.
        path: String,
        /// llama.cpp's own words.
        reason: String,
    },
    /// No context could be made: most often memory.
    #[error("llama.cpp could not allocate a context of {cells} KV cells: {reason}")]
    Context {
        /// KV cells asked for.
        cells: u32,
        /// llama.cpp's own words.
        reason: String,
    },
    /// Bit-equal results need a switch of the CPU back end.
    #[error("llama.cpp computes without its CPU back end here, so results cannot be exact: serve without --exact")]
    NotExact,
    /// `llama_decode` failed.
    #[error("llama.cpp could not compute a batch of {rows} rows (code {code}): {reason}")]
    Decode {
        /// Rows in the batch.
        rows: usize,
        /// llama.cpp's return value.
        code: i32,
        /// llama.cpp's own words.
        reason: String,
    },
    /// The number of rows that came out is not the number that went in.
    #[error("llama.cpp gave {got} values where {expected} were due")]
    Shape {
        /// Values received.
        got: usize,
        /// Values due.
        expected: usize,
    },
    /// The text could not be tokenised.
    #[error("llama.cpp could not tokenise a text of {0} bytes")]
    Tokenize(usize),
    /// A KV state that llama.cpp refused.
    #[error("llama.cpp refused the KV state")]
    State,
}

static LAST_ERROR: Mutex<String> = Mutex::new(String::new());
static INIT: Once = Once::new();

fn take_last_error() -> String {
    let text = std::mem::take(&mut *LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner));
    if text.is_empty() { "no reason given".to_owned() } else { text.trim().to_owned() }
}

unsafe extern "C" fn on_log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if level != sys::GGML_LOG_LEVEL_ERROR || text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a NUL-terminated string that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let mut last = LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner);
    if last.len() + text.len() < 4096 {
        last.push_str(&text);
    }
}

fn init() {
    INIT.call_once(|| {
        // SAFETY: called once, before any other function of llama.cpp; the callback is a static function.
        unsafe {
            sys::llama_log_set(Some(on_log), ptr::null_mut());
            sys::ggml_log_set(Some(on_log), ptr::null_mut());
            sys::llama_backend_init();
        }
    });
}

unsafe extern "C" {
    /// `llama_context::get_sched() const`: the way to a context's back ends, which the C interface lacks. A version of
    /// llama.cpp without it does not link.
    #[link_name = "_ZNK13llama_context9get_schedEv"]
    safe fn llama_context_get_sched(context: &sys::llama_context) -> sys::ggml_backend_sched_t;
}

/// llama.cpp rounds the KV cells up to this.
const CELLS_MULTIPLE: u32 = 256;

/// How long workers look for the next computation before they sleep, in units of 2^17 pauses of the processor (2 to 6 ms):
/// longer than from one step to the next, so that a generation pays for no wake-up (measured: 4 % of decoding), and short
/// enough that an idle model costs nothing.
const POLL_LEVEL: u32 = 1;

/// Begin and end of a mapping that cannot be written to, from a line of `/proc/self/maps`, if it is of this file: addresses, rights,
/// place in the file, device, inode, path.
#[cfg(target_os = "linux")]
fn read_only_mapping(line: &str, path: &Path) -> Option<(usize, usize)> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let is_read_only = fields.next()?.starts_with("r--");
    let is_it = Path::new(fields.nth(3)?.trim_start()) == path;
    let [start, end] = [start, end].map(|address| usize::from_str_radix(address, 16).ok());
    start.zip(end).filter(|_| is_it && is_read_only)
}

/// How to load weights.
pub(crate) struct ModelOptions {
    /// Load the vocabulary and no weights.
    pub(crate) vocabulary_only: bool,
    /// Rearrange weights for faster decoding (not bit-equal between batch shapes).
    pub(crate) repack: bool,
    /// Layers on a GPU; 0 without one.
    pub(crate) gpu_layers: i32,
}

/// Loaded weights.
pub(crate) struct Model(NonNull<sys::llama_model>);

// SAFETY: llama_model is immutable after loading; llama.cpp documents sharing it between contexts and threads.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: the pointer came from llama_model_load_from_file and is freed here only; contexts hold an Arc.
        unsafe { sys::llama_model_free(self.0.as_ptr()) }
    }
}

unsafe extern "C" fn on_progress(fraction: f32, user_data: *mut c_void) -> bool {
    // SAFETY: user_data is the `&mut &mut dyn FnMut` that `Model::load` keeps alive during the call.
    let report = unsafe { &mut *user_data.cast::<&mut dyn FnMut(f32) -> bool>() };
    report(fraction)
}

impl Model {
    /// Loads a GGUF file; `progress` hears fractions from 0 to 1 and may say false to stop.
    pub(crate) fn load(
        path: &Path,
        options: &ModelOptions,
        mut progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Model, LlamaError> {
        init();
        let shown = path.display().to_string();
        let c_path = CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| LlamaError::Load { path: shown.clone(), reason: "the path contains a NUL byte".into() })?;
        let _ = take_last_error();
        // SAFETY: the parameters are llama.cpp's defaults with fields of the right type replaced; the path and the
        // progress closure outlive the call.
        let model = unsafe {
            let mut params = sys::llama_model_default_params();
            params.vocab_only = options.vocabulary_only;
            params.use_extra_bufts = options.repack;
            params.n_gpu_layers = options.gpu_layers;
            params.load_mode = sys::LLAMA_LOAD_MODE_MMAP;
            params.progress_callback = Some(on_progress);
            params.progress_callback_user_data = (&raw mut progress).cast();
            sys::llama_model_load_from_file(c_path.as_ptr(), params)
        };
        NonNull::new(model).map(Model).ok_or_else(|| LlamaError::Load { path: shown, reason: take_last_error() })
    }

    /// Takes the model's file out of memory again; what is used of it comes back. llama.cpp maps the whole file and has it read,
    /// the embedding as well, of which a few rows are used, and weights that it has then rearranged elsewhere.
    #[cfg(target_os = "linux")]
    pub(crate) fn let_go(&self, path: &Path) {
        // What cannot be found stays in memory, where it does no harm.
        let (Ok(path), Ok(maps)) = (path.canonicalize(), std::fs::read_to_string("/proc/self/maps")) else { return };
        for (start, end) in maps.lines().filter_map(|line| read_only_mapping(line, &path)) {
            // SAFETY: the pages are of a mapping of a file that nobody writes to through it: what is dropped is the same when it
            // is read again. Failing to drop it changes nothing.
            let _ =
                unsafe { rustix::mm::madvise(start as *mut c_void, end - start, rustix::mm::Advice::LinuxDontNeed) };
        }
    }

    /// Width of the hidden state.
    pub(crate) fn n_embd(&self) -> usize {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_embd(self.0.as_ptr()) as usize }
    }

    /// Layers.
    pub(crate) fn n_layer(&self) -> u32 {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_n_layer(self.0.as_ptr()) as u32 }
    }

    /// Bytes of all tensors.
    pub(crate) fn weight_bytes(&self) -> u64 {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_size(self.0.as_ptr()) }
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is alive; the vocabulary lives as long as it does.
        unsafe { sys::llama_model_get_vocab(self.0.as_ptr()) }
    }

    /// Number of tokens in the vocabulary.
    pub(crate) fn n_vocab(&self) -> usize {
        // SAFETY: the vocabulary is alive.
        unsafe { sys::llama_vocab_n_tokens(self.vocab()) as usize }
    }

    /// Bytes and attributes of every token.
    pub(crate) fn vocabulary(&self) -> VocabularyFacts {
        let vocab = self.vocab();
        let n = self.n_vocab() as Token;
        // SAFETY: the vocabulary is alive and the ids are in range.
        let (control, eog, bos, eos) = unsafe {
            let control = (0..n).map(|id| sys::llama_vocab_is_control(vocab, id)).collect();
            let eog = (0..n).filter(|&id| sys::llama_vocab_is_eog(vocab, id)).collect();
            (control, eog, sys::llama_vocab_bos(vocab), sys::llama_vocab_eos(vocab))
        };
        VocabularyFacts {
            pieces: (0..n).map(|id| self.piece(id)).collect(),
            control,
            end_of_generation: eog,
            bos: (bos >= 0).then_some(bos),
            eos: (eos >= 0).then_some(eos),
        }
    }

    fn piece(&self, id: Token) -> Vec<u8> {
        let mut buffer = vec![0u8; 64];
        loop {
            // SAFETY: the buffer has the length given; the id is in range.
            let n = unsafe {
                let (at, len) = (buffer.as_mut_ptr().cast::<c_char>(), buffer.len() as i32);
                sys::llama_token_to_piece(self.vocab(), id, at, len, 0, true)
            };
            if n >= 0 {
                buffer.truncate(n as usize);
                return buffer;
            }
            if buffer.len() >= n.unsigned_abs() as usize {
                return Vec::new();
            }
            buffer.resize(n.unsigned_abs() as usize, 0);
        }
    }

    /// Text to tokens.
    pub(crate) fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<Token>, LlamaError> {
        let failed = || LlamaError::Tokenize(text.len());
        let length = i32::try_from(text.len()).map_err(|_| failed())?;
        let mut tokens: Vec<Token> = vec![0; text.len() / 2 + 16];
        loop {
            let room = i32::try_from(tokens.len()).map_err(|_| failed())?;
            // SAFETY: text and tokens have the lengths given.
            let n = unsafe {
                let text = text.as_ptr().cast::<c_char>();
                sys::llama_tokenize(self.vocab(), text, length, tokens.as_mut_ptr(), room, add_special, parse_special)
            };
            if n >= 0 {
                tokens.truncate(n as usize);
                return Ok(tokens);
            }
            if n == i32::MIN || n.unsigned_abs() as usize <= tokens.len() {
                return Err(failed());
            }
            tokens.resize(n.unsigned_abs() as usize, 0);
        }
    }
}

/// How to run a model.
pub(crate) struct ContextOptions {
    /// KV cells over all sequences. Each has an equal share as a KV stream of its own, where a cell's number is its position.
    pub(crate) kv_cells: u32,
    /// Sequences.
    pub(crate) sequences: u32,
    /// Rows of one computation at most.
    pub(crate) batch_rows: u32,
    /// Results of batches with [`Batch::is_exact`] depend neither on company nor on the number of threads.
    pub(crate) exact: bool,
    /// Pooled embeddings instead of logits.
    pub(crate) embeddings: bool,
    /// Threads the pool holds.
    pub(crate) threads_max: u32,
    /// Tensor (of the last layer) to take the hidden states from, ending the computation there.
    pub(crate) tap: Option<String>,
    /// Tensor to overwrite with the hidden states that came in, where llama.cpp would scale them as if they were
    /// embeddings.
    pub(crate) inject: Option<String>,
}

/// Rows for one computation. `hidden` is used when `tokens` is empty.
#[derive(Default)]
pub(crate) struct Batch {
    /// Token ids.
    pub(crate) tokens: Vec<Token>,
    /// Hidden states, `[rows, n_embd]`.
    pub(crate) hidden: Vec<f32>,
    /// Position of each row.
    pub(crate) positions: Vec<i32>,
    /// Sequence of each row.
    pub(crate) sequences: Vec<i32>,
    /// Logits wanted, by row.
    pub(crate) wants_output: Vec<bool>,
    /// Each row to the same bits as if it were alone, where the context can: llama.cpp's kernels that compute several rows at
    /// once add up in another order.
    pub(crate) is_exact: bool,
}

/// What happens to the tensors of a computation that is under way.
#[derive(Default)]
struct Hooks {
    tap: Option<CString>,
    tapped: Vec<f32>,
    inject: Option<CString>,
    injected: Vec<f32>,
    /// Values injected so far: a batch may be computed in several pieces.
    cursor: usize,
}

impl Hooks {
    fn is_needed(&self) -> bool {
        self.tap.is_some() || self.inject.is_some()
    }
}

unsafe extern "C" fn on_tensor(tensor: *mut sys::ggml_tensor, ask: bool, user_data: *mut c_void) -> bool {
    // SAFETY: user_data is the boxed Hooks that the context owns; llama.cpp calls this from inside llama_decode only,
    // while no Rust reference to the Hooks exists. The tensor is alive for the call and holds f32, as layer inputs and
    // outputs do; the ranges read and written have the tensor's own size.
    unsafe {
        let hooks = &mut *user_data.cast::<Hooks>();
        let name = CStr::from_ptr((*tensor).name.as_ptr());
        let is_tap = hooks.tap.as_deref() == Some(name);
        if ask {
            return is_tap || hooks.inject.as_deref() == Some(name);
        }
        let values = ((*tensor).ne[0] * (*tensor).ne[1]).max(0) as usize;
        if is_tap {
            let start = hooks.tapped.len();
            hooks.tapped.resize(start + values, 0.0);
            sys::ggml_backend_tensor_get(tensor, hooks.tapped[start..].as_mut_ptr().cast(), 0, values * 4);
            return false;
        }
        if let Some(rows) = hooks.injected.get(hooks.cursor..hooks.cursor + values) {
            sys::ggml_backend_tensor_set(tensor, rows.as_ptr().cast(), 0, values * 4);
            hooks.cursor += values;
        }
    }
    true
}

/// The back end that computes a context's CPU part.
///
/// # Safety
/// The context is alive.
unsafe fn cpu_back_end(context: NonNull<sys::llama_context>) -> Option<NonNull<sys::ggml_backend>> {
    // SAFETY: a context has a scheduler from its making on; the numbers are below the scheduler's own count.
    unsafe {
        let scheduler = llama_context_get_sched(context.as_ref());
        let back_ends = 0..sys::ggml_backend_sched_get_n_backends(scheduler);
        let mut back_ends = back_ends.map(|i| sys::ggml_backend_sched_get_backend(scheduler, i));
        back_ends.find(|&back_end| sys::ggml_backend_is_cpu(back_end)).and_then(NonNull::new)
    }
}

/// A model with KV cache and compute buffers.
pub(crate) struct Context {
    context: NonNull<sys::llama_context>,
    pool: NonNull<sys::ggml_threadpool>,
    /// Owned: from `Box::into_raw`, freed in `drop`. llama.cpp holds the same pointer, so there is never a `Box` or a
    /// lasting reference beside it.
    hooks: NonNull<Hooks>,
    /// The CPU back end of an exact context, which owns it.
    exact_cpu: Option<NonNull<sys::ggml_backend>>,
    model: Arc<Model>,
}

// SAFETY: a context may be used from any one thread at a time; it is not Sync.
unsafe impl Send for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the pointers are owned and freed once, the context before the pool and the hooks it uses.
        unsafe {
            sys::llama_free(self.context.as_ptr());
            sys::ggml_threadpool_free(self.pool.as_ptr());
            drop(Box::from_raw(self.hooks.as_ptr()));
        }
    }
}

impl Context {
    /// Allocates KV cache and buffers.
    pub(crate) fn new(model: Arc<Model>, options: &ContextOptions) -> Result<Context, LlamaError> {
        let failed = || LlamaError::Context { cells: options.kv_cells, reason: take_last_error() };
        let c_name = |name: String| CString::new(name).map_err(|_| failed());
        let mut hooks = Hooks::default();
        if let Some(name) = &options.tap {
            hooks.tap = Some(c_name(format!("{name}-{}", model.n_layer() - 1))?);
        }
        if let Some(name) = &options.inject {
            hooks.inject = Some(c_name(name.clone())?);
        }
        let threads = options.threads_max.max(1) as i32;
        let _ = take_last_error();
        // SAFETY: defaults with fields of the right type replaced; the hooks are on the heap and owned by the context, so
        // their address stays valid; the pool is attached to this context only.
        unsafe {
            let mut params = sys::llama_context_default_params();
            // llama.cpp caps a batch at the context as asked for, before it rounds the context up.
            params.n_ctx = options.kv_cells.max(options.batch_rows).next_multiple_of(CELLS_MULTIPLE);
            params.n_batch = options.batch_rows;
            params.n_ubatch = options.batch_rows;
            params.n_seq_max = options.sequences;
            params.n_threads = threads;
            params.n_threads_batch = threads;
            params.kv_unified = false;
            params.swa_full = true;
            params.no_perf = true;
            params.embeddings = options.embeddings;
            if hooks.tap.is_none() && !options.embeddings {
                params.n_outputs_max = options.sequences.max(GUESS_ROWS_MAX);
            }
            let is_needed = hooks.is_needed();
            let hooks = NonNull::from(Box::leak(Box::new(hooks)));
            if is_needed {
                params.cb_eval = Some(on_tensor);
                params.cb_eval_user_data = hooks.as_ptr().cast();
            }
            let Some(context) = NonNull::new(sys::llama_init_from_model(model.0.as_ptr(), params)) else {
                drop(Box::from_raw(hooks.as_ptr()));
                return Err(failed());
            };
            let mut pool_params = sys::ggml_threadpool_params_default(threads);
            pool_params.poll = POLL_LEVEL;
            let Some(pool) = NonNull::new(sys::ggml_threadpool_new(&raw mut pool_params)) else {
                sys::llama_free(context.as_ptr());
                drop(Box::from_raw(hooks.as_ptr()));
                return Err(failed());
            };
            sys::llama_attach_threadpool(context.as_ptr(), pool.as_ptr(), pool.as_ptr());
            let mut context = Context { context, pool, hooks, exact_cpu: None, model };
            if options.exact {
                context.exact_cpu = Some(cpu_back_end(context.context).ok_or(LlamaError::NotExact)?);
            }
            Ok(context)
        }
    }

    /// The model it runs.
    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// KV cells it really has.
    pub(crate) fn kv_cells(&self) -> u32 {
        // SAFETY: the context is alive.
        unsafe { sys::llama_n_ctx(self.context.as_ptr()) }
    }

    /// Threads for the next computations, up to the pool's size.
    pub(crate) fn set_threads(&mut self, threads: u32) {
        // SAFETY: the context is alive; llama.cpp caps the number at the pool's.
        unsafe { sys::llama_set_n_threads(self.context.as_ptr(), threads as i32, threads as i32) }
    }

    /// Computes a batch. Afterwards [`Context::logits`], [`Context::hidden`] or [`Context::pooled`] holds the result.
    /// A model without KV cache (an encoder) computes whole sequences at once.
    pub(crate) fn decode(&mut self, batch: &mut Batch) -> Result<(), LlamaError> {
        let rows = batch.positions.len();
        let width = self.model.n_embd();
        let from_hidden = batch.tokens.is_empty();
        let given = if from_hidden { batch.hidden.len() } else { batch.tokens.len() * width };
        if given != rows * width || batch.sequences.len() != rows || batch.wants_output.len() != rows {
            return Err(LlamaError::Shape { got: given, expected: rows * width });
        }
        // A tapped stage must compute every row to the end: the last layer keeps only rows marked as outputs.
        // SAFETY: the hooks are alive, and llama.cpp touches them only inside llama_decode, where this reference is not used.
        let hooks = unsafe { self.hooks.as_mut() };
        let tapped = hooks.tap.is_some();
        let mut outputs: Vec<i8> = batch.wants_output.iter().map(|&wanted| i8::from(wanted || tapped)).collect();
        let mut counts = vec![1i32; rows];
        let mut sequences: Vec<*mut i32> = batch.sequences.iter_mut().map(ptr::from_mut).collect();
        hooks.tapped.clear();
        hooks.cursor = 0;
        if hooks.inject.is_some() && from_hidden {
            hooks.injected.clone_from(&batch.hidden);
        }
        let raw = sys::llama_batch {
            n_tokens: rows as i32,
            token: if from_hidden { ptr::null_mut() } else { batch.tokens.as_mut_ptr() },
            embd: if from_hidden { batch.hidden.as_mut_ptr() } else { ptr::null_mut() },
            pos: batch.positions.as_mut_ptr(),
            n_seq_id: counts.as_mut_ptr(),
            seq_id: sequences.as_mut_ptr(),
            logits: outputs.as_mut_ptr(),
        };
        let _ = take_last_error();
        // SAFETY: every array has `rows` elements (hidden: rows x n_embd), checked above, and outlives the call. The back end
        // is a CPU's, lives as long as the context, and is at rest.
        let code = unsafe {
            if let Some(cpu) = self.exact_cpu {
                sys::ggml_backend_cpu_set_use_ref(cpu.as_ptr(), batch.is_exact);
            }
            let code = sys::llama_decode(self.context.as_ptr(), raw);
            sys::llama_synchronize(self.context.as_ptr());
            code
        };
        if code != 0 {
            return Err(LlamaError::Decode { rows, code, reason: take_last_error() });
        }
        // SAFETY: as above; llama_decode has returned.
        let hooks = unsafe { self.hooks.as_ref() };
        let expected = rows * width;
        if tapped && hooks.tapped.len() != expected {
            return Err(LlamaError::Shape { got: hooks.tapped.len(), expected });
        }
        if hooks.inject.is_some() && from_hidden && hooks.cursor != expected {
            return Err(LlamaError::Shape { got: hooks.cursor, expected });
        }
        Ok(())
    }

    /// Logits of batch row `row`, which must have been marked as wanted.
    pub(crate) fn logits(&mut self, row: usize) -> Result<&mut [f32], LlamaError> {
        let n_vocab = self.model.n_vocab();
        // SAFETY: llama.cpp returns null or n_vocab floats that live until the next call; `&mut self` forbids one.
        unsafe {
            let logits = sys::llama_get_logits_ith(self.context.as_ptr(), row as i32);
            if logits.is_null() {
                return Err(LlamaError::Shape { got: 0, expected: n_vocab });
            }
            Ok(std::slice::from_raw_parts_mut(logits, n_vocab))
        }
    }

    /// Hidden states of the last batch, `[rows, n_embd]`, from a tapped context.
    pub(crate) fn hidden(&self) -> &[f32] {
        // SAFETY: the hooks are alive, and change only in `decode`, which needs `&mut self`.
        unsafe { &self.hooks.as_ref().tapped }
    }

    /// The pooled embedding of a sequence of the last batch.
    pub(crate) fn pooled(&self, sequence: i32) -> Option<Vec<f32>> {
        // SAFETY: llama.cpp returns null or n_embd floats.
        unsafe {
            // A ranking model gives one score per sequence, not a vector.
            let pooling = sys::llama_pooling_type(self.context.as_ptr());
            if ![sys::LLAMA_POOLING_TYPE_MEAN, sys::LLAMA_POOLING_TYPE_CLS, sys::LLAMA_POOLING_TYPE_LAST]
                .contains(&pooling)
            {
                return None;
            }
            let values = sys::llama_get_embeddings_seq(self.context.as_ptr(), sequence);
            let width = sys::llama_model_n_embd_out(self.model.0.as_ptr()) as usize;
            (!values.is_null()).then(|| std::slice::from_raw_parts(values, width).to_vec())
        }
    }

    fn memory(&self) -> sys::llama_memory_t {
        // SAFETY: the context is alive and owns its memory.
        unsafe { sys::llama_get_memory(self.context.as_ptr()) }
    }

    /// Forgets the positions of a sequence from `from` on. False where the model's memory cannot forget a part.
    pub(crate) fn truncate(&mut self, sequence: i32, from: u32) -> bool {
        // SAFETY: the memory is alive; llama.cpp checks the sequence id.
        unsafe { sys::llama_memory_seq_rm(self.memory(), sequence, from as i32, -1) }
    }

    /// True when every position from 0 on is still there: a cache with a sliding window gives up what is behind it.
    pub(crate) fn is_complete(&self, sequence: i32) -> bool {
        // SAFETY: the memory is alive; llama.cpp checks the sequence id.
        unsafe { sys::llama_memory_seq_pos_min(self.memory(), sequence) == 0 }
    }

    /// Rows of one computation at most, as llama.cpp has it.
    pub(crate) fn batch_rows(&self) -> usize {
        // SAFETY: the context is alive.
        unsafe { sys::llama_n_batch(self.context.as_ptr()) as usize }
    }

    /// Makes `to` a copy of all of `from`.
    pub(crate) fn copy_sequence(&mut self, from: i32, to: i32) {
        // SAFETY: as above.
        unsafe { sys::llama_memory_seq_cp(self.memory(), from, to, -1, -1) }
    }

    /// The KV state of a sequence.
    pub(crate) fn state(&mut self, sequence: i32) -> Vec<u8> {
        // SAFETY: the buffer has the size that llama.cpp named.
        unsafe {
            let size = sys::llama_state_seq_get_size(self.context.as_ptr(), sequence);
            let mut bytes = vec![0u8; size];
            let written = sys::llama_state_seq_get_data(self.context.as_ptr(), bytes.as_mut_ptr(), size, sequence);
            bytes.truncate(written);
            bytes
        }
    }

    /// Restores a KV state into a sequence.
    pub(crate) fn restore(&mut self, sequence: i32, bytes: &[u8]) -> Result<(), LlamaError> {
        // SAFETY: the slice has the length given; llama.cpp checks its content against the context.
        let read =
            unsafe { sys::llama_state_seq_set_data(self.context.as_ptr(), bytes.as_ptr(), bytes.len(), sequence) };
        if read == 0 { Err(LlamaError::State) } else { Ok(()) }
    }
}
