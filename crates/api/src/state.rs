//! What handlers and middleware share.

use std::{sync::Arc, time::Duration};

use tokio::sync::Semaphore;

use crate::{ApiOptions, Backend, metrics::Metrics, openai::templates::Templates, security::Policy};

/// One for all requests.
pub(crate) struct AppState {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) policy: Policy,
    pub(crate) templates: Templates,
    pub(crate) keep_alive: Duration,
    /// One permit per request that makes the node work.
    pub(crate) in_flight: Arc<Semaphore>,
    pub(crate) max_in_flight: usize,
}

impl AppState {
    pub(crate) fn new(backend: Arc<dyn Backend>, options: &ApiOptions) -> Self {
        let max_in_flight = options.max_in_flight.min(Semaphore::MAX_PERMITS);
        AppState {
            backend,
            metrics: Arc::default(),
            policy: Policy::new(options),
            templates: Templates::default(),
            keep_alive: options.keep_alive,
            in_flight: Arc::new(Semaphore::new(max_in_flight)),
            max_in_flight,
        }
    }
}
