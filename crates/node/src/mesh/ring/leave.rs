//! The end of a host: before it goes, it says so, and drivers find others for the layers that it holds ([`super::form`]).

use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::{Node, model::Model};

/// How long drivers have for that.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// How often it is looked whether they have.
const LOOK_EVERY: Duration = Duration::from_millis(100);

impl Node {
    /// Takes nothing new of other nodes from now on, and says so to the mesh. What runs goes on.
    pub fn close(&self) {
        self.gate.close();
    }

    /// Waits, after [`Node::close`], until no other node uses layers that this one holds, ten seconds at most.
    pub async fn drain(&self) {
        let Some(own) = self.mesh().map(|mesh| mesh.node_id()) else { return };
        let guests_of_others = |model: &Model| {
            let guests =
                model.holding().held().as_ref().and_then(|held| Some(held.host.as_ref()?.guests())).unwrap_or(0);
            let ring = model.ring().1.map(|ring| ring.view()).unwrap_or_default();
            guests.saturating_sub(ring.iter().filter(|(_, holder)| *holder == Some(own)).count())
        };
        let drained = async {
            while self.models.iter().any(|model| guests_of_others(model) > 0) {
                sleep(LOOK_EVERY).await;
            }
        };
        if timeout(DRAIN_MAX, drained).await.is_err() {
            tracing::info!(
                "other nodes still use layers that this one holds: what goes around there has to find others now"
            );
        }
    }
}
