//! A request to the servers that answer clients: one at a time, another one while nothing has been
//! answered. Owns retries and refusals; does not know prefill.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_LENGTH, HeaderMap, HeaderValue, TRANSFER_ENCODING};
use hyper::http::response;
use hyper::{Method, Request, Response, StatusCode, Uri};
use tokio::time::Instant;

use crate::app::App;
use crate::body::{self, Fields, KV_TRANSFER_PARAMS};
use crate::headers;
use crate::intake;
use crate::metrics::Outcome;
use crate::pool::{Hint, Lease, Refusal};
use crate::record::Record;
use crate::relay::{Form, Pace, Relay, Source, prompt_tokens};
use crate::reply::{self, Reply};
use crate::upstream::{self, Answer, Deadlines, Failure, Outgoing};

/// Answers up to this length are read whole before the client gets any of it, so that a server
/// that breaks off in the middle can be replaced by another.
const WHOLE_ANSWER_BYTES_MAX: u64 = 8 << 20;

/// A request that is ready to be sent.
pub struct Asked {
    /// Method, path and headers.
    pub outgoing: Outgoing,
    /// Body.
    pub body: Bytes,
    /// The dialect of its answer, if that is a stream.
    pub form: Form,
    /// What routing should know.
    pub hint: Hint,
    /// The request's id.
    pub id: HeaderValue,
}

/// Why the proxy itself says no.
pub type Refused = (StatusCode, String);

/// The answer to a client whom the proxy turns away.
pub fn refuse(mut record: Record, id: &HeaderValue, (status, why): Refused) -> Response<Reply> {
    record.status(status.as_u16());
    record.finish(Outcome::Finished);
    let mut response = reply::error(status, &why);
    headers::toward_client(response.headers_mut(), id);
    response
}

/// Turned away by the queue.
pub fn overloaded(refusal: Refusal) -> Refused {
    let why = match refusal {
        Refusal::QueueFull => "all servers are at their limit and the queue is full; try again",
        Refusal::QueueTimeout => "no server became free in time; try again",
        Refusal::NoServer => "no server is up; try again",
    };
    (StatusCode::SERVICE_UNAVAILABLE, why.to_owned())
}

/// Whether a status says that the server, not the request, has a problem.
pub fn says_unwell(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
    )
}

/// Statuses after which another server is asked: those above, and 500, which a server gives when its
/// engine has died.
fn may_be_better_elsewhere(status: StatusCode) -> bool {
    says_unwell(status) || status == StatusCode::INTERNAL_SERVER_ERROR
}

/// Asks servers until one answers.
pub async fn ask(app: &Arc<App>, asked: Asked, mut record: Record) -> Response<Reply> {
    let pool = app.pools.answering().clone();
    let mut hint = asked.hint.clone();
    let mut last = Last::Nothing;
    for attempt in 0..=app.settings.retries {
        let lease = match pool.acquire(hint.clone()).await {
            Ok(lease) => lease,
            Err(Refusal::NoServer) => break,
            Err(refusal) => {
                last = Last::Refused(overloaded(refusal));
                break;
            }
        };
        record.sent_to(&lease.instance, attempt > 0);
        app.metrics.decode_retries.fetch_add(u64::from(attempt > 0), Relaxed);
        hint.excluded.push(lease.instance.id);
        match attempted(app, &asked, &lease, &record).await {
            Ok(Begun::Whole(head, body)) if may_be_better_elsewhere(head.status) => {
                last = Last::Answer(head, body);
            }
            Ok(Begun::Whole(head, body)) => return whole(&asked, head, body, record),
            Ok(Begun::Flowing(head, flow)) => {
                let source = flow.source(lease);
                return flowing(app, &asked, head, source, record);
            }
            Err(failure) => {
                lease.instance.request_failed(&failure.to_string());
                let status = match failure {
                    Failure::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
                    _ => StatusCode::BAD_GATEWAY,
                };
                let (role, name) = (lease.instance.role, &lease.instance.name);
                last = Last::Refused((status, format!("{role} server {name} {failure}")));
            }
        }
    }
    match last {
        Last::Nothing => refuse(record, &asked.id, overloaded(Refusal::NoServer)),
        Last::Refused(refused) => refuse(record, &asked.id, refused),
        Last::Answer(head, body) => whole(&asked, head, body, record),
    }
}

