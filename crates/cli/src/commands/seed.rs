//! `murmur seed`: the services of a mesh of one's own, and a node to which others can always come, until told to stop.

use std::net::SocketAddr;

use murmur_net::{EndpointOptions, Invitation, Mesh, MeshChoice, MeshOptions, Relays, SeedOptions};
use murmur_protocol::mesh::Role;
use serde_json::json;

use super::{Session, node_runtime, server::wait_for_stop};
use crate::{
    args::mesh::Seed,
    membership::{self, DataLock},
    ui,
};

/// How long the ticket counts that a seed of a public mesh shows: a month. It shows a new one whenever it starts.
const TICKET_VALID_MS: u64 = 30 * 24 * 3_600_000;

pub(super) fn run(session: &Session, args: &Seed) -> anyhow::Result<()> {
    let choice = membership::choice(&session.data_dir, args.join.as_ref(), args.mesh.as_ref())?;
    let _lock = choice.is_some().then(|| DataLock::take(&session.data_dir)).transpose()?;
    let options = SeedOptions {
        ip: args.bind,
        host: args.host.clone(),
        nostr_port: args.nostr_port,
        relay_port: args.relay_port,
    };
    node_runtime()?.block_on(async {
        let seed = murmur_net::Seed::start(options).await?;
        let node = match choice {
            Some(choice) => Some(Mesh::start(node_options(session, args, &seed, choice)).await?),
            None => None,
        };
        tell(session, args, &seed, node.as_ref()).await?;
        wait_for_stop().await;
        if let Some(node) = node {
            node.leave().await;
        }
        Ok(seed.shutdown().await?)
    })
}

/// A node that offers nothing, and is there. It needs no relay but its own, and tells others of that only if they can reach it.
fn node_options(session: &Session, args: &Seed, seed: &murmur_net::Seed, choice: MeshChoice) -> MeshOptions {
    let relays = match &args.host {
        None if args.bind.is_unspecified() => Relays::None,
        _ => Relays::Own(vec![seed.relay_url().to_owned()]),
    };
    let bind = Some(SocketAddr::new(args.bind, args.node_port));
    let mut options = MeshOptions::new(&session.data_dir, choice);
    options.endpoint = EndpointOptions { relays, bind, dht: None };
    options.mdns = true;
    options.nostr = vec![seed.nostr_url().to_owned()];
    options.own.role = Role::Client;
    options
}

async fn tell(session: &Session, args: &Seed, seed: &murmur_net::Seed, node: Option<&Mesh>) -> anyhow::Result<()> {
    let (nostr, relay) = (seed.nostr_url(), seed.relay_url());
    let ticket = match node {
        // Into a private mesh its founder lets people, one by one.
        Some(node) if !node.is_private() => {
            let invitation = Invitation { role: Role::Worker, valid_ms: TICKET_VALID_MS, uses: None };
            Some(node.invite(&invitation).await?.to_string())
        }
        _ => None,
    };
    if session.global.json {
        let node = node.map(|node| node.node_id().to_string());
        let ready = json!({"event": "ready", "nostr": nostr, "relay": relay, "node": node, "ticket": ticket});
        return ui::print(&format!("{ready}\n"));
    }
    ui::print(&format!("Nostr relay  {nostr}\nrelay        {relay}\n"))?;
    if let Some(node) = node {
        let mesh = ui::without_controls(node.mesh_name());
        ui::print(&format!("node         {} in mesh {mesh}\n", node.node_id()))?;
    }
    if let Some(ticket) = &ticket {
        ui::print(&format!("ticket       {ticket}\n"))?;
    }
    if session.global.quiet {
        return Ok(());
    }
    ui::say(&format!("nodes use it with: --nostr-relay {nostr} --relay {relay}"));
    if ticket.is_some() {
        ui::say("within 30 days the ticket leads to it without Nostr: --join TICKET");
    }
    if args.bind.is_unspecified() && args.host.is_none() {
        ui::say(&format!(
            "in place of {} goes an address or a name of this machine that others reach (--host)",
            args.bind
        ));
    } else if args.bind.is_loopback() {
        ui::say("only this machine reaches it; --bind 0.0.0.0 lets others in");
    }
    ui::say("Ctrl-C ends it");
    Ok(())
}
