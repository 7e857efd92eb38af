//! Questions about a ring: which one this node would make for a model, what a token would cost, why it and no other; or why
//! there is none, and what would make one possible. It is found as when a ring is made ([`super::form`]), and nothing is
//! loaded. What comes back:
//!
//! | field | |
//! |---|---|
//! | `model`, `driver` | the model, and the id of this node, whose requests would go around |
//! | `context_tokens`, `streams` | tokens that each stream may have, and streams at once: what memory is set aside for |
//! | `stages[].node`, `.layers` | who holds which layers: the first, and the one after the last |
//! | `.compute_us`, `.fixed_us` | of a token: its layers, and what a step takes besides |
//! | `.memory_bytes`, `.available_bytes` | what the stage takes, and what the node has for the model |
//! | `.load_us` | to load what is not loaded there, at 500 MB/s; at 100 Mbit/s where the node has not all of the file and may have to fetch it |
//! | `edges[].from`, `.to`, `.codec` | a hop, and how hidden states travel; null: token ids do |
//! | `.latency_us`, `.transfer_us` | one way, and how long a token keeps the link busy |
//! | `token_us`, `tokens_per_s_alone` | of a stream that is alone |
//! | `tokens_per_s`, `bottleneck_us` | of all streams together, and what is busiest for a token |
//! | `prompt_tokens`, `first_token_us` | a prompt of this length, and the time until its first token |
//! | `load_us` | until all layers are loaded |
//! | `origin` | `best`, or `kept`: these layers are loaded already |
//! | `rejected[]`, `remarks[]` | what else was considered and why it was not taken, and what else there is to say |
//! | `text` | the ring, its costs and what was rejected, for people |

use murmur_api::{
    backend::{ModelKind, PlanQuestion, Refusal},
    limits::{FAILED_RETRY_AFTER, LOADING_RETRY_AFTER},
};
use murmur_core::planner::{Ask, Codec, NoRing, Objective, Origin, Plan};
use murmur_engine::Speed;
use murmur_protocol::mesh::NodeId;
use serde_json::{Value, json};

use super::{
    choice::Wanted,
    facts::{self, Ways},
    offers::{Offer, Sight, Size},
    wishes::Ids,
};
use crate::{
    Node,
    backend::no_such_model,
    fit,
    mesh::{MeshNode, announce, view::bad},
    model::{Model, Room, layer_facts, with_causes},
};

/// Answers a question.
pub(crate) async fn answer(node: &Node, mesh: &MeshNode, question: PlanQuestion) -> Result<Value, Refusal> {
    let model = own_model(node, mesh, &question.model)?;
    let mut offers = offers(node, mesh, model)?;
    let ids = Ids::of(node, &mesh.mesh().peers(), mesh.mesh().node_id());
    for digits in &question.wishes.exclude {
        ids.find(digits).map_err(|reason| bad(reason, "exclude"))?;
    }
    let (path, options, own) = (model.path().to_owned(), node.options().clone(), ids.own());
    // Loaded whole, it may have been measured.
    let whole = model.loaded().filter(|_| !model.is_spread());
    let whole_us = whole.and_then(|loaded| loaded.engine.status().counters.us_per_token());
    let wishes = question.wishes.clone().or(&options.ring);
    let mut remarks: Vec<String> = not_spread(model, own, &offers).into_iter().collect();
    let is_spread = model.is_spread();
    let search = move || {
        let streams = question.streams.unwrap_or(options.parallel);
        let facts = layer_facts(&path, options.exact, streams)
            .map_err(|error| Refusal::Failed { message: with_causes(&error) })?;
        let (facts, context_tokens_max) = facts.ok_or_else(|| cannot_be_cut(&question.model))?;
        if let Some(us) = whole_us {
            let speed = Speed { decode_us: Some(us as f64), prefill_us: None };
            let us_per_layer = facts::per_layer(speed, &facts, facts.whole()).0;
            let own = offers.iter_mut().filter(|offer| offer.node == own);
            own.for_each(|offer| offer.stage.decode_us_per_layer = us_per_layer);
        }
        let context_tokens = context_tokens(&question, options.ctx_tokens, context_tokens_max)?;
        let size = Size { context_tokens, parallel: streams };
        let ask = ids.ask(&wishes, size).map_err(|reason| bad(reason, "pin"))?;
        let prompt_tokens = question.prompt_tokens.unwrap_or(ask.prompt_tokens.min(context_tokens));
        let ask = Ask { prompt_tokens, lossy: options.lossy.clone(), ..ask };
        let wanted = Wanted { offers: &offers, facts: &facts, ask };
        let found = match is_spread {
            true => as_made(&wanted, &question, options.ctx_tokens.is_some(), &mut remarks),
            false => wanted.anywhere(size, Vec::new()).map(|plan| (plan, size)),
        };
        let (plan, size) = found.map_err(|reason| refused(&reason, &remarks))?;
        if size.context_tokens < context_tokens {
            remarks.push(format!(
                "Memory is short: for a context of {context_tokens} there is no ring, for {} there is this one.",
                size.context_tokens
            ));
        }
        remarks.extend(facts::guessed(own, &offers, &plan));
        Ok(shown(&question.model, own, &plan, size, &remarks))
    };
    // The file's header is read, and with many nodes there is much to compare.
    let searched = tokio::task::spawn_blocking(search).await;
    searched.unwrap_or_else(|_| Err(not_ready("this node is stopping".to_owned())))
}

