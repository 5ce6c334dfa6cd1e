//! An answer on its way from a server to the client: the same bytes, as they come. Owns the lease,
//! the connection and the record until the end; watches the stream without changing it, and ends a
//! stream that broke off with an error that clients understand.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use memchr::memmem;
use serde_json::json;
use tokio::time::{Instant, Sleep};

use crate::endpoint::Generation;
use crate::log;
use crate::metrics::Outcome;
use crate::pool::Lease;
use crate::record::Record;
use crate::reply::error_value;
use crate::upstream::{Connection, chain};

/// Bytes of a stream's end that are kept, to see how it ended.
const TAIL_BYTES: usize = 32;

/// What kind of answer this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Server-sent events in this dialect.
    Events(Generation),
    /// Anything else.
    Plain,
}

/// Limits while the answer flows.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Longest silence.
    pub idle: Duration,
    /// When the request must be over.
    pub deadline: Option<Instant>,
}

/// Where an answer comes from.
pub struct Source {
    /// The rest of its body.
    pub body: Incoming,
    /// What was read of the body already.
    pub first: Option<Bytes>,
    /// The connection, kept for the next request when the body ended well.
    pub connection: Connection,
    /// The right to use the server.
    pub lease: Lease,
    /// Whether the body ends only where its connection does, so that a cut looks like an end.
    pub ends_with_connection: bool,
}

/// An answer's body.
pub struct Relay {
    body: Incoming,
    first: Option<Bytes>,
    connection: Option<Connection>,
    lease: Lease,
    ends_with_connection: bool,
    record: Record,
    form: Form,
    pace: Pace,
    timer: Pin<Box<Sleep>>,
    watch: Watch,
    sent: std::time::Instant,
    over: bool,
}

impl Relay {
    /// Begins to pass an answer on.
    pub fn new(source: Source, record: Record, form: Form, pace: Pace) -> Self {
        Self {
            body: source.body,
            first: source.first,
            connection: Some(source.connection),
            lease: source.lease,
            ends_with_connection: source.ends_with_connection,
            record,
            form,
            pace,
            timer: Box::pin(tokio::time::sleep_until(wake_at(pace))),
            watch: Watch::default(),
            sent: std::time::Instant::now(),
            over: false,
        }
    }

    /// See [`Body::poll_frame`].
    pub fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if self.over {
            return Poll::Ready(None);
        }
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(self.pass(Frame::data(first)))));
        }
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(Some(Ok(self.pass(frame)))),
            Poll::Ready(Some(Err(error))) => {
                let why = format!("broke off: {}", chain(&error));
                Poll::Ready(self.break_off(&why, Outcome::BrokenOff))
            }
            Poll::Ready(None) => Poll::Ready(self.end()),
            Poll::Pending => {
                ready!(self.timer.as_mut().poll(cx));
                let total = self.pace.deadline.is_some_and(|deadline| deadline <= Instant::now());
                let why = if total {
                    "did not finish before the request's deadline".to_owned()
                } else {
                    format!("was silent for {} s", self.pace.idle.as_secs_f64())
                };
                Poll::Ready(self.break_off(&why, Outcome::Deadline))
            }
        }
    }

    /// See [`Body::size_hint`]. A stream of events may get an error at its end, so its length is
    /// open.
    pub fn size_hint(&self) -> SizeHint {
        match self.form {
            Form::Events(_) => SizeHint::default(),
            Form::Plain => {
                let mut hint = self.body.size_hint();
                let first = self.first.as_ref().map_or(0, Bytes::len) as u64;
                match hint.exact() {
                    Some(rest) => hint.set_exact(rest + first),
                    None => hint = SizeHint::default(),
                }
                hint
            }
        }
    }

    fn pass(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        if let Some(data) = frame.data_ref() {
            self.record.bytes_out(data.len());
            self.watch.see(data, self.form);
            self.timer.as_mut().reset(wake_at(self.pace));
        }
        frame
    }

    fn end(&mut self) -> Option<Result<Frame<Bytes>, io::Error>> {
        if let Form::Events(generation) = self.form
            && self.lacks_end(generation)
        {
            return self.break_off("closed the stream before its end", Outcome::BrokenOff);
        }
        self.lease.instance.request_passed();
        if let Some(connection) = self.connection.take() {
            self.lease.instance.idle.put(connection);
        }
        self.finish(Outcome::Finished);
        None
    }

    /// A body that ends where its connection ends looks whole wherever it is cut.
    fn lacks_end(&self, generation: Generation) -> bool {
        generation.ends_with_done()
            && !self.watch.done_seen
            && !self.watch.error_seen
            && self.ends_with_connection
    }

    fn break_off(
        &mut self,
        why: &str,
        outcome: Outcome,
    ) -> Option<Result<Frame<Bytes>, io::Error>> {
        let instance = &self.lease.instance;
        let message = format!("{} server {} {why}", instance.role, instance.name);
        instance.request_failed(why);
        log::warn(format!("after the first byte of an answer: {message}"));
        self.connection = None;
        self.finish(outcome);
        match self.form {
            Form::Events(generation) => {
                let event = error_event(generation, &message, self.watch.is_between_events());
                self.record.bytes_out(event.len());
                Some(Ok(Frame::data(event)))
            }
            // Its length was announced, so only a broken connection says that this is not all.
            Form::Plain => Some(Err(io::Error::other(message))),
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        self.over = true;
        self.lease.instance.counters.seconds.observe(self.sent.elapsed());
        self.record.answer(self.watch.events, self.watch.prompt_tokens);
        self.record.finish(outcome);
    }
}

