//! Private meshes on loopback: strangers, tickets, revocations.

#![allow(clippy::unwrap_used, clippy::panic, reason = "these are tests, helpers included")]

mod common;

use std::num::NonZeroU32;

use common::{Node, all_know_all, join, lists, options, start, try_join, until};
use murmur_net::{Credentials, Invitation, Mesh, MeshChoice, NetError};
use murmur_protocol::mesh::{MemberCertificate, RefusalCode, Revocation, Role};

async fn found() -> Node {
    let folder = tempfile::tempdir().unwrap();
    let key = murmur_net::node_key(folder.path()).unwrap();
    let credentials = Credentials::found(folder.path(), "home", key.node_id()).unwrap();
    let mesh = Mesh::start(options(&folder, MeshChoice::Private(credentials))).await.unwrap();
    Node { mesh, folder }
}

fn uses(count: u32) -> Invitation {
    Invitation { uses: NonZeroU32::new(count), ..Invitation::default() }
}

fn refusal<T>(result: Result<T, NetError>) -> RefusalCode {
    match result {
        Err(NetError::Refused(refusal)) => refusal.code,
        Err(error) => panic!("not a refusal: {error}"),
        Ok(_) => panic!("not refused"),
    }
}

#[tokio::test]
async fn members_come_in_by_ticket_and_find_each_other() {
    let owner = found().await;
    let ticket = owner.mesh.invite(&uses(2)).await.unwrap();
    let nodes = vec![join(&ticket).await, join(&ticket).await, owner];
    all_know_all(&nodes).await;
    assert!(nodes[0].mesh.is_private());
    assert_eq!(nodes[0].mesh.mesh_name(), "home");
    assert!(nodes[0].mesh.peers().iter().all(|peer| peer.record().certificate.is_some()));
    let refused = nodes[0].mesh.invite(&uses(1)).await;
    assert!(matches!(refused, Err(NetError::NotOwner(_))));
}

#[tokio::test]
async fn a_member_that_restarts_comes_in_without_its_ticket() {
    let owner = found().await;
    let ticket = owner.mesh.invite(&uses(1)).await.unwrap();
    let member = join(&ticket).await;
    let id = member.mesh.node_id();
    until(&owner.mesh, "the member", |table| lists(table, id)).await;
    member.mesh.leave().await;
    until(&owner.mesh, "the member is gone", |table| !lists(table, id)).await;

    let credentials = Credentials::load(member.folder.path(), &owner.mesh.mesh_id()).unwrap().unwrap();
    let mut again = options(&member.folder, MeshChoice::Private(credentials));
    again.bootstrap = vec![owner.mesh.contact()];
    let _again = Mesh::start(again).await.unwrap();
    until(&owner.mesh, "the member is back", |table| lists(table, id)).await;
}

#[tokio::test]
async fn a_used_up_an_expired_and_a_revoked_ticket_let_nobody_in_and_say_why() {
    let owner = found().await;
    let used_up = owner.mesh.invite(&uses(1)).await.unwrap();
    let _member = join(&used_up).await;
    assert_eq!(refusal(try_join(&used_up).await), RefusalCode::TicketUsedUp);

    let expired = owner.mesh.invite(&Invitation { valid_ms: 0, ..uses(1) }).await.unwrap();
    assert_eq!(refusal(try_join(&expired).await), RefusalCode::TicketExpired);

    let revoked = owner.mesh.invite(&uses(1)).await.unwrap();
    assert!(owner.mesh.revoke_ticket(revoked.ticket().id).unwrap());
    assert_eq!(refusal(try_join(&revoked).await), RefusalCode::TicketRevoked);
}

#[tokio::test]
async fn a_refusal_is_said_once() {
    let owner = found().await;
    let ticket = owner.mesh.invite(&Invitation { valid_ms: 0, ..uses(1) }).await.unwrap();
    let error = try_join(&ticket).await.err().unwrap();
    assert_eq!(error.to_string(), "refused by the other side: the ticket has expired; ask for a new one");
}

#[tokio::test]
async fn a_stranger_gets_a_refusal_and_nothing_else() {
    let owner = found().await;
    let folder = tempfile::tempdir().unwrap();
    let key = murmur_net::node_key(folder.path()).unwrap();
    // It knows everything that is public about the mesh, and has made itself a certificate of its own.
    let mut forged = Credentials::found(folder.path(), "home", key.node_id()).unwrap();
    forged.mesh = owner.mesh.mesh_id();
    let mut stranger = options(&folder, MeshChoice::Private(forged));
    stranger.bootstrap = vec![owner.mesh.contact()];
    let stranger = Mesh::start(stranger).await.unwrap();
    assert_eq!(refusal(stranger.open_work(owner.mesh.node_id()).await), RefusalCode::BadCertificate);
    assert!(owner.mesh.peers().is_empty() && stranger.peers().is_empty());
}

