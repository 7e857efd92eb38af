//! A node in this process: loading with progress, the API in front of it, and an end in order.

use std::{
    collections::HashMap,
    io::{self, IsTerminal},
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use murmur_api::ApiOptions;
use murmur_node::{DraftWish, LoadProgress, ModelSpec, Node, NodeOptions, RingWishes, WantedDraft, sharing::Sharing};
use murmur_protocol::mesh::NodeId;
use murmur_store::{ModelRef, hub::HubConfig};
use rand::Rng;
use tokio::{sync::oneshot, task::JoinHandle};

use super::{
    Session,
    doctor::{Occupant, occupant},
    signed,
};
use crate::{
    args::{Draft, EngineArgs, mesh::MeshArgs},
    client::ApiClient,
    exit::{Code, Failure},
    target::{self, LocalModel, Place, Target},
    ui,
    units::Threads,
};

/// Steps of a progress bar.
const PROGRESS_STEPS: u64 = 1000;

/// Listens at `--api`, or says who is there already.
pub(super) fn listen(session: &Session) -> anyhow::Result<TcpListener> {
    let address = session.global.api;
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            let (who, instead) = match occupant(session) {
                Occupant::Murmur => {
                    ("a murmur server".to_owned(), "Use that one (`murmur status` shows what it serves), end it,")
                }
                Occupant::Other(who) => (who, "End it,"),
            };
            Failure::because(
                Code::Unavailable,
                format!("{address} is in use by {who}. {instead} or listen elsewhere, such as --api 127.0.0.1:6877"),
            )
        }
        io::ErrorKind::AddrNotAvailable => Failure::because(
            Code::Unavailable,
            format!(
                "{address} is no address of this machine. Choose one of its own with --api, such as 127.0.0.1:6876"
            ),
        ),
        io::ErrorKind::PermissionDenied => Failure::because(
            Code::Unavailable,
            format!("this user may not listen on {address}. Choose a port above 1023 with --api"),
        ),
        _ => anyhow::Error::from(error).context(format!("listening on {address}")),
    };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).context("setting up the listening socket")?;
    Ok(listener)
}

/// What a node is to do that is alone.
pub(super) fn node_options(
    session: &Session,
    models: Vec<LocalModel>,
    engine: &EngineArgs,
    draft: DraftWish,
) -> anyhow::Result<NodeOptions> {
    Ok(NodeOptions {
        data_dir: session.data_dir.clone(),
        models: models.into_iter().map(|model| ModelSpec { path: model.path, id: model.id }).collect(),
        contributes: true,
        wanted: Vec::new(),
        on_demand: Vec::new(),
        idle: Duration::ZERO,
        stages: engine.stages,
        threads: match engine.threads {
            Threads::Auto => murmur_node::Threads::Auto,
            Threads::Fixed(count) => murmur_node::Threads::Fixed(count.get()),
        },
        ctx_tokens: engine.ctx,
        parallel: engine.parallel,
        max_memory_bytes: engine.max_memory.map(|size| size.0),
        layers_max: None,
        region: String::new(),
        lossy: Vec::new(),
        ring: RingWishes::default(),
        standby: false,
        spread: false,
        draft,
        exact: engine.exact,
        peer_wait: Duration::ZERO,
        sharing: Sharing::default(),
        hands_out_files: true,
        upload_bytes_per_s: None,
        download_bytes_per_s: None,
        hub: hub(),
        hub_by_word: true,
        gpu_layers: engine.gpu_layers,
        engine_program: engine_program()?,
    })
}

/// A node without models: it asks others.
pub(super) fn client_options(session: &Session, mesh: &MeshArgs) -> anyhow::Result<NodeOptions> {
    Ok(NodeOptions {
        data_dir: session.data_dir.clone(),
        models: Vec::new(),
        contributes: false,
        wanted: Vec::new(),
        on_demand: Vec::new(),
        idle: Duration::ZERO,
        stages: 1,
        threads: murmur_node::Threads::Auto,
        ctx_tokens: None,
        parallel: 1,
        max_memory_bytes: None,
        layers_max: None,
        region: String::new(),
        lossy: Vec::new(),
        ring: RingWishes::default(),
        standby: false,
        spread: false,
        draft: DraftWish::Off,
        exact: false,
        peer_wait: mesh.wait.into(),
        sharing: Sharing::default(),
        hands_out_files: true,
        upload_bytes_per_s: None,
        download_bytes_per_s: None,
        hub: hub(),
        hub_by_word: !mesh.no_hub,
        gpu_layers: 0,
        engine_program: engine_program()?,
    })
}

/// Who is to guess. A model that is named is one of those that are served, or where `find` finds it. `signed_by`: the key that must have signed who
/// guesses.
pub(super) async fn draft(
    session: &Session,
    models: &[LocalModel],
    engine: &EngineArgs,
    find: impl AsyncFn(&ModelRef) -> anyhow::Result<Place>,
    signed_by: Option<NodeId>,
) -> anyhow::Result<DraftWish> {
    let spoilt = engine.draft_spoilt;
    Ok(match &engine.draft {
        Draft::Model(model) => {
            let is_meant = |served: &&LocalModel| matches!(model, ModelRef::Name(name) if name.as_str() == served.id);
            match models.iter().find(is_meant) {
                Some(served) => DraftWish::Model { path: served.path.clone(), spoilt },
                None => match find(model).await.context("--draft")? {
                    Place::Here(found) => DraftWish::Model { path: found.path, spoilt },
                    Place::Elsewhere(sought) => DraftWish::Wanted(WantedDraft::new(sought, signed_by, spoilt)),
                },
            }
        }
        Draft::Peer(name) => DraftWish::Peer { name: name.clone(), spoilt },
        _ if spoilt.is_some() => {
            return Err(Failure::because(
                Code::Usage,
                "--draft-spoilt spoils the guesses of a model, and --draft names none. Name one, or leave it out",
            ));
        }
        Draft::Off => DraftWish::Off,
        Draft::Lookup => DraftWish::Lookup,
        Draft::Auto => {
            let files = session.store().list()?.into_iter().map(|entry| entry.path);
            DraftWish::Auto(files.filter(|file| signed::is_known_to_be(session, file, signed_by)).collect())
        }
    })
}

