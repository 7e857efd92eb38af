//! Flags and commands of the mesh.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use clap::{Args, Subcommand, ValueEnum, value_parser};
use murmur_api::backend::{PlanPin, RingWishes, node_digits, region};
use murmur_api::limits::{MAX_INVITE_USES, MAX_PLAN_KEEP_ENDS, MAX_PLAN_RTT_MS, MAX_PLAN_STREAMS, MAX_PLAN_TOKENS};
use murmur_net::Relays;
use murmur_node::sharing::{Sharing, Window};
use murmur_protocol::mesh::{Role, SignedTicket, ticket::MESH_NAME_BYTES_MAX};

use super::ServerArgs;
use crate::units::{Period, Size};

/// How a node takes part in a mesh.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Mesh options")]
pub(crate) struct MeshArgs {
    /// The mesh: a private one of which this node is a member, by name or id, or else the public one of this name
    #[arg(long, env = "MURMUR_MESH", value_name = "NAME")]
    pub(crate) mesh: Option<MeshName>,
    /// A ticket from `murmur mesh invite`: join the mesh that it leads into
    #[arg(long, env = "MURMUR_JOIN", value_name = "TICKET", hide_env_values = true)]
    pub(crate) join: Option<SignedTicket>,
    /// A Nostr relay on which to find and be found; may be repeated [default: the public relay.damus.io, nos.lol and relay.primal.net]
    #[arg(long, env = "MURMUR_NOSTR_RELAY", value_name = "URL", value_delimiter = ',')]
    pub(crate) nostr_relay: Vec<String>,
    /// Find nobody through Nostr, and publish nothing there
    #[arg(long, env = "MURMUR_NO_NOSTR", value_name = "BOOL", default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    pub(crate) no_nostr: bool,
    /// Find nobody on the local network, and say nothing there
    #[arg(long, env = "MURMUR_NO_MDNS", value_name = "BOOL", default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    pub(crate) no_mdns: bool,
    /// Look in the DHT of BitTorrent for nodes that are not where they were, and say there where this one is: whoever knows its
    /// id then learns its addresses
    #[arg(long, env = "MURMUR_DHT", value_name = "BOOL", default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    pub(crate) dht: bool,
    /// Where the DHT begins, HOST:PORT; may be repeated [default: where BitTorrent's does]
    #[arg(long, env = "MURMUR_DHT_NODE", value_name = "HOST:PORT", value_delimiter = ',', requires = "dht")]
    pub(crate) dht_node: Vec<String>,
    /// The relay that carries what cannot go directly: its URL (several with commas), none, or default for public ones
    #[arg(long, env = "MURMUR_RELAY", value_name = "URL|none|default", default_value = "default")]
    pub(crate) relay: RelayChoice,
    /// How long a request waits for a node that takes it, or takes it over, before it fails
    #[arg(long, env = "MURMUR_WAIT", value_name = "TIME", default_value = "30s")]
    pub(crate) wait: Period,
    /// Ask the hub for nothing because other nodes say that it is there: what they have comes from them alone. A model that you name as
    /// hf:owner/repo yourself is looked for on the hub all the same
    #[arg(long, env = "MURMUR_NO_HUB", value_name = "BOOL", default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    pub(crate) no_hub: bool,
    /// Where other nodes reach this one, over UDP [default: any port on all interfaces]
    #[arg(long, env = "MURMUR_BIND", value_name = "ADDR:PORT")]
    pub(crate) bind: Option<SocketAddr>,
}

/// What other nodes may have of a node that serves. Its own user is not limited.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits for other nodes")]
pub(crate) struct LimitArgs {
    /// When requests of other nodes are taken, in local time, such as 22-7 or 12:30-13:30; may be repeated [default: always]
    #[arg(long, env = "MURMUR_HOURS", value_name = "FROM-TO", value_delimiter = ',')]
    pub(crate) hours: Vec<Window>,
    /// Requests of other nodes at the same time, at most [default: as many as run here]
    #[arg(long, env = "MURMUR_MAX_REQUESTS", value_name = "N", value_parser = value_parser!(u32).range(1..=4096))]
    pub(crate) max_requests: Option<u32>,
    /// Hold so many layers of one model at most. A larger model is spread over the nodes of the mesh that serve it, as is one
    /// that does not fit into memory [default: as many as fit]
    #[arg(long, env = "MURMUR_MAX_LAYERS", value_name = "N", value_parser = value_parser!(u32).range(1..))]
    pub(crate) max_layers: Option<u32>,
    /// Where this machine is, for those who want layers of their models only in some regions: any name that the nodes of the mesh
    /// agree on, such as eu-north [default: not said]
    #[arg(long, env = "MURMUR_REGION", value_name = "NAME", value_parser = region)]
    pub(crate) region: Option<String>,
    /// Hand out no files of models to other nodes, only answers
    #[arg(long, env = "MURMUR_KEEP_FILES", value_name = "BOOL", default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    pub(crate) keep_files: bool,
    /// Send so many bytes of model files a second at most, such as 2MiB [default: as many as go]
    #[arg(long, env = "MURMUR_MAX_UPLOAD", value_name = "SIZE")]
    pub(crate) max_upload: Option<Size>,
    /// Fetch so many bytes of model files a second at most [default: as many as come]
    #[arg(long, env = "MURMUR_MAX_DOWNLOAD", value_name = "SIZE")]
    pub(crate) max_download: Option<Size>,
    /// Take nothing new of other nodes while this machine is used. It is when, within the last minute, other programs had more
    /// than a tenth of its processors (and at least half of one) on average over 10 s, or something was typed in a terminal
    #[arg(long, env = "MURMUR_PAUSE_WHEN_ACTIVE", value_name = "BOOL", default_value = "false", default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    pub(crate) pause_when_active: bool,
}

