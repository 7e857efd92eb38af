//! `murmur models recommended`: what can I run? The list is data: `models/recommended.toml`, or a file of that name beside config.toml.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use murmur_gguf::Facts;
use murmur_node::fit::{DEFAULT_CONTEXT_TOKENS, Demand};
use murmur_store::{HubRef, ModelEntry, ModelName, Origin, Store, StoreError};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::{Session, machine};
use crate::{
    exit::{Code, Failure},
    ui,
    units::Size,
};

const BUILT_IN: &str = include_str!("../../../../../models/recommended.toml");
const FILE_NAME: &str = "recommended.toml";
/// A list is written by people.
const LIST_BYTES_MAX: u64 = 1 << 20;
/// Rows of the largest batch that the engine computes, which its buffers are made for.
const BATCH_ROWS: u32 = 256;
/// A model that guesses has fewer bytes than the one that it guesses for by at least this factor.
const DRAFT_FACTOR: u64 = 4;

/// The list that counts.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::commands) struct Recommendations {
    #[serde(rename = "model")]
    models: Vec<Recommended>,
}

/// A model of the list. The file says what the fields mean.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::commands) struct Recommended {
    name: String,
    pub(in crate::commands) reference: Reference,
    file: String,
    parameters: f64,
    pub(in crate::commands) bytes: u64,
    licence: String,
    purpose: String,
    draft: Option<Reference>,
    shape: Shape,
}

/// `hf:owner/repo:quant`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(in crate::commands) struct Reference(HubRef);

impl TryFrom<String> for Reference {
    type Error = StoreError;

    fn try_from(text: String) -> Result<Self, StoreError> {
        text.parse().map(Self)
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    layers: u32,
    width: u32,
    feed_forward: u32,
    heads: u32,
    kv_heads: u32,
    head_length: u32,
    vocabulary: u32,
    context: u32,
}

impl Recommendations {
    /// The user's list, or else the one that comes with the program.
    pub(in crate::commands) fn of(session: &Session) -> anyhow::Result<Self> {
        let beside = session.config_file.as_deref().and_then(Path::parent).unwrap_or(&session.data_dir);
        let path = beside.join(FILE_NAME);
        let wrong = |why: String| {
            let message = format!(
                "the list of recommended models {} cannot be used: {why}. Mend it, or move it away for the one that comes with murmur",
                path.display()
            );
            Failure::because(Code::Usage, message)
        };
        let mut text = String::new();
        match File::open(&path).and_then(|file| file.take(LIST_BYTES_MAX + 1).read_to_string(&mut text)) {
            Ok(_) if text.len() as u64 > LIST_BYTES_MAX => {
                Err(wrong(format!("it is larger than {}", Size(LIST_BYTES_MAX))))
            }
            Ok(_) => Self::read(&text).map_err(wrong),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Self::read(BUILT_IN).map_err(wrong)
            }
            Err(error) => Err(wrong(error.to_string())),
        }
    }

    /// The same, where it is only wanted for advice: a list that cannot be used is none.
    pub(in crate::commands) fn for_advice(session: &Session) -> Self {
        Self::of(session).unwrap_or_else(|error| {
            tracing::warn!("{error:#}");
            Self { models: Vec::new() }
        })
    }

    /// Reads a list; the error says what is wrong with it.
    fn read(text: &str) -> Result<Self, String> {
        let mut list: Self = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        for model in &list.models {
            list.check(model).map_err(|why| format!("'{}': {why}", model.name))?;
        }
        list.models.sort_by_key(Recommended::memory_bytes);
        Ok(list)
    }

