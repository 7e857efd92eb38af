//! What `murmur serve --signed-by` asks of the models of this machine.

use std::path::Path;

use murmur_node::signatures;
use murmur_protocol::mesh::NodeId;

use super::{Session, show};
use crate::{
    exit::{Code, Failure},
    target::LocalModel,
};

/// Refuses a model of which nothing on this machine shows that the key has signed it. It is read through, unless that was done before.
pub(super) fn demand(session: &Session, model: &LocalModel, signer: NodeId) -> anyhow::Result<()> {
    let bar = show::reading_bar(session);
    let known = signatures::known_of(&session.store(), &model.path, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let known = known?;
    if known.iter().any(|attested| attested.is_by(signer)) {
        return Ok(());
    }
    Err(Failure::because(
        Code::Failed,
        format!(
            "{} is not served: nothing on this machine shows that {signer} has signed it; {}. If a node of a mesh shows it, `murmur models pull NAME \
             --signed-by {signer}` keeps that here; or leave out --signed-by to serve it unsigned",
            model.id,
            signatures::signers(&known)
        ),
    ))
}

/// Whether the key is known to have signed a file, without reading it through; or nobody has to. What cannot be found out is not so.
pub(super) fn is_known_to_be(session: &Session, file: &Path, signed_by: Option<NodeId>) -> bool {
    let Some(signer) = signed_by else { return true };
    match signatures::known_unread(&session.store(), file) {
        Ok(known) => known.iter().any(|attested| attested.is_by(signer)),
        Err(error) => {
            tracing::warn!("who has signed {}: {error}", file.display());
            false
        }
    }
}
