//! What is offered of models that are spread over the mesh: by this node, and by its peers as their records say.

use murmur_gguf::LayerRange;
use murmur_net::PeerView;
use murmur_protocol::mesh::{ModelDigest, ModelState, NodeId, ServedStage};

use super::{
    facts::{self, Ways},
    host::Terms,
    wishes,
};
use crate::{
    Node,
    mesh::{MeshNode, announce},
    model::{Model, Room},
};

/// How long requests may be, and how many run at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Size {
    pub(super) context_tokens: u32,
    pub(super) parallel: u32,
}

/// What a node offers of a model.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Offer {
    pub(super) node: NodeId,
    pub(super) stage: ServedStage,
    /// Round trip, where there is a connection; to ourselves 0.
    pub(super) rtt_us: f64,
    pub(super) ways: Ways,
}

impl Offer {
    pub(super) fn range(&self) -> LayerRange {
        LayerRange::new(self.stage.first, self.stage.end)
    }

    /// What its layers are held for.
    pub(super) fn terms(&self) -> Terms {
        let ServedStage { context_tokens, parallel, exact, .. } = self.stage;
        Terms { range: self.range(), context_tokens, parallel, exact }
    }

    /// It has layers loaded, for drivers that use them or for whoever wants them.
    pub(super) fn is_loaded(&self) -> bool {
        matches!(self.stage.state, ModelState::Ready | ModelState::Available) && self.stage.first < self.stage.end
    }

    /// It has layers loaded that drivers use: these stay where they are.
    pub(super) fn is_used(&self) -> bool {
        self.stage.state == ModelState::Ready && self.stage.first < self.stage.end
    }

    /// It holds nothing that anybody uses, or is about to.
    pub(super) fn is_free(&self) -> bool {
        self.stage.state == ModelState::Available
    }

    pub(super) fn is_draining(&self) -> bool {
        self.stage.state == ModelState::Draining
    }

    pub(super) fn size(&self) -> Size {
        Size { context_tokens: self.stage.context_tokens, parallel: self.stage.parallel }
    }
}

/// What is offered of a model, by this node too, and by those that end or pause.
pub(super) fn listed(node: &Node, mesh: &MeshNode, model: &ModelDigest) -> Vec<Offer> {
    Sight::of(node, mesh).listed(model)
}

/// What is offered of a model by those that this node may ask, itself included.
pub(super) fn allowed(node: &Node, mesh: &MeshNode, model: &ModelDigest) -> Vec<Offer> {
    let mut offers = listed(node, mesh, model);
    offers.retain(|offer| wishes::allow(&node.options().ring, offer));
    offers
}

/// What peers offer of a model, those that end or pause among them.
pub(super) fn of_peers(mesh: &MeshNode, peers: &[PeerView], model: &ModelDigest) -> Vec<Offer> {
    let theirs = peers.iter().flat_map(|peer| {
        let stages = peer.record().stages.iter().filter(|stage| stage.digest == *model);
        stages.map(|stage| {
            let (rtt_us, ways) = facts::ways(mesh, peer, model);
            Offer { node: peer.record().node, stage: stage.clone(), rtt_us, ways }
        })
    });
    theirs.collect()
}

/// What is known at one moment of this node and of its peers: it is looked at for each model, and found out once for all of them.
pub(super) struct Sight<'a> {
    node: &'a Node,
    mesh: &'a MeshNode,
    room: Room<'a>,
    peers: Vec<PeerView>,
}

impl<'a> Sight<'a> {
    pub(super) fn of(node: &'a Node, mesh: &'a MeshNode) -> Sight<'a> {
        Sight { node, mesh, room: Room::of(&node.models), peers: mesh.mesh().peers() }
    }

    pub(super) fn peers(&self) -> &[PeerView] {
        &self.peers
    }

    /// What is offered of a model, by this node too, and by those that end or pause.
    fn listed(&self, model: &ModelDigest) -> Vec<Offer> {
        let is_meant = |own: &&Model| own.identity().is_some_and(|identity| identity.digest == *model);
        let own = self.node.models.iter().filter(is_meant);
        let own = own.filter_map(|own| announce::offered(self.node, own, &self.room)).map(|stage| Offer {
            node: self.mesh.mesh().node_id(),
            stage,
            rtt_us: 0.0,
            ways: Ways::own(self.node, model),
        });
        own.chain(of_peers(self.mesh, &self.peers, model)).collect()
    }

    /// What is offered by nodes that compute as this one does, so that they fit together in a ring, with what was known of them
    /// before; and which nodes are about to leave.
    pub(super) fn matching_offers(&self, model: &Model, digest: &ModelDigest) -> (Vec<Offer>, Vec<NodeId>) {
        let (exact, build) = (self.node.options().exact, murmur_engine::build_id());
        let (leaving, mut offers): (Vec<Offer>, Vec<Offer>) =
            self.listed(digest).into_iter().partition(Offer::is_draining);
        offers.retain(|Offer { stage, .. }| {
            stage.exact == exact && stage.layers == model.layers() && (!exact || stage.build == build)
        });
        model.search().recall(&mut offers);
        (offers, leaving.into_iter().map(|offer| offer.node).collect())
    }
}
