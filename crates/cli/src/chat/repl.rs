//! The conversation loop: line editing with history, a few commands, Ctrl-C for the answer and Ctrl-D for the end.

use std::{io::Write, path::Path};

use anyhow::Context;
use rustyline::{Config, DefaultEditor, Editor, error::ReadlineError, history::FileHistory};
use tokio::runtime::Runtime;

use super::{
    Conversation,
    answer::{self, Finished, Piece},
};
use crate::{client::ApiClient, ui};

/// Lines that are remembered between conversations.
const HISTORY_LINES_MAX: usize = 1000;

const HELP: &str = "\
/clear          forget what was said
/system TEXT    begin anew with these instructions; without TEXT, with none
/save FILE      write the conversation to a file, as Markdown
/help           this
/exit           end, as Ctrl-D does
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer.";

/// What a line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Nothing,
    Say(&'a str),
    Clear,
    System(Option<&'a str>),
    Save(&'a str),
    Help,
    Exit,
    Wrong(String),
}

fn read_line_text(text: &str) -> Line<'_> {
    let text = text.trim();
    let Some(command) = text.strip_prefix('/') else {
        return if text.is_empty() { Line::Nothing } else { Line::Say(text) };
    };
    let (name, rest) =
        command.split_once(char::is_whitespace).map_or((command, ""), |(name, rest)| (name, rest.trim()));
    match (name, rest) {
        ("clear", "") => Line::Clear,
        ("system", "") => Line::System(None),
        ("system", text) => Line::System(Some(text)),
        ("save", "") => Line::Wrong("name a file: /save FILE".to_owned()),
        ("save", file) => Line::Save(file),
        ("help" | "?", "") => Line::Help,
        ("exit" | "quit" | "bye", "") => Line::Exit,
        _ => Line::Wrong(format!("there is no command /{name}; /help lists them")),
    }
}

/// Talks until the user ends it.
pub(crate) fn talk(
    runtime: &Runtime,
    client: &ApiClient,
    conversation: &mut Conversation,
    history_file: &Path,
) -> anyhow::Result<()> {
    // Without a handler, a Ctrl-C just before or after an answer would end the program.
    let _handler =
        runtime.block_on(async { tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt()) });
    let mut editor = open_editor(history_file)?;
    ui::say("Ctrl-C stops an answer, Ctrl-D ends, /help lists commands.");
    loop {
        let text = match read_lines(&mut editor) {
            Ok(text) => text,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error).context("reading the line"),
        };
        if !text.trim().is_empty() {
            // A line that cannot be remembered is still a line.
            let _ = editor.add_history_entry(text.trim());
            save_history(&mut editor, history_file);
        }
        match read_line_text(&text) {
            Line::Nothing => {}
            Line::Exit => return Ok(()),
            Line::Help => ui::say(HELP),
            Line::Clear => {
                conversation.clear();
                ui::say("forgotten");
            }
            Line::System(system) => {
                conversation.set_system(system.map(str::to_owned));
                ui::say("a new conversation");
            }
            Line::Save(file) => match std::fs::write(file, conversation.to_markdown()) {
                Ok(()) => ui::say(&format!("saved to {file}")),
                Err(error) => ui::say(&format!("cannot write {file}: {error}")),
            },
            Line::Wrong(why) => ui::say(&why),
            Line::Say(text) => say(runtime, client, conversation, text)?,
        }
    }
}

/// One turn. What goes wrong is told, and the conversation goes on.
fn say(runtime: &Runtime, client: &ApiClient, conversation: &mut Conversation, text: &str) -> anyhow::Result<()> {
    let question = conversation.ask(text);
    let mut answer = String::new();
    let mut screen = Screen::default();
    let outcome = runtime.block_on(async {
        let streaming = answer::stream(client, &question, |piece| {
            if let Piece::Text(text) = piece {
                answer.push_str(text);
            }
            screen.show(piece)
        });
        tokio::select! {
            finished = streaming => Some(finished),
            _ = tokio::signal::ctrl_c() => None,
        }
    });
    screen.end()?;
    match outcome {
        Some(Ok(Finished { reason, .. })) => {
            if reason.as_deref() == Some("length") {
                ui::say("(the answer was cut off: the length limit was reached)");
            }
        }
        Some(Err(error)) => {
            ui::say(&format!("error: {error:#}"));
            return Ok(());
        }
        None => ui::say("(stopped)"),
    }
    conversation.remember(text, &answer);
    Ok(())
}

/// An answer on a terminal: thoughts are dim, and nothing in it can command the terminal.
#[derive(Debug, Default)]
struct Screen {
    is_dim: bool,
    has_text: bool,
}

impl Screen {
    fn show(&mut self, piece: Piece<'_>) -> anyhow::Result<()> {
        let (text, dim) = match piece {
            Piece::Text(text) => (text, false),
            Piece::Reasoning(text) => (text, true),
        };
        let change = match (self.is_dim, dim) {
            (false, true) => "\x1b[2m",
            (true, false) => "\x1b[0m\n\n",
            _ => "",
        };
        self.is_dim = dim;
        self.has_text = true;
        let mut out = std::io::stdout().lock();
        write!(out, "{change}{}", ui::without_controls(text)).and_then(|()| out.flush()).context("writing the answer")
    }

    fn end(&mut self) -> anyhow::Result<()> {
        let reset = if self.is_dim { "\x1b[0m" } else { "" };
        if self.has_text { ui::print(&format!("{reset}\n")) } else { Ok(()) }
    }
}

type LineEditor = Editor<(), FileHistory>;

fn open_editor(history_file: &Path) -> anyhow::Result<LineEditor> {
    let config = Config::builder()
        .max_history_size(HISTORY_LINES_MAX)
        .context("the history")?
        .history_ignore_space(true)
        .build();
    let mut editor = DefaultEditor::with_config(config).context("opening the terminal")?;
    // There is none the first time.
    let _ = editor.load_history(history_file);
    Ok(editor)
}

/// A line, and those that follow a backslash.
fn read_lines(editor: &mut LineEditor) -> Result<String, ReadlineError> {
    let mut text = editor.readline(">>> ")?;
    while let Some(open) = text.strip_suffix('\\') {
        let next = editor.readline("... ")?;
        text = format!("{open}\n{next}");
    }
    Ok(text)
}

/// The history holds what the user wrote: for this user's eyes only (rustyline creates it so).
fn save_history(editor: &mut LineEditor, history_file: &Path) {
    let directory = history_file.parent().map_or(Ok(()), std::fs::create_dir_all);
    if let Err(error) = directory.map_err(ReadlineError::from).and_then(|()| editor.save_history(history_file)) {
        tracing::warn!(%error, "the history of lines cannot be saved");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_words_to_the_model_or_commands() {
        assert_eq!(read_line_text("  hello "), Line::Say("hello"));
        assert_eq!(read_line_text(" "), Line::Nothing);
        assert_eq!(read_line_text("/clear"), Line::Clear);
        assert_eq!(read_line_text("/system be brief"), Line::System(Some("be brief")));
        assert_eq!(read_line_text("/system"), Line::System(None));
        assert_eq!(read_line_text("/save a b.md"), Line::Save("a b.md"));
        assert_eq!(read_line_text("/exit"), Line::Exit);
        for wrong in ["/frobnicate", "/save", "/clear all", "/"] {
            assert!(matches!(read_line_text(wrong), Line::Wrong(_)), "{wrong}");
        }
    }

    #[test]
    fn every_command_is_in_the_help() {
        for name in ["/clear", "/system", "/save", "/help", "/exit"] {
            assert!(HELP.contains(name));
        }
    }
}
