//! `murmur run`: a conversation in the terminal, or one answer for a script.

use std::io::{self, IsTerminal, Read};

use anyhow::Context;
use serde_json::json;
use tokio::runtime::Runtime;

use super::{Session, launch::Served, node_runtime};
use crate::{
    args::Run,
    chat::{
        Choices, Conversation, Question,
        answer::{self, Piece},
        repl,
    },
    exit::{Code, Failure},
    target, ui,
};

/// A prompt from standard input is at most so long.
const PROMPT_BYTES_MAX: u64 = 16 << 20;

pub(super) fn run(session: &Session, args: Run) -> anyhow::Result<()> {
    // Before a model is loaded for it.
    let prompt = match &args.prompt {
        Some(prompt) => Some(prompt.clone()),
        None if io::stdin().is_terminal() => None,
        None => Some(piped_prompt()?),
    };
    if prompt.is_none() && (args.raw || session.global.json) {
        return Err(Failure::because(
            Code::Usage,
            "--raw and --json are for one answer. Give a PROMPT, or pipe one in",
        ));
    }
    let runtime = node_runtime()?;
    let outcome = runtime.block_on(async {
        let target = target::find(session, Some(&args.model)).await?;
        Served::start(session, target, &args.engine).await
    });
    let outcome = outcome.and_then(|served| {
        let outcome = converse(session, &runtime, &served, &args, prompt.as_deref());
        runtime.block_on(served.end());
        outcome
    });
    runtime.shutdown_background();
    outcome
}

fn converse(
    session: &Session,
    runtime: &Runtime,
    served: &Served,
    args: &Run,
    prompt: Option<&str>,
) -> anyhow::Result<()> {
    let choices = Choices { max_tokens: args.max_tokens, temperature: args.temperature, seed: args.seed };
    let mut conversation = Conversation::new(served.model.clone(), choices, args.system.clone());
    match prompt {
        None => repl::talk(runtime, &served.client, &mut conversation, &session.data_dir.join("history")),
        Some(prompt) => {
            let question = if args.raw { conversation.continue_text(prompt) } else { conversation.ask(prompt) };
            runtime.block_on(answer_once(session, served, &question))
        }
    }
}

/// One answer on standard output: as text while it comes, or as one JSON document.
async fn answer_once(session: &Session, served: &Served, question: &Question) -> anyhow::Result<()> {
    let wants_json = session.global.json;
    let is_terminal = io::stdout().is_terminal();
    let (mut text, mut reasoning) = (String::new(), String::new());
    let streaming = answer::stream(&served.client, question, |piece| match piece {
        Piece::Reasoning(piece) => {
            reasoning.push_str(piece);
            Ok(())
        }
        Piece::Text(piece) => {
            text.push_str(piece);
            match (wants_json, is_terminal) {
                (true, _) => Ok(()),
                (false, true) => ui::print(&ui::without_controls(piece)),
                (false, false) => ui::print(piece),
            }
        }
    });
    let finished = tokio::select! {
        finished = streaming => finished,
        _ = tokio::signal::ctrl_c() => Err(Failure::because(Code::Interrupted, "interrupted")),
    };
    if !wants_json && !text.is_empty() && !text.ends_with('\n') {
        ui::print("\n")?;
    }
    let finished = finished?;
    if wants_json {
        return ui::print_json(&json!({
            "model": served.model,
            "text": text,
            "reasoning": (!reasoning.is_empty()).then_some(reasoning),
            "finish_reason": finished.reason,
            "prompt_tokens": finished.prompt_tokens,
            "completion_tokens": finished.completion_tokens,
        }));
    }
    if finished.reason.as_deref() == Some("length") && !session.global.quiet {
        ui::say("(cut off: the length limit was reached)");
    }
    Ok(())
}

fn piped_prompt() -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    io::stdin()
        .lock()
        .take(PROMPT_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .context("reading the prompt from standard input")?;
    if bytes.len() as u64 > PROMPT_BYTES_MAX {
        return Err(Failure::because(
            Code::Usage,
            format!("the prompt on standard input is longer than {PROMPT_BYTES_MAX} bytes"),
        ));
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| Failure::because(Code::Usage, "the prompt on standard input is not UTF-8 text"))?;
    if text.trim().is_empty() {
        return Err(Failure::because(
            Code::Usage,
            "there is no prompt on standard input. Give one as argument: murmur run MODEL \"PROMPT\"",
        ));
    }
    Ok(text)
}
