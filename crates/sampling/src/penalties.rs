//! What was said before counts against being said again.
//!
//! Two families, told apart by what they look at. The repeat penalty (Keskar et al. 2019, CTRL) looks at the last
//! `penalty_last_n` tokens of prompt and answer, whoever wrote them. OpenAI's presence and frequency penalties look at the answer only:
//! otherwise the length of a prompt would change how an answer begins.

use std::collections::HashMap;

use murmur_protocol::sampling::{SamplingParams, Token};

/// The tokens so far and how often each occurs where a penalty looks.
#[derive(Debug, Clone)]
pub(crate) struct History {
    /// The end of the prompt, as far as the repeat penalty can see, then the answer.
    tokens: Vec<Token>,
    /// How many of `tokens` are prompt.
    prompt: usize,
    /// How far the repeat penalty looks back; 0 if it is off.
    window: usize,
    in_window: HashMap<Token, u32>,
    /// Counts in the answer; empty if neither presence nor frequency is penalised.
    in_answer: HashMap<Token, u32>,
    repeat: f32,
    presence: f32,
    frequency: f32,
}

impl History {
    pub(crate) fn new(params: &SamplingParams, prompt: &[Token]) -> History {
        let window = if params.repeat_penalty == 1.0 { 0 } else { params.penalty_last_n as usize };
        let tokens = prompt[prompt.len().saturating_sub(window)..].to_vec();
        let mut in_window = HashMap::new();
        for &token in &tokens {
            *in_window.entry(token).or_insert(0) += 1;
        }
        History {
            prompt: tokens.len(),
            tokens,
            window,
            in_window,
            in_answer: HashMap::new(),
            repeat: params.repeat_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
        }
    }

    pub(crate) fn generated(&self) -> &[Token] {
        &self.tokens[self.prompt..]
    }

    fn counts_answer(&self) -> bool {
        self.presence != 0.0 || self.frequency != 0.0
    }

    /// Whether [`History::penalise`] changes anything.
    pub(crate) fn penalises(&self) -> bool {
        !self.in_window.is_empty() || !self.in_answer.is_empty()
    }

    pub(crate) fn push(&mut self, token: Token) {
        self.tokens.push(token);
        if self.counts_answer() {
            *self.in_answer.entry(token).or_insert(0) += 1;
        }
        if self.window > 0 {
            *self.in_window.entry(token).or_insert(0) += 1;
            if let Some(left) = self.tokens.len().checked_sub(self.window + 1) {
                decrement(&mut self.in_window, self.tokens[left]);
            }
        }
    }

    /// Undoes the last `push`.
    pub(crate) fn pop(&mut self) {
        if self.tokens.len() <= self.prompt {
            return;
        }
        let Some(token) = self.tokens.pop() else {
            return;
        };
        decrement(&mut self.in_answer, token);
        if self.window > 0 {
            decrement(&mut self.in_window, token);
            if let Some(back) = self.tokens.len().checked_sub(self.window) {
                *self.in_window.entry(self.tokens[back]).or_insert(0) += 1;
            }
        }
    }

    /// Lowers the logits of what was said. Every token of the history must be in range.
    pub(crate) fn penalise(&self, logits: &mut [f32]) {
        for &token in self.in_window.keys() {
            if let Some(logit) = logits.get_mut(token as usize) {
                let penalised = if *logit > 0.0 { *logit / self.repeat } else { *logit * self.repeat };
                set(logit, penalised);
            }
        }
        for (&token, &count) in &self.in_answer {
            if let Some(logit) = logits.get_mut(token as usize) {
                let penalised = *logit - self.presence - self.frequency * count as f32;
                set(logit, penalised);
            }
        }
    }
}

/// Overflow must not make a token infinitely probable; a banned token stays banned.
fn set(logit: &mut f32, penalised: f32) {
    if *logit > f32::NEG_INFINITY {
        *logit = penalised.clamp(f32::MIN, f32::MAX);
    }
}

fn decrement(counts: &mut HashMap<Token, u32>, token: Token) {
    if let Some(count) = counts.get_mut(&token) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference(params: &SamplingParams, prompt: &[Token], answer: &[Token], logits: &mut [f32]) {
        let all: Vec<Token> = prompt.iter().chain(answer).copied().collect();
        let window = &all[all.len().saturating_sub(params.penalty_last_n as usize)..];
        for (token, logit) in logits.iter_mut().enumerate() {
            if params.repeat_penalty != 1.0 && window.contains(&(token as Token)) {
                *logit = if *logit > 0.0 { *logit / params.repeat_penalty } else { *logit * params.repeat_penalty };
            }
            let count = answer.iter().filter(|said| **said == token as Token).count();
            if count > 0 && (params.presence_penalty != 0.0 || params.frequency_penalty != 0.0) {
                *logit = *logit - params.presence_penalty - params.frequency_penalty * count as f32;
            }
        }
    }

    proptest! {
        #[test]
        fn penalties_follow_their_definition_also_after_undoing(
            prompt in prop::collection::vec(0..8, 0..12),
            answer in prop::collection::vec(0..8, 0..12),
            undone in prop::collection::vec(0..8, 0..12),
            logits in prop::collection::vec(-5.0f32..5.0, 8),
            penalty_last_n in 0u32..16,
            repeat_penalty in prop_oneof![Just(1.0f32), 0.5f32..2.0],
            presence_penalty in prop_oneof![Just(0.0f32), -2.0f32..2.0],
            frequency_penalty in prop_oneof![Just(0.0f32), -2.0f32..2.0],
        ) {
            let params = SamplingParams {
                penalty_last_n, repeat_penalty, presence_penalty, frequency_penalty, ..SamplingParams::default()
            };
            let mut history = History::new(&params, &prompt);
            for &token in answer.iter().chain(&undone) {
                history.push(token);
            }
            for _ in &undone {
                history.pop();
            }
            prop_assert_eq!(history.generated(), &answer[..]);
            let mut ours = logits.clone();
            history.penalise(&mut ours);
            let mut expected = logits;
            reference(&params, &prompt, &answer, &mut expected);
            prop_assert_eq!(ours, expected);
        }
    }
}
