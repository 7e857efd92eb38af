//! What other nodes know to have been signed of files that they have. Each answer is verified; who leaves something out cannot hide it, as
//! long as somebody else shows it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use murmur_net::stream::{self, Reader};
use murmur_protocol::mesh::{Capabilities, HeldContent, ModelDigest, NodeId, SignedAttestation, Work};
use rand::seq::SliceRandom;
use tokio::{
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};

use super::{
    Shelf,
    wanted::{blocking, contents, is_meant},
};
use crate::{
    Node, NodeError,
    mesh::{MeshNode, by_count},
    model::with_causes,
    signatures::{self, Attested, keep, merged},
};

/// A node that is asked answers within this, or is not waited for.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// Nodes that are asked for one file where a particular signature is wanted; else no more than at once, so that one deadline is all that is waited.
const ASKED_MAX: usize = 32;
/// Nodes that are asked at once.
const AT_ONCE_MAX: usize = 8;
/// Files that are looked at where several have the name.
const FILES_MAX: usize = 8;
/// Files that are asked about at once where it is listed who has signed what.
const FILES_AT_ONCE: usize = 8;
/// Files that are asked about then in all; those that the most nodes have come first.
const FILES_LISTED_MAX: usize = 256;
/// What nobody has said by then is not waited for.
const LIST_DEADLINE: Duration = Duration::from_secs(5);

/// Asks those who have a file, until somebody shows what `wanted` has signed of it; or several of them, where nobody is wanted.
pub(super) async fn gather(mesh: &Arc<MeshNode>, model: ModelDigest, wanted: Option<NodeId>) -> Vec<Attested> {
    let mut holders = holders(mesh, model);
    holders.truncate(if wanted.is_some() { ASKED_MAX } else { AT_ONCE_MAX });
    let mut asking = JoinSet::new();
    let mut known: Vec<Attested> = Vec::new();
    let is_wanted = |attested: &Attested| wanted.is_some_and(|signer| attested.is_by(signer));
    loop {
        while asking.len() < AT_ONCE_MAX
            && let Some(holder) = holders.pop()
        {
            let mesh = Arc::clone(mesh);
            asking.spawn(async move {
                let answer = timeout(ANSWER_DEADLINE, ask(&mesh, holder, model)).await;
                answer.ok().flatten().map(|signed| (holder, signed))
            });
        }
        let Some(answered) = asking.join_next().await else { return known };
        let Ok(Some((holder, signed))) = answered else { continue };
        for attested in signed.into_iter().map(|signed| Attested::verify(signed, model)) {
            match attested {
                Ok(attested) if !known.contains(&attested) => known.push(attested),
                Ok(_) => {}
                Err(error) => tracing::warn!("what {} shows as signed of {}: {error}", holder.short(), model.short()),
            }
        }
        if known.iter().any(is_wanted) {
            return known;
        }
    }
}

/// Those who have a file and say what was signed of it, in any order: nobody decides alone who is asked.
fn holders(mesh: &MeshNode, model: ModelDigest) -> Vec<NodeId> {
    let table = Arc::clone(&mesh.mesh().watch().borrow());
    let own = mesh.mesh().node_id();
    let records = table.values().map(|known| known.verified.record());
    let able = records.filter(|record| {
        record.node != own
            && record.capabilities.contains(Capabilities::ATTESTATIONS)
            && record.contents.iter().any(|content| content.digest == model && content.held_bytes > 0)
    });
    let mut holders: Vec<NodeId> = able.map(|record| record.node).collect();
    holders.shuffle(&mut rand::rng());
    holders
}

async fn ask(mesh: &MeshNode, holder: NodeId, model: ModelDigest) -> Option<Vec<SignedAttestation>> {
    let (mut send, recv) = mesh.mesh().open_work(holder).await.ok()?;
    stream::write(&mut send, &Work::GetAttestations(model)).await.ok()?;
    stream::finish(&mut send);
    match Reader::<Work>::new(recv).expect().await {
        Ok(Work::Attestations(signed)) => Some(signed),
        _ => None,
    }
}

/// Keeps beside a file what other nodes show to have been signed of it.
pub(super) async fn take_along(mesh: Arc<MeshNode>, shelf: Arc<Shelf>) {
    let (signed, own) = (gather(&mesh, shelf.digest(), None).await, mesh.mesh().node_id());
    let kept = blocking(move || Ok(keep(&shelf.content, signed, &[own])?)).await;
    if let Err(error) = kept {
        tracing::warn!("what was signed of a model is not kept: {}", with_causes(&error));
    }
}

