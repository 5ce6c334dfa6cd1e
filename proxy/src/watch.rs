//! The background task of one server: probes whether it lives and reads what it says of its KV.
//! Owns the rhythm; what follows from an answer is decided by `health` and `namespace`.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::header::HeaderMap;
use hyper::{Method, StatusCode, Uri};
use tokio::time::{Instant, sleep, timeout};

use crate::app::App;
use crate::instance::Instance;
use crate::log;
use crate::namespace::{self, Namespace};
use crate::upstream::{self, Deadlines, Outgoing};

/// A server's `/metrics` is some 100 KiB.
const METRICS_BYTES_MAX: usize = 16 << 20;
/// A server that answers nothing about its KV yet is asked again sooner.
const NAMESPACE_RETRY: Duration = Duration::from_secs(2);

/// Watches a server until it is removed.
pub fn spawn(app: Arc<App>, instance: Arc<Instance>) {
    tokio::spawn(async move {
        let mut namespace_due = Instant::now();
        let mut is_first = true;
        while !instance.is_removed() {
            let alive = probe(&app, &instance).await;
            if let (true, Err(why)) = (std::mem::take(&mut is_first), &alive) {
                // A server may start later than the proxy; a wrong name or port looks the same.
                log::warn(format!(
                    "{} server {} is not up yet: {why}",
                    instance.role, instance.name
                ));
            }
            instance.probed(&alive);
            instance.idle.sweep();
            if alive.is_ok() && app.pools.prefill().is_some() && Instant::now() >= namespace_due {
                let found = fetch_namespace(&app, &instance).await;
                let interval = match found {
                    Namespace::Unknown | Namespace::NotAsked => {
                        NAMESPACE_RETRY.min(app.settings.namespace_interval)
                    }
                    Namespace::Known(_) => app.settings.namespace_interval,
                };
                namespace::note(&app.pools, &instance, found);
                namespace_due = Instant::now() + interval;
            }
            sleep(app.settings.probe_interval).await;
        }
    });
}

/// Any answer below 500 is a sign of life: servers without `/health` say 404.
async fn probe(app: &App, instance: &Instance) -> Result<(), String> {
    let (status, _) = get(app, instance, &app.settings.probe_path).await?;
    if status.is_server_error() {
        return Err(format!("{} answers {status}", app.settings.probe_path));
    }
    Ok(())
}

async fn fetch_namespace(app: &App, instance: &Instance) -> Namespace {
    match get(app, instance, "/metrics").await {
        Ok((status, body)) if status.is_success() => {
            Namespace::read(&String::from_utf8_lossy(&body))
        }
        _ => Namespace::Unknown,
    }
}

async fn get(app: &App, instance: &Instance, path: &str) -> Result<(StatusCode, Bytes), String> {
    let target: Uri = path.parse().map_err(|error| format!("{path}: {error}"))?;
    let mut headers = HeaderMap::new();
    if let Some(key) = &app.key {
        headers.insert(hyper::header::AUTHORIZATION, key.clone());
    }
    let outgoing = Outgoing { method: Method::GET, target, headers };
    let limit = app.settings.probe_timeout;
    let deadlines = Deadlines { connect: app.settings.connect_timeout.min(limit), head: limit };
    let exchange = async {
        let answer = upstream::probe(instance, &outgoing, deadlines).await;
        let answer = answer.map_err(|failure| format!("it {failure}"))?;
        let body = upstream::collect(answer.body, METRICS_BYTES_MAX).await;
        let body = body.map_err(|error| format!("it broke off: {error}"))?;
        Ok((answer.head.status, body.unwrap_or_default()))
    };
    let timed_out = || Err(format!("{path} was not answered in {} s", limit.as_secs_f64()));
    timeout(limit, exchange).await.unwrap_or_else(|_| timed_out())
}
