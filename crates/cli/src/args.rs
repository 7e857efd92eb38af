//! Every command, flag, environment variable and configuration key.
//!
//! One definition serves all: a flag `--max-memory` with an environment variable here is also the key `max-memory` of the
//! configuration file; its help is the help of all three, the man page and the shell completions. [`crate::settings`] reads the
//! rest off these definitions, and a test holds the names to the rule.
#![allow(rustdoc::broken_intra_doc_links, rustdoc::bare_urls)] // doc comments here are help texts, not Markdown

pub(crate) mod mesh;

use std::{net::SocketAddr, path::PathBuf, str::FromStr};

use clap::{ArgAction, Args, Parser, Subcommand, ValueHint, value_parser};
use murmur_protocol::{codec::Codec, mesh::NodeId};
use murmur_store::{ModelName, ModelRef, StoreError, hub::HUB_SEARCH_MAX};

use crate::{
    exit::EXIT_CODES_HELP,
    units::{Period, Size, Threads},
};

/// Where the API listens unless told otherwise.
pub(crate) const DEFAULT_API: &str = "127.0.0.1:6876";

/// Peer-to-peer inference for open-weight language models.
#[derive(Debug, Parser)]
#[command(
    name = "murmur",
    version,
    propagate_version = true,
    max_term_width = 120,
    after_help = EXIT_CODES_HELP,
    after_long_help = concat!(
        "MODEL is a path to a GGUF file, a name from `murmur models ls`, or hf:owner/repo[@revision][:quant].\n\n",
        "Flags that name an environment variable are also keys of the configuration file (DATA_DIR/config.toml), under the flag's \
         long name: --max-memory, MURMUR_MAX_MEMORY and max-memory = \"8GiB\" are one setting. A flag wins over the environment, the \
         environment over the file. `murmur doctor` shows every value and where it comes from.\n\n",
        "Exit codes:\n  0 done, 1 failed, 2 wrong use, 3 not found, 4 no space, 5 unavailable or refused, 6 damaged data, 130 interrupted"
    )
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Where all state of this node lives; several nodes can run on one machine, each with its own
    #[arg(long, global = true, env = "MURMUR_DATA_DIR", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) data_dir: Option<PathBuf>,
    /// The configuration file [default: config.toml in the data directory]
    #[arg(long, global = true, env = "MURMUR_CONFIG", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,
    /// Where the API listens (serve, client), or is looked for (status, top, run, bench, mesh)
    #[arg(long, global = true, env = "MURMUR_API", value_name = "ADDR:PORT", default_value = DEFAULT_API)]
    pub(crate) api: SocketAddr,
    /// A key that the API demands (serve, client) or is given (status, top, run, bench, mesh); needed when it listens beyond this machine
    #[arg(long, global = true, env = "MURMUR_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Machine-readable output
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Log more; again for still more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Say nothing but results and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// What to log, part by part, such as info,murmur_node=debug
    #[arg(long, global = true, env = "MURMUR_LOG", value_name = "FILTER", hide_short_help = true)]
    pub(crate) log: Option<String>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Offer models over the API on this machine
    Serve(Box<Serve>),
    /// Use the models of a mesh over the API on this machine, without offering any
    Client(mesh::Client),
    /// Chat with a model in the terminal, or continue a prompt
    Run(Run),
    /// The models on this machine
    #[command(subcommand)]
    Models(Models),
    /// The mesh of this node: who is in it, and who may come in
    #[command(subcommand)]
    Mesh(mesh::Mesh),
    /// Run what a mesh of one's own needs where everybody reaches it: a Nostr relay and a relay between nodes
    Seed(mesh::Seed),
    /// What the running server does
    Status,
    /// Watch the running server and its mesh: requests, models, other nodes, tokens per second
    Top(Top),
    /// Check this machine, its way to other nodes and the settings
    Doctor(mesh::Doctor),
    /// Measure tokens per second
    Bench(Bench),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    Man {
        /// Write the pages of all commands into this directory instead
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: Option<PathBuf>,
    },
}

