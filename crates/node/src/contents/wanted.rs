//! Models that a user has asked for by a name that only others know: found in the mesh, fetched as far as this node needs
//! them, and served like its own.
//!
//! First comes the header of the file. It says whether the model fits: then all of it is fetched; else it is spread over the
//! mesh, and of it only come the layers that this node is asked to hold.

use std::{
    fs::File,
    io::Read,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::Duration,
};

use murmur_core::planner::size;
use murmur_gguf::{ByteRange, Gguf, LayerRange};
use murmur_net::Table;
use murmur_protocol::mesh::{HeldContent, ModelDigest, NodeId, content::GROUP_BYTES};
use murmur_store::{HubRef, ModelName};
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};

use super::{
    InUse, Shelf, Sought,
    hub_name::{FromHub, Hub, HubFinder, OfHub},
    length,
    signers::{choose, demand, keep_shown, not_signed, take_along},
    take::TELL_EVERY,
};
use crate::{
    ModelSpec, Node, NodeError, WantedModel,
    mesh::{IdentityError, MeshNode, ModelIdentity, both, by_count},
    model::with_causes,
    signatures::Attested,
};

/// Before what could not be had is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// The same where a hub was asked.
const HUB_RETRY: Duration = Duration::from_secs(30);
/// Where nodes claim several lengths of a file, one that is not proven within this gives way to the next.
const PROOF_MAX: Duration = Duration::from_secs(5);
/// So many times it is tried to prove one.
const PROOFS_MAX: usize = 16;
/// Of a header whose length nobody tells, so much is fetched first.
const HEADER_BYTES_GUESSED: u64 = 1 << 20;
/// No header is longer.
const HEADER_BYTES_MAX: u64 = 256 << 20;

/// A name that was asked for, and how far it is.
pub(crate) struct Wanted {
    sought: Sought,
    /// Nothing is taken that this key has not signed.
    signer: Option<NodeId>,
    /// The name clients use, as soon as it is known.
    id: OnceLock<String>,
    state: Mutex<State>,
}

enum State {
    Looking,
    /// Its header comes.
    Found,
    /// No node has it, and the hub gives it.
    FromHub(FromHub),
    /// It is one of the node's models.
    Listed,
    Failed(String),
}

impl Wanted {
    pub(crate) fn new(wanted: &WantedModel) -> Wanted {
        let id = match (&wanted.id, &wanted.sought) {
            (Some(id), _) => OnceLock::from(id.clone()),
            (None, Sought::Name(name)) if name.as_str().parse::<ModelDigest>().is_err() => {
                OnceLock::from(name.to_string())
            }
            (None, _) => OnceLock::new(),
        };
        Wanted { sought: wanted.sought.clone(), signer: wanted.signed_by, id, state: Mutex::new(State::Looking) }
    }

    /// Whether clients mean it by this name.
    pub(crate) fn is_called(&self, id: &str) -> bool {
        self.id.get().is_some_and(|own| own == id)
    }

    fn set(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// What it is waiting for; `None`: it is there.
    pub(crate) fn waiting(&self) -> Option<String> {
        match &*self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Looking => Some(match &self.sought {
                Sought::Name(name) => format!("no node of the mesh has {name} yet"),
                Sought::Hub(reference) => format!("{reference} is being looked for in the mesh and on the hub"),
            }),
            State::Found => Some(format!("the header of {} is being fetched", self.sought)),
            State::FromHub(FromHub { done_bytes, total_bytes, trouble }) => {
                let trouble =
                    trouble.as_ref().map_or_else(String::new, |trouble| format!("; {trouble}, it is tried again"));
                let (done, total) = (size(*done_bytes), size(*total_bytes));
                Some(format!("{} is being fetched from the hub: {done} of {total} are here{trouble}", self.sought))
            }
            State::Listed => None,
            State::Failed(reason) => Some(reason.clone()),
        }
    }

    /// For `/api/status`.
    pub(crate) fn view(&self) -> Value {
        json!({"name": self.sought.to_string(), "waiting": self.waiting()})
    }
}

/// Where the bytes of a model come from that are not here.
pub(crate) struct Supply {
    node: Weak<Node>,
    mesh: Weak<MeshNode>,
    shelf: InUse,
    /// Where it was asked for by its name on a hub.
    of_hub: Option<OfHub>,
    /// Whether it is what that hub has, once all of it was here.
    compared: OnceLock<Result<(), String>>,
}

