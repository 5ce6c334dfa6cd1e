//! A request for tokens: its prefill legs, then decode. Owns the order of the two, what is carried
//! between them, and what happens when a server fails; does not know how bytes travel.
//!
//! A request is never lost to prefill: whatever goes wrong there, decode computes alone. At decode
//! it is sent to one server at a time; another one is asked only when the one before has answered
//! nothing, and its connection is closed by then.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::task::JoinSet;

use crate::affinity::PrefixKey;
use crate::app::App;
use crate::body::{self, Fields, KV_TRANSFER_PARAMS};
use crate::endpoint::Generation;
use crate::headers;
use crate::intake;
use crate::legs::{self, Plan, Skip};
use crate::passage::{self, Asked};
use crate::pool::{Hint, Pool, Refusal};
use crate::record::Record;
use crate::relay::Form;
use crate::reply::Reply;
use crate::settings::OnPrefillFailure;
use crate::upstream::{self, Deadlines, Outgoing};

/// Legs of one request in flight at once.
const LEGS_AT_ONCE: usize = 16;
/// A prefill answer is one token and its transfer parameters; `echo` adds the prompt.
const PREFILL_ANSWER_BYTES_MAX: usize = 64 << 20;
/// Transfer parameters are a few hundred bytes; a server that sends more is not believed.
const TRANSFER_PARAMS_BYTES_MAX: usize = 64 << 10;

/// What prefill tells decode.
#[derive(Default)]
struct Handoff {
    params: Option<String>,
    prompt_tokens: Option<u64>,
}

/// Answers a request for tokens.
pub async fn generate(
    app: &Arc<App>,
    generation: Generation,
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
    if app.pools.answering().is_full() {
        return passage::refuse(record, &id, passage::overloaded(Refusal::QueueFull));
    }
    let Some(fields) = Fields::parse(&body) else {
        return unreadable(app, &parts, headers, body, record).await;
    };
    if fields.contains(KV_TRANSFER_PARAMS) {
        app.metrics.params_stripped.fetch_add(1, Relaxed);
    }
    let prefix = match app.pools.look_at_prefixes() {
        true => PrefixKey::of(&fields),
        false => PrefixKey::default(),
    };
    let mut params = None;
    if let Some(pool) = app.pools.prefill() {
        match legs::plan(generation, &fields) {
            Plan::Skip(skip) => skipped(app, skip, &mut record),
            Plan::Legs(legs) => {
                let hint = Hint { work: 1, prefix: prefix.clone(), excluded: Vec::new() };
                let sender = LegSender {
                    app: app.clone(),
                    pool: pool.clone(),
                    outgoing: leg_outgoing(generation, &parts),
                    headers: headers.clone(),
                    hint,
                    limit: passage::left(app, &record, app.settings.prefill_timeout),
                };
                match prefill(&sender, legs, &mut record).await {
                    Ok(handoff) => {
                        record.prefill_prompt_tokens = handoff.prompt_tokens;
                        params = handoff.params;
                    }
                    Err(refusal) => {
                        return passage::refuse(record, &id, passage::overloaded(refusal));
                    }
                }
            }
        }
    }
    let mut excluded = Vec::new();
    if let Some(stored) = fields.get("previous_response_id") {
        excluded = passage::servers_without(app, stored.trim_matches('"'), &headers).await;
    }
    let asked = Asked {
        outgoing: Outgoing::of(&parts, headers),
        body: body::for_decode(&body, &fields, params.as_deref()),
        form: Form::Events(generation),
        hint: Hint { work: 1, prefix, excluded },
        id,
    };
    passage::ask(app, asked, record).await
}

/// A body that is no JSON object: the server says what is wrong with it. Unless it could smuggle
/// transfer parameters past us; then we do.
async fn unreadable(
    app: &Arc<App>,
    parts: &Parts,
    headers: HeaderMap,
    body: Bytes,
    mut record: Record,
) -> Response<Reply> {
    let id = headers[headers::X_REQUEST_ID].clone();
    if body::may_hide_params(&body) {
        let message = "the body is not a JSON object in UTF-8, or uses numbers that JSON does not \
                       have (NaN, Infinity)";
        return passage::refuse(record, &id, (StatusCode::BAD_REQUEST, message.to_owned()));
    }
    skipped(app, Skip::Unreadable, &mut record);
    let asked = Asked {
        outgoing: Outgoing::of(parts, headers),
        body,
        form: Form::Plain,
        hint: Hint { work: 1, ..Hint::default() },
        id,
    };
    passage::ask(app, asked, record).await
}

