//! Node records: what a node says about itself, signed, to everyone.
//!
//! A record is the whole truth of its node until a record with a higher sequence number comes, it expires, or a tombstone
//! ends it. Expiry needs no wall clock: `ttl_ms` counts from reception, less the age that whoever passes on another's
//! record states beside it. Sequence numbers begin at the node's Unix time in ms at start, so that a restarted node is newer
//! than its past.
//!
//! The signature is over the bytes as received, never over a re-serialisation: fields that a newer version added survive
//! being passed on by an older one.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use prost::Message;

use super::body::Body;
use super::check::{self, open_enum};
use super::content::{CONTENTS_MAX, HeldContent};
use super::error::{BadSignature, MessageError};
use super::hello::{Capabilities, SOFTWARE_BYTES_MAX};
use super::id::{MeshId, NodeId};
use super::key::{self, NodeKey, SIGNATURE_BYTES};
use super::measured::{self, LINKS_MAX, MachineSpeed, MeasuredLink};
use super::member::SignedCertificate;
use super::model::{MODELS_MAX, STAGES_MAX, ServedModel, ServedStage};
use super::proto;

/// Longest signed record: with gossip's own overhead it fits the 4,096 bytes that gossip carries.
pub const RECORD_BYTES_MAX: usize = 3_800;
/// Longest validity of a record: in a mesh so large that everybody's renewals would be too much for everybody.
pub const TTL_MS_MAX: u32 = 600_000;
/// Socket addresses of one node.
pub const DIRECT_ADDRESSES_MAX: usize = 16;
/// Length of a relay's URL.
pub const RELAY_URL_BYTES_MAX: usize = 256;
/// Length of the name of a region, bytes.
pub const REGION_BYTES_MAX: usize = 32;

const DOMAIN: &str = "murmur node record v1";

/// What a node is in the mesh for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Serves models, and asks others.
    Worker,
    /// Asks only.
    Client,
    /// Helps others to find each other; neither serves nor asks.
    Seed,
    /// A role of a newer version: treat as one that serves nothing.
    Unknown,
}

open_enum!(Role { Worker, Client, Seed });

impl Role {
    /// In one word, for people and programs.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Worker => "worker",
            Role::Client => "client",
            Role::Seed => "seed",
            Role::Unknown => "unknown",
        }
    }
}

/// How a node can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Addresses {
    /// URL of its home relay, at most [`RELAY_URL_BYTES_MAX`] bytes. Not checked to be a URL.
    pub relay: Option<String>,
    /// Its socket addresses, at most [`DIRECT_ADDRESSES_MAX`], all different. IPv6 scopes do not travel.
    pub direct: Vec<SocketAddr>,
}

impl Addresses {
    /// The addresses that can be published: what cannot be dialled, duplicates and what is above the limit is left out.
    pub fn publishable(relay: Option<String>, direct: impl IntoIterator<Item = SocketAddr>) -> Addresses {
        let mut kept = Vec::new();
        for address in direct {
            let address = SocketAddr::new(address.ip(), address.port());
            if kept.len() < DIRECT_ADDRESSES_MAX && check::is_dialable(&address) && !kept.contains(&address) {
                kept.push(address);
            }
        }
        let relay = relay.filter(|url| check::text("relay", url, RELAY_URL_BYTES_MAX).is_ok());
        Addresses { relay, direct: kept }
    }

    pub(super) fn to_proto(&self) -> Result<proto::Addresses, MessageError> {
        let proto = proto::Addresses {
            relay: self.relay.clone(),
            direct: self.direct.iter().map(check::address_to_proto).collect(),
        };
        Addresses::from_proto(proto.clone())?;
        Ok(proto)
    }

    pub(super) fn from_proto(proto: proto::Addresses) -> Result<Addresses, MessageError> {
        const WHAT: &str = "direct addresses";
        if let Some(relay) = &proto.relay {
            check::text("relay", relay, RELAY_URL_BYTES_MAX)?;
        }
        check::count(WHAT, proto.direct.len(), DIRECT_ADDRESSES_MAX)?;
        let direct: Vec<SocketAddr> = proto.direct.iter().map(check::address_from_proto).collect::<Result<_, _>>()?;
        if !check::all_differ(&direct) {
            return Err(MessageError::Invalid { what: WHAT, why: "an address occurs twice" });
        }
        Ok(Addresses { relay: proto.relay, direct })
    }
}

