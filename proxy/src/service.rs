//! One request: looked up in the table of paths and answered or handed on. Owns the proxy's own
//! pages; does not know connections.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::app::{App, Pools};
use crate::endpoint::Route;
use crate::forward;
use crate::headers;
use crate::health::Standing;
use crate::instance::Instance;
use crate::intake;
use crate::metrics::Outcome;
use crate::namespace;
use crate::passage;
use crate::pool::Refusal;
use crate::record::Record;
use crate::reply::{self, Reply};
use crate::tunnel;
use crate::upstream::{self, Deadlines, Outgoing};

/// A server's answer to a request that goes everywhere is a word or two.
const ANSWER_BYTES_MAX: usize = 1 << 20;
const METRICS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers one request.
pub async fn answer(
    app: Arc<App>,
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Result<Response<Reply>, Infallible> {
    if request.method() == Method::CONNECT {
        let why = "CONNECT: this is a proxy in front of servers, not one to the world";
        return Ok(reply::error(StatusCode::METHOD_NOT_ALLOWED, why));
    }
    let path = request.uri().path();
    let route = Route::of(request.method(), path);
    let record = || Record::new(app.clone(), route, request.method(), path, peer);
    Ok(match route {
        Route::Healthcheck => healthcheck(&app),
        Route::Health => health(&app),
        Route::Metrics => match instance_of(request.uri().query()) {
            None => {
                reply::with_body(StatusCode::OK, METRICS_CONTENT_TYPE, app.metrics_text().into())
            }
            Some(name) => instance_metrics(&app, &name).await,
        },
        Route::Generate(generation) => {
            let record = record();
            forward::generate(&app, generation, request, record).await
        }
        Route::Pass if tunnel::is_asked_for(&request) => {
            let record = record();
            tunnel::open(&app, request, record).await
        }
        Route::Pass => {
            let record = record();
            passage::pass(&app, request, record).await
        }
        Route::StoredResponse => {
            let record = record();
            passage::stored_response(&app, request, record).await
        }
        Route::Everywhere => {
            let record = record();
            everywhere(&app, request, record).await
        }
    })
}

fn is_up(instance: &Arc<Instance>) -> bool {
    !instance.is_draining() && instance.standing() != Standing::Down
}

/// The page that tools of the first proxy of this name read; what is new stands behind.
fn healthcheck(app: &App) -> Response<Reply> {
    let mut page = match &app.pools {
        Pools::Disaggregated { prefill, decode } => json!({
            "status": "ok",
            "mode": "pd-disaggregation",
            "prefill_instances": prefill.members().len(),
            "decode_instances": decode.members().len(),
            "kv_sharing": namespace::summary(&app.pools),
        }),
        Pools::Mixed { workers } => json!({
            "status": "ok",
            "mode": "pd-mixed",
            "worker_instances": workers.members().len(),
        }),
    };
    page["instances"] = app.pools.members().iter().map(|instance| describe(instance)).collect();
    reply::json(StatusCode::OK, &page)
}

/// One server as JSON.
pub fn describe(instance: &Instance) -> Value {
    let (state, weight) = match instance.standing() {
        Standing::Usable(weight) if weight < 1.0 => ("returning", weight),
        Standing::Usable(weight) => ("up", weight),
        Standing::Ejected => ("ejected", 0.0),
        Standing::Down => ("down", 0.0),
    };
    json!({
        "role": instance.role.to_string(),
        "instance": instance.name,
        "state": state,
        "weight": weight,
        "draining": instance.is_draining(),
        "outstanding": instance.outstanding(),
    })
}

/// 200 while somebody could answer a request; without prefill servers decode still can.
fn health(app: &App) -> Response<Reply> {
    let answering = app.pools.answering();
    if app.is_shutting_down() {
        return reply::error(StatusCode::SERVICE_UNAVAILABLE, "shutting down");
    }
    if !answering.members().iter().any(is_up) {
        let message = format!("no {} server is up", answering.role);
        return reply::error(StatusCode::SERVICE_UNAVAILABLE, &message);
    }
    reply::with_body(StatusCode::OK, "text/plain", Bytes::new())
}

fn instance_of(query: Option<&str>) -> Option<String> {
    let pairs = query?.split('&').filter_map(|pair| pair.split_once('='));
    let value = pairs.filter(|(name, _)| *name == "instance").map(|(_, value)| value).next()?;
    Some(value.replace("%3A", ":").replace("%3a", ":").replace("%5B", "[").replace("%5D", "]"))
}

async fn instance_metrics(app: &App, name: &str) -> Response<Reply> {
    let members = app.pools.members();
    let Some(instance) = members.iter().find(|instance| instance.name == name) else {
        let names: Vec<_> = members.iter().map(|instance| instance.name.as_str()).collect();
        let message = format!("no server `{name}`; there are {}", names.join(", "));
        return reply::error(StatusCode::NOT_FOUND, &message);
    };
    let target = hyper::Uri::from_static("/metrics");
    let headers = hyper::HeaderMap::new();
    let outgoing = Outgoing { method: Method::GET, target, headers };
    let limit = app.settings.probe_timeout;
    let deadlines = Deadlines { connect: app.settings.connect_timeout.min(limit), head: limit };
    let failed = |why: String| {
        let message = format!("{} server {name} {why}", instance.role);
        reply::error(StatusCode::BAD_GATEWAY, &message)
    };
    match upstream::probe(instance, &outgoing, deadlines).await {
        Ok(answer) => match upstream::collect(answer.body, 16 * ANSWER_BYTES_MAX).await {
            Ok(Some(body)) => reply::with_body(StatusCode::OK, METRICS_CONTENT_TYPE, body),
            Ok(None) => failed("answered too much".to_owned()),
            Err(error) => failed(format!("broke off: {error}")),
        },
        Err(failure) => failed(failure.to_string()),
    }
}

/// Sends a request to every server. The answer is that of the first that failed, else that of the
/// first that answers clients and knows the path.
async fn everywhere(
    app: &Arc<App>,
    request: Request<Incoming>,
    mut record: Record,
) -> Response<Reply> {
    let (parts, body) = request.into_parts();
    let (headers, id) = headers::toward_servers(&parts.headers, app.key.as_ref());
    let body = match intake::read(app, &parts.headers, body).await {
        Ok(body) => body,
        Err(refused) => return passage::refuse(record, &id, refused),
    };
    record.request(id.to_str().unwrap_or_default(), body.len());
    let outgoing = Outgoing::of(&parts, headers);
    let mut running = JoinSet::new();
    // Those that answer clients first, so that theirs is the answer when all are alike.
    for (index, instance) in app.pools.members().into_iter().rev().enumerate() {
        let (outgoing, body, settings) = (outgoing.clone(), body.clone(), app.settings.clone());
        let deadlines =
            Deadlines { connect: settings.connect_timeout, head: settings.first_byte_timeout };
        running.spawn(async move { (index, tell(&instance, &outgoing, body, deadlines).await) });
    }
    let mut answers = running.join_all().await;
    answers.sort_by_key(|(index, answer)| (Told::by(answer.status()), *index));
    let Some((_, mut answer)) = answers.into_iter().next() else {
        return passage::refuse(record, &id, passage::overloaded(Refusal::NoServer));
    };
    record.status(answer.status().as_u16());
    record.finish(Outcome::Finished);
    headers::toward_client(answer.headers_mut(), &id);
    answer
}

/// How a server took a request that goes everywhere; the worst is what the client gets to know.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    Failed,
    Done,
    /// It has nothing of the kind, such as a profiler that was not turned on.
    Unknown,
}

impl Told {
    fn by(status: StatusCode) -> Self {
        match status {
            status if status.is_success() => Self::Done,
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Self::Unknown,
            _ => Self::Failed,
        }
    }
}

async fn tell(
    instance: &Instance,
    outgoing: &Outgoing,
    body: Bytes,
    deadlines: Deadlines,
) -> Response<Reply> {
    let failed = |why: String| {
        let message = format!("{} server {} {why}", instance.role, instance.name);
        reply::error(StatusCode::BAD_GATEWAY, &message)
    };
    let answer = match upstream::send(instance, outgoing, body, deadlines).await {
        Ok(answer) => answer,
        Err(failure) => return failed(failure.to_string()),
    };
    match upstream::collect(answer.body, ANSWER_BYTES_MAX).await {
        Ok(Some(body)) => {
            let mut response = Response::new(Reply::Full((!body.is_empty()).then_some(body)));
            *response.status_mut() = answer.head.status;
            *response.headers_mut() = answer.head.headers;
            response
        }
        Ok(None) => failed("answered too much".to_owned()),
        Err(error) => failed(format!("broke off: {error}")),
    }
}