/// The hub, unless its settings are wrong: then files come from other nodes alone, and whoever asks the hub itself hears what is wrong.
pub(super) fn hub() -> Option<HubConfig> {
    let config = HubConfig::from_env();
    config.inspect_err(|error| tracing::warn!("the hub is not asked for files that other nodes have: {error}")).ok()
}

fn engine_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("finding this program, for the engine's processes")
}

/// Loads a model for this command. Ctrl-C ends it, and the engine's processes with it.
async fn load(session: &Session, model: LocalModel, engine: &EngineArgs) -> anyhow::Result<Arc<Node>> {
    let models = vec![model];
    let here = async |model: &ModelRef| target::local(session, model).await.map(Place::Here);
    let draft = draft(session, &models, engine, here, None).await?;
    let options = node_options(session, models, engine, draft)?;
    let bar = LoadBar::new(session, engine.stages);
    tokio::select! {
        node = Node::start(options, bar.listener()) => Ok(node?),
        _ = tokio::signal::ctrl_c() => Err(Failure::because(Code::Interrupted, "interrupted while loading")),
    }
}

/// One bar for a model at a time: the mean of its stages. It is gone when this is.
pub(super) struct LoadBar(Arc<Bar>);

struct Bar {
    bar: ProgressBar,
    stages: u32,
    done: Mutex<HashMap<(String, usize), f32>>,
}

impl LoadBar {
    pub(super) fn new(session: &Session, stages: u32) -> Self {
        Self(Arc::new(Bar::new(session.global.quiet, stages)))
    }

    /// Shows what it hears.
    pub(super) fn listener(&self) -> impl Fn(LoadProgress) + Send + Sync + 'static {
        let bar = Arc::clone(&self.0);
        move |progress| bar.show(&progress)
    }
}

impl Drop for LoadBar {
    fn drop(&mut self) {
        self.0.bar.finish_and_clear();
    }
}

impl Bar {
    fn new(quiet: bool, stages: u32) -> Self {
        let hidden = quiet || !io::stderr().is_terminal();
        let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(PROGRESS_STEPS), target);
        if let Ok(style) = ProgressStyle::with_template("loading {msg} {wide_bar} {percent}% {elapsed}") {
            bar.set_style(style);
        }
        Self { bar, stages, done: Mutex::default() }
    }

    fn show(&self, progress: &LoadProgress) {
        let Ok(mut done) = self.done.lock() else {
            return;
        };
        done.insert((progress.model.clone(), progress.stage), progress.fraction.clamp(0.0, 1.0));
        let sum: f32 =
            done.iter().filter(|((model, _), _)| *model == progress.model).map(|(_, fraction)| fraction).sum();
        let share = f64::from(sum) / f64::from(self.stages.max(1));
        self.bar.set_message(ui::without_controls(&progress.model));
        self.bar.set_position(((share * PROGRESS_STEPS as f64) as u64).min(PROGRESS_STEPS));
    }
}

/// A server that a command runs for itself: on a port of its own, with a key that nobody else has.
pub(super) struct OwnServer {
    pub(super) client: ApiClient,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
    node: Arc<Node>,
}

impl OwnServer {
    pub(super) async fn start(session: &Session, model: LocalModel, engine: &EngineArgs) -> anyhow::Result<Self> {
        let node = load(session, model, engine).await?;
        let listener =
            tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("listening on this machine")?;
        let address = listener.local_addr()?;
        let key = format!("{:032x}", rand::rng().random::<u128>());
        let options =
            ApiOptions { api_keys: vec![key.clone()], shutdown_grace: Duration::ZERO, ..ApiOptions::default() };
        let (stop, stopped) = oneshot::channel::<()>();
        let backend = Arc::clone(&node);
        let serving = tokio::spawn(async move {
            let until = async {
                // Also when the command is gone without saying so.
                let _ = stopped.await;
            };
            if let Err(error) = murmur_api::serve(listener, backend, options, until).await {
                tracing::error!(%error, "the server for this command ended");
            }
        });
        Ok(Self { client: ApiClient::new(address, Some(key)), stop, serving, node })
    }

    pub(super) async fn end(self) {
        // Each may be over already, which is what is wanted.
        let _ = self.stop.send(());
        let _ = self.serving.await;
        self.node.shutdown().await;
    }
}

/// A model that answers: the running server's, or one started for this command.
pub(super) struct Served {
    pub(super) client: ApiClient,
    pub(super) model: String,
    own: Option<OwnServer>,
}

impl Served {
    pub(super) async fn start(session: &Session, target: Target, engine: &EngineArgs) -> anyhow::Result<Self> {
        match target {
            Target::Server(client, model) => Ok(Self { client, model, own: None }),
            Target::Local(local) => {
                let model = local.id.clone();
                let own = OwnServer::start(session, local, engine).await?;
                Ok(Self { client: own.client.clone(), model, own: Some(own) })
            }
        }
    }

    pub(super) async fn end(self) {
        if let Some(own) = self.own {
            own.end().await;
        }
    }
}
