//! The proxy's own counters and their text for Prometheus. Owns names and help; what an instance
//! did stands in the instance.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use crate::health::Standing;
use crate::histogram::Histogram;
use crate::instance::Instance;
use crate::legs::Skip;
use crate::pool::Pool;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered to the end.
    Finished,
    /// The client left before.
    ClientGone,
    /// The server broke off after its first byte.
    BrokenOff,
    /// The answer did not end in time.
    Deadline,
}

impl Outcome {
    /// Name in logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::ClientGone => "client_gone",
            Self::BrokenOff => "broken_off",
            Self::Deadline => "deadline",
        }
    }
}

/// Counters of the whole proxy.
#[derive(Default)]
pub struct Metrics {
    requests: Mutex<BTreeMap<(&'static str, u16, &'static str), u64>>,
    /// From the request's arrival to the first byte of its answer.
    pub ttft: Histogram,
    /// Between two events of a stream.
    pub tpot: Histogram,
    /// From sending prefill legs to their last answer.
    pub prefill: Histogram,
    /// From prefill's answer to decode's first byte: queueing, the wait for KV, its load.
    pub handoff_wait: Histogram,
    /// From sending to decode until the answer's end.
    pub decode: Histogram,
    /// Whole requests.
    pub duration: Histogram,
    /// Prefill legs sent.
    pub legs: AtomicU64,
    /// Legs that got no usable answer.
    pub legs_failed: AtomicU64,
    /// Requests that decode computed alone because prefill failed.
    pub decode_alone: AtomicU64,
    /// Requests without legs, by reason, in the order of [`Skip::ALL`].
    pub legs_skipped: [AtomicU64; Skip::ALL.len()],
    /// Prefill answers that carried transfer parameters on to decode.
    pub handoffs: AtomicU64,
    /// Transfer parameters of a prefill answer that were no object or too large.
    pub handoffs_unreadable: AtomicU64,
    /// Requests of which prefill and decode counted different prompts.
    pub prompt_mismatches: AtomicU64,
    /// Clients' own transfer parameters that were taken out.
    pub params_stripped: AtomicU64,
    /// Requests sent to another decode server after one failed before its first byte.
    pub decode_retries: AtomicU64,
    /// Legs sent to another prefill server.
    pub prefill_retries: AtomicU64,
    /// Open client connections.
    pub connections: AtomicU64,
    /// Requests in the proxy.
    pub in_flight: AtomicU64,
    /// Access-log lines that were dropped because the log could not keep up.
    pub log_lines_dropped: AtomicU64,
}

impl Metrics {
    /// Counts a finished request.
    pub fn count_request(&self, route: &'static str, status: u16, outcome: Outcome) {
        let mut requests = self.requests.lock().expect("no panic while held");
        *requests.entry((route, status, outcome.label())).or_default() += 1;
    }

    /// The text of `/metrics`.
    pub fn render(&self, pools: &[&Arc<Pool>], namespaces: &str) -> String {
        let mut out = String::with_capacity(16 * 1024);
        self.write_requests(&mut out);
        self.write_histograms(&mut out);
        self.write_counters(&mut out);
        write_pools(&mut out, pools);
        out.push_str(namespaces);
        out
    }

    fn write_requests(&self, out: &mut String) {
        let name = "ucm_proxy_requests_total";
        heading(out, name, "counter", "Requests by path, status and how they ended.");
        for ((route, status, outcome), count) in &*self.requests.lock().expect("never poisoned") {
            let _ = writeln!(
                out,
                "{name}{{path=\"{route}\",status=\"{status}\",outcome=\"{outcome}\"}} {count}"
            );
        }
    }

    fn write_histograms(&self, out: &mut String) {
        let all = [
            ("time_to_first_token", "Arrival to the first byte of the answer.", &self.ttft),
            ("time_per_output_token", "Between two events of a stream, mean.", &self.tpot),
            ("prefill", "Sending prefill legs to their last answer.", &self.prefill),
            ("handoff_wait", "Prefill's answer to decode's first byte.", &self.handoff_wait),
            ("decode", "Sending to decode until the answer's end.", &self.decode),
            ("request", "Whole requests.", &self.duration),
        ];
        for (name, help, histogram) in all {
            let name = format!("ucm_proxy_{name}_seconds");
            heading(out, &name, "histogram", help);
            histogram.write(out, &name, "");
        }
    }

