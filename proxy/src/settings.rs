//! The proxy's configuration, checked. Owns defaults, units and ranges; where the values were
//! written (command line, file) is another file's.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use crate::health::Rules;
use crate::instance::Address;
use crate::options::Options;
use crate::pool::Limits;
use crate::routing::Routing;
use crate::tls::Trust;

/// What happens to a request whose prefill leg failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OnPrefillFailure {
    /// Decode computes the prompt itself, at once.
    #[default]
    Decode,
    /// Other prefill servers are tried first, then decode.
    Retry,
}

/// The servers behind the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Servers {
    /// Prefill and decode apart.
    Disaggregated {
        /// Servers that compute prompts.
        prefillers: Vec<Address>,
        /// Servers that generate.
        decoders: Vec<Address>,
    },
    /// Every server does both.
    Mixed {
        /// The servers.
        workers: Vec<Address>,
    },
}

/// Certificate and key of the proxy.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// PEM file, the proxy's own certificate first.
    pub certificates: PathBuf,
    /// PEM file.
    pub key: PathBuf,
}

/// Everything.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name or address to listen on.
    pub host: String,
    /// Port to listen on.
    pub port: u16,
    /// The servers at start.
    pub servers: Servers,
    /// Who gets a request.
    pub routing: Routing,
    /// Limits of each pool.
    pub limits: Limits,
    /// Ejection and return.
    pub health: Rules,
    /// See [`OnPrefillFailure`].
    pub on_prefill_failure: OnPrefillFailure,
    /// Other servers to try.
    pub retries: u32,
    /// To connect to a server.
    pub connect_timeout: Duration,
    /// A whole prefill leg.
    pub prefill_timeout: Duration,
    /// Decode's first byte.
    pub first_byte_timeout: Duration,
    /// Silence within an answer.
    pub idle_timeout: Duration,
    /// A whole request.
    pub request_timeout: Option<Duration>,
    /// A client's body, and its headers.
    pub body_timeout: Duration,
    /// Between probes of a server.
    pub probe_interval: Duration,
    /// A probe.
    pub probe_timeout: Duration,
    /// Path of a probe.
    pub probe_path: String,
    /// Between readings of a server's namespace.
    pub namespace_interval: Duration,
    /// Largest request body, bytes.
    pub max_body: usize,
    /// Largest request head, bytes.
    pub max_header: usize,
    /// Client connections.
    pub max_connections: usize,
    /// `off`, `-` or a path.
    pub access_log: String,
    /// Port of the admin endpoint on loopback.
    pub admin_port: Option<u16>,
    /// TLS towards clients.
    pub tls: Option<TlsFiles>,
    /// TLS towards servers.
    pub trust: Arc<Trust>,
    /// Requests in flight get this long at shutdown.
    pub shutdown_timeout: Duration,
    /// What the command line alone said: SIGHUP reads the file again and puts this over it.
    pub command_line: Options,
    /// Things to tell at start.
    pub notices: Vec<String>,
}
