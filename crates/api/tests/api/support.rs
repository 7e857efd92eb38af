//! A fake node, a server on a real socket, and a client.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use murmur_api::{
    ApiOptions, Backend,
    backend::{
        BoxFuture, Completion, Embeddings, Event, Finish, GenerateRequest, Generation, Guesses, MeshAction, ModelCard,
        ModelKind, ModelState, Prompt, Refusal, TokenInfo,
    },
};
use murmur_protocol::sampling::Token;
use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

/// Events that a generation may be ahead of its reader.
pub(crate) const EVENTS: usize = 8;
pub(crate) const PROMPT_TOKENS: u32 = 7;
pub(crate) const CACHED_TOKENS: u32 = 3;
/// ChatML with a switch for reasoning and the tools in the system turn.
pub(crate) const TEMPLATE: &str = "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\
    {# calls are written as <tool_call>{...}</tool_call> #}<tool_call></tool_call><|im_end|>\n{% endif %}\
    {% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}";

type Answer = Box<dyn Fn(&GenerateRequest) -> Result<Generation, Refusal> + Send + Sync>;

/// A node that notes what it is asked, and answers as the test says.
pub(crate) struct Fake {
    pub(crate) models: Vec<Arc<ModelCard>>,
    pub(crate) seen: Mutex<Vec<GenerateRequest>>,
    pub(crate) embedded: Mutex<Vec<Prompt>>,
    pub(crate) cut_off: tokio::sync::Notify,
    pub(crate) mesh: Option<Value>,
    pub(crate) is_joining: bool,
    pub(crate) mesh_refusal: Option<Refusal>,
    pub(crate) mesh_actions: Mutex<Vec<MeshAction>>,
    answer: Answer,
}

pub(crate) fn card(id: &str, kind: ModelKind) -> Arc<ModelCard> {
    Arc::new(ModelCard {
        id: id.to_owned(),
        created: 1_700_000_000,
        kind,
        context_tokens: 4096,
        chat_template: Some(TEMPLATE.to_owned()),
        bos_text: "<s>".to_owned(),
        eos_text: "</s>".to_owned(),
        state: ModelState::Ready,
        details: json!({"architecture": "llama", "digest": "0123456789abcdef"}),
    })
}

impl Fake {
    pub(crate) fn answering(
        answer: impl Fn(&GenerateRequest) -> Result<Generation, Refusal> + Send + Sync + 'static,
    ) -> Fake {
        Fake {
            models: vec![card("org/tiny", ModelKind::Generate), card("embedder", ModelKind::Embed)],
            seen: Mutex::default(),
            embedded: Mutex::default(),
            cut_off: tokio::sync::Notify::new(),
            mesh: None,
            is_joining: false,
            mesh_refusal: None,
            mesh_actions: Mutex::default(),
            answer: Box::new(answer),
        }
    }

    /// Says these pieces, and ends by itself.
    pub(crate) fn saying(pieces: &'static [&'static str]) -> Fake {
        Fake::answering(move |request| Ok(play(script(request, pieces, Finish::EndOfText))))
    }

    pub(crate) fn refusing(refusal: Refusal) -> Fake {
        Fake::answering(move |_| Err(refusal.clone()))
    }

    pub(crate) fn last(&self) -> GenerateRequest {
        self.seen.lock().unwrap().last().unwrap().clone()
    }
}

pub(crate) fn token(text: &[u8]) -> TokenInfo {
    TokenInfo {
        id: 5,
        bytes: text.to_vec(),
        logprob: Some(-0.5),
        top: vec![(5, text.to_vec(), -0.5), (6, b"other".to_vec(), -1.5)],
    }
}

pub(crate) fn text(piece: &str) -> Event {
    Event::Text { text: piece.to_owned(), tokens: vec![token(piece.as_bytes())] }
}

pub(crate) fn done(seed: u64, completion_tokens: u32, finish: Finish) -> Event {
    guessed(seed, completion_tokens, finish, Guesses::default())
}

