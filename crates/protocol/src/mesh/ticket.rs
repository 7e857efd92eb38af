//! Tickets: how a person lets another's node into a mesh.
//!
//! A ticket is text that survives mail, chat and QR codes: `murmur1`, then base32 of a signature, the [`Ticket`] and a
//! checksum. The signature is the issuer's, so that nobody can send a joiner elsewhere by changing one; the checksum tells
//! a slip of the finger from a forgery.
//!
//! A ticket for a private mesh holds a bearer secret, not the mesh's secret: the issuer hands that over with a certificate
//! when the ticket is redeemed, counts the uses, and can revoke the ticket. A ticket for a public mesh only says which mesh
//! and where to begin.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use data_encoding::BASE32_NOPAD;

use super::body::Body;
use super::check;
use super::error::{BadSignature, MessageError};
use super::id::{MeshId, NodeId, TicketId};
use super::key::{self, NodeKey, SIGNATURE_BYTES};
use super::proto;
use super::record::{Addresses, Role};
use super::secret::BearerSecret;

/// What the text of every ticket begins with.
pub const TICKET_PREFIX: &str = "murmur1";
/// Longest text of a ticket that is looked at, blanks included.
pub const TICKET_TEXT_BYTES_MAX: usize = 4_096;
/// Length of a mesh's name.
pub const MESH_NAME_BYTES_MAX: usize = 64;

const SIGNED_BYTES_MAX: usize = 1_200;
const CHECKSUM_BYTES: usize = 4;
const DOMAIN: &str = "murmur ticket v1";

/// What a ticket says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// Its number in the issuer's account.
    pub id: TicketId,
    /// The mesh it leads into. Of a public mesh this is [`MeshId::public`] of the name.
    pub mesh: MeshId,
    /// The mesh's name, 1..=[`MESH_NAME_BYTES_MAX`] bytes.
    pub mesh_name: String,
    /// The node that signed it and, for a private mesh, redeems it.
    pub issuer: NodeId,
    /// Where the issuer could be reached when it signed.
    pub addresses: Addresses,
    /// What its bearer becomes.
    pub role: Role,
    /// When it ends, Unix ms. Every ticket ends. The issuer's clock decides.
    pub expires_ms: u64,
    /// Public or private, and what goes with it.
    pub admission: Admission,
}

/// How one gets in with a ticket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// The mesh is public: nothing has to be redeemed.
    Public,
    /// The mesh is private: the issuer redeems the ticket.
    Private {
        /// What to show.
        secret: BearerSecret,
        /// How often it can be redeemed; `None`: until it ends.
        uses: Option<NonZeroU32>,
    },
}

