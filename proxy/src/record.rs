//! What is remembered of one request from its arrival to its end, and where that goes: metrics and
//! the access log. A record that is dropped unfinished says that the client left.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use hyper::Method;
use serde::Serialize;

use crate::app::App;
use crate::clock;
use crate::endpoint::Route;
use crate::instance::Instance as Server;
use crate::metrics::Outcome;

/// The status that is logged when a client left before there was one, as nginx does.
const STATUS_CLIENT_GONE: u16 = 499;

/// One request's story.
pub struct Record {
    app: Arc<App>,
    route: Route,
    arrived: Instant,
    first_byte: Option<Instant>,
    prefilled: Option<Instant>,
    decode_sent: Option<Instant>,
    server: Option<Arc<Server>>,
    outcome: Option<Outcome>,
    line: Line,
    /// Prompt tokens that prefill counted.
    pub prefill_prompt_tokens: Option<u64>,
}

#[derive(Default, Serialize)]
struct Line {
    time: String,
    client: String,
    method: String,
    path: String,
    request_id: String,
    status: u16,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    prefill: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    server: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    no_prefill: &'static str,
    legs: u32,
    handoff: bool,
    retries: u32,
    bytes_in: u64,
    bytes_out: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_tokens: Option<u64>,
    events: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_byte_ms: Option<f64>,
    duration_ms: f64,
}

impl Record {
    /// Starts at a request's arrival.
    pub fn new(app: Arc<App>, route: Route, method: &Method, path: &str, peer: SocketAddr) -> Self {
        app.metrics.in_flight.fetch_add(1, Relaxed);
        let mut line = Line::default();
        if app.access_log.is_on() {
            line.time = clock::rfc3339_now();
            line.client = peer.to_string();
            line.method = method.to_string();
            line.path = path.to_owned();
        }
        Self {
            app,
            route,
            arrived: Instant::now(),
            first_byte: None,
            prefilled: None,
            decode_sent: None,
            server: None,
            outcome: None,
            line,
            prefill_prompt_tokens: None,
        }
    }

    /// When the request arrived.
    pub fn arrived(&self) -> Instant {
        self.arrived
    }

    /// The request's id, and the size of its body.
    pub fn request(&mut self, id: &str, bytes: usize) {
        self.line.request_id = id.to_owned();
        self.line.bytes_in = bytes as u64;
    }

    /// Why there is no prefill leg.
    pub fn no_prefill(&mut self, reason: &'static str) {
        self.line.no_prefill = reason;
    }

    /// A leg was answered by, or sent in vain to, this server.
    pub fn leg(&mut self, server: &str) {
        self.line.legs += 1;
        self.line.prefill.push(server.to_owned());
    }

    /// All legs are over after this time; `handoff` when decode is told what to wait for.
    pub fn prefilled(&mut self, took: Duration, handoff: bool) {
        self.prefilled = Some(Instant::now());
        self.line.prefill_ms = Some(millis(took));
        self.line.handoff = handoff;
    }

    /// The request goes to this server, again if `retry`.
    pub fn sent_to(&mut self, server: &Arc<Server>, retry: bool) {
        self.decode_sent = Some(Instant::now());
        self.server = Some(server.clone());
        self.line.retries += u32::from(retry);
    }

    /// The status that the client gets.
    pub fn status(&mut self, status: u16) {
        self.line.status = status;
    }

    /// The answer's first byte is there.
    pub fn first_byte(&mut self) {
        let now = Instant::now();
        self.first_byte = Some(now);
        self.line.first_byte_ms = Some(millis(now - self.arrived));
        if !matches!(self.route, Route::Generate(_)) {
            return; // a list of models is no token
        }
        self.app.metrics.ttft.observe(now - self.arrived);
        let counters = self.server.as_ref().map(|server| &server.counters);
        if let Some(counters) = counters {
            counters.ttft.observe(now - self.arrived);
        }
        if let Some(prefilled) = self.prefilled {
            self.app.metrics.handoff_wait.observe(now - prefilled);
            if let Some(counters) = counters {
                counters.handoff_wait.observe(now - prefilled);
            }
        }
    }

    /// Bytes of the answer that went out.
    pub fn bytes_out(&mut self, bytes: usize) {
        self.line.bytes_out += bytes as u64;
    }

    /// What the answer's text told: events so far and the prompt tokens that decode counted.
    pub fn answer(&mut self, events: u64, prompt_tokens: Option<u64>) {
        self.line.events = events;
        self.line.prompt_tokens = prompt_tokens;
        if let (Some(prefill), Some(decode)) = (self.prefill_prompt_tokens.take(), prompt_tokens)
            && prefill != decode
        {
            self.app.metrics.prompt_mismatches.fetch_add(1, Relaxed);
        }
    }

    /// The request is over.
    pub fn finish(&mut self, outcome: Outcome) {
        self.outcome.get_or_insert(outcome);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let outcome = self.outcome.unwrap_or(Outcome::ClientGone);
        if self.line.status == 0 {
            self.line.status = STATUS_CLIENT_GONE;
        }
        let now = Instant::now();
        let metrics = &self.app.metrics;
        metrics.in_flight.fetch_sub(1, Relaxed);
        metrics.count_request(self.route.label(), self.line.status, outcome);
        metrics.duration.observe(now - self.arrived);
        if let (Some(sent), Outcome::Finished, Route::Generate(_)) =
            (self.decode_sent, outcome, self.route)
        {
            metrics.decode.observe(now - sent);
        }
        if let (Some(first), 2..) = (self.first_byte, self.line.events) {
            let between = (now - first).div_f64((self.line.events - 1) as f64);
            metrics.tpot.observe(between);
            if let Some(server) = &self.server {
                server.counters.tpot.observe(between);
            }
        }
        if self.app.access_log.is_on() {
            self.line.outcome = outcome.label();
            if let Some(server) = &self.server {
                server.name.clone_into(&mut self.line.server);
            }
            self.line.duration_ms = millis(now - self.arrived);
            let line = serde_json::to_string(&self.line).unwrap_or_default();
            if !self.app.access_log.line(line) {
                metrics.log_lines_dropped.fetch_add(1, Relaxed);
            }
        }
    }
}

/// Milliseconds with microseconds behind the point.
fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}
