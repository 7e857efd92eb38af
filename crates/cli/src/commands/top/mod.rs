//! `murmur top`: a node at work, and the mesh around it. Live in a terminal; once, as text or JSON, for scripts.
//!
//! [`look`] is what the server says, as tables; [`draw`] puts them on a screen; [`live`] keeps the screen true.

mod draw;
mod live;
mod look;

use std::io::{self, IsTerminal};

use serde_json::json;

use super::{Session, small_runtime};
use crate::{args::Top, ui};
use look::{Look, Said};

pub(super) fn run(session: &Session, args: &Top) -> anyhow::Result<()> {
    let client = session.client();
    let runtime = small_runtime()?;
    if !args.once && !session.global.json && io::stdout().is_terminal() {
        return runtime.block_on(live::run(&client));
    }
    let said = runtime.block_on(Said::ask(&client))?;
    if session.global.json {
        return ui::print_json(&json!({"status": said.status, "mesh": said.mesh}));
    }
    let look = Look::of(&said);
    let mut page = look.headline(&client.address().to_string());
    for line in look.activity() {
        page.push('\n');
        page.push_str(&line);
    }
    page.push('\n');
    for table in look.tables() {
        let (headings, right) = (table.headings, table.right);
        let rows = match table.rows.is_empty() {
            true => format!("no {}\n", table.title),
            false => ui::table(headings, &table.rows, right),
        };
        page.push_str(&format!("\n{rows}"));
    }
    let guesses = look.guesses();
    if !guesses.is_empty() {
        page.push_str(&format!("\n{}\n", guesses.join("\n")));
    }
    ui::print(&ui::without_controls(&page))
}
