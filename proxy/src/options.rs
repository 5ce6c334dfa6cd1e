//! The command line and the configuration file: the same words in both. Owns their reading and
//! merging (the command line wins) and turns them into checked [`Settings`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use serde::{Deserialize, Deserializer};

use crate::given::{DEFAULT_HOST, Given, paired};
use crate::health::Rules;
use crate::pool::Limits;
use crate::routing::Routing;
use crate::settings::{OnPrefillFailure, Servers, Settings, TlsFiles};
use crate::tls::Trust;

const EXAMPLES: &str = "\
Examples:
  one prefill and one decode server:
    ucm-proxy --port 7802 --prefiller-host node1 --prefiller-port 7800 \\
              --decoder-host node2 --decoder-port 7801
  two of each:
    ucm-proxy --port 7805 --prefiller-hosts node1 node1 --prefiller-ports 7800 7801 \\
              --decoder-hosts node2 node2 --decoder-ports 7802 7803
  servers that do both (only the prefix cache is shared):
    ucm-proxy --port 7802 --worker-hosts node1 node2 --worker-ports 7800 7800
Then send OpenAI requests to http://HOST:PORT/v1/... as if it were one server.
--config FILE takes the same words as YAML keys: `prefiller_hosts: [node1]`, `port: 7802`.";