fn skipped(app: &App, skip: Skip, record: &mut Record) {
    if app.pools.prefill().is_some() {
        app.metrics.legs_skipped[skip as usize].fetch_add(1, Relaxed);
        record.no_prefill(skip.label());
    }
}

fn leg_outgoing(generation: Generation, parts: &Parts) -> Outgoing {
    let mut outgoing = Outgoing::of(parts, HeaderMap::new());
    outgoing.method = Method::POST;
    debug_assert_eq!(outgoing.target.path().trim_end_matches('/'), generation.path());
    outgoing
}

/// Sends all legs; their combined handoff. Only a full queue is an error: the request is turned
/// away then, rather than moved on to decode, which would be overloaded next.
async fn prefill(
    sender: &LegSender,
    legs: Vec<Bytes>,
    record: &mut Record,
) -> Result<Handoff, Refusal> {
    let started = Instant::now();
    let count = legs.len();
    let mut results = Vec::with_capacity(count);
    if let [leg] = &legs[..] {
        results.push((0, sender.send(0, leg.clone()).await));
    } else {
        let mut waiting = legs.into_iter().enumerate();
        let mut running = JoinSet::new();
        loop {
            while running.len() < LEGS_AT_ONCE {
                let Some((index, leg)) = waiting.next() else { break };
                let sender = sender.clone();
                running.spawn(async move { (index, sender.send(index, leg).await) });
            }
            match running.join_next().await {
                Some(Ok(result)) => results.push(result),
                Some(Err(_)) => {} // a panic in a leg: decode computes that prompt alone
                None => break,
            }
        }
        results.sort_by_key(|(index, _)| *index);
    }
    let mut answers = Vec::with_capacity(count);
    for (_, result) in results {
        let LegResult { servers, answer } = result;
        servers.iter().for_each(|server| record.leg(server));
        match answer {
            Ok(answer) => answers.push(answer),
            Err(LegFailure::Overloaded(refusal)) => return Err(refusal),
            Err(LegFailure::Failed) => {}
        }
    }
    let metrics = &sender.app.metrics;
    if answers.len() < count {
        metrics.decode_alone.fetch_add(1, Relaxed);
    }
    let whole = answers.len() == count;
    let tokens = answers.iter().map(|answer| answer.prompt_tokens).sum::<Option<u64>>();
    let params = combined(answers, count);
    metrics.prefill.observe(started.elapsed());
    metrics.handoffs.fetch_add(u64::from(params.is_some()), Relaxed);
    record.prefilled(started.elapsed(), params.is_some());
    Ok(Handoff { params, prompt_tokens: tokens.filter(|_| whole) })
}

/// One leg's parameters travel as they came. Those of several legs travel as a list of promises,
/// of which each prompt at decode finds its own by the last block's id.
fn combined(answers: Vec<LegAnswer>, legs: usize) -> Option<String> {
    let mut params = answers.into_iter().filter_map(|answer| answer.params);
    if legs == 1 {
        return params.next();
    }
    let promises: Vec<String> = params
        .filter_map(|params| Some(Fields::parse(params.as_bytes())?.get("ucm")?.to_owned()))
        .collect();
    if promises.is_empty() {
        return None;
    }
    let promises = promises.join(",");
    Some(format!("{{\"ucm\":{{\"version\":1,\"promises\":[{promises}]}}}}"))
}

#[derive(Clone)]
struct LegSender {
    app: Arc<App>,
    pool: Arc<Pool>,
    outgoing: Outgoing,
    headers: HeaderMap,
    hint: Hint,
    limit: Duration,
}

struct LegResult {
    servers: Vec<String>,
    answer: Result<LegAnswer, LegFailure>,
}

struct LegAnswer {
    params: Option<String>,
    prompt_tokens: Option<u64>,
}

enum LegFailure {
    Overloaded(Refusal),
    Failed,
}

