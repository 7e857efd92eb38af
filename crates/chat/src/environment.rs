//! The Jinja environment that chat templates are written for, on minijinja.
//!
//! The model is `_compile_jinja_template` of Hugging Face transformers: an `ImmutableSandboxedEnvironment` with
//! `trim_blocks`, `lstrip_blocks` and loop controls, plus `raise_exception`, `strftime_now`, a `tojson` without HTML
//! escapes, and the `{% generation %}` tag. minijinja differs from Jinja on Python in how values print, in a few tests
//! and filters, and in the methods of strings, lists and dicts; those are put right here and in [`crate::methods`].

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, Value,
    value::{Kwargs, Rest, ValueKind},
};

use crate::{
    Timestamp, methods, python,
    strftime::strftime,
    template::{FUEL_MAX, OUTPUT_BYTES_MAX, OUTPUT_LIMIT_MESSAGE, RECURSION_MAX},
};

/// What `raise_exception` was given; it travels as the source of minijinja's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

/// The environment without anything that belongs to one rendering.
pub(crate) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL_MAX));
    env.set_recursion_limit(RECURSION_MAX);
    env.set_unknown_method_callback(methods::call);
    add_functions(&mut env);
    add_tests(&mut env);
    add_filters(&mut env);
    env
}

/// The same environment for one rendering, at one time. Everything that is printed, also into a `{% set %}` block or a
/// macro's result, counts against one budget: otherwise blocks that print themselves twice grow without end.
pub(crate) fn for_rendering(env: &Environment<'static>, now: Timestamp) -> Environment<'static> {
    let mut env = env.clone();
    let printed_bytes = Arc::new(AtomicUsize::new(0));
    env.set_formatter(move |out, _state, value| {
        let text;
        let text = match value.as_str() {
            Some(text) => text,
            None => {
                text = python::py_str(value, OUTPUT_BYTES_MAX)?;
                &text
            }
        };
        if printed_bytes.fetch_add(text.len(), Ordering::Relaxed) + text.len() > OUTPUT_BYTES_MAX {
            return Err(Error::new(ErrorKind::WriteFailure, OUTPUT_LIMIT_MESSAGE));
        }
        out.write_str(text).map_err(Error::from)
    });
    env.add_function("strftime_now", move |format: &str| strftime(now, format));
    env
}

/// Puts a template into minijinja's Jinja:
///
/// - `{% generation %}` (a tag extension; minijinja has none) marks the assistant's tokens for training and prints its
///   body as it is, so that an `if true` stands for it;
/// - `[::-1]` panics in minijinja when the value is empty, so that a method stands for it.
pub(crate) fn adapt(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((start, close)) = next_tag(rest) {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find(close) else {
            rest = tag;
            break;
        };
        let (open, inner) = tag[..end].split_at(2);
        let keyword = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        out.push_str(open);
        match (open, keyword) {
            ("{%", "generation") => out.push_str(&inner.replacen(keyword, "if true", 1)),
            ("{%", "endgeneration") => out.push_str(&inner.replacen(keyword, "endif", 1)),
            ("{#", _) => out.push_str(inner),
            _ => out.push_str(&inner.replace("[::-1]", &format!(".{}()", methods::REVERSED))),
        }
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// Where the next tag, expression or comment begins, and what closes it.
fn next_tag(text: &str) -> Option<(usize, &'static str)> {
    text.match_indices('{').find_map(|(start, _)| match text.as_bytes().get(start + 1)? {
        b'%' => Some((start, "%}")),
        b'{' => Some((start, "}}")),
        b'#' => Some((start, "#}")),
        _ => None,
    })
}

fn add_functions(env: &mut Environment<'static>) {
    env.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
        let message = python::py_str(&message, OUTPUT_BYTES_MAX)?;
        Err(Error::new(ErrorKind::InvalidOperation, "the template raised").with_source(Raised(message)))
    });
}

fn is_text_or_container(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

fn add_tests(env: &mut Environment<'static>) {
    // Python: whatever has a length and takes an index, which a string and a dict do.
    env.add_test("sequence", |value: &Value| value.is_undefined() || is_text_or_container(value));
    env.add_test("iterable", |value: &Value| value.is_undefined() || is_text_or_container(value));
    // Python: `bool` is a number.
    env.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
    env.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
}

fn refuse(filter: &str, value: &Value) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("{filter} does not apply to {}", value.kind()))
}

/// Whatever Jinja on Python iterates over: none and numbers are errors, undefined is empty.
fn iterate(filter: &str, value: &Value) -> Result<minijinja::value::ValueIter, Error> {
    if value.is_undefined() || is_text_or_container(value) { value.try_iter() } else { Err(refuse(filter, value)) }
}

fn text_of(value: &Value) -> Result<String, Error> {
    python::py_str(value, OUTPUT_BYTES_MAX)
}

fn bounded(text: String) -> Result<String, Error> {
    if text.len() > OUTPUT_BYTES_MAX {
        return Err(Error::new(ErrorKind::WriteFailure, OUTPUT_LIMIT_MESSAGE));
    }
    Ok(text)
}

