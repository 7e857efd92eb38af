//! `murmur seed`: the services of a mesh of one's own, until told to stop.

use murmur_net::SeedOptions;
use serde_json::json;

use super::{Session, node_runtime, server::wait_for_stop};
use crate::{args::mesh::Seed, ui};

pub(super) fn run(session: &Session, args: &Seed) -> anyhow::Result<()> {
    let options = SeedOptions { ip: args.bind, nostr_port: args.nostr_port, relay_port: args.relay_port };
    node_runtime()?.block_on(async {
        let seed = murmur_net::Seed::start(options).await?;
        tell(session, args, seed.nostr_url(), seed.relay_url())?;
        wait_for_stop().await;
        Ok(seed.shutdown().await?)
    })
}

fn tell(session: &Session, args: &Seed, nostr: &str, relay: &str) -> anyhow::Result<()> {
    if session.global.json {
        return ui::print(&format!("{}\n", json!({"event": "ready", "nostr": nostr, "relay": relay})));
    }
    ui::print(&format!("Nostr relay  {nostr}\nrelay        {relay}\n"))?;
    if session.global.quiet {
        return Ok(());
    }
    ui::say(&format!("nodes use it with: --nostr-relay {nostr} --relay {relay}"));
    if args.bind.is_unspecified() {
        ui::say(&format!("in place of {} goes an address or a name of this machine that others reach", args.bind));
    } else if args.bind.is_loopback() {
        ui::say("only this machine reaches it; --bind 0.0.0.0 lets others in");
    }
    ui::say("Ctrl-C ends it");
    Ok(())
}
