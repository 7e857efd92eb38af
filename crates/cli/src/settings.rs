//! Where values come from: command line, then environment, then configuration file, then default.
//!
//! The definitions in [`crate::args`] are the only ones. The file's values are put under clap's as defaults, so that one parser and
//! one set of checks serves all four; what the file may contain is read off the definitions: every flag with an environment variable.
//! Unknown keys are errors, as a typing error in a configuration file must not pass in silence.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::Context;
use clap::{
    ArgMatches, Command, CommandFactory, FromArgMatches,
    error::{ContextKind, ContextValue},
    parser::ValueSource,
};

use crate::{
    args::{Cli, Serve},
    exit::{Code, Failure},
};

/// A configuration file is written by people.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// These say where the configuration file is, and so cannot be in it.
const NOT_IN_FILE: [&str; 2] = ["data-dir", "config"];
/// Values that are not shown.
const SECRET: [&str; 2] = ["api-key", "join"];

/// What the user asked for, and with which settings.
#[derive(Debug)]
pub(crate) struct Invocation {
    pub(crate) cli: Cli,
    /// Where all state lives.
    pub(crate) data_dir: PathBuf,
    /// The configuration file, when there is one.
    pub(crate) config_file: Option<PathBuf>,
    /// Every setting of a server in force here, for `murmur doctor`.
    pub(crate) effective: Vec<Setting>,
}

/// One setting, and where its value comes from.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Setting {
    /// Key of the configuration file; `--key` is the flag.
    pub(crate) key: String,
    /// As text; `None`: not set.
    pub(crate) value: Option<String>,
    /// `flag`, `environment`, `file` or `default`.
    pub(crate) source: &'static str,
    /// The environment variable.
    pub(crate) variable: String,
}

/// Reads command line, environment and configuration file.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<Invocation> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    // The first pass finds the file, and every mistake that is not the file's.
    let first = Cli::from_arg_matches(&Cli::command().try_get_matches_from(&arguments)?)?;
    let data_dir = data_dir(first.global.data_dir.as_deref())?;
    let (config_file, values) = match &first.global.config {
        Some(path) => (
            Some(path.clone()),
            read_file(path)?.ok_or_else(|| {
                Failure::because(
                    Code::Usage,
                    format!("there is no configuration file {}. Check --config and MURMUR_CONFIG.", path.display()),
                )
            })?,
        ),
        None => {
            let path = data_dir.join("config.toml");
            match read_file(&path)? {
                Some(values) => (Some(path), values),
                None => (None, BTreeMap::new()),
            }
        }
    };
    let command = with_file_values(Cli::command(), &values);
    let blame_file = |error: clap::Error| match &config_file {
        Some(path) if !values.is_empty() => file_error(path, &error),
        _ => error.into(),
    };
    let matches = command.clone().try_get_matches_from(&arguments).map_err(blame_file)?;
    // A server's settings as they would be here, also when another command is run.
    let serve = command.clone().try_get_matches_from(["murmur", "serve"]).map_err(blame_file)?;
    let effective = effective(&command, &matches, &serve, &values);
    let mut cli = Cli::from_arg_matches(&matches)?;
    cli.global.api_key = api_key(cli.global.api_key, matches.value_source("api_key"))?;
    Ok(Invocation { cli, data_dir, config_file, effective })
}

/// An empty variable, and an empty value in the file, are how one says "none"; an empty flag is a slip in a script.
fn api_key(key: Option<String>, source: Option<ValueSource>) -> anyhow::Result<Option<String>> {
    match key {
        Some(key) if key.is_empty() && source == Some(ValueSource::CommandLine) => {
            Err(Failure::because(Code::Usage, "--api-key is empty. Give a key, or leave the flag out."))
        }
        key => Ok(key.filter(|key| !key.is_empty())),
    }
}

fn data_dir(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let path = match given {
        Some(path) if path.as_os_str().is_empty() => {
            return Err(Failure::because(Code::Usage, "--data-dir is empty. Name a directory."));
        }
        Some(path) => path.to_owned(),
        None => dirs::data_dir().map(|data| data.join("murmur")).ok_or_else(|| {
            Failure::because(
                Code::Usage,
                "this user has no home directory to keep data in. Choose a place with --data-dir or MURMUR_DATA_DIR.",
            )
        })?,
    };
    std::path::absolute(&path).with_context(|| format!("finding {}", path.display()))
}