/// Why a ticket is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Something else altogether.
    #[error("this is not a ticket: a ticket begins with {TICKET_PREFIX}")]
    NotATicket,
    /// Longer than any ticket.
    #[error("this is not a ticket: it is longer than any ticket")]
    TooLong,
    /// Characters are wrong or missing.
    #[error("the ticket is damaged or incomplete; copy it again, all of it")]
    Damaged,
    /// It cannot be read, or breaks a rule.
    #[error("ticket: {0}")]
    Message(#[from] MessageError),
    /// Whoever it names as issuer did not sign it.
    #[error("the ticket is forged: {0}")]
    BadSignature(#[from] BadSignature),
    /// It was to be signed with another node's key.
    #[error("the key to sign with is not that of node {0}")]
    WrongKey(NodeId),
    /// It has ended.
    #[error("the ticket expired {ago_s} s ago; ask for a new one")]
    Expired {
        /// How long ago.
        ago_s: u64,
    },
}

impl Ticket {
    /// Signs the ticket. The key must be the issuer's.
    pub fn sign(self, key: &NodeKey) -> Result<SignedTicket, TicketError> {
        if key.node_id() != self.issuer {
            return Err(TicketError::WrongKey(self.issuer));
        }
        let body = self.encode()?;
        let bytes = key::sealed(key.sign(DOMAIN, &body), &body);
        Ok(SignedTicket { ticket: self, bytes })
    }

    /// Refuses a ticket that has ended at `now_unix_ms`.
    pub fn check_expiry(&self, now_unix_ms: u64) -> Result<(), TicketError> {
        match now_unix_ms.checked_sub(self.expires_ms) {
            Some(late_ms) => Err(TicketError::Expired { ago_s: late_ms / 1000 }),
            None => Ok(()),
        }
    }

    /// True when the mesh is private.
    pub fn is_private(&self) -> bool {
        matches!(self.admission, Admission::Private { .. })
    }

    fn check(&self) -> Result<(), MessageError> {
        if self.mesh_name.is_empty() {
            return Err(MessageError::Missing("mesh name"));
        }
        check::text("mesh name", &self.mesh_name, MESH_NAME_BYTES_MAX)?;
        if self.expires_ms == 0 {
            return Err(MessageError::Missing("expires_ms"));
        }
        let named = self.mesh == MeshId::public(&self.mesh_name);
        if self.admission == Admission::Public && !named {
            return Err(MessageError::Invalid { what: "mesh", why: "it is not the public mesh of that name" });
        }
        Ok(())
    }
}

impl Body for Ticket {
    type Proto = proto::Ticket;
    const WHAT: &'static str = "ticket";
    const BYTES_MAX: usize = SIGNED_BYTES_MAX - SIGNATURE_BYTES;

    fn to_proto(&self) -> Result<proto::Ticket, MessageError> {
        self.check()?;
        let (secret, uses) = match &self.admission {
            Admission::Public => (None, None),
            Admission::Private { secret, uses } => (Some(secret.as_bytes().to_vec()), uses.map(NonZeroU32::get)),
        };
        Ok(proto::Ticket {
            id: self.id.as_bytes().to_vec(),
            mesh: self.mesh.as_bytes().to_vec(),
            mesh_name: self.mesh_name.clone(),
            issuer: self.issuer.as_bytes().to_vec(),
            addresses: Some(self.addresses.to_proto()?),
            role: self.role.to_wire(),
            expires_ms: self.expires_ms,
            uses,
            secret,
        })
    }

    fn from_proto(proto: proto::Ticket) -> Result<Ticket, MessageError> {
        let no_uses = MessageError::Invalid { what: "uses", why: "it must be at least 1" };
        let uses = proto.uses.map(|uses| NonZeroU32::new(uses).ok_or(no_uses)).transpose()?;
        let admission = match (&proto.secret, uses) {
            (Some(secret), uses) => {
                Admission::Private { secret: BearerSecret::from_bytes(check::array("bearer secret", secret)?), uses }
            }
            (None, None) => Admission::Public,
            (None, Some(_)) => {
                return Err(MessageError::Invalid { what: "uses", why: "nobody counts the uses of a public mesh" });
            }
        };
        let ticket = Ticket {
            id: TicketId::from_bytes(check::array("ticket id", &proto.id)?),
            mesh: MeshId::from_bytes(check::array("mesh", &proto.mesh)?),
            mesh_name: proto.mesh_name,
            issuer: NodeId::from_bytes(check::array("issuer", &proto.issuer)?),
            addresses: Addresses::from_proto(proto.addresses.unwrap_or_default())?,
            role: Role::from_wire(proto.role),
            expires_ms: proto.expires_ms,
            admission,
        };
        ticket.check()?;
        Ok(ticket)
    }
}

/// A ticket that its issuer really signed. Its text form (`Display`, `FromStr`) is what people pass on.
///
/// Reading takes upper and lower case, since QR codes of upper case are smaller, and overlooks blanks and line breaks.
#[derive(Clone, PartialEq, Eq)]
pub struct SignedTicket {
    ticket: Ticket,
    bytes: Vec<u8>,
}

impl SignedTicket {
    /// What it says.
    pub fn ticket(&self) -> &Ticket {
        &self.ticket
    }
}

/// The text is as good as the bearer secret in it, so debug output leaves it out.
impl fmt::Debug for SignedTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SignedTicket").field(&self.ticket).finish()
    }
}

impl fmt::Display for SignedTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let checked = [self.bytes.as_slice(), &checksum(&self.bytes)].concat();
        write!(f, "{TICKET_PREFIX}{}", BASE32_NOPAD.encode(&checked).to_ascii_lowercase())
    }
}

impl FromStr for SignedTicket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<SignedTicket, TicketError> {
        if text.len() > TICKET_TEXT_BYTES_MAX {
            return Err(TicketError::TooLong);
        }
        let text: String = text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_ascii_uppercase()).collect();
        let digits = text.strip_prefix(&TICKET_PREFIX.to_ascii_uppercase()).ok_or(TicketError::NotATicket)?;
        let checked = BASE32_NOPAD.decode(digits.as_bytes()).map_err(|_| TicketError::Damaged)?;
        let (bytes, sum) = checked.split_last_chunk::<CHECKSUM_BYTES>().ok_or(TicketError::Damaged)?;
        if *sum != checksum(bytes) {
            return Err(TicketError::Damaged);
        }
        let (signature, body) = key::parts(bytes)?;
        let ticket = Ticket::decode(body)?;
        ticket.issuer.verify(DOMAIN, body, signature)?;
        Ok(SignedTicket { ticket, bytes: bytes.to_vec() })
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let hash = blake3::hash(bytes);
    let [a, b, c, d, ..] = *hash.as_bytes();
    [a, b, c, d]
}
