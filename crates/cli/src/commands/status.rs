//! `murmur status`: what the running server does.

use serde_json::Value;

use super::{Session, small_runtime};
use crate::ui;

pub(super) fn run(session: &Session) -> anyhow::Result<()> {
    let client = session.client();
    let status = small_runtime()?.block_on(client.get("/api/status"))?;
    if session.global.json {
        return ui::print_json(&status);
    }
    let text = |value: &Value, name: &str| value.get(name).map(plain).unwrap_or_default();
    let mut out = format!(
        "murmur {} at http://{}\n",
        text(&status, "version"),
        client.address()
    );
    let models = status
        .get("models")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    if models.is_empty() {
        out.push_str("no models\n");
    } else {
        let details = |model: &Value| match model.get("details") {
            Some(Value::Object(facts)) => facts
                .iter()
                .map(|(name, value)| format!("{name} {}", plain(value)))
                .collect::<Vec<_>>()
                .join(", "),
            _ => String::new(),
        };
        let rows: Vec<Vec<String>> = models
            .iter()
            .map(|m| {
                vec![
                    text(m, "id"),
                    text(m, "state"),
                    text(m, "context_tokens"),
                    details(m),
                ]
            })
            .collect();
        out.push('\n');
        out.push_str(&ui::table(
            &["MODEL", "STATE", "CONTEXT", "DETAILS"],
            &rows,
            &[2],
        ));
    }
    if let Some(Value::Object(node)) = status
        .get("node")
        .filter(|node| node.as_object().is_some_and(|facts| !facts.is_empty()))
    {
        let rows: Vec<Vec<String>> = node
            .iter()
            .map(|(name, value)| vec![name.clone(), plain(value)])
            .collect();
        out.push('\n');
        out.push_str(&ui::table(&["NODE", ""], &rows, &[]));
    }
    ui::print(&ui::without_controls(&out))
}

/// A value for people: texts without quotes.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}
