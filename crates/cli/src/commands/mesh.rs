//! `murmur mesh`: what is asked of the running node. What concerns the data directory is in [`super::memberships`].

use anyhow::Context;
use murmur_protocol::mesh::{NodeId, TicketId, id::SHORT_DIGITS};
use serde_json::{Value, json};

use super::{Session, memberships, small_runtime};
use crate::{
    args::mesh::{InvitedRole, Mesh, RingPlan},
    client::ApiClient,
    exit::{Code, Failure},
    qr, ui,
    units::Period,
};

pub(super) fn run(session: &Session, command: Mesh) -> anyhow::Result<()> {
    let client = session.client();
    match command {
        Mesh::Create { name } => memberships::create(session, &name),
        Mesh::Leave { name, give_up_key } => memberships::leave(session, &name, give_up_key),
        Mesh::Invite { valid, uses, role } => wait(invite(session, &client, valid, uses, role)),
        Mesh::Join { ticket } => wait(join(session, &client, &ticket.to_string())),
        Mesh::Peers => wait(peers(session, &client)),
        Mesh::Plan(plan) => wait(show_plan(session, &client, &plan)),
        Mesh::Show => wait(memberships::show(session, &client)),
        Mesh::Revoke { id } => wait(revoke(session, &client, &id)),
    }
}

fn wait(answer: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    small_runtime()?.block_on(answer)
}

async fn invite(
    session: &Session,
    client: &ApiClient,
    valid: Period,
    uses: Option<u32>,
    role: InvitedRole,
) -> anyhow::Result<()> {
    let request = json!({"valid_s": valid.seconds, "role": role.name(), "uses": uses});
    let answer = client.ask("/api/mesh/invite", &request).await?;
    if session.global.json {
        return ui::print_json(&answer);
    }
    let ticket = answer.get("ticket").and_then(Value::as_str).context("the server's answer has no ticket")?;
    let ticket = ui::without_controls(ticket);
    if std::io::IsTerminal::is_terminal(&std::io::stdout())
        && let Some(code) = qr::code(&ticket)
    {
        ui::print(&format!("{code}\n"))?;
    }
    ui::print(&format!("{ticket}\n"))?;
    if !session.global.quiet {
        let nodes = match uses {
            None => "any number of nodes".to_owned(),
            Some(1) => "one node".to_owned(),
            Some(uses) => format!("{uses} nodes"),
        };
        let id = answer.get("id").and_then(Value::as_str).map(ui::without_controls).unwrap_or_default();
        ui::say(&format!(
            "for {nodes}, within {valid}: murmur client --join TICKET, or murmur serve MODEL --join TICKET"
        ));
        ui::say(&format!("murmur mesh revoke {id} ends it before"));
    }
    Ok(())
}

async fn join(session: &Session, client: &ApiClient, ticket: &str) -> anyhow::Result<()> {
    if !client.is_there().await {
        return Err(Failure::because(
            Code::Unavailable,
            format!(
                "no murmur node runs at {}. Start one with the ticket: murmur client --join TICKET, or \
                 murmur serve MODEL --join TICKET",
                client.address()
            ),
        ));
    }
    let answer = client.ask("/api/mesh/join", &json!({"ticket": ticket})).await?;
    if session.global.json {
        return ui::print_json(&answer);
    }
    if !session.global.quiet {
        ui::say("the node looks for its mesh there too; `murmur mesh peers` shows whom it finds");
    }
    Ok(())
}

async fn peers(session: &Session, client: &ApiClient) -> anyhow::Result<()> {
    let mesh = client.get("/api/mesh").await?;
    let peers = mesh.get("peers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    if session.global.json {
        return ui::print_json(&peers);
    }
    if peers.is_empty() {
        return ui::print("no other nodes\n");
    }
    let rows: Vec<Vec<String>> = peers.iter().map(peer_row).collect();
    let headings = ["NODE", "ROLE", "REGION", "RTT", "PATH", "LISTED FOR", "CLOCK", "MODELS", "SOFTWARE"];
    ui::print(&ui::without_controls(&ui::table(&headings, &rows, &[3, 5, 6])))
}

fn peer_row(peer: &Value) -> Vec<String> {
    let text = |key: &str| peer.get(key).and_then(Value::as_str).unwrap_or("-").to_owned();
    let number = |key: &str| peer.get(key).and_then(Value::as_f64);
    let models = peer.get("models").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let models: Vec<String> = models.iter().map(model).collect();
    vec![
        text("short"),
        text("role"),
        text("region"),
        number("rtt_ms").map_or_else(|| "-".to_owned(), |rtt_ms| format!("{rtt_ms:.1} ms")),
        text("path"),
        number("since_s").map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.0} s")),
        number("clock_ahead_ms").map_or_else(|| "-".to_owned(), clock),
        if models.is_empty() { "-".to_owned() } else { models.join(", ") },
        text("software"),
    ]
}

/// A peer's clock, if it is far enough off to be worth a word.
fn clock(ahead_ms: f64) -> String {
    const WORTH_A_WORD_MS: f64 = 5_000.0;
    if ahead_ms.abs() < WORTH_A_WORD_MS { "ok".to_owned() } else { format!("{:+.0} s", ahead_ms / 1e3) }
}

