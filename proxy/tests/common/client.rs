//! A client that sees every byte of an answer and when it came.

use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// Whether the body ended as announced.
    pub whole: bool,
    /// Pieces as they came, with their times.
    pub pieces: Vec<(Instant, Bytes)>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).expect("text")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|_| panic!("no JSON: {}", String::from_utf8_lossy(&self.body)))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }
}

/// An answer that is still coming; dropped, its connection closes.
pub struct Coming {
    pub response: Response<Incoming>,
    driver: Driver,
}

struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Coming {
    pub async fn next(&mut self) -> Option<Result<Bytes, hyper::Error>> {
        let frame = self.response.body_mut().frame().await?;
        Some(frame.map(|frame| frame.into_data().unwrap_or_default()))
    }

    pub async fn rest(mut self) -> Answer {
        let (mut pieces, mut body, mut whole) = (Vec::new(), Vec::new(), true);
        while let Some(piece) = self.next().await {
            match piece {
                Ok(piece) => {
                    body.extend_from_slice(&piece);
                    pieces.push((Instant::now(), piece));
                }
                Err(_) => {
                    whole = false;
                    break;
                }
            }
        }
        let status = self.response.status().as_u16();
        let headers = self.response.headers().clone();
        Answer { status, headers, body: body.into(), whole, pieces }
    }
}

/// Sends a request; returns with the head of its answer.
pub async fn send(port: u16, request: Request<Full<Bytes>>) -> Result<Coming, hyper::Error> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("the proxy listens");
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = Driver(tokio::spawn(async move {
        let _ = connection.await;
    }));
    let response = sender.send_request(request).await?;
    Ok(Coming { response, driver })
}

pub fn request(
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(path).header("host", "proxy");
    if !body.is_empty() && !headers.iter().any(|(name, _)| *name == "content-type") {
        request = request.header("content-type", "application/json");
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::new(Bytes::from(body.to_owned()))).expect("a request")
}

pub async fn post(port: u16, path: &str, body: &Value) -> Answer {
    post_text(port, path, &[], &body.to_string()).await
}

pub async fn post_text(port: u16, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let coming = send(port, request("POST", path, headers, body)).await.expect("an answer");
    coming.rest().await
}

pub async fn get(port: u16, path: &str) -> Answer {
    send(port, request("GET", path, &[], "")).await.expect("an answer").rest().await
}
