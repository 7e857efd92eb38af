//! Can this machine's node be in a mesh, and how well: addresses, NAT, relays, clock, and what a running node has seen.
//!
//! A machine that is to be in no mesh contacts nobody, here as elsewhere.

use std::time::Duration;

use futures::future::join_all;
use murmur_net::{
    EndpointOptions, Relays,
    probe::{self, Answer, Nat, Network, Outside},
};
use serde_json::Value;

use super::{Check, Session};
use crate::{args::mesh::MeshArgs, client::ApiClient, membership, ui, units::human_duration};

/// A clock that is off by less is right.
const CLOCK_OFF_MS: u64 = 5_000;
/// A clock that is off by more keeps nodes from finding each other through Nostr.
const CLOCK_HARMFUL_MS: u64 = murmur_net::nostr::CLOCK_SKEW_S * 1_000;

pub(super) async fn checks(session: &Session, args: &MeshArgs) -> Vec<Check> {
    let mesh = session.client().get("/api/mesh").await.ok();
    if mesh.is_none() && !is_wanted(session, args) {
        let found = "none; this machine talks to no other";
        let advice = "To check the way to a mesh: murmur doctor --mesh NAME (or --relay URL, --nostr-relay URL).";
        return vec![Check { advice: advice.to_owned(), ..Check::ok("mesh", found) }];
    }
    let running = match &mesh {
        Some(mesh) => running(&session.client(), mesh).await,
        None => vec![Check::ok("mesh", "no node of a mesh is running here")],
    };
    let endpoint = EndpointOptions { relays: args.relay.0.clone(), bind: bind(args, mesh.is_some()), dht: None };
    let (relay_urls, nostr_urls) = (probe::relay_urls(&endpoint.relays), membership::nostr_relays(args));
    let asked = (
        probe::network(&endpoint),
        join_all(relay_urls.iter().map(|url| probe::relay(url))),
        join_all(nostr_urls.iter().map(|url| probe::nostr(url))),
    );
    let (network, relays, nostr) = tokio::join!(asked.0, asked.1, asked.2);
    let mut checks = running;
    match network {
        Ok(network) => {
            checks.push(own_addresses(&network));
            checks.extend(outside(&network, &endpoint.relays, relays.iter().any(Result::is_ok)));
        }
        Err(error) => checks.push(Check::fail(
            "UDP",
            format!("no socket for other nodes can be opened: {error}"),
            "Choose an address of this machine and a port that is free with --bind, or leave --bind out.",
        )),
    }
    checks.extend(answers("relay", &relay_urls, &relays, "--relay", "nodes that cannot reach each other directly"));
    checks.extend(answers("Nostr relay", &nostr_urls, &nostr, "--nostr-relay", "nodes that look for each other"));
    checks.push(clock(&relays, mesh.as_ref()));
    checks
}

/// Whether this machine is to be in a mesh, or the user asks after the way there.
fn is_wanted(session: &Session, args: &MeshArgs) -> bool {
    let is_member = murmur_net::Credentials::all(&session.data_dir).is_ok_and(|all| !all.is_empty());
    let names_relays = args.relay.0 != Relays::Public || !args.nostr_relay.is_empty();
    args.mesh.is_some() || args.join.is_some() || is_member || names_relays
}

/// Where to try; a running node has the port already, and another one shows as much.
fn bind(args: &MeshArgs, is_running: bool) -> Option<std::net::SocketAddr> {
    args.bind.map(|mut address| {
        if is_running {
            address.set_port(0);
        }
        address
    })
}

/// What the running node has seen of its mesh.
async fn running(client: &ApiClient, mesh: &Value) -> Vec<Check> {
    const NAME: &str = "mesh";
    let text = |key: &str| ui::without_controls(mesh.get(key).and_then(Value::as_str).unwrap_or_default());
    let peers = mesh.get("peers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let on_path = |kind: &str| {
        let paths = peers.iter().filter_map(|peer| peer.get("path").and_then(Value::as_str));
        paths.filter(|path| path.starts_with(kind)).count()
    };
    let (direct, relayed) = (on_path("direct"), on_path("relayed"));
    let found = format!(
        "the running node is in mesh {}; other nodes: {}, connections: {direct} direct, {relayed} through relays",
        text("name"),
        peers.len()
    );
    let mut checks = vec![match (peers.len(), direct, relayed) {
        (0, ..) => Check::warn(
            NAME,
            found,
            "Is another node running, in the same mesh? Both need a relay below in common, one local network, or a ticket.",
        ),
        (_, 0, 1..) => Check::warn(
            NAME,
            found,
            "No connection is direct, which is slower. A firewall may keep UDP out: let the port of --bind in, or forward it.",
        ),
        _ => Check::ok(NAME, found),
    }];
    if let Ok(status) = client.get("/api/status").await
        && let Some(reason) = status.pointer("/node/sharing/paused").and_then(Value::as_str)
    {
        let found = format!("the running node pauses for other nodes: {}", ui::without_controls(reason));
        checks.push(Check::warn(
            "sharing",
            found,
            "That is as --hours and --pause-when-active say; its own user is served.",
        ));
    }
    checks
}

