//! The control stream: what two neighbours tell each other about the mesh.
//!
//! Each side begins with [`Control::Hello`]; a node that is not a member yet begins with [`Control::Redeem`] instead. Then:
//!
//! - anti-entropy: [`Control::Digest`] says what a side has, [`Control::Want`] what it lacks of the other's,
//!   [`Control::Records`] brings it; [`Control::Summary`] says in short what a side with many nodes has, and
//!   [`Control::Differing`] is the digest of what the other has otherwise;
//! - [`Control::Revocations`] when a side's list is newer or not known to the other;
//! - [`Control::Goodbye`] when a side leaves; [`Control::Ping`] and [`Control::Pong`] to measure.

use super::body::Body;
use super::check;
use super::error::MessageError;
use super::hello::{Hello, Refusal, version_bounds};
use super::id::{MeshId, NodeId, TicketId};
use super::member::{REVOCATION_LIST_BYTES_MAX, SignedCertificate, SignedRevocations};
use super::proto;
use super::record::{RECORD_BYTES_MAX, SignedRecord};
use super::secret::{BearerSecret, MeshSecret};
use super::summary::{Differing, RANGES_MAX, Summary};
use super::ticket::MESH_NAME_BYTES_MAX;
use super::wire::{Message, UNKNOWN_BODY_BYTES_MAX};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// Nodes in one digest, and in one request for records.
pub const DIGEST_ENTRIES_MAX: usize = 16_384;
/// Records in one message.
pub const RECORDS_MAX: usize = 64;

/// Room for the protobuf tags and lengths around the parts of a message.
const SLACK_BYTES: usize = 32;

/// A message of the control stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// Greeting of a member, or of anyone in a public mesh.
    Hello(Hello),
    /// Nothing is served; the sender closes.
    Refusal(Refusal),
    /// What the sender knows: nodes with their highest sequence number. Arrives sorted by id and without duplicates, of
    /// which the highest number counts.
    Digest(Vec<(NodeId, u64)>),
    /// Records of any nodes, at most [`RECORDS_MAX`].
    Records(Vec<AgedRecord>),
    /// Whose records the sender lacks. Arrives sorted and without duplicates.
    Want(Vec<NodeId>),
    /// The newest list of revocations that the sender has.
    Revocations(SignedRevocations),
    /// Greeting of a node that holds a ticket for a private mesh.
    Redeem(Redeem),
    /// The ticket was good.
    Redeemed(Redeemed),
    /// The sender leaves: its tombstone.
    Goodbye(SignedRecord),
    /// To be answered at once.
    Ping(u64),
    /// Answer, with the ping's number.
    Pong(u64),
    /// What the sender knows, in short. For peers with [`Capabilities::SUMMARIES`](super::Capabilities::SUMMARIES).
    Summary(Summary),
    /// Answer to a summary: a digest of the ranges in which the sender knows something else.
    Differing(Differing),
    /// A message that this version does not know: to be ignored. Encodes as an empty one.
    Unknown {
        /// Its kind.
        kind: u16,
    },
}

/// A record, and how long ago it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgedRecord {
    /// Time since its node published it, as far as the sender can tell by its own monotonic clock.
    pub age_ms: u32,
    /// The record.
    pub record: SignedRecord,
}

/// A ticket is redeemed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redeem {
    /// Versions of the protocol that the sender speaks.
    pub versions: RangeInclusive<u32>,
    /// The mesh that the ticket leads into.
    pub mesh: MeshId,
    /// Which ticket.
    pub ticket: TicketId,
    /// The secret in it.
    pub secret: BearerSecret,
}

/// The sender of a [`Redeem`] is a member from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redeemed {
    /// Its certificate.
    pub certificate: SignedCertificate,
    /// The mesh's secret.
    pub mesh_secret: MeshSecret,
    /// The mesh's name, at most [`MESH_NAME_BYTES_MAX`] bytes.
    pub mesh_name: String,
}

const HELLO: u16 = 1;
const REFUSAL: u16 = 2;
const DIGEST: u16 = 3;
const RECORDS: u16 = 4;
const WANT: u16 = 5;
const REVOCATIONS: u16 = 6;
const REDEEM: u16 = 7;
const REDEEMED: u16 = 8;
const GOODBYE: u16 = 9;
const PING: u16 = 10;
const PONG: u16 = 11;
const SUMMARY: u16 = 12;
const DIFFERING: u16 = 13;

