//! Which mesh a node is to be in, read off its flags and its data directory.
//!
//! Private meshes come first: a name that this node is a member under means that mesh, and never a public one that
//! happens to be called the same. A data directory holds a node's identity, so one running node has it at a time.

use std::{
    fs::{self, File, TryLockError},
    path::Path,
};

use anyhow::Context;
use murmur_net::{Credentials, Dht, EndpointOptions, MeshChoice, MeshOptions};
use murmur_protocol::mesh::{MeshId, NodeId, SignedTicket};

use crate::{
    args::mesh::{MeshArgs, MeshName},
    exit::{Code, Failure},
};

/// Where nodes find each other unless told otherwise: three of the most used public Nostr relays, each run by somebody
/// else, any one of which is enough.
pub(crate) const PUBLIC_NOSTR_RELAYS: [&str; 3] = ["wss://relay.damus.io", "wss://nos.lol", "wss://relay.primal.net"];

/// Held by the node of a data directory that is in a mesh.
const LOCK_FILE: &str = "mesh.lock";

/// How to take part in the mesh that the flags name; `None`: they name none.
pub(crate) fn wanted(data_dir: &Path, args: &MeshArgs) -> anyhow::Result<Option<MeshOptions>> {
    let choice = choice(data_dir, args.join.as_ref(), args.mesh.as_ref())?;
    Ok(choice.map(|choice| options(data_dir, args, choice)))
}

/// The mesh that a ticket or a name means, or both together; `None`: neither is there.
pub(crate) fn choice(
    data_dir: &Path,
    ticket: Option<&SignedTicket>,
    name: Option<&MeshName>,
) -> anyhow::Result<Option<MeshChoice>> {
    match (ticket, name) {
        (None, None) => Ok(None),
        (Some(ticket), name) => by_ticket(ticket, name).map(Some),
        (None, Some(name)) => by_name(data_dir, name).map(Some),
    }
}

/// As [`wanted`]; where no mesh is named, the only one of which this node is a member.
pub(crate) fn wanted_or_only(data_dir: &Path, args: &MeshArgs) -> anyhow::Result<MeshOptions> {
    if let Some(wanted) = wanted(data_dir, args)? {
        return Ok(wanted);
    }
    let mut all = Credentials::all(data_dir)?;
    match (all.pop(), all.is_empty()) {
        (Some(only), true) => Ok(options(data_dir, args, MeshChoice::Private(only))),
        (None, _) => Err(Failure::because(
            Code::Usage,
            "a client needs a mesh. Name one with --mesh NAME, or join one with --join TICKET, which \
             `murmur mesh invite` makes on a node that is in it",
        )),
        (Some(last), false) => {
            let names: Vec<String> = all.iter().chain([&last]).map(|member| member.name.clone()).collect();
            Err(Failure::because(
                Code::Usage,
                format!("this node is a member of several meshes: {}. Name one with --mesh", names.join(", ")),
            ))
        }
    }
}

/// The membership in the private mesh of this name or id, if there is one.
pub(crate) fn find(data_dir: &Path, name: &MeshName) -> anyhow::Result<Option<Credentials>> {
    let id: Option<MeshId> = name.0.parse().ok();
    let mut found = Credentials::all(data_dir)?;
    found.retain(|member| Some(member.mesh) == id || member.name == name.0);
    match (found.pop(), found.is_empty()) {
        (found, true) => Ok(found),
        (last, false) => {
            let ids: Vec<String> = found.iter().chain(&last).map(|member| member.mesh.to_string()).collect();
            Err(Failure::because(
                Code::Usage,
                format!(
                    "this node is a member of several meshes called {}. Give the id instead: {}",
                    name.0,
                    ids.join(" or ")
                ),
            ))
        }
    }
}

fn by_ticket(ticket: &SignedTicket, name: Option<&MeshName>) -> anyhow::Result<MeshChoice> {
    let leads_to = ticket.ticket();
    match name {
        Some(name) if name.0 != leads_to.mesh_name && name.0 != leads_to.mesh.to_string() => Err(Failure::because(
            Code::Usage,
            format!(
                "the ticket leads into mesh {}, not into {}. Leave --mesh or --join out",
                leads_to.mesh_name, name.0
            ),
        )),
        _ => Ok(MeshChoice::Ticket(ticket.clone())),
    }
}

fn by_name(data_dir: &Path, name: &MeshName) -> anyhow::Result<MeshChoice> {
    if let Some(credentials) = find(data_dir, name)? {
        return Ok(MeshChoice::Private(credentials));
    }
    // Nobody means a public mesh whose name looks like that.
    if name.0.parse::<MeshId>().is_ok() {
        return Err(Failure::because(
            Code::NotFound,
            format!("this node is no member of mesh {}. Join it with --join TICKET", name.0),
        ));
    }
    Ok(MeshChoice::Public(name.0.clone()))
}

/// The Nostr relays that the flags mean.
pub(crate) fn nostr_relays(args: &MeshArgs) -> Vec<String> {
    match (args.no_nostr, args.nostr_relay.is_empty()) {
        (true, _) => Vec::new(),
        (false, false) => args.nostr_relay.clone(),
        (false, true) => PUBLIC_NOSTR_RELAYS.map(str::to_owned).into(),
    }
}

/// The DHT that the flags mean.
fn dht(args: &MeshArgs) -> Option<Dht> {
    args.dht.then(|| match args.dht_node.is_empty() {
        true => Dht::Public,
        false => Dht::Own(args.dht_node.clone()),
    })
}

