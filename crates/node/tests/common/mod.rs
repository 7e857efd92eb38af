//! A taker, honest holders and tricksters of one file, over QUIC on loopback.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use murmur_api::backend::{Backend, RingWishes};
use murmur_gguf::{ByteRange, Digest, synth};
use murmur_net::{
    EndpointOptions, Mesh, MeshChoice, MeshOptions, OwnRecord, Relays, SendStream, stream, stream::Reader,
};
use murmur_node::{DraftWish, ModelSpec, Node, NodeOptions, Threads, sharing::Sharing, signatures};
use murmur_protocol::mesh::{
    Capabilities, Content, Fetch, HeldContent, ModelDigest, NodeId, NodeKey, Refused, Role, SignedAttestation, Work,
};
use murmur_store::{Contents, GROUP_BYTES, Resolved, Store, hub::HubConfig};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinSet};

/// Nothing here takes longer, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);
const NAME: &str = "tiny";

/// Waits for anything, but not for ever.
pub(crate) async fn soon<T>(what: &str, event: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, event).await {
        Ok(value) => value,
        Err(_) => panic!("never happened: {what}"),
    }
}

/// Asks again and again. For what nothing announces.
pub(crate) async fn until(what: &str, is_so: impl Fn() -> bool) {
    let waits = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon(what, waits).await;
}

/// A node that wants a file, and the file.
pub(crate) struct World {
    folder: TempDir,
    pub(crate) taker_dir: PathBuf,
    pub(crate) taker: Arc<Node>,
    pub(crate) digest: ModelDigest,
    bytes: Vec<u8>,
}

/// What a trickster says of the file in its record.
#[derive(Clone, Copy)]
pub(crate) struct Claim {
    pub(crate) file_bytes: u64,
    /// Where a hub is said to have it.
    pub(crate) source: Option<&'static str>,
    pub(crate) gives_hashes: bool,
}

