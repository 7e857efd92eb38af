//! The greeting of a connection, and refusals.
//!
//! Both sides begin with a [`Hello`]. Each then decides alone, by the same rules, whether it goes on; who does not says so
//! with a [`Refusal`] and closes. Nothing else is served before.

use std::fmt;
use std::ops::RangeInclusive;

use super::body::Body;
use super::check::{self, open_enum};
use super::error::MessageError;
use super::id::MeshId;
use super::member::SignedCertificate;
use super::proto;

/// Versions of the protocol that this build speaks.
pub const PROTOCOL_VERSIONS: RangeInclusive<u32> = 1..=1;
/// Length of name and version of a software.
pub const SOFTWARE_BYTES_MAX: usize = 64;
/// Length of a reason in refusals and failures.
pub const REASON_BYTES_MAX: usize = 512;

/// What a node can do, one bit each. Bits that this build does not know are kept and mean nothing to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Nothing beyond the protocol's version.
    pub const NONE: Capabilities = Capabilities(0);
    /// Honours grammars in requests.
    pub const GRAMMARS: Capabilities = Capabilities(1);
    /// Reports log-probabilities.
    pub const LOGPROBS: Capabilities = Capabilities(1 << 1);
    /// Hands out tokenizer cards of the models it serves.
    pub const CARDS: Capabilities = Capabilities(1 << 2);
    /// Loads an available model when a request for it comes.
    pub const LOADS_ON_DEMAND: Capabilities = Capabilities(1 << 3);
    /// Compares tables by their summaries. Said in greetings; in a record it means nothing.
    pub const SUMMARIES: Capabilities = Capabilities(1 << 4);

    /// Hands out bytes of the model files that its record lists.
    pub const CONTENTS: Capabilities = Capabilities(1 << 5);
    /// Hands out what was signed of the model files that its record lists.
    pub const ATTESTATIONS: Capabilities = Capabilities(1 << 6);
    /// Has models of its record guess for others that say so there.
    pub const GUESSES: Capabilities = Capabilities(1 << 7);

    /// Both sets together.
    pub const fn with(self, other: Capabilities) -> Capabilities {
        Capabilities(self.0 | other.0)
    }

    /// True when everything in `other` is in this set.
    pub const fn contains(self, other: Capabilities) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The first message of each side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Versions of the protocol that the sender speaks.
    pub versions: RangeInclusive<u32>,
    /// Name and version of its software, at most [`SOFTWARE_BYTES_MAX`] bytes.
    pub software: String,
    /// What it can do.
    pub capabilities: Capabilities,
    /// The mesh it means.
    pub mesh: MeshId,
    /// Its proof of membership; private meshes.
    pub certificate: Option<SignedCertificate>,
    /// Its wall clock, Unix ms: only to tell people that clocks differ, nothing is decided by it.
    pub wall_clock_ms: u64,
}

impl Body for Hello {
    type Proto = proto::Hello;
    const WHAT: &'static str = "hello";
    const BYTES_MAX: usize = 1_024;

    fn to_proto(&self) -> Result<proto::Hello, MessageError> {
        check::text("software", &self.software, SOFTWARE_BYTES_MAX)?;
        let (version_min, version_max) = version_bounds(&self.versions)?;
        Ok(proto::Hello {
            version_min,
            version_max,
            software: self.software.clone(),
            capabilities: self.capabilities.0,
            mesh: self.mesh.as_bytes().to_vec(),
            certificate: self.certificate.as_ref().map(|certificate| certificate.as_bytes().to_vec()),
            wall_clock_ms: self.wall_clock_ms,
        })
    }

    fn from_proto(proto: proto::Hello) -> Result<Hello, MessageError> {
        check::text("software", &proto.software, SOFTWARE_BYTES_MAX)?;
        let versions = proto.version_min..=proto.version_max;
        version_bounds(&versions)?;
        Ok(Hello {
            versions,
            software: proto.software,
            capabilities: Capabilities(proto.capabilities),
            mesh: MeshId::from_bytes(check::array("mesh", &proto.mesh)?),
            certificate: proto.certificate.map(SignedCertificate::from_bytes).transpose()?,
            wall_clock_ms: proto.wall_clock_ms,
        })
    }
}

/// The bounds of a range of versions; they start at 1, so that a greeting without them is noticed.
pub(super) fn version_bounds(versions: &RangeInclusive<u32>) -> Result<(u32, u32), MessageError> {
    let (min, max) = (*versions.start(), *versions.end());
    if min == 0 || min > max {
        return Err(MessageError::Invalid { what: "versions", why: "not a range of versions from 1" });
    }
    Ok((min, max))
}

