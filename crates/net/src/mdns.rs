//! Discovery on the local network, by multicast DNS.
//!
//! Members of one mesh announce themselves under a service name that is made from the mesh's beacon (see `beacon.rs`),
//! so that other meshes on the same network are not even dialled. Names are short, so two meshes may share one: the
//! greeting tells them apart.

use futures::{Stream, StreamExt};
use iroh::Endpoint;
use iroh_mdns_address_lookup::{DiscoveryEvent, MdnsAddressLookup};

use crate::NetError;
use crate::beacon::Beacon;
use crate::contact::Contact;
use crate::endpoint::causes;

/// Announces the endpoint and finds others: a stream of contacts. Announcing ends when the endpoint closes and the
/// stream is dropped.
///
/// # Errors
/// [`NetError::Start`] if the machine has no interface on which multicast works.
pub(crate) async fn discover(
    endpoint: &Endpoint,
    beacon: &Beacon,
) -> Result<impl Stream<Item = Contact> + Send + Unpin + 'static, NetError> {
    let start = |reason: String| NetError::Start { what: "discovery on the local network", reason };
    let lookup = MdnsAddressLookup::builder()
        .service_name(beacon.service_name())
        .build(endpoint.id())
        .map_err(|error| start(causes(&error)))?;
    endpoint.address_lookup().map_err(|error| start(causes(&error)))?.add(lookup.clone());
    let events = lookup.subscribe().await;
    Ok(Box::pin(events.filter_map(|event| async {
        match event {
            DiscoveryEvent::Discovered { endpoint_info, .. } => {
                Some(Contact::from_transport_addrs(endpoint_info.endpoint_id, endpoint_info.addrs()))
            }
            _ => None,
        }
    })))
}
