//! Sending one request to one server. Owns connections, their reuse and the deadlines of an
//! exchange; does not know what is sent, nor what happens when it fails.
//!
//! A connection that is dropped before its answer was read to the end is closed at once: that is
//! how a server learns that nobody wants the answer any more.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderMap, HeaderValue};
use hyper::http::{request, response};
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::instance::{Address, Instance};
use crate::socket;

/// Idle connections are not used after this: uvicorn closes them after 5 s, and a request written
/// into a connection that is being closed is lost.
const IDLE_MAX: Duration = Duration::from_secs(2);
/// Idle connections kept to one server.
const IDLE_CONNECTIONS_MAX: usize = 512;
/// A connection whose answer has just ended is ready for the next request within this.
const READY_MAX: Duration = Duration::from_millis(20);
/// A kept connection that the server was closing while a request was written into it says so
/// within a round trip. One that breaks later had a server that worked on the request.
const STALE_MAX: Duration = Duration::from_secs(1);

/// Deadlines of one exchange.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// To connect.
    pub connect: Duration,
    /// From sending until the head of the answer.
    pub head: Duration,
}

/// Why an exchange failed.
#[derive(Clone, Debug)]
pub enum Failure {
    /// The server cannot be reached.
    Connect(String),
    /// The connection ended before any answer.
    Closed(String),
    /// The connection ended within the answer or spoke no HTTP.
    Broken(String),
    /// The connection had ended before the request went out.
    Unsent,
    /// No answer in this time.
    Timeout(Duration),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Connect(why) => write!(f, "cannot be reached: {why}"),
            Self::Closed(why) | Self::Broken(why) => write!(f, "broke the connection: {why}"),
            Self::Unsent => f.write_str("closed the connection"),
            Self::Timeout(after) => write!(f, "did not answer within {} s", after.as_secs_f64()),
        }
    }
}

/// A request body in memory.
pub struct SendBody(Option<Bytes>);

impl SendBody {
    fn of(bytes: &Bytes) -> Self {
        Self((!bytes.is_empty()).then(|| bytes.clone()))
    }
}

impl Body for SendBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.get_mut().0.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.as_ref().map_or(0, Bytes::len) as u64)
    }
}