/// A deadline of a part of a request, which ends no later than the request's own.
pub fn left(app: &App, record: &Record, limit: Duration) -> Duration {
    let total = app.settings.request_timeout;
    total.map_or(limit, |total| limit.min(total.saturating_sub(record.arrived().elapsed())))
}

enum Last {
    Nothing,
    Refused(Refused),
    Answer(response::Parts, Bytes),
}

enum Begun {
    Whole(response::Parts, Bytes),
    Flowing(response::Parts, Flow),
}

struct Flow {
    body: Incoming,
    first: Option<Bytes>,
    connection: upstream::Connection,
    ends_with_connection: bool,
}

impl Flow {
    fn source(self, lease: Lease) -> Source {
        Source {
            body: self.body,
            first: self.first,
            connection: self.connection,
            lease,
            ends_with_connection: self.ends_with_connection,
        }
    }
}

/// One attempt, up to the whole answer or the first bytes of one that flows.
async fn attempted(
    app: &App,
    asked: &Asked,
    lease: &Lease,
    record: &Record,
) -> Result<Begun, Failure> {
    let settings = &app.settings;
    let limit = left(app, record, settings.first_byte_timeout);
    let deadlines = Deadlines { connect: settings.connect_timeout, head: limit };
    let started = std::time::Instant::now();
    let begin = async {
        let instance = &lease.instance;
        let answer =
            upstream::send(instance, &asked.outgoing, asked.body.clone(), deadlines).await?;
        begun(answer, lease, started).await
    };
    let begun = tokio::time::timeout(limit, begin).await;
    begun.unwrap_or(Err(Failure::Timeout(limit)))
}

async fn begun(
    answer: Answer,
    lease: &Lease,
    started: std::time::Instant,
) -> Result<Begun, Failure> {
    let Answer { head, mut body, connection } = answer;
    let broken = |error: hyper::Error| Failure::Broken(upstream::chain(&error));
    let is_stream = headers::is_event_stream(&head.headers);
    // A server may send JSON without its length; events and what is long flow.
    let length = body.size_hint().exact().map(|length| length <= WHOLE_ANSWER_BYTES_MAX);
    let gathers = !is_stream && length.unwrap_or_else(|| headers::is_json(&head.headers));
    let ends_with_connection =
        !head.headers.contains_key(CONTENT_LENGTH) && !head.headers.contains_key(TRANSFER_ENCODING);
    let mut gathered: Vec<u8> = Vec::new();
    while let Some(frame) = upstream::next_frame(&mut body).await {
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        if gathers && (gathered.len() + data.len()) as u64 <= WHOLE_ANSWER_BYTES_MAX {
            gathered.extend_from_slice(&data);
            continue;
        }
        let first = if gathered.is_empty() { data } else { [&gathered, &data[..]].concat().into() };
        let flow = Flow { body, first: Some(first), connection, ends_with_connection };
        return Ok(Begun::Flowing(head, flow));
    }
    if is_stream {
        return Err(Failure::Broken("the stream ended before its first event".to_owned()));
    }
    let instance = &lease.instance;
    instance.idle.put(connection);
    instance.counters.seconds.observe(started.elapsed());
    if says_unwell(head.status) {
        instance.request_failed(&format!("it answered {}", head.status));
    } else {
        instance.request_passed();
    }
    Ok(Begun::Whole(head, gathered.into()))
}

fn whole(asked: &Asked, head: response::Parts, body: Bytes, mut record: Record) -> Response<Reply> {
    record.first_byte();
    record.status(head.status.as_u16());
    record.bytes_out(body.len());
    record.answer(0, prompt_tokens(&body));
    record.finish(Outcome::Finished);
    let reply = Reply::Full((!body.is_empty()).then_some(body));
    response_of(asked, head, reply)
}