macro_rules! options {
    ($($(#[$attribute:meta])* $name:ident: $kind:ty,)*) => {
        /// An HTTP proxy in front of prefill and decode servers (vLLM with UCM).
        ///
        /// Every prompt is computed by a prefill server, which saves its KV to the shared storage;
        /// a decode server loads it from there and generates the answer.
        #[derive(Clone, Debug, Default, Parser, Deserialize)]
        #[command(name = "ucm-proxy", version, after_help = EXAMPLES)]
        #[serde(deny_unknown_fields, default)]
        pub struct Options {
            /// YAML file with the same options; SIGHUP reads its servers and routing again.
            #[arg(long, value_name = "FILE")]
            #[serde(skip)]
            config: Option<PathBuf>,
            /// Prefill and decode servers are apart. Implied when both are given.
            #[arg(long, alias = "pd_disaggregation")]
            pd_disaggregation: bool,
            $($(#[$attribute])* $name: $kind,)*
        }

        impl Options {
            /// Takes from `file` what the command line does not say.
            fn or(self, file: Self) -> Self {
                Self {
                    config: self.config,
                    pd_disaggregation: self.pd_disaggregation || file.pd_disaggregation,
                    $($name: self.$name.or(file.$name),)*
                }
            }
        }
    };
}

options! {
    /// Name or address to listen on; `localhost` means every address it has [default: localhost].
    #[arg(long, help_heading = "Listening")]
    host: Option<String>,
    /// Port to listen on [default: 8000].
    #[arg(long, help_heading = "Listening")]
    port: Option<u16>,
    /// Certificate chain (PEM) for HTTPS towards clients.
    #[arg(long, value_name = "FILE", help_heading = "Listening")]
    tls_cert: Option<PathBuf>,
    /// Private key (PEM) for HTTPS.
    #[arg(long, value_name = "FILE", help_heading = "Listening")]
    tls_key: Option<PathBuf>,
    /// Port of the admin endpoint on 127.0.0.1: add, remove, drain servers [default: none].
    #[arg(long, help_heading = "Listening")]
    admin_port: Option<u16>,

    /// Certificates (PEM) that servers named as https://HOST are checked against [default: the
    /// system's].
    #[arg(long, value_name = "FILE", help_heading = "Servers")]
    upstream_ca: Option<PathBuf>,
    /// Hosts of the prefill servers; https://HOST speaks TLS.
    #[arg(long, aliases = ["prefiller-host", "prefiller_hosts", "prefiller_host"],
          num_args = 1.., value_name = "HOST", help_heading = "Servers")]
    #[serde(alias = "prefiller_host", deserialize_with = "one_or_many")]
    prefiller_hosts: Option<Vec<String>>,
    /// Their ports, one for each host.
    #[arg(long, aliases = ["prefiller-port", "prefiller_ports", "prefiller_port"],
          num_args = 1.., value_name = "PORT", help_heading = "Servers")]
    #[serde(alias = "prefiller_port", deserialize_with = "one_or_many")]
    prefiller_ports: Option<Vec<u16>>,
    /// Hosts of the decode servers.
    #[arg(long, aliases = ["decoder-host", "decoder_hosts", "decoder_host"],
          num_args = 1.., value_name = "HOST", help_heading = "Servers")]
    #[serde(alias = "decoder_host", deserialize_with = "one_or_many")]
    decoder_hosts: Option<Vec<String>>,
    /// Their ports, one for each host.
    #[arg(long, aliases = ["decoder-port", "decoder_ports", "decoder_port"],
          num_args = 1.., value_name = "PORT", help_heading = "Servers")]
    #[serde(alias = "decoder_port", deserialize_with = "one_or_many")]
    decoder_ports: Option<Vec<u16>>,
    /// Hosts of servers that do both (mixed mode).
    #[arg(long, aliases = ["worker-host", "work-host", "work-hosts", "worker_hosts", "worker_host"],
          num_args = 1.., value_name = "HOST", help_heading = "Servers")]
    #[serde(alias = "worker_host", deserialize_with = "one_or_many")]
    worker_hosts: Option<Vec<String>>,
    /// Their ports, one for each host.
    #[arg(long, aliases = ["worker-port", "work-port", "work-ports", "worker_ports", "worker_port"],
          num_args = 1.., value_name = "PORT", help_heading = "Servers")]
    #[serde(alias = "worker_port", deserialize_with = "one_or_many")]
    worker_ports: Option<Vec<u16>>,

    /// How a server is chosen [default: least-outstanding].
    #[arg(long, value_enum, help_heading = "Routing")]
    routing: Option<Routing>,
    /// When a prefill leg fails: decode computes alone, or other prefill servers are tried first
    /// [default: decode].
    #[arg(long, value_enum, help_heading = "Routing")]
    on_prefill_failure: Option<OnPrefillFailure>,
    /// Other servers to try when one fails before its first byte [default: 2].
    #[arg(long, value_name = "N", help_heading = "Routing")]
    retries: Option<u32>,
    /// Requests in flight per server; 0: no limit [default: 0].
    #[arg(long, value_name = "N", help_heading = "Routing")]
    max_outstanding: Option<u64>,
    /// Requests that wait for a server below its limit; more get 503 [default: 1024].
    #[arg(long, value_name = "N", help_heading = "Routing")]
    queue_depth: Option<usize>,
    /// How long one waits there, seconds; then 503 [default: 30].
    #[arg(long, value_name = "S", help_heading = "Routing")]
    queue_timeout_s: Option<f64>,

    /// To connect to a server, seconds: three attempts of TCP at a server whose queue is full
    /// [default: 10].
    #[arg(long, value_name = "S", help_heading = "Deadlines")]
    connect_timeout_s: Option<f64>,
    /// A whole prefill leg, seconds [default: 300].
    #[arg(long, value_name = "S", help_heading = "Deadlines")]
    prefill_timeout_s: Option<f64>,
    /// Until the first byte of an answer, seconds: of a stream its first event, else all of it
    /// [default: 1800].
    #[arg(long, value_name = "S", help_heading = "Deadlines")]
    first_byte_timeout_s: Option<f64>,
    /// Silence within a stream, seconds [default: 300].
    #[arg(long, value_name = "S", help_heading = "Deadlines")]
    idle_timeout_s: Option<f64>,
    /// A whole request, seconds; 0: none [default: 0].
    #[arg(long, value_name = "S", help_heading = "Deadlines")]
    request_timeout_s: Option<f64>,
    /// A client's headers, and its body, seconds each; a body gets a second more for every 64 KiB
    /// that came [default: 60].
    #[arg(long, value_name = "S", help_heading = "Deadlines")]
    body_timeout_s: Option<f64>,
    /// Requests in flight at shutdown, seconds [default: 30].
    #[arg(long, value_name = "S", help_heading = "Deadlines")]
    shutdown_timeout_s: Option<f64>,

    /// Between probes of a server, seconds [default: 5].
    #[arg(long, value_name = "S", help_heading = "Health")]
    probe_interval_s: Option<f64>,
    /// A probe, seconds [default: 5].
    #[arg(long, value_name = "S", help_heading = "Health")]
    probe_timeout_s: Option<f64>,
    /// Path of a probe; any answer below 500 is good [default: /health].
    #[arg(long, value_name = "PATH", help_heading = "Health")]
    probe_path: Option<String>,
    /// Failed requests in a row until a server is ejected; 0: never [default: 3].
    #[arg(long, value_name = "N", help_heading = "Health")]
    eject_after: Option<u32>,
    /// Length of its first ejection, seconds; doubled each time up to 60 [default: 5].
    #[arg(long, value_name = "S", help_heading = "Health")]
    eject_s: Option<f64>,
    /// Until a server that came back has its whole share, seconds [default: 30].
    #[arg(long, value_name = "S", help_heading = "Health")]
    slow_return_s: Option<f64>,
    /// Between readings of what KV a server has, seconds [default: 30].
    #[arg(long, value_name = "S", help_heading = "Health")]
    namespace_interval_s: Option<f64>,

    /// Largest request body, MiB [default: 64].
    #[arg(long, value_name = "MIB", help_heading = "Limits")]
    max_body_mb: Option<f64>,
    /// Largest request head, KiB, at least 8 [default: 64].
    #[arg(long, value_name = "KIB", help_heading = "Limits")]
    max_header_kb: Option<usize>,
    /// Client connections at once [default: 65536].
    #[arg(long, value_name = "N", help_heading = "Limits")]
    max_connections: Option<usize>,
    /// JSON line per request: `-` (standard output), `off`, or a file [default: -].
    #[arg(long, value_name = "TARGET", help_heading = "Limits")]
    access_log: Option<String>,
}

