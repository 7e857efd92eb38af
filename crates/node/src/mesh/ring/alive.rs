//! When a node counts as lost: one rule for all who wait for one, be it the host of a stage, the next one on the way of hidden states,
//! or one that is said to hold what this one holds.

use std::time::{Duration, Instant};

use murmur_net::serve::{Patience, SIGN_OF_LIFE_ROUND_TRIPS};
use murmur_protocol::{frame::FrameError, mesh::NodeId};
use tokio::time::timeout;

use crate::mesh::MeshNode;

/// A node of which nothing comes for so long is asked for a sign of life. Those that have nothing to say give one twice as often.
pub(super) const SILENCE_MAX: Duration = Duration::from_millis(500);
/// With a node that one has to do without if it gives none.
pub(super) const ALONE: Patience =
    Patience { least: Duration::from_millis(500), round_trips: SIGN_OF_LIFE_ROUND_TRIPS };
/// With a host for which another one stands by: less is lost if it is given up by mistake.
pub(super) const WITH_STANDBY: Patience = Patience { least: Duration::from_millis(40), round_trips: 2 };

/// How long a node may be silent that one has to do without, once it was asked for something.
pub(super) fn patience(mesh: &MeshNode, node: NodeId) -> Duration {
    ALONE.with(mesh.mesh().round_trip(node))
}

/// Asks a node for a sign of life. False: it gives none for longer than it should be silent.
pub(super) async fn is_there(mesh: &MeshNode, node: NodeId, patience: Patience) -> bool {
    if node == mesh.mesh().node_id() {
        return true;
    }
    let (ping, asked) = (mesh.mesh().ping(node), Instant::now());
    tokio::pin!(ping);
    loop {
        // While a link fills up, round trips become longer.
        let left = patience.with(mesh.mesh().round_trip(node)).saturating_sub(asked.elapsed());
        match timeout(left, &mut ping).await {
            Ok(answer) => return answer.is_ok(),
            Err(_) if left.is_zero() => return false,
            Err(_) => {}
        }
    }
}

/// Waits for what a node is to do, for as long as it gives signs of life.
pub(super) async fn while_there<T>(
    mesh: &MeshNode,
    node: NodeId,
    doing: impl Future<Output = T>,
) -> Result<T, FrameError> {
    tokio::pin!(doing);
    loop {
        if let Ok(done) = timeout(SILENCE_MAX, &mut doing).await {
            return Ok(done);
        }
        if !is_there(mesh, node, ALONE).await {
            return Err(silent("it does not answer"));
        }
    }
}

/// Whoever is silent cannot be reached: that is no death that anybody is to blame for.
pub(super) fn silent(why: &'static str) -> FrameError {
    FrameError::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, why))
}