impl World {
    pub(crate) async fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        let taker_dir = folder.path().join("taker");
        World::with(folder, options(&taker_dir)).await
    }

    pub(crate) async fn with_taker_at(taker_dir: PathBuf) -> World {
        World::with(tempfile::tempdir().unwrap(), options(&taker_dir)).await
    }

    /// One whose node may ask this hub.
    pub(crate) async fn with_hub(hub: HubConfig) -> World {
        World::with_taker(|options| NodeOptions { hub: Some(hub), ..options }).await
    }

    /// One whose node is to do something else.
    pub(crate) async fn with_taker(change: impl FnOnce(NodeOptions) -> NodeOptions) -> World {
        let folder = tempfile::tempdir().unwrap();
        let taker_dir = folder.path().join("taker");
        World::with(folder, change(options(&taker_dir))).await
    }

    async fn with(folder: TempDir, options: NodeOptions) -> World {
        let file = folder.path().join("tiny.gguf");
        let bytes = the_file(&file);
        assert!((3_000_000..10_000_000).contains(&bytes.len()), "{}", bytes.len());
        let source = sources(&folder).adopt(&file, &mut |_, _| ()).unwrap();
        let digest = ModelDigest::from_bytes(source.digest().0);
        let taker_dir = options.data_dir.clone();
        let taker = Arc::new(Node::open(options).unwrap());
        taker.join_mesh(mesh(&taker_dir, &[])).await.unwrap();
        World { folder, taker_dir, taker, digest, bytes }
    }

    /// What is true of the file.
    pub(crate) fn claim(&self) -> Claim {
        Claim { file_bytes: self.bytes.len() as u64, source: None, gives_hashes: false }
    }

    pub(crate) fn own_digest(&self) -> Digest {
        Digest(*self.digest.as_bytes())
    }

    /// What tricksters have right bytes from.
    fn sources(&self) -> Contents {
        sources(&self.folder)
    }

    /// Further files, each of so many bytes, of which tricksters can have right ones.
    pub(crate) fn further_files(&self, count: u8, bytes: usize) -> Vec<ModelDigest> {
        let file = |number| {
            let path = self.folder.path().join(format!("further-{number}"));
            fs::write(&path, vec![number; bytes]).unwrap();
            let Digest(digest) = self.sources().adopt(&path, &mut |_, _| ()).unwrap().digest();
            ModelDigest::from_bytes(digest)
        };
        (0..count).map(file).collect()
    }

    fn contact(&self) -> murmur_net::Contact {
        self.taker.mesh().unwrap().contact()
    }

    /// A node that has the file and sends so many bytes a second, or as fast as it goes.
    pub(crate) async fn honest(&self, upload_bytes_per_s: Option<u64>) -> Arc<Node> {
        self.honest_with(upload_bytes_per_s, None).await
    }

    /// One that says besides where a hub has it.
    pub(crate) async fn honest_with(&self, upload_bytes_per_s: Option<u64>, source: Option<&str>) -> Arc<Node> {
        let data_dir = self.honest_dir();
        let path = self.folder.path().join("tiny.gguf");
        if let Some(source) = source {
            let content = Contents::at(&data_dir).adopt(&path, &mut |_, _| ()).unwrap();
            content.set_source(source).unwrap();
        }
        let on_demand = vec![ModelSpec { path, id: NAME.to_owned() }];
        let options = NodeOptions { contributes: true, on_demand, upload_bytes_per_s, ..options(&data_dir) };
        let node = Arc::new(Node::open(options).unwrap());
        node.join_mesh(mesh(&data_dir, &[self.contact()])).await.unwrap();
        node
    }

    /// The store of the node that [`honest`](Self::honest) makes.
    pub(crate) fn honest_dir(&self) -> PathBuf {
        self.folder.path().join("honest")
    }

    /// Has this key sign the file there, as its node will hand it on.
    pub(crate) fn signs(&self, key: &NodeKey) {
        let path = self.folder.path().join("tiny.gguf");
        let model = Resolved { name: NAME.parse().unwrap(), path };
        signatures::sign(&Store::at(&self.honest_dir()), key, &model, |_, _| ()).unwrap();
    }

    /// A node that says that it has the file.
    pub(crate) async fn rogue(&self, claim: Claim, trick: Trick) -> Rogue {
        self.rogue_that_shows(claim, trick, Vec::new()).await
    }

    /// One that shows this as signed of the file.
    pub(crate) async fn rogue_that_shows(
        &self,
        claim: Claim,
        trick: Trick,
        signatures: Vec<SignedAttestation>,
    ) -> Rogue {
        self.rogue_with(&[self.digest], claim, trick, signatures).await
    }

    /// One that says this of each of these files.
    pub(crate) async fn rogue_with(
        &self,
        files: &[ModelDigest],
        claim: Claim,
        trick: Trick,
        signatures: Vec<SignedAttestation>,
    ) -> Rogue {
        let folder = tempfile::tempdir().unwrap();
        let held = |digest: &ModelDigest| HeldContent {
            digest: *digest,
            name: NAME.to_owned(),
            file_bytes: claim.file_bytes,
            held_bytes: claim.file_bytes,
            source: claim.source.map(str::to_owned),
        };
        let own = OwnRecord {
            role: Role::Worker,
            contents: files.iter().map(held).collect(),
            capabilities: Capabilities::CONTENTS.with(Capabilities::ATTESTATIONS),
            ..OwnRecord::default()
        };
        let options = MeshOptions { own, ..mesh(folder.path(), &[self.contact()]) };
        let mesh = Arc::new(Mesh::start(options).await.unwrap());
        let sources = self.sources();
        let (asked, open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let serving = Serving { trick, claim, sources, signatures, asked: Arc::clone(&asked), open: Arc::clone(&open) };
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::new(serving).run(Arc::clone(&mesh)));
        Rogue { _folder: folder, mesh, asked, open, tasks }
    }

    /// The taker knows so many others that say that they have the file.
    pub(crate) async fn knows_holders(&self, count: usize) {
        until("the holders are known", || {
            let digest = self.digest.to_string();
            let files = self.taker.contents();
            let file = files.iter().find(|file| file["digest"] == digest);
            file.is_some_and(|file| file["nodes"].as_array().unwrap().len() == count)
        })
        .await;
    }

    /// The length of the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether the file lies there.
    pub(crate) fn is_the_file(&self, path: &Path) -> bool {
        fs::read(path).is_ok_and(|bytes| bytes == self.bytes)
    }

    /// What the taker says of the file.
    pub(crate) fn content_view(&self) -> Value {
        self.taker.status()["contents"][0].clone()
    }

    /// Whatever the taker lists as held is what it should be.
    pub(crate) fn holds_only_what_is_right(&self) {
        let Ok(Some(content)) = Contents::at(&self.taker_dir).find(&self.own_digest()) else { return };
        let held = content.held();
        let file = fs::read(content.path()).unwrap();
        for ByteRange { start, end } in held {
            let range = start as usize..end as usize;
            assert!(file[range.clone()] == self.bytes[range.clone()], "{range:?} is held and wrong");
        }
    }

    /// The pull is done, and the file complete.
    #[track_caller]
    pub(crate) fn has_the_file(&self, events: &[Value]) {
        let last = events.last().unwrap();
        assert_eq!(last["state"], "done", "{events:#?}");
        assert!(fs::read(last["path"].as_str().unwrap()).unwrap() == self.bytes, "{last}");
    }
}

fn sources(folder: &TempDir) -> Contents {
    Contents::at(&folder.path().join("source"))
}

/// The file that everything here is about, written there.
pub(crate) fn the_file(path: &Path) -> Vec<u8> {
    synth::write(&synth::Spec::tiny("llama").unwrap().with_layers(1), path).unwrap();
    fs::read(path).unwrap()
}