/// What a node says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// Who speaks.
    pub node: NodeId,
    /// In which mesh.
    pub mesh: MeshId,
    /// Which statement: the highest counts.
    pub sequence: u64,
    /// How long the record counts after it was made, 1..=[`TTL_MS_MAX`].
    pub ttl_ms: u32,
    /// The node leaves: nothing before this record counts any more.
    pub tombstone: bool,
    /// What the node is in the mesh for.
    pub role: Role,
    /// How it can be reached.
    pub addresses: Addresses,
    /// What it serves or could serve, at most [`MODELS_MAX`], digests all different.
    pub models: Vec<ServedModel>,
    /// Name and version of its software, at most [`SOFTWARE_BYTES_MAX`] bytes.
    pub software: String,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Memory in which it could load models, as it says itself: a hint, never a ground for trust.
    pub memory_free_bytes: u64,
    /// Its proof of membership; private meshes. Whoever holds the mesh's secret can publish, so that this is what tells
    /// members from those who once were: check it with [`SignedCertificate::verify`].
    pub certificate: Option<SignedCertificate>,
    /// Ranges of layers that it holds or would hold for rings, at most [`STAGES_MAX`], digests all different.
    pub stages: Vec<ServedStage>,
    /// What it has measured of its ways to those that hold layers of the same models, the nearest first, at most
    /// [`LINKS_MAX`], peers all different.
    pub links: Vec<MeasuredLink>,
    /// How fast its machine is. `None`: not measured.
    pub machine: Option<MachineSpeed>,
    /// Models' files of which it hands out what it has, at most [`CONTENTS_MAX`], digests all different.
    pub contents: Vec<HeldContent>,
    /// Where it is, as its user calls the place, at most [`REGION_BYTES_MAX`] bytes. Empty: not said.
    pub region: String,
}