/// How a model runs on this machine.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine options")]
pub(crate) struct EngineArgs {
    /// Run each model as so many layer ranges, each in a process of its own
    #[arg(long, env = "MURMUR_STAGES", value_name = "N", default_value = "1", value_parser = value_parser!(u32).range(1..=512))]
    pub(crate) stages: u32,
    /// Threads that compute; auto measures, and measures again when the machine is busy
    #[arg(long, env = "MURMUR_THREADS", value_name = "N|auto", default_value = "auto")]
    pub(crate) threads: Threads,
    /// Tokens per request at most, prompt and answer together [default: the model's own, as far as memory allows]
    #[arg(long, env = "MURMUR_CTX", value_name = "N", value_parser = value_parser!(u32).range(1..=16_777_216))]
    pub(crate) ctx: Option<u32>,
    /// Requests that run at the same time; further ones wait
    #[arg(long, env = "MURMUR_PARALLEL", value_name = "N", default_value = "4", value_parser = value_parser!(u32).range(1..=256))]
    pub(crate) parallel: u32,
    /// Memory for models and contexts at most, such as 8GiB [default: what the machine has free]
    #[arg(long, env = "MURMUR_MAX_MEMORY", value_name = "SIZE")]
    pub(crate) max_memory: Option<Size>,
    /// Layers that a GPU computes, in builds with a back end for one; -1 for all
    #[arg(long, env = "MURMUR_GPU_LAYERS", value_name = "N", default_value = "-1", allow_negative_numbers = true, value_parser = value_parser!(i32).range(-1..=512))]
    pub(crate) gpu_layers: i32,
    /// Bit-equal results whatever the batch and the number of stages, at some cost in speed
    #[arg(long, env = "MURMUR_EXACT", value_name = "BOOL", default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    pub(crate) exact: bool,
    /// Guess the next tokens where that makes answers faster, and compare: off; lookup (what has followed the same words before); a
    /// smaller MODEL of the same vocabulary, which looks up as well; or auto (the smallest such model in the store or served here,
    /// if it has at most a quarter of the bytes; for a model that is spread over several machines else one that a node nearby serves);
    /// or peer:MODEL, one that a node of the mesh serves
    #[arg(long, env = "MURMUR_DRAFT", value_name = "off|lookup|auto|MODEL|peer:MODEL", default_value = "off")]
    pub(crate) draft: Draft,
    /// The part of the guesses of a MODEL, here or at a peer, that is spoilt, from 0 to 1, for tests and measurements; one that is here may
    /// then be as large as the other
    #[arg(long, value_name = "PART", hide = true, value_parser = part)]
    pub(crate) draft_spoilt: Option<f64>,
}

/// Who guesses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Draft {
    Off,
    Lookup,
    Auto,
    /// A model that another node serves under this name.
    Peer(String),
    Model(ModelRef),
}

impl FromStr for Draft {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        Ok(match text {
            "off" => Self::Off,
            "lookup" => Self::Lookup,
            "auto" => Self::Auto,
            model => match model.strip_prefix("peer:").filter(|name| !name.is_empty()) {
                Some(name) => Self::Peer(name.to_owned()),
                None => Self::Model(model.parse()?),
            },
        })
    }
}

/// `murmur serve`.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// What to serve: GGUF files, names from the store, or hf:owner/repo[:quant] [default: the store's only model]
    #[arg(value_name = "MODEL")]
    pub(crate) models: Vec<ModelRef>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    /// The name under which clients find a MODEL; once per MODEL, in the same order
    #[arg(long, env = "MURMUR_ALIAS", value_name = "NAME", value_delimiter = ',', help_heading = "Server options")]
    pub(crate) alias: Vec<ModelName>,
    /// Offer all other models of the store as well, each loaded when somebody asks for it and there is room
    #[arg(long, env = "MURMUR_ON_DEMAND", value_name = "BOOL", default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, help_heading = "Server options")]
    pub(crate) on_demand: bool,
    /// Serve only what this key has signed: nothing else is fetched or loaded. A MODEL of this machine is refused unless what shows that lies beside
    /// it (`murmur models show`), one of the mesh unless a node shows it; so is the MODEL of --draft. What is not signed is not offered on demand
    #[arg(long, env = "MURMUR_SIGNED_BY", value_name = "KEY", help_heading = "Server options")]
    pub(crate) signed_by: Option<NodeId>,
    /// How long a model that was loaded on demand stays when nobody asks for it
    #[arg(long, env = "MURMUR_IDLE", value_name = "TIME", default_value = "15m", help_heading = "Server options")]
    pub(crate) idle: Period,
    #[command(flatten)]
    pub(crate) mesh: mesh::MeshArgs,
    /// The smallest form in which hidden states of a model that is spread over the mesh may travel where a link is slow: f32 (exact),
    /// f16 or q8. Answers to this node's own requests may then differ from those of the whole model
    #[arg(long, env = "MURMUR_CODEC", value_name = "CODEC", default_value = "f32", value_parser = codec, help_heading = "Mesh options")]
    pub(crate) codec: Codec,
    /// Have another node stand by for each part of a model that is spread over the mesh, where one has room for it: when a node is
    /// lost, this node's answers then go on after a moment. It takes the memory of that part a second time
    #[arg(long, env = "MURMUR_STANDBY", value_name = "BOOL", default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true, help_heading = "Mesh options")]
    pub(crate) standby: bool,
    #[command(flatten)]
    pub(crate) ring: mesh::RingArgs,
    #[command(flatten)]
    pub(crate) limits: mesh::LimitArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

