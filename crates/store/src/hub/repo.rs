//! A repository as the hub describes it: files, licence, who may have it.

use serde::Deserialize;
use serde_json::Value;

use super::select;
use crate::{error::StoreError, inspect, reference::is_safe_relative_path};

/// A repository at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Repo {
    /// `None`: the hub says none, or none that is one.
    pub(super) commit: Option<String>,
    pub(super) files: Vec<RepoFile>,
    pub(super) licence: Option<String>,
    /// Whether its licence has to be accepted first, on its page.
    pub(super) is_gated: bool,
    pub(super) downloads: Option<u64>,
}

/// A file in a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RepoFile {
    /// A path that stays below any directory.
    pub(super) path: String,
    /// Where the hub was asked for sizes.
    pub(super) bytes: Option<u64>,
}

/// As the hub writes it. What is not needed to find a file may have any form.
#[derive(Deserialize)]
pub(super) struct Answer {
    #[serde(default)]
    sha: Value,
    #[serde(default)]
    siblings: Vec<Sibling>,
    #[serde(default, rename = "cardData")]
    card: Value,
    #[serde(default)]
    tags: Value,
    #[serde(default)]
    gated: Value,
    #[serde(default)]
    downloads: Value,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
}

impl From<Answer> for Repo {
    fn from(answer: Answer) -> Self {
        let is_commit = |text: &&str| (7..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        // Names that could lead out of the cache are dropped here, before anything is made of them.
        let safe = answer.siblings.into_iter().filter(|sibling| is_safe_relative_path(&sibling.rfilename));
        Self {
            commit: answer.sha.as_str().filter(is_commit).map(str::to_owned),
            files: safe.map(|sibling| RepoFile { path: sibling.rfilename, bytes: sibling.size }).collect(),
            licence: licence(&answer.card, &answer.tags),
            is_gated: !matches!(answer.gated, Value::Null | Value::Bool(false)),
            downloads: answer.downloads.as_u64(),
        }
    }
}

impl Repo {
    fn paths(&self) -> Vec<&str> {
        self.files.iter().map(|file| file.path.as_str()).collect()
    }

    /// The files that are models; of one in several files, the first.
    pub(super) fn models(&self) -> Vec<&str> {
        select::models(&self.paths())
    }

    /// How large a model is, in all its files.
    pub(super) fn bytes(&self, file: &str) -> Option<u64> {
        let parts = select::split_part(file).map_or_else(|| vec![file.to_owned()], |part| part.all());
        let bytes = |part: &String| self.files.iter().find(|file| file.path == *part)?.bytes;
        parts.iter().map(bytes).sum()
    }

    /// The file that is meant. `what` and `endpoint` are for messages.
    pub(super) fn choose(&self, wanted: Option<&str>, what: &str, endpoint: &str) -> Result<&str, StoreError> {
        select::choose(&self.paths(), wanted, what, endpoint)
    }
}

/// The licence as the card states it, under its own name where it is none of the usual ones, or else as a tag of the hub's.
fn licence(card: &Value, tags: &Value) -> Option<String> {
    let stated = match &card["license"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(several) => Some(several.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")),
        _ => None,
    };
    let tagged = || {
        let mut tags = tags.as_array()?.iter().filter_map(Value::as_str);
        tags.find_map(|tag| tag.strip_prefix("license:")).map(str::to_owned)
    };
    let text = stated.or_else(tagged)?;
    let own_name = card["license_name"].as_str().filter(|_| text == "other");
    inspect::licence(own_name.unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(answer: Value) -> Repo {
        Repo::from(serde_json::from_value::<Answer>(answer).unwrap())
    }

    #[test]
    fn the_licence_is_that_of_the_card_by_its_own_name_or_else_of_a_tag() {
        for (answer, licence) in [
            (json!({"cardData": {"license": "apache-2.0"}, "tags": ["license:mit"]}), Some("apache-2.0")),
            (json!({"cardData": {"license": ["mit", "apache-2.0"]}}), Some("mit, apache-2.0")),
            (json!({"cardData": {"license": "other", "license_name": "qwen-research"}}), Some("qwen-research")),
            (json!({"cardData": {"license": "other"}}), Some("other")),
            (json!({"cardData": null, "tags": ["gguf", "license:mit"]}), Some("mit")),
            (json!({"cardData": {"license": 7}, "tags": 7}), None),
            (json!({}), None),
        ] {
            assert_eq!(read(answer.clone()).licence.as_deref(), licence, "{answer}");
        }
    }

    #[test]
    fn a_repository_is_gated_unless_it_says_not() {
        for (gated, is_gated) in
            [(json!(false), false), (Value::Null, false), (json!("auto"), true), (json!(true), true)]
        {
            assert_eq!(read(json!({"gated": gated})).is_gated, is_gated);
        }
    }

    #[test]
    fn only_a_commit_counts_as_one_and_only_paths_that_stay_below_as_files() {
        let repo = read(json!({
            "sha": "main/../..", "downloads": "many",
            "siblings": [{"rfilename": "../up.gguf"}, {"rfilename": "a/b.gguf", "size": 5}, {"rfilename": "/c.gguf"}],
        }));
        assert_eq!((repo.commit, repo.downloads), (None, None));
        assert_eq!(repo.files, [RepoFile { path: "a/b.gguf".to_owned(), bytes: Some(5) }]);
        assert_eq!(read(json!({"sha": "0123456789abcdef"})).commit.as_deref(), Some("0123456789abcdef"));
    }
}