/// A YAML list, or the one value alone.
fn one_or_many<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written<T> {
        One(T),
        Many(Vec<T>),
    }
    Ok(Option::<Written<T>>::deserialize(deserializer)?.map(|written| match written {
        Written::One(value) => vec![value],
        Written::Many(values) => values,
    }))
}

/// Reads the command line; `--help` and mistakes in it end the process.
pub fn from_command_line() -> Result<Settings, String> {
    from_options(Options::parse())
}

fn from_options(command_line: Options) -> Result<Settings, String> {
    let options = match &command_line.config {
        Some(path) => command_line.clone().or(read_file(path)?),
        None => command_line.clone(),
    };
    Ok(Settings { command_line, ..options.check()? })
}

/// Reads the servers and the routing of the configuration file again. What the command line says
/// stands over it, as at the start.
pub fn reload(command_line: &Options) -> Result<(Servers, Option<Routing>), String> {
    let Some(path) = &command_line.config else {
        return Err("there is no --config file to read again".to_owned());
    };
    let options = command_line.clone().or(read_file(path)?);
    let routing = options.routing;
    let mut notices = Vec::new();
    Ok((options.servers(&mut notices)?, routing))
}

fn read_file(path: &Path) -> Result<Options, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("configuration `{}`: {error}", path.display()))?;
    serde_saphyr::from_str(&text)
        .map_err(|error| format!("configuration `{}`: {error}", path.display()))
}

