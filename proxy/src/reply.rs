//! Answers of the proxy itself, in the form that OpenAI clients read. Owns their wording's frame
//! and the type of every response body; does not know why something failed.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

use crate::relay::Relay;

/// Seconds after which a client that was turned away should come again.
const RETRY_AFTER_SECONDS: u32 = 1;

/// The body of an answer.
pub enum Reply {
    /// In memory.
    Full(Option<Bytes>),
    /// A server's, as it comes.
    Relay(Box<Relay>),
}

impl Body for Reply {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Relay(relay) => relay.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::Relay(_) => false, // its end is where it accounts for the request
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Relay(relay) => relay.size_hint(),
        }
    }
}

/// An answer with a body in memory.
pub fn with_body(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Reply> {
    let mut response = Response::new(Reply::Full((!body.is_empty()).then_some(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// A JSON answer.
pub fn json(status: StatusCode, value: &Value) -> Response<Reply> {
    with_body(status, "application/json", value.to_string().into())
}

/// An error in OpenAI's form. Turned away for now (503): with `Retry-After`.
pub fn error(status: StatusCode, message: &str) -> Response<Reply> {
    let mut response = json(status, &error_value(status, message));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
    }
    response
}

/// The body of [`error`].
pub fn error_value(status: StatusCode, message: &str) -> Value {
    let kind = match status {
        StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
        StatusCode::GATEWAY_TIMEOUT => "GatewayTimeoutError",
        StatusCode::BAD_GATEWAY => "BadGatewayError",
        status if status.is_client_error() => "BadRequestError",
        _ => "InternalServerError",
    };
    json!({"error": {"message": message, "type": kind, "param": null, "code": status.as_u16()}})
}