fn codec(text: &str) -> Result<Codec, String> {
    let named = Codec::ALL.into_iter().find(|codec| codec.name() == text);
    named.ok_or_else(|| format!("no such codec; there are {}", Codec::ALL.map(Codec::name).join(", ")))
}

/// Who may use the API.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server options")]
pub(crate) struct ServerArgs {
    /// A web origin that may use the API, such as https://chat.example; may be repeated
    #[arg(long, env = "MURMUR_ALLOW_ORIGIN", value_name = "ORIGIN", value_delimiter = ',')]
    pub(crate) allow_origin: Vec<String>,
    /// A host name by which the API may be called, besides localhost and addresses; may be repeated
    #[arg(long, env = "MURMUR_ALLOW_HOST", value_name = "HOST", value_delimiter = ',')]
    pub(crate) allow_host: Vec<String>,
}

/// `murmur run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// A GGUF file, a name from the store or of the running server, or hf:owner/repo[:quant]
    pub(crate) model: ModelRef,
    /// What to say; without it, from standard input or in conversation
    pub(crate) prompt: Option<String>,
    /// Instructions that precede the conversation
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Continue the text as it is, without the model's chat template
    #[arg(long, conflicts_with = "system")]
    pub(crate) raw: bool,
    /// Tokens in an answer at most
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    /// How freely tokens are chosen; 0 always takes the likeliest
    #[arg(long, value_name = "X", value_parser = temperature)]
    pub(crate) temperature: Option<f32>,
    /// Same seed, same answer
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

/// `murmur models`.
#[derive(Debug, Subcommand)]
pub(crate) enum Models {
    /// List the models in the store
    Ls,
    /// Show what a model is: architecture, sizes, layers, checksums
    Show {
        /// A GGUF file, a name from the store, or hf:owner/repo[:quant] that was pulled
        model: ModelRef,
    },
    /// Add a GGUF file to the store, where it lies. A model in several files is joined into one, a copy
    Import {
        /// The file; of a model in several files (NAME-00001-of-00003.gguf), any of them
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// The name in the store [default: from the file's name]
        #[arg(long)]
        name: Option<ModelName>,
        /// Copy the file into the data directory
        #[arg(long)]
        copy: bool,
    },
    /// Write a made-up model with random weights, for tests and measurements: tiny ones of every architecture, and the
    /// shapes that the benchmarks use
    #[command(hide = true)]
    Synth {
        /// Which one, such as llama, qwen3moe, bert or bench-1b
        preset: String,
        /// The file to write
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Layers instead of its own
        #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=512))]
        layers: Option<u32>,
        /// Other weights
        #[arg(long, value_name = "N")]
        seed: Option<u64>,
    },
    /// Sign a model with the key of this machine's node: what is in its file, its licence and its source. Nodes of a mesh hand it on with
    /// the file, and others see who has signed it
    Sign {
        /// A GGUF file, a name from the store, or hf:owner/repo[:quant] that was pulled
        model: ModelRef,
    },
    /// Remove models from the store; files that were imported in place stay
    Rm {
        /// Names from the store
        #[arg(required = true)]
        names: Vec<ModelName>,
    },
    /// Download a model: from a hub (HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured), or from the nodes of the mesh that
    /// the running server is in; what both have comes from both. What an interrupted download has got is kept
    Pull {
        /// hf:owner/repo[@revision][:quant], where quant may also be a file of the repository; or the name of a model of the mesh
        model: ModelRef,
        /// The name in the store, for a model of a hub [default: from the file's name]
        #[arg(long)]
        name: Option<ModelName>,
        /// End the server's download of a model of the mesh
        #[arg(long, conflicts_with = "name")]
        stop: bool,
        /// Take it only from nodes of the mesh, and only if this key has signed it (murmur models sign tells the signer its key)
        #[arg(long, value_name = "KEY", conflicts_with_all = ["name", "stop"])]
        signed_by: Option<NodeId>,
    },
    /// Keep models whatever the quota
    Pin {
        /// Names from the store
        #[arg(required = true)]
        names: Vec<ModelName>,
        /// Let them go again when room is short
        #[arg(long)]
        off: bool,
    },
    /// Show or set how much of what was downloaded the store keeps. Before a download and in a running server, those that were not used
    /// for longest go to make room. What is pinned or in use stays, and so does every file that was not downloaded by murmur
    Quota {
        /// What may stay, such as 200GiB, or none for any amount; what is too much goes at once [default: show it]
        quota: Option<Quota>,
    },
    /// Remove what was downloaded from nodes and hubs, those that are not whole and those that were not used for longest first, until
    /// the rest takes no more than the quota. What is pinned or in use stays, and so does every file that was not downloaded by murmur
    Gc {
        /// What may stay, such as 50GiB [default: the quota of the store; nothing, where it has none]
        #[arg(long, value_name = "SIZE")]
        quota: Option<Size>,
    },
    /// Read all files of the store through and compare them with their digests
    Fsck,
    /// List the model files that the nodes of the mesh have, of which the running server is one; or look on a hub
    Search {
        /// Only those with this in their name
        text: Option<String>,
        /// Look on the hub (HF_ENDPOINT) instead: repositories with GGUF files, what each has, and whether it fits this machine
        #[arg(long, requires = "text")]
        hub: bool,
        /// Repositories of the hub that are shown at most
        #[arg(long, value_name = "N", default_value = "10", requires = "hub", value_parser = value_parser!(u16).range(1..=HUB_SEARCH_MAX as i64))]
        limit: u16,
    },
    /// List models that are good for their size, and which of them this machine can run
    Recommended {
        /// For a machine with so much memory to spare, such as 16GiB [default: what this one has free]
        #[arg(long, value_name = "SIZE")]
        memory: Option<Size>,
    },
}