impl Message for Control {
    fn kind(&self) -> u16 {
        match self {
            Control::Hello(_) => HELLO,
            Control::Refusal(_) => REFUSAL,
            Control::Digest(_) => DIGEST,
            Control::Records(_) => RECORDS,
            Control::Want(_) => WANT,
            Control::Revocations(_) => REVOCATIONS,
            Control::Redeem(_) => REDEEM,
            Control::Redeemed(_) => REDEEMED,
            Control::Goodbye(_) => GOODBYE,
            Control::Ping(_) => PING,
            Control::Pong(_) => PONG,
            Control::Summary(_) => SUMMARY,
            Control::Differing(_) => DIFFERING,
            Control::Unknown { kind } => *kind,
        }
    }

    fn body_bytes_max(kind: u16) -> usize {
        match kind {
            HELLO => Hello::BYTES_MAX,
            REFUSAL => Refusal::BYTES_MAX,
            DIGEST => Digest::BYTES_MAX,
            RECORDS => Records::BYTES_MAX,
            WANT => Want::BYTES_MAX,
            REVOCATIONS => SignedRevocations::BYTES_MAX,
            REDEEM => Redeem::BYTES_MAX,
            REDEEMED => Redeemed::BYTES_MAX,
            GOODBYE => SignedRecord::BYTES_MAX,
            PING | PONG => Ping::BYTES_MAX,
            SUMMARY => Summary::BYTES_MAX,
            DIFFERING => Differing::BYTES_MAX,
            _ => UNKNOWN_BODY_BYTES_MAX,
        }
    }

    fn encode_body(&self) -> Result<Vec<u8>, MessageError> {
        match self {
            Control::Hello(hello) => hello.encode(),
            Control::Refusal(refusal) => refusal.encode(),
            Control::Digest(entries) => Digest::of(entries).encode(),
            Control::Records(records) => Records(records.clone()).encode(),
            Control::Want(nodes) => Want(nodes.iter().copied().collect()).encode(),
            Control::Revocations(list) => list.encode(),
            Control::Redeem(redeem) => redeem.encode(),
            Control::Redeemed(redeemed) => redeemed.encode(),
            Control::Goodbye(record) => record.encode(),
            Control::Ping(nonce) | Control::Pong(nonce) => Ping(*nonce).encode(),
            Control::Summary(summary) => summary.encode(),
            Control::Differing(differing) => differing.encode(),
            Control::Unknown { kind } if is_known(*kind) => {
                Err(MessageError::Invalid { what: "kind", why: "it is known, and its message is not given" })
            }
            Control::Unknown { .. } => Ok(Vec::new()),
        }
    }

    fn decode_body(kind: u16, body: &[u8]) -> Result<Control, MessageError> {
        Ok(match kind {
            HELLO => Control::Hello(Body::decode(body)?),
            REFUSAL => Control::Refusal(Body::decode(body)?),
            DIGEST => Control::Digest(Digest::decode(body)?.0.into_iter().collect()),
            RECORDS => Control::Records(Records::decode(body)?.0),
            WANT => Control::Want(Want::decode(body)?.0.into_iter().collect()),
            REVOCATIONS => Control::Revocations(Body::decode(body)?),
            REDEEM => Control::Redeem(Body::decode(body)?),
            REDEEMED => Control::Redeemed(Body::decode(body)?),
            GOODBYE => Control::Goodbye(Body::decode(body)?),
            PING => Control::Ping(Ping::decode(body)?.0),
            PONG => Control::Pong(Ping::decode(body)?.0),
            SUMMARY => Control::Summary(Body::decode(body)?),
            DIFFERING => Control::Differing(Body::decode(body)?),
            kind => Control::Unknown { kind },
        })
    }
}

fn is_known(kind: u16) -> bool {
    (HELLO..=DIFFERING).contains(&kind)
}

struct Digest(BTreeMap<NodeId, u64>);

impl Digest {
    fn of(entries: &[(NodeId, u64)]) -> Digest {
        let mut highest = BTreeMap::new();
        for &(node, sequence) in entries {
            let known = highest.entry(node).or_insert(sequence);
            *known = sequence.max(*known);
        }
        Digest(highest)
    }
}

