//! The models a node has on disk, and how they get there.
//!
//! A [`Store`] is an index in `<data-dir>/models/index.json`: names, and where each name's GGUF file lies. Weights are
//! large and people already have them, so a model is imported *by reference* unless a copy is asked for, and a model
//! that is pulled from a hub lies in the hub's own cache (`HF_HOME`), where every other tool finds it too.
//!
//! What comes from peers is a [content]: verified in groups of 16 KiB, kept in parts, served on. So is what comes from a hub in several
//! files and was joined into one.
//!
//! Start reading at [`Store`], then [`mod@reference`] (what a user may write as `MODEL`), [`hub`] (the transfer) and [`content`].
//!
//! ```text
//! <data-dir>/models/index.json    the index, replaced atomically, guarded by index.lock
//! <data-dir>/models/files/        copies made by `import --copy`, and what was joined by `import`
//! <data-dir>/models/contents/     bytes from peers, whole or in parts, and joined files, by digest
//! <data-dir>/slices/              layer ranges cut out for stages; anything in it can be made again
//! ```

pub mod content;
mod error;
mod files;
pub mod hub;
mod index;
mod inspect;
mod parts;
mod quota;
pub mod reference;
mod store;
mod upkeep;

pub use content::{CONTENT_BYTES_MAX, Content, ContentEntry, Contents, DecodeError, GROUP_BYTES};
pub use error::{ErrorKind, StoreError};
pub use files::available_bytes;
pub use index::{ModelEntry, Origin};
pub use inspect::licence_of;
pub use quota::{Collected, Download, Hold, Stays};
pub use reference::{HubRef, ModelName, ModelRef};
pub use store::{ImportOptions, Removed, Resolved, Store};
pub use upkeep::{Checked, Health};
