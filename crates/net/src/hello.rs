//! The greeting: what happens on the first stream of every connection on our ALPNs, before anything else is served.
//!
//! ```text
//! dialler                          acceptor
//!   Hello  ──────────────────────>   decides, admits
//!   decides, admits  <────────────   Hello, or Refusal and close
//! ```
//!
//! The acceptor admits before it answers, so a dialler that has its answer can open gossip connections at once. A node
//! that is no member yet sends `Redeem` in the place of `Hello`, gets `Redeemed` or a refusal, and the connection ends
//! there.
//!
//! Who is silent, or slow, is dropped at the deadline. Who sends something else is told so and dropped.

use std::ops::RangeInclusive;
use std::time::Duration;

use iroh::endpoint::{Connection, RecvStream, SendStream};
use murmur_protocol::mesh::{Capabilities, Control, NodeId, Redeem, Redeemed, Refusal, RefusalCode, Ticket, negotiate};
use tokio::time::timeout;

use crate::NetError;
use crate::admission::{Admission, close};
use crate::contact::node_id;
use crate::identity::{Greeted, Identity};
use crate::stream::{self, Reader};

/// Within this time a greeting is over, QUIC's handshake excluded.
pub const HELLO_DEADLINE_MS: u64 = 5_000;

/// How long a connection is kept open for a refusal to arrive.
pub const REFUSAL_LINGER_MS: u64 = 1_000;

/// What became of a connection that was accepted.
#[derive(Debug)]
pub(crate) enum Answered {
    /// The peer is let in.
    Greeted(Greeted),
    /// A ticket was redeemed; the connection has ended.
    Redeemed,
}

/// Greets the node that was dialled.
pub(crate) async fn greet(
    connection: &Connection,
    identity: &Identity,
    capabilities: Capabilities,
    admission: &Admission,
) -> Result<Greeted, NetError> {
    let peer = node_id(connection.remote_id());
    let greeting = async {
        let (mut send, mut reader) = open(connection, peer).await?;
        stream::write(&mut send, &Control::Hello(identity.hello(capabilities))).await?;
        match reader.expect().await? {
            Control::Hello(hello) => match identity.judge(&hello, peer) {
                Ok(greeted) => {
                    stream::finish(&mut send);
                    Ok(greeted)
                }
                Err(refusal) => Err(refuse(connection, &mut send, refusal).await),
            },
            Control::Refusal(refusal) => Err(NetError::Refused(refusal)),
            _ => Err(NetError::protocol("the greeting was answered by another message")),
        }
    };
    let greeted = ended(connection, greeting).await?;
    admission.admit(peer);
    Ok(greeted)
}

/// Answers whoever dialled this node.
pub(crate) async fn answer(
    connection: &Connection,
    identity: &Identity,
    capabilities: Capabilities,
    admission: &Admission,
) -> Result<Answered, NetError> {
    let peer = node_id(connection.remote_id());
    let answering = async {
        let (mut send, recv) = connection.accept_bi().await.map_err(|error| NetError::unreachable(peer, error))?;
        let mut reader = Reader::new(recv);
        let verdict = match reader.expect().await {
            Ok(Control::Hello(hello)) => identity.judge(&hello, peer).map(|greeted| {
                admission.admit(peer);
                (Control::Hello(identity.hello(capabilities)), Answered::Greeted(greeted))
            }),
            Ok(Control::Redeem(redeem)) => {
                redeemed(identity, peer, &redeem).map(|redeemed| (Control::Redeemed(redeemed), Answered::Redeemed))
            }
            Ok(_) => Err(Refusal::new(RefusalCode::BadMessage, "a connection begins with a greeting")),
            Err(error) => Err(Refusal::new(RefusalCode::BadMessage, &error.to_string())),
        };
        match verdict {
            Ok((message, answered)) => {
                stream::write(&mut send, &message).await?;
                stream::finish(&mut send);
                Ok(answered)
            }
            Err(refusal) => Err(refuse(connection, &mut send, refusal).await),
        }
    };
    ended(connection, answering).await
}

/// Redeems a ticket at its issuer, on a connection made for it.
pub(crate) async fn redeem(
    connection: &Connection,
    ticket: &Ticket,
    versions: &RangeInclusive<u32>,
) -> Result<Redeemed, NetError> {
    let murmur_protocol::mesh::Admission::Private { secret, .. } = &ticket.admission else {
        return Err(NetError::Ticket("a ticket for a public mesh needs no redeeming".into()));
    };
    let message = Redeem { versions: versions.clone(), mesh: ticket.mesh, ticket: ticket.id, secret: secret.clone() };
    let redeeming = async {
        let (mut send, mut reader) = open(connection, ticket.issuer).await?;
        stream::write(&mut send, &Control::Redeem(message)).await?;
        match reader.expect().await? {
            Control::Redeemed(redeemed) => Ok(redeemed),
            Control::Refusal(refusal) => Err(NetError::Refused(refusal)),
            _ => Err(NetError::protocol("a ticket was answered by another message")),
        }
    };
    let redeemed = ended(connection, redeeming).await;
    connection.close(close::DONE, b"done");
    redeemed
}

fn redeemed(identity: &Identity, peer: NodeId, redeem: &Redeem) -> Result<Redeemed, Refusal> {
    negotiate(&identity.versions, &redeem.versions)?;
    if redeem.mesh != identity.mesh {
        return Err(Refusal::new(RefusalCode::WrongMesh, "this node belongs to another mesh"));
    }
    let Some(private) = &identity.private else {
        return Err(Refusal::new(RefusalCode::TicketUnknown, "this mesh is public: nothing has to be redeemed"));
    };
    let certificate = private.tickets.redeem(&private.credentials, peer, redeem)?;
    // A revoked node gets a certificate for its ticket like anybody, and it would be worth nothing: say so at once.
    identity.member(Some(&certificate), peer)?;
    Ok(Redeemed {
        certificate,
        mesh_secret: private.credentials.secret.clone(),
        mesh_name: private.credentials.name.clone(),
    })
}

async fn open(connection: &Connection, peer: NodeId) -> Result<(SendStream, Reader<Control>), NetError> {
    let (send, recv): (SendStream, RecvStream) =
        connection.open_bi().await.map_err(|error| NetError::unreachable(peer, error))?;
    Ok((send, Reader::new(recv)))
}

/// Sends a refusal, waits a moment until it has arrived, and closes.
async fn refuse(connection: &Connection, send: &mut SendStream, refusal: Refusal) -> NetError {
    let told = async {
        stream::write(send, &Control::Refusal(refusal.clone())).await?;
        stream::finish(send);
        connection.closed().await;
        Ok::<(), NetError>(())
    };
    // Whether it arrived changes nothing here.
    let _ = timeout(Duration::from_millis(REFUSAL_LINGER_MS), told).await;
    connection.close(close::REFUSED, b"refused");
    NetError::Unwelcome(refusal)
}

/// Keeps the deadline, and closes the connection of a greeting that failed.
async fn ended<T>(connection: &Connection, greeting: impl Future<Output = Result<T, NetError>>) -> Result<T, NetError> {
    let deadline = Duration::from_millis(HELLO_DEADLINE_MS);
    let result = timeout(deadline, greeting).await.unwrap_or(Err(NetError::Late("greeting")));
    if result.is_err() {
        connection.close(close::REFUSED, b"no greeting");
    }
    result
}