impl Body for Digest {
    type Proto = proto::Digest;
    const WHAT: &'static str = "digest";
    const BYTES_MAX: usize = DIGEST_ENTRIES_MAX * 40 + SLACK_BYTES;

    fn to_proto(&self) -> Result<proto::Digest, MessageError> {
        check::count(Self::WHAT, self.0.len(), DIGEST_ENTRIES_MAX)?;
        Ok(proto::Digest {
            nodes: self.0.keys().flat_map(|node| *node.as_bytes()).collect(),
            sequences: self.0.values().copied().collect(),
        })
    }

    fn from_proto(proto: proto::Digest) -> Result<Digest, MessageError> {
        let nodes = check::ids("nodes", &proto.nodes, DIGEST_ENTRIES_MAX)?;
        if proto.sequences.len() != proto.nodes.len() / 32 {
            return Err(MessageError::Invalid { what: Self::WHAT, why: "not one sequence number per node" });
        }
        let entries: Vec<_> = nodes.zip(proto.sequences).collect();
        Ok(Digest::of(&entries))
    }
}

impl Body for Summary {
    type Proto = proto::Summary;
    const WHAT: &'static str = "summary";
    const BYTES_MAX: usize = RANGES_MAX * size_of::<u32>() + SLACK_BYTES;

    fn to_proto(&self) -> Result<proto::Summary, MessageError> {
        Ok(proto::Summary { salt: self.salt(), fingerprints: self.fingerprints().to_vec() })
    }

    fn from_proto(proto: proto::Summary) -> Result<Summary, MessageError> {
        Summary::new(proto.salt, proto.fingerprints)
    }
}

impl Body for Differing {
    type Proto = proto::Differing;
    const WHAT: &'static str = "differing ranges";
    // A number below `RANGES_MAX` has two bytes.
    const BYTES_MAX: usize = RANGES_MAX * 2 + Digest::BYTES_MAX + SLACK_BYTES;

    fn to_proto(&self) -> Result<proto::Differing, MessageError> {
        let ranges: BTreeSet<u32> = self.ranges.iter().copied().map(u32::from).collect();
        check_ranges(ranges.last().copied())?;
        let entries = Digest::of(&self.entries).to_proto()?;
        Ok(proto::Differing { ranges: ranges.into_iter().collect(), entries: Some(entries) })
    }

    fn from_proto(proto: proto::Differing) -> Result<Differing, MessageError> {
        check_ranges(proto.ranges.iter().max().copied())?;
        let ranges: BTreeSet<u16> = proto.ranges.into_iter().filter_map(|range| range.try_into().ok()).collect();
        let entries = Digest::from_proto(proto.entries.unwrap_or_default())?.0;
        Ok(Differing { ranges: ranges.into_iter().collect(), entries: entries.into_iter().collect() })
    }
}

fn check_ranges(last: Option<u32>) -> Result<(), MessageError> {
    match last {
        Some(last) if last as usize >= RANGES_MAX => {
            Err(MessageError::Invalid { what: Differing::WHAT, why: "there is no range of this number" })
        }
        _ => Ok(()),
    }
}

struct Records(Vec<AgedRecord>);

impl Body for Records {
    type Proto = proto::Records;
    const WHAT: &'static str = "records";
    const BYTES_MAX: usize = RECORDS_MAX * (RECORD_BYTES_MAX + SLACK_BYTES);

    fn to_proto(&self) -> Result<proto::Records, MessageError> {
        check::count(Self::WHAT, self.0.len(), RECORDS_MAX)?;
        let records = self
            .0
            .iter()
            .map(|aged| proto::AgedRecord { age_ms: aged.age_ms, record: aged.record.as_bytes().to_vec() });
        Ok(proto::Records { records: records.collect() })
    }

    fn from_proto(proto: proto::Records) -> Result<Records, MessageError> {
        check::count(Self::WHAT, proto.records.len(), RECORDS_MAX)?;
        let records = proto
            .records
            .into_iter()
            .map(|aged| Ok(AgedRecord { age_ms: aged.age_ms, record: SignedRecord::from_bytes(aged.record)? }));
        Ok(Records(records.collect::<Result<_, MessageError>>()?))
    }
}

struct Want(BTreeSet<NodeId>);

impl Body for Want {
    type Proto = proto::Want;
    const WHAT: &'static str = "wanted records";
    const BYTES_MAX: usize = DIGEST_ENTRIES_MAX * 32 + SLACK_BYTES;

