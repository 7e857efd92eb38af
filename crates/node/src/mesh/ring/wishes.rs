//! What the user wants of rings, with the nodes that there are.

use murmur_api::backend::{PlanPin, RingWishes};
use murmur_core::planner::{Ask, Objective, Pin};
use murmur_gguf::LayerRange;
use murmur_net::PeerView;
use murmur_protocol::mesh::NodeId;

use super::offers::{Offer, Size};
use crate::Node;

/// The nodes that can be named and the regions where they say they are, this one first.
pub(super) struct Ids(Vec<(NodeId, String)>);

impl Ids {
    pub(super) fn of(node: &Node, peers: &[PeerView], own: NodeId) -> Ids {
        let own = (own, node.options().region.clone());
        let theirs = peers.iter().map(|peer| (peer.record().node, peer.record().region.clone()));
        Ids([own].into_iter().chain(theirs).collect())
    }

    /// This node.
    pub(super) fn own(&self) -> NodeId {
        self.0[0].0
    }

    /// The one whose id begins so. Errors are for people.
    pub(super) fn find(&self, digits: &str) -> Result<NodeId, String> {
        let mut found = self.0.iter().map(|(node, _)| node).filter(|node| begins(node, digits));
        match (found.next(), found.next()) {
            (Some(only), None) => Ok(*only),
            (Some(_), Some(_)) => Err(format!("the ids of several nodes begin with {digits}. Give more digits")),
            (None, _) => Err(format!(
                "no node's id begins with {digits}: this node's is {}, and `murmur mesh peers` lists the others",
                self.own().short()
            )),
        }
    }

    fn pin(&self, pin: &PlanPin) -> Result<Pin, String> {
        let node = self.find(&pin.node)?;
        let exactly = |layers: &std::ops::Range<u32>| Pin::Exactly(node, LayerRange::new(layers.start, layers.end));
        Ok(pin.layers.as_ref().map_or(Pin::Used(node), exactly))
    }

    /// These wishes as the planner understands them. A node that is not there need not be excluded, but cannot be used: why, for
    /// people.
    pub(super) fn ask(&self, wishes: &RingWishes, size: Size) -> Result<Ask, String> {
        let excluded = self.0.iter().filter(|(node, region)| !may_be_used(wishes, node, region));
        Ok(Ask {
            streams: size.parallel,
            objective: match wishes.many_streams {
                Some(true) => Objective::ManyStreams,
                _ => Objective::OneStream,
            },
            keep_ends: wishes.keep_ends.unwrap_or(0),
            pins: wishes.pin.iter().map(|pin| self.pin(pin)).collect::<Result<_, _>>()?,
            excluded: excluded.map(|(node, _)| *node).collect(),
            rtt_us_max: rtt_us_max(wishes),
            ..Ask::new(self.own(), size.context_tokens)
        })
    }
}

/// Whoever does not say where it is, is in no region.
pub(super) fn may_be_used(wishes: &RingWishes, node: &NodeId, region: &str) -> bool {
    let is_there = wishes.only_region.is_empty() || wishes.only_region.iter().any(|only| only == region);
    is_there && !wishes.exclude.iter().any(|digits| begins(node, digits))
}

fn begins(node: &NodeId, digits: &str) -> bool {
    node.to_string().starts_with(digits)
}

pub(super) fn rtt_us_max(wishes: &RingWishes) -> Option<f64> {
    wishes.rtt_max.map(|rtt| 1e6 * rtt.as_secs_f64())
}

/// Whether a node may hold layers for a driver that wants this. How near it has to be is a question of the stage.
pub(super) fn allow(wishes: &RingWishes, offer: &Offer) -> bool {
    !offer.is_draining() && may_be_used(wishes, &offer.node, &offer.ways.region)
}

/// Whether a node must be in the ring of a driver that wants this: nobody takes its place.
pub(super) fn is_pinned(wishes: &RingWishes, node: NodeId) -> bool {
    wishes.pin.iter().any(|pin| begins(&node, &pin.node))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_named_by_the_first_digits_of_their_ids() {
        let id = |first: u8, rest: u8| {
            let mut bytes = [rest; 32];
            bytes[0] = first;
            NodeId::from_bytes(bytes)
        };
        let nodes = [(id(0xa0, 1), ""), (id(0xb0, 2), "eu"), (id(0xb0, 3), "us")];
        let ids = Ids(nodes.map(|(node, region)| (node, region.to_owned())).into());
        let size = Size { context_tokens: 512, parallel: 2 };
        let wants = |exclude: &[&str], pin: &[&str]| RingWishes {
            exclude: exclude.iter().map(|digits| (*digits).to_owned()).collect(),
            pin: pin.iter().map(|pin| pin.parse().unwrap()).collect(),
            ..RingWishes::default()
        };
        // Whoever it may be: it is not used.
        let ask = ids.ask(&wants(&["b0", "c"], &["a0:0-4"]), size).unwrap();
        assert_eq!(ask.excluded, [id(0xb0, 2), id(0xb0, 3)]);
        assert_eq!(ask.pins, [Pin::Exactly(id(0xa0, 1), LayerRange::new(0, 4))]);
        assert_eq!((ask.driver, ask.streams, ask.context_tokens), (id(0xa0, 1), 2, 512));
        assert_eq!(ids.ask(&wants(&[], &["b002"]), size).unwrap().pins, [Pin::Used(id(0xb0, 2))]);
        let only_eu = RingWishes { only_region: vec!["eu".to_owned()], ..RingWishes::default() };
        assert_eq!(ids.ask(&only_eu, size).unwrap().excluded, [id(0xa0, 1), id(0xb0, 3)]);
        for (digits, why) in [("b0", "several nodes"), ("c", "no node's id begins with c")] {
            let refused = ids.ask(&wants(&[], &[digits]), size).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
    }
}
