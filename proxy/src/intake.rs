//! A client's request body on its way in: whole, into memory, within a size and a time. Owns these
//! limits; does not know what the body says.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{EXPECT, HeaderMap};
use tokio::time::{Sleep, timeout};

use crate::app::App;
use crate::passage::Refused;
use crate::upstream;

/// A body that comes at this rate is never too slow.
const BYTES_PER_SECOND_MIN: f64 = 65_536.0;
/// The rest of a body that is too large is thrown away before the refusal, for so long at most and
/// until the client is silent for so long: most clients read an answer only after they have sent
/// everything, and a connection that closes before is all that they would see.
const DISCARD_MAX: Duration = Duration::from_secs(10);
const DISCARD_SILENCE_MAX: Duration = Duration::from_millis(500);

/// Reads a request's body, up to the limit.
pub async fn read(app: &App, headers: &HeaderMap, body: Incoming) -> Result<Bytes, Refused> {
    let limit = app.settings.max_body;
    let mut body = Paced::new(body, app.settings.body_timeout);
    let announced = body.size_hint().lower() > limit as u64;
    let read = if announced { Ok(None) } else { upstream::collect(&mut body, limit).await };
    match read {
        Ok(Some(bytes)) => Ok(bytes),
        Ok(None) => {
            // A client that asks first has sent nothing yet.
            if !(announced && headers.contains_key(EXPECT)) {
                discard(body).await;
            }
            let why = format!("the body is larger than {limit} bytes (--max-body-mb)");
            Err((StatusCode::PAYLOAD_TOO_LARGE, why))
        }
        Err(TooSlow::Late) => {
            Err((StatusCode::REQUEST_TIMEOUT, "the body did not come in time".to_owned()))
        }
        Err(TooSlow::Broken(error)) => {
            Err((StatusCode::BAD_REQUEST, format!("the body broke off: {error}")))
        }
    }
}

async fn discard(mut body: Paced) {
    let all = async {
        while let Ok(Some(Ok(_))) =
            timeout(DISCARD_SILENCE_MAX, upstream::next_frame(&mut body)).await
        {}
    };
    // Its end, its silence or its length: the refusal follows in any case.
    let _ = timeout(DISCARD_MAX, all).await;
}

/// A client's body with a deadline that moves with what came.
struct Paced {
    body: Incoming,
    timer: Pin<Box<Sleep>>,
}

enum TooSlow {
    Late,
    Broken(hyper::Error),
}

impl Paced {
    fn new(body: Incoming, timeout: Duration) -> Self {
        Self { body, timer: Box::pin(tokio::time::sleep(timeout)) }
    }
}

impl Body for Paced {
    type Data = Bytes;
    type Error = TooSlow;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, TooSlow>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            ready!(self.timer.as_mut().poll(cx));
            return Poll::Ready(Some(Err(TooSlow::Late)));
        };
        if let Some(data) = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref()) {
            let earned = Duration::from_secs_f64(data.len() as f64 / BYTES_PER_SECOND_MIN);
            let deadline = self.timer.deadline() + earned;
            self.timer.as_mut().reset(deadline);
        }
        Poll::Ready(frame.map(|frame| frame.map_err(TooSlow::Broken)))
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
