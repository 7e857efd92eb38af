//! A model's vocabulary with the child that reads texts, and no weights.
//!
//! Enough to drive a model that other machines hold: a file of metadata (`murmur_gguf::tokenizer_card`) does as well as
//! the whole model. A text may make llama.cpp abort, so it is a child that reads it, and one that dies is replaced.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use murmur_gguf::Gguf;
use murmur_protocol::{
    frame::{Frame, Header, Kind},
    sampling::Token,
    stage::{Keep, Load, Role, Tokenize},
};
use murmur_sampling::Vocabulary;

use super::{EngineError, helper::Helper, stop::Stop};
use crate::{link::LinkError, vocabulary};

/// A vocabulary, and its child. Dropping it ends the child.
pub struct Tokenizer {
    helper: Arc<Helper>,
    vocabulary: Arc<Vocabulary>,
}

impl Tokenizer {
    /// Checks `card` (a tokenizer card, or a whole model), starts `program` as a child and waits until that has loaded the
    /// vocabulary. Blocks. A child that owes an answer and is silent is never killed sooner than after `silence_floor`.
    pub fn start(program: PathBuf, card: &Path, silence_floor: Duration) -> Result<Tokenizer, EngineError> {
        Gguf::open(card)?.validate_vocabulary()?;
        Tokenizer::of_child(program, vocabulary_of(card), silence_floor, Stop::new(), &mut |_| {})
    }

    /// The same with any child that knows a vocabulary, as part of what `stop` ends.
    pub(super) fn of_child(
        program: PathBuf,
        load: Load,
        silence_floor: Duration,
        stop: Stop,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Tokenizer, EngineError> {
        let helper = Helper::new(program, load, silence_floor, stop, progress)?;
        let vocabulary = Arc::new(vocabulary::from_facts(helper.vocabulary_facts()?)?);
        Ok(Tokenizer { helper: Arc::new(helper), vocabulary })
    }

    /// The tokens.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// Text to tokens. `add_special`: with what the model wants at the start; `parse_special`: control tokens written in
    /// the text are read as such.
    pub async fn tokenize(
        &self,
        text: &str,
        add_special: bool,
        parse_special: bool,
    ) -> Result<Vec<Token>, EngineError> {
        let request = Tokenize { text: text.to_owned(), add_special, parse_special };
        let frame = Frame::message(Header::new(Kind::Tokenize, 0), &request).map_err(LinkError::from)?;
        let answer = self.ask(frame).await?;
        Ok(answer.token_rows().map_err(LinkError::from)?)
    }

    /// The child's process, while there is one.
    pub fn process_id(&self) -> Option<u32> {
        self.helper.process_id()
    }

    /// Asks the child something else that it knows.
    pub(super) async fn ask(&self, frame: Frame) -> Result<Frame, EngineError> {
        self.helper.ask(frame).await
    }
}

/// What a child is told that loads the vocabulary of `path` alone.
pub(super) fn vocabulary_of(path: &Path) -> Load {
    Load {
        path: path.to_owned(),
        role: Role::Vocabulary,
        kv_cells: 0,
        context_tokens: 0,
        sequences: 1,
        chunk_rows: 0,
        threads: Some(1),
        threads_max: 1,
        exact: false,
        gpu_layers: 0,
        tap: None,
        inject: None,
        keep: Keep::default(),
    }
}