/// The file's values as texts, as the command line would have them. `None`: no such file.
fn read_file(path: &Path) -> anyhow::Result<Option<BTreeMap<String, Vec<String>>>> {
    let wrong = |why: String| {
        Failure::because(Code::Usage, format!("the configuration file {} cannot be used: {why}", path.display()))
    };
    let mut text = String::new();
    match File::open(path).and_then(|file| file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text)) {
        Ok(_) => {}
        // A data directory that is a file is for the command to complain about, if it needs one.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => {
            return Err(wrong(format!("{error}. Name a readable text file with --config.")));
        }
    }
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return Err(wrong(format!("it is larger than {CONFIG_BYTES_MAX} bytes.")));
    }
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| wrong(error.to_string()))?;
    let known = settable(&Cli::command());
    let mut values = BTreeMap::new();
    for (key, value) in table {
        if NOT_IN_FILE.contains(&key.as_str()) {
            return Err(wrong(format!(
                "'{key}' says where this file is and cannot be in it. Use --{key} or MURMUR_{}.",
                upper(&key)
            )));
        }
        if !known.contains_key(&key) {
            return Err(wrong(format!("it has an unknown key '{key}'.{}", hint(&key, known.keys()))));
        }
        values.insert(
            key.clone(),
            texts(value).ok_or_else(|| {
                wrong(format!("'{key}' must be a text, a number, true or false, or a list of these."))
            })?,
        );
    }
    Ok(Some(values))
}

fn texts(value: toml::Value) -> Option<Vec<String>> {
    let text = |value| match value {
        toml::Value::String(text) => Some(text),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        _ => None,
    };
    match value {
        toml::Value::Array(items) => items.into_iter().map(text).collect(),
        single => text(single).map(|text| vec![text]),
    }
}

/// Settings by key, each with its environment variable: every flag of any command that has one.
fn settable(command: &Command) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut open = vec![command];
    while let Some(command) = open.pop() {
        for arg in command.get_arguments() {
            if let (Some(long), Some(env)) = (arg.get_long(), arg.get_env()) {
                found.insert(long.to_owned(), env.to_string_lossy().into_owned());
            }
        }
        open.extend(command.get_subcommands());
    }
    found
}

fn upper(key: &str) -> String {
    key.replace('-', "_").to_ascii_uppercase()
}

/// The nearest known key, by the letters that both start with and share.
fn hint<'a>(key: &str, known: impl Iterator<Item = &'a String>) -> String {
    let plain = |text: &str| text.replace(['-', '_', '.'], "").to_ascii_lowercase();
    let wanted = plain(key);
    let shared = |candidate: &str| {
        let candidate = plain(candidate);
        let pairs = |text: &str| text.as_bytes().windows(2).map(<[u8]>::to_vec).collect::<Vec<_>>();
        let (a, b) = (pairs(&wanted), pairs(&candidate));
        2 * a.iter().filter(|pair| b.contains(pair)).count() * 100 / (a.len() + b.len()).max(1)
    };
    let known: Vec<&String> = known.filter(|key| !NOT_IN_FILE.contains(&key.as_str())).collect();
    match known.iter().max_by_key(|candidate| shared(candidate)) {
        Some(nearest) if shared(nearest) >= 50 => format!(" Did you mean '{nearest}'?"),
        _ => format!(" Known keys: {}.", known.iter().map(|k| k.as_str()).collect::<Vec<_>>().join(", ")),
    }
}

/// Puts the file's values under the definitions, wherever a command has them.
fn with_file_values(mut command: Command, values: &BTreeMap<String, Vec<String>>) -> Command {
    let here: Vec<(clap::Id, Vec<String>)> = command
        .get_arguments()
        .filter(|arg| arg.get_env().is_some())
        .filter_map(|arg| Some((arg.get_id().clone(), values.get(arg.get_long()?)?.clone())))
        .collect();
    for (id, texts) in here {
        command = command.mut_arg(id, |arg| arg.default_values(texts));
    }
    let below: Vec<String> = command.get_subcommands().map(|c| c.get_name().to_owned()).collect();
    for name in below {
        command = command.mut_subcommand(name, |sub| with_file_values(sub, values));
    }
    command
}

/// The first pass had no complaint: what the second complains about is in the file.
fn file_error(path: &Path, error: &clap::Error) -> anyhow::Error {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let key = text(ContextKind::InvalidArg)
        .map(|arg| arg.trim_start_matches('-').split([' ', '=', '[']).next().unwrap_or_default().to_owned());
    let why = match (key, text(ContextKind::InvalidValue), std::error::Error::source(error)) {
        (Some(key), Some(value), Some(source)) => {
            format!("'{value}' does not do for '{key}': {source}")
        }
        (Some(key), Some(value), None) => {
            format!("'{value}' does not do for '{key}'. `murmur serve --help` says what does.")
        }
        (Some(key), None, _) => format!("'{key}' is wrong: {error}"),
        _ => error.to_string(),
    };
    Failure::because(Code::Usage, format!("the configuration file {} cannot be used: {why}", path.display()))
}