impl LimitArgs {
    pub(crate) fn sharing(&self) -> Sharing {
        Sharing {
            hours: self.hours.clone(),
            requests_max: self.max_requests,
            pause_when_active: self.pause_when_active,
        }
    }
}

/// `murmur client`.
#[derive(Debug, Args)]
pub(crate) struct Client {
    #[command(flatten)]
    pub(crate) mesh: MeshArgs,
    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// `murmur doctor`.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    #[command(flatten)]
    pub(crate) mesh: MeshArgs,
}

/// `murmur mesh`.
#[derive(Debug, Subcommand)]
pub(crate) enum Mesh {
    /// Found a private mesh, whose key stays on this node
    Create {
        /// How people call it
        name: MeshName,
    },
    /// Make a ticket that leads others into the mesh of the running node
    Invite {
        /// How long the ticket counts, such as 30m, 24h or 7d
        #[arg(long, value_name = "TIME", default_value = "24h")]
        valid: Period,
        /// How many nodes may come in with it; private meshes only [default: any number, until it expires]
        #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=MAX_INVITE_USES))]
        uses: Option<u32>,
        /// What its bearer may be: a worker offers models, a client only asks
        #[arg(long, value_name = "ROLE", default_value = "worker")]
        role: InvitedRole,
    },
    /// Show the running node another way into its mesh
    Join {
        /// A ticket for the same mesh
        ticket: SignedTicket,
    },
    /// Give up the membership in a private mesh
    Leave {
        /// Name or id of the mesh
        name: MeshName,
        /// Also on the node that founded it: nobody can be invited or revoked any more
        #[arg(long)]
        give_up_key: bool,
    },
    /// List the other nodes of the mesh
    Peers,
    /// Show the ring that the running node would make for a model that is spread over the mesh, and what it would cost; or why
    /// there is none
    Plan(RingPlan),
    /// Show this node, its mesh and its memberships
    Show,
    /// End a ticket, or a node's membership, for ever
    Revoke {
        /// Id of a ticket or node; the first digits of a node's id are enough where they are unique
        id: String,
    },
}

/// `murmur mesh plan`.
#[derive(Debug, Args)]
pub(crate) struct RingPlan {
    /// Name of a model that the running node serves
    pub(crate) model: String,
    /// Tokens per request, prompt and answer together [default: as the node has it]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=MAX_PLAN_TOKENS))]
    pub(crate) ctx: Option<u32>,
    /// Requests of full length at once [default: as the node has it]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=MAX_PLAN_STREAMS))]
    pub(crate) streams: Option<u32>,
    /// Length of the prompt for which the time of the first token is predicted
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=MAX_PLAN_TOKENS))]
    pub(crate) prompt_tokens: Option<u32>,
    #[command(flatten)]
    pub(crate) ring: RingArgs,
}

/// What the rings of a node are to be like, or one that it is asked about.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options for models that are spread over the mesh")]
pub(crate) struct RingArgs {
    /// So many layers at either end stay on the node whose requests go around, so that nobody else chooses its tokens; those between still get token ids
    #[arg(long, env = "MURMUR_KEEP_ENDS", value_name = "N", value_parser = value_parser!(u32).range(..=MAX_PLAN_KEEP_ENDS))]
    pub(crate) keep_ends: Option<u32>,
    /// Most tokens per second of all requests together, instead of least time per token of one
    #[arg(long, env = "MURMUR_MANY_STREAMS", value_name = "BOOL", default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    pub(crate) many_streams: Option<bool>,
    /// A node that must not be used: the first digits of its id; may be repeated
    #[arg(long, env = "MURMUR_EXCLUDE", value_name = "ID", value_delimiter = ',', value_parser = node_digits)]
    pub(crate) exclude: Vec<String>,
    /// A node that must be used: the first digits of its id, with its layers if it matters, such as 0123ab:0-8, the second
    /// number being the layer after the last; may be repeated
    #[arg(long, env = "MURMUR_PIN", value_name = "ID[:FIRST-END]", value_delimiter = ',')]
    pub(crate) pin: Vec<PlanPin>,
    /// Longest round trip between neighbours in the ring, such as 20ms or 0.5s
    #[arg(long, env = "MURMUR_MAX_RTT", value_name = "TIME")]
    pub(crate) max_rtt: Option<RoundTrip>,
    /// Only nodes that say they are in this region (`--region`) hold layers, also of this one; may be repeated
    #[arg(long, env = "MURMUR_ONLY_REGION", value_name = "NAME", value_delimiter = ',', value_parser = region)]
    pub(crate) only_region: Vec<String>,
}