/// The model of this name, if this node has its file.
fn own_model<'a>(node: &'a Node, mesh: &MeshNode, name: &str) -> Result<&'a Model, Refusal> {
    if let Some(at) = node.models.find(name) {
        let model = &node.models[at];
        return match model.kind() {
            ModelKind::Generate => Ok(model),
            ModelKind::Embed => Err(cannot_be_cut(name)),
        };
    }
    let peers = mesh.mesh().peers();
    let offers = |peer: &&murmur_net::PeerView| {
        let record = peer.record();
        record.stages.iter().any(|stage| stage.name == name) || record.models.iter().any(|model| model.name == name)
    };
    let holders: Vec<String> = peers.iter().filter(offers).map(|peer| peer.record().node.short()).collect();
    match holders.is_empty() {
        true => Err(no_such_model(name)),
        false => Err(Refusal::NotFound {
            message: format!(
                "only a node that has the file of {name} knows its layers, and this one does not. Ask one that serves it, \
                 which are: {}",
                holders.join(", ")
            ),
            code: "no_file_of_model".to_owned(),
        }),
    }
}

/// What is offered of a model, by this node in any case.
fn offers(node: &Node, mesh: &MeshNode, model: &Model) -> Result<Vec<Offer>, Refusal> {
    let Some(identity) = model.identity() else {
        let message = match model.is_identified() {
            true => format!("{} cannot be offered to the mesh; this node's log says why", model.id()),
            false => format!("the file of {} is being read, to know it among others: try again shortly", model.id()),
        };
        return Err(not_ready(message));
    };
    let (mut offers, _) = Sight::of(node, mesh).matching_offers(model, &identity.digest);
    let wanted_tokens = node.options().ctx_tokens.unwrap_or(fit::DEFAULT_CONTEXT_TOKENS);
    if !model.is_spread()
        && let Some(stage) = announce::could_offer(node, model, wanted_tokens, &Room::of(&node.models))
    {
        let ways = Ways::own(node, &identity.digest);
        offers.push(Offer { node: mesh.mesh().node_id(), stage, rtt_us: 0.0, ways });
    }
    Ok(offers)
}

fn not_spread(model: &Model, own: NodeId, offers: &[Offer]) -> Option<String> {
    let others = offers.iter().filter(|offer| offer.node != own).count();
    (!model.is_spread()).then(|| {
        format!(
            "{} is not spread over the mesh here: this is what a ring would be, of this node and those that offer layers \
             of it, {others} at present. `murmur serve` offers layers of a model that is larger than the memory or than \
             --max-layers.",
            model.id()
        )
    })
}

/// Tokens of context that are wanted.
fn context_tokens(question: &PlanQuestion, of_node: Option<u32>, most: u32) -> Result<u32, Refusal> {
    if let Some(tokens) = question.context_tokens.filter(|&tokens| tokens > most) {
        let message = format!("{} has a context of {most} tokens at most, and {tokens} were asked for", question.model);
        return Err(bad(message, "context_tokens"));
    }
    let tokens = question.context_tokens.or(of_node).unwrap_or(fit::DEFAULT_CONTEXT_TOKENS).min(most);
    match question.prompt_tokens {
        Some(prompt) if prompt > tokens => {
            Err(bad(format!("a prompt of {prompt} tokens does not fit into a context of {tokens}"), "prompt_tokens"))
        }
        _ => Ok(tokens),
    }
}