fn effective(
    command: &Command,
    matches: &ArgMatches,
    serve: &ArgMatches,
    values: &BTreeMap<String, Vec<String>>,
) -> Vec<Setting> {
    let serve_matches = serve.subcommand_matches("serve");
    let serve_command = Serve::command_for_help(command);
    let mut settings = Vec::new();
    let owners = [(command, Some(matches)), (serve_command.unwrap_or(command), serve_matches)];
    for (owner, matches) in owners {
        let Some(matches) = matches else { continue };
        for arg in owner.get_arguments() {
            let (Some(key), Some(variable)) = (arg.get_long(), arg.get_env()) else {
                continue;
            };
            if settings.iter().any(|s: &Setting| s.key == key) {
                continue;
            }
            let id = arg.get_id().as_str();
            let value = matches.get_raw(id).map(|raw| raw.map(|v| v.to_string_lossy()).collect::<Vec<_>>().join(","));
            let value = match value {
                Some(text) if SECRET.contains(&key) => (!text.is_empty()).then(|| "(set)".to_owned()),
                value => value,
            };
            let source = match matches.value_source(id) {
                Some(ValueSource::CommandLine) => "flag",
                Some(ValueSource::EnvVariable) => "environment",
                _ if values.contains_key(key) => "file",
                _ => "default",
            };
            settings.push(Setting {
                key: key.to_owned(),
                value,
                source,
                variable: variable.to_string_lossy().into_owned(),
            });
        }
    }
    settings
}

impl Serve {
    fn command_for_help(command: &Command) -> Option<&Command> {
        command.find_subcommand("serve")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::args;

    fn parse_with(config: &str, arguments: &[&str]) -> anyhow::Result<Invocation> {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("config.toml"), config).unwrap();
        let mut all = vec![OsString::from("murmur"), "--data-dir".into(), home.path().into()];
        all.extend(arguments.iter().map(OsString::from));
        parse(all)
    }

    fn engine(invocation: &Invocation) -> &args::EngineArgs {
        match &invocation.cli.command {
            args::Command::Serve(serve) => &serve.engine,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_file_fills_in_what_the_command_line_leaves_open() {
        let invocation = parse_with(
            "stages = 3\nmax-memory = \"2GiB\"\nexact = true\nallow-host = [\"a\", \"b\"]",
            &["serve", "--stages", "2", "m"],
        )
        .unwrap();
        assert_eq!(engine(&invocation).stages, 2);
        assert_eq!(engine(&invocation).max_memory.unwrap().0, 2 << 30);
        assert!(engine(&invocation).exact);
        let args::Command::Serve(serve) = &invocation.cli.command else { panic!() };
        assert_eq!(serve.server.allow_host, ["a", "b"]);
    }

    #[test]
    fn a_flag_can_switch_off_what_the_file_switches_on() {
        assert!(!engine(&parse_with("exact = true", &["serve", "--exact=false"]).unwrap()).exact);
        assert!(engine(&parse_with("", &["serve", "--exact", "m"]).unwrap()).exact);
    }

    #[test]
    fn an_unknown_key_is_an_error_with_a_hint() {
        let error = parse_with("max_memory = 1", &["status"]).unwrap_err().to_string();
        assert!(error.contains("unknown key 'max_memory'") && error.contains("'max-memory'"), "{error}");
        let error = parse_with("colour = 1", &["status"]).unwrap_err().to_string();
        assert!(error.contains("Known keys: ") && error.contains("threads"), "{error}");
    }

    #[test]
    fn a_wrong_value_in_the_file_is_blamed_on_the_file_and_its_key() {
        for (config, key) in [
            ("threads = 0", "threads"),
            ("api = \"nowhere\"", "api"),
            ("exact = \"perhaps\"", "exact"),
            ("stages = -1", "stages"),
        ] {
            let error = parse_with(config, &["serve"]).unwrap_err().to_string();
            assert!(error.contains("config.toml") && error.contains(&format!("'{key}'")), "{error}");
        }
        assert!(parse_with("stages = { a = 1 }", &["status"]).unwrap_err().to_string().contains("'stages' must be"));
        assert!(parse_with("stages = ", &["status"]).unwrap_err().to_string().contains("config.toml"));
        assert!(parse_with("data-dir = \"/x\"", &["status"]).unwrap_err().to_string().contains("MURMUR_DATA_DIR"));
    }

    #[test]
    fn every_setting_tells_where_its_value_comes_from() {
        let invocation = parse_with("stages = 3\napi-key = \"hunter2\"", &["doctor", "--api", "127.0.0.1:1"]).unwrap();
        let find = |key: &str| invocation.effective.iter().find(|s| s.key == key).unwrap();
        assert_eq!((find("api").source, find("api").value.as_deref()), ("flag", Some("127.0.0.1:1")));
        assert_eq!((find("stages").source, find("stages").value.as_deref()), ("file", Some("3")));
        assert_eq!((find("threads").source, find("threads").value.as_deref()), ("default", Some("auto")));
        assert!(!format!("{:?}", invocation.effective).contains("hunter2"));
    }

    #[test]
    fn an_empty_key_is_none_unless_it_is_a_flag() {
        let invocation = parse_with("api-key = \"\"", &["status"]).unwrap();
        assert_eq!(invocation.cli.global.api_key, None);
        let shown = invocation.effective.iter().find(|setting| setting.key == "api-key").unwrap();
        assert_eq!(shown.value, None);
        let error = parse_with("", &["status", "--api-key", ""]).unwrap_err().to_string();
        assert!(error.contains("--api-key is empty"), "{error}");
    }

    #[test]
    fn global_flags_work_before_and_after_the_command() {
        for arguments in [["--json", "status"], ["status", "--json"]] {
            assert!(parse_with("", &arguments).unwrap().cli.global.json);
        }
    }
}