impl RingArgs {
    pub(crate) fn wishes(&self) -> RingWishes {
        RingWishes {
            keep_ends: self.keep_ends,
            many_streams: self.many_streams,
            exclude: self.exclude.clone(),
            pin: self.pin.clone(),
            rtt_max: self.max_rtt.map(|rtt| Duration::from_secs_f64(rtt.ms / 1e3)),
            only_region: self.only_region.clone(),
        }
    }
}

/// A time, written `20`, `20ms` or `0.5s`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RoundTrip {
    pub(crate) ms: f64,
}

impl FromStr for RoundTrip {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit_ms) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
            (Some(ms), _) => (ms, 1.0),
            (None, Some(seconds)) => (seconds, 1e3),
            (None, None) => (text, 1.0),
        };
        match number.parse::<f64>().map(|number| number * unit_ms) {
            Ok(ms) if (0.0..=MAX_PLAN_RTT_MS).contains(&ms) => Ok(Self { ms }),
            _ => Err(format!("write for instance 20ms or 0.5s, at most {MAX_PLAN_RTT_MS} ms")),
        }
    }
}

/// What the bearer of a ticket becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum InvitedRole {
    /// Offers models, and asks others
    Worker,
    /// Asks only
    Client,
}

impl InvitedRole {
    /// As the API calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Worker => Role::Worker.name(),
            Self::Client => Role::Client.name(),
        }
    }
}

/// `murmur seed`.
#[derive(Debug, Args)]
pub(crate) struct Seed {
    /// The address to listen on; 0.0.0.0 for every machine that can reach this one
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub(crate) bind: IpAddr,
    /// The name or address by which others reach this machine [default: that of --bind]
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<String>,
    /// TCP port of the Nostr relay; 0 for any
    #[arg(long, value_name = "N", default_value = "6878")]
    pub(crate) nostr_port: u16,
    /// Port of the relay between nodes: TCP, and UDP to tell nodes how they look from outside; 0 for any
    #[arg(long, value_name = "N", default_value = "6879")]
    pub(crate) relay_port: u16,
    /// Also be a node of this mesh, to whom others can always come: a private one of which this node is a member, by name or id,
    /// or else the public one of this name
    #[arg(long, env = "MURMUR_MESH", value_name = "NAME")]
    pub(crate) mesh: Option<MeshName>,
    /// A ticket from `murmur mesh invite`: also be a node of the mesh that it leads into
    #[arg(long, env = "MURMUR_JOIN", value_name = "TICKET", hide_env_values = true)]
    pub(crate) join: Option<SignedTicket>,
    /// UDP port of that node; 0 for any
    #[arg(long, value_name = "N", default_value = "6880")]
    pub(crate) node_port: u16,
}

/// A mesh's name that can stand in a ticket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MeshName(pub(crate) String);

impl FromStr for MeshName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > MESH_NAME_BYTES_MAX || text.chars().any(char::is_control) {
            return Err(format!("a mesh's name has 1 to {MESH_NAME_BYTES_MAX} bytes and no control characters"));
        }
        Ok(Self(text.to_owned()))
    }
}

/// The relays to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RelayChoice(pub(crate) Relays);

impl FromStr for RelayChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "default" => return Ok(Self(Relays::Public)),
            "none" => return Ok(Self(Relays::None)),
            _ => {}
        }
        let urls: Vec<String> = text.split(',').map(|url| url.trim().to_owned()).collect();
        match urls.iter().find(|url| !url.starts_with("https://") && !url.starts_with("http://")) {
            None => Ok(Self(Relays::Own(urls))),
            Some(_) => Err("write the relay's URL, such as https://relay.example, or none, or default".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relays_are_urls_none_or_the_public_ones() {
        let read = |text: &str| text.parse::<RelayChoice>().map(|choice| choice.0);
        assert_eq!(read("default"), Ok(Relays::Public));
        assert_eq!(read("none"), Ok(Relays::None));
        let own = vec!["https://a.example".to_owned(), "http://10.0.0.1:3340".to_owned()];
        assert_eq!(read("https://a.example, http://10.0.0.1:3340"), Ok(Relays::Own(own)));
        for text in ["", "a.example", "wss://a.example", "https://a.example,b"] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn round_trips_are_milliseconds_or_have_a_unit() {
        for (text, ms) in [("20", 20.0), ("2.5ms", 2.5), ("0.5s", 500.0), ("0", 0.0)] {
            assert_eq!(text.parse(), Ok(RoundTrip { ms }), "{text}");
        }
        for text in ["", "ms", "s", "-1", "nan", "inf", "20us", "61s", "1e9"] {
            assert!(text.parse::<RoundTrip>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_that_cannot_stand_in_a_ticket_are_no_names() {
        assert!("Wohngemeinschaft Küche".parse::<MeshName>().is_ok());
        for text in ["", "a\nb", &"x".repeat(MESH_NAME_BYTES_MAX + 1)] {
            assert!(text.parse::<MeshName>().is_err(), "{text}");
        }
    }
}
