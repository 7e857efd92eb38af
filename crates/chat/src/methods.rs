//! Methods of Python's strings, lists and dicts that templates call: what `minijinja_contrib::pycompat` lacks or does
//! otherwise. Methods that change their object (`append`, `pop`, `update`) do not exist: the sandbox that transformers
//! uses refuses them too.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind, from_args},
};

use crate::template::{OUTPUT_BYTES_MAX, OUTPUT_LIMIT_MESSAGE};

/// Name of the method that stands for `[::-1]`, which panics in minijinja when the value is empty.
pub(crate) const REVERSED: &str = "__reversed__";

/// Calls `value.method(args)`.
pub(crate) fn call(state: &State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match value.kind() {
        ValueKind::String => string_method(value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Map => map_method(value, method, args)?,
        ValueKind::Seq | ValueKind::Iterable => list_method(value, method, args)?,
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// `str.isspace` of Python: Unicode's white space and the four ASCII separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// `str.strip`, `lstrip`, `rstrip`.
pub(crate) fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let drop = |c: char| match chars {
        Some(chars) => chars.contains(c),
        None => is_space(c),
    };
    let text = if left { text.trim_start_matches(drop) } else { text };
    if right { text.trim_end_matches(drop) } else { text }
}

/// `str.replace`, with a limit: a replacement for the empty string or a long one multiplies the text.
pub(crate) fn replace(text: &str, old: &str, new: &str, count: Option<usize>) -> Result<String, Error> {
    let found = text.matches(old).count().min(count.unwrap_or(usize::MAX));
    if text.len().saturating_add(found.saturating_mul(new.len())) > OUTPUT_BYTES_MAX {
        return Err(Error::new(ErrorKind::WriteFailure, OUTPUT_LIMIT_MESSAGE));
    }
    Ok(text.replacen(old, new, found))
}

/// `str.splitlines`.
pub(crate) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end_of_line = |c: char| {
            matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
        };
        let Some(end) = rest.find(end_of_line) else {
            lines.push(rest);
            break;
        };
        let after = if rest[end..].starts_with("\r\n") {
            end + 2
        } else {
            end + rest[end..].chars().next().map_or(1, char::len_utf8)
        };
        lines.push(if keep_ends { &rest[..after] } else { &rest[..end] });
        rest = &rest[after..];
    }
    lines
}

/// Jinja's `int` filter.
pub(crate) fn int(value: &Value, default: Value, base: u32) -> Value {
    if value.is_integer() {
        return value.clone();
    }
    match value.kind() {
        ValueKind::Bool => Value::from(i64::from(value.is_true())),
        ValueKind::Number => match f64::try_from(value.clone()) {
            Ok(float) if float.is_finite() => Value::from(float as i64),
            _ => default,
        },
        ValueKind::String if (2..=36).contains(&base) => {
            let text = strip(value.as_str().unwrap_or_default(), None, true, true);
            match (i64::from_str_radix(text, base), text.parse::<f64>()) {
                (Ok(int), _) => Value::from(int),
                (_, Ok(float)) if float.is_finite() => Value::from(float as i64),
                _ => default,
            }
        }
        _ => default,
    }
}

/// Jinja's `float` filter.
pub(crate) fn float(value: &Value, default: Value) -> Value {
    match value.kind() {
        ValueKind::Number => f64::try_from(value.clone()).map_or(default, Value::from),
        ValueKind::Bool => Value::from(f64::from(u8::from(value.is_true()))),
        ValueKind::String => {
            let text = strip(value.as_str().unwrap_or_default(), None, true, true);
            text.parse::<f64>().map_or(default, Value::from)
        }
        _ => default,
    }
}

/// A padding to `width` characters, refused where it would be absurd.
fn padding(text: &str, width: i64, fill: char) -> Result<String, Error> {
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
    if missing > OUTPUT_BYTES_MAX / 4 {
        return Err(Error::new(ErrorKind::WriteFailure, OUTPUT_LIMIT_MESSAGE));
    }
    Ok(std::iter::repeat_n(fill, missing).collect())
}

fn character_position(text: &str, byte: Option<usize>) -> i64 {
    byte.map_or(-1, |byte| i64::try_from(text[..byte].chars().count()).unwrap_or(i64::MAX))
}

fn all_and_some(text: &str, test: impl Fn(char) -> bool) -> bool {
    !text.is_empty() && text.chars().all(test)
}

/// What `lower`/`upper` case tests mean in Python: no letter of the other case, and at least one of this.
fn is_cased(text: &str, this: impl Fn(char) -> bool, other: impl Fn(char) -> bool) -> bool {
    text.chars().any(this) && !text.chars().any(other)
}