/// The socket, and whether this machine reaches it at each of its addresses.
fn own_addresses(network: &Network) -> Check {
    const NAME: &str = "UDP";
    let reached = |(address, took): &(std::net::SocketAddr, Result<Duration, String>)| match took {
        Ok(took) => format!("{} in {}", address.ip(), human_duration(*took)),
        Err(reason) => format!("{} not at all ({reason})", address.ip()),
    };
    let addresses: Vec<String> = network.own.iter().map(reached).collect();
    let found = format!("this machine reaches itself over QUIC at {}", addresses.join(", "));
    if network.own.is_empty() {
        return Check::fail(NAME, "this machine has no address", "Connect it to a network.");
    }
    match network.own.iter().all(|(_, took)| took.is_ok()) {
        true => Check::ok(NAME, found),
        false => Check::fail(
            NAME,
            found,
            "A firewall on this machine drops UDP to its own addresses; let murmur receive UDP, or give --bind a port that may.",
        ),
    }
}

/// What relays say of the way out.
fn outside(network: &Network, relays: &Relays, some_answer: bool) -> Vec<Check> {
    const NAME: &str = "way out";
    let Some(outside) = &network.outside else {
        let why = match relays {
            Relays::None => "not checked, as no relay is wanted (--relay none)",
            _ => "no relay said how this machine looks from outside",
        };
        return vec![Check::ok(NAME, why)];
    };
    let mut checks = Vec::new();
    if outside.is_captive {
        checks.push(Check::warn(
            NAME,
            "this network answers in the place of others",
            "Log in to it with a web browser.",
        ));
    }
    let seen: Vec<String> = outside.seen_as.iter().map(ToString::to_string).collect();
    checks.push(match (seen.is_empty(), some_answer) {
        (false, _) => Check::ok(NAME, format!("UDP goes out; others see {}", seen.join(" and "))),
        (true, false) => Check::warn(
            NAME,
            "no relay answers: this machine is offline, or a firewall lets nothing out",
            "On a local network nodes find each other all the same. For others, let UDP and TCP port 443 out.",
        ),
        (true, true) => Check::warn(
            NAME,
            "relays answer over TCP and not over UDP",
            "A firewall keeps UDP in. Let it out for direct connections; until then everything goes through relays.",
        ),
    });
    checks.extend(nat(outside));
    checks
}

fn nat(outside: &Outside) -> Option<Check> {
    const NAME: &str = "NAT";
    if outside.seen_as.is_empty() {
        return None;
    }
    Some(match outside.nat {
        Nat::None => Check::ok(NAME, "none: others reach this machine at its own address, firewalls permitting"),
        Nat::Cone => Check::ok(NAME, "one outer address for all destinations: direct connections come about"),
        Nat::Symmetric => Check::warn(
            NAME,
            "symmetric: another outer address for each destination",
            "With others behind such a NAT there is no direct connection, only one through relays. Forward a UDP port to this \
             machine and give it to --bind, or turn on UPnP or NAT-PMP in the router.",
        ),
        Nat::Unknown => Check::ok(NAME, "its kind is not known: only one relay told an address"),
    })
}

/// One check per relay; dead ones matter less while another one answers.
fn answers(
    name: &'static str,
    urls: &[String],
    outcomes: &[Result<Answer, String>],
    flag: &str,
    whose: &str,
) -> Vec<Check> {
    let is_any = outcomes.iter().any(Result::is_ok);
    let one = |(url, outcome): (&String, &Result<Answer, String>)| match outcome {
        Ok(answer) => Check::ok(name, format!("{url} answers in {}", human_duration(answer.took))),
        Err(reason) if is_any => Check::warn(
            name,
            format!("{url} does not answer: {}", ui::without_controls(reason)),
            "Another one does, which is enough.",
        ),
        Err(reason) => Check::warn(
            name,
            format!("{url} does not answer: {}", ui::without_controls(reason)),
            format!("None does, so it is of no help to {whose}. Look at the network, or name another one with {flag}."),
        ),
    };
    urls.iter().zip(outcomes).map(one).collect()
}