/// What may stay of what was downloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quota {
    Unlimited,
    Bytes(u64),
}

impl FromStr for Quota {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::Unlimited),
            size => Ok(Self::Bytes(size.parse::<Size>().map_err(|why| format!("{why}, or none"))?.0)),
        }
    }
}

/// `murmur top`.
#[derive(Debug, Args)]
pub(crate) struct Top {
    /// Look once, and print what is seen; so does --json, and so does a standard output that is no terminal
    #[arg(long)]
    pub(crate) once: bool,
}

/// `murmur bench`.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// A model of the running server, or one to start for this [default: the server's only model]
    pub(crate) model: Option<ModelRef>,
    /// Prompt tokens per request
    #[arg(long, value_name = "N", default_value = "512", value_parser = value_parser!(u32).range(1..=1_048_576))]
    pub(crate) prompt_tokens: u32,
    /// Tokens to generate per request
    #[arg(long, value_name = "N", default_value = "64", value_parser = value_parser!(u32).range(2..=1_048_576))]
    pub(crate) max_tokens: u32,
    /// Streams at the same time, one measurement each
    #[arg(long, value_name = "N,...", default_value = "1,4", value_delimiter = ',', value_parser = value_parser!(u32).range(1..=256))]
    pub(crate) concurrency: Vec<u32>,
    /// Measurements per level; the median is shown
    #[arg(long, value_name = "N", default_value = "3", value_parser = value_parser!(u32).range(1..=100))]
    pub(crate) repeat: u32,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
}

fn part(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(part) if (0.0..=1.0).contains(&part) => Ok(part),
        _ => Err("write a number from 0 to 1".to_owned()),
    }
}

fn temperature(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if (0.0..=100.0).contains(&value) => Ok(value),
        _ => Err("write a number from 0 to 100".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_environment_variable_is_named_after_its_flag() {
        fn check(command: &clap::Command) {
            for arg in command.get_arguments() {
                let Some(env) = arg.get_env() else { continue };
                let flag = arg.get_long().unwrap();
                assert_eq!(env.to_str().unwrap(), format!("MURMUR_{}", flag.replace('-', "_").to_ascii_uppercase()));
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn who_guesses_is_a_word_or_a_model() {
        let draft = |text: &str| text.parse::<Draft>().unwrap();
        assert_eq!([draft("off"), draft("lookup"), draft("auto")], [Draft::Off, Draft::Lookup, Draft::Auto]);
        assert_eq!(draft("peer:small:q4"), Draft::Peer("small:q4".to_owned()));
        assert!(matches!(draft("./auto"), Draft::Model(ModelRef::Path(_))));
        assert!(matches!(draft("small-q4"), Draft::Model(ModelRef::Name(_))));
        assert!(matches!(draft("hf:owner/repo:Q4_0"), Draft::Model(ModelRef::Hub(_))));
        assert!("".parse::<Draft>().is_err());
    }

    #[test]
    fn a_quota_is_a_size_or_none() {
        assert_eq!("none".parse(), Ok(Quota::Unlimited));
        assert_eq!("200G".parse(), Ok(Quota::Bytes(200 << 30)));
        assert!("lots".parse::<Quota>().unwrap_err().contains("or none"));
        assert!("0".parse::<Quota>().is_err());
    }

    #[test]
    fn every_flag_and_command_has_help() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{} of {}", arg.get_id(), command.get_name());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }
}