/// Why a record is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read, or breaks a limit.
    #[error("record: {0}")]
    Message(#[from] MessageError),
    /// It is of another mesh.
    #[error("the record is of mesh {found}, not of {expected}")]
    WrongMesh {
        /// Our mesh.
        expected: MeshId,
        /// The record's.
        found: MeshId,
    },
    /// The node that it is about did not sign it.
    #[error("record: {0}")]
    BadSignature(#[from] BadSignature),
    /// One's own record was to be signed with another node's key.
    #[error("the key to sign with is not that of node {0}")]
    WrongKey(NodeId),
}

impl NodeRecord {
    /// Signs the record. The key must be the node's.
    pub fn sign(&self, key: &NodeKey) -> Result<SignedRecord, RecordError> {
        if key.node_id() != self.node {
            return Err(RecordError::WrongKey(self.node));
        }
        let body = self.encode()?;
        Ok(SignedRecord(key::sealed(key.sign(DOMAIN, &body), &body).into()))
    }

    /// Leaves out links, contents once no link is left, then models and then stages, from the end until the record can be
    /// signed, and says how many models and stages: a node with more than a record holds must not vanish from the mesh. Put what
    /// matters most first. Links are the first to go, because without them a ring is only slower. Stages are the last, because a model
    /// that is left out others may serve as well, but a ring that lacks a stage is a model that nobody serves.
    pub fn shorten(&mut self) -> usize {
        let before = self.models.len() + self.stages.len();
        self.models.truncate(MODELS_MAX);
        self.stages.truncate(STAGES_MAX);
        self.links.truncate(LINKS_MAX);
        self.contents.truncate(CONTENTS_MAX);
        while matches!(self.encode(), Err(MessageError::TooLarge { .. }))
            && (self.links.pop().is_some()
                || self.contents.pop().is_some()
                || self.models.pop().is_some()
                || self.stages.pop().is_some())
        {}
        before - self.models.len() - self.stages.len()
    }
}

impl Body for NodeRecord {
    type Proto = proto::NodeRecord;
    const WHAT: &'static str = "node record";
    const BYTES_MAX: usize = RECORD_BYTES_MAX - SIGNATURE_BYTES;

    fn to_proto(&self) -> Result<proto::NodeRecord, MessageError> {
        check_scalars(self.ttl_ms, &self.software, &self.region)?;
        check_models(&self.models)?;
        check_stages(&self.stages)?;
        check_contents(&self.contents)?;
        Ok(proto::NodeRecord {
            node: self.node.as_bytes().to_vec(),
            mesh: self.mesh.as_bytes().to_vec(),
            sequence: self.sequence,
            ttl_ms: self.ttl_ms,
            tombstone: self.tombstone,
            role: self.role.to_wire(),
            addresses: Some(self.addresses.to_proto()?),
            models: self.models.iter().map(ServedModel::to_proto).collect::<Result<_, _>>()?,
            software: self.software.clone(),
            capabilities: self.capabilities.0,
            memory_free_bytes: self.memory_free_bytes,
            certificate: self.certificate.as_ref().map(|certificate| certificate.as_bytes().to_vec()),
            stages: self.stages.iter().map(ServedStage::to_proto).collect::<Result<_, _>>()?,
            links: measured::to_proto(&self.links)?,
            machine: self.machine.map(MachineSpeed::to_proto),
            contents: self.contents.iter().map(HeldContent::to_proto).collect::<Result<_, _>>()?,
            region: self.region.clone(),
        })
    }

    fn from_proto(proto: proto::NodeRecord) -> Result<NodeRecord, MessageError> {
        check_scalars(proto.ttl_ms, &proto.software, &proto.region)?;
        check::count("models", proto.models.len(), MODELS_MAX)?;
        let models: Vec<_> = proto.models.into_iter().map(ServedModel::from_proto).collect::<Result<_, _>>()?;
        check_models(&models)?;
        check::count("stages", proto.stages.len(), STAGES_MAX)?;
        let stages: Vec<_> = proto.stages.into_iter().map(ServedStage::from_proto).collect::<Result<_, _>>()?;
        check_stages(&stages)?;
        check::count("contents", proto.contents.len(), CONTENTS_MAX)?;
        let contents: Vec<_> = proto.contents.into_iter().map(HeldContent::from_proto).collect::<Result<_, _>>()?;
        check_contents(&contents)?;
        Ok(NodeRecord {
            node: NodeId::from_bytes(check::array("node", &proto.node)?),
            mesh: MeshId::from_bytes(check::array("mesh", &proto.mesh)?),
            sequence: proto.sequence,
            ttl_ms: proto.ttl_ms,
            tombstone: proto.tombstone,
            role: Role::from_wire(proto.role),
            addresses: Addresses::from_proto(proto.addresses.unwrap_or_default())?,
            models,
            software: proto.software,
            capabilities: Capabilities(proto.capabilities),
            memory_free_bytes: proto.memory_free_bytes,
            certificate: proto.certificate.map(SignedCertificate::from_bytes).transpose()?,
            stages,
            links: measured::from_proto(&proto.links)?,
            machine: proto.machine.map(MachineSpeed::from_proto),
            contents,
            region: proto.region,
        })
    }
}

fn check_scalars(ttl_ms: u32, software: &str, region: &str) -> Result<(), MessageError> {
    if !(1..=TTL_MS_MAX).contains(&ttl_ms) {
        return Err(MessageError::Invalid { what: "ttl_ms", why: "it must be from 1 to 600000" });
    }
    check::text("software", software, SOFTWARE_BYTES_MAX)?;
    check::text("region", region, REGION_BYTES_MAX)
}

fn check_models(models: &[ServedModel]) -> Result<(), MessageError> {
    check::count("models", models.len(), MODELS_MAX)?;
    if !check::all_differ(models.iter().map(|model| model.digest)) {
        return Err(MessageError::Invalid { what: "models", why: "a model occurs twice" });
    }
    Ok(())
}

fn check_stages(stages: &[ServedStage]) -> Result<(), MessageError> {
    check::count("stages", stages.len(), STAGES_MAX)?;
    if !check::all_differ(stages.iter().map(|stage| stage.digest)) {
        return Err(MessageError::Invalid { what: "stages", why: "a model occurs twice" });
    }
    Ok(())
}

fn check_contents(contents: &[HeldContent]) -> Result<(), MessageError> {
    check::count("contents", contents.len(), CONTENTS_MAX)?;
    if !check::all_differ(contents.iter().map(|content| content.digest)) {
        return Err(MessageError::Invalid { what: "contents", why: "a file occurs twice" });
    }
    Ok(())
}

/// A record as it travels: 64 bytes of signature, then the record. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SignedRecord(Arc<[u8]>);

/// What a record claims before anyone has checked it: enough to see whether it is news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Whom it says it is about.
    pub node: NodeId,
    /// Its sequence number.
    pub sequence: u64,
}