    fn to_proto(&self) -> Result<proto::Want, MessageError> {
        check::count(Self::WHAT, self.0.len(), DIGEST_ENTRIES_MAX)?;
        Ok(proto::Want { nodes: self.0.iter().flat_map(|node| *node.as_bytes()).collect() })
    }

    fn from_proto(proto: proto::Want) -> Result<Want, MessageError> {
        Ok(Want(check::ids(Self::WHAT, &proto.nodes, DIGEST_ENTRIES_MAX)?.collect()))
    }
}

impl Body for SignedRevocations {
    type Proto = proto::Revocations;
    const WHAT: &'static str = "revocations";
    const BYTES_MAX: usize = REVOCATION_LIST_BYTES_MAX + SLACK_BYTES;

    fn to_proto(&self) -> Result<proto::Revocations, MessageError> {
        Ok(proto::Revocations { list: self.as_bytes().to_vec() })
    }

    fn from_proto(proto: proto::Revocations) -> Result<SignedRevocations, MessageError> {
        SignedRevocations::from_bytes(proto.list)
    }
}

impl Body for Redeem {
    type Proto = proto::Redeem;
    const WHAT: &'static str = "redeem";
    const BYTES_MAX: usize = 256;

    fn to_proto(&self) -> Result<proto::Redeem, MessageError> {
        let (version_min, version_max) = version_bounds(&self.versions)?;
        Ok(proto::Redeem {
            version_min,
            version_max,
            mesh: self.mesh.as_bytes().to_vec(),
            ticket: self.ticket.as_bytes().to_vec(),
            secret: self.secret.as_bytes().to_vec(),
        })
    }

    fn from_proto(proto: proto::Redeem) -> Result<Redeem, MessageError> {
        let versions = proto.version_min..=proto.version_max;
        version_bounds(&versions)?;
        Ok(Redeem {
            versions,
            mesh: MeshId::from_bytes(check::array("mesh", &proto.mesh)?),
            ticket: TicketId::from_bytes(check::array("ticket id", &proto.ticket)?),
            secret: BearerSecret::from_bytes(check::array("bearer secret", &proto.secret)?),
        })
    }
}

impl Body for Redeemed {
    type Proto = proto::Redeemed;
    const WHAT: &'static str = "redeemed";
    const BYTES_MAX: usize = 1_024;

    fn to_proto(&self) -> Result<proto::Redeemed, MessageError> {
        check::text("mesh name", &self.mesh_name, MESH_NAME_BYTES_MAX)?;
        Ok(proto::Redeemed {
            certificate: self.certificate.as_bytes().to_vec(),
            mesh_secret: self.mesh_secret.as_bytes().to_vec(),
            mesh_name: self.mesh_name.clone(),
        })
    }

    fn from_proto(proto: proto::Redeemed) -> Result<Redeemed, MessageError> {
        check::text("mesh name", &proto.mesh_name, MESH_NAME_BYTES_MAX)?;
        Ok(Redeemed {
            certificate: SignedCertificate::from_bytes(proto.certificate)?,
            mesh_secret: MeshSecret::from_bytes(check::array("mesh secret", &proto.mesh_secret)?),
            mesh_name: proto.mesh_name,
        })
    }
}

/// The body of [`Control::Goodbye`].
impl Body for SignedRecord {
    type Proto = proto::Goodbye;
    const WHAT: &'static str = "goodbye";
    const BYTES_MAX: usize = RECORD_BYTES_MAX + SLACK_BYTES;

    fn to_proto(&self) -> Result<proto::Goodbye, MessageError> {
        Ok(proto::Goodbye { record: self.as_bytes().to_vec() })
    }

    fn from_proto(proto: proto::Goodbye) -> Result<SignedRecord, MessageError> {
        SignedRecord::from_bytes(proto.record)
    }
}

/// The body of [`Control::Ping`] and [`Control::Pong`].
struct Ping(u64);

impl Body for Ping {
    type Proto = proto::Ping;
    const WHAT: &'static str = "ping";
    const BYTES_MAX: usize = 64;

    fn to_proto(&self) -> Result<proto::Ping, MessageError> {
        Ok(proto::Ping { nonce: self.0 })
    }

    fn from_proto(proto: proto::Ping) -> Result<Ping, MessageError> {
        Ok(Ping(proto.nonce))
    }
}