/// Keeps beside a file that is fetched because a signer has signed it what shows that.
pub(super) async fn keep_shown(shelf: &Arc<Shelf>, signed: Vec<Attested>, signer: NodeId) -> Result<(), NodeError> {
    let shelf = Arc::clone(shelf);
    blocking(move || Ok(keep(&shelf.content, signed, &[signer])?)).await
}

/// Of the files that nodes have under a name, the one that most of them mean and of which somebody shows that `signer` has signed it; and
/// all that was signed of it.
async fn find_signed(
    mesh: &Arc<MeshNode>,
    name: &str,
    signer: NodeId,
) -> Result<(ModelDigest, Vec<Attested>), NodeError> {
    let files = {
        let table = Arc::clone(&mesh.mesh().watch().borrow());
        let is_it = |content: &&HeldContent| content.held_bytes > 0 && is_meant(content.digest, &content.name, name);
        by_count(contents(&table).filter(is_it).map(|content| content.digest))
    };
    let mut seen = Vec::new();
    for model in files.into_iter().take(FILES_MAX) {
        match gather_signed(mesh, model, signer).await {
            Ok(signed) => return Ok((model, signed)),
            Err(others) => seen.extend(others),
        }
    }
    Err(not_signed(name, signer, &seen))
}

/// All that was signed of a file, if `signer` is among those who did; else what others have.
pub(super) async fn gather_signed(
    mesh: &Arc<MeshNode>,
    model: ModelDigest,
    signer: NodeId,
) -> Result<Vec<Attested>, Vec<Attested>> {
    let signed = gather(mesh, model, Some(signer)).await;
    match signed.iter().any(|attested| attested.is_by(signer)) {
        true => Ok(signed),
        false => Err(signed),
    }
}

/// The file that a name stands for: `most`, which most nodes mean by it, or with a signer one that it has signed; and what was signed of it.
pub(super) async fn choose(
    mesh: &Arc<MeshNode>,
    name: &str,
    most: ModelDigest,
    signer: Option<NodeId>,
) -> Result<(ModelDigest, Vec<Attested>), NodeError> {
    match signer {
        None => Ok((most, Vec::new())),
        Some(signer) => find_signed(mesh, name, signer).await,
    }
}

/// What was signed of a file that a signer must have signed, if there is one.
pub(super) async fn demand(
    mesh: &Arc<MeshNode>,
    name: &str,
    model: ModelDigest,
    signer: Option<NodeId>,
) -> Result<Vec<Attested>, NodeError> {
    match signer {
        None => Ok(Vec::new()),
        Some(signer) => gather_signed(mesh, model, signer).await.map_err(|others| not_signed(name, signer, &others)),
    }
}

/// What was signed of the files that this node and the nodes of its mesh have, as far as it is known here or said in time.
pub(crate) async fn of_all(node: &Node) -> BTreeMap<ModelDigest, Vec<Attested>> {
    let shelves = node.library.list();
    let own = blocking(move || Ok(shelves.iter().map(|shelf| (shelf.digest(), shelf.attestations())).collect()));
    let mut known: BTreeMap<ModelDigest, Vec<Attested>> = own.await.unwrap_or_default();
    let Some(mesh) = node.mesh.get() else { return known };
    let files = {
        let table = Arc::clone(&mesh.mesh().watch().borrow());
        by_count(contents(&table).filter(|content| content.held_bytes > 0).map(|content| content.digest))
    };
    let mut files = files.into_iter().take(FILES_LISTED_MAX);
    let mut asking = JoinSet::new();
    let until = Instant::now() + LIST_DEADLINE;
    loop {
        while asking.len() < FILES_AT_ONCE
            && let Some(model) = files.next()
        {
            let mesh = Arc::clone(mesh);
            asking.spawn(async move { (model, gather(&mesh, model, None).await) });
        }
        let Ok(Some(answered)) = timeout_at(until, asking.join_next()).await else { return known };
        let Ok((model, signed)) = answered else { continue };
        let before = known.remove(&model).unwrap_or_default();
        known.insert(model, merged(before, signed, &[mesh.mesh().node_id()]));
    }
}

/// Why a model is not taken that a signer should have signed.
pub(super) fn not_signed(name: &str, signer: NodeId, others: &[Attested]) -> NodeError {
    let others = signatures::signers(others);
    NodeError::NotSigned { name: name.to_owned(), signer: signer.to_string(), others }
}
