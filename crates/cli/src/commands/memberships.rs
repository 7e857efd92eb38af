//! What a data directory knows of meshes: founding a private one, giving a membership up, showing what there is.

use std::{
    fmt::Write,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use murmur_net::Credentials;
use murmur_protocol::mesh::{NodeId, Role};
use serde_json::{Value, json};

use super::Session;
use crate::{
    args::mesh::MeshName,
    client::ApiClient,
    exit::{Code, Failure},
    membership::{self, DataLock},
    ui,
};

pub(super) fn create(session: &Session, name: &MeshName) -> anyhow::Result<()> {
    if membership::find(&session.data_dir, name)?.is_some() {
        return Err(Failure::because(
            Code::Usage,
            format!("this node is a member of a mesh called {} already. Choose another name", name.0),
        ));
    }
    let node = murmur_net::node_key(&session.data_dir)?.node_id();
    let mesh = Credentials::found(&session.data_dir, &name.0, node)?;
    if session.global.json {
        return ui::print_json(&json!({
            "name": mesh.name, "id": mesh.mesh.to_string(), "private": true, "node": node.to_string(),
        }));
    }
    ui::print(&format!("{}\n", mesh.mesh))?;
    if !session.global.quiet {
        ui::say(&format!("founded the private mesh {}; its key is in {}", mesh.name, session.data_dir.display()));
        ui::say(&format!("next: murmur serve MODEL --mesh {}, and then: murmur mesh invite", mesh.name));
    }
    Ok(())
}

pub(super) fn leave(session: &Session, name: &MeshName, give_up_key: bool) -> anyhow::Result<()> {
    let Some(member) = membership::find(&session.data_dir, name)? else {
        return Err(Failure::because(
            Code::NotFound,
            format!("this node is no member of a private mesh called {}. `murmur mesh show` lists its meshes", name.0),
        ));
    };
    if member.owner.is_some() && !give_up_key {
        return Err(Failure::because(
            Code::Usage,
            format!(
                "this node holds the key of {}: without it nobody can be invited or revoked any more. If that is what \
                 you want, say --give-up-key",
                member.name
            ),
        ));
    }
    // A node that runs would go on with what it has in memory.
    let _lock = DataLock::take(&session.data_dir)?;
    Credentials::forget(&session.data_dir, &member.mesh)?;
    if session.global.json {
        return ui::print_json(&json!({"left": member.mesh.to_string()}));
    }
    if !session.global.quiet {
        ui::say(&format!("this node is no longer a member of {}", member.name));
    }
    Ok(())
}

pub(super) async fn show(session: &Session, client: &ApiClient) -> anyhow::Result<()> {
    let node = membership::own_node(&session.data_dir)?;
    let members = Credentials::all(&session.data_dir)?;
    let members: Vec<Member> = members.iter().map(|credentials| Member::of(credentials, node)).collect();
    // No server, or one that is in no mesh, is an ordinary state.
    let running = client.get("/api/mesh").await.ok();
    if session.global.json {
        let members: Vec<Value> = members.iter().map(Member::json).collect();
        return ui::print_json(&json!({
            "node": node.map(|node| node.to_string()), "memberships": members, "running": running,
        }));
    }
    let own = node.map_or_else(|| "none yet".to_owned(), |node| node.to_string());
    let mut page = format!("node          {own}\n");
    if let Some(mesh) = &running {
        page.push_str(&running_mesh(mesh, &own));
    }
    if members.is_empty() {
        page.push_str("\nno member of a private mesh\n");
    } else {
        let rows: Vec<Vec<String>> = members.iter().map(Member::row).collect();
        page.push('\n');
        page.push_str(&ui::table(&["MEMBER OF", "ROLE", "FOR", "KEY", "ID"], &rows, &[]));
    }
    ui::print(&ui::without_controls(&page))
}

/// `own`: the node of the data directory, which need not be that of the API's address.
fn running_mesh(mesh: &Value, own: &str) -> String {
    let text = |key: &str| mesh.get(key).and_then(Value::as_str).unwrap_or("-");
    let list = |key: &str| mesh.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let kind = if mesh.get("private").and_then(Value::as_bool) == Some(true) { "private" } else { "public" };
    let addresses: Vec<&str> = list("addresses").iter().filter_map(Value::as_str).collect();
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(page, "mesh          {} ({kind}), {}", text("name"), text("id"));
    if text("node") != own {
        let _ = writeln!(page, "running as    {}", text("node"));
    }
    let _ =
        writeln!(page, "addresses     {}", if addresses.is_empty() { "-".to_owned() } else { addresses.join(", ") });
    let _ = writeln!(page, "relay         {}", text("relay"));
    let _ = writeln!(page, "other nodes   {}", list("peers").len());
    page
}

/// A membership, for people.
struct Member {
    name: String,
    id: String,
    /// `None`: the certificate does not count, for the reason in `hindrance`.
    role: Option<Role>,
    expires_unix_ms: Option<u64>,
    hindrance: Option<String>,
    is_owner: bool,
}

impl Member {
    fn of(credentials: &Credentials, node: Option<NodeId>) -> Self {
        let certificate = match node {
            Some(node) => {
                credentials.certificate.verify(credentials.mesh, node, unix_ms()).map_err(|error| error.to_string())
            }
            None => Err("the node's key is gone".to_owned()),
        };
        Self {
            name: credentials.name.clone(),
            id: credentials.mesh.to_string(),
            role: certificate.as_ref().ok().map(|certificate| certificate.role),
            expires_unix_ms: certificate.as_ref().ok().map(|certificate| certificate.expires_ms),
            hindrance: certificate.err(),
            is_owner: credentials.owner.is_some(),
        }
    }

    fn role_name(&self) -> &'static str {
        self.role.map_or("none", Role::name)
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "id": self.id,
            "role": self.role_name(),
            "expires_unix_ms": self.expires_unix_ms,
            "hindrance": self.hindrance,
            "owner": self.is_owner,
        })
    }

    fn row(&self) -> Vec<String> {
        const DAY_MS: u64 = 24 * 3_600_000;
        let period = match (&self.hindrance, self.expires_unix_ms) {
            (Some(hindrance), _) => hindrance.clone(),
            (None, Some(expires_ms)) => format!("{} days", expires_ms.saturating_sub(unix_ms()) / DAY_MS),
            (None, None) => "-".to_owned(),
        };
        let key = if self.is_owner { "here" } else { "-" };
        vec![self.name.clone(), self.role_name().to_owned(), period, key.to_owned(), self.id.clone()]
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
