//! The real binary against others of its mesh that do not do what it does: workers that are scripted here, and drivers that say what no
//! driver says.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends when something is off")]

mod common;

use std::{
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use common::{
    Home, PATIENCE, Server,
    http::{self, Completion, End},
    until,
};
use murmur_gguf::{Gguf, tokenizer_card};
use murmur_net::{
    EndpointOptions, Invitation, Mesh, MeshChoice, MeshOptions, OwnRecord, RecvStream, Relays, SendStream,
    Work as Asked,
    stream::{self, Reader, StreamEnd},
};
use murmur_protocol::{
    frame::{Frame, Header, Kind},
    mesh::{
        Admitted, Capabilities, Card, DraftOpen, FinishReason, ModelDigest, ModelState, NodeId, Open, RingId, Role,
        ServedModel, ServedStage, StageOpen, Tokens, VocabularyId, Work,
        card::{CARD_PART_BYTES_MAX, card_digest},
        work::Finished,
    },
    sampling::{Sampled, Token},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::Semaphore, task::JoinSet};

/// The model in this repository.
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo/murmur-demo-q8_0.gguf");

/// Nobody outside this machine is asked or told anything.
const OFFLINE: [&str; 5] = ["--relay=none", "--no-nostr", "--no-mdns", "--bind", "127.0.0.1:0"];

/// Tokens of a scripted answer: ordinary ones of the demo model.
const ANSWER: [Token; 6] = [300, 301, 302, 303, 304, 305];

fn mesh(folder: &TempDir, choice: MeshChoice, own: OwnRecord) -> MeshOptions {
    MeshOptions {
        endpoint: EndpointOptions { relays: Relays::None, bind: Some("127.0.0.1:0".parse().unwrap()), dht: None },
        own,
        ..MeshOptions::new(folder.path(), choice)
    }
}

async fn soon<T>(what: &str, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, event).await {
        Ok(value) => value,
        Err(_) => panic!("never happened: {what}"),
    }
}

/// What a scripted worker says to a request that is opened there.
enum Says {
    Message(Work),
    /// It waits until the test lets it go on.
    Wait,
    /// It resets the stream.
    End(StreamEnd),
}

/// What it does for whoever asks for a card.
#[derive(Clone, Copy, PartialEq)]
enum Cards {
    Gives,
    /// It sends for ever what nobody knows, and no card.
    Chatters,
}

/// A worker that offers the demo model and computes nothing.
struct Worker {
    _folder: TempDir,
    mesh: Arc<Mesh>,
    /// The requests that were opened there, in this order.
    opened: Arc<Mutex<Vec<Open>>>,
    goes_on: Arc<Semaphore>,
    _tasks: JoinSet<()>,
}

/// The script: what is said to the nth request, counted from 0.
type Script = fn(usize) -> Vec<Says>;

