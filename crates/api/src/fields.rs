//! Reading a JSON object field by field, so that no field can be overlooked.
//!
//! serde's derive would ignore what it does not know, and its messages do not carry the field's path in the form that
//! OpenAI's clients show. A [`Fields`] is emptied by its reader; what is left at the end is refused by name.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::errors::ApiError;

/// The fields of an object that were not yet read.
#[derive(Debug)]
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Where the object stands in the request: empty, or such as `messages[0].`.
    prefix: String,
}

type Read<T> = Result<Option<T>, ApiError>;

impl Fields {
    /// The request itself.
    pub(crate) fn new(map: Map<String, Value>) -> Self {
        Fields { map, prefix: String::new() }
    }

    /// An object within the request, found at `path`.
    pub(crate) fn within(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Fields { map, prefix: format!("{path}.") }),
            other => Err(wrong_type(path, "an object", &other)),
        }
    }

    /// The field's path from the request's root.
    pub(crate) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The value as it is; `null` is absent.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.map.swap_remove(key).filter(|value| !value.is_null())
    }

    pub(crate) fn string(&mut self, key: &str) -> Read<String> {
        self.read(key, "a string", |value| match value {
            Value::String(text) => Ok(text),
            other => Err(other),
        })
    }

    pub(crate) fn required_string(&mut self, key: &str) -> Result<String, ApiError> {
        self.string(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn boolean(&mut self, key: &str) -> Read<bool> {
        self.read(key, "a boolean", |value| value.as_bool().ok_or(value))
    }

    pub(crate) fn array(&mut self, key: &str) -> Read<Vec<Value>> {
        self.read(key, "an array", |value| match value {
            Value::Array(items) => Ok(items),
            other => Err(other),
        })
    }

    pub(crate) fn object(&mut self, key: &str) -> Read<Map<String, Value>> {
        self.read(key, "an object", |value| match value {
            Value::Object(map) => Ok(map),
            other => Err(other),
        })
    }

    /// An object whose fields are to be read in turn.
    pub(crate) fn fields(&mut self, key: &str) -> Read<Fields> {
        let prefix = format!("{}.", self.path(key));
        Ok(self.object(key)?.map(|map| Fields { map, prefix }))
    }

    pub(crate) fn integer(&mut self, key: &str, range: RangeInclusive<i64>) -> Read<i64> {
        let read = self.read(key, "an integer", |value| as_integer(&value).ok_or(value))?;
        self.within_range(key, read, &range)
    }

    /// A finite number; JSON has no others.
    pub(crate) fn number(&mut self, key: &str, range: RangeInclusive<f64>) -> Read<f64> {
        let read =
            self.read(key, "a number", |value| value.as_f64().filter(|number| number.is_finite()).ok_or(value))?;
        self.within_range(key, read, &range)
    }

    /// A field that this server knows and does not do.
    pub(crate) fn refuse(&mut self, key: &str, advice: &str) -> Result<(), ApiError> {
        match self.take(key) {
            None => Ok(()),
            Some(_) => {
                Err(ApiError::unsupported(self.path(key), format!("`{}` is not supported: {advice}", self.path(key))))
            }
        }
    }

    pub(crate) fn missing(&self, key: &str) -> ApiError {
        ApiError::param(self.path(key), format!("Missing required parameter: `{}`.", self.path(key)))
            .code("missing_required_parameter")
    }

    /// The end: a field that nobody read is one that would be ignored.
    pub(crate) fn finish(self) -> Result<(), ApiError> {
        match self.map.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((key, _)) => {
                let path = self.path(&shorten(key));
                let message = format!(
                    "Unknown parameter: `{path}`. This server refuses what it cannot honour rather than ignore it; \
                     leave the parameter out."
                );
                Err(ApiError::param(path, message).code("unknown_parameter"))
            }
        }
    }

    fn read<T>(&mut self, key: &str, wanted: &str, convert: impl FnOnce(Value) -> Result<T, Value>) -> Read<T> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        convert(value).map(Some).map_err(|value| wrong_type(&self.path(key), wanted, &value))
    }

    fn within_range<T: PartialOrd + std::fmt::Display>(
        &self,
        key: &str,
        value: Option<T>,
        range: &RangeInclusive<T>,
    ) -> Read<T> {
        match value {
            Some(value) if !range.contains(&value) => Err(out_of_range(&self.path(key), &value, range)),
            value => Ok(value),
        }
    }
}

