//! From token bytes to the text a client sees: incremental UTF-8 decoding and stop strings.
//!
//! A token is a few bytes, not text: characters and stop strings cross token boundaries. [`StopMatcher`] takes the bytes token by
//! token and gives out text as soon as it is certain: complete characters that cannot be the beginning of a stop string. What
//! it gives out does not depend on how the bytes were cut into tokens.
//!
//! Stop strings are found by the automaton of Aho & Corasick (1975), one step per byte however many strings there are. The depth
//! of its state is how many of the last bytes may still become a stop string, which is exactly what must be held back.
//! The first byte that completes a stop string ends the text; where several end there, the longest is the one reported.

use std::collections::{HashMap, VecDeque};

/// How many stop strings one request may name.
pub const MAX_STOP_STRINGS: usize = 4096;
/// How many bytes the stop strings of one request may have together.
pub const MAX_STOP_BYTES: usize = 64 * 1024;

/// Why stop strings were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    /// More than [`MAX_STOP_STRINGS`].
    #[error("{count} stop strings were given, at most {MAX_STOP_STRINGS} are allowed: send fewer")]
    TooMany {
        /// How many there were.
        count: usize,
    },
    /// More than [`MAX_STOP_BYTES`] together.
    #[error(
        "the stop strings have {bytes} bytes together, at most {MAX_STOP_BYTES} are allowed: send fewer or shorter ones"
    )]
    TooLong {
        /// How many bytes there were.
        bytes: usize,
    },
    /// An empty string would stop before the first character.
    #[error("stop string {index} is empty, which would end every answer at once: remove it")]
    Empty {
        /// Its index in the request.
        index: usize,
    },
}

/// Text that became certain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Emission {
    /// The text; never half a character, never the beginning of a stop string.
    pub text: String,
    /// How many further tokens, in the order they were pushed, have all their bytes in the text given out so far.
    /// The tokens of a stop string are never counted.
    pub tokens: usize,
    /// The index of the stop string that ended the text; what was pushed after it is ignored.
    pub stop: Option<usize>,
}

/// Decodes token bytes to text and looks for stop strings.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    automaton: Automaton,
    state: u32,
    /// Bytes that were pushed and not given out.
    held: Vec<u8>,
    /// Offset, from the beginning of the text, of the first held byte.
    held_from: u64,
    /// Offset of the end of each token that was pushed and not released.
    token_ends: VecDeque<u64>,
    ended: bool,
}

impl StopMatcher {
    /// A matcher for these stop strings; without any it only decodes.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Result<StopMatcher, StopError> {
        if stops.len() > MAX_STOP_STRINGS {
            return Err(StopError::TooMany { count: stops.len() });
        }
        if let Some(index) = stops.iter().position(|stop| stop.as_ref().is_empty()) {
            return Err(StopError::Empty { index });
        }
        let bytes = stops.iter().map(|stop| stop.as_ref().len()).sum();
        if bytes > MAX_STOP_BYTES {
            return Err(StopError::TooLong { bytes });
        }
        Ok(StopMatcher {
            automaton: Automaton::new(stops.iter().map(|stop| stop.as_ref().as_bytes())),
            state: Automaton::ROOT,
            held: Vec::new(),
            held_from: 0,
            token_ends: VecDeque::new(),
            ended: false,
        })
    }

    /// Takes the bytes of the next token (none for a control token) and gives out what became certain.
    pub fn push(&mut self, token_bytes: &[u8]) -> Emission {
        if self.ended {
            return Emission::default();
        }
        let token_end = self.held_from + (self.held.len() + token_bytes.len()) as u64;
        self.token_ends.push_back(token_end);
        for &byte in token_bytes {
            self.held.push(byte);
            self.state = self.automaton.step(self.state, byte);
            if let Some((index, length)) = self.automaton.found(self.state) {
                self.ended = true;
                let certain = self.held.len() - length;
                let mut emission = self.give_out(certain, true);
                emission.stop = Some(index);
                self.held.clear();
                self.token_ends.clear();
                return emission;
            }
        }
        let certain = self.held.len() - self.automaton.depth(self.state);
        self.give_out(certain, false)
    }

    /// The generation ended without a stop string: gives out all that was held back, half a character as U+FFFD.
    pub fn finish(&mut self) -> Emission {
        if self.ended {
            return Emission::default();
        }
        self.ended = true;
        self.give_out(self.held.len(), true)
    }

    /// Whether a stop string was found or the text was finished.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Gives out the first `certain` held bytes; if more may follow them, not the incomplete character at their end.
    fn give_out(&mut self, certain: usize, last: bool) -> Emission {
        let mut text = String::with_capacity(certain);
        let mut taken = 0;
        while taken < certain {
            match std::str::from_utf8(&self.held[taken..certain]) {
                Ok(valid) => {
                    text.push_str(valid);
                    taken = certain;
                }
                Err(error) => {
                    let valid_end = taken + error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.held[taken..valid_end]));
                    taken = valid_end;
                    match error.error_len() {
                        Some(invalid) => taken += invalid,
                        None if last => taken = certain,
                        None => break,
                    }
                    text.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
        self.held.drain(..taken);
        self.held_from += taken as u64;
        let tokens = self.token_ends.iter().take_while(|end| **end <= self.held_from).count();
        self.token_ends.drain(..tokens);
        Emission { text, tokens, stop: None }
    }
}