#[tokio::test]
async fn a_revoked_member_is_out_everywhere_and_stays_out() {
    let owner = found().await;
    let ticket = owner.mesh.invite(&uses(3)).await.unwrap();
    let nodes = vec![owner, join(&ticket).await, join(&ticket).await];
    all_know_all(&nodes).await;
    let out = nodes[2].mesh.node_id();
    let mut standing = Vec::new();
    for node in &nodes[..2] {
        standing.push(nodes[2].mesh.open_work(node.mesh.node_id()).await.unwrap());
    }
    assert!(nodes[0].mesh.revoke(Revocation::Node(out)).await.unwrap());
    for node in &nodes[..2] {
        until(&node.mesh, "the revoked member is gone", |table| !lists(table, out)).await;
    }
    for (_send, recv) in &mut standing {
        assert!(common::soon("the end of a connection that stood", recv.read(&mut [0])).await.is_err());
    }
    assert_eq!(
        refusal(common::soon("an answer", nodes[2].mesh.open_work(nodes[1].mesh.node_id())).await),
        RefusalCode::Revoked
    );
    until(&nodes[1].mesh, "the others stay", |table| lists(table, nodes[0].mesh.node_id())).await;
}

#[tokio::test]
async fn a_client_member_may_not_serve() {
    let owner = found().await;
    let ticket = owner.mesh.invite(&Invitation { role: Role::Client, ..uses(1) }).await.unwrap();
    let client = join(&ticket).await;
    let id = client.mesh.node_id();
    let table = until(&owner.mesh, "the client", |table| lists(table, id)).await;
    let certificate = table[&id].verified.record().certificate.clone().unwrap();
    assert_eq!(certificate.verify(owner.mesh.mesh_id(), id, now_ms()).unwrap().role, Role::Client);
}

#[tokio::test]
async fn a_public_and_a_private_mesh_live_side_by_side() {
    let (owner, public) = (found().await, start(common::public()).await);
    let private_member = join(&owner.mesh.invite(&uses(1)).await.unwrap()).await;
    let public_member = join(&public.mesh.invite(&common::open_invitation()).await.unwrap()).await;
    all_know_all(&[owner, private_member]).await;
    all_know_all(&[public, public_member]).await;
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

#[tokio::test]
async fn a_membership_in_its_last_third_is_prolonged_when_the_owner_is_there_and_one_before_that_is_not() {
    const DAY_MS: u64 = 24 * 3_600_000;
    let owner = found().await;
    let owned = Credentials::load(owner.folder.path(), &owner.mesh.mesh_id()).unwrap().unwrap();
    for (days_left, prolonged) in [(100, true), (200, false)] {
        let folder = tempfile::tempdir().unwrap();
        let node = murmur_net::node_key(folder.path()).unwrap().node_id();
        let expires_ms = now_ms() + days_left * DAY_MS;
        let issued_ms = expires_ms - 365 * DAY_MS;
        let given = MemberCertificate { mesh: owned.mesh, node, role: Role::Client, serial: 7, issued_ms, expires_ms };
        let certificate = given.sign(owned.owner.as_ref().unwrap()).unwrap();
        let credentials = Credentials { certificate, owner: None, ..owned.clone() };
        credentials.store(folder.path()).unwrap();
        let mut member = options(&folder, MeshChoice::Private(credentials));
        member.bootstrap = vec![owner.mesh.contact()];
        let mesh = Mesh::start(member).await.unwrap();
        let held = |table: &murmur_net::Table| {
            let record = table.get(&node)?.verified.record().clone();
            Some((record.sequence, record.certificate?.verify(owned.mesh, node, 0).ok()?))
        };
        let wanted = |table: &murmur_net::Table| held(table).is_some_and(|(_, now)| prolonged == (now != given));
        let table = until(&owner.mesh, "the certificate that is expected", wanted).await;
        let (sequence, certificate) = held(&table).unwrap();
        assert_eq!((certificate.serial, certificate.role), (7, Role::Client));
        if prolonged {
            assert!(certificate.expires_ms > now_ms() + 364 * DAY_MS);
        } else {
            let renewed = |table: &murmur_net::Table| held(table).is_some_and(|(newer, _)| newer > sequence + 1);
            let table = until(&owner.mesh, "another record", renewed).await;
            assert_eq!(held(&table).unwrap().1, given);
        }
        let stored = Credentials::load(folder.path(), &owned.mesh).unwrap().unwrap().certificate;
        assert_eq!(stored.verify(owned.mesh, node, 0).unwrap(), certificate);
        mesh.leave().await;
    }
}

#[tokio::test]
async fn who_cannot_reach_the_owner_is_told_what_to_do() {
    let owner = found().await;
    let ticket = owner.mesh.invite(&uses(1)).await.unwrap();
    owner.mesh.leave().await;
    let error = try_join(&ticket).await.err().unwrap();
    assert!(matches!(error, NetError::Unreachable { .. }), "{error}");
    let advice = error.to_string();
    assert!(advice.contains("try again") && advice.contains("home") && advice.contains("new ticket"), "{advice}");
}