/// This machine's clock against those of relays, or of the other nodes.
fn clock(relays: &[Result<Answer, String>], mesh: Option<&Value>) -> Check {
    const NAME: &str = "clock";
    let mut ahead_ms: Vec<i64> = relays.iter().filter_map(|relay| relay.as_ref().ok()?.clock_ahead_ms).collect();
    let mut whose = "relays";
    if ahead_ms.is_empty() {
        let peers = mesh.and_then(|mesh| mesh.get("peers")).and_then(Value::as_array).map(Vec::as_slice);
        let clocks = peers.unwrap_or_default().iter().filter_map(|peer| peer.get("clock_ahead_ms"));
        ahead_ms = clocks.filter_map(Value::as_i64).collect();
        whose = "other nodes";
    }
    ahead_ms.sort_unstable();
    // Of several the one in the middle is most likely right.
    let Some(&ahead_ms) = ahead_ms.get(ahead_ms.len() / 2) else {
        return Check::ok(NAME, "not checked: nobody is there to compare it with");
    };
    let (off_ms, side) = (ahead_ms.unsigned_abs(), if ahead_ms > 0 { "slow" } else { "fast" });
    let found = format!("{} {side}, by the clocks of {whose}", human_duration(Duration::from_millis(off_ms)));
    const ADVICE: &str = "Set it, or have it set: timedatectl set-ntp true.";
    match off_ms {
        0..CLOCK_OFF_MS => Check::ok(NAME, format!("right, by the clocks of {whose}")),
        CLOCK_OFF_MS..CLOCK_HARMFUL_MS => {
            Check::warn(NAME, found, format!("Tickets expire too late or too early by as much; nothing else. {ADVICE}"))
        }
        _ => Check::warn(
            NAME,
            found,
            format!("Nodes do not find each other through Nostr, and tickets may not count. {ADVICE}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::commands::doctor::Verdict;

    fn answer(clock_ahead_ms: i64) -> Result<Answer, String> {
        Ok(Answer { took: Duration::from_millis(20), clock_ahead_ms: Some(clock_ahead_ms) })
    }

    fn network(nat: Nat, seen_as: &[&str]) -> Network {
        let seen_as = seen_as.iter().map(|address| address.parse().unwrap()).collect();
        Network { own: Vec::new(), outside: Some(Outside { seen_as, nat, is_captive: false }) }
    }

    #[test]
    fn a_clock_is_told_by_how_much_it_is_off_and_whether_that_matters() {
        let dead = || Err("gone".to_owned());
        let cases = [
            (vec![answer(0), answer(4_000)], Verdict::Ok, "right"),
            (vec![dead(), answer(600_000)], Verdict::Warn, "10 min 0 s slow"),
            (vec![answer(-3_600_000), answer(0), answer(-3_600_000)], Verdict::Warn, "60 min 0 s fast"),
            (vec![dead()], Verdict::Ok, "nobody is there"),
        ];
        for (relays, verdict, found) in cases {
            let check = clock(&relays, None);
            assert!(check.verdict == verdict && check.found.contains(found), "{check:?}");
        }
        let mesh = json!({"peers": [{"clock_ahead_ms": 2_000_000}, {"clock_ahead_ms": null}]});
        let check = clock(&[dead()], Some(&mesh));
        assert!(check.found.contains("other nodes") && check.advice.contains("Nostr"), "{check:?}");
    }

    #[test]
    fn the_way_out_is_told_with_what_to_do() {
        let told = |network: &Network, relays: &Relays, some_answer| {
            let checks = outside(network, relays, some_answer);
            checks.iter().map(|check| format!("{} {}", check.found, check.advice)).collect::<Vec<_>>().join(" ")
        };
        let symmetric = told(&network(Nat::Symmetric, &["192.0.2.1:7"]), &Relays::Public, true);
        assert!(symmetric.contains("others see 192.0.2.1:7") && symmetric.contains("UPnP"), "{symmetric}");
        let silent = network(Nat::Unknown, &[]);
        assert!(told(&silent, &Relays::Public, true).contains("keeps UDP in"));
        assert!(told(&silent, &Relays::Public, false).contains("offline"));
        assert!(told(&Network { own: Vec::new(), outside: None }, &Relays::None, false).contains("--relay none"));
        let own = Network { own: vec![("192.0.2.1:7".parse().unwrap(), Err("no answer".into()))], outside: None };
        assert_eq!(own_addresses(&own).verdict, Verdict::Fail);
    }

    #[test]
    fn a_dead_relay_is_a_finding_and_a_small_one_while_another_answers() {
        let urls = ["a".to_owned(), "b".to_owned()];
        let checks = answers("relay", &urls, &[answer(0), Err("refused".into())], "--relay", "anybody");
        assert_eq!((checks[0].verdict, checks[1].verdict), (Verdict::Ok, Verdict::Warn));
        assert!(checks[1].found.contains("b does not answer: refused") && checks[1].advice.contains("is enough"));
        let checks = answers("relay", &urls[..1], &[Err("refused".into())], "--relay", "anybody");
        assert!(checks[0].advice.contains("--relay"), "{checks:?}");
    }
}