/// A connection to a server; closes when dropped.
pub struct Connection {
    sender: http1::SendRequest<SendBody>,
    driver: JoinHandle<()>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Connections that wait for their next request, the youngest last.
#[derive(Default)]
pub struct IdleConnections(Mutex<Vec<(Connection, Instant)>>);

impl IdleConnections {
    fn take(&self) -> Option<Connection> {
        let mut idle = self.0.lock().expect("no panic while held");
        while let Some((connection, since)) = idle.pop() {
            if since.elapsed() > IDLE_MAX {
                idle.clear(); // all others are older
                return None;
            }
            if !connection.sender.is_closed() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection whose answer was read to its end.
    pub fn put(&self, connection: Connection) {
        if connection.sender.is_closed() {
            return;
        }
        let mut idle = self.0.lock().expect("no panic while held");
        if idle.len() < IDLE_CONNECTIONS_MAX {
            idle.push((connection, Instant::now()));
        }
    }

    /// Closes what was idle for too long.
    pub fn sweep(&self) {
        let mut idle = self.0.lock().expect("no panic while held");
        idle.retain(|(connection, since)| {
            since.elapsed() <= IDLE_MAX && !connection.sender.is_closed()
        });
    }
}

/// What to send, but for the body.
#[derive(Clone)]
pub struct Outgoing {
    /// Method.
    pub method: Method,
    /// Path and query.
    pub target: Uri,
    /// Headers, without those that the connection sets.
    pub headers: HeaderMap,
}

impl Outgoing {
    fn request(&self, instance: &Instance, body: SendBody) -> Request<SendBody> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.target.clone();
        *request.headers_mut() = self.headers.clone();
        let host = HeaderValue::from_str(&instance.name);
        request.headers_mut().insert(HOST, host.unwrap_or(HeaderValue::from_static("localhost")));
        request
    }

    /// The client's request as it is, with other headers.
    pub fn of(parts: &request::Parts, headers: HeaderMap) -> Self {
        let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
        let target = target.parse().unwrap_or_else(|_| Uri::from_static("/"));
        Self { method: parts.method.clone(), target, headers }
    }
}

/// The answer of a server.
pub struct Answer {
    /// Status and headers.
    pub head: response::Parts,
    /// The body.
    pub body: Incoming,
    /// To be put back when the body has ended.
    pub connection: Connection,
}

/// Sends a request. A kept connection may be closed by its server at any moment, also while the
/// request is on its way: when it ends at once and without any answer, the request is sent again,
/// once, on a fresh connection, whose end is the server's.
pub async fn send(
    instance: &Instance,
    outgoing: &Outgoing,
    body: Bytes,
    deadlines: Deadlines,
) -> Result<Answer, Failure> {
    instance.counters.requests.fetch_add(1, Relaxed);
    while let Some(mut connection) = instance.idle.take() {
        if !is_ready(&mut connection).await {
            continue;
        }
        let sent = Instant::now();
        let request = outgoing.request(instance, SendBody::of(&body));
        match exchange(connection, request, deadlines.head).await {
            Err(Failure::Unsent) => continue,
            Err(Failure::Closed(_)) if sent.elapsed() < STALE_MAX => break,
            other => return other,
        }
    }
    send_fresh(instance, outgoing, body, deadlines).await
}

/// Sends a request that is about the server itself, on a fresh connection: an idle one says nothing
/// about whether new ones are taken. Not counted.
pub async fn probe(
    instance: &Instance,
    outgoing: &Outgoing,
    deadlines: Deadlines,
) -> Result<Answer, Failure> {
    send_fresh(instance, outgoing, Bytes::new(), deadlines).await
}

/// Sends a request on a connection of its own. Not counted.
pub async fn send_fresh(
    instance: &Instance,
    outgoing: &Outgoing,
    body: Bytes,
    deadlines: Deadlines,
) -> Result<Answer, Failure> {
    let connection = connect(instance, deadlines.connect).await?;
    exchange(connection, outgoing.request(instance, SendBody::of(&body)), deadlines.head).await
}

async fn is_ready(connection: &mut Connection) -> bool {
    connection.sender.is_ready()
        || matches!(timeout(READY_MAX, connection.sender.ready()).await, Ok(Ok(())))
}

async fn exchange(
    mut connection: Connection,
    request: Request<SendBody>,
    limit: Duration,
) -> Result<Answer, Failure> {
    match timeout(limit, connection.sender.send_request(request)).await {
        Ok(Ok(response)) => {
            let (head, body) = response.into_parts();
            Ok(Answer { head, body, connection })
        }
        Ok(Err(error)) if error.is_canceled() => Err(Failure::Unsent),
        Ok(Err(error)) if is_end(&error) => Err(Failure::Closed(chain(&error))),
        Ok(Err(error)) => Err(Failure::Broken(chain(&error))),
        Err(_) => Err(Failure::Timeout(limit)),
    }
}

/// Whether an error before an answer's head is the end of the connection, and not what was said.
fn is_end(error: &hyper::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let cause = std::error::Error::source(error);
    let cause = cause.and_then(|cause| cause.downcast_ref::<std::io::Error>());
    error.is_incomplete_message()
        || cause.is_some_and(|cause| {
            matches!(cause.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
        })
}

async fn connect(instance: &Instance, limit: Duration) -> Result<Connection, Failure> {
    let unreachable = |error: std::io::Error| Failure::Connect(error.to_string());
    let connecting = async {
        let Address { host, port, .. } = &instance.address;
        let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(unreachable)?;
        // Best effort: without these options it works, later.
        let _ = socket::tune(&stream);
        let Some(tls) = &instance.tls else { return handshake(stream).await };
        let name = ServerName::try_from(host.clone())
            .map_err(|error| Failure::Connect(format!("`{host}` in TLS: {error}")))?;
        let stream = tls.connect(name, stream).await;
        handshake(stream.map_err(|error| Failure::Connect(format!("TLS: {error}")))?).await
    };
    timeout(limit, connecting).await.unwrap_or_else(|_| {
        Err(Failure::Connect(format!("no connection within {} s", limit.as_secs_f64())))
    })
}

async fn handshake<S>(stream: S) -> Result<Connection, Failure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, driver) = http1::Builder::new()
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| Failure::Broken(chain(&error)))?;
    let driver = tokio::spawn(async move {
        // Its errors reach the request in flight, if there is one.
        let _ = driver.with_upgrades().await;
    });
    Ok(Connection { sender, driver })
}

/// An error with its causes, which hyper keeps apart.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Reads a body to its end, at most `limit` bytes; `None` is one that is longer.
pub async fn collect<B>(mut body: B, limit: usize) -> Result<Option<Bytes>, B::Error>
where
    B: Body<Data = Bytes> + Unpin,
{
    let mut first = Bytes::new();
    let mut rest: Vec<u8> = Vec::new();
    while let Some(frame) = next_frame(&mut body).await {
        let Ok(data) = frame?.into_data() else { continue };
        if first.len() + rest.len() + data.len() > limit {
            return Ok(None);
        }
        if first.is_empty() && rest.is_empty() {
            first = data; // the usual case: one frame, no copy
        } else {
            if rest.is_empty() {
                rest.extend_from_slice(&std::mem::take(&mut first));
            }
            rest.extend_from_slice(&data);
        }
    }
    Ok(Some(if rest.is_empty() { first } else { rest.into() }))
}

/// The next frame of a body.
pub fn next_frame<B>(body: &mut B) -> impl Future<Output = Option<Result<Frame<Bytes>, B::Error>>>
where
    B: Body<Data = Bytes> + Unpin,
{
    std::future::poll_fn(move |cx| Pin::new(&mut *body).poll_frame(cx))
}

/// Resolves every name, so that a misspelt one is an error at start and not at the first request.
pub async fn resolve(address: &Address) -> Result<(), String> {
    match tokio::net::lookup_host((address.host.as_str(), address.port)).await {
        Ok(found) => match found.count() {
            0 => Err(format!("the name `{}` has no address", address.host)),
            _ => Ok(()),
        },
        Err(error) => Err(format!("the name `{}` cannot be resolved: {error}", address.host)),
    }
}
