//! `ucm-proxy`: an HTTP proxy in front of prefill and decode servers.
//!
//! A request of an OpenAI client becomes a *prefill leg* (one token, on a prefill server, which
//! computes the prompt's KV and saves it) and the request itself on a decode server, which loads
//! that KV. The proxy carries the prefill server's `kv_transfer_params` between the two, so that
//! decode waits for exactly what prefill announced. It never sees KV.
//!
//! Reading order, as a request travels: `server` (listeners, connections), `service` (which path
//! goes where), `body` and `legs` (what is sent), `pool` (to whom), `upstream` (how), `forward`
//! (the two legs, retries), `relay` (the answer on its way back).
#![forbid(unsafe_code)]

mod access_log;
mod admin;
mod affinity;
mod app;
mod body;
mod clock;
mod endpoint;
mod forward;
mod given;
mod headers;
mod health;
mod histogram;
mod instance;
mod intake;
mod legs;
mod log;
mod metrics;
mod namespace;
mod options;
mod passage;
mod pool;
mod record;
mod relay;
mod reload;
mod reply;
mod routing;
mod server;
mod service;
mod settings;
mod socket;
mod tls;
mod tunnel;
mod upstream;
mod watch;

use std::process::ExitCode;

fn main() -> ExitCode {
    let settings = match options::from_command_line() {
        Ok(settings) => settings,
        Err(message) => {
            eprintln!("ucm-proxy: error: {message}");
            return ExitCode::from(2);
        }
    };
    raise_descriptor_limit();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ucm-proxy: error: the runtime did not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(server::run(settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("ucm-proxy: error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Every stream holds two sockets, and the usual soft limit is 1024 descriptors: takes the hard
/// limit instead, which needs no privilege.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        log::warn(format!("the limit of open files stays at {current:?}: {error}"));
    }
}
