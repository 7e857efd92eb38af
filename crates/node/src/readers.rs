//! What reads and writes the tokens of models that are not loaded here: vocabularies, each with a child process that
//! tokenises. Started when they are wanted; of too many the one that was used longest ago is let go.

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use murmur_engine::{Patience, Tokenizer};
use murmur_gguf::Gguf;
use tokio::sync::OnceCell;

/// Vocabularies that are kept, each by a process of its own. Those that requests hold beyond that end with them.
const READERS_MAX: usize = 16;

/// A model's vocabulary and chat template.
pub(crate) struct Reader {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) chat_template: Option<String>,
    pub(crate) architecture: String,
}

/// Why a vocabulary is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReaderError {
    #[error(transparent)]
    Gguf(#[from] murmur_gguf::GgufError),
    #[error(transparent)]
    Engine(#[from] murmur_engine::EngineError),
    #[error("reading it was interrupted")]
    Interrupted,
}

/// Those in use lately.
pub(crate) struct Readers {
    program: PathBuf,
    /// The one used last is at the end.
    slots: Mutex<Vec<Slot>>,
}

struct Slot {
    path: PathBuf,
    /// Filled by the first that wants it, while others wait.
    reader: Arc<OnceCell<Arc<Reader>>>,
}

impl Readers {
    /// None yet. `program`: the binary that has the engine's child process as a hidden subcommand.
    pub(crate) fn new(program: PathBuf) -> Readers {
        Readers { program, slots: Mutex::default() }
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vocabulary in a file: a model's card, or a whole model. `fetch` sees to it that the file is there.
    pub(crate) async fn get<E: From<ReaderError>>(
        &self,
        path: &Path,
        fetch: impl Future<Output = Result<(), E>>,
    ) -> Result<Arc<Reader>, E> {
        let cell = self.cell(path);
        let read = async {
            fetch.await?;
            let (program, path) = (self.program.clone(), path.to_owned());
            let read = tokio::task::spawn_blocking(move || Reader::read(program, &path));
            Ok(Arc::new(read.await.map_err(|_| ReaderError::Interrupted)??))
        };
        cell.get_or_try_init(|| read).await.cloned()
    }

    /// The same, if it is there.
    pub(crate) fn known(&self, path: &Path) -> Option<Arc<Reader>> {
        self.slots().iter().find(|slot| slot.path == path)?.reader.get().cloned()
    }

    /// The place of a vocabulary, which is now the one used last.
    fn cell(&self, path: &Path) -> Arc<OnceCell<Arc<Reader>>> {
        let mut slots = self.slots();
        let known = slots.iter().position(|slot| slot.path == path).map(|at| slots.remove(at));
        let slot = known.unwrap_or_else(|| Slot { path: path.to_owned(), reader: Arc::default() });
        let cell = Arc::clone(&slot.reader);
        slots.push(slot);
        let let_go = (slots.len() > READERS_MAX).then(|| slots.remove(0));
        drop(slots);
        // Ending a process takes a moment.
        drop(let_go);
        cell
    }
}

impl Reader {
    fn read(program: PathBuf, path: &Path) -> Result<Reader, ReaderError> {
        let gguf = Gguf::open(path)?;
        let tokenizer = Tokenizer::start(program, path, Patience::default().silence_floor)?;
        Ok(Reader {
            tokenizer: Arc::new(tokenizer),
            chat_template: gguf.str("tokenizer.chat_template").map(str::to_owned),
            architecture: gguf.architecture().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_too_many_the_one_used_longest_ago_is_let_go() {
        let readers = Readers::new(PathBuf::new());
        let path = |n: usize| PathBuf::from(n.to_string());
        let cells: Vec<_> = (0..READERS_MAX).map(|n| readers.cell(&path(n))).collect();
        assert!(Arc::ptr_eq(&cells[0], &readers.cell(&path(0))), "it was forgotten although there is room");
        readers.cell(&path(READERS_MAX));
        assert!(Arc::ptr_eq(&cells[0], &readers.cell(&path(0))), "it was used just before");
        assert!(!Arc::ptr_eq(&cells[1], &readers.cell(&path(1))), "it was used longest ago, and kept");
        assert_eq!(readers.slots().len(), READERS_MAX);
    }
}