/// The Aho-Corasick automaton of the stop strings. At most [`MAX_STOP_BYTES`] + 1 states.
#[derive(Debug, Clone)]
struct Automaton {
    /// The trie's edges.
    children: HashMap<(u32, u8), u32>,
    states: Vec<State>,
}

#[derive(Debug, Clone, Default)]
struct State {
    /// The state of the longest proper suffix that is in the trie.
    fallback: u32,
    /// The length of the string that leads here from the root.
    depth: usize,
    /// Index and length of the longest stop string that ends here.
    found: Option<(usize, usize)>,
}

impl Automaton {
    const ROOT: u32 = 0;

    fn new<'a>(stops: impl Iterator<Item = &'a [u8]>) -> Automaton {
        let mut automaton = Automaton { children: HashMap::new(), states: vec![State::default()] };
        // (parent, byte, child), in the order of creation and then of depth.
        let mut edges = Vec::new();
        for (index, stop) in stops.enumerate() {
            let mut state = Self::ROOT;
            for (at, &byte) in stop.iter().enumerate() {
                state = match automaton.children.get(&(state, byte)) {
                    Some(&child) => child,
                    None => {
                        let child = automaton.states.len() as u32;
                        automaton.states.push(State { depth: at + 1, ..State::default() });
                        automaton.children.insert((state, byte), child);
                        edges.push((state, byte, child));
                        child
                    }
                };
            }
            // Of equal strings the first is reported.
            let found = &mut automaton.states[state as usize].found;
            *found = found.or(Some((index, stop.len())));
        }
        // Breadth first: a state's fallback is shallower and therefore finished.
        edges.sort_by_key(|(_, _, child)| automaton.states[*child as usize].depth);
        for (parent, byte, child) in edges {
            if parent == Self::ROOT {
                continue;
            }
            let fallback = automaton.step(automaton.states[parent as usize].fallback, byte);
            let inherited = automaton.states[fallback as usize].found;
            let state = &mut automaton.states[child as usize];
            state.fallback = fallback;
            state.found = state.found.or(inherited);
        }
        automaton
    }

    fn step(&self, mut state: u32, byte: u8) -> u32 {
        loop {
            if let Some(&next) = self.children.get(&(state, byte)) {
                return next;
            }
            if state == Self::ROOT {
                return Self::ROOT;
            }
            state = self.states[state as usize].fallback;
        }
    }

    fn depth(&self, state: u32) -> usize {
        self.states[state as usize].depth
    }

    fn found(&self, state: u32) -> Option<(usize, usize)> {
        self.states[state as usize].found
    }
}