fn flowing(
    app: &App,
    asked: &Asked,
    head: response::Parts,
    source: Source,
    mut record: Record,
) -> Response<Reply> {
    record.first_byte();
    record.status(head.status.as_u16());
    let form = match asked.form {
        Form::Events(generation) if headers::is_event_stream(&head.headers) => {
            Form::Events(generation)
        }
        _ => Form::Plain,
    };
    let total = app.settings.request_timeout;
    let deadline = total.map(|total| Instant::from_std(record.arrived()) + total);
    let pace = Pace { idle: app.settings.idle_timeout, deadline };
    let relay = Relay::new(source, record, form, pace);
    response_of(asked, head, Reply::Relay(Box::new(relay)))
}

fn response_of(asked: &Asked, head: response::Parts, reply: Reply) -> Response<Reply> {
    let mut response = Response::new(reply);
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    if asked.form != Form::Plain && headers::is_event_stream(response.headers()) {
        // A stream that breaks off gets an error at its end: its length is not known before.
        response.headers_mut().remove(CONTENT_LENGTH);
    }
    headers::toward_client(response.headers_mut(), &asked.id);
    response
}

/// A request that is none for tokens. A client's transfer parameters are taken out of JSON;
/// everything else (uploads) passes as it is.
pub async fn pass(
    app: &Arc<App>,
    request: Request<Incoming>,
    mut record: Record,
) -> Response<Reply> {
    let (parts, body) = request.into_parts();
    let (headers, id) = headers::toward_servers(&parts.headers, app.key.as_ref());
    record.request(id.to_str().unwrap_or_default(), 0);
    let outgoing = Outgoing::of(&parts, headers);
    let hint = Hint { work: 1, ..Hint::default() };
    let body = match intake::read(app, &parts.headers, body).await {
        Ok(body) => body,
        Err(refused) => return refuse(record, &id, refused),
    };
    record.request(id.to_str().unwrap_or_default(), body.len());
    let fields = match headers::may_be_json(&parts.headers) {
        true => Fields::parse(&body),
        false => None,
    };
    let body = match fields {
        Some(fields) => body::for_decode(&body, &fields, None),
        None if headers::may_be_json(&parts.headers) && mentions(&body) => {
            let why = format!("the body names `{KV_TRANSFER_PARAMS}` but is not a JSON object");
            return refuse(record, &id, (StatusCode::BAD_REQUEST, why));
        }
        None => body,
    };
    ask(app, Asked { outgoing, body, form: Form::Plain, hint, id }, record).await
}

fn mentions(body: &Bytes) -> bool {
    memchr::memmem::find(body, KV_TRANSFER_PARAMS.as_bytes()).is_some()
}

/// A stored response is known to the server that made it: asks one after the other, and passes the
/// request to the first that does not say 404.
pub async fn stored_response(
    app: &Arc<App>,
    request: Request<Incoming>,
    record: Record,
) -> Response<Reply> {
    let (parts, body) = request.into_parts();
    let response_id = parts.uri.path().split('/').nth(3).unwrap_or_default().to_owned();
    let (headers, id) = headers::toward_servers(&parts.headers, app.key.as_ref());
    let body = match intake::read(app, &parts.headers, body).await {
        Ok(body) => body,
        Err(refused) => return refuse(record, &id, refused),
    };
    let excluded = servers_without(app, &response_id, &headers).await;
    let outgoing = Outgoing::of(&parts, headers);
    let hint = Hint { work: 1, excluded, ..Hint::default() };
    ask(app, Asked { outgoing, body, form: Form::Plain, hint, id }, record).await
}

/// The servers that do not know a stored response, when another one does.
pub async fn servers_without(app: &App, response_id: &str, headers: &HeaderMap) -> Vec<u64> {
    let members = app.pools.answering().members();
    let Ok(target) = format!("/v1/responses/{response_id}").parse::<Uri>() else {
        return Vec::new();
    };
    if members.len() < 2 {
        return Vec::new();
    }
    let outgoing = Outgoing { method: Method::GET, target, headers: headers.clone() };
    let limit = app.settings.probe_timeout;
    let deadlines = Deadlines { connect: app.settings.connect_timeout.min(limit), head: limit };
    for member in &members {
        let answer = upstream::probe(member, &outgoing, deadlines).await;
        if answer.is_ok_and(|answer| answer.head.status.is_success()) {
            let others = members.iter().filter(|other| other.id != member.id);
            return others.map(|other| other.id).collect();
        }
    }
    Vec::new()
}