pub(crate) fn options(data_dir: &Path) -> NodeOptions {
    NodeOptions {
        data_dir: data_dir.to_owned(),
        models: Vec::new(),
        contributes: false,
        hands_out_files: true,
        wanted: Vec::new(),
        on_demand: Vec::new(),
        idle: Duration::from_secs(60),
        stages: 1,
        threads: Threads::Fixed(1),
        ctx_tokens: None,
        parallel: 1,
        max_memory_bytes: None,
        layers_max: None,
        region: String::new(),
        spread: false,
        lossy: Vec::new(),
        ring: RingWishes::default(),
        standby: false,
        draft: DraftWish::Off,
        exact: false,
        peer_wait: Duration::ZERO,
        sharing: Sharing::default(),
        upload_bytes_per_s: None,
        download_bytes_per_s: None,
        hub: None,
        hub_by_word: true,
        gpu_layers: 0,
        // No model is loaded.
        engine_program: PathBuf::new(),
    }
}

pub(crate) fn mesh(data_dir: &Path, bootstrap: &[murmur_net::Contact]) -> MeshOptions {
    MeshOptions {
        endpoint: EndpointOptions { relays: Relays::None, bind: Some("127.0.0.1:0".parse().unwrap()), dht: None },
        bootstrap: bootstrap.to_vec(),
        ..MeshOptions::new(data_dir, MeshChoice::Public("test".to_owned()))
    }
}

/// A pull that somebody listens to.
pub(crate) struct Pull(mpsc::Receiver<Value>);

impl Pull {
    pub(crate) async fn begin(world: &World) -> Pull {
        Pull::named(world, NAME).await
    }

    pub(crate) async fn named(world: &World, name: &str) -> Pull {
        Pull(world.taker.pull(name.to_owned(), None).await.unwrap())
    }

    /// Of what this key has signed.
    pub(crate) async fn signed_by(world: &World, signer: &NodeId) -> Pull {
        Pull(world.taker.pull(NAME.to_owned(), Some(signer.to_string())).await.unwrap())
    }

    /// What is told to the end; `heard` is called each time.
    pub(crate) async fn until_its_end(mut self, heard: impl Fn(&Value)) -> Vec<Value> {
        let mut events = Vec::new();
        let listening = async {
            while let Some(event) = self.0.recv().await {
                heard(&event);
                events.push(event);
            }
        };
        soon("the end of the pull", listening).await;
        events
    }

    pub(crate) async fn waits_for(&mut self, what: &str, is_it: impl Fn(&Value) -> bool) {
        let listening = async {
            loop {
                let event = self.0.recv().await.unwrap();
                assert!(event["state"] != "failed" && event["state"] != "done", "{event}");
                if is_it(&event) {
                    return;
                }
            }
        };
        soon(what, listening).await;
    }
}

/// What somebody does who is asked for bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Trick {
    /// The byte at this part of the answer is another one.
    Wrong { at: f64 },
    /// Half of what was asked for.
    Truncated,
    /// Nothing of what was promised.
    Empty,
    /// What was asked for, and then more for ever.
    Endless,
    /// A promise, and no end.
    Silent,
    /// The same, but for the last group, which proves how long the file is.
    SilentBeforeTheLast,
    /// A kilobyte a second.
    Drip,
    /// It has not got it.
    Lacks,
    /// It has no room.
    Busy,
    /// Nor has it for bytes, but for hashes, which are wrong.
    WrongHashes,
    /// No message.
    Garbage,
    /// Nor when it is asked what it has.
    GarbageOfContent,
    /// It says for ever that it has all, in as many pieces as possible, and nothing; and has nothing.
    Flood,
}

/// A node that plays a trick.
pub(crate) struct Rogue {
    _folder: TempDir,
    mesh: Arc<Mesh>,
    asked: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    tasks: JoinSet<()>,
}

impl Rogue {
    pub(crate) fn id(&self) -> String {
        self.mesh.node_id().to_string()
    }

    pub(crate) fn mesh(&self) -> Arc<Mesh> {
        Arc::clone(&self.mesh)
    }

    /// How often it was asked for bytes.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }

    /// How many of these requests have not ended.
    pub(crate) fn open_streams(&self) -> usize {
        self.open.load(SeqCst)
    }

    pub(crate) async fn knows(&self, node: NodeId) {
        let mut table = self.mesh.watch();
        soon("the other one is known", table.wait_for(|table| table.contains_key(&node))).await.unwrap();
    }

    /// Without a word.
    pub(crate) fn vanishes(mut self) {
        self.tasks.abort_all();
    }
}

struct Serving {
    trick: Trick,
    claim: Claim,
    sources: Contents,
    signatures: Vec<SignedAttestation>,
    asked: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
}

