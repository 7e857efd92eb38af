//! A pooling model (BERT and its like): a whole sequence in, one vector out.

use std::{sync::Arc, time::Instant};

use murmur_protocol::{
    frame::{Frame, Header, Kind},
    stage::{Load, Loaded},
};

use crate::{
    ffi::{Batch, Context, ContextOptions, Model, ModelOptions},
    stage::StageError,
    vocabulary::tokenize,
};

/// A loaded pooling model.
pub(crate) struct EmbeddingModel {
    context: Context,
    context_tokens: u32,
    load_ms: u64,
}

impl EmbeddingModel {
    /// Loads the model at `load.path`.
    pub(crate) fn load(load: &Load, progress: &mut dyn FnMut(f32) -> bool) -> Result<EmbeddingModel, StageError> {
        let started = Instant::now();
        let options = ModelOptions { vocabulary_only: false, repack: !load.exact, gpu_layers: load.gpu_layers };
        let model = Arc::new(Model::load(&load.path, &options, progress)?);
        let mut context = Context::new(
            model,
            &ContextOptions {
                kv_cells: load.context_tokens,
                sequences: 1,
                batch_rows: load.context_tokens,
                exact: false,
                embeddings: true,
                threads_max: load.threads_max,
                tap: None,
                inject: None,
            },
        )?;
        context.set_threads(load.threads.unwrap_or(load.threads_max));
        Ok(EmbeddingModel {
            context,
            context_tokens: load.context_tokens,
            load_ms: started.elapsed().as_millis() as u64,
        })
    }

    /// What was loaded; the vocabulary comes with it.
    pub(crate) fn facts(&self) -> Loaded {
        let model = self.context.model();
        Loaded {
            n_embd: model.n_embd() as u32,
            n_layer: model.n_layer(),
            kv_cells: self.context_tokens,
            load_ms: self.load_ms,
            weight_bytes: model.weight_bytes(),
            vocabulary: Some(model.vocabulary()),
        }
    }

    /// Answers an [`Kind::Embed`] frame with a unit-length vector, a [`Kind::Tokenize`] frame with tokens.
    pub(crate) fn embed(&mut self, frame: &Frame) -> Result<Frame, StageError> {
        if frame.header.kind == Kind::Tokenize {
            return tokenize(self.context.model(), frame);
        }
        if frame.header.kind != Kind::Embed {
            return Err(StageError::Protocol("an embedding model takes texts and tokens only"));
        }
        let tokens = frame.token_rows()?;
        if tokens.is_empty() || tokens.len() > self.context_tokens as usize {
            return Err(StageError::Protocol("an input must have at least one token and fit the context"));
        }
        let n_vocab = self.context.model().n_vocab() as i32;
        if tokens.iter().any(|&t| t < 0 || t >= n_vocab) {
            return Err(StageError::Protocol("a token id outside the vocabulary"));
        }
        let rows = tokens.len();
        self.context.truncate(0, 0);
        let mut batch = Batch {
            tokens,
            hidden: Vec::new(),
            positions: (0..rows as i32).collect(),
            sequences: vec![0; rows],
            wants_output: vec![true; rows],
            is_exact: false,
        };
        self.context.decode(&mut batch)?;
        let mut vector = self.context.pooled(0).ok_or(StageError::Protocol("this model does not pool embeddings"))?;
        let norm = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
        if norm > 0.0 {
            vector.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
        }
        let payload = bytemuck::cast_slice(&vector).to_vec();
        Ok(Frame { header: Header { kind: Kind::Embedded, ..frame.header }, payload })
    }
}
