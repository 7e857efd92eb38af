//! The issuer's account of the tickets for a private mesh: who may still come in with which.
//!
//! The account is on disk before an answer goes out, so that no crash gives away a use twice. A node that redeems the
//! same ticket again, because the answer got lost, gets a certificate again and uses up nothing.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use murmur_protocol::mesh::{
    BearerSecret, MeshId, NodeId, Redeem, Refusal, RefusalCode, Role, SignedCertificate, TicketId,
};
use serde::{Deserialize, Serialize};

use crate::credentials::{self, Credentials, MEMBER_VALID_MS};
use crate::{NetError, clock, data_dir};

/// Tickets that are not expired, at most.
pub const TICKETS_MAX: usize = 1_024;

/// Nodes that may redeem one ticket without a limit of its own.
pub const REDEEMERS_MAX: usize = 4_096;

const FILE: &str = "tickets.json";

/// What is asked of a new ticket.
#[derive(Debug, Clone)]
pub struct Invitation {
    /// What its bearer becomes.
    pub role: Role,
    /// How long it counts, in milliseconds.
    pub valid_ms: u64,
    /// How many nodes may come in with it; `None`: any number. Private meshes only.
    pub uses: Option<NonZeroU32>,
}

impl Default for Invitation {
    /// For one worker, within a day.
    fn default() -> Self {
        Invitation { role: Role::Worker, valid_ms: 24 * 3_600_000, uses: Some(NonZeroU32::MIN) }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Issued {
    id: TicketId,
    /// BLAKE3 of the bearer secret: the file alone lets nobody in.
    secret_hash: String,
    serves: bool,
    expires_ms: u64,
    uses: Option<NonZeroU32>,
    revoked: bool,
    redeemed_by: Vec<NodeId>,
}

/// The account.
#[derive(Debug)]
pub(crate) struct Tickets {
    path: PathBuf,
    issued: Mutex<Vec<Issued>>,
}

impl Tickets {
    /// The stored account; an empty one at first.
    pub(crate) fn load(data_dir: &Path, mesh: &MeshId) -> Result<Self, NetError> {
        let path = credentials::folder(data_dir, mesh).join(FILE);
        let issued = data_dir::read_json(&path)?.unwrap_or_default();
        Ok(Tickets { path, issued: Mutex::new(issued) })
    }

    fn issued(&self) -> MutexGuard<'_, Vec<Issued>> {
        self.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a new ticket.
    pub(crate) fn issue(
        &self,
        id: TicketId,
        secret: &BearerSecret,
        invitation: &Invitation,
        expires_ms: u64,
    ) -> Result<(), NetError> {
        let mut issued = self.issued();
        let mut next = issued.clone();
        let now_ms = clock::unix_ms();
        next.retain(|ticket| ticket.expires_ms > now_ms);
        if next.len() >= TICKETS_MAX {
            return Err(NetError::Ticket(format!("{TICKETS_MAX} tickets are open; wait until some expire")));
        }
        next.push(Issued {
            id,
            secret_hash: hash(secret),
            serves: invitation.role == Role::Worker,
            expires_ms,
            uses: invitation.uses,
            revoked: false,
            redeemed_by: Vec::new(),
        });
        data_dir::replace_json(&self.path, &next)?;
        *issued = next;
        Ok(())
    }

    /// Revokes a ticket: nobody comes in with it any more; who is in stays. False if there is no such ticket.
    pub(crate) fn revoke(&self, id: TicketId) -> Result<bool, NetError> {
        let mut issued = self.issued();
        let mut next = issued.clone();
        let Some(ticket) = next.iter_mut().find(|ticket| ticket.id == id) else { return Ok(false) };
        ticket.revoked = true;
        data_dir::replace_json(&self.path, &next)?;
        *issued = next;
        Ok(true)
    }

    /// Lets `node` in, or says why not.
    pub(crate) fn redeem(
        &self,
        credentials: &Credentials,
        node: NodeId,
        redeem: &Redeem,
    ) -> Result<SignedCertificate, Refusal> {
        let unknown = || Refusal::new(RefusalCode::TicketUnknown, "this node has issued no such ticket");
        let failed = |error: NetError| {
            tracing::error!(%error, "a ticket could not be redeemed");
            Refusal::new(RefusalCode::Overloaded, "the ticket cannot be redeemed at the moment; try again")
        };
        let owner = credentials.owner.as_ref().ok_or_else(unknown)?;
        let mut issued = self.issued();
        let mut next = issued.clone();
        let ticket = next.iter_mut().find(|ticket| ticket.id == redeem.ticket).ok_or_else(unknown)?;
        if ticket.secret_hash != hash(&redeem.secret) {
            return Err(unknown());
        }
        if ticket.revoked {
            return Err(Refusal::new(RefusalCode::TicketRevoked, "the ticket has been revoked; ask for a new one"));
        }
        if ticket.expires_ms <= clock::unix_ms() {
            return Err(Refusal::new(RefusalCode::TicketExpired, "the ticket has expired; ask for a new one"));
        }
        if !ticket.redeemed_by.contains(&node) {
            let uses = ticket.uses.map_or(REDEEMERS_MAX, |uses| usize::try_from(uses.get()).unwrap_or(usize::MAX));
            if ticket.redeemed_by.len() >= uses.min(REDEEMERS_MAX) {
                return Err(Refusal::new(RefusalCode::TicketUsedUp, "the ticket is used up; ask for a new one"));
            }
            ticket.redeemed_by.push(node);
        }
        let role = if ticket.serves { Role::Worker } else { Role::Client };
        data_dir::replace_json(&self.path, &next).map_err(failed)?;
        *issued = next;
        credentials::certify(owner, node, role, MEMBER_VALID_MS).map_err(failed)
    }
}

fn hash(secret: &BearerSecret) -> String {
    blake3::hash(secret.as_bytes()).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Office {
        folder: tempfile::TempDir,
        credentials: Credentials,
        tickets: Tickets,
    }

    fn office() -> Office {
        let folder = tempfile::tempdir().unwrap();
        let credentials = Credentials::found(folder.path(), "home", NodeId::from_bytes([1; 32])).unwrap();
        let tickets = Tickets::load(folder.path(), &credentials.mesh).unwrap();
        Office { folder, credentials, tickets }
    }

    impl Office {
        fn issue(&self, number: u8, uses: Option<u32>, expires_ms: u64) -> Redeem {
            let (id, secret) = (TicketId::from_bytes([number; 16]), BearerSecret::from_bytes([number; 16]));
            let uses = uses.and_then(NonZeroU32::new);
            self.tickets.issue(id, &secret, &Invitation { uses, ..Invitation::default() }, expires_ms).unwrap();
            Redeem { versions: 1..=1, mesh: self.credentials.mesh, ticket: id, secret }
        }

        fn redeem(&self, node: u8, redeem: &Redeem) -> Result<SignedCertificate, RefusalCode> {
            let node = NodeId::from_bytes([node; 32]);
            self.tickets.redeem(&self.credentials, node, redeem).map_err(|refusal| refusal.code)
        }
    }

    #[test]
    fn a_ticket_lets_in_as_many_nodes_as_it_says_and_the_same_one_again() {
        let office = office();
        let redeem = office.issue(1, Some(2), u64::MAX);
        let certificate = office.redeem(10, &redeem).unwrap();
        certificate.verify(office.credentials.mesh, NodeId::from_bytes([10; 32]), clock::unix_ms()).unwrap();
        office.redeem(10, &redeem).unwrap();
        office.redeem(11, &redeem).unwrap();
        assert_eq!(office.redeem(12, &redeem), Err(RefusalCode::TicketUsedUp));
        office.redeem(11, &redeem).unwrap();
    }

    #[test]
    fn the_account_survives_a_restart() {
        let mut office = office();
        let redeem = office.issue(1, Some(1), u64::MAX);
        office.redeem(10, &redeem).unwrap();
        office.tickets = Tickets::load(office.folder.path(), &office.credentials.mesh).unwrap();
        assert_eq!(office.redeem(11, &redeem), Err(RefusalCode::TicketUsedUp));
    }

    #[test]
    fn expired_revoked_and_unknown_tickets_and_wrong_secrets_let_nobody_in() {
        let office = office();
        let expired = office.issue(1, None, 1);
        assert_eq!(office.redeem(10, &expired), Err(RefusalCode::TicketExpired));
        let revoked = office.issue(2, None, u64::MAX);
        assert!(office.tickets.revoke(revoked.ticket).unwrap());
        assert_eq!(office.redeem(10, &revoked), Err(RefusalCode::TicketRevoked));
        let mut wrong = office.issue(3, None, u64::MAX);
        wrong.secret = BearerSecret::from_bytes([9; 16]);
        assert_eq!(office.redeem(10, &wrong), Err(RefusalCode::TicketUnknown));
        wrong.ticket = TicketId::from_bytes([9; 16]);
        assert_eq!(office.redeem(10, &wrong), Err(RefusalCode::TicketUnknown));
    }

    #[test]
    fn a_member_that_is_not_the_owner_redeems_nothing() {
        let mut office = office();
        let redeem = office.issue(1, None, u64::MAX);
        office.credentials.owner = None;
        assert_eq!(office.redeem(10, &redeem), Err(RefusalCode::TicketUnknown));
    }

    #[test]
    fn the_account_holds_no_secret() {
        let office = office();
        office.issue(0xab, None, u64::MAX);
        let path = credentials::folder(office.folder.path(), &office.credentials.mesh).join(FILE);
        let text = std::fs::read_to_string(path).unwrap();
        let secret = data_encoding::HEXLOWER.encode(&[0xab; 16]);
        assert_eq!(text.matches(&secret).count(), 1, "the id is there, the equal secret is not: {text}");
    }
}