    fn write_counters(&self, out: &mut String) {
        let counters = [
            ("prefill_legs", "Prefill legs sent.", &self.legs),
            ("prefill_legs_failed", "Legs without a usable answer.", &self.legs_failed),
            ("decode_alone", "Requests decode computed alone: prefill failed.", &self.decode_alone),
            ("handoffs", "Requests whose transfer parameters reached decode.", &self.handoffs),
            (
                "handoffs_unreadable",
                "Transfer parameters of prefill that were no object or too large.",
                &self.handoffs_unreadable,
            ),
            (
                "prompt_token_mismatches",
                "Requests of which prefill and decode counted different prompt tokens.",
                &self.prompt_mismatches,
            ),
            (
                "client_transfer_params_stripped",
                "Requests that brought transfer parameters of their own.",
                &self.params_stripped,
            ),
            ("decode_retries", "Requests sent to another decode server.", &self.decode_retries),
            ("prefill_retries", "Legs sent to another prefill server.", &self.prefill_retries),
            ("access_log_lines_dropped", "The log was too slow.", &self.log_lines_dropped),
        ];
        for (name, help, counter) in counters {
            let name = format!("ucm_proxy_{name}_total");
            heading(out, &name, "counter", help);
            let _ = writeln!(out, "{name} {}", counter.load(Relaxed));
        }
        let name = "ucm_proxy_prefill_skipped_total";
        heading(out, name, "counter", "Requests that get no prefill leg, by reason.");
        for (skip, count) in Skip::ALL.iter().zip(&self.legs_skipped) {
            let _ = writeln!(out, "{name}{{reason=\"{}\"}} {}", skip.label(), count.load(Relaxed));
        }
        let gauges = [
            ("connections", "Open client connections.", &self.connections),
            ("in_flight", "Requests in the proxy.", &self.in_flight),
        ];
        for (name, help, gauge) in gauges {
            let name = format!("ucm_proxy_{name}");
            heading(out, &name, "gauge", help);
            let _ = writeln!(out, "{name} {}", gauge.load(Relaxed));
        }
    }
}

fn heading(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

type Sample = fn(&Instance) -> String;

const INSTANCE_SAMPLES: [(&str, &str, &str, Sample); 6] = [
    ("instance_requests_total", "counter", "Requests and legs sent.", |instance| {
        instance.counters.requests.load(Relaxed).to_string()
    }),
    ("instance_failures_total", "counter", "Of these: failed.", |instance| {
        instance.counters.failures.load(Relaxed).to_string()
    }),
    ("instance_ejections_total", "counter", "Times it was ejected.", |instance| {
        instance.counters.ejections.load(Relaxed).to_string()
    }),
    ("instance_outstanding", "gauge", "Requests in flight.", |instance| {
        instance.outstanding().to_string()
    }),
    ("instance_draining", "gauge", "1 while it gets no new requests on purpose.", |instance| {
        u8::from(instance.is_draining()).to_string()
    }),
    ("instance_weight", "gauge", "Share it may get: 0 out, 1 whole.", |instance| {
        match instance.standing() {
            Standing::Usable(weight) => weight.to_string(),
            Standing::Ejected | Standing::Down => "0".to_owned(),
        }
    }),
];

type PickHistogram = fn(&Instance) -> &Histogram;

const INSTANCE_HISTOGRAMS: [(&str, &str, PickHistogram); 4] = [
    ("seconds", "Sending to one server until the end of its answer: prefill, decode.", |i| {
        &i.counters.seconds
    }),
    ("time_to_first_token_seconds", "Arrival to the first byte of its answer.", |i| {
        &i.counters.ttft
    }),
    ("time_per_output_token_seconds", "Between two events of its streams, mean.", |i| {
        &i.counters.tpot
    }),
    ("handoff_wait_seconds", "Prefill's answer to its first byte.", |i| &i.counters.handoff_wait),
];

fn write_pools(out: &mut String, pools: &[&Arc<Pool>]) {
    let members: Vec<_> = pools.iter().flat_map(|pool| pool.members()).collect();
    let labels =
        |instance: &Instance| format!("role=\"{}\",instance=\"{}\"", instance.role, instance.name);
    for (name, kind, help, sample) in INSTANCE_SAMPLES {
        let name = format!("ucm_proxy_{name}");
        heading(out, &name, kind, help);
        for instance in &members {
            let _ = writeln!(out, "{name}{{{}}} {}", labels(instance), sample(instance));
        }
    }
    for (name, help, histogram) in INSTANCE_HISTOGRAMS {
        let name = format!("ucm_proxy_instance_{name}");
        heading(out, &name, "histogram", help);
        for instance in &members {
            if histogram(instance).has_any() {
                histogram(instance).write(out, &name, &labels(instance));
            }
        }
    }
    heading(out, "ucm_proxy_queue_waiting", "gauge", "Requests that wait for a server.");
    for pool in pools {
        let _ =
            writeln!(out, "ucm_proxy_queue_waiting{{role=\"{}\"}} {}", pool.role, pool.waiting());
    }
    let name = "ucm_proxy_queue_refused_total";
    heading(out, name, "counter", "Requests answered 503: queue full or too slow.");
    for pool in pools {
        let count = pool.overflows.load(Relaxed);
        let _ = writeln!(out, "{name}{{role=\"{}\"}} {count}", pool.role);
    }
}
