//! Who has how many streams here, and how many of them are requests.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use murmur_protocol::mesh::NodeId;

/// Places, so many for each node.
pub(crate) struct Places {
    per_node_max: usize,
    counts: Mutex<HashMap<NodeId, Count>>,
}

/// What one node has.
#[derive(Default)]
struct Count {
    streams: usize,
    requests: usize,
}

/// One of them. Dropped, it is free.
pub(crate) struct Place {
    places: Arc<Places>,
    pub(super) node: NodeId,
    is_request: bool,
}

impl Places {
    pub(crate) fn new(per_node_max: usize) -> Places {
        Places { per_node_max, counts: Mutex::default() }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<NodeId, Count>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One for a node; `None`: it has all that it may have.
    pub(crate) fn take(self: &Arc<Self>, node: NodeId) -> Option<Place> {
        let mut counts = self.counts();
        let count = counts.entry(node).or_default();
        if count.streams >= self.per_node_max {
            return None;
        }
        count.streams += 1;
        Some(Place { places: Arc::clone(self), node, is_request: false })
    }
}

impl Place {
    /// From now on it is one of those that share an engine. Who watches a file or fetches a card takes nothing of it.
    pub(super) fn count_as_request(&mut self) {
        if !std::mem::replace(&mut self.is_request, true)
            && let Some(count) = self.places.counts().get_mut(&self.node)
        {
            count.requests += 1;
        }
    }

    /// Whether its node has its share of `parallel` requests and more, with this one.
    pub(super) fn is_beyond_share(&self, parallel: usize) -> bool {
        let counts = self.places.counts();
        let requesters = counts.values().filter(|count| count.requests > 0).count();
        let share = parallel.div_ceil(requesters.max(1));
        counts.get(&self.node).is_some_and(|count| count.requests > share)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.places.counts();
        if let Some(count) = counts.get_mut(&self.node) {
            count.streams -= 1;
            count.requests -= usize::from(self.is_request);
            if count.streams == 0 {
                counts.remove(&self.node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_one_of_requests_and_who_only_watches_has_none() {
        let places = Arc::new(Places::new(8));
        let node = |number: u8| NodeId::from_bytes([number; 32]);
        let request = |number: u8| {
            let mut place = places.take(node(number)).unwrap();
            place.count_as_request();
            place.count_as_request();
            place
        };
        let _watchers: Vec<Place> =
            (1..4).flat_map(|number| [places.take(node(number)), places.take(node(number))]).flatten().collect();
        // Three that watch files take nothing of the four places for requests from the one that asks.
        let mut all: Vec<Place> = (0..4).map(|_| request(9)).collect();
        assert!(all.iter().all(|place| !place.is_beyond_share(4)));
        all.push(request(9));
        assert!(all[4].is_beyond_share(4));
        // Who watches and asks once is within its share, which is now half of them.
        let first = request(1);
        assert!(!first.is_beyond_share(4) && all[0].is_beyond_share(4));
        all.truncate(2);
        assert!(!all[0].is_beyond_share(4));
        drop((all, first));
        assert_eq!(places.counts().values().map(|count| (count.streams, count.requests)).max(), Some((2, 0)));
    }

    #[test]
    fn a_node_has_no_more_places_than_there_are_for_each() {
        let places = Arc::new(Places::new(2));
        let node = NodeId::from_bytes([1; 32]);
        let taken = [places.take(node), places.take(node)];
        assert!(taken.iter().all(Option::is_some) && places.take(node).is_none());
        assert!(places.take(NodeId::from_bytes([2; 32])).is_some());
        drop(taken);
        assert!(places.take(node).is_some());
    }
}