/// An integer, also one that is written as `5.0`, as some JavaScript clients do.
pub(crate) fn as_integer(value: &Value) -> Option<i64> {
    /// Beyond it, a double does not stand for one integer.
    const MAX_EXACT: f64 = 9_007_199_254_740_992.0;
    value.as_i64().or_else(|| {
        value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() <= MAX_EXACT).map(|number| number as i64)
    })
}

/// 400: a value of the wrong JSON type.
pub(crate) fn wrong_type(path: &str, wanted: &str, value: &Value) -> ApiError {
    let got = match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a decimal number",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    ApiError::param(path, format!("Invalid type for `{path}`: expected {wanted}, but got {got} instead."))
        .code("invalid_type")
}

/// 400: a number beyond its bounds.
pub(crate) fn out_of_range<T: std::fmt::Display>(path: &str, value: &T, range: &RangeInclusive<T>) -> ApiError {
    let message =
        format!("Invalid value for `{path}`: {value} is out of range; use {} to {}.", range.start(), range.end());
    ApiError::param(path, message).code("out_of_range")
}

/// 400: more of something than a limit allows.
pub(crate) fn too_many(path: &str, what: &str, count: usize, limit: usize) -> ApiError {
    let message = format!("`{path}` has {count} {what}, and at most {limit} are allowed; send fewer.");
    ApiError::param(path, message).code("array_above_max_length")
}

/// 400: longer than a limit allows.
pub(crate) fn too_long(path: &str, bytes: usize, limit: usize) -> ApiError {
    let message = format!("`{path}` is {bytes} bytes long, and at most {limit} are allowed; shorten it.");
    ApiError::param(path, message).code("string_above_max_length")
}

/// A client's text, short enough to be repeated in an error message.
pub(crate) fn shorten(text: &str) -> String {
    const MAX_CHARS: usize = 100;
    match text.char_indices().nth(MAX_CHARS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::new(value.as_object().unwrap().clone())
    }

    fn error(result: Result<impl std::fmt::Debug, ApiError>) -> Value {
        result.unwrap_err().body()["error"].take()
    }

    #[test]
    fn what_was_not_read_is_refused_by_name_and_null_is_absent() {
        let mut some = fields(json!({"a": 1, "b": null, "c": 2}));
        assert_eq!(some.integer("a", 0..=9).unwrap(), Some(1));
        assert_eq!(some.integer("b", 0..=9).unwrap(), None);
        let error = error(some.finish());
        assert_eq!(error["param"], "c");
        assert_eq!(error["code"], "unknown_parameter");
        fields(json!({"unknown": null})).finish().unwrap();
    }

    #[test]
    fn a_nested_field_is_named_with_its_path() {
        let mut outer = fields(json!({"stream_options": {"include_usage": "yes"}}));
        let mut inner = outer.fields("stream_options").unwrap().unwrap();
        assert_eq!(error(inner.boolean("include_usage"))["param"], "stream_options.include_usage");
    }

    #[test]
    fn integers_may_be_written_as_decimals_but_not_be_fractions() {
        for (value, wanted) in [(json!(5), Some(5)), (json!(5.0), Some(5)), (json!(-1), Some(-1))] {
            assert_eq!(fields(json!({"n": value})).integer("n", -10..=10).unwrap(), wanted);
        }
        for value in [json!(0.5), json!("5"), json!([]), json!(1e300), json!(true)] {
            assert_eq!(error(fields(json!({"n": value})).integer("n", -10..=10))["code"], "invalid_type");
        }
        assert_eq!(error(fields(json!({"n": 11})).integer("n", -10..=10))["code"], "out_of_range");
        assert_eq!(error(fields(json!({"n": u64::MAX})).integer("n", -10..=10))["param"], "n");
    }

    #[test]
    fn a_very_long_name_is_not_repeated_in_full() {
        let message = error(fields(json!({"é".repeat(100_000): 1})).finish())["message"].to_string();
        assert!(message.len() < 1000, "{}", message.len());
    }

    proptest::proptest! {
        #[test]
        fn every_number_is_either_read_within_its_range_or_refused(number: f64) {
            let read = fields(json!({"x": number})).number("x", -2.0..=2.0);
            match read {
                Ok(Some(value)) => proptest::prop_assert!((-2.0..=2.0).contains(&value)),
                Ok(None) => proptest::prop_assert!(!number.is_finite()), // serde_json writes NaN as null
                Err(_) => proptest::prop_assert!(!(-2.0..=2.0).contains(&number)),
            }
        }
    }
}