impl Worker {
    async fn start(beside: Option<&Worker>, cards: Cards, script: Script) -> Worker {
        let card = tokenizer_card(&Gguf::open(DEMO).unwrap()).unwrap();
        let served = ServedModel {
            digest: ModelDigest::from_bytes([7; 32]),
            name: "demo".to_owned(),
            state: ModelState::Ready,
            context_tokens: 512,
            parallel: 4,
            running: 0,
            queued: 0,
            decode_us_per_token: 1_000,
            prefill_us_per_token: 100,
            load_ms: 0,
            tokenizer: card_digest(&card),
            exact: true,
            build: "scripted".to_owned(),
            guesses: None,
        };
        let own = OwnRecord { role: Role::Worker, models: vec![served], ..OwnRecord::default() };
        let folder = tempfile::tempdir().unwrap();
        let mut options = mesh(&folder, MeshChoice::Public("scripted".to_owned()), own);
        options.bootstrap = beside.iter().map(|other| other.mesh.contact()).collect();
        let mesh = Arc::new(Mesh::start(options).await.unwrap());
        let (opened, goes_on): (Arc<Mutex<Vec<Open>>>, _) = (Arc::default(), Arc::new(Semaphore::new(0)));
        let mut tasks = JoinSet::new();
        let (accepting, seen, let_go) = (Arc::clone(&mesh), Arc::clone(&opened), Arc::clone(&goes_on));
        tasks.spawn(async move {
            let (card, mut answers) = (Arc::new(card), JoinSet::new());
            while let Some(asked) = accepting.accept_work().await {
                let (card, seen, let_go) = (Arc::clone(&card), Arc::clone(&seen), Arc::clone(&let_go));
                answers.spawn(async move {
                    let Asked { mut send, recv, .. } = asked;
                    // Whoever asks may have enough at any time.
                    let _ = match Reader::<Work>::new(recv).expect().await {
                        Ok(Work::GetCard(_)) if cards == Cards::Chatters => chatter(&mut send).await,
                        Ok(Work::GetCard(_)) => hand_out(&card, &mut send).await,
                        Ok(Work::Open(open)) => {
                            let number = {
                                let mut seen = seen.lock().unwrap();
                                seen.push(*open);
                                seen.len() - 1
                            };
                            follow(script(number), &let_go, &mut send).await
                        }
                        other => panic!("{other:?}"),
                    };
                });
            }
        });
        Worker { _folder: folder, mesh, opened, goes_on, _tasks: tasks }
    }

    async fn client(&self, home: &Home, arguments: &[&str]) -> Server {
        let invitation = Invitation { uses: None, ..Invitation::default() };
        let ticket = self.mesh.invite(&invitation).await.unwrap().to_string();
        let client = ["client", "--api", "127.0.0.1:0", "--json", "--join", &ticket];
        Server::ready(home.murmur([&client, &OFFLINE[..], arguments].concat()))
    }

    fn opened(&self) -> Vec<Open> {
        self.opened.lock().unwrap().clone()
    }
}