impl Serving {
    async fn run(self: Arc<Self>, mesh: Arc<Mesh>) {
        let mut answers = JoinSet::new();
        while let Some(work) = mesh.accept_work().await {
            let serving = Arc::clone(&self);
            answers.spawn(async move {
                let mut send = work.send;
                let mut reader = Reader::<Work>::new(work.recv);
                // Whoever is done with it stops an answer: that is no failure here.
                let _ = match reader.expect().await {
                    Ok(Work::WatchContent(_)) => serving.tell(&mut send).await,
                    Ok(Work::GetAttestations(_)) => {
                        let shown = stream::write(&mut send, &Work::Attestations(serving.signatures.clone())).await;
                        stream::finish(&mut send);
                        shown.map_err(Into::into)
                    }
                    Ok(Work::Fetch(fetch)) => {
                        serving.asked.fetch_add(1, SeqCst);
                        serving.open.fetch_add(1, SeqCst);
                        let sent = serving.send(fetch, &mut send).await;
                        let _ = send.stopped().await;
                        serving.open.fetch_sub(1, SeqCst);
                        sent
                    }
                    other => panic!("{other:?}"),
                };
            });
        }
    }

    async fn tell(&self, send: &mut SendStream) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let Claim { file_bytes, gives_hashes, .. } = self.claim;
        let content = |held| Work::Content(Content { file_bytes, header_bytes: 0, held, gives_hashes, is_news: false });
        match self.trick {
            Trick::GarbageOfContent => send.write_all(&[0xab; 4_000]).await?,
            Trick::Flood => loop {
                let step = file_bytes / 1_024;
                stream::write(send, &content((0..1_024).map(|at| at * step..at * step + 1).collect())).await?;
                stream::write(send, &content(Vec::new())).await?;
            },
            _ => stream::write(send, &content(std::iter::once(0..file_bytes).collect())).await?,
        }
        let _ = send.stopped().await;
        Ok(())
    }

    async fn send(&self, fetch: Fetch, send: &mut SendStream) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let refusal = match self.trick {
            Trick::Lacks | Trick::Flood => Some(Refused::NotServed { reason: "not here".to_owned() }),
            Trick::Busy => Some(Refused::Busy { retry_ms: 0 }),
            Trick::WrongHashes if !fetch.only_hashes => Some(Refused::Busy { retry_ms: 0 }),
            _ => None,
        };
        if let Some(refused) = refusal {
            stream::write(send, &Work::Refused(refused)).await?;
            stream::finish(send);
            return Ok(());
        }
        if self.trick == Trick::Garbage {
            send.write_all(&[0xab; 4_000]).await?;
            stream::finish(send);
            return Ok(());
        }
        stream::write(send, &Work::Sending).await?;
        let mut encoded = self.encoding(&fetch);
        match self.trick {
            Trick::Wrong { at } => {
                let at = ((encoded.len() - 1) as f64 * at) as usize;
                encoded[at] ^= 1;
                send.write_all(&encoded).await?;
            }
            Trick::WrongHashes => {
                let at = encoded.len() / 2;
                encoded[at] ^= 1;
                send.write_all(&encoded).await?;
            }
            Trick::Truncated => send.write_all(&encoded[..encoded.len() / 2]).await?,
            Trick::Empty => {}
            Trick::Endless => {
                send.write_all(&encoded).await?;
                loop {
                    send.write_all(&[0; 64 << 10]).await?;
                }
            }
            Trick::SilentBeforeTheLast if !self.is_last(&fetch) => return Ok(()),
            Trick::SilentBeforeTheLast => send.write_all(&encoded).await?,
            Trick::Drip => {
                for kilobyte in encoded.chunks(1_000) {
                    send.write_all(kilobyte).await?;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
            _ => return Ok(()),
        }
        stream::finish(send);
        Ok(())
    }

    /// Whether only the end of the file is asked for.
    fn is_last(&self, fetch: &Fetch) -> bool {
        fetch.ranges.iter().all(|range| range.start + GROUP_BYTES >= self.claim.file_bytes)
    }

    /// What an honest node would send, or noise where it claims another file.
    fn encoding(&self, fetch: &Fetch) -> Vec<u8> {
        let source = self.sources.find(&Digest(*fetch.model.as_bytes())).unwrap().unwrap();
        if self.claim.file_bytes != source.bytes() {
            return vec![0xab; 64 << 10];
        }
        let ranges: Vec<_> =
            fetch.ranges.iter().map(|range| ByteRange { start: range.start, end: range.end }).collect();
        let mut encoded = Vec::new();
        match fetch.only_hashes {
            true => source.encode_hashes(&ranges, &mut encoded).unwrap(),
            false => source.encode(&ranges, &mut encoded).unwrap(),
        }
        encoded
    }
}