/// The end of an answer of which tokens were guessed.
pub(crate) fn guessed(seed: u64, completion_tokens: u32, finish: Finish, guesses: Guesses) -> Event {
    Event::Done(Completion {
        finish,
        prompt_tokens: PROMPT_TOKENS,
        cached_tokens: CACHED_TOKENS,
        completion_tokens,
        seed,
        prefill: Duration::from_millis(5),
        decode: Duration::from_millis(5),
        guesses,
    })
}

pub(crate) fn script(request: &GenerateRequest, pieces: &[&str], finish: Finish) -> Vec<Event> {
    let mut events = vec![Event::Prefill { done_tokens: PROMPT_TOKENS, cached_tokens: CACHED_TOKENS }];
    events.extend(pieces.iter().map(|piece| text(piece)));
    events.push(done(request.sampling.seed, pieces.len() as u32 + 1, finish));
    events
}

/// A generation in which all has happened already.
pub(crate) fn play(events: Vec<Event>) -> Generation {
    let (sender, receiver) = mpsc::channel(events.len().max(1));
    for event in events {
        sender.try_send(event).unwrap();
    }
    Generation { prompt_tokens: PROMPT_TOKENS, events: receiver }
}

/// A node whose generations the test conducts: each one's sender comes out of the receiver.
pub(crate) fn conducted() -> (Fake, mpsc::UnboundedReceiver<mpsc::Sender<Event>>) {
    let (started, generations) = mpsc::unbounded_channel();
    let fake = Fake::answering(move |_| {
        let (sender, receiver) = mpsc::channel(EVENTS);
        started.send(sender).unwrap();
        Ok(Generation { prompt_tokens: PROMPT_TOKENS, events: receiver })
    });
    (fake, generations)
}

impl Backend for Fake {
    fn models(&self) -> Vec<Arc<ModelCard>> {
        self.models.clone()
    }

    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Generation, Refusal>> {
        Box::pin(async move {
            self.seen.lock().unwrap().push(request.clone());
            (self.answer)(&request)
        })
    }

    fn embed(&self, _model: String, inputs: Vec<Prompt>) -> BoxFuture<'_, Result<Embeddings, Refusal>> {
        Box::pin(async move {
            let vectors = (0..inputs.len()).map(|i| vec![i as f32, 0.6, -0.8]).collect();
            *self.embedded.lock().unwrap() = inputs;
            Ok(Embeddings { vectors, prompt_tokens: 11 })
        })
    }

    fn tokenize(&self, _model: String, prompt: Prompt) -> BoxFuture<'_, Result<Vec<Token>, Refusal>> {
        Box::pin(async move {
            Ok(match prompt {
                Prompt::Text(text) => text.bytes().map(Token::from).collect(),
                Prompt::Rendered(text) => vec![text.len() as Token],
                Prompt::Tokens(tokens) => tokens,
            })
        })
    }

    fn detokenize(&self, _model: String, tokens: Vec<Token>) -> BoxFuture<'_, Result<String, Refusal>> {
        Box::pin(async move { Ok(tokens.iter().map(|token| format!("<{token}>")).collect()) })
    }

    fn cut_off(&self) {
        self.cut_off.notify_one();
    }

    fn status(&self) -> Value {
        json!({"peers": 0})
    }

    fn mesh(&self) -> Result<Value, Refusal> {
        self.mesh.clone().ok_or_else(Refusal::not_in_a_mesh)
    }

    fn is_joining(&self) -> bool {
        self.is_joining
    }

    fn mesh_action(&self, action: MeshAction) -> BoxFuture<'_, Result<Value, Refusal>> {
        Box::pin(async move {
            if self.mesh.is_none() {
                return Err(Refusal::not_in_a_mesh());
            }
            if let Some(refusal) = &self.mesh_refusal {
                return Err(refusal.clone());
            }
            self.mesh_actions.lock().unwrap().push(action);
            Ok(json!({"done": true}))
        })
    }

    fn metrics(&self) -> String {
        "fake_node_metric 1\n".to_owned()
    }
}

/// A running server.
pub(crate) struct Server {
    pub(crate) address: std::net::SocketAddr,
    pub(crate) fake: Arc<Fake>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(fake: Fake) -> Server {
        Server::with(fake, |_| ()).await
    }

