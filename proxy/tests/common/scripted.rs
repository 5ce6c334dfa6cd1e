//! An OpenAI server that does what a script says and remembers what it was asked.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use hyper::header::HeaderMap;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// What a server was asked.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Seen {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("a JSON body")
    }

    /// Whether the proxy asks how its server is: at any moment, of its own accord.
    pub fn is_probe(&self) -> bool {
        self.method == "GET" && matches!(self.path.as_str(), "/health" | "/metrics")
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }
}

/// One thing a body does.
#[derive(Clone, Debug)]
pub enum Step {
    Bytes(Bytes),
    Wait(Duration),
    /// Closes the connection in the middle.
    Cut,
    /// Says nothing more, for ever.
    Hang,
}

pub fn bytes(text: impl Into<String>) -> Step {
    Step::Bytes(Bytes::from(text.into()))
}

pub fn wait(milliseconds: u64) -> Step {
    Step::Wait(Duration::from_millis(milliseconds))
}

/// How a request is answered.
#[derive(Clone, Debug)]
pub enum Script {
    /// A whole answer with its length.
    Reply { status: u16, headers: Vec<(String, String)>, body: Bytes },
    /// A body in steps, chunked.
    Stream { status: u16, content_type: String, steps: Vec<Step> },
    /// The connection closes without an answer.
    Close,
    /// No answer, for ever.
    Hang,
    /// Another script after a while.
    Later(Duration, Box<Script>),
}

impl Script {
    pub fn json(status: u16, value: &Value) -> Self {
        let headers = vec![("content-type".to_owned(), "application/json".to_owned())];
        Self::Reply { status, headers, body: value.to_string().into() }
    }

    pub fn events(steps: Vec<Step>) -> Self {
        let content_type = "text/event-stream; charset=utf-8".to_owned();
        Self::Stream { status: 200, content_type, steps }
    }
}

type Answering = dyn Fn(&Seen) -> Script + Send + Sync;

#[derive(Default)]
struct Memory {
    seen: Mutex<Vec<Seen>>,
    /// Requests, but for probes, whose answer has not ended and whose client has not left.
    open: AtomicUsize,
    /// Requests, but for probes, whose client left before the end of the answer.
    abandoned: AtomicUsize,
}

/// A running server; stops with its value.
pub struct Server {
    pub address: SocketAddr,
    memory: Arc<Memory>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub async fn start(answering: impl Fn(&Seen) -> Script + Send + Sync + 'static) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(([127, 0, 0, 1], 0).into()).expect("a port");
        Self::on(socket.listen(4096).expect("a queue for a thousand streams"), answering)
    }

    pub fn on(
        listener: TcpListener,
        answering: impl Fn(&Seen) -> Script + Send + Sync + 'static,
    ) -> Self {
        let address = listener.local_addr().expect("an address");
        let memory = Arc::new(Memory::default());
        let task = tokio::spawn(accept(listener, memory.clone(), Arc::new(answering)));
        Self { address, memory, task }
    }

    pub fn port(&self) -> String {
        self.address.port().to_string()
    }

    /// Requests so far, but for probes.
    pub fn seen(&self) -> Vec<Seen> {
        let seen = self.memory.seen.lock().unwrap();
        seen.iter().filter(|seen| !seen.is_probe()).cloned().collect()
    }

    pub fn open(&self) -> usize {
        self.memory.open.load(SeqCst)
    }

    pub fn abandoned(&self) -> usize {
        self.memory.abandoned.load(SeqCst)
    }
}

/// A server's connections end with it, as those of a process do.
async fn accept(listener: TcpListener, memory: Arc<Memory>, answering: Arc<Answering>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { return };
        let _ = stream.set_nodelay(true);
        let (memory, answering) = (memory.clone(), answering.clone());
        connections.spawn(async move {
            let service = service_fn(|request| answer(request, memory.clone(), answering.clone()));
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(
    request: Request<Incoming>,
    memory: Arc<Memory>,
    answering: Arc<Answering>,
) -> Result<Response<Steps>, io::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let seen = Seen { method: parts.method.to_string(), path, headers: parts.headers, body };
    memory.seen.lock().unwrap().push(seen.clone());
    let guard = (!seen.is_probe()).then(|| Open::of(memory));
    let mut script = answering(&seen);
    while let Script::Later(delay, next) = script {
        tokio::time::sleep(delay).await;
        script = *next;
    }
    match script {
        Script::Reply { status, headers, body } => {
            let mut response = Response::builder().status(status);
            for (name, value) in headers {
                response = response.header(name, value);
            }
            let response = response.header("content-length", body.len());
            let steps = Steps::run(vec![Step::Bytes(body)], guard, Length::Known);
            Ok(response.body(steps).expect("a response"))
        }
        Script::Stream { status, content_type, steps } => {
            let response = Response::builder().status(status).header("content-type", content_type);
            Ok(response.body(Steps::run(steps, guard, Length::Open)).expect("a response"))
        }
        Script::Close => Err(io::Error::other("the script says close")),
        Script::Hang => {
            let _guard = guard;
            std::future::pending::<Infallible>().await;
            unreachable!()
        }
        Script::Later(..) => unreachable!(),
    }
}

/// An answer that is being given.
struct Open {
    memory: Arc<Memory>,
    ended: bool,
}

impl Open {
    fn of(memory: Arc<Memory>) -> Self {
        memory.open.fetch_add(1, SeqCst);
        Self { memory, ended: false }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.memory.open.fetch_sub(1, SeqCst);
        if !self.ended {
            self.memory.abandoned.fetch_add(1, SeqCst);
        }
    }
}

/// Whether hyper knows where a body ends: then it does not ask for what comes after its one piece.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Length {
    Known,
    Open,
}

/// A body that follows steps.
pub struct Steps {
    length: Length,
    frames: mpsc::Receiver<Result<Bytes, io::Error>>,
    guard: Option<Open>,
}

impl Steps {
    fn run(steps: Vec<Step>, guard: Option<Open>, length: Length) -> Self {
        let (sender, frames) = mpsc::channel(1);
        tokio::spawn(async move {
            for step in steps {
                let sent = match step {
                    Step::Bytes(bytes) => sender.send(Ok(bytes)).await,
                    Step::Wait(time) => {
                        tokio::time::sleep(time).await;
                        Ok(())
                    }
                    Step::Cut => sender.send(Err(io::Error::other("cut"))).await,
                    Step::Hang => {
                        sender.closed().await;
                        return;
                    }
                };
                if sent.is_err() {
                    return;
                }
            }
        });
        Self { length, frames, guard }
    }
}

impl Body for Steps {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let polled = self.frames.poll_recv(cx);
        let over = match polled {
            Poll::Ready(None | Some(Err(_))) => true,
            Poll::Ready(Some(Ok(_))) => self.length == Length::Known,
            Poll::Pending => false,
        };
        if let Some(guard) = &mut self.guard {
            guard.ended |= over;
        }
        polled.map(|frame| frame.map(|frame| frame.map(Frame::data)))
    }
}