impl Supply {
    /// Fetches what these layers need, or the whole file where they are all of it. `heard`: the part of it that is here. Blocks.
    pub(crate) fn fetch(
        &self,
        gguf: &Gguf,
        ranges: &[LayerRange],
        heard: &(dyn Fn(f32) + Sync),
    ) -> Result<(), NodeError> {
        let layers: u32 = ranges.iter().map(|range| range.len()).sum();
        let wanted = match gguf.layer_count().is_none_or(|all| all == layers) {
            true => vec![self.shelf.whole()],
            false => {
                let each = ranges.iter().map(|range| murmur_gguf::slice_ranges(gguf, *range));
                each.collect::<Result<Vec<_>, _>>()?.concat()
            }
        };
        let (Some(node), Some(mesh)) = (self.node.upgrade(), self.mesh.upgrade()) else {
            return Err(NodeError::Interrupted);
        };
        let all = length(&wanted).max(1);
        let told = async {
            loop {
                heard(1.0 - length(&self.shelf.content.missing(&wanted)) as f32 / all as f32);
                tokio::time::sleep(TELL_EVERY).await;
            }
        };
        tokio::runtime::Handle::current().block_on(async {
            tokio::select! {
                fetched = self.shelf.fetch(&node, &mesh, &wanted, true) => fetched.map_err(NodeError::Take),
                () = told => Err(NodeError::Interrupted),
            }
        })?;
        self.compare(&node)?;
        // Where it is not entered under its name, it is found by its digest, as long as others have it.
        if let Err(error) = self.shelf.enter(&node.library.store()) {
            tracing::warn!("{} is not entered in the store: {}", self.shelf.name, with_causes(&error));
        }
        mesh.spawn(take_along(Arc::clone(&mesh), Arc::clone(&self.shelf)));
        Ok(())
    }

    /// Makes sure that a file that was asked for by its name on a hub is the hub's, once all of it is here. Of a part of it nobody but the nodes can
    /// say so. Blocks.
    fn compare(&self, node: &Node) -> Result<(), NodeError> {
        let Some(of_hub) = self.of_hub.as_ref().filter(|_| self.shelf.content.is_complete()) else { return Ok(()) };
        let compared = self.compared.get_or_init(|| {
            tokio::runtime::Handle::current().block_on(self.shelf.rest());
            of_hub.compare(node, &self.shelf).map_err(|error| with_causes(&error))
        });
        let unusable = |reason| NodeError::Unusable { path: self.shelf.content.path().to_owned(), reason };
        compared.clone().map_err(unusable)
    }
}

/// Finds a model by its name and adds it to the node's.
pub(crate) async fn run(node: Weak<Node>, mesh: Weak<MeshNode>, wanted: Arc<Wanted>) {
    loop {
        let (added, retry) = match &wanted.sought {
            Sought::Name(name) => (add_named(&node, &mesh, &wanted, name.as_str()).await, RETRY),
            Sought::Hub(reference) => (add_of_hub(&node, &mesh, &wanted, reference).await, HUB_RETRY),
        };
        match added {
            Some(Ok(at)) => {
                wanted.set(State::Listed);
                return load(node, at).await;
            }
            Some(Err(error)) => {
                tracing::warn!("{}: {}", wanted.sought, with_causes(&error));
                wanted.set(State::Failed(with_causes(&error)));
                tokio::time::sleep(retry).await;
            }
            None => return,
        }
    }
}

/// Adds what nodes have under a name, as soon as one has it. `None`: the mesh was left.
async fn add_named(
    node: &Weak<Node>,
    mesh: &Weak<MeshNode>,
    wanted: &Wanted,
    name: &str,
) -> Option<Result<usize, NodeError>> {
    let mut table = mesh.upgrade()?.mesh().watch();
    let digest = search(&mut table, |table| find(table, name)).await?;
    let (node, mesh) = both(node, mesh)?;
    Some(add_file(&node, &mesh, wanted, name, digest).await)
}

/// Adds the file that most nodes mean by a name, or one of this name that the wanted key has signed.
async fn add_file(
    node: &Arc<Node>,
    mesh: &Arc<MeshNode>,
    wanted: &Wanted,
    name: &str,
    most: ModelDigest,
) -> Result<usize, NodeError> {
    let (digest, signed) = choose(mesh, name, most, wanted.signer).await?;
    let shelf = begin(node, mesh, &called(mesh, digest, name), digest, |_| wanted.set(State::Found)).await?;
    add(node, mesh, wanted, shelf, signed, None).await
}

