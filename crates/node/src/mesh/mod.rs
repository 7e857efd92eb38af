//! The node in a mesh: it offers its models to others, and others' models to its user.
//!
//! Five parts, the first four of them tasks that are owned here:
//! - [`announce`] keeps the own record true: which models, in which state, how busy, how fast;
//! - [`identity`] reads the files of models for their names in the mesh;
//! - [`links`] measures the ways to those that hold layers of the same models;
//! - [`worker`] answers the requests of other nodes with this node's engines;
//! - [`catalogue`] reads off the records of others which models there are, and gets what a driver needs of one: vocabulary and
//!   template.
//!
//! A request of this node's user for a model of others runs in [`request`], where `murmur_core`'s session decides and this
//! crate does: it opens streams, keeps timers, hands tokens on.

mod announce;
mod catalogue;
mod identity;
mod links;
mod places;
mod request;
pub(crate) mod ring;
mod view;
mod worker;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak, atomic::Ordering},
    time::{Duration, Instant},
};

use murmur_api::backend::{Backend, MeshAction, Refusal};
use murmur_core::{health::Health, router::Router, time::Now};
use murmur_net::{Mesh, MeshOptions, NetError};
use murmur_protocol::mesh::{Capabilities, Role};
use tokio::{
    sync::Notify,
    task::{AbortHandle, JoinSet},
};

pub(crate) use catalogue::{CatalogueError, RemoteModel, by_count};
pub(crate) use identity::{IdentityError, ModelIdentity};
pub(crate) use links::one_way_us;
pub(crate) use places::{Place, Places};
pub(crate) use request::{RemoteRequest, RemoteStream};

use crate::{
    Node,
    contents::wanted,
    readers::{Reader, Readers},
};
use catalogue::Catalogue;
use links::LinkBook;
use worker::Speeds;

/// What this build can do for others.
const CAPABILITIES: Capabilities = Capabilities::GRAMMARS
    .with(Capabilities::LOGPROBS)
    .with(Capabilities::CARDS)
    .with(Capabilities::CONTENTS)
    .with(Capabilities::ATTESTATIONS)
    .with(Capabilities::GUESSES);

/// A node's part in a mesh.
pub(crate) struct MeshNode {
    node: Weak<Node>,
    mesh: Arc<Mesh>,
    started: Instant,
    /// How long others may leave unread what they have asked for.
    lease: Duration,
    /// A model has got its name in the mesh.
    identified: Notify,
    /// Who gets a request, and what is known of them. Held for an instant only.
    dispatch: Mutex<Dispatch>,
    catalogue: Catalogue,
    speeds: Speeds,
    /// The ways to those that hold layers of the same models.
    links: LinkBook,
    /// Drivers at the stages that this node holds.
    rings: ring::host::Rings,
    tasks: Mutex<JoinSet<()>>,
}

/// What routing needs.
#[derive(Default)]
struct Dispatch {
    router: Router,
    health: Health,
}

impl MeshNode {
    /// The moment, for the pure machines.
    pub(crate) fn now(&self) -> Now {
        Now::from_ms(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    fn dispatch(&self) -> MutexGuard<'_, Dispatch> {
        self.dispatch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn links(&self) -> &LinkBook {
        &self.links
    }

    /// The node that is in the mesh; `None`: it ends.
    pub(crate) fn node(&self) -> Option<Arc<Node>> {
        self.node.upgrade()
    }

    /// The mesh itself.
    pub(crate) fn mesh(&self) -> &Arc<Mesh> {
        &self.mesh
    }

    /// The models of others that can be asked for.
    pub(crate) fn remotes(&self) -> Arc<Vec<Arc<RemoteModel>>> {
        self.catalogue.models(&self.mesh)
    }

    /// What reads and writes the tokens of a model of others.
    pub(crate) async fn reader(&self, model: &RemoteModel, readers: &Readers) -> Result<Arc<Reader>, CatalogueError> {
        self.catalogue.reader(&self.mesh, model, readers).await
    }

    /// Where the same is kept.
    pub(crate) fn card_path(&self, model: &RemoteModel) -> PathBuf {
        self.catalogue.card_path(model)
    }

    /// What `/api/mesh` shows.
    pub(crate) fn view(&self) -> serde_json::Value {
        view::mesh(&self.mesh)
    }

    /// Does what a user asks of the mesh.
    pub(crate) async fn act(&self, node: &Node, action: MeshAction) -> Result<serde_json::Value, Refusal> {
        view::act(node, self, action).await
    }

    /// Has something done until the mesh is left.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that are over are of no more use to anybody.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task)
    }

    async fn leave(&self) {
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        self.mesh.leave().await;
    }
}

/// The place of a mesh in a node that may be in none.
pub(crate) type MeshCell = OnceLock<Arc<MeshNode>>;

impl Node {
    /// Says that this node will take its place in a mesh: until it has, what needs one is to wait, and `/health` says so.
    pub fn will_join_mesh(&self) {
        self.is_to_join.store(true, Ordering::Relaxed);
    }