    pub(crate) async fn with(fake: Fake, change: impl FnOnce(&mut ApiOptions)) -> Server {
        let mut options = ApiOptions::default();
        change(&mut options);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let fake = Arc::new(fake);
        let backend = fake.clone();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let shutdown = async { drop(stopped.await) };
            murmur_api::serve(listener, backend, options, shutdown).await.unwrap();
        });
        Server { address, fake, stop: Some(stop), task }
    }

    pub(crate) async fn stop(mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        (&mut self.task).await.unwrap();
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn get(&self, path: &str) -> RequestBuilder {
        client().get(self.url(path))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        client().post(self.url(path)).json(body)
    }

    /// Posts and expects 200.
    pub(crate) async fn ask(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).send().await.unwrap();
        let status = response.status();
        let answer: Value = response.json().await.unwrap();
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// Posts and expects an error: its status and the `error` object.
    pub(crate) async fn fail(&self, path: &str, body: &Value) -> (u16, Value) {
        error(self.post(path, body).send().await.unwrap()).await
    }

    /// Posts and expects a stream: its lines that are not empty.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Stream {
        let response = self.post(path, body).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Stream::read(&response.text().await.unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) fn client() -> reqwest::Client {
    // Another crate of the workspace builds reqwest with TLS and leaves the choice of a provider to the program.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

/// Checks the shape that every error has.
pub(crate) async fn error(response: Response) -> (u16, Value) {
    let status = response.status();
    assert!(status != StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "application/json");
    let mut body: Value = response.json().await.unwrap();
    let error = body["error"].take();
    let keys: Vec<&str> = error.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["message", "type", "param", "code"]);
    assert!(error["message"].as_str().unwrap().len() > 10, "{error}");
    (status.as_u16(), error)
}

/// A stream that was read to its end.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) chunks: Vec<Value>,
    pub(crate) comments: Vec<String>,
    /// How often `[DONE]` came, and whether it was the last line.
    pub(crate) dones: usize,
    pub(crate) ends_with_done: bool,
}

impl Stream {
    pub(crate) fn read(text: &str) -> Stream {
        let mut stream = Stream { chunks: Vec::new(), comments: Vec::new(), dones: 0, ends_with_done: false };
        for event in text.split_terminator("\n\n") {
            stream.ends_with_done = event == "data: [DONE]";
            if stream.ends_with_done {
                stream.dones += 1;
            } else if let Some(data) = event.strip_prefix("data: ") {
                stream.chunks.push(serde_json::from_str(data).unwrap());
            } else {
                stream.comments.push(event.strip_prefix(": ").unwrap().to_owned());
            }
        }
        stream
    }

    pub(crate) fn assert_complete(&self) {
        assert_eq!(self.dones, 1, "{self:?}");
        assert!(self.ends_with_done, "{self:?}");
    }

    /// All text of a choice: `field` is `content` or `reasoning_content`; for completions, `text`.
    pub(crate) fn text(&self, index: u64, field: &str) -> String {
        let choice =
            |chunk: &Value| chunk["choices"].as_array()?.iter().find(|choice| choice["index"] == index).cloned();
        self.chunks
            .iter()
            .filter_map(choice)
            .filter_map(|choice| {
                let text = if field == "text" { &choice["text"] } else { &choice["delta"][field] };
                text.as_str().map(str::to_owned)
            })
            .collect()
    }

    pub(crate) fn finish_reasons(&self) -> Vec<String> {
        let choices = self.chunks.iter().filter_map(|chunk| chunk["choices"].as_array()).flatten();
        choices.filter_map(|choice| choice["finish_reason"].as_str().map(str::to_owned)).collect()
    }
}

/// A chat of one message.
pub(crate) fn chat(more: Value) -> Value {
    merge(json!({"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}]}), more)
}

/// A completion of a short prompt.
pub(crate) fn completion(more: Value) -> Value {
    merge(json!({"model": "org/tiny", "prompt": "Once"}), more)
}

fn merge(mut base: Value, more: Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        base[key] = value.clone();
    }
    base
}