impl SignedRecord {
    /// Takes received bytes; only their number is checked. What was received with them is not kept alive.
    pub fn from_bytes(bytes: impl AsRef<[u8]>) -> Result<SignedRecord, MessageError> {
        let bytes = bytes.as_ref();
        check::size("signed record", bytes.len(), RECORD_BYTES_MAX)?;
        if bytes.len() <= SIGNATURE_BYTES {
            return Err(MessageError::Invalid { what: "signed record", why: "it is shorter than its signature" });
        }
        Ok(SignedRecord(bytes.into()))
    }

    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whom and which statement the bytes claim to be, without the cost of a verification. Proves nothing.
    pub fn claim(&self) -> Result<Claim, RecordError> {
        let (_, body) = key::parts(&self.0)?;
        let header = ClaimProto::decode(body).map_err(MessageError::from)?;
        Ok(Claim { node: NodeId::from_bytes(check::array("node", &header.node)?), sequence: header.sequence })
    }

    /// The record, once it is known to be well-formed, of `mesh`, and signed by the node that it is about.
    pub fn verify(&self, mesh: MeshId) -> Result<NodeRecord, RecordError> {
        let (signature, body) = key::parts(&self.0)?;
        let record = NodeRecord::decode(body)?;
        if record.mesh != mesh {
            return Err(RecordError::WrongMesh { expected: mesh, found: record.mesh });
        }
        record.node.verify(DOMAIN, body, signature)?;
        Ok(record)
    }
}

impl fmt::Debug for SignedRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SignedRecord({} bytes)", self.0.len())
    }
}

/// The first fields of `proto::NodeRecord`, with the rest skipped as unknown.
#[derive(Clone, PartialEq, prost::Message)]
struct ClaimProto {
    #[prost(bytes = "vec", tag = "1")]
    node: Vec<u8>,
    #[prost(uint64, tag = "3")]
    sequence: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::measured::RTT_US_MAX;
    use crate::mesh::model::{LAYERS_MAX, ModelState};

    fn signed(proto: &proto::NodeRecord, more: &[u8], key: &NodeKey) -> SignedRecord {
        let body = [proto.encode_to_vec().as_slice(), more].concat();
        SignedRecord(key::sealed(key.sign(DOMAIN, &body), &body).into())
    }

    fn key_and_proto() -> (NodeKey, proto::NodeRecord) {
        let key = NodeKey::from_bytes(&[1; 32]);
        let proto = proto::NodeRecord {
            node: key.node_id().as_bytes().to_vec(),
            mesh: MeshId::public("m").as_bytes().to_vec(),
            sequence: 7,
            ttl_ms: 1_000,
            ..Default::default()
        };
        (key, proto)
    }

    fn link() -> proto::MeasuredLink {
        proto::MeasuredLink { peer: vec![3; 8], rtt_us: 800, bytes_per_s: 0 }
    }

    fn stage() -> proto::ServedStage {
        proto::ServedStage { digest: vec![1; 32], name: "m".into(), layers: 28, ..Default::default() }
    }

    #[test]
    fn fields_and_enum_values_of_a_newer_version_leave_the_rest_readable_and_the_signature_good() {
        let (key, mut proto) = key_and_proto();
        proto.role = 99;
        proto.models = vec![proto::ServedModel {
            digest: vec![1; 32],
            name: "m".into(),
            state: 99,
            tokenizer: vec![2; 32],
            ..Default::default()
        }];
        proto.stages = vec![proto::ServedStage { state: 99, ..stage() }];
        // Field 1000, a number, and field 1001, bytes.
        let newer = [0xc0, 0x3e, 5, 0xca, 0x3e, 3, 1, 2, 3];
        let record = signed(&proto, &newer, &key).verify(MeshId::public("m")).unwrap();
        assert_eq!((record.role, record.models[0].state), (Role::Unknown, ModelState::Unknown));
        assert_eq!(record.stages[0].state, ModelState::Unknown);
        assert_eq!((record.sequence, record.addresses), (7, Addresses::default()));
    }

