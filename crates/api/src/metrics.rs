//! Figures for Prometheus: its text exposition format, version 0.0.4.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::Method,
    middleware::Next,
    response::Response,
};

use crate::{backend::Completion, state::AppState};

/// Upper bounds of the histograms' buckets, in seconds: from a cached prompt's first token to a long answer.
const BUCKETS: [f64; 13] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];

#[derive(Debug, Default)]
struct Histogram {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum_seconds: f64,
}

impl Histogram {
    fn observe(&mut self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        self.count += 1;
        self.sum_seconds += seconds;
        for (bucket, bound) in self.buckets.iter_mut().zip(BUCKETS) {
            *bucket += u64::from(seconds <= bound);
        }
    }

    fn render(&self, name: &str, labels: &str, out: &mut String) {
        let comma = if labels.is_empty() { "" } else { "," };
        for (count, bound) in self.buckets.iter().zip(BUCKETS) {
            let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {}", self.count);
        let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        let _ = writeln!(out, "{name}_sum{braces} {}", self.sum_seconds);
        let _ = writeln!(out, "{name}_count{braces} {}", self.count);
    }
}

/// What the HTTP layer counts. Labels come from fixed sets only (routes, not paths), so that no client can grow them.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    requests: Mutex<BTreeMap<(String, &'static str, u16), u64>>,
    durations: Mutex<BTreeMap<String, Histogram>>,
    time_to_first_token: Mutex<Histogram>,
    generations: Mutex<BTreeMap<&'static str, u64>>,
    requests_in_flight: AtomicI64,
    connections: AtomicI64,
    accept_errors: AtomicU64,
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    completion_tokens: AtomicU64,
    decode_milliseconds: AtomicU64,
}

/// A poisoned lock guards figures only, so it is used as it is.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Metrics {
    pub(crate) fn accept_error(&self) {
        self.accept_errors.fetch_add(1, Relaxed);
    }

    pub(crate) fn connection(self: &Arc<Self>) -> impl Drop + Send + 'static {
        Gauge::up(self.clone(), |metrics| &metrics.connections)
    }

    /// A prompt's work is counted when its first token is there, as it has been done then, whatever comes later.
    pub(crate) fn prefilled(&self, prompt_tokens: u32, cached_tokens: u32, waited: Duration) {
        self.prompt_tokens.fetch_add(prompt_tokens.into(), Relaxed);
        self.cached_tokens.fetch_add(cached_tokens.into(), Relaxed);
        lock(&self.time_to_first_token).observe(waited);
    }

    pub(crate) fn generated(&self, tokens: u64) {
        self.completion_tokens.fetch_add(tokens, Relaxed);
    }

    pub(crate) fn completed(&self, completion: &Completion, outcome: &'static str) {
        self.decode_milliseconds.fetch_add(completion.decode.as_millis() as u64, Relaxed);
        self.ended(outcome);
    }

    /// `outcome`: `stop`, `length`, `failed` or `cancelled`.
    pub(crate) fn ended(&self, outcome: &'static str) {
        *lock(&self.generations).entry(outcome).or_default() += 1;
    }

    pub(crate) fn render(&self) -> String {
        let mut out = String::new();
        let head = |name: &str, kind: &str, help: &str, out: &mut String| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        };
        head("murmur_http_requests_total", "counter", "Requests answered.", &mut out);
        for ((route, method, status), count) in lock(&self.requests).iter() {
            let _ = writeln!(
                out,
                "murmur_http_requests_total{{route=\"{route}\",method=\"{method}\",status=\"{status}\"}} {count}"
            );
        }
        let name = "murmur_http_request_duration_seconds";
        head(name, "histogram", "Time from a request's headers to the end of its answer.", &mut out);
        for (route, histogram) in lock(&self.durations).iter() {
            histogram.render(name, &format!("route=\"{route}\""), &mut out);
        }
        let name = "murmur_time_to_first_token_seconds";
        head(name, "histogram", "Time from a generation's acceptance to its first token.", &mut out);
        lock(&self.time_to_first_token).render(name, "", &mut out);
        head("murmur_generations_total", "counter", "Generations ended, by how.", &mut out);
        for (outcome, count) in lock(&self.generations).iter() {
            let _ = writeln!(out, "murmur_generations_total{{outcome=\"{outcome}\"}} {count}");
        }
        let decode_seconds = self.decode_milliseconds.load(Relaxed) as f64 / 1000.0;
        for (name, kind, help, value) in [
            (
                "murmur_http_requests_in_flight",
                "gauge",
                "Requests being answered.",
                self.requests_in_flight.load(Relaxed) as f64,
            ),
            ("murmur_http_connections", "gauge", "Open connections.", self.connections.load(Relaxed) as f64),
            (
                "murmur_http_accept_errors_total",
                "counter",
                "Failures to accept a connection.",
                self.accept_errors.load(Relaxed) as f64,
            ),
            (
                "murmur_prompt_tokens_total",
                "counter",
                "Prompt tokens, cached ones included.",
                self.prompt_tokens.load(Relaxed) as f64,
            ),
            (
                "murmur_prompt_tokens_cached_total",
                "counter",
                "Prompt tokens found in the prefix cache.",
                self.cached_tokens.load(Relaxed) as f64,
            ),
            (
                "murmur_completion_tokens_total",
                "counter",
                "Tokens generated.",
                self.completion_tokens.load(Relaxed) as f64,
            ),
            (
                "murmur_decode_seconds_total",
                "counter",
                "Time from first to last token, over finished generations.",
                decode_seconds,
            ),
        ] {
            head(name, kind, help, &mut out);
            let _ = writeln!(out, "{name} {value}");
        }
        out
    }
}

/// Counts up now and down when dropped.
struct Gauge {
    metrics: Arc<Metrics>,
    which: fn(&Metrics) -> &AtomicI64,
}

impl Gauge {
    fn up(metrics: Arc<Metrics>, which: fn(&Metrics) -> &AtomicI64) -> Self {
        which(&metrics).fetch_add(1, Relaxed);
        Gauge { metrics, which }
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        (self.which)(&self.metrics).fetch_sub(1, Relaxed);
    }
}

/// Counts a request when its answer has been sent, or given up.
struct Observation {
    in_flight: Gauge,
    route: String,
    method: &'static str,
    /// 499, as nginx says, for a client that left before there was an answer.
    status: u16,
    started: Instant,
}

impl Drop for Observation {
    fn drop(&mut self) {
        let metrics = &self.in_flight.metrics;
        let elapsed = self.started.elapsed();
        let route = std::mem::take(&mut self.route);
        tracing::debug!(route, method = self.method, status = self.status, ?elapsed, "answered");
        *lock(&metrics.requests).entry((route.clone(), self.method, self.status)).or_default() += 1;
        lock(&metrics.durations).entry(route).or_default().observe(elapsed);
    }
}

/// Middleware: counts and times every request, to the end of its answer's body.
pub(crate) async fn observe(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let method = match *request.method() {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    };
    const CLIENT_LEFT: u16 = 499;
    let in_flight = Gauge::up(state.metrics.clone(), |metrics| &metrics.requests_in_flight);
    let mut observation = Observation { in_flight, route, method, status: CLIENT_LEFT, started: Instant::now() };
    let response = next.run(request).await;
    observation.status = response.status().as_u16();
    crate::body::hold(response, observation)
}