fn three_parts(before: &str, separator: &str, after: &str) -> Value {
    Value::from(vec![Value::from(before), Value::from(separator), Value::from(after)])
}

fn split(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator, limit, kwargs): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        Some(separator) => Some(separator),
        None => kwargs.get::<Option<Value>>("sep")?,
    };
    let separator = separator.filter(|s| !s.is_none());
    let limit = match limit {
        Some(limit) => Some(limit),
        None => kwargs.get::<Option<i64>>("maxsplit")?,
    };
    kwargs.assert_all_used()?;
    let splits_max = limit.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX - 1);
    let Some(separator) = separator else {
        return Ok(split_at_space(text, splits_max, from_right));
    };
    let separator = separator.as_str().filter(|s| !s.is_empty()).ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, "split: the separator must be a string that is not empty")
    })?;
    Ok(if from_right {
        let mut parts: Vec<Value> = text.rsplitn(splits_max + 1, separator).map(Value::from).collect();
        parts.reverse();
        Value::from(parts)
    } else {
        Value::from(text.splitn(splits_max + 1, separator).map(Value::from).collect::<Vec<_>>())
    })
}

fn split_at_space(text: &str, splits_max: usize, from_right: bool) -> Value {
    let mut parts = Vec::new();
    let mut rest = strip(text, None, !from_right, from_right);
    while !rest.is_empty() {
        let cut = if parts.len() == splits_max {
            None
        } else if from_right {
            rest.rfind(is_space)
        } else {
            rest.find(is_space)
        };
        match cut {
            None => {
                parts.push(Value::from(rest));
                break;
            }
            Some(at) if from_right => {
                let width = rest[at..].chars().next().map_or(1, char::len_utf8);
                parts.push(Value::from(&rest[at + width..]));
                rest = strip(&rest[..at], None, false, true);
            }
            Some(at) => {
                parts.push(Value::from(&rest[..at]));
                rest = strip(&rest[at..], None, true, false);
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    Value::from(parts)
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, chars, method != "rstrip", method != "lstrip"))
        }
        "split" => split(text, args, false)?,
        "rsplit" => split(text, args, true)?,
        "splitlines" => {
            let (keep_ends,): (Option<bool>,) = from_args(args)?;
            let lines = split_lines(text, keep_ends.unwrap_or(false));
            Value::from(lines.into_iter().map(Value::from).collect::<Vec<_>>())
        }
        "replace" => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
            Value::from(replace(text, old, new, count.and_then(|n| usize::try_from(n).ok()))?)
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            match text.split_once(separator) {
                Some((before, after)) => three_parts(before, separator, after),
                None => three_parts(text, "", ""),
            }
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            match text.rsplit_once(separator) {
                Some((before, after)) => three_parts(before, separator, after),
                None => three_parts("", "", text),
            }
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (needle,): (&str,) = from_args(args)?;
            let byte = if method.starts_with('r') { text.rfind(needle) } else { text.find(needle) };
            if byte.is_none() && method.ends_with("index") {
                return Err(Error::new(ErrorKind::InvalidOperation, "index: substring not found"));
            }
            Value::from(character_position(text, byte))
        }
        "ljust" | "rjust" => {
            let (width, fill): (i64, Option<char>) = from_args(args)?;
            let padding = padding(text, width, fill.unwrap_or(' '))?;
            Value::from(if method == "ljust" { format!("{text}{padding}") } else { format!("{padding}{text}") })
        }
        "zfill" => {
            let (width,): (i64,) = from_args(args)?;
            let (sign, digits) = match text.strip_prefix(['-', '+']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            Value::from(format!("{sign}{}{digits}", padding(text, width, '0')?))
        }
        "swapcase" => Value::from(
            text.chars()
                .flat_map(|c| -> Vec<char> {
                    if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
                })
                .collect::<String>(),
        ),
        REVERSED => Value::from(text.chars().rev().collect::<String>()),
        "casefold" => Value::from(text.to_lowercase()),
        "isspace" => Value::from(all_and_some(text, is_space)),
        "isdigit" | "isnumeric" | "isdecimal" => Value::from(all_and_some(text, char::is_numeric)),
        "isalnum" => Value::from(all_and_some(text, char::is_alphanumeric)),
        "isalpha" => Value::from(all_and_some(text, char::is_alphabetic)),
        "islower" => Value::from(is_cased(text, char::is_lowercase, char::is_uppercase)),
        "isupper" => Value::from(is_cased(text, char::is_uppercase, char::is_lowercase)),
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let mut out = String::new();
            for (i, item) in items.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(text);
                }
                let item = item.as_str().ok_or_else(|| {
                    Error::new(ErrorKind::InvalidOperation, format!("join: item {i} is not a string"))
                })?;
                out.push_str(item);
                if out.len() > OUTPUT_BYTES_MAX {
                    return Err(Error::new(ErrorKind::WriteFailure, OUTPUT_LIMIT_MESSAGE));
                }
            }
            Value::from(out)
        }
        _ => return Ok(None),
    }))
}