fn wake_at(pace: Pace) -> Instant {
    let idle = Instant::now() + pace.idle;
    pace.deadline.map_or(idle, |deadline| idle.min(deadline))
}

/// The last event of a stream that broke off. When it was cut inside an event, that one is closed
/// first, so that the error stands alone. No `[DONE]` follows: it is not done.
fn error_event(generation: Generation, message: &str, between_events: bool) -> Bytes {
    let separator = if between_events { "" } else { "\n\n" };
    let event = match generation {
        Generation::Completions | Generation::Chat | Generation::Tokens => {
            format!("data: {}\n\n", error_value(StatusCode::BAD_GATEWAY, message))
        }
        Generation::Messages => {
            let error =
                json!({"type": "error", "error": {"type": "api_error", "message": message}});
            format!("event: error\ndata: {error}\n\n")
        }
        Generation::Responses => {
            let error = json!({"type": "error", "code": "server_error", "message": message,
                "param": null});
            format!("event: error\ndata: {error}\n\n")
        }
    };
    format!("{separator}{event}").into()
}

/// What is learned from a stream while it passes.
#[derive(Default)]
struct Watch {
    events: u64,
    prompt_tokens: Option<u64>,
    done_seen: bool,
    error_seen: bool,
    tail: [u8; TAIL_BYTES],
    any: bool,
}

impl Watch {
    fn see(&mut self, data: &[u8], form: Form) {
        if data.is_empty() {
            return;
        }
        if let Some(tokens) = prompt_tokens(data) {
            self.prompt_tokens = Some(tokens);
        }
        self.any = true;
        if form == Form::Plain {
            return;
        }
        self.events += memmem::find_iter(data, b"data:").count() as u64;
        let kept = TAIL_BYTES.saturating_sub(data.len());
        self.tail.copy_within(TAIL_BYTES - kept.., 0);
        let new = &data[data.len().saturating_sub(TAIL_BYTES)..];
        self.tail[kept..].copy_from_slice(new);
        self.done_seen |= memmem::find(&self.tail, b"[DONE]").is_some();
        self.error_seen |= memmem::find(data, b"\"error\":").is_some();
    }

    fn is_between_events(&self) -> bool {
        !self.any || self.tail.ends_with(b"\n\n") || self.tail.ends_with(b"\r\n\r\n")
    }
}

/// The prompt's tokens as the answer's usage counts them: `prompt_tokens`, or `input_tokens` where
/// that is its name. Inside generated text the quotes would be escaped and do not match.
pub fn prompt_tokens(data: &[u8]) -> Option<u64> {
    const NAMES: [&[u8]; 2] = [b"\"prompt_tokens\":", b"\"input_tokens\":"];
    let at = NAMES.iter().find_map(|name| Some(memmem::rfind(data, name)? + name.len()))?;
    let text = data[at..].trim_ascii_start();
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&text[..digits]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_understood_across_chunk_borders() {
        // Goal: the end mark is found when it comes in pieces, and events are counted.
        let mut watch = Watch::default();
        let form = Form::Events(Generation::Chat);
        for piece in ["data: {\"a\":1}\n\ndata: {}\n", "\n", "data: [DO", "NE]\n", "\n"] {
            watch.see(piece.as_bytes(), form);
        }
        assert!(watch.done_seen && watch.is_between_events());
        assert_eq!(watch.events, 3);
        let mut cut = Watch::default();
        cut.see(b"data: {\"tex", form);
        assert!(!cut.is_between_events() && !cut.done_seen);
    }

    #[test]
    fn prompt_tokens_are_read_from_usage_and_not_from_text() {
        // Goal: both names, spacing, and text that quotes the name.
        assert_eq!(prompt_tokens(br#"{"usage":{"prompt_tokens": 17,"total":1}}"#), Some(17));
        assert_eq!(prompt_tokens(br#"{"usage":{"input_tokens":4}}"#), Some(4));
        assert_eq!(prompt_tokens(br#"{"text":"\"prompt_tokens\":5"}"#), None);
        assert_eq!(prompt_tokens(br#"{"usage":{"prompt_tokens":null}}"#), None);
    }
}
