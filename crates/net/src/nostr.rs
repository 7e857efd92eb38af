//! Discovery through Nostr relays.
//!
//! Each node publishes how it can be reached as an addressable event (one per node, replaced by the next) that expires
//! soon (NIP-40), on several relays at once, and listens there for those of others. Each relay has a task and a
//! connection of its own, so that any one suffices and a dead one delays nobody.
//!
//! The event's author is a key that stands for nothing; it is what relays count and limit. The content is a contact
//! that its node has signed ([`contact`]). In a private mesh it is encrypted for members and all names depend on the
//! mesh's secret (see `beacon.rs`).

use std::path::Path;
use std::time::Duration;

use murmur_protocol::mesh::{Addresses, NodeKey, contact};
use nostr_sdk::nips::nip44::v2::{self, ConversationKey};
use nostr_sdk::{
    Client, Event, EventBuilder, Filter, Keys, Kind, RelayPoolNotification, RelayUrl, SecretKey, Tag, Timestamp,
};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::beacon::Beacon;
use crate::contact::Contact;
use crate::state::Command;
use crate::{NetError, data_dir};

/// The events' kind: addressable, and ours alone as far as known.
pub const EVENT_KIND: u16 = 37_411;

/// How long an event says it is good for. Relays forget it then, and so do we.
pub const EVENT_TTL_S: u64 = 30 * 60;

/// How often an event is replaced although nothing has changed: a clock that is off by ten minutes, either way, does no
/// harm.
pub const PUBLISH_EVERY_S: u64 = 10 * 60;

/// How far an author's clock may be off. Older or more future events are ignored.
pub const CLOCK_SKEW_S: u64 = 15 * 60;

/// Relays that are used at once, at most.
pub const RELAYS_MAX: usize = 8;

/// Longest content of an event.
pub const CONTENT_BYTES_MAX: usize = 4_096;

/// Pause before publishing is tried again on a relay that did not take it; each further failure doubles it.
const RETRY_MS: u64 = 3_000;

/// Longest pause: a relay that comes back is found within it, and one that takes nothing is not asked all the time.
const RETRY_MS_MAX: u64 = 5 * 60_000;

/// File of the key that signs events, in the data folder.
const KEY_FILE: &str = "nostr.key";

/// Events that a relay sends at once when we subscribe, at most.
const BACKLOG_MAX: usize = 500;

/// One node's part in discovery through Nostr.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    node_key: NodeKey,
    keys: Keys,
    beacon: Beacon,
}

impl Publisher {
    /// With the event key of the data folder, made on first use.
    pub(crate) fn new(data_dir: &Path, node_key: NodeKey, beacon: Beacon) -> Result<Self, NetError> {
        let path = data_dir.join(KEY_FILE);
        let secret = data_dir::secret(&path, || Keys::generate().secret_key().to_secret_bytes())?;
        let secret = SecretKey::from_slice(&secret)
            .map_err(|error| NetError::CorruptFile { path, reason: error.to_string() })?;
        Ok(Publisher { node_key, keys: Keys::new(secret), beacon })
    }

    /// Publishes and listens on one relay until dropped.
    pub(crate) async fn serve(self, relay: RelayUrl, own: watch::Receiver<Addresses>, found: mpsc::Sender<Command>) {
        let client = Client::new(self.keys.clone());
        if let Err(error) = client.add_relay(&relay).await {
            tracing::warn!(%relay, %error, "this Nostr relay cannot be used");
            return;
        }
        let mut notifications = client.notifications();
        client.connect().await;
        let since = Timestamp::now() - (EVENT_TTL_S + CLOCK_SKEW_S);
        let filter =
            Filter::new().kind(Kind::Custom(EVENT_KIND)).hashtag(self.beacon.tag()).since(since).limit(BACKLOG_MAX);
        if let Err(error) = client.subscribe(filter, None).await {
            tracing::warn!(%relay, %error, "subscribing on this Nostr relay failed");
        }
        let listen = async {
            loop {
                match notifications.recv().await {
                    Ok(RelayPoolNotification::Event { event, .. }) => {
                        if let Some(contact) = self.contact(&event, Timestamp::now())
                            && found.send(Command::Found(contact)).await.is_err()
                        {
                            return;
                        }
                    }
                    Ok(RelayPoolNotification::Shutdown) | Err(RecvError::Closed) => return,
                    // What was missed is published again soon.
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                }
            }
        };
        tokio::select! {
            () = listen => {}
            () = self.publish(&relay, &client, own) => {}
        }
    }