fn model(model: &Value) -> String {
    let text = |key: &str| model.get(key).and_then(Value::as_str).unwrap_or("?");
    let speed = model.get("decode_tokens_per_s").and_then(Value::as_f64);
    match (text("state"), speed) {
        ("ready", Some(speed)) => format!("{} ({speed:.0} tokens/s)", text("name")),
        ("ready", None) => text("name").to_owned(),
        (state, _) => format!("{} ({state})", text("name")),
    }
}

async fn show_plan(session: &Session, client: &ApiClient, plan: &RingPlan) -> anyhow::Result<()> {
    let ring = &plan.ring;
    let question = json!({
        "model": plan.model,
        "context_tokens": plan.ctx,
        "streams": plan.streams,
        "prompt_tokens": plan.prompt_tokens,
        "keep_ends": ring.keep_ends,
        "objective": ring.many_streams.map(|many| if many { "many_streams" } else { "one_stream" }),
        "exclude": ring.exclude,
        "pin": ring.pin.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "max_rtt_ms": ring.max_rtt.map(|rtt| rtt.ms),
        "only_region": ring.only_region,
    });
    let answer = client.ask("/api/mesh/plan", &question).await?;
    if session.global.json {
        return ui::print_json(&answer);
    }
    ui::print(&ui::without_controls(&plan_page(&answer)))
}

/// The ring and what it costs, what was rejected, and remarks.
fn plan_page(plan: &Value) -> String {
    let text = |key: &str| plan.get(key).and_then(Value::as_str).unwrap_or("?");
    let number = |key: &str| plan.get(key).and_then(Value::as_u64).unwrap_or(0);
    let streams = match number("streams") {
        1 => "one stream".to_owned(),
        streams => format!("each of {streams} streams"),
    };
    let driver: String = text("driver").chars().take(SHORT_DIGITS).collect();
    let context = number("context_tokens");
    let mut page = format!("{} for {driver}, a context of {context} for {streams}\n{}", text("model"), text("text"));
    for remark in plan.get("remarks").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        page.push_str(remark);
        page.push('\n');
    }
    page
}

async fn revoke(session: &Session, client: &ApiClient, id: &str) -> anyhow::Result<()> {
    let what = whole_id(client, id).await?;
    let answer = client.ask("/api/mesh/revoke", &json!({"what": what})).await?;
    if session.global.json {
        return ui::print_json(&answer);
    }
    match answer.get("revoked").and_then(Value::as_bool) {
        Some(true) => {
            if !session.global.quiet {
                ui::say(&format!("{what} is revoked"));
            }
            Ok(())
        }
        _ => Err(Failure::because(
            Code::NotFound,
            format!("there is no ticket or membership {what} to revoke, or it was revoked before"),
        )),
    }
}

/// An id as it is, or that of the one peer whose id begins so.
async fn whole_id(client: &ApiClient, id: &str) -> anyhow::Result<String> {
    if id.parse::<NodeId>().is_ok() || id.parse::<TicketId>().is_ok() {
        return Ok(id.to_ascii_lowercase());
    }
    let mesh = client.get("/api/mesh").await?;
    let peers = mesh.get("peers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let begins = id.to_ascii_lowercase();
    let mut found = peers
        .iter()
        .filter_map(|peer| peer.get("node").and_then(Value::as_str))
        .filter(|node| !begins.is_empty() && node.starts_with(&begins));
    match (found.next(), found.next()) {
        (Some(only), None) => Ok(only.to_owned()),
        (Some(_), Some(_)) => {
            Err(Failure::because(Code::Usage, format!("the ids of several nodes begin with {id}. Give more digits")))
        }
        (None, _) => Err(Failure::because(
            Code::NotFound,
            format!(
                "no node's id begins with {id}. `murmur mesh peers --json` lists the ids; of a node that is not there, \
                 and of a ticket, give all digits"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_one_row_and_says_where_it_is_how_it_is_reached_and_what_it_serves() {
        let peer = json!({
            "short": "0123456789", "role": "worker", "region": "eu-north", "rtt_ms": 12.34, "path": "direct 192.0.2.1:7", "since_s": 90,
            "clock_ahead_ms": 600_000, "software": "murmur/0.1.0",
            "models": [
                {"name": "a", "state": "ready", "decode_tokens_per_s": 41.6},
                {"name": "b", "state": "loading"},
            ],
        });
        let row = peer_row(&peer);
        assert_eq!(row[..3], ["0123456789", "worker", "eu-north"]);
        assert_eq!(row[3..7], ["12.3 ms", "direct 192.0.2.1:7", "90 s", "+600 s"]);
        assert_eq!(row[7], "a (42 tokens/s), b (loading)");
        assert_eq!(peer_row(&json!({}))[..8], ["-"; 8].map(str::to_owned));
    }

    #[test]
    fn a_plan_says_for_whom_and_for_what_before_it_shows_the_ring() {
        let plan = json!({
            "model": "big", "driver": "0123456789abcdef", "context_tokens": 4096, "streams": 2,
            "text": "2 stages: 1.0 ms a token\n", "remarks": ["Memory is short."],
        });
        let page =
            "big for 0123456789, a context of 4096 for each of 2 streams\n2 stages: 1.0 ms a token\nMemory is short.\n";
        assert_eq!(plan_page(&plan), page);
    }
}