impl Options {
    fn check(self) -> Result<Settings, String> {
        let mut notices = Vec::new();
        let servers = self.servers(&mut notices)?;
        let tls = match (self.tls_cert, self.tls_key) {
            (Some(certificates), Some(key)) => Some(TlsFiles { certificates, key }),
            (None, None) => None,
            (Some(_), None) => return Err("--tls-cert needs --tls-key".to_owned()),
            (None, Some(_)) => return Err("--tls-key needs --tls-cert".to_owned()),
        };
        let probe_path = self.probe_path.unwrap_or_else(|| "/health".to_owned());
        if !probe_path.starts_with('/') {
            return Err(format!("--probe-path `{probe_path}` does not begin with a slash"));
        }
        let max_header = self.max_header_kb.unwrap_or(64);
        if !(8..=1024).contains(&max_header) {
            return Err(format!("--max-header-kb {max_header}: 8 to 1024"));
        }
        let max_body = self.max_body_mb.unwrap_or(64.0);
        if !(max_body > 0.0 && max_body <= 4096.0) {
            return Err(format!("--max-body-mb {max_body}: more than 0, at most 4096"));
        }
        let request_timeout = seconds("--request-timeout-s", self.request_timeout_s, 0.0, 0.0)?;
        Ok(Settings {
            host: self.host.unwrap_or_else(|| DEFAULT_HOST.to_owned()),
            port: self.port.unwrap_or(8000),
            servers,
            routing: self.routing.unwrap_or_default(),
            limits: Limits {
                outstanding_max: self.max_outstanding.unwrap_or(0),
                queue_depth: self.queue_depth.unwrap_or(1024),
                queue_timeout: above_zero("--queue-timeout-s", self.queue_timeout_s, 30.0)?,
            },
            health: Rules {
                eject_after: self.eject_after.unwrap_or(3),
                eject_base: above_zero("--eject-s", self.eject_s, 5.0)?,
                slow_return: seconds("--slow-return-s", self.slow_return_s, 30.0, 0.0)?,
            },
            on_prefill_failure: self.on_prefill_failure.unwrap_or_default(),
            retries: self.retries.unwrap_or(2),
            connect_timeout: above_zero("--connect-timeout-s", self.connect_timeout_s, 10.0)?,
            prefill_timeout: above_zero("--prefill-timeout-s", self.prefill_timeout_s, 300.0)?,
            first_byte_timeout: above_zero(
                "--first-byte-timeout-s",
                self.first_byte_timeout_s,
                1800.0,
            )?,
            idle_timeout: above_zero("--idle-timeout-s", self.idle_timeout_s, 300.0)?,
            request_timeout: (!request_timeout.is_zero()).then_some(request_timeout),
            body_timeout: above_zero("--body-timeout-s", self.body_timeout_s, 60.0)?,
            probe_interval: above_zero("--probe-interval-s", self.probe_interval_s, 5.0)?,
            probe_timeout: above_zero("--probe-timeout-s", self.probe_timeout_s, 5.0)?,
            probe_path,
            namespace_interval: above_zero(
                "--namespace-interval-s",
                self.namespace_interval_s,
                30.0,
            )?,
            max_body: (max_body * f64::from(1 << 20)) as usize,
            max_header: max_header << 10,
            max_connections: self.max_connections.unwrap_or(65_536).max(1),
            access_log: self.access_log.unwrap_or_else(|| "-".to_owned()),
            admin_port: self.admin_port,
            tls,
            trust: Arc::new(Trust::new(self.upstream_ca)),
            shutdown_timeout: seconds("--shutdown-timeout-s", self.shutdown_timeout_s, 30.0, 0.0)?,
            command_line: Self::default(),
            notices,
        })
    }

    fn servers(&self, notices: &mut Vec<String>) -> Result<Servers, String> {
        let given = Given {
            pd_disaggregation: self.pd_disaggregation,
            prefillers: paired("prefiller", &self.prefiller_hosts, &self.prefiller_ports)?,
            decoders: paired("decoder", &self.decoder_hosts, &self.decoder_ports)?,
            workers: paired("worker", &self.worker_hosts, &self.worker_ports)?,
        };
        given.servers(notices)
    }
}

/// Longest time that can be asked for: a week.
const SECONDS_MAX: f64 = 604_800.0;

fn seconds(name: &str, value: Option<f64>, default: f64, least: f64) -> Result<Duration, String> {
    let value = value.unwrap_or(default);
    if !(value >= least && value <= SECONDS_MAX) {
        return Err(format!("{name} {value}: {least} to {SECONDS_MAX} seconds"));
    }
    Ok(Duration::from_secs_f64(value))
}