    fn check(&self, model: &Recommended) -> Result<(), String> {
        let Shape { layers, width, feed_forward, heads, kv_heads, head_length, vocabulary, context } = model.shape;
        if [layers, width, feed_forward, heads, kv_heads, head_length, vocabulary, context].contains(&0) {
            return Err("every number of its shape is at least 1".to_owned());
        }
        if model.bytes == 0 || !(model.parameters > 0.0 && model.parameters.is_finite()) {
            return Err("it has bytes and parameters".to_owned());
        }
        if ModelName::from_file_name(&model.file).is_err() || model.reference.0.wanted.is_none() {
            return Err("it is one file, which its reference names by its quantisation".to_owned());
        }
        let alike = self.models.iter().filter(|other| other.reference == model.reference || other.name == model.name);
        if alike.count() > 1 {
            return Err("it is there twice".to_owned());
        }
        let Some(reference) = &model.draft else { return Ok(()) };
        match self.models.iter().find(|other| other.reference == *reference) {
            None => Err(format!("its draft {reference} is not in the list")),
            Some(draft) if draft.shape.vocabulary != vocabulary => {
                Err(format!("its draft {reference} has another vocabulary"))
            }
            Some(draft) if draft.bytes > model.bytes / DRAFT_FACTOR => {
                Err(format!("its draft {reference} has more than a quarter of its bytes"))
            }
            Some(_) => Ok(()),
        }
    }

    /// The model of the list that an entry of the store is.
    pub(in crate::commands) fn find(&self, entry: &ModelEntry) -> Option<&Recommended> {
        self.models.iter().find(|model| model.is_it(entry))
    }

    /// The model of the list whose file has this name, with or without its ending.
    pub(in crate::commands) fn find_file(&self, name: &str) -> Option<&Recommended> {
        self.models.iter().find(|model| model.is_named(name))
    }

    /// The model of the list that guesses for another one.
    pub(in crate::commands) fn draft_of(&self, model: &Recommended) -> Option<&Recommended> {
        let reference = model.draft.as_ref()?;
        self.models.iter().find(|other| other.reference == *reference)
    }

    /// What `--draft` takes for the model whose file has this name.
    pub(in crate::commands) fn draft_of_file(&self, name: &str) -> Option<&Reference> {
        self.find_file(name)?.draft.as_ref()
    }
}

impl Recommended {
    /// Whether an entry of the store is this model.
    pub(in crate::commands) fn is_it(&self, entry: &ModelEntry) -> bool {
        match &entry.origin {
            Origin::Hub { repo, file, .. } => {
                *repo == self.reference.0.repo && file.rsplit('/').next().is_some_and(|file| self.is_named(file))
            }
            _ => self.is_named(entry.name.as_str()),
        }
    }

    fn is_named(&self, name: &str) -> bool {
        let plain = |name: &str| name.to_ascii_lowercase().trim_end_matches(".gguf").to_owned();
        plain(name) == plain(&self.file)
    }

    /// What it takes to run it, with a context of 8,192 tokens for one request.
    fn memory_bytes(&self) -> u64 {
        let Shape { layers, width, feed_forward, heads, kv_heads, head_length, vocabulary, context } = self.shape;
        let facts = Facts {
            layers,
            embedding_length: width,
            feed_forward_length: feed_forward,
            heads,
            kv_heads,
            key_length: head_length,
            value_length: head_length,
            rope_dimensions: head_length,
            vocabulary,
            context_length: context,
            experts: 0,
            experts_used: 0,
            expert_feed_forward_length: 0,
            shared_feed_forward_length: 0,
            sliding_window: None,
            windowed_layers: Vec::new(),
        };
        Demand::of(&facts, self.bytes, 1, BATCH_ROWS, 1).bytes(DEFAULT_CONTEXT_TOKENS.min(context))
    }
}

/// What is known of where a model could be had from.
struct Found<'a> {
    model: &'a Recommended,
    memory_bytes: u64,
    /// `None`: nobody knows how much memory there is.
    fits: Option<bool>,
    /// Its name in the store.
    here: Option<String>,
    /// Nodes of the mesh that have it or a part of it; `None`: no server runs.
    nodes: Option<usize>,
}