async fn chatter(send: &mut SendStream) -> Result<(), murmur_net::NetError> {
    loop {
        stream::write(send, &Work::Unknown { kind: 999 }).await?;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn hand_out(card: &[u8], send: &mut SendStream) -> Result<(), murmur_net::NetError> {
    let total_bytes = u32::try_from(card.len()).unwrap();
    stream::write(send, &Work::Card(Card { tokenizer: card_digest(card), total_bytes })).await?;
    for part in card.chunks(CARD_PART_BYTES_MAX) {
        stream::write(send, &Work::CardPart(part.to_vec())).await?;
    }
    stream::finish(send);
    Ok(())
}

async fn follow(script: Vec<Says>, goes_on: &Semaphore, send: &mut SendStream) -> Result<(), murmur_net::NetError> {
    for says in script {
        match says {
            Says::Message(message) => stream::write(send, &message).await?,
            Says::Wait => goes_on.acquire().await.unwrap().forget(),
            Says::End(end) => {
                end.tell(send, None);
                return Ok(());
            }
        }
    }
    stream::finish(send);
    Ok(())
}

fn admitted() -> Says {
    Says::Message(Work::Admitted(Admitted { lease_ms: 1_000, cached_tokens: 0 }))
}

/// The tokens at these places.
fn tokens(places: std::ops::Range<usize>) -> Says {
    let first = places.start as u32;
    let sampled = |&token: &Token| Sampled { token, logprob: None, top: Vec::new(), grammar_ended: false };
    let sampled = ANSWER[places].iter().map(sampled).collect();
    Says::Message(Work::Tokens(Tokens { first, sampled }))
}

fn finished() -> Says {
    Says::Message(Work::Finished(Finished {
        reason: FinishReason::Length,
        prompt_tokens: 1,
        cached_tokens: 0,
        generated_tokens: ANSWER.len() as u32,
        prefill_us: 1,
        decode_us: 1,
        right_guesses: 0,
        wrong_guesses: 0,
    }))
}

fn request() -> Value {
    json!({"model": "demo", "prompt": "Lily", "max_tokens": ANSWER.len()})
}

fn knows_demo(client: &Server) {
    until("the model is listed", || (http::get(&client.address, "/v1/models/demo").0 == 200).then_some(()));
}

#[test]
fn an_answer_whose_lease_has_expired_goes_on_where_it_was() {
    let runtime = Runtime::new().unwrap();
    let _context = runtime.enter();
    let worker = runtime.block_on(Worker::start(None, Cards::Gives, |number| match number {
        0 => vec![admitted(), tokens(0..3), Says::Wait, Says::End(StreamEnd::LeaseExpired)],
        1 => vec![admitted(), Says::Wait, Says::End(StreamEnd::LeaseExpired)],
        2 => vec![admitted(), tokens(3..6), finished()],
        _ => vec![admitted(), tokens(0..6), finished()],
    }));
    let home = Home::new();
    let client = runtime.block_on(worker.client(&home, &[]));
    knows_demo(&client);
    let mut stream = Completion::begin(&client.address, &request());
    worker.goes_on.add_permits(2);
    assert_eq!(stream.finish(), End::Finished("length".into()));
    let generated: Vec<Vec<Token>> = worker.opened().into_iter().map(|open| open.generated).collect();
    assert_eq!(generated, [&ANSWER[..0], &ANSWER[..3], &ANSWER[..3]]);
    assert_eq!(stream.text, http::complete(&client.address, &request()));
}

#[test]
fn a_worker_whose_intake_is_full_is_busy_and_not_gone() {
    let runtime = Runtime::new().unwrap();
    let _context = runtime.enter();
    let worker = runtime.block_on(Worker::start(None, Cards::Gives, |_| vec![Says::End(StreamEnd::Busy)]));
    let home = Home::new();
    let client = runtime.block_on(worker.client(&home, &["--wait", "1s"]));
    knows_demo(&client);
    let (status, answer) = http::post(&client.address, "/v1/completions", &request());
    assert_eq!(status, 429, "{answer}");
    assert!(worker.opened().len() > 1, "it was not asked again");
}

#[test]
fn a_card_is_had_although_some_who_offer_it_say_everything_but_that() {
    let runtime = Runtime::new().unwrap();
    let _context = runtime.enter();
    let answer: Script = |_| vec![admitted(), tokens(0..6), finished()];
    let honest = runtime.block_on(Worker::start(None, Cards::Gives, answer));
    let _chatterers: Vec<Worker> =
        (0..3).map(|_| runtime.block_on(Worker::start(Some(&honest), Cards::Chatters, answer))).collect();
    let home = Home::new();
    let client = runtime.block_on(honest.client(&home, &[]));
    until("all are known", || {
        let (_, model) = http::get(&client.address, "/v1/models/demo");
        (model["details"]["served_by"].as_array()?.len() == 4).then_some(())
    });
    assert!(!http::complete(&client.address, &request()).is_empty());
}

/// A node that says to a host of layers what it is told to.
struct Driver {
    _folder: TempDir,
    mesh: Mesh,
}

impl Driver {
    async fn join(ticket: &str) -> Driver {
        let folder = tempfile::tempdir().unwrap();
        let choice = MeshChoice::Ticket(ticket.parse().unwrap());
        let mesh = Mesh::start(mesh(&folder, choice, OwnRecord::default())).await.unwrap();
        Driver { _folder: folder, mesh }
    }

    /// What somebody offers of a model that is spread.
    async fn offer(&self) -> (NodeId, ServedStage) {
        let mut table = self.mesh.watch();
        let offered = table.wait_for(|table| table.values().any(|known| !known.verified.record().stages.is_empty()));
        let table = soon("an offer", offered).await.unwrap().clone();
        let record = |known: &murmur_net::Known| known.verified.record().clone();
        let found = table.values().map(record).find(|record| !record.stages.is_empty()).unwrap();
        (found.node, found.stages[0].clone())
    }

    async fn begin(&self, host: NodeId, first: &Work) -> Frames {
        let (mut send, recv) = self.mesh.open_work(host).await.unwrap();
        stream::write(&mut send, first).await.unwrap();
        Frames { send, recv, bytes: Vec::new() }
    }

    /// The end of a stage that was asked for: loaded, or why not.
    async fn stage(&self, host: NodeId, offer: &ServedStage, ring: RingId) -> (Frames, Frame) {
        let open = StageOpen {
            model: offer.digest,
            first: 0,
            end: 6,
            layers: offer.layers,
            context_tokens: offer.context_tokens,
            parallel: 1,
            exact: true,
            build: None,
            ring,
        };
        self.ask(host, &Work::Stage(Box::new(open))).await
    }

    /// What somebody offers to guess with.
    async fn offer_of_guesses(&self) -> (NodeId, DraftOpen) {
        let mut table = self.mesh.watch();
        let offer = |known: &murmur_net::Known| {
            let record = known.verified.record();
            let can = record.capabilities.contains(Capabilities::GUESSES);
            let served = record.models.iter().filter(|_| can).find(|model| model.guesses.is_some())?;
            let vocabulary = served.guesses?.vocabulary;
            Some((record.node, DraftOpen { model: served.digest, vocabulary, context_tokens: 256, parallel: 1 }))
        };
        let offered = table.wait_for(|table| table.values().any(|known| offer(known).is_some()));
        let table = soon("an offer", offered).await.unwrap().clone();
        table.values().find_map(offer).unwrap()
    }

    /// The end of what somebody was asked for: loaded, or why not.
    async fn ask(&self, host: NodeId, request: &Work) -> (Frames, Frame) {
        let mut frames = self.begin(host, request).await;
        loop {
            let frame = frames.next().await.unwrap();
            if matches!(frame.header.kind, Kind::Loaded | Kind::LoadFailed) {
                return (frames, frame);
            }
        }
    }
}

/// A stream of frames.
struct Frames {
    send: SendStream,
    recv: RecvStream,
    bytes: Vec<u8>,
}

impl Frames {
    /// The next frame; `None` at the end, however it comes.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some((frame, length)) = Frame::parse(&self.bytes).unwrap() {
                self.bytes.drain(..length);
                return Some(frame);
            }
            let mut chunk = [0; 4_096];
            match soon("a frame, or the end", self.recv.read(&mut chunk)).await {
                Ok(Some(length)) => self.bytes.extend_from_slice(&chunk[..length]),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    async fn until_its_end(mut self) {
        while self.next().await.is_some() {}
    }
}

fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.append_to(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_host_of_layers_sends_away_who_says_what_no_driver_says_and_keeps_rings_apart() {
    let home = Home::new();
    home.run(["mesh", "create", "home"]).succeeds();
    let serve = [DEMO, "--alias", "demo", "--exact", "--mesh", "home", "--max-layers", "7"];
    let server = Server::start(&home, [&serve, &OFFLINE[..]].concat());
    let invite = || home.run(["mesh", "invite", "--json", "--api", &server.address]).succeeds().json();
    let ticket = invite()["ticket"].as_str().unwrap().to_owned();
    Runtime::new().unwrap().block_on(async {
        let (driver, other) = (Driver::join(&ticket).await, Driver::join(&ticket).await);
        let (host, offer) = driver.offer().await;
        other.offer().await;
        let ring = RingId::from_bytes([9; 16]);
        let (stage, loaded) = driver.stage(host, &offer, ring).await;
        assert_eq!(loaded.header.kind, Kind::Loaded, "{}", loaded.as_text());

        // Who has heard the name of the ring gets nothing of what goes there.
        let (_, refused) = other.stage(host, &offer, ring).await;
        assert_eq!(refused.header.kind, Kind::LoadFailed);
        assert!(refused.as_text().contains("ring of this name"), "{}", refused.as_text());
        // Nobody here has a ring of this name.
        let nobodys = Work::Hop(RingId::from_bytes([1; 16]));
        assert_eq!(other.begin(host, &nobodys).await.next().await, None);
        // Nothing but hidden states comes in by the side door.
        let mut hop = other.begin(host, &Work::Hop(ring)).await;
        assert_eq!(hop.next().await.unwrap().header.kind, Kind::Progress);
        let close = Frame { header: Header::new(Kind::Close, 1), payload: Vec::new() };
        hop.send.write_all(&bytes_of(&close)).await.unwrap();
        hop.until_its_end().await;

        let (another, loaded) = other.stage(host, &offer, RingId::from_bytes([8; 16])).await;
        assert_eq!(loaded.header.kind, Kind::Loaded, "{}", loaded.as_text());
        let load = Frame { header: Header::new(Kind::Load, 0), payload: vec![1; 100] };
        let mut endless = bytes_of(&close);
        endless[28..32].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut streams = vec![(another, vec![0xff; 4_000]), (stage, bytes_of(&load))];
        let (third, _) = other.stage(host, &offer, RingId::from_bytes([7; 16])).await;
        streams.push((third, endless));
        for (mut frames, bytes) in streams {
            frames.send.write_all(&bytes).await.unwrap();
            frames.until_its_end().await;
        }
        // The layers are still there, and the name is free when the host has seen the end of its stream.
        let again = async { while driver.stage(host, &offer, ring).await.1.header.kind != Kind::Loaded {} };
        soon("the name is free", again).await;
    });
}

#[test]
fn a_model_guesses_for_drivers_of_its_vocabulary_and_for_no_more_than_the_node_takes_requests() {
    let home = Home::new();
    home.run(["mesh", "create", "home"]).succeeds();
    let serve = [DEMO, "--alias", "demo", "--mesh", "home", "--max-requests", "2"];
    let server = Server::start(&home, [&serve, &OFFLINE[..]].concat());
    let ticket = home.run(["mesh", "invite", "--json", "--api", &server.address]).succeeds().json();
    let ticket = ticket["ticket"].as_str().unwrap().to_owned();
    Runtime::new().unwrap().block_on(async {
        let driver = Driver::join(&ticket).await;
        let (host, open) = driver.offer_of_guesses().await;
        let refusal = async |open: DraftOpen| {
            let (frames, refused) = driver.ask(host, &Work::Draft(open)).await;
            assert_eq!(refused.header.kind, Kind::LoadFailed);
            frames.until_its_end().await;
            refused.as_text()
        };
        let others = refusal(DraftOpen { vocabulary: VocabularyId::from_bytes([0; 8]), ..open.clone() }).await;
        assert!(others.contains("another vocabulary"), "{others}");
        let unknown = refusal(DraftOpen { model: ModelDigest::from_bytes([0; 32]), ..open.clone() }).await;
        assert!(unknown.contains("not served here"), "{unknown}");

        let (first, loaded) = driver.ask(host, &Work::Draft(open.clone())).await;
        assert_eq!(loaded.header.kind, Kind::Loaded, "{}", loaded.as_text());
        // It is not loaded anew while somebody uses it.
        let longer = refusal(DraftOpen { context_tokens: 512, ..open.clone() }).await;
        assert!(longer.contains("256 tokens at most"), "{longer}");
        let (mut second, loaded) = driver.ask(host, &Work::Draft(open.clone())).await;
        assert_eq!(loaded.header.kind, Kind::Loaded, "{}", loaded.as_text());
        let third = refusal(open.clone()).await;
        assert!(third.contains("as many requests"), "{third}");

        // Who says what no driver says is sent away, and leaves its place.
        let route = Frame { header: Header::new(Kind::Route, 0), payload: Vec::new() };
        second.send.write_all(&bytes_of(&route)).await.unwrap();
        second.until_its_end().await;
        drop(first);
        let longer = DraftOpen { context_tokens: 512, ..open };
        let again =
            async { while driver.ask(host, &Work::Draft(longer.clone())).await.1.header.kind != Kind::Loaded {} };
        soon("it is loaded anew when nobody uses it", again).await;
    });
}
