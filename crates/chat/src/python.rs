//! Values written as Python writes them: `str`, `repr` and `json.dumps`.
//!
//! Templates are written for Jinja on Python, where `{{ true }}` prints `True` and `tojson` is `json.dumps`. A template
//! that prints such a value was used so in training, so the exact spelling matters.

use std::fmt::Write;

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, ValueKind},
};

/// Values nested deeper than this are refused: templates can nest without end, the stack cannot.
const NESTING_MAX: usize = 200;

/// Text that refuses to grow beyond a limit: a value can contain itself many times over, so that a few lines of
/// template describe exabytes.
struct BoundedText {
    text: String,
    bytes_max: usize,
}

impl BoundedText {
    fn new(bytes_max: usize) -> BoundedText {
        BoundedText { text: String::new(), bytes_max }
    }

    fn push(&mut self, piece: &str) -> Result<(), Error> {
        if self.text.len() + piece.len() > self.bytes_max {
            return Err(Error::new(ErrorKind::WriteFailure, crate::template::OUTPUT_LIMIT_MESSAGE));
        }
        self.text.push_str(piece);
        Ok(())
    }
}

/// Python's `str(value)`, with undefined as nothing, as Jinja prints it.
pub(crate) fn py_str(value: &Value, bytes_max: usize) -> Result<String, Error> {
    if value.is_undefined() {
        return Ok(String::new());
    }
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut out = BoundedText::new(bytes_max);
    repr_into(value, &mut out, 0)?;
    Ok(out.text)
}

fn too_deep() -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("value is nested more than {NESTING_MAX} levels deep"))
}

fn repr_into(value: &Value, out: &mut BoundedText, depth: usize) -> Result<(), Error> {
    if depth > NESTING_MAX {
        return Err(too_deep());
    }
    match value.kind() {
        ValueKind::Undefined => out.push("Undefined"),
        ValueKind::None => out.push("None"),
        ValueKind::Bool => out.push(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push(&number(value)),
        ValueKind::String => out.push(&quoted(value.as_str().unwrap_or_default())),
        ValueKind::Map => {
            out.push("{")?;
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push(", ")?;
                }
                repr_into(&key, out, depth + 1)?;
                out.push(": ")?;
                repr_into(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push("}")
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push("[")?;
            for (i, item) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push(", ")?;
                }
                repr_into(&item, out, depth + 1)?;
            }
            out.push("]")
        }
        _ => out.push(&value.to_string()),
    }
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(float) => py_float(float),
        Err(_) => value.to_string(),
    }
}

/// Python's `repr(float)`: shortest digits that read back equal, an exponent below 1e-4 and from 1e16 on.
pub(crate) fn py_float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let scientific = format!("{x:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{x}");
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs())
}

/// Python's `repr(str)`: single quotes unless only they occur inside.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() || matches!(c, '\u{a0}' | '\u{ad}') => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// How `json.dumps` lays a value out.
struct JsonStyle {
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    ascii: bool,
}