    /// Why what needs a mesh cannot be had.
    pub(crate) fn no_mesh(&self) -> Refusal {
        if self.is_joining() { Refusal::joining() } else { Refusal::not_in_a_mesh() }
    }

    /// Takes this node's place in a mesh: from now on its models are offered there, and the models of others here. Returns
    /// when the endpoint is bound and a ticket for a private mesh is redeemed.
    ///
    /// # Errors
    /// [`NetError`]; [`NetError::Option`] when the node is in a mesh already.
    pub async fn join_mesh(self: &Arc<Self>, mut options: MeshOptions) -> Result<(), NetError> {
        let twice = || NetError::Option { what: "a mesh", reason: "this node is in one already".into() };
        if self.mesh.get().is_some() {
            return Err(twice());
        }
        (options.own.role, options.own.capabilities) = match self.options().contributes {
            true => (Role::Worker, CAPABILITIES),
            false => (Role::Client, Capabilities::NONE),
        };
        let (data_dir, lease_ms) = (options.data_dir.clone(), options.timing.lease_ms);
        let node = Arc::new(MeshNode {
            node: Arc::downgrade(self),
            mesh: Arc::new(Mesh::start(options).await?),
            started: Instant::now(),
            lease: Duration::from_millis(lease_ms.into()),
            identified: Notify::new(),
            dispatch: Mutex::default(),
            catalogue: Catalogue::new(&data_dir),
            speeds: Speeds::default(),
            links: LinkBook::default(),
            rings: ring::host::Rings::default(),
            tasks: Mutex::default(),
        });
        if self.mesh.set(Arc::clone(&node)).is_err() {
            node.leave().await;
            return Err(twice());
        }
        let mut tasks = node.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if self.options().contributes {
            tasks.spawn(announce::run(Arc::downgrade(self), Arc::downgrade(&node)));
            tasks.spawn(identity::run(Arc::downgrade(self), Arc::downgrade(&node)));
            tasks.spawn(worker::run(Arc::downgrade(self), Arc::downgrade(&node)));
            if self.options().spread {
                tasks.spawn(ring::run(Arc::downgrade(self), Arc::downgrade(&node)));
                tasks.spawn(links::run(Arc::downgrade(self), Arc::downgrade(&node)));
            }
        }
        for wanted in &self.wanted {
            tasks.spawn(wanted::run(Arc::downgrade(self), Arc::downgrade(&node), Arc::clone(wanted)));
        }
        drop(tasks);
        Ok(())
    }

    /// The mesh, where the node is in one.
    pub fn mesh(&self) -> Option<Arc<Mesh>> {
        self.mesh.get().map(|node| Arc::clone(&node.mesh))
    }

    /// Says goodbye to the mesh.
    pub(crate) async fn leave_mesh(&self) {
        if let Some(node) = self.mesh.get() {
            node.leave().await;
        }
    }
}

/// Both, while the node is there.
pub(crate) fn both(node: &Weak<Node>, mesh: &Weak<MeshNode>) -> Option<(Arc<Node>, Arc<MeshNode>)> {
    Some((node.upgrade()?, mesh.upgrade()?))
}

/// Writes a file so that others see all of it or what was there before.
fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    fs::write(&partial, bytes)?;
    fs::rename(&partial, path)
}
