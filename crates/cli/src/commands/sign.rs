//! `murmur models sign`: this machine's word for what a model's file is.

use murmur_node::signatures;
use murmur_store::{ModelRef, Store};
use serde_json::json;

use super::{Session, show};
use crate::ui;

pub(super) fn run(session: &Session, store: &Store, model: &ModelRef) -> anyhow::Result<()> {
    let resolved = store.resolve(model)?;
    let key = murmur_net::node_key(&session.data_dir)?;
    let bar = show::reading_bar(session);
    let signed = signatures::sign(store, &key, &resolved, |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    if session.global.json {
        return ui::print_json(
            &json!({"store_name": resolved.name, "path": resolved.path, "signature": signed.view()}),
        );
    }
    let (name, signer) = (&signed.says().name, signed.says().signer);
    ui::say(&format!("signed {name} as {signer}"));
    if !session.global.quiet {
        ui::say(&format!(
            "who is in a mesh with a node that serves it: murmur models pull {name} --signed-by {signer}"
        ));
    }
    Ok(())
}