/// The `tojson` filter of transformers: `json.dumps(x, ensure_ascii=False, indent=..., separators=..., sort_keys=...)`.
/// Unlike Jinja's own it escapes nothing for HTML.
pub(crate) fn to_json(value: &Value, args: &[Value], kwargs: &Kwargs, bytes_max: usize) -> Result<String, Error> {
    const PARAMETERS: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let argument = |position: usize| -> Result<Option<Value>, Error> {
        match args.get(position) {
            Some(value) => Ok(Some(value.clone())),
            None => kwargs.get::<Option<Value>>(PARAMETERS[position]),
        }
    };
    let ascii = argument(0)?.is_some_and(|v| v.is_true());
    let indent = match argument(1)? {
        Some(v) if v.is_none() || v.is_undefined() => None,
        Some(v) => match (v.as_str(), v.as_usize()) {
            (Some(text), _) => Some(text.to_owned()),
            (None, Some(width)) if width <= 64 => Some(" ".repeat(width)),
            _ => {
                return Err(Error::new(ErrorKind::InvalidOperation, "tojson: indent must be 0..=64 or a string"));
            }
        },
        None => None,
    };
    let (mut item_separator, mut key_separator) =
        (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if let Some(separators) = argument(2)?.filter(|v| !v.is_none() && !v.is_undefined()) {
        let pair: Vec<Value> = separators.try_iter()?.collect();
        let [item, key] = pair.as_slice() else {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be a pair of strings"));
        };
        item_separator = item.to_string();
        key_separator = key.to_string();
    }
    let sort_keys = argument(3)?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let style = JsonStyle { indent, item_separator, key_separator, sort_keys, ascii };
    let mut out = BoundedText::new(bytes_max);
    json_into(value, &style, &mut out, 0)?;
    Ok(out.text)
}

fn json_into(value: &Value, style: &JsonStyle, out: &mut BoundedText, depth: usize) -> Result<(), Error> {
    if depth > NESTING_MAX {
        return Err(too_deep());
    }
    match value.kind() {
        ValueKind::None => out.push("null"),
        ValueKind::Bool => out.push(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push(&json_number(value)),
        ValueKind::String => out.push(&json_string(value.as_str().unwrap_or_default(), style.ascii)),
        ValueKind::Map => {
            let mut entries = Vec::new();
            for key in value.try_iter()? {
                let name = match key.kind() {
                    ValueKind::String => key.to_string(),
                    ValueKind::None => "null".to_owned(),
                    ValueKind::Bool => if key.is_true() { "true" } else { "false" }.to_owned(),
                    ValueKind::Number => json_number(&key),
                    kind => {
                        return Err(Error::new(
                            ErrorKind::InvalidOperation,
                            format!("tojson: an object's keys are strings, not {kind}"),
                        ));
                    }
                };
                entries.push((name, value.get_item(&key)?));
            }
            if style.sort_keys {
                entries.sort_by(|a, b| a.0.cmp(&b.0));
            }
            out.push("{")?;
            for (i, (name, item)) in entries.iter().enumerate() {
                separate(style, out, i, depth)?;
                out.push(&json_string(name, style.ascii))?;
                out.push(&style.key_separator)?;
                json_into(item, style, out, depth + 1)?;
            }
            close(style, out, entries.is_empty(), depth)?;
            out.push("}")
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push("[")?;
            let mut empty = true;
            for (i, item) in value.try_iter()?.enumerate() {
                empty = false;
                separate(style, out, i, depth)?;
                json_into(&item, style, out, depth + 1)?;
            }
            close(style, out, empty, depth)?;
            out.push("]")
        }
        kind => Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} cannot be written as JSON"))),
    }
}

fn separate(style: &JsonStyle, out: &mut BoundedText, i: usize, depth: usize) -> Result<(), Error> {
    if i > 0 {
        out.push(&style.item_separator)?;
    }
    new_line(style, out, depth + 1)
}

fn close(style: &JsonStyle, out: &mut BoundedText, empty: bool, depth: usize) -> Result<(), Error> {
    if empty { Ok(()) } else { new_line(style, out, depth) }
}

fn new_line(style: &JsonStyle, out: &mut BoundedText, depth: usize) -> Result<(), Error> {
    if let Some(indent) = &style.indent {
        out.push("\n")?;
        for _ in 0..depth {
            out.push(indent)?;
        }
    }
    Ok(())
}

fn json_number(value: &Value) -> String {
    match number(value).as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        text => text.to_owned(),
    }
}

/// A JSON string as `json.dumps` writes it.
pub(crate) fn json_string(text: &str, ascii: bool) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ascii && !c.is_ascii()) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 1 << 16;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        // Expected values from CPython 3.11.
        for (x, text) in [
            (1.0, "1.0"),
            (0.5, "0.5"),
            (-2.25, "-2.25"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (0.1 + 0.2, "0.30000000000000004"),
        ] {
            assert_eq!(py_float(x), text);
        }
    }

    #[test]
    fn values_print_as_python_prints_them() {
        let value = Value::from_serialize(serde_json::json!({"a": [1, true, null, "it's", 1.0], "b": {}}));
        assert_eq!(py_str(&value, LIMIT).unwrap(), r#"{'a': [1, True, None, "it's", 1.0], 'b': {}}"#);
    }

    #[test]
    fn json_is_laid_out_as_json_dumps_does() {
        let value = Value::from_serialize(serde_json::json!({"b": [1, "<é\u{1}>"], "a": {}}));
        let none = Kwargs::from_iter(Vec::<(String, Value)>::new());
        assert_eq!(to_json(&value, &[], &none, LIMIT).unwrap(), "{\"b\": [1, \"<é\\u0001>\"], \"a\": {}}");
        let indent = Kwargs::from_iter([("indent", Value::from(2))]);
        assert_eq!(
            to_json(&value, &[], &indent, LIMIT).unwrap(),
            "{\n  \"b\": [\n    1,\n    \"<é\\u0001>\"\n  ],\n  \"a\": {}\n}"
        );
        let ascii = Kwargs::from_iter([("ensure_ascii", Value::from(true)), ("sort_keys", Value::from(true))]);
        assert_eq!(to_json(&value, &[], &ascii, LIMIT).unwrap(), r#"{"a": {}, "b": [1, "<\u00e9\u0001>"]}"#);
    }

    #[test]
    fn text_beyond_the_limit_is_an_error() {
        let value = Value::from(vec!["x".repeat(100); 10]);
        assert!(py_str(&value, 50).is_err());
    }
}