/// Adds what a hub has under a name, from nodes that have it and from the hub, or from the hub alone. `None`: the mesh was left.
async fn add_of_hub(
    node: &Weak<Node>,
    mesh: &Weak<MeshNode>,
    wanted: &Arc<Wanted>,
    reference: &HubRef,
) -> Option<Result<usize, NodeError>> {
    let (node, mesh) = both(node, mesh)?;
    let hub = Hub::of(&node);
    let found = match HubFinder::of(&hub, reference.clone()).await {
        Ok(finder) => finder.search(&mesh).await,
        Err(error) => Err(error),
    };
    Some(match (found, wanted.signer) {
        (Ok(of_hub), _) => add_found(&node, &mesh, wanted, of_hub).await,
        (Err(NodeError::Nowhere(_)), None) => add_pulled(&node, &hub, wanted, reference).await,
        (Err(NodeError::Nowhere(name)), Some(signer)) => Err(not_signed(&name, signer, &[])),
        (Err(error), _) => Err(error),
    })
}

/// Adds a hub's file that nodes have, if the wanted key has signed it.
async fn add_found(node: &Arc<Node>, mesh: &Arc<MeshNode>, wanted: &Wanted, of_hub: OfHub) -> Result<usize, NodeError> {
    let signed = demand(mesh, &wanted.sought.to_string(), of_hub.digest, wanted.signer).await?;
    let shelf = of_hub.begin(node, mesh, |_| wanted.set(State::Found)).await?;
    add(node, mesh, wanted, shelf, signed, Some(of_hub)).await
}

/// Adds what comes from the hub alone.
async fn add_pulled(node: &Arc<Node>, hub: &Hub, wanted: &Arc<Wanted>, reference: &HubRef) -> Result<usize, NodeError> {
    let told = Arc::clone(wanted);
    let heard = move |from_hub| told.set(State::FromHub(from_hub));
    let entry = hub.pull(reference, heard).await?;
    node.options().draft.is_here().await;
    let id = wanted.id.get_or_init(|| entry.name.to_string()).clone();
    let (node, spec) = (Arc::clone(node), ModelSpec { path: entry.path, id });
    blocking(move || node.models.add(&spec, None)).await
}

/// What is looked for in the table, as soon as it is there. `None`: the mesh was left.
pub(super) async fn search<T>(table: &mut watch::Receiver<Table>, find: impl Fn(&Table) -> Option<T>) -> Option<T> {
    loop {
        let found = find(&table.borrow_and_update());
        match found {
            Some(found) => return Some(found),
            None => table.changed().await.ok()?,
        }
    }
}

/// The same, if it is there within this.
pub(super) async fn search_within<T>(
    mesh: &MeshNode,
    longest: Duration,
    find: impl Fn(&Table) -> Option<T>,
    name: &impl ToString,
) -> Result<T, NodeError> {
    let found = timeout(longest, search(&mut mesh.mesh().watch(), find)).await;
    found.ok().flatten().ok_or_else(|| NodeError::Nowhere(name.to_string()))
}

/// The file that most nodes mean by a name.
pub(super) fn find(table: &Table, name: &str) -> Option<ModelDigest> {
    let is_it = |content: &&HeldContent| content.held_bytes > 0 && is_meant(content.digest, &content.name, name);
    by_count(contents(table).filter(is_it).map(|content| content.digest)).into_iter().next()
}

/// What a file is called here that was asked for so: by its digest, what most nodes call it.
pub(super) fn called(mesh: &MeshNode, digest: ModelDigest, wanted: &str) -> String {
    if wanted != digest.to_string() {
        return wanted.to_owned();
    }
    let table = Arc::clone(&mesh.mesh().watch().borrow());
    let named = contents(&table).filter(|content| content.digest == digest);
    let names =
        by_count(named.filter(|content| content.name.parse::<ModelName>().is_ok()).map(|content| &content.name));
    names.first().map_or(wanted, |name| name.as_str()).to_owned()
}

/// The lengths that a file has by what nodes say, first what most of them say.
fn lengths(table: &Table, digest: ModelDigest) -> Vec<u64> {
    by_count(contents(table).filter(|content| content.digest == digest).map(|content| content.file_bytes))
}

/// All that nodes have. None has the same file twice.
pub(super) fn contents(table: &Table) -> impl Iterator<Item = &HeldContent> {
    table.values().flat_map(|known| &known.verified.record().contents)
}

