//! What a server says of itself at one moment, as lines and tables.

use serde_json::Value;

use crate::{
    client::ApiClient,
    units::{Size, human_duration},
};

/// What the server said: `/api/status`, and `/api/mesh` where it is in one.
#[derive(Debug, Clone)]
pub(super) struct Said {
    pub(super) status: Value,
    pub(super) mesh: Value,
}

impl Said {
    pub(super) async fn ask(client: &ApiClient) -> anyhow::Result<Self> {
        let status = client.get("/api/status").await?;
        let mesh = match status.get("mesh").is_some_and(Value::is_object) {
            true => client.get("/api/mesh").await?,
            false => Value::Null,
        };
        Ok(Self { status, mesh })
    }
}

/// Rows under headings.
#[derive(Debug)]
pub(super) struct Table {
    /// What the rows are, in the plural.
    pub(super) title: &'static str,
    pub(super) headings: &'static [&'static str],
    /// Columns that are aligned to the right.
    pub(super) right: &'static [usize],
    pub(super) rows: Vec<Vec<String>>,
}

/// The same for people.
#[derive(Debug)]
pub(super) struct Look<'a>(&'a Said);

const NONE: &str = "-";
/// The node that is asked, where a stage is held.
const OWN: &str = "this node";
/// Depths of which it is said what part of the guesses was right.
const DEPTHS_SHOWN: usize = 4;

impl<'a> Look<'a> {
    pub(super) fn of(said: &'a Said) -> Self {
        Self(said)
    }

    /// Version, address, time since the start, and the mesh.
    pub(super) fn headline(&self, address: &str) -> String {
        let Said { status, mesh } = self.0;
        let up = count(status, "/node/uptime_s").map_or_else(String::new, |s| format!(", up {}", age(s * 1_000)));
        let first = format!("murmur {} at http://{address}{up}", text(status, "/version"));
        if mesh.is_null() {
            return first;
        }
        let kind = if mesh.get("private") == Some(&Value::Bool(true)) { "private" } else { "public" };
        let node: String = text(mesh, "/node").chars().take(SHORT_ID).collect();
        format!("{first}; node {node} in the {kind} mesh {}", text(mesh, "/name"))
    }

    /// How fast tokens come, and whether others are served.
    pub(super) fn activity(&self) -> Vec<String> {
        let rate = |pointer| number(&self.0.status, pointer).unwrap_or(0.0);
        let (api, nodes) = (rate("/node/tokens_per_s/api"), rate("/node/tokens_per_s/nodes"));
        let mut lines = vec![match self.0.mesh.is_null() {
            true => format!("{api:.1} tokens/s"),
            false => format!("{api:.1} tokens/s for this machine, {nodes:.1} for other nodes"),
        }];
        let paused = self.0.status.pointer("/node/sharing/paused").and_then(Value::as_str);
        lines.extend(paused.map(|reason| format!("paused for other nodes: {reason}")));
        lines
    }

    /// Tokens per second, whoever asked.
    pub(super) fn tokens_per_s(&self) -> f64 {
        let rate = |pointer| number(&self.0.status, pointer).unwrap_or(0.0);
        rate("/node/tokens_per_s/api") + rate("/node/tokens_per_s/nodes")
    }

    /// Requests, models, peers, and the stages of rings where there are any.
    pub(super) fn tables(&self) -> Vec<Table> {
        let stages = Some(self.stages()).filter(|stages| !stages.rows.is_empty());
        [self.requests(), self.models(), self.peers()].into_iter().chain(stages).collect()
    }

    /// How each model's tokens are guessed: by whom and how well, what that brings, and why so.
    pub(super) fn guesses(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for model in list(&self.0.status, "/node/models") {
            if let Some(guessing) = model.get("guessing").filter(|guessing| guessing.is_object()) {
                lines.push(self.guessed(model, guessing));
                lines.push(format!("  {}", brought(model, guessing)));
                lines.push(format!("  {}", why(guessing)));
            }
        }
        lines
    }

    fn requests(&self) -> Table {
        let row = |request: &Value| {
            let (done, prompt) = (count(request, "/prompt_tokens_done"), count(request, "/prompt_tokens"));
            let prompt = match (done, prompt) {
                (Some(done), Some(prompt)) if done < prompt => format!("{done}/{prompt}"),
                (_, prompt) => prompt.map_or_else(|| NONE.to_owned(), |n| n.to_string()),
            };
            vec![
                text(request, "/model"),
                self.node(request.get("from"), "this machine"),
                self.node(request.get("at"), "here"),
                prompt,
                shown(request, "/generated_tokens"),
                speed(request, "/tokens_per_s"),
                count(request, "/age_ms").map_or_else(|| NONE.to_owned(), age),
            ]
        };
        Table {
            title: "requests",
            headings: &["MODEL", "FOR", "AT", "PROMPT", "TOKENS", "TOKENS/S", "AGE"],
            right: &[3, 4, 5, 6],
            rows: list(&self.0.status, "/node/requests").iter().map(row).collect(),
        }
    }

