//! WebSockets (realtime endpoints): once a server agrees to switch protocols, bytes go both ways
//! unread until one side ends. Owns the switch and the copying; does not know what is said.

use std::sync::Arc;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use hyper::upgrade::{self, OnUpgrade};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;

use crate::app::App;
use crate::headers;
use crate::metrics::Outcome;
use crate::passage;
use crate::pool::{Hint, Lease};
use crate::record::Record;
use crate::reply::Reply;
use crate::upstream::{self, Connection, Deadlines, Outgoing};

/// Whether a client asks for a WebSocket. Other upgrades (h2c) may be ignored, and are.
pub fn is_asked_for(request: &Request<Incoming>) -> bool {
    let value = request.headers().get(UPGRADE).and_then(|value| value.to_str().ok());
    request.method() == Method::GET && value.is_some_and(|v| v.eq_ignore_ascii_case("websocket"))
}

/// Both ends of a tunnel that is about to open, and what it holds until it closes.
struct Tunnel {
    client: OnUpgrade,
    server: OnUpgrade,
    connection: Connection,
    lease: Lease,
    record: Record,
}

/// Asks one server for a WebSocket and connects the two.
pub async fn open(
    app: &Arc<App>,
    mut request: Request<Incoming>,
    mut record: Record,
) -> Response<Reply> {
    let client = upgrade::on(&mut request);
    let (parts, _) = request.into_parts();
    let (mut headers, id) = headers::toward_servers(&parts.headers, app.key.as_ref());
    ask_for_websocket(&mut headers);
    record.request(id.to_str().unwrap_or_default(), 0);
    let hint = Hint { work: 1, ..Hint::default() };
    let lease = match app.pools.answering().acquire(hint).await {
        Ok(lease) => lease,
        Err(refusal) => return passage::refuse(record, &id, passage::overloaded(refusal)),
    };
    record.sent_to(&lease.instance, false);
    let outgoing = Outgoing::of(&parts, headers);
    let settings = &app.settings;
    let deadlines =
        Deadlines { connect: settings.connect_timeout, head: settings.first_byte_timeout };
    let instance = &lease.instance;
    let answer = match upstream::send_fresh(instance, &outgoing, Bytes::new(), deadlines).await {
        Ok(answer) => answer,
        Err(failure) => {
            instance.request_failed(&failure.to_string());
            let why = format!("{} server {} {failure}", instance.role, instance.name);
            return passage::refuse(record, &id, (StatusCode::BAD_GATEWAY, why));
        }
    };
    if answer.head.status != StatusCode::SWITCHING_PROTOCOLS {
        let whole = upstream::collect(answer.body, settings.max_body).await.ok().flatten();
        let mut response = Response::from_parts(answer.head, Reply::Full(whole));
        record.status(response.status().as_u16());
        record.finish(Outcome::Finished);
        headers::toward_client(response.headers_mut(), &id);
        return response;
    }
    let mut response = Response::from_parts(answer.head, Reply::Full(None));
    let server = upgrade::on(&mut response);
    headers::toward_client(response.headers_mut(), &id);
    ask_for_websocket(response.headers_mut());
    record.status(StatusCode::SWITCHING_PROTOCOLS.as_u16());
    let tunnel = Tunnel { client, server, connection: answer.connection, lease, record };
    tokio::spawn(tunnel.run());
    response
}

/// The two headers that every hop has to say by itself.
fn ask_for_websocket(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

impl Tunnel {
    async fn run(self) {
        let Self { client, server, connection, lease, mut record } = self;
        let (Ok(client), Ok(server)) = tokio::join!(client, server) else { return };
        drop(connection); // its socket is the tunnel's now
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        // Either side may break off: that is how WebSockets often end.
        if let Ok((_, bytes)) = copy_bidirectional(&mut client, &mut server).await {
            record.bytes_out(bytes as usize);
        }
        lease.instance.request_passed();
        record.finish(Outcome::Finished);
    }
}