fn options(data_dir: &Path, args: &MeshArgs, mesh: MeshChoice) -> MeshOptions {
    MeshOptions {
        endpoint: EndpointOptions { relays: args.relay.0.clone(), bind: args.bind, dht: dht(args) },
        mdns: !args.no_mdns,
        nostr: nostr_relays(args),
        ..MeshOptions::new(data_dir, mesh)
    }
}

/// The node of a data directory, where it has been in or near a mesh before.
pub(crate) fn own_node(data_dir: &Path) -> anyhow::Result<Option<NodeId>> {
    use murmur_net::endpoint::KEY_FILE;
    match data_dir.join(KEY_FILE).exists() {
        true => Ok(Some(murmur_net::node_key(data_dir)?.node_id())),
        false => Ok(None),
    }
}

/// The right to be the node of a data directory. Given back when it is dropped, or when the process ends.
#[derive(Debug)]
pub(crate) struct DataLock {
    _file: File,
}

impl DataLock {
    /// Takes it, or says who has it.
    pub(crate) fn take(data_dir: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(data_dir).with_context(|| format!("creating {}", data_dir.display()))?;
        let path = data_dir.join(LOCK_FILE);
        let file = File::create(&path).with_context(|| format!("opening {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Failure::because(
                Code::Unavailable,
                format!(
                    "another murmur node with the data directory {} is in a mesh. Use that one, end it, or give this \
                     one a directory of its own with --data-dir",
                    data_dir.display()
                ),
            )),
            Err(TryLockError::Error(error)) => {
                Err(anyhow::Error::from(error).context(format!("locking {}", path.display())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn mesh_args(arguments: &[&str]) -> MeshArgs {
        let cli = Cli::try_parse_from(["murmur", "client"].iter().chain(arguments)).unwrap();
        match cli.command {
            Command::Client(client) => client.mesh,
            other => panic!("{other:?}"),
        }
    }

    fn found(folder: &Path, name: &str) -> Credentials {
        let node = murmur_net::node_key(folder).unwrap().node_id();
        Credentials::found(folder, name, node).unwrap()
    }

    #[test]
    fn a_name_is_a_private_mesh_of_this_node_before_it_is_a_public_one() {
        let folder = tempfile::tempdir().unwrap();
        let choose = |name: &str| wanted(folder.path(), &mesh_args(&["--mesh", name])).unwrap().unwrap().mesh;
        assert!(matches!(choose("home"), MeshChoice::Public(name) if name == "home"));
        let home = found(folder.path(), "home");
        assert!(matches!(choose("home"), MeshChoice::Private(credentials) if credentials.mesh == home.mesh));
        let by_id = choose(&home.mesh.to_string());
        assert!(matches!(by_id, MeshChoice::Private(credentials) if credentials.mesh == home.mesh));
    }

    #[test]
    fn an_id_of_a_mesh_without_a_membership_is_not_taken_for_a_public_mesh() {
        let folder = tempfile::tempdir().unwrap();
        let error = wanted(folder.path(), &mesh_args(&["--mesh", &"ab".repeat(32)])).unwrap_err().to_string();
        assert!(error.contains("no member"), "{error}");
    }

    #[test]
    fn a_client_without_flags_takes_the_only_membership_and_asks_when_there_are_several() {
        let folder = tempfile::tempdir().unwrap();
        let choose = || wanted_or_only(folder.path(), &mesh_args(&[]));
        assert!(choose().unwrap_err().to_string().contains("--join TICKET"));
        let home = found(folder.path(), "home");
        assert!(matches!(choose().unwrap().mesh, MeshChoice::Private(credentials) if credentials.mesh == home.mesh));
        found(folder.path(), "lab");
        assert!(choose().unwrap_err().to_string().contains("several meshes"));
        found(folder.path(), "lab");
        let error = wanted(folder.path(), &mesh_args(&["--mesh", "lab"])).unwrap_err().to_string();
        assert!(error.contains("Give the id instead"), "{error}");
    }

    #[test]
    fn nostr_relays_are_public_ones_unless_some_are_named_or_none_are_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let nostr = |more: &[&str]| {
            let arguments = [&["--mesh", "x"], more].concat();
            wanted(folder.path(), &mesh_args(&arguments)).unwrap().unwrap().nostr
        };
        assert_eq!(nostr(&[]), PUBLIC_NOSTR_RELAYS);
        assert_eq!(nostr(&["--nostr-relay", "ws://a", "--nostr-relay", "ws://b"]), ["ws://a", "ws://b"]);
        assert!(nostr(&["--no-nostr", "--nostr-relay", "ws://a"]).is_empty());
    }

    #[test]
    fn the_help_names_the_public_nostr_relays() {
        use clap::CommandFactory;
        let mut command = Cli::command();
        let help = command.find_subcommand_mut("client").unwrap().render_long_help().to_string();
        for relay in PUBLIC_NOSTR_RELAYS {
            assert!(help.contains(relay.trim_start_matches("wss://")), "{relay}");
        }
    }

    #[test]
    fn one_node_at_a_time_has_a_data_directory() {
        let folder = tempfile::tempdir().unwrap();
        let lock = DataLock::take(folder.path()).unwrap();
        assert!(DataLock::take(folder.path()).unwrap_err().to_string().contains("--data-dir"));
        drop(lock);
        DataLock::take(folder.path()).unwrap();
    }
}