    #[test]
    fn a_signed_record_that_breaks_a_rule_is_refused_though_the_signature_is_good() {
        let (key, good) = key_and_proto();
        let mesh = MeshId::public("m");
        assert!(signed(&good, &[], &key).verify(mesh).is_ok());
        let address = |ip: &[u8], port| proto::Addresses {
            relay: None,
            direct: vec![proto::SocketAddress { ip: ip.to_vec(), port }],
        };
        let with_stage = |stage| proto::NodeRecord { stages: vec![stage], ..good.clone() };
        for (first, end, layers) in [(0, 0, 28), (28, 28, 28), (0, LAYERS_MAX, LAYERS_MAX), (27, 28, 28)] {
            let stage = proto::ServedStage { first, end, layers, ..stage() };
            assert!(signed(&with_stage(stage), &[], &key).verify(mesh).is_ok());
        }
        let with_links = |links| proto::NodeRecord { links, ..good.clone() };
        for link in [link(), proto::MeasuredLink { rtt_us: RTT_US_MAX, bytes_per_s: u64::MAX, ..link() }] {
            assert!(signed(&with_links(vec![link]), &[], &key).verify(mesh).is_ok());
        }
        let with_addresses = |addresses| proto::NodeRecord { addresses: Some(addresses), ..good.clone() };
        let broken = [
            proto::NodeRecord { ttl_ms: 0, ..good.clone() },
            proto::NodeRecord { region: "r".repeat(REGION_BYTES_MAX + 1), ..good.clone() },
            proto::NodeRecord { ttl_ms: TTL_MS_MAX + 1, ..good.clone() },
            proto::NodeRecord { node: vec![1; 31], ..good.clone() },
            proto::NodeRecord { node: Vec::new(), ..good.clone() },
            proto::NodeRecord { certificate: Some(vec![0; 300]), ..good.clone() },
            proto::NodeRecord { models: vec![proto::ServedModel::default(); MODELS_MAX + 1], ..good.clone() },
            proto::NodeRecord { stages: vec![stage(); 2], ..good.clone() },
            proto::NodeRecord { stages: vec![proto::ServedStage::default(); STAGES_MAX + 1], ..good.clone() },
            with_stage(proto::ServedStage { digest: vec![1; 31], ..stage() }),
            with_stage(proto::ServedStage { name: String::new(), ..stage() }),
            with_stage(proto::ServedStage { build: "b".repeat(65), ..stage() }),
            with_stage(proto::ServedStage { layers: 0, ..stage() }),
            with_stage(proto::ServedStage { layers: LAYERS_MAX + 1, ..stage() }),
            with_stage(proto::ServedStage { first: 8, end: 7, ..stage() }),
            with_stage(proto::ServedStage { end: 29, ..stage() }),
            with_links(vec![link(); 2]),
            with_links((0..=LINKS_MAX as u8).map(|i| proto::MeasuredLink { peer: vec![i; 8], ..link() }).collect()),
            with_links(vec![proto::MeasuredLink { peer: vec![3; 32], ..link() }]),
            with_links(vec![proto::MeasuredLink { peer: Vec::new(), ..link() }]),
            with_links(vec![proto::MeasuredLink { rtt_us: 0, ..link() }]),
            with_links(vec![proto::MeasuredLink { rtt_us: RTT_US_MAX + 1, ..link() }]),
            with_addresses(address(&[10, 0, 0], 1)),
            with_addresses(address(&[10, 0, 0, 1], 65_536)),
            with_addresses(address(&[10, 0, 0, 1], 0)),
            with_addresses(address(&[0; 16], 1)),
            with_addresses(proto::Addresses { relay: Some("a\nb".into()), direct: Vec::new() }),
        ];
        for proto in broken {
            let refused = signed(&proto, &[], &key).verify(mesh);
            assert!(matches!(refused, Err(RecordError::Message(_))), "{refused:?}");
        }
    }

    #[test]
    fn a_signature_of_another_kind_of_statement_is_no_record() {
        let (key, proto) = key_and_proto();
        let body = proto.encode_to_vec();
        let confused = SignedRecord(key::sealed(key.sign("murmur ticket v1", &body), &body).into());
        assert_eq!(confused.verify(MeshId::public("m")), Err(RecordError::BadSignature(BadSignature)));
    }
}