    async fn publish(&self, relay: &RelayUrl, client: &Client, mut own: watch::Receiver<Addresses>) {
        let mut failures = 0;
        loop {
            client.wait_for_connection(Duration::from_millis(RETRY_MS)).await;
            let addresses = own.borrow_and_update().clone();
            let reachable = addresses.relay.is_some() || !addresses.direct.is_empty();
            if reachable && let Err(reason) = self.send(client, &addresses).await {
                if failures == 0 {
                    tracing::info!(%relay, reason, "a Nostr relay does not take how this node can be reached; it will be tried again");
                }
                sleep(Duration::from_millis(pause_ms(failures))).await;
                failures += 1;
                continue;
            }
            failures = 0;
            let again = Instant::now() + Duration::from_secs(PUBLISH_EVERY_S);
            tokio::select! {
                changed = own.changed() => if changed.is_err() { return },
                () = sleep_until(again) => {}
            }
        }
    }

    /// The error: why the relay does not have it now, and may have it later.
    async fn send(&self, client: &Client, addresses: &Addresses) -> Result<(), String> {
        let event = match self.event(addresses, Timestamp::now()) {
            Ok(event) => event,
            Err(error) => {
                tracing::error!(%error, "the own contact cannot be published");
                return Ok(());
            }
        };
        match client.send_event(&event).await {
            Ok(output) if !output.success.is_empty() => Ok(()),
            Ok(output) => Err(output.failed.into_values().next().unwrap_or_else(|| "it does not answer".to_owned())),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The event that says how this node can be reached.
    fn event(&self, addresses: &Addresses, now: Timestamp) -> Result<Event, NetError> {
        let node = self.node_key.node_id();
        let mut content = contact::seal(addresses, &self.node_key).map_err(NetError::protocol)?;
        if let Some(key) = self.beacon.key() {
            content = v2::encrypt_to_bytes(&ConversationKey::new(key), &content).map_err(NetError::protocol)?;
        }
        let tags = [
            Tag::identifier(self.beacon.node_tag(node)),
            Tag::hashtag(self.beacon.tag()),
            Tag::expiration(now + EVENT_TTL_S),
        ];
        EventBuilder::new(Kind::Custom(EVENT_KIND), data_encoding::BASE64.encode(&content))
            .tags(tags)
            .custom_created_at(now)
            .sign_with_keys(&self.keys)
            .map_err(NetError::protocol)
    }

    /// The contact in an event, or `None` if it is stale, not ours to read, not what its node signed, or the own one.
    fn contact(&self, event: &Event, now: Timestamp) -> Option<Contact> {
        let (now, made) = (now.as_secs(), event.created_at.as_secs());
        let expires = event.tags.expiration()?.as_secs();
        let stale = expires.saturating_add(CLOCK_SKEW_S) < now
            || made.saturating_add(EVENT_TTL_S + CLOCK_SKEW_S) < now
            || made > now.saturating_add(CLOCK_SKEW_S);
        let named = event.tags.hashtags().any(|tag| tag == self.beacon.tag());
        if stale || !named || event.kind != Kind::Custom(EVENT_KIND) || event.content.len() > CONTENT_BYTES_MAX {
            return None;
        }
        let mut content = data_encoding::BASE64.decode(event.content.as_bytes()).ok()?;
        if let Some(key) = self.beacon.key() {
            content = v2::decrypt_to_bytes(&ConversationKey::new(key), &content).ok()?;
        }
        let (node, addresses) = contact::open(&content).ok()?;
        (node != self.node_key.node_id()).then_some(Contact { node, addresses })
    }
}

/// Pause after a failure that so many others came before.
fn pause_ms(failures_before: u32) -> u64 {
    RETRY_MS.saturating_mul(1 << failures_before.min(10)).min(RETRY_MS_MAX)
}

/// The relays to use, checked and without duplicates.
pub(crate) fn relay_urls(urls: &[String]) -> Result<Vec<RelayUrl>, NetError> {
    let mut relays = Vec::new();
    for url in urls {
        let relay = RelayUrl::parse(url)
            .map_err(|error| NetError::Option { what: "Nostr relay", reason: format!("{url}: {error}") })?;
        if !relays.contains(&relay) {
            relays.push(relay);
        }
    }
    if relays.len() > RELAYS_MAX {
        let reason = format!("{} are given, and {RELAYS_MAX} can be used at once", relays.len());
        return Err(NetError::Option { what: "Nostr relays", reason });
    }
    Ok(relays)
}

#[cfg(test)]
mod tests {
    use murmur_protocol::mesh::{MeshId, MeshSecret};

    use super::*;

    fn publisher(number: u8, secret: Option<u8>) -> Publisher {
        let secret = secret.map(|byte| MeshSecret::from_bytes([byte; 32]));
        Publisher {
            node_key: NodeKey::from_bytes(&[number; 32]),
            keys: Keys::generate(),
            beacon: Beacon::new(MeshId::public("x"), secret.as_ref()),
        }
    }

    fn addresses() -> Addresses {
        Addresses::publishable(Some("https://relay.example/".into()), ["192.0.2.77:4711".parse().unwrap()])
    }

    #[test]
    fn members_read_each_others_contacts_and_ignore_their_own() {
        let now = Timestamp::from_secs(1_800_000_000);
        for secret in [None, Some(9)] {
            let (a, b) = (publisher(1, secret), publisher(2, secret));
            let event = a.event(&addresses(), now).unwrap();
            let contact = b.contact(&event, now).unwrap();
            assert_eq!((contact.node, contact.addresses), (a.node_key.node_id(), addresses()));
            assert_eq!(a.contact(&event, now), None);
        }
    }

    #[test]
    fn an_event_of_a_private_mesh_shows_strangers_nothing() {
        let now = Timestamp::from_secs(1_800_000_000);
        let member = publisher(1, Some(9));
        let event = member.event(&addresses(), now).unwrap();
        let text = format!("{} {:?}", event.content, event.tags);
        let content = data_encoding::BASE64.decode(event.content.as_bytes()).unwrap();
        for secret in [member.node_key.node_id().to_string(), MeshId::public("x").to_string(), "192.0.2.77".into()] {
            assert!(!text.contains(&secret) && !String::from_utf8_lossy(&content).contains(&secret));
        }
        for stranger in [publisher(2, None), publisher(2, Some(8))] {
            assert_eq!(stranger.contact(&event, now), None);
        }
    }

    #[test]
    fn a_relay_that_takes_nothing_is_asked_less_and_less_often() {
        let pauses: Vec<u64> = (0..40).map(pause_ms).collect();
        assert_eq!((pauses[0], pauses[1], pauses[39]), (RETRY_MS, 2 * RETRY_MS, RETRY_MS_MAX));
        assert!(pauses.is_sorted());
    }

    #[test]
    fn stale_and_future_events_are_ignored_and_ten_minutes_of_skew_are_not() {
        let now = 1_800_000_000;
        let (a, b) = (publisher(1, None), publisher(2, None));
        let event = a.event(&addresses(), Timestamp::from_secs(now)).unwrap();
        let read_at = |at: u64| b.contact(&event, Timestamp::from_secs(at)).is_some();
        assert!(read_at(now - 600) && read_at(now + 600));
        assert!(!read_at(now - CLOCK_SKEW_S - 1));
        assert!(!read_at(now + EVENT_TTL_S + CLOCK_SKEW_S + 1));
    }

    #[test]
    fn a_contact_that_its_node_did_not_sign_is_ignored() {
        let now = Timestamp::from_secs(1_800_000_000);
        let (a, b) = (publisher(1, None), publisher(2, None));
        let event = a.event(&addresses(), now).unwrap();
        let mut content = data_encoding::BASE64.decode(event.content.as_bytes()).unwrap();
        let last = content.len() - 3;
        content[last] ^= 1;
        let forged = EventBuilder::new(event.kind, data_encoding::BASE64.encode(&content))
            .tags(event.tags.clone())
            .custom_created_at(now)
            .sign_with_keys(&a.keys)
            .unwrap();
        assert!(b.contact(&event, now).is_some());
        assert_eq!(b.contact(&forged, now), None);
    }
}
