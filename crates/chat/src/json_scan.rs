//! Follows one JSON value character by character (RFC 8259), to know where it ends without waiting for its end.
//!
//! Strict but for one thing: raw control characters inside strings pass. Models write newlines into strings, and
//! [`ValueScanner::in_string`] lets the caller put the escape that belongs there.

/// Containers nested deeper than this are invalid.
const DEPTH_MAX: usize = 128;

/// What a character did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scan {
    /// The value goes on.
    More,
    /// The value ended with this character.
    Complete,
    /// The value had ended before this character (only numbers need to see what follows them).
    CompleteBefore,
    /// No JSON value begins so.
    Invalid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Container {
    Array,
    Object,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Value,
    ValueOrClose,
    Key,
    KeyOrClose,
    Colon,
    CommaOrClose,
    Text { is_key: bool },
    Escape { is_key: bool },
    Unicode { is_key: bool, digits_left: u8 },
    Literal { rest: &'static str },
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// The scanner of one value.
#[derive(Debug)]
pub(crate) struct ValueScanner {
    stack: Vec<Container>,
    state: State,
}

impl ValueScanner {
    pub(crate) fn new() -> ValueScanner {
        ValueScanner { stack: Vec::new(), state: State::Value }
    }

    /// The next character belongs to a string's content (or closes it).
    pub(crate) fn in_string(&self) -> bool {
        matches!(self.state, State::Text { .. })
    }

    /// Takes the next character. After anything but [`Scan::More`] the scanner is spent.
    pub(crate) fn feed(&mut self, c: char) -> Scan {
        use State::*;
        let space = matches!(c, ' ' | '\t' | '\n' | '\r');
        self.state = match (self.state, c) {
            (Value | ValueOrClose | Key | KeyOrClose | Colon | CommaOrClose, _) if space => self.state,
            (ValueOrClose, ']') | (KeyOrClose, '}') => return self.close(c),
            (Value | ValueOrClose, _) => match c {
                '{' | '[' if self.stack.len() >= DEPTH_MAX => return Scan::Invalid,
                '{' => {
                    self.stack.push(Container::Object);
                    KeyOrClose
                }
                '[' => {
                    self.stack.push(Container::Array);
                    ValueOrClose
                }
                '"' => Text { is_key: false },
                '-' => Minus,
                '0' => Zero,
                '1'..='9' => Integer,
                't' => Literal { rest: "rue" },
                'f' => Literal { rest: "alse" },
                'n' => Literal { rest: "ull" },
                _ => return Scan::Invalid,
            },
            (Key | KeyOrClose, '"') => Text { is_key: true },
            (Colon, ':') => Value,
            (CommaOrClose, ',') => match self.stack.last() {
                Some(Container::Object) => Key,
                _ => Value,
            },
            (CommaOrClose, '}' | ']') => return self.close(c),
            (Text { is_key }, '\\') => Escape { is_key },
            (Text { is_key: true }, '"') => Colon,
            (Text { is_key: false }, '"') => return self.value_ended(),
            (Text { .. }, _) => self.state,
            (Escape { is_key }, 'u') => Unicode { is_key, digits_left: 4 },
            (Escape { is_key }, '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => Text { is_key },
            (Unicode { is_key, digits_left }, _) if c.is_ascii_hexdigit() => match digits_left {
                1 => Text { is_key },
                _ => Unicode { is_key, digits_left: digits_left - 1 },
            },
            (Literal { rest }, _) if rest.starts_with(c) => match &rest[1..] {
                "" => return self.value_ended(),
                rest => Literal { rest },
            },
            (Minus, '0') => Zero,
            (Minus, '1'..='9') => Integer,
            (Integer, '0'..='9') => Integer,
            (Zero | Integer, '.') => Point,
            (Point | Fraction, '0'..='9') => Fraction,
            (Zero | Integer | Fraction, 'e' | 'E') => Exponent,
            (Exponent, '+' | '-') => ExponentSign,
            (Exponent | ExponentSign | ExponentDigits, '0'..='9') => ExponentDigits,
            (Zero | Integer | Fraction | ExponentDigits, _) => {
                if self.stack.is_empty() {
                    return Scan::CompleteBefore;
                }
                self.state = CommaOrClose;
                return self.feed(c);
            }
            _ => return Scan::Invalid,
        };
        Scan::More
    }

    fn close(&mut self, c: char) -> Scan {
        match (self.stack.pop(), c) {
            (Some(Container::Object), '}') | (Some(Container::Array), ']') => self.value_ended(),
            _ => Scan::Invalid,
        }
    }

    fn value_ended(&mut self) -> Scan {
        if self.stack.is_empty() {
            return Scan::Complete;
        }
        self.state = State::CommaOrClose;
        Scan::More
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn scan(text: &str) -> (Scan, usize) {
        let mut scanner = ValueScanner::new();
        for (i, c) in text.char_indices() {
            let step = scanner.feed(c);
            if step != Scan::More {
                return (step, i);
            }
        }
        (Scan::More, text.len())
    }

    #[test]
    fn the_end_of_a_value_is_found() {
        assert_eq!(scan(r#"{"a":[1,-2.5e+3,true,null,"\"}\u00e9"],"b":{}} x"#), (Scan::Complete, 45));
        assert_eq!(scan("12 "), (Scan::CompleteBefore, 2));
        assert_eq!(scan(" [ ] "), (Scan::Complete, 3));
        assert_eq!(scan("{\"a\":1"), (Scan::More, 6));
    }

    #[test]
    fn what_is_no_json_is_invalid() {
        for text in
            ["{a", "{\"a\" 1", "[1 2", "[1,]", "{\"a\":1,}", "tru ", "01", "-a", "1.x", "[}", "\"\\x", "\"\\u00g", "]"]
        {
            let (step, _) = scan(text);
            assert!(matches!(step, Scan::Invalid | Scan::CompleteBefore), "{text}: {step:?}");
        }
        assert_eq!(scan(&"[".repeat(DEPTH_MAX + 1)), (Scan::Invalid, DEPTH_MAX));
    }

    proptest! {
        #[test]
        fn a_serialised_value_ends_exactly_at_its_end(
            texts in proptest::collection::vec(".*", 0..4),
            number in any::<f64>().prop_filter("finite", |x| x.is_finite()),
            int in any::<i64>(),
        ) {
            let value = serde_json::json!({"t": texts, "n": [number, int, null, true], "o": {"e": [], "f": {}}});
            for text in [value.to_string(), serde_json::to_string_pretty(&value).unwrap()] {
                prop_assert_eq!(scan(&text), (Scan::Complete, text.len() - 1));
            }
        }

        #[test]
        fn whatever_is_found_complete_is_json(text in "[\\[\\]{}\":,0-9a-e.tru\\\\ -]{0,40}") {
            if let (Scan::Complete, end) = scan(&text) {
                prop_assert!(serde_json::from_str::<serde_json::Value>(&text[..=end]).is_ok(), "{}", text);
            }
        }
    }
}