pub(super) async fn run(session: &Session, store: &Store, memory_bytes: Option<u64>) -> anyhow::Result<()> {
    let list = Recommendations::of(session)?;
    let memory_bytes = memory_bytes.or_else(machine::available_memory_bytes);
    let entries: Vec<ModelEntry> = store.list()?.into_iter().filter(|entry| entry.path.exists()).collect();
    // No server is no failure: then there is no mesh.
    let mesh = session.client().get("/api/models").await.ok();
    let look = |model: &Recommended| -> (Option<String>, Option<usize>) {
        let here = entries.iter().find(|entry| model.is_it(entry)).map(|entry| entry.name.to_string());
        (here, mesh.as_ref().map(|mesh| nodes_with(mesh, model)))
    };
    let found = list.models.iter().map(|model| {
        let needed = model.memory_bytes();
        let (here, nodes) = look(model);
        Found { model, memory_bytes: needed, fits: memory_bytes.map(|memory| needed <= memory), here, nodes }
    });
    let found: Vec<Found<'_>> = found.collect();
    if session.global.json {
        let models: Vec<Value> = found.iter().map(as_json).collect();
        return ui::print_json(&json!({"memory_bytes": memory_bytes, "models": models}));
    }
    let rows: Vec<Vec<String>> = found.iter().map(row).collect();
    let headings = ["NAME", "SIZE", "MEMORY", "FITS", "HERE", "NODES", "LICENCE", "REFERENCE", "FOR"];
    ui::print(&ui::without_controls(&ui::table(&headings, &rows, &[1, 2, 5])))?;
    if session.global.quiet {
        return Ok(());
    }
    ui::say(&match memory_bytes {
        Some(bytes) => format!(
            "MEMORY is for {DEFAULT_CONTEXT_TOKENS} tokens of one request; {} are there to be used. What does not fit can be spread over a mesh",
            Size(bytes)
        ),
        None => "this system does not say how much memory is free: name it with --memory".to_owned(),
    });
    if let Some(best) = found.iter().rfind(|found| found.fits == Some(true)) {
        let model = best.here.clone().unwrap_or_else(|| best.model.reference.to_string());
        ui::say(&ui::without_controls(&format!("try: murmur run {model}")));
    }
    Ok(())
}

/// Nodes that have a file of the model's name.
fn nodes_with(mesh: &Value, model: &Recommended) -> usize {
    let files = mesh["models"].as_array().into_iter().flatten();
    let nodes = files.flat_map(|file| file["nodes"].as_array().into_iter().flatten());
    nodes.filter(|node| node["name"].as_str().is_some_and(|name| model.is_named(name))).count()
}

fn row(found: &Found<'_>) -> Vec<String> {
    let Found { model, memory_bytes, fits, here, nodes } = found;
    vec![
        model.name.clone(),
        Size(model.bytes).to_string(),
        Size(*memory_bytes).to_string(),
        match fits {
            Some(true) => "yes",
            Some(false) => "no",
            None => "?",
        }
        .to_owned(),
        here.clone().unwrap_or_else(|| "-".to_owned()),
        nodes.map_or_else(|| "-".to_owned(), |nodes| nodes.to_string()),
        model.licence.clone(),
        model.reference.to_string(),
        model.purpose.clone(),
    ]
}