fn add_filters(env: &mut Environment<'static>) {
    env.add_filter("tojson", |value: &Value, args: Rest<Value>, kwargs: Kwargs| {
        python::to_json(value, &args, &kwargs, OUTPUT_BYTES_MAX)
    });
    env.add_filter("string", |value: &Value| text_of(value));
    env.add_filter("trim", |value: &Value, chars: Option<&str>| -> Result<String, Error> {
        let text = text_of(value)?;
        Ok(methods::strip(&text, chars, true, true).to_owned())
    });
    env.add_filter("upper", |value: &Value| text_of(value).map(|text| text.to_uppercase()));
    env.add_filter("lower", |value: &Value| text_of(value).map(|text| text.to_lowercase()));
    env.add_filter("replace", |value: &Value, old: Value, new: Value, count: Option<usize>| -> Result<String, Error> {
        methods::replace(&text_of(value)?, &text_of(&old)?, &text_of(&new)?, count)
    });
    env.add_filter("join", |value: &Value, args: Rest<Value>, kwargs: Kwargs| -> Result<String, Error> {
        let separator = match args.first() {
            Some(separator) => Some(separator.clone()),
            None => kwargs.get::<Option<Value>>("d")?,
        };
        let separator = separator.map(|s| text_of(&s)).transpose()?.unwrap_or_default();
        let attribute = match args.get(1) {
            Some(attribute) => Some(attribute.clone()),
            None => kwargs.get::<Option<Value>>("attribute")?,
        };
        kwargs.assert_all_used()?;
        let mut out = String::new();
        for (i, item) in iterate("join", value)?.enumerate() {
            if i > 0 {
                out.push_str(&separator);
            }
            let item = match &attribute {
                Some(attribute) => item.get_item(attribute)?,
                None => item,
            };
            out.push_str(&text_of(&item)?);
            out = bounded(out)?;
        }
        Ok(out)
    });
    env.add_filter("list", |value: &Value| -> Result<Value, Error> {
        Ok(Value::from(iterate("list", value)?.collect::<Vec<_>>()))
    });
    let length = |value: &Value| -> Result<usize, Error> {
        if value.is_undefined() {
            return Ok(0);
        }
        value.len().ok_or_else(|| refuse("length", value))
    };
    env.add_filter("length", length);
    env.add_filter("count", length);
    env.add_filter("items", |value: &Value| -> Result<Value, Error> {
        if value.is_undefined() {
            return Ok(Value::from(Vec::<Value>::new()));
        }
        if value.kind() != ValueKind::Map {
            return Err(refuse("items", value));
        }
        let mut pairs = Vec::new();
        for key in value.try_iter()? {
            let item = value.get_item(&key)?;
            pairs.push(Value::from(vec![key, item]));
        }
        Ok(Value::from(pairs))
    });
    env.add_filter("first", |value: &Value| -> Result<Value, Error> {
        Ok(iterate("first", value)?.next().unwrap_or(Value::UNDEFINED))
    });
    env.add_filter("last", |value: &Value| -> Result<Value, Error> {
        Ok(iterate("last", value)?.last().unwrap_or(Value::UNDEFINED))
    });
    env.add_filter("int", |value: &Value, default: Option<Value>, base: Option<u32>| {
        methods::int(value, default.unwrap_or_else(|| Value::from(0)), base.unwrap_or(10))
    });
    env.add_filter("float", |value: &Value, default: Option<Value>| {
        methods::float(value, default.unwrap_or_else(|| Value::from(0.0)))
    });
    env.add_filter("indent", indent);
    // Filters that Jinja has and minijinja has not.
    env.add_filter("center", |value: &Value, width: Option<usize>| -> Result<String, Error> {
        let text = text_of(value)?;
        let missing = width.unwrap_or(80).min(OUTPUT_BYTES_MAX).saturating_sub(text.chars().count());
        let left = missing / 2;
        Ok(format!("{}{text}{}", " ".repeat(left), " ".repeat(missing - left)))
    });
    env.add_filter("wordcount", |value: &Value| -> Result<usize, Error> {
        Ok(text_of(value)?.split_whitespace().count())
    });
}

/// Jinja's `indent(width=4, first=False, blank=False)`; `width` may be a string.
fn indent(
    value: &Value,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    const WIDTH_MAX: usize = 1024;
    let text = text_of(value)?;
    let width = match width {
        Some(width) => Some(width),
        None => kwargs.get::<Option<Value>>("width")?,
    };
    let first = match first {
        Some(first) => first,
        None => kwargs.get::<Option<bool>>("first")?.unwrap_or(false),
    };
    let blank = match blank {
        Some(blank) => blank,
        None => kwargs.get::<Option<bool>>("blank")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let indentation = match width {
        None => " ".repeat(4),
        Some(width) => match (width.as_str(), width.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(width)) if width <= WIDTH_MAX => " ".repeat(width),
            _ => return Err(refuse("indent", &width)),
        },
    };
    let mut out = String::new();
    if first {
        out.push_str(&indentation);
    }
    for (i, line) in methods::split_lines(&text, false).iter().enumerate() {
        if i > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out.push_str(&indentation);
            }
        }
        out.push_str(line);
        out = bounded(out)?;
    }
    // Jinja adds a newline before it splits, so that a final newline survives as an empty last line.
    if text.ends_with('\n') {
        out.push('\n');
        if blank {
            out.push_str(&indentation);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_and_reversing_slices_are_adapted_and_nothing_else_changes() {
        assert_eq!(
            adapt("a {%- generation -%} b {% endgeneration %}{{ generation }} {% if generation %}"),
            "a {%- if true -%} b {% endif %}{{ generation }} {% if generation %}"
        );
        assert_eq!(
            adapt("a[::-1]{# a[::-1] #}{{ a[::-1][0] }}{% for m in messages[::-1] %}"),
            "a[::-1]{# a[::-1] #}{{ a.__reversed__()[0] }}{% for m in messages.__reversed__() %}"
        );
        assert_eq!(adapt("{% open"), "{% open");
        assert_eq!(adapt("{ {{"), "{ {{");
    }
}