impl LegSender {
    async fn send(&self, index: usize, body: Bytes) -> LegResult {
        let settings = &self.app.settings;
        let attempts = match settings.on_prefill_failure {
            OnPrefillFailure::Decode => 1,
            OnPrefillFailure::Retry => 1 + settings.retries,
        };
        let outgoing =
            Outgoing { headers: headers::for_leg(&self.headers, index), ..self.outgoing.clone() };
        let mut hint = Hint { work: body.len() as u64 + 1, ..self.hint.clone() };
        let mut servers = Vec::new();
        for attempt in 0..attempts {
            let lease = match self.pool.acquire(hint.clone()).await {
                Ok(lease) => lease,
                Err(Refusal::NoServer) => break,
                Err(full) => {
                    return LegResult { servers, answer: Err(LegFailure::Overloaded(full)) };
                }
            };
            self.app.metrics.prefill_retries.fetch_add(u64::from(attempt > 0), Relaxed);
            self.app.metrics.legs.fetch_add(1, Relaxed);
            servers.push(lease.instance.name.clone());
            let app = &self.app;
            match exchange(app, &lease.instance, &outgoing, body.clone(), self.limit).await {
                Ok(answer) => return LegResult { servers, answer: Ok(answer) },
                Err(Retry::Useless) => break,
                Err(Retry::Elsewhere) => hint.excluded.push(lease.instance.id),
            }
        }
        self.app.metrics.legs_failed.fetch_add(1, Relaxed);
        LegResult { servers, answer: Err(LegFailure::Failed) }
    }
}

enum Retry {
    Elsewhere,
    Useless,
}

/// One leg to one server. A refusal of the request itself (4xx) is the same everywhere, and decode
/// will give it to the client in its own words.
async fn exchange(
    app: &App,
    instance: &crate::instance::Instance,
    outgoing: &Outgoing,
    body: Bytes,
    limit: Duration,
) -> Result<LegAnswer, Retry> {
    let started = Instant::now();
    let deadlines = Deadlines { connect: app.settings.connect_timeout, head: limit };
    let answered = async {
        let answer = upstream::send(instance, outgoing, body, deadlines).await?;
        let status = answer.head.status;
        let body = upstream::collect(answer.body, PREFILL_ANSWER_BYTES_MAX).await;
        let body = body.map_err(|error| upstream::Failure::Broken(upstream::chain(&error)))?;
        if body.is_some() {
            instance.idle.put(answer.connection);
        }
        Ok((status, body.unwrap_or_default()))
    };
    let answered = tokio::time::timeout(limit, answered).await;
    let answered = answered.unwrap_or(Err(upstream::Failure::Timeout(limit)));
    instance.counters.seconds.observe(started.elapsed());
    match answered {
        Ok((status, body)) if status.is_success() => {
            instance.request_passed();
            Ok(read_answer(app, &body))
        }
        Ok((status, _)) if status.is_server_error() => {
            if passage::says_unwell(status) {
                instance.request_failed(&format!("it answered {status}"));
            }
            Err(Retry::Elsewhere)
        }
        Ok(_) => {
            instance.request_passed();
            Err(Retry::Useless)
        }
        Err(failure) => {
            instance.request_failed(&failure.to_string());
            Err(Retry::Elsewhere)
        }
    }
}

#[derive(Deserialize)]
struct PrefillAnswer<'a> {
    #[serde(borrow)]
    kv_transfer_params: Option<&'a RawValue>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

/// What a prefill answer says. One that cannot be read still stands for KV that was computed.
fn read_answer(app: &App, body: &Bytes) -> LegAnswer {
    let Ok(answer) = serde_json::from_slice::<PrefillAnswer>(body) else {
        return LegAnswer { params: None, prompt_tokens: None };
    };
    let params = answer.kv_transfer_params.map(RawValue::get).filter(|text| *text != "null");
    let usable =
        params.filter(|text| text.starts_with('{') && text.len() <= TRANSFER_PARAMS_BYTES_MAX);
    if params.is_some() && usable.is_none() {
        app.metrics.handoffs_unreadable.fetch_add(1, Relaxed);
    }
    let usage = answer.usage.map_or("", RawValue::get);
    LegAnswer {
        params: usable.map(str::to_owned),
        prompt_tokens: crate::relay::prompt_tokens(usage.as_bytes()),
    }
}