fn as_json(found: &Found<'_>) -> Value {
    let Found { model, memory_bytes, fits, here, nodes } = found;
    json!({
        "name": model.name,
        "reference": model.reference.to_string(),
        "file": model.file,
        "quantization": model.reference.0.wanted,
        "parameters": (model.parameters * 1e9).round() as u64,
        "bytes": model.bytes,
        "memory_bytes": memory_bytes,
        "fits": fits,
        "licence": model.licence,
        "purpose": model.purpose,
        "draft": model.draft.as_ref().map(ToString::to_string),
        "here": here,
        "nodes": nodes,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_list_that_comes_with_the_program_is_consistent() {
        let list = Recommendations::read(BUILT_IN).unwrap();
        assert!(list.models.len() >= 20);
        for model in &list.models {
            let Reference(reference) = &model.reference;
            assert_eq!(reference.revision, "main", "{}", model.name);
            let quant = reference.wanted.as_deref().unwrap().to_ascii_lowercase();
            assert!(model.file.to_ascii_lowercase().contains(&quant), "{} is not {quant}", model.file);
            assert!(model.file.ends_with(".gguf") && !model.file.contains("-of-"), "{}", model.file);
            // Between two and nine bits for a parameter, with what little is not quantised.
            let bits = model.bytes as f64 * 8.0 / (model.parameters * 1e9);
            assert!((3.5..9.5).contains(&bits), "{}: {bits:.1} bits", model.name);
            assert!(model.memory_bytes() > model.bytes, "{}", model.name);
            assert!(!model.licence.is_empty() && !model.purpose.is_empty(), "{}", model.name);
            assert!(model.name.chars().all(|c| c.is_ascii_graphic() || c == ' '), "{}", model.name);
        }
        let files: HashSet<&str> = list.models.iter().map(|model| model.file.as_str()).collect();
        assert_eq!(files.len(), list.models.len());
        assert!(list.models.iter().filter(|model| model.draft.is_some()).count() >= 5);
    }

    #[test]
    fn a_list_that_makes_no_sense_is_refused_with_the_model_and_the_reason() {
        let model = |more: &str| {
            format!(
                "[[model]]\nname = 'a'\nreference = 'hf:o/a:Q8_0'\nfile = 'a-Q8_0.gguf'\nparameters = 1.0\nbytes = 1000\nlicence = 'mit'\n\
                 purpose = 'tests'\n{more}\nshape = {{ layers = 1, width = 8, feed_forward = 8, heads = 1, kv_heads = 1, head_length = 8, \
                 vocabulary = 9, context = 99 }}\n"
            )
        };
        let small = model("").replace("'a'", "'s'").replace("hf:o/a", "hf:o/s").replace("1000", "200");
        let with = |draft: &str, small: &str| format!("{}\n{small}", model(&format!("draft = '{draft}'")));
        assert_eq!(Recommendations::read(&with("hf:o/s:Q8_0", &small)).unwrap().models.len(), 2);
        for (text, says) in [
            (model("colour = 'red'"), "colour"),
            (model("").replace("hf:o/a:Q8_0", "nowhere"), "nowhere"),
            (model("").replace("hf:o/a:Q8_0", "hf:o/a"), "'a': it is one file"),
            (model("").replace("bytes = 1000", "bytes = 0"), "'a': it has bytes"),
            (model("").replace("parameters = 1.0", "parameters = nan"), "'a': it has bytes"),
            (model("").replace("layers = 1", "layers = 0"), "at least 1"),
            (model("") + &model(""), "twice"),
            (with("hf:o/other:Q8_0", &small), "is not in the list"),
            (with("hf:o/s:Q8_0", &small.replace("vocabulary = 9", "vocabulary = 8")), "another vocabulary"),
            (with("hf:o/s:Q8_0", &small.replace("200", "300")), "more than a quarter"),
            ("model = 3".to_owned(), "model"),
        ] {
            let error = Recommendations::read(&text).unwrap_err();
            assert!(error.contains(says), "no {says:?} in: {error}");
        }
    }

    #[test]
    fn a_file_is_known_by_its_name_in_any_case() {
        let list = Recommendations::read(BUILT_IN).unwrap();
        let found = list.find_file("qwen3-8b-q4_k_m").unwrap();
        assert_eq!(found.name, "Qwen3 8B");
        assert_eq!(list.draft_of(found).unwrap().name, "Qwen3 0.6B");
        assert_eq!(list.draft_of_file("Qwen3-8B-Q4_K_M.gguf").unwrap().to_string(), "hf:Qwen/Qwen3-0.6B-GGUF:Q8_0");
        assert!(list.find_file("Qwen3-8B").is_none());
    }
}