fn above_zero(name: &str, value: Option<f64>, default: f64) -> Result<Duration, String> {
    const LEAST: f64 = 0.001;
    seconds(name, value, default, LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Address;

    fn settings(line: &str) -> Result<Settings, String> {
        let words = std::iter::once("ucm-proxy").chain(line.split_whitespace());
        from_options(Options::try_parse_from(words).map_err(|error| error.to_string())?)
    }

    fn names(addresses: &[Address]) -> Vec<String> {
        addresses.iter().map(Address::to_string).collect()
    }

    #[test]
    fn the_spellings_in_use_all_work() {
        // Goal: singular, plural, mixed, with and without the flag.
        let one = "--host localhost --port 7802 --prefiller-host P --prefiller-port 7800 \
                   --decoder-host D --decoder-port 7801";
        for line in [one.to_owned(), format!("--pd-disaggregation {one}")] {
            let settings = settings(&line).unwrap();
            let Servers::Disaggregated { prefillers, decoders } = settings.servers else {
                panic!()
            };
            assert_eq!(
                (names(&prefillers), names(&decoders)),
                (vec!["P:7800".to_owned()], vec!["D:7801".to_owned()])
            );
            assert_eq!(settings.notices.len(), usize::from(!line.starts_with("--pd")));
        }
        let two = "--prefiller-hosts A B --prefiller-port 7800 7801 --decoder-hosts C D \
                   --decoder-ports 7802 7803";
        let Servers::Disaggregated { prefillers, decoders } = settings(two).unwrap().servers else {
            panic!()
        };
        assert_eq!(names(&prefillers), ["A:7800", "B:7801"]);
        assert_eq!(names(&decoders), ["C:7802", "D:7803"]);
        for (hosts, ports) in [("worker-hosts", "worker-ports"), ("work-host", "work-port")] {
            let Servers::Mixed { workers } =
                settings(&format!("--{hosts} A B --{ports} 1 2")).unwrap().servers
            else {
                panic!()
            };
            assert_eq!(names(&workers), ["A:1", "B:2"]);
        }
    }

    #[test]
    fn mistakes_are_named() {
        // Goal: each message says which option is wrong and how.
        let error = |line: &str| settings(line).unwrap_err();
        let counts = error("--prefiller-hosts A B --prefiller-ports 1 --decoder-port 2");
        assert!(counts.contains("prefiller hosts") && counts.contains("2 (A B)"), "{counts}");
        assert!(error("--prefiller-port 1").contains("--decoder-hosts"));
        assert!(error("--decoder-port 1").contains("--prefiller-hosts"));
        assert!(error("--worker-port 1 --decoder-port 2 --prefiller-port 3").contains("--worker"));
        assert!(error("--worker-ports 1 1").contains("localhost:1"));
        assert!(error("--worker-ports 99999").contains("99999"));
        assert!(error("--worker-port 1 --tls-cert x").contains("--tls-key"));
        assert!(error("--worker-port 1 --idle-timeout-s 0").contains("--idle-timeout-s"));
        assert!(error("--worker-port 1 --routing sideways").contains("sideways"));
    }

    #[test]
    fn the_file_has_the_same_words_and_the_command_line_wins() {
        // Goal: scalars and lists, merging, and an unknown key that is named.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("proxy.yaml");
        let text = "prefiller_hosts: [A, B]\nprefiller_ports: [1, 2]\ndecoder_host: C\n\
                    decoder_port: 3\nport: 9\nrouting: prefix_affinity\n";
        std::fs::write(&path, text).unwrap();
        let settings = settings(&format!("--config {} --port 10", path.display())).unwrap();
        assert_eq!((settings.port, settings.routing), (10, Routing::PrefixAffinity));
        let Servers::Disaggregated { prefillers, decoders } = settings.servers else { panic!() };
        assert_eq!((prefillers.len(), decoders.len()), (2, 1));
        let (_, routing) = reload(&settings.command_line).unwrap();
        assert_eq!(routing, Some(Routing::PrefixAffinity));
        std::fs::write(&path, "prefiler_hosts: [A]\n").unwrap();
        let error = reload(&settings.command_line).unwrap_err();
        assert!(error.contains("prefiler_hosts"), "{error}");
    }

    #[test]
    fn servers_of_the_command_line_survive_a_reload() {
        // Goal: a file that names no servers does not replace those that were given by hand.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("proxy.yaml");
        std::fs::write(&path, "routing: round_robin\n").unwrap();
        let line = format!("--config {} --worker-host A --worker-port 1", path.display());
        let (servers, routing) = reload(&settings(&line).unwrap().command_line).unwrap();
        let Servers::Mixed { workers } = servers else { panic!() };
        assert_eq!((names(&workers), routing), (vec!["A:1".to_owned()], Some(Routing::RoundRobin)));
        let none = settings("--worker-port 1").unwrap().command_line;
        assert!(reload(&none).unwrap_err().contains("--config"));
    }
}
