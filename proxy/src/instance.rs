//! One server behind the proxy: its address, load, health, idle connections and counters. Does
//! not know its pool's policy.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::Deserialize;
use tokio_rustls::TlsConnector;

use crate::health::{Change, Health, Rules, Standing};
use crate::histogram::Histogram;
use crate::log;
use crate::namespace::Namespace;
use crate::settings::Settings;
use crate::upstream::IdleConnections;

/// What a server is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Computes prompts.
    Prefill,
    /// Generates.
    Decode,
    /// Does both, in mixed mode.
    Worker,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Worker => "worker",
        })
    }
}

/// How a server is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Plain.
    Http,
    /// Through TLS.
    Https,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// `https://` before the host asks for TLS.
    pub scheme: Scheme,
    /// Name or address, an IPv6 address without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl Address {
    /// From `host` in any spelling and a port. A scheme other than http and https is an error.
    pub fn new(host: &str, port: u16) -> Result<Self, String> {
        let (scheme, bare) = match host.strip_prefix("https://") {
            Some(bare) => (Scheme::Https, bare),
            None => (Scheme::Http, host.strip_prefix("http://").unwrap_or(host)),
        };
        let bare = bare.trim_end_matches('/');
        let bare = bare.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(bare);
        let is_ipv6 = bare.parse::<std::net::Ipv6Addr>().is_ok() || bare.contains('%');
        if bare.is_empty() || bare.contains(['/', ' ', ',']) || (bare.contains(':') && !is_ipv6) {
            return Err(format!(
                "`{host}` is not a host name: give a name or an address without port and path, \
                 with https:// before it if the server speaks TLS; its port is an option of its own"
            ));
        }
        if port == 0 {
            return Err(format!("port 0 of `{host}`: a server's port is 1 to 65535"));
        }
        Ok(Self { scheme, host: bare.to_owned(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let brackets = if self.host.contains(':') { ["[", "]"] } else { ["", ""] };
        write!(f, "{}{}{}:{}", brackets[0], self.host, brackets[1], self.port)
    }
}

/// What one server did, for `/metrics`.
#[derive(Default)]
pub struct Counters {
    /// Requests and legs sent.
    pub requests: AtomicU64,
    /// Of these: no answer, or one that says the server is not well.
    pub failures: AtomicU64,
    /// Times it was ejected.
    pub ejections: AtomicU64,
    /// From sending to the whole answer (prefill) or the end of the stream.
    pub seconds: Histogram,
    /// From a request's arrival to the first byte of this server's answer.
    pub ttft: Histogram,
    /// Between two events of its streams.
    pub tpot: Histogram,
    /// From prefill's answer to this server's first byte.
    pub handoff_wait: Histogram,
}

/// A server behind the proxy.
pub struct Instance {
    /// Unique in this process, never reused.
    pub id: u64,
    /// What it is for.
    pub role: Role,
    /// Where it is.
    pub address: Address,
    /// `host:port`, as in logs and in the `Host` header.
    pub name: String,
    /// How TLS is spoken to it, if it is.
    pub tls: Option<TlsConnector>,
    /// Connections waiting for their next request.
    pub idle: IdleConnections,
    /// Counters.
    pub counters: Counters,
    /// What its KV can be shared with, once known.
    pub namespace: Mutex<Namespace>,
    requests: AtomicU64,
    work: AtomicU64,
    draining: AtomicBool,
    removed: AtomicBool,
    rules: Rules,
    health: Mutex<Health>,
}

impl Instance {
    /// A server that is taken for healthy until it shows otherwise. An error is one of the
    /// certificates that a server behind TLS is checked against.
    pub fn new(role: Role, address: Address, settings: &Settings) -> Result<Arc<Self>, String> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let tls = match address.scheme {
            Scheme::Http => None,
            Scheme::Https => Some(settings.trust.connector()?),
        };
        Ok(Arc::new(Self {
            id: NEXT_ID.fetch_add(1, Relaxed),
            role,
            name: address.to_string(),
            address,
            tls,
            idle: IdleConnections::default(),
            counters: Counters::default(),
            namespace: Mutex::default(),
            requests: AtomicU64::new(0),
            work: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            removed: AtomicBool::new(false),
            rules: settings.health,
            health: Mutex::default(),
        }))
    }

    /// Requests in flight.
    pub fn outstanding(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// Work in flight, in the unit of its pool.
    pub fn outstanding_work(&self) -> u64 {
        self.work.load(Relaxed)
    }

    /// Adds a request; its pool calls this under its lock.
    pub fn take(&self, work: u64) {
        self.requests.fetch_add(1, Relaxed);
        self.work.fetch_add(work, Relaxed);
    }

    /// Takes a request away again.
    pub fn give_back(&self, work: u64) {
        self.requests.fetch_sub(1, Relaxed);
        self.work.fetch_sub(work, Relaxed);
    }

    /// Whether new requests are kept away on purpose.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Starts or ends draining.
    pub fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Relaxed);
    }

    /// Whether it left its pool; background tasks end then.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Relaxed)
    }

    /// Marks it as gone; requests in flight finish.
    pub fn set_removed(&self) {
        self.removed.store(true, Relaxed);
    }

    /// Whether it may be chosen, by its health alone.
    pub fn standing(&self) -> Standing {
        self.locked_health().standing(&self.rules, Instant::now())
    }

    /// A request got an answer.
    pub fn request_passed(&self) {
        self.locked_health().request_passed(&self.rules, Instant::now());
    }

    /// A request found the server dead, hanging or refusing.
    pub fn request_failed(&self, why: &str) {
        self.counters.failures.fetch_add(1, Relaxed);
        let change = self.locked_health().request_failed(&self.rules, Instant::now());
        if let Some(Change::Ejected(length, failed)) = change {
            self.counters.ejections.fetch_add(1, Relaxed);
            let (role, name, seconds) = (self.role, &self.name, length.as_secs_f64());
            log::warn(format!(
                "{role} server {name} failed {failed} time(s) in a row, last: {why}; no requests \
                 to it for {seconds} s, then a growing share"
            ));
        }
    }

    /// A probe was answered, or not (`Err` says why).
    pub fn probed(&self, answer: &Result<(), String>) {
        let change = self.locked_health().probed(answer.is_ok(), Instant::now());
        let (role, name) = (self.role, &self.name);
        match (change, answer) {
            (Some(Change::WentDown), Err(why)) => {
                log::warn(format!("{role} server {name} is down: {why}"));
            }
            (Some(Change::CameUp), _) => log::info(format!("{role} server {name} is up again")),
            _ => {}
        }
    }

    fn locked_health(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().expect("no panic while held")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_in_the_spellings_people_use() {
        // Goal: names, IPv4, IPv6 with and without brackets, a scheme; and what is refused.
        let name = |host: &str| Address::new(host, 80).map(|address| address.to_string());
        assert_eq!(name("node-1").unwrap(), "node-1:80");
        assert_eq!(name("::1").unwrap(), "[::1]:80");
        assert_eq!(name("[::1]").unwrap(), "[::1]:80");
        assert_eq!(name("http://10.0.0.1/").unwrap(), "10.0.0.1:80");
        assert_eq!(name("https://a").unwrap(), "a:80");
        assert_eq!(Address::new("https://a/", 80).unwrap().scheme, Scheme::Https);
        for wrong in ["ftp://a", "a:7800", "a,b", "a/v1", "http://"] {
            assert!(name(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
        assert!(name("").is_err());
    }
}
