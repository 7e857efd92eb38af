//! How the model families write tool calls and reasoning, and how that is found in a template's source.

/// How a model writes tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, once per call or around a list of calls. Hermes, Qwen
    /// and SmolLM use these tags, other families others.
    Tagged {
        /// Before the JSON.
        open: &'static str,
        /// After it. Some families leave it out.
        close: &'static str,
    },
    /// `{"name": ..., "parameters": {...}}` as the whole answer, several separated by `;`, optionally after
    /// `<|python_tag|>` (Llama 3).
    Llama3,
    /// `[TOOL_CALLS][{"name": ..., "arguments": {...}}]` or `[TOOL_CALLS]name[ARGS]{...}` (Mistral).
    Mistral {
        /// The newer form, with `[ARGS]`, is what the model was trained for. Both are read.
        named: bool,
    },
    /// gpt-oss channels: `<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>`.
    Harmony,
    /// `{"name": ..., "arguments": {...}}`, or a list of those, as the whole answer; what models are told to write whose
    /// template knows no tools, or whose own format is not read here.
    Generic,
}

/// Marker of Llama 3's tool calls.
pub(crate) const PYTHON_TAG: &str = "<|python_tag|>";
/// Markers of Mistral's tool calls.
pub(crate) const MISTRAL_CALLS: &str = "[TOOL_CALLS]";
pub(crate) const MISTRAL_ID: &str = "[CALL_ID]";
pub(crate) const MISTRAL_ARGS: &str = "[ARGS]";

/// Tags around JSON calls, by family. The first that occurs in a template is the one.
const CALL_TAGS: [(&str, &str); 5] = [
    ("<tool_calls>", "</tool_calls>"), // Apriel (which also speaks of <tool_call>), MiniMax-M1
    ("<tool_call>", "</tool_call>"),   // Hermes 2 and 3, Qwen 2.5 and 3
    ("<|tool_call|>", "<|/tool_call|>"), // Phi-4-mini; Granite 3 without the closing tag
    ("<TOOLCALL>", "</TOOLCALL>"),     // Nemotron Nano
    ("<|START_ACTION|>", "<|END_ACTION|>"), // Command R7B
];

/// Signs of formats that are not JSON in tags although they use similar tags: XML per parameter (Qwen3-Coder, GLM,
/// MiniMax, Seed-OSS), function tags (Functionary), named tags (DeepSeek, Kimi, Solar).
const FOREIGN_SIGNS: [&str; 9] = [
    "<function=",
    "<arg_key>",
    "<parameter",
    "<invoke",
    "functools",
    "tool_call_argument_begin",
    "tool_call:begin",
    "<｜tool▁sep｜>",
    "DSML",
];

/// Reads the format off a template's source; `None` where it is none of those that are read here.
pub(crate) fn detect_tool_format(source: &str) -> Option<ToolFormat> {
    if FOREIGN_SIGNS.iter().any(|sign| source.contains(sign)) {
        return None;
    }
    if is_harmony(source) {
        return Some(ToolFormat::Harmony);
    }
    if source.contains(MISTRAL_CALLS) {
        return Some(ToolFormat::Mistral { named: source.contains(MISTRAL_ARGS) });
    }
    if let Some(&(open, close)) = CALL_TAGS.iter().find(|(open, _)| source.contains(open)) {
        return Some(ToolFormat::Tagged { open, close });
    }
    if source.contains("<|start_header_id|>") && source.contains("parameters") && source.contains("\"name\":") {
        return Some(ToolFormat::Llama3);
    }
    None
}

fn is_harmony(source: &str) -> bool {
    source.contains("<|channel|>") && source.contains("<|message|>") && source.contains("<|start|>")
}

/// How a model marks its reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// It does not.
    None,
    /// Between two tags at the beginning of the answer.
    Tags {
        /// Opening tag.
        open: &'static str,
        /// Closing tag.
        close: &'static str,
    },
    /// gpt-oss channels: `analysis` is reasoning, `final` is content.
    Harmony,
}

/// Tags around reasoning, by family.
const REASONING_TAGS: [(&str, &str); 5] = [
    ("<think>", "</think>"),                    // DeepSeek-R1, Qwen3, SmolLM3, ...
    ("[THINK]", "[/THINK]"),                    // Magistral, Ministral reasoning
    ("<seed:think>", "</seed:think>"),          // Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"), // Command A reasoning, R7B
    ("<thinking>", "</thinking>"),
];

/// Reads the reasoning tags off a template's source.
pub(crate) fn detect_reasoning(source: &str) -> ReasoningFormat {
    if is_harmony(source) {
        return ReasoningFormat::Harmony;
    }
    // A template that cuts reasoning out of old answers may only name the closing tag (DeepSeek-R1's distillates).
    REASONING_TAGS
        .iter()
        .find(|(open, close)| source.contains(open) || source.contains(close))
        .map_or(ReasoningFormat::None, |&(open, close)| ReasoningFormat::Tags { open, close })
}