/// The highest version that both sides speak, or the refusal to send, which names both ranges.
pub fn negotiate(ours: &RangeInclusive<u32>, theirs: &RangeInclusive<u32>) -> Result<u32, Refusal> {
    let highest = *ours.end().min(theirs.end());
    if highest >= *ours.start().max(theirs.start()) {
        return Ok(highest);
    }
    let range = |versions: &RangeInclusive<u32>| format!("{} to {}", versions.start(), versions.end());
    let reason = format!(
        "this node speaks protocol versions {}, yours {}; update the older of the two",
        range(ours),
        range(theirs)
    );
    Err(Refusal::new(RefusalCode::Version, &reason))
}

/// Why nothing is served to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// No common version of the protocol.
    Version,
    /// The peer means another mesh.
    WrongMesh,
    /// The mesh is private and the peer showed no certificate.
    NoCertificate,
    /// The certificate is not the mesh's word about this peer.
    BadCertificate,
    /// The certificate has ended.
    CertificateExpired,
    /// The certificate or the node was revoked.
    Revoked,
    /// Too many connections or handshakes; try later or elsewhere.
    Overloaded,
    /// A message that cannot be understood, or at the wrong moment.
    BadMessage,
    /// No such ticket here, or the wrong secret.
    TicketUnknown,
    /// The ticket has ended.
    TicketExpired,
    /// The ticket was redeemed as often as it may.
    TicketUsedUp,
    /// The ticket was revoked.
    TicketRevoked,
    /// The node is about to leave.
    Leaving,
    /// A code of a newer version: read the reason.
    Unknown,
}

open_enum!(RefusalCode {
    Version,
    WrongMesh,
    NoCertificate,
    BadCertificate,
    CertificateExpired,
    Revoked,
    Overloaded,
    BadMessage,
    TicketUnknown,
    TicketExpired,
    TicketUsedUp,
    TicketRevoked,
    Leaving,
});

/// Nothing is served, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people: at most [`REASON_BYTES_MAX`] bytes without control characters, which is what is left of a longer one.
    pub reason: String,
}

impl Refusal {
    /// A refusal; the reason is cut and cleaned to what can be sent.
    pub fn new(code: RefusalCode, reason: &str) -> Refusal {
        Refusal { code, reason: check::cleaned(reason, REASON_BYTES_MAX) }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "refused: {}", self.reason)
    }
}

impl std::error::Error for Refusal {}

impl Body for Refusal {
    type Proto = proto::Refusal;
    const WHAT: &'static str = "refusal";
    const BYTES_MAX: usize = 1_024;

    fn to_proto(&self) -> Result<proto::Refusal, MessageError> {
        check::text("reason", &self.reason, REASON_BYTES_MAX)?;
        Ok(proto::Refusal { code: self.code.to_wire(), reason: self.reason.clone() })
    }

    /// A refusal is understood whatever its reason looks like.
    fn from_proto(proto: proto::Refusal) -> Result<Refusal, MessageError> {
        Ok(Refusal::new(RefusalCode::from_wire(proto.code), &proto.reason))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn both_sides_find_the_same_version_or_both_refuse(a in 1u32..9, b in 0u32..9, c in 1u32..9, d in 0u32..9) {
            let (ours, theirs) = (a..=a + b, c..=c + d);
            match (negotiate(&ours, &theirs), negotiate(&theirs, &ours)) {
                (Ok(version), Ok(same)) => {
                    prop_assert_eq!(version, same);
                    prop_assert!(ours.contains(&version) && theirs.contains(&version));
                    prop_assert!(!(ours.contains(&(version + 1)) && theirs.contains(&(version + 1))));
                }
                (Err(_), Err(_)) => prop_assert!(!ours.clone().any(|version| theirs.contains(&version))),
                _ => prop_assert!(false, "the two sides disagree"),
            }
        }
    }

    #[test]
    fn a_refusal_for_versions_names_both_ranges() {
        let refusal = negotiate(&(1..=2), &(5..=7)).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::Version);
        assert!(refusal.reason.contains("1 to 2") && refusal.reason.contains("5 to 7"), "{}", refusal.reason);
    }

    #[test]
    fn a_reason_is_cut_at_a_character_and_cleaned() {
        let refusal = Refusal::new(RefusalCode::BadMessage, &format!("a\x1b[31m{}", "é".repeat(REASON_BYTES_MAX)));
        assert!(refusal.reason.starts_with("a [31mé"));
        assert_eq!(refusal.reason.len(), REASON_BYTES_MAX);
        let proto = proto::Refusal { code: 999, reason: "x".repeat(REASON_BYTES_MAX + 9) };
        let read = Refusal::from_proto(proto).unwrap();
        assert_eq!((read.code, read.reason.len()), (RefusalCode::Unknown, REASON_BYTES_MAX));
    }
}