/// The ring that would be made now: of the layers that are loaded, if it is what is asked about; else the best one.
fn as_made(
    wanted: &Wanted<'_>,
    question: &PlanQuestion,
    is_wish: bool,
    remarks: &mut Vec<String>,
) -> Result<(Plan, Size), NoRing> {
    let loaded = wanted.loaded(|size| {
        let is_meant = match question.context_tokens {
            Some(tokens) => tokens == size.context_tokens,
            None => wanted.is_long_enough(size, is_wish),
        };
        is_meant && question.streams.is_none_or(|streams| streams == size.parallel)
    });
    let Some((loaded, size)) = loaded else {
        return wanted.best(is_wish || question.context_tokens.is_some());
    };
    if let Some(better) = wanted.better(size, &loaded.placements()) {
        remarks.push(format!(
            "The layers that are loaded make a ring of {:.1} tokens/s. Nodes change to this one when it has been better for a while.",
            tokens_per_s(&loaded, wanted),
        ));
        return Ok((better, size));
    }
    match wanted.anywhere(size, loaded.placements()) {
        Ok(plan) if plan.placements() == loaded.placements() => Ok((plan, size)),
        Ok(better) => {
            remarks.push(format!(
                "Layers that are loaded stay where they are; placed anew, they would make {:.1} tokens/s.",
                tokens_per_s(&better, wanted),
            ));
            Ok((loaded, size))
        }
        Err(_) => Ok((loaded, size)),
    }
}

fn tokens_per_s(plan: &Plan, wanted: &Wanted<'_>) -> f64 {
    match wanted.ask.objective {
        Objective::ManyStreams => plan.tokens_per_s(),
        Objective::OneStream => plan.tokens_per_s_alone(),
    }
}

fn shown(model: &str, own: NodeId, plan: &Plan, size: Size, remarks: &[String]) -> Value {
    let stage = |stage: &murmur_core::planner::StagePlan| {
        json!({
            "node": stage.node.to_string(),
            "layers": [stage.layers.first, stage.layers.end],
            "compute_us": stage.compute_us,
            "fixed_us": stage.fixed_us,
            "memory_bytes": stage.memory_bytes,
            "available_bytes": stage.available_bytes,
            "load_us": stage.load_us,
        })
    };
    let edge = |edge: &murmur_core::planner::EdgePlan| {
        json!({
            "from": edge.from.to_string(),
            "to": edge.to.to_string(),
            "codec": edge.codec.map(Codec::name),
            "latency_us": edge.latency_us,
            "transfer_us": edge.transfer_us,
        })
    };
    json!({
        "model": model,
        "driver": own.to_string(),
        "context_tokens": size.context_tokens,
        "streams": plan.streams,
        "stages": plan.stages.iter().map(stage).collect::<Vec<_>>(),
        "edges": plan.edges.iter().map(edge).collect::<Vec<_>>(),
        "token_us": plan.token_us,
        "tokens_per_s_alone": plan.tokens_per_s_alone(),
        "tokens_per_s": plan.tokens_per_s(),
        "bottleneck_us": plan.bottleneck_us,
        "prompt_tokens": plan.prompt_tokens,
        "first_token_us": plan.first_token_us,
        "load_us": plan.load_us(),
        "origin": origin_name(plan.origin),
        "rejected": plan.rejected.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "remarks": remarks,
        "text": plan.to_string(),
    })
}

fn origin_name(origin: Origin) -> &'static str {
    match origin {
        Origin::Best => "best",
        Origin::Kept => "kept",
        Origin::Holder => "holder",
        Origin::LostMoved => "lost_moved",
        Origin::Anew => "anew",
    }
}

fn not_ready(message: String) -> Refusal {
    Refusal::NotReady { retry_after: LOADING_RETRY_AFTER, message }
}

fn cannot_be_cut(name: &str) -> Refusal {
    bad(format!("{name} cannot be cut between its layers: it runs whole on one node, or not at all"), "model")
}

fn refused(reason: &NoRing, remarks: &[String]) -> Refusal {
    let message = [&[reason.to_string()], remarks].concat().join(". ");
    match reason {
        NoRing::BadAsk(_) => Refusal::BadRequest { message, param: None, code: None },
        NoRing::Short(_) => Refusal::NotReady { retry_after: FAILED_RETRY_AFTER, message },
    }
}
