//! Room for what is fetched, where the store has a quota: before more comes than may stay, what was not used for longest goes.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use murmur_core::swarm::GroupSet;
use murmur_protocol::mesh::ModelDigest;
use murmur_store::{Store, StoreError};

use super::{Shelf, length};

/// What those who fetch count on. Several may fetch at once, and none counts on the room of another.
#[derive(Default)]
pub(crate) struct Room {
    promised: Mutex<BTreeMap<u64, Part>>,
    next: AtomicU64,
    /// Held by whoever makes room.
    making: Mutex<()>,
}

/// A part of a file.
struct Part {
    shelf: Arc<Shelf>,
    groups: GroupSet,
}

/// Room for a part of a file, until it has come, or is not wanted any more.
pub(crate) struct Promise {
    room: Arc<Room>,
    number: u64,
}

impl Room {
    /// Makes room for what is missing of these groups, besides what was promised to others. Blocks.
    pub(super) fn make(
        self: &Arc<Self>,
        store: &Store,
        shelf: &Arc<Shelf>,
        groups: GroupSet,
    ) -> Result<Promise, StoreError> {
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.promised().insert(number, Part { shelf: Arc::clone(shelf), groups });
        let promise = Promise { room: Arc::clone(self), number };
        for gone in store.make_room(self.needed_bytes())?.removed {
            let name = gone.names.first().map_or_else(|| gone.nameless(), ToString::to_string);
            tracing::info!(freed_bytes = gone.bytes, "{name} was removed to make room for {}", shelf.name);
        }
        Ok(promise)
    }

    /// What is still to come of all that was promised.
    fn needed_bytes(&self) -> u64 {
        let mut files: BTreeMap<ModelDigest, (Arc<Shelf>, GroupSet)> = BTreeMap::new();
        for Part { shelf, groups } in self.promised().values() {
            let (_, all) = files.entry(shelf.digest()).or_insert_with(|| (Arc::clone(shelf), GroupSet::default()));
            *all = all.union(groups);
        }
        let missing = |(shelf, groups): &(Arc<Shelf>, GroupSet)| {
            length(&shelf.content.missing(&groups.byte_ranges(shelf.content.bytes())))
        };
        files.values().map(missing).sum()
    }

    fn promised(&self) -> MutexGuard<'_, BTreeMap<u64, Part>> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.room.promised().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contents::Library;

    #[test]
    fn who_fetches_does_not_count_on_room_that_another_was_promised() {
        const BYTES: u64 = 640 << 10;
        let folder = tempfile::tempdir().unwrap();
        let (library, store, room) = (Library::new(folder.path()), Store::at(folder.path()), Arc::<Room>::default());
        store.set_quota(Some(BYTES + BYTES / 2)).unwrap();
        let begin = |number: u8| library.begin("m", ModelDigest::from_bytes([number; 32]), BYTES).unwrap();
        let make = |shelf: &Arc<Shelf>| room.make(&store, shelf, GroupSet::all(BYTES));
        let (first, second) = (begin(1), begin(2));
        let promise = make(&first).unwrap();
        // The same once more takes nothing more.
        drop(make(&first).unwrap());
        assert!(matches!(make(&second), Err(StoreError::OverQuota { .. })));
        drop(promise);
        make(&second).unwrap();
    }
}
