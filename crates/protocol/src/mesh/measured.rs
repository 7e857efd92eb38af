//! What a node has measured of its machine and of its ways to others. Who plans a ring knows only its own; of those of others it
//! reads here.

use super::check;
use super::error::MessageError;
use super::id::NodeId;
use super::proto;

/// Measured ways in one record.
pub const LINKS_MAX: usize = 16;
/// Longest round trip that is told, in microseconds. Beyond a minute nobody is reached.
pub const RTT_US_MAX: u32 = 60_000_000;
/// So many bytes of a peer's id stand for it: enough to tell the nodes of a mesh apart, and a fourth of an id.
const PEER_BYTES: usize = 8;

/// The way from a node to one of its peers, as the node has measured it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeasuredLink {
    peer: [u8; PEER_BYTES],
    /// Least round trip of late in microseconds, 1..=[`RTT_US_MAX`].
    pub rtt_us: u32,
    /// What went that way in a second when much went there, in bytes; 0: not measured.
    pub bytes_per_s: u64,
}

impl MeasuredLink {
    /// The way to `peer`. A round trip that cannot be told is cut to the nearest that can.
    pub fn to(peer: &NodeId, rtt_us: u32, bytes_per_s: u64) -> MeasuredLink {
        let mut begin = [0; PEER_BYTES];
        begin.copy_from_slice(&peer.as_bytes()[..PEER_BYTES]);
        MeasuredLink { peer: begin, rtt_us: rtt_us.clamp(1, RTT_US_MAX), bytes_per_s }
    }

    /// Whether it leads to this node.
    pub fn is_to(&self, node: &NodeId) -> bool {
        node.as_bytes().starts_with(&self.peer)
    }

    /// Whether both lead to the same node.
    pub fn is_to_same(&self, other: &MeasuredLink) -> bool {
        self.peer == other.peer
    }

    fn to_proto(self) -> proto::MeasuredLink {
        proto::MeasuredLink { peer: self.peer.to_vec(), rtt_us: self.rtt_us, bytes_per_s: self.bytes_per_s }
    }

    fn from_proto(proto: &proto::MeasuredLink) -> Result<MeasuredLink, MessageError> {
        let peer = check::array("peer of a link", &proto.peer)?;
        Ok(MeasuredLink { peer, rtt_us: proto.rtt_us, bytes_per_s: proto.bytes_per_s })
    }
}

/// How fast a machine is, as it was measured when its node started: what is known of it before it has computed anything. What
/// it takes for a model is measured then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineSpeed {
    /// Bytes of memory that its processors read in a second.
    pub read_bytes_per_s: u64,
    /// Multiplications with an addition each, of 32-bit floats, that they do in a second.
    pub multiply_adds_per_s: u64,
}

impl MachineSpeed {
    pub(super) fn to_proto(self) -> proto::MachineSpeed {
        let MachineSpeed { read_bytes_per_s, multiply_adds_per_s } = self;
        proto::MachineSpeed { read_bytes_per_s, multiply_adds_per_s }
    }

    pub(super) fn from_proto(proto: proto::MachineSpeed) -> MachineSpeed {
        let proto::MachineSpeed { read_bytes_per_s, multiply_adds_per_s } = proto;
        MachineSpeed { read_bytes_per_s, multiply_adds_per_s }
    }
}

fn check_links(links: &[MeasuredLink]) -> Result<(), MessageError> {
    const WHAT: &str = "links";
    check::count(WHAT, links.len(), LINKS_MAX)?;
    if !check::all_differ(links.iter().map(|link| link.peer)) {
        return Err(MessageError::Invalid { what: WHAT, why: "a peer occurs twice" });
    }
    if !links.iter().all(|link| (1..=RTT_US_MAX).contains(&link.rtt_us)) {
        return Err(MessageError::Invalid { what: WHAT, why: "a round trip takes from 1 us to a minute" });
    }
    Ok(())
}

pub(super) fn to_proto(links: &[MeasuredLink]) -> Result<Vec<proto::MeasuredLink>, MessageError> {
    check_links(links)?;
    Ok(links.iter().map(|link| link.to_proto()).collect())
}

pub(super) fn from_proto(proto: &[proto::MeasuredLink]) -> Result<Vec<MeasuredLink>, MessageError> {
    check::count("links", proto.len(), LINKS_MAX)?;
    let links = proto.iter().map(MeasuredLink::from_proto).collect::<Result<Vec<_>, _>>()?;
    check_links(&links)?;
    Ok(links)
}