/// Begins the file with this digest, once more where nothing comes of it. Its length is what anybody may claim: it is the one that its
/// last group proves, which comes before all others.
pub(super) async fn begin(
    node: &Arc<Node>,
    mesh: &Arc<MeshNode>,
    name: &str,
    digest: ModelDigest,
    begun: impl Fn(&Arc<Shelf>),
) -> Result<InUse, NodeError> {
    let mut table = mesh.mesh().watch();
    let mut failed = NodeError::Nowhere(name.to_owned());
    for turn in 0..PROOFS_MAX {
        let claims = lengths(&table.borrow_and_update(), digest);
        let Some(file_bytes) = claims.get(turn % claims.len().max(1)).copied() else { break };
        let proof = async {
            let (own, name) = (Arc::clone(node), name.to_owned());
            let shelf = blocking(move || Ok(own.library.begin(&name, digest, file_bytes)?)).await?;
            begun(&shelf);
            let last = ByteRange { start: (file_bytes - 1) / GROUP_BYTES * GROUP_BYTES, end: file_bytes };
            shelf.fetch(node, mesh, &[last], true).await?;
            Ok(shelf)
        };
        let is_disputed = claims.len() > 1;
        tokio::select! {
            proof = proof => match proof {
                Err(error) if is_disputed => failed = error,
                proof => return proof,
            },
            () = tokio::time::sleep(PROOF_MAX), if is_disputed => {}
            _ = table.wait_for(|table| lengths(table, digest) != claims) => {}
        }
        // Meanwhile who fetched under this claim ends.
        tokio::time::sleep(2 * TELL_EVERY).await;
    }
    Err(failed)
}

/// A name, a digest, or a name with the beginning of a digest, as lists have it where two files share a name.
pub(super) fn is_meant(digest: ModelDigest, name: &str, wanted: &str) -> bool {
    wanted == name
        || wanted == digest.to_string()
        || wanted.strip_prefix(name).and_then(|rest| rest.strip_prefix('@')) == Some(&digest.short().to_string())
}

/// Adds a model of which nothing but its last group is here yet. `signed`: what shows that the wanted key has signed it, if one is wanted.
async fn add(
    node: &Arc<Node>,
    mesh: &Arc<MeshNode>,
    wanted: &Wanted,
    shelf: InUse,
    signed: Vec<Attested>,
    of_hub: Option<OfHub>,
) -> Result<usize, NodeError> {
    if let Some(signer) = wanted.signer {
        keep_shown(&shelf, signed, signer).await?;
    }
    fetch_header(node, mesh, &shelf).await?;
    node.options().draft.is_here().await;
    let id = wanted.id.get_or_init(|| shelf.name.clone()).clone();
    let (spec, digest) = (ModelSpec { path: shelf.content.path().to_owned(), id }, shelf.digest());
    let compared = OnceLock::new();
    let supply = Supply { node: Arc::downgrade(node), mesh: Arc::downgrade(mesh), shelf, of_hub, compared };
    let node = Arc::clone(node);
    blocking(move || {
        let unusable =
            |error: IdentityError| NodeError::Unusable { path: spec.path.clone(), reason: error.to_string() };
        let identity = ModelIdentity::known(&spec.path, digest).map_err(unusable)?;
        node.models.add(&spec, Some((identity, supply)))
    })
    .await
}

/// Loads it, or spreads it over the mesh, as the models that were there from the start. What fails is tried again for as long as
/// there is a node; the model's own state says why.
async fn load(node: Weak<Node>, at: usize) {
    let mut told = String::new();
    while let Some(node) = node.upgrade() {
        let outcome = blocking(move || node.models.load_one(&node.models[at], &|_| ())).await;
        match outcome {
            Ok(()) | Err(NodeError::Interrupted) => return,
            Err(error) if with_causes(&error) != told => {
                told = with_causes(&error);
                tracing::warn!("{told}");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The first groups say what is in the file. They may be here already.
async fn fetch_header(node: &Arc<Node>, mesh: &Arc<MeshNode>, shelf: &Arc<Shelf>) -> Result<(), NodeError> {
    let file_bytes = shelf.content.bytes();
    let missing = shelf.content.missing(&[shelf.whole()]);
    let mut bytes = missing.first().map_or(file_bytes, |missing| missing.start).min(HEADER_BYTES_MAX);
    loop {
        let (path, first) = (shelf.content.path().to_owned(), bytes);
        let read = blocking(move || {
            let file = File::open(&path).map_err(|error| NodeError::Unread { path: path.clone(), source: error })?;
            Ok(Gguf::from_reader(std::io::BufReader::new(file).take(first), file_bytes, path))
        });
        match read.await? {
            Ok(gguf) => {
                shelf.header_bytes.send_replace(gguf.data_offset());
                return Ok(());
            }
            Err(error) if bytes == file_bytes || bytes == HEADER_BYTES_MAX => return Err(error.into()),
            Err(_) => {}
        }
        let told = *shelf.header_bytes.borrow();
        let more = if told > bytes { told } else { (4 * bytes).max(HEADER_BYTES_GUESSED) };
        bytes = more.min(file_bytes).min(HEADER_BYTES_MAX);
        shelf.fetch(node, mesh, &[ByteRange { start: 0, end: bytes }], true).await?;
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
) -> Result<T, NodeError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| NodeError::Interrupted)?
}