fn list_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        REVERSED => {
            let mut items: Vec<Value> = value.try_iter()?.collect();
            items.reverse();
            Value::from(items)
        }
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            match value.try_iter()?.position(|item| item == *wanted) {
                Some(position) => Value::from(position),
                None => {
                    return Err(Error::new(ErrorKind::InvalidOperation, "index: not in the list"));
                }
            }
        }
        "copy" => {
            let () = from_args(args)?;
            Value::from(value.try_iter()?.collect::<Vec<_>>())
        }
        _ => return Ok(None),
    }))
}

fn map_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        // An entry may be none, which is not the same as missing: `get` then gives none, not the default.
        "get" => {
            let (key, default): (&Value, Option<Value>) = from_args(args)?;
            let found = value.as_object().and_then(|object| object.get_value(key));
            found.unwrap_or_else(|| default.unwrap_or_else(|| Value::from(())))
        }
        "copy" => {
            let () = from_args(args)?;
            value.clone()
        }
        _ => return Ok(None),
    }))
}

#[cfg(test)]
mod tests {
    use minijinja::Environment;

    /// Evaluates an expression; expected values in the tests below are CPython 3.11's.
    fn eval(expression: &str) -> String {
        let mut env = Environment::new();
        env.set_unknown_method_callback(super::call);
        let value = env.compile_expression(expression).unwrap().eval(()).unwrap();
        crate::python::py_str(&value, 1 << 16).unwrap()
    }

    #[test]
    fn string_methods_give_what_python_gives() {
        for (expression, result) in [
            (r"'\x1fa '.strip() ~ '|'", "a|"),
            ("'xxabxx'.strip('x')", "ab"),
            ("'a b  c'.split()", "['a', 'b', 'c']"),
            ("' a b  c '.split(none, 1)", "['a', 'b  c ']"),
            ("' a b  c '.rsplit(none, 1)", "[' a b', 'c']"),
            ("' a b  c '.rsplit()", "['a', 'b', 'c']"),
            ("' '.split() ~ ''.split()", "[][]"),
            ("'abc'.__reversed__() ~ [1, 2].__reversed__() ~ [].__reversed__()", "cba[2, 1][]"),
            ("'a,b,c'.split(',', 1)", "['a', 'b,c']"),
            ("'a,b,c'.split(sep=',', maxsplit=1)", "['a', 'b,c']"),
            ("'a,b,c'.rsplit(',', 1)", "['a,b', 'c']"),
            ("'a,b'.split(',')[-1]", "b"),
            ("'a=b=c'.partition('=')", "['a', '=', 'b=c']"),
            ("'a=b=c'.rpartition('=')", "['a=b', '=', 'c']"),
            ("'abc'.partition('=')", "['abc', '', '']"),
            ("'prefix-x'.removeprefix('prefix-')", "x"),
            ("'x.txt'.removesuffix('.txt')", "x"),
            ("'éa'.find('a')", "1"),
            ("'éa'.rfind('x')", "-1"),
            ("'7'.zfill(3) ~ '-7'.zfill(4)", "007-007"),
            ("'ab'.ljust(4, '.') ~ 'ab'.rjust(4)", "ab..  ab"),
            (r"'a\r\nb\n'.splitlines()", "['a', 'b']"),
            ("''.isdigit()", "False"),
            ("'aB1'.islower()", "False"),
            ("'ab1'.islower()", "True"),
            ("'aaa'.replace('a', 'b', 2)", "bba"),
            ("{'a': none}.get('a', 1)", "None"),
            ("{'a': 1}.get('b', 2)", "2"),
            ("[3, 4].index(4)", "1"),
        ] {
            assert_eq!(eval(expression), result, "{expression}");
        }
    }

    #[test]
    fn methods_that_change_their_object_do_not_exist() {
        let mut env = Environment::new();
        env.set_unknown_method_callback(super::call);
        for expression in ["[1].append(2)", "[1].pop()", "{}.update({})", "{}.pop('a')"] {
            assert!(env.compile_expression(expression).unwrap().eval(()).is_err(), "{expression}");
        }
    }
}