    fn models(&self) -> Table {
        let own = list(&self.0.status, "/node/models");
        let row = |model: &Value| {
            let id = model.get("id");
            let here = own.iter().find(|other| other.get("id") == id);
            let offers = list(model, "/details/served_by");
            let others = match offers {
                [] => None,
                [only] => Some(self.node(only.get("node"), NONE)),
                several => Some(format!("{} nodes", several.len())),
            };
            let place = here.map(|_| "here".to_owned()).into_iter().chain(others).collect::<Vec<_>>().join(", ");
            let sum = |own_key: &str, key: &str| {
                let own = here.and_then(|here| count(here, own_key));
                let all = own.into_iter().chain(offers.iter().filter_map(|offer| count(offer, key)));
                all.reduce(|a, b| a + b).map_or_else(|| NONE.to_owned(), |sum| sum.to_string())
            };
            let speeds = here.into_iter().chain(offers).filter_map(|at| number(at, "/decode_tokens_per_s"));
            let fastest = speeds.reduce(f64::max).map_or_else(|| NONE.to_owned(), |speed| format!("{speed:.1}"));
            let state = here.and_then(|here| here.get("state")).or(model.get("state"));
            let state = state.and_then(Value::as_str).unwrap_or(NONE);
            let state = match (state, number(model, "/progress")) {
                ("loading", Some(share)) => format!("loading {:.0} %", 100.0 * share),
                (state, _) => state.to_owned(),
            };
            let right = here.and_then(|here| percent(&compared(here)));
            let right = right.map_or_else(|| NONE.to_owned(), |right| format!("{right:.0} %"));
            let guesser = here.and_then(|here| here.pointer("/draft/node")).filter(|node| node.is_string());
            let right =
                guesser.map_or_else(|| right.clone(), |node| format!("{right} by {}", self.node(Some(node), NONE)));
            let memory = here.and_then(|here| count(here, "/memory_bytes_planned"));
            vec![
                text(model, "/id"),
                state,
                if place.is_empty() { NONE.to_owned() } else { place },
                sum("/requests_running", "/running"),
                sum("/requests_queued", "/queued"),
                fastest,
                right,
                shown(model, "/context_tokens"),
                memory.map_or_else(|| NONE.to_owned(), |bytes| Size(bytes).to_string()),
            ]
        };
        Table {
            title: "models",
            headings: &["MODEL", "STATE", "WHERE", "RUNNING", "QUEUED", "TOKENS/S", "GUESSED", "CONTEXT", "MEMORY"],
            right: &[3, 4, 5, 6, 7, 8],
            rows: list(&self.0.status, "/models").iter().map(row).collect(),
        }
    }

    fn peers(&self) -> Table {
        let row = |peer: &Value| {
            let models = list(peer, "/models");
            let busy: u64 = models.iter().filter_map(|model| count(model, "/running")).sum();
            let names: Vec<String> = models.iter().map(named).collect();
            vec![
                text(peer, "/short"),
                text(peer, "/role"),
                number(peer, "/rtt_ms").map_or_else(|| NONE.to_owned(), |rtt_ms| format!("{rtt_ms:.1} ms")),
                text(peer, "/path"),
                busy.to_string(),
                count(peer, "/since_s").map_or_else(|| NONE.to_owned(), |s| age(s * 1_000)),
                if names.is_empty() { NONE.to_owned() } else { names.join(", ") },
            ]
        };
        Table {
            title: "other nodes",
            headings: &["NODE", "ROLE", "RTT", "PATH", "RUNNING", "LISTED FOR", "MODELS"],
            right: &[2, 4, 5],
            rows: list(&self.0.mesh, "/peers").iter().map(row).collect(),
        }
    }

    fn stages(&self) -> Table {
        let row = |model: &Value, stage: &Value| {
            let layer = |end| count(stage, end).unwrap_or(0);
            vec![
                text(model, "/id"),
                format!("{}..{}", layer("/layers/0"), layer("/layers/1")),
                self.holder(stage),
                ms(stage, "/last_step/compute_us"),
                shown(stage, "/last_step/batch_rows"),
                ms(stage, "/hop_us"),
                text(stage, "/codec"),
                self.node(stage.pointer("/standby/node"), NONE),
            ]
        };
        let is_ring = |stages: &[Value]| stages.len() > 1 || stages.iter().any(|stage| self.is_elsewhere(stage));
        let models = list(&self.0.status, "/node/models").iter().map(|model| (model, list(model, "/stages")));
        let rings = models.filter(|(_, stages)| is_ring(stages));
        Table {
            title: "stages of rings",
            headings: &["MODEL", "LAYERS", "HELD BY", "STEP", "ROWS", "HOP", "CODEC", "STANDBY"],
            right: &[3, 4, 5],
            rows: rings.flat_map(|(model, stages)| stages.iter().map(move |stage| row(model, stage))).collect(),
        }
    }

    /// Who holds a stage.
    fn holder(&self, stage: &Value) -> String {
        match (stage.get("node").filter(|node| node.is_string()), count(stage, "/process_id")) {
            (node, _) if self.is_elsewhere(stage) => self.node(node, NONE),
            (None, None) => "lost".to_owned(),
            _ => OWN.to_owned(),
        }
    }

