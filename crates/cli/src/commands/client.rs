//! `murmur client`: the models of a mesh behind the API, and none of one's own.

use super::{
    Session, launch,
    server::{self, Plan},
};
use crate::{args::mesh::Client, membership};

pub(super) fn run(session: &Session, args: &Client) -> anyhow::Result<()> {
    let mesh = membership::wanted_or_only(&session.data_dir, &args.mesh)?;
    let plan = async { Ok(Plan { node: launch::client_options(session, &args.mesh)?, mesh: Some(mesh) }) };
    server::run(session, &args.server, plan)
}
