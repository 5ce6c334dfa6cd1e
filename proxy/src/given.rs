//! The servers that the options name, put together: hosts with their ports, and the mode that
//! follows. Owns these rules and their errors; does not know how options are written.

use crate::instance::Address;
use crate::settings::Servers;

/// Where a server is that is not said to be elsewhere, and where the proxy listens.
pub const DEFAULT_HOST: &str = "localhost";

/// What was given of each role.
pub struct Given {
    /// Whether disaggregation was asked for by name.
    pub pd_disaggregation: bool,
    /// Servers that compute prompts.
    pub prefillers: Option<Vec<Address>>,
    /// Servers that generate.
    pub decoders: Option<Vec<Address>>,
    /// Servers that do both.
    pub workers: Option<Vec<Address>>,
}

impl Given {
    /// The mode and its servers; what was decided for the user goes to `notices`.
    pub fn servers(self, notices: &mut Vec<String>) -> Result<Servers, String> {
        match (self.prefillers, self.decoders, self.workers) {
            (Some(_), _, Some(_)) | (_, Some(_), Some(_)) => {
                Err("--worker-hosts/--worker-ports (servers that do both) cannot be mixed with \
                     --prefiller-* and --decoder-*: give one kind"
                    .to_owned())
            }
            (Some(prefillers), Some(decoders), None) => {
                if !self.pd_disaggregation {
                    let notice = "prefill and decode servers are given: disaggregation is on (as \
                                  with --pd-disaggregation)";
                    notices.push(notice.to_owned());
                }
                Ok(Servers::Disaggregated { prefillers, decoders })
            }
            (Some(_), None, None) => {
                Err("--prefiller-hosts/--prefiller-ports without --decoder-hosts/--decoder-ports: \
                     a decode server has to generate the answers"
                    .to_owned())
            }
            (None, Some(_), None) => {
                Err("--decoder-hosts/--decoder-ports without --prefiller-hosts/--prefiller-ports: \
                     give prefill servers too, or use --worker-hosts for servers that do both"
                    .to_owned())
            }
            (None, None, Some(_)) if self.pd_disaggregation => {
                Err("--pd-disaggregation needs --prefiller-* and --decoder-*; --worker-* are for \
                     servers that do both"
                    .to_owned())
            }
            (None, None, Some(workers)) => Ok(Servers::Mixed { workers }),
            (None, None, None) => default_servers(self.pd_disaggregation, notices),
        }
    }
}

/// What the first proxy of this name took when nothing was said.
fn default_servers(pd_disaggregation: bool, notices: &mut Vec<String>) -> Result<Servers, String> {
    let local = |port| Address::new(DEFAULT_HOST, port).map(|address| vec![address]);
    if pd_disaggregation {
        notices.push(
            "no servers are given: prefill is localhost:8100, decode localhost:8200".to_owned(),
        );
        return Ok(Servers::Disaggregated { prefillers: local(8100)?, decoders: local(8200)? });
    }
    notices.push("no servers are given: one worker, localhost:8100".to_owned());
    Ok(Servers::Mixed { workers: local(8100)? })
}

/// Hosts and ports of one role, paired in order. Ports without hosts are those of this machine.
pub fn paired(
    role: &str,
    hosts: &Option<Vec<String>>,
    ports: &Option<Vec<u16>>,
) -> Result<Option<Vec<Address>>, String> {
    let (hosts, ports) = match (hosts, ports) {
        (None, None) => return Ok(None),
        (Some(hosts), Some(ports)) => (hosts.clone(), ports),
        (None, Some(ports)) => (vec![DEFAULT_HOST.to_owned(); ports.len()], ports),
        (Some(hosts), None) => {
            return Err(format!(
                "--{role}-hosts names {} host(s) but there is no --{role}-ports",
                hosts.len()
            ));
        }
    };
    if hosts.len() != ports.len() {
        return Err(format!(
            "the number of {role} hosts must match the number of {role} ports: --{role}-hosts \
             has {} ({}), --{role}-ports has {} ({})",
            hosts.len(),
            hosts.join(" "),
            ports.len(),
            ports.iter().map(u16::to_string).collect::<Vec<_>>().join(" "),
        ));
    }
    let pairs = hosts.iter().zip(ports);
    let addresses: Vec<Address> =
        pairs.map(|(host, port)| Address::new(host, *port)).collect::<Result<_, _>>()?;
    for (index, address) in addresses.iter().enumerate() {
        if addresses[..index].contains(address) {
            return Err(format!("the {role} server {address} is given twice"));
        }
    }
    if addresses.is_empty() {
        return Err(format!("--{role}-hosts and --{role}-ports are empty"));
    }
    Ok(Some(addresses))
}
