//! What `/api/mesh` shows and does:
//!
//! | field | |
//! |---|---|
//! | `name`, `id`, `private` | of the mesh |
//! | `node`, `addresses[]`, `relay` | this node: its id, where it can be dialled, its home relay |
//! | `peers[].node`, `.short` | another node's id, and its first digits for people |
//! | `.software`, `.role`, `.region` | as it says itself; a region that is not said is null |
//! | `.rtt_ms`, `.path` | round trip as QUIC measures it, and `direct ADDRESS`, `relayed URL` or `unknown`; where there is a connection |
//! | `.since_s` | for how long it is listed |
//! | `.clock_ahead_ms` | how far its wall clock is ahead of this node's |
//! | `.models[].state` | `available` (loaded on demand), `loading`, `ready`, `draining` (takes nothing new) |
//! | `.models[].running`, `.queued`, `.parallel` | its requests, and how many run at once |
//! | `.models[].decode_tokens_per_s`, `.prefill_tokens_per_s` | as it has measured; null: not yet |

use std::num::NonZeroU32;

use murmur_api::backend::{MeshAction, Refusal};
use murmur_net::{Invitation, Mesh, NetError, Path, PeerView};
use murmur_protocol::mesh::{NodeId, Revocation, Role, ServedModel, SignedTicket, TicketId};
use serde_json::{Value, json};

use super::{MeshNode, ring};
use crate::{Node, status::per_second};

pub(super) fn mesh(mesh: &Mesh) -> Value {
    let peers: Vec<Value> = mesh.peers().iter().map(peer).collect();
    json!({
        "name": mesh.mesh_name(),
        "id": mesh.mesh_id().to_string(),
        "private": mesh.is_private(),
        "node": mesh.node_id().to_string(),
        "addresses": mesh.contact().addresses.direct.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "relay": mesh.contact().addresses.relay,
        "peers": peers,
    })
}

fn peer(peer: &PeerView) -> Value {
    let record = peer.record();
    let path = match &peer.path {
        Path::Direct(address) => format!("direct {address}"),
        Path::Relayed(url) => format!("relayed {url}"),
        Path::Unknown => "unknown".to_owned(),
    };
    json!({
        "node": record.node.to_string(),
        "short": record.node.short(),
        "software": record.software,
        "role": record.role.name(),
        "region": Some(&record.region).filter(|region| !region.is_empty()),
        "rtt_ms": peer.rtt_ms,
        "path": path,
        "since_s": peer.since.elapsed().as_secs(),
        "clock_ahead_ms": peer.clock_ahead_ms,
        "models": record.models.iter().map(model).collect::<Vec<_>>(),
    })
}

/// What a peer says of a model.
pub(super) fn model(served: &ServedModel) -> Value {
    json!({
        "name": served.name,
        "digest": served.digest.to_string(),
        "state": served.state.name(),
        "context_tokens": served.context_tokens,
        "parallel": served.parallel,
        "running": served.running,
        "queued": served.queued,
        "decode_tokens_per_s": per_second(served.decode_us_per_token.into()),
        "prefill_tokens_per_s": per_second(served.prefill_us_per_token.into()),
        "exact": served.exact,
    })
}

/// Does what a user asks.
pub(super) async fn act(node: &Node, mesh_node: &MeshNode, action: MeshAction) -> Result<Value, Refusal> {
    let mesh = mesh_node.mesh();
    match action {
        MeshAction::Plan(question) => ring::plan::answer(node, mesh_node, question).await,
        MeshAction::Invite { valid_s, role, uses } => {
            let role = if role == Role::Client.name() { Role::Client } else { Role::Worker };
            let none = || bad("a ticket that nobody may use is of no use: 1 is the least".to_owned(), "uses");
            let uses = uses.map(|uses| NonZeroU32::new(uses).ok_or_else(none)).transpose()?;
            let invitation = Invitation { role, valid_ms: valid_s.saturating_mul(1_000), uses };
            let ticket = mesh.invite(&invitation).await.map_err(refused)?;
            let (id, expires_unix_ms) = (ticket.ticket().id.to_string(), ticket.ticket().expires_ms);
            Ok(json!({"ticket": ticket.to_string(), "id": id, "expires_unix_ms": expires_unix_ms}))
        }
        MeshAction::Join { ticket } => {
            let ticket: SignedTicket = ticket.parse().map_err(|error| bad(format!("the ticket: {error}"), "ticket"))?;
            mesh.join(&ticket).await.map_err(refused)?;
            Ok(json!({"joined": true}))
        }
        MeshAction::Revoke { what } => {
            let revoked = if let Ok(ticket) = what.parse::<TicketId>() {
                mesh.revoke_ticket(ticket).map_err(refused)?
            } else if let Ok(node) = what.parse::<NodeId>() {
                mesh.revoke(Revocation::Node(node)).await.map_err(refused)?
            } else {
                return Err(bad("this is no id of a ticket or of a node".to_owned(), "what"));
            };
            Ok(json!({"revoked": revoked}))
        }
    }
}

pub(super) fn bad(message: String, param: &str) -> Refusal {
    Refusal::BadRequest { message, param: Some(param.to_owned()), code: None }
}

fn refused(error: NetError) -> Refusal {
    match error {
        NetError::Ticket(_) => Refusal::BadRequest { message: error.to_string(), param: None, code: None },
        NetError::NotOwner(_) => Refusal::Forbidden { message: error.to_string() },
        error => Refusal::Failed { message: error.to_string() },
    }
}