    /// Whether another node holds a stage.
    fn is_elsewhere(&self, stage: &Value) -> bool {
        stage.get("node").is_some_and(|node| node.is_string() && Some(node) != self.0.mesh.get("node"))
    }

    /// Who guesses for a model, and what part of what was compared was right.
    fn guessed(&self, model: &Value, guessing: &Value) -> String {
        let by_model = guessing.get("by_model") == Some(&Value::Bool(true));
        let name = model.pointer("/draft/model").and_then(Value::as_str).unwrap_or("a model");
        let who = match model.pointer("/draft/node").filter(|node| node.is_string()) {
            _ if !by_model => "looked up".to_owned(),
            Some(node) => format!("by {name} at {}", self.node(Some(node), NONE)),
            None => format!("by {name}"),
        };
        let compared = compared(model);
        let all: u64 = compared.iter().map(|of| of.1).sum();
        let right = match percent(&compared) {
            Some(right) => format!("{right:.0} % of {all} compared were right"),
            None => "none compared yet".to_owned(),
        };
        let depths = compared.chunks(1).take(DEPTHS_SHOWN).map_while(percent).map(|right| format!("{right:.0}"));
        let depths = depths.collect::<Vec<_>>().join(", ");
        let by_depth = if depths.is_empty() { depths } else { format!(", by depth {depths} %") };
        format!("guesses for {}, {who}: {right}{by_depth}", text(model, "/id"))
    }

    /// A node's id, cut; `instead` for null.
    fn node(&self, id: Option<&Value>, instead: &str) -> String {
        id.and_then(Value::as_str).map_or_else(|| instead.to_owned(), |id| id.chars().take(SHORT_ID).collect())
    }
}

/// Digits of a node's id that tell it from others, as in `murmur mesh peers`.
const SHORT_ID: usize = 10;

fn named(model: &Value) -> String {
    match text(model, "/state").as_str() {
        "ready" => text(model, "/name"),
        state => format!("{} ({state})", text(model, "/name")),
    }
}

/// Guesses that were right and guesses that were compared, by how many others waited before each.
fn compared(model: &Value) -> Vec<(u64, u64)> {
    let counts = |pointer| list(model, pointer).iter().map(|count| count.as_u64().unwrap_or(0));
    counts("/right_by_depth").zip(counts("/guessed_by_depth")).collect()
}

/// What part of those that were compared was right; `None`: nothing was compared.
fn percent(compared: &[(u64, u64)]) -> Option<f64> {
    let (right, all) = compared.iter().fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
    (all > 0).then(|| 100.0 * right as f64 / all as f64)
}

/// What guesses have brought, and cost.
fn brought(model: &Value, guessing: &Value) -> String {
    let around = match number(guessing, "/tokens_around") {
        Some(tokens) => format!("{tokens:.1} tokens for each way around"),
        None => "ways around not timed yet".to_owned(),
    };
    let lost = age(count(model, "/rejected_us").unwrap_or(0) / 1_000);
    format!("{around}; {lost} lost to wrong guesses at most")
}

/// Why so much is guessed, or nothing.
fn why(guessing: &Value) -> String {
    let many = |pointer, what: &str| match count(guessing, pointer).unwrap_or(0) {
        1 => format!("1 {what}"),
        many => format!("{many} {what}s"),
    };
    if count(guessing, "/plain_left").is_some_and(|left| left > 0) {
        return format!("left alone for {}: they cost time", many("/plain_left", "token"));
    }
    if guessing.get("pays") == Some(&Value::Bool(false)) {
        return "none at present: they would not pay, or nobody has any".to_owned();
    }
    format!(
        "{:.2} right expected: a way around is {} and a frame {}, so {} of {}; a token should take {}",
        number(guessing, "/right").unwrap_or(0.0),
        ms(guessing, "/around_us"),
        ms(guessing, "/frame_us"),
        many("/frames_in_flight", "frame"),
        many("/rows_per_frame", "row"),
        ms(guessing, "/token_us"),
    )
}

fn age(ms: u64) -> String {
    let seconds = ms / 1_000;
    match seconds {
        0..120 => human_duration(std::time::Duration::from_millis(ms)),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn text(value: &Value, pointer: &str) -> String {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or(NONE).to_owned()
}

fn number(value: &Value, pointer: &str) -> Option<f64> {
    value.pointer(pointer).and_then(Value::as_f64)
}

fn count(value: &Value, pointer: &str) -> Option<u64> {
    value.pointer(pointer).and_then(Value::as_u64)
}

fn shown(value: &Value, pointer: &str) -> String {
    count(value, pointer).map_or_else(|| NONE.to_owned(), |n| n.to_string())
}

/// A time that is given in us.
fn ms(value: &Value, pointer: &str) -> String {
    number(value, pointer).map_or_else(|| NONE.to_owned(), |us| format!("{:.1} ms", us / 1e3))
}

fn speed(value: &Value, pointer: &str) -> String {
    number(value, pointer).map_or_else(|| NONE.to_owned(), |speed| format!("{speed:.1}"))
}
