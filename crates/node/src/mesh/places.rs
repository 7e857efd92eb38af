//! Who has how many streams here.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use murmur_protocol::mesh::NodeId;

/// Places, so many for each node.
pub(crate) struct Places {
    per_node_max: usize,
    counts: Mutex<HashMap<NodeId, usize>>,
}

/// One of them. Dropped, it is free.
pub(crate) struct Place {
    pub(super) places: Arc<Places>,
    pub(super) node: NodeId,
}

impl Places {
    pub(crate) fn new(per_node_max: usize) -> Places {
        Places { per_node_max, counts: Mutex::default() }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<NodeId, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One for a node; `None`: it has all that it may have.
    pub(crate) fn take(self: &Arc<Self>, node: NodeId) -> Option<Place> {
        let mut counts = self.counts();
        let count = counts.entry(node).or_default();
        if *count >= self.per_node_max {
            return None;
        }
        *count += 1;
        Some(Place { places: Arc::clone(self), node })
    }

    /// Whether a node has its share of `parallel` requests and more, with this one.
    pub(super) fn is_beyond_share(&self, node: NodeId, parallel: usize) -> bool {
        let counts = self.counts();
        let share = parallel.div_ceil(counts.len().max(1));
        counts.get(&node).is_some_and(|&count| count > share)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.places.counts();
        if let Some(count) = counts.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.node);
            }
        }
    }
}
