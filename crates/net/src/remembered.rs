//! Where the others of a mesh were last, so that a node that starts again finds them without anybody's help. Those on the other side may
//! take it to be there still, until the connections of its earlier life time out.

use std::path::{Path, PathBuf};
use std::time::Duration;

use iroh::EndpointAddr;
use murmur_protocol::mesh::{MeshId, NodeId};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::contact::Contact;
use crate::data_dir;
use crate::state::{Known, Table};

/// File with them, in the data folder.
pub const CONTACTS_FILE: &str = "contacts.json";

/// So many are remembered: those that have been there longest.
pub const REMEMBERED_MAX: usize = 32;

/// The file is written once in so long, at most, and when something has changed only.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// So long after it could not be written it is tried again.
const WRITE_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// Nodes of the same mesh that were there the last time. What cannot be read is of no use, and written anew.
pub(crate) fn recall(data_dir: &Path, mesh: MeshId) -> Vec<Contact> {
    let stored: Option<(MeshId, Vec<EndpointAddr>)> = data_dir::read_json(&data_dir.join(CONTACTS_FILE)).ok().flatten();
    let same = stored.filter(|(of, _)| *of == mesh).map(|(_, contacts)| contacts).unwrap_or_default();
    same.iter().take(REMEMBERED_MAX).map(|addr| Contact::from_transport_addrs(addr.id, &addr.addrs)).collect()
}

/// Writes down who is there, for as long as it runs. While nobody is, those of before are kept.
pub(crate) async fn keep(data_dir: PathBuf, mesh: MeshId, mut table: watch::Receiver<Table>) {
    let path = data_dir.join(CONTACTS_FILE);
    let mut written = Vec::new();
    while table.changed().await.is_ok() {
        let now = longest_there(&table.borrow_and_update());
        if now.is_empty() || now == written {
            continue;
        }
        let (path, stored) = (path.clone(), (mesh, now.clone()));
        let writing = tokio::task::spawn_blocking(move || data_dir::replace_json(&path, &stored));
        if let Ok(Err(error)) = writing.await {
            tracing::warn!(%error, "it is not remembered who is in the mesh");
            sleep(WRITE_AGAIN_AFTER).await;
            table.mark_changed();
            continue;
        }
        written = now;
        sleep(WRITE_EVERY).await;
    }
}

fn longest_there(table: &Table) -> Vec<EndpointAddr> {
    let mut known: Vec<_> = table.iter().collect();
    known.sort_by_key(|(_, known)| known.since);
    let contact = |(node, known): (&NodeId, &Known)| {
        let addresses = known.verified.record().addresses.clone();
        Contact { node: *node, addresses }.to_endpoint_addr().ok()
    };
    known.into_iter().take(REMEMBERED_MAX).filter_map(contact).collect()
}
