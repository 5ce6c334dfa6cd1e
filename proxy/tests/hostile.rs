//! Connections that are cut, slow, shared, reused or upgraded in ways that well-behaved libraries
//! never show.
#![allow(missing_docs, reason = "a test")]
#![forbid(unsafe_code)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use common::client::{get, post, post_text, request, send};
use common::proxy::Proxy;
use common::raw::{ok, read_request, read_rest, serve, talk};
use common::scripted::{Script, Seen, Server, Step, bytes};
use common::{block_on, eventually};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const STREAM: &str = "{\"prompt\":\"x\",\"stream\":true}";

async fn worker(port: &str, more: &str) -> Proxy {
    let line =
        format!("--worker-hosts 127.0.0.1 --worker-ports {port} --probe-interval-s 60 {more}");
    let options: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    Proxy::start(&options, &[]).await
}

/// Answers with what it was asked.
fn echo(seen: &Seen) -> Script {
    if seen.method == "GET" {
        return Script::json(200, &json!({"path": seen.path}));
    }
    if seen.body.as_ref() == STREAM.as_bytes() {
        return Script::events(vec![bytes("data: {}\n\n"), bytes("data: [DONE]\n\n")]);
    }
    let body = String::from_utf8_lossy(&seen.body);
    Script::json(200, &json!({"path": seen.path, "body": body}))
}

#[derive(Clone, Copy, Debug)]
enum Closing {
    /// Reads the next request and ends the connection.
    AfterReading,
    /// Ends it with a reset, the request unread.
    Unread,
    /// Ends it right after the answer, without having said so.
    AfterAnswer,
}

#[test]
fn kept_connections_that_close_cost_no_request() {
    // Goal: each way in which a server closes a kept connection under a request; with one server
    // only, every request is answered, and answered once.
    for closing in [Closing::AfterReading, Closing::Unread, Closing::AfterAnswer] {
        block_on(async {
            let answered = Arc::new(AtomicUsize::new(0));
            let count = answered.clone();
            let port = serve(move |mut stream, _| {
                let count = count.clone();
                async move {
                    let Some(request) = read_request(&mut stream).await else { return };
                    count.fetch_add(usize::from(request.starts_with("POST")), SeqCst);
                    let _ = stream.write_all(ok("{}").as_bytes()).await;
                    match closing {
                        Closing::AfterAnswer => {}
                        Closing::AfterReading => drop(read_request(&mut stream).await),
                        Closing::Unread => {
                            let _ = stream.readable().await; // what is there stays unread: a reset
                        }
                    }
                }
            })
            .await;
            let proxy = worker(&port, "").await;
            for _ in 0..30 {
                let answer = post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await;
                assert_eq!(answer.status, 200, "{closing:?}: {}", answer.text());
            }
            assert_eq!(answered.load(SeqCst), 30, "{closing:?}");
            let failures = proxy.metric("ucm_proxy_instance_failures_total").await;
            assert_eq!(failures, 0.0, "{closing:?}: an idle connection that closes is no failure");
        });
    }
}

#[test]
fn a_fresh_connection_that_closes_is_not_tried_again_at_that_server() {
    // Goal: a server that takes a request and closes gets it once; the other one answers.
    block_on(async {
        let taken = Arc::new(AtomicUsize::new(0));
        let count = taken.clone();
        let port = serve(move |mut stream, _| {
            let count = count.clone();
            async move {
                let request = read_request(&mut stream).await;
                let is_probe = request.is_some_and(|text| text.starts_with("GET"));
                count.fetch_add(usize::from(!is_probe), SeqCst);
            }
        })
        .await;
        let good = Server::start(echo).await;
        let line = format!(
            "--worker-hosts 127.0.0.1 127.0.0.1 --worker-ports {port} {} --routing round-robin \
             --eject-after 0 --probe-interval-s 60",
            good.port()
        );
        let options: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let proxy = Proxy::start(&options, &[]).await;
        for _ in 0..4 {
            let answer = post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await;
            assert_eq!(answer.status, 200);
        }
        assert_eq!((taken.load(SeqCst), good.seen().len()), (2, 4));
    });
}

#[test]
fn bytes_after_an_answer_are_not_the_next_answer() {
    // Goal: a server that sends more than it announced does not speak for later requests.
    block_on(async {
        let port = serve(|mut stream, _| async move {
            while read_request(&mut stream).await.is_some() {
                let answer = format!("{}{}", ok("{\"of\":\"me\"}"), ok("{\"of\":\"nobody\"}"));
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        })
        .await;
        let proxy = worker(&port, "").await;
        for _ in 0..20 {
            let answer = post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await;
            assert_eq!(answer.text(), "{\"of\":\"me\"}");
        }
    });
}

#[test]
fn old_and_odd_clients_are_served() {
    // Goal: HTTP/1.0, pipelining, expectations, chunks with extensions and trailers, absolute
    // targets: all answered; what is ambiguous or not ours is refused.
    block_on(async {
        let server = Server::start(echo).await;
        let proxy = worker(&server.port(), "").await;
        let port = proxy.port;
        let length = STREAM.len();
        let old =
            format!("POST /v1/completions HTTP/1.0\r\ncontent-length: {length}\r\n\r\n{STREAM}");
        let answer = talk(port, old.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
        assert!(answer.ends_with("\r\n\r\ndata: {}\n\ndata: [DONE]\n\n"), "no chunks: {answer}");
        let piped = "GET /a HTTP/1.1\r\nhost: p\r\n\r\nGET /b HTTP/1.1\r\nhost: p\r\n\r\n";
        let answer = talk(port, piped.as_bytes()).await;
        let (first, second) = (answer.find("\"/a\""), answer.find("\"/b\""));
        assert!(first.is_some() && first < second, "{answer}");
        let chunked = "POST /v1/completions HTTP/1.1\r\nhost: p\r\ntransfer-encoding: chunked\r\n\
                       trailer: x-sum\r\nconnection: close\r\n\r\n\
                       8;note=1\r\n{\"prompt\r\n5\r\n\":\"y\"\r\n1\r\n}\r\n0\r\nx-sum: 1\r\n\r\n";
        let answer = talk(port, chunked.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(server.seen().last().unwrap().body, "{\"prompt\":\"y\"}");
        let absolute = "GET http://elsewhere/v1/models?a=b HTTP/1.1\r\nhost: elsewhere\r\n\
                        connection: close\r\n\r\n";
        assert!(talk(port, absolute.as_bytes()).await.contains("\"/v1/models?a=b\""));
        for refused in [
            "CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: p\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
            "POST / HTTP/1.1\r\nhost: p\r\ntransfer-encoding: gzip\r\n\r\n",
            "nonsense\r\n\r\n",
        ] {
            let answer = talk(port, refused.as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 40"), "{refused}: {answer}");
        }
        assert_eq!(get(port, "/v1/models").await.status, 200, "and goes on");
    });
}

#[test]
fn a_client_that_waits_for_100_gets_it() {
    // Goal: the body is asked for when it is wanted, and not when it is too large.
    block_on(async {
        let server = Server::start(echo).await;
        let proxy = worker(&server.port(), "--max-body-mb 1").await;
        for (length, expected) in [(2, "HTTP/1.1 100"), (2 << 20, "HTTP/1.1 413")] {
            let mut stream = TcpStream::connect(("127.0.0.1", proxy.port)).await.unwrap();
            let head = format!(
                "POST /v1/completions HTTP/1.1\r\nhost: p\r\nexpect: 100-continue\r\n\
                 content-length: {length}\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(String::from_utf8_lossy(&answer), expected);
            if length == 2 {
                stream.write_all(b"{}").await.unwrap();
                assert!(read_rest(&mut stream).await.contains("HTTP/1.1 200"));
                assert_eq!(server.seen().last().unwrap().header("expect"), "");
            }
        }
    });
}

#[test]
fn slow_clients_are_let_go() {
    // Goal: heads and bodies that trickle end; a large body that comes steadily does not.
    block_on(async {
        let server = Server::start(echo).await;
        let proxy = worker(&server.port(), "--body-timeout-s 0.5").await;
        let mut head = TcpStream::connect(("127.0.0.1", proxy.port)).await.unwrap();
        head.write_all(b"POST /v1/completions HTTP/1.1\r\nx-slow: ").await.unwrap();
        let mut body = TcpStream::connect(("127.0.0.1", proxy.port)).await.unwrap();
        let start = "POST /v1/completions HTTP/1.1\r\nhost: p\r\ncontent-length: 1000\r\n\r\n";
        body.write_all(start.as_bytes()).await.unwrap();
        let trickle = async {
            while head.write_all(b"v").await.is_ok() {
                let _ = body.write_all(b" ").await;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(20), trickle).await;
        assert!(ended.is_ok(), "a head that trickles is cut off");
        assert!(read_rest(&mut body).await.starts_with("HTTP/1.1 408"));
        // 1 MiB in 1 s: longer than the timeout, and fast enough.
        let mut steady = TcpStream::connect(("127.0.0.1", proxy.port)).await.unwrap();
        let start = "POST /x HTTP/1.1\r\nhost: p\r\ncontent-type: text/plain\r\n\
                     content-length: 1048576\r\nconnection: close\r\n\r\n";
        steady.write_all(start.as_bytes()).await.unwrap();
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(125)).await;
            steady.write_all(&[b'x'; 131_072]).await.unwrap();
        }
        assert!(read_rest(&mut steady).await.starts_with("HTTP/1.1 200"));
        assert_eq!(server.seen().len(), 1, "nothing of the slow ones reached a server");
    });
}

#[test]
fn invalid_json_is_the_servers_to_refuse() {
    // Goal: the server's own words reach the client; no leg is sent for it.
    block_on(async {
        let prefill = Server::start(echo).await;
        let refuses = |seen: &Seen| match seen.method.as_str() {
            "GET" => Script::json(200, &json!({})),
            _ => Script::json(422, &json!({"detail": "JSON decode error"})),
        };
        let decode = Server::start(refuses).await;
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        for body in ["", "{", "[1]", "\"x\"", "{\"a\":}", "{\"n\":NaN}", "null"] {
            let answer = post_text(proxy.port, "/v1/completions", &[], body).await;
            assert_eq!(
                (answer.status, answer.text().as_str()),
                (422, "{\"detail\":\"JSON decode error\"}")
            );
            assert_eq!(decode.seen().last().unwrap().body, body);
        }
        assert_eq!(prefill.seen().len(), 0);
        let deep = format!("{{\"prompt\":\"x\",\"a\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
        assert_eq!(post_text(proxy.port, "/v1/completions", &[], &deep).await.status, 422);
    });
}

#[test]
fn uploads_have_the_same_limit() {
    // Goal: a body that is no JSON is bounded too, and reaches another server when one fails.
    block_on(async {
        let (good, taken) = (Server::start(echo).await, Arc::new(AtomicUsize::new(0)));
        let count = taken.clone();
        let closes = serve(move |mut stream, _| {
            let count = count.clone();
            async move {
                let request = read_request(&mut stream).await;
                let is_post = request.is_some_and(|text| text.starts_with("POST"));
                count.fetch_add(usize::from(is_post), SeqCst);
            }
        })
        .await;
        let line = format!(
            "--worker-hosts 127.0.0.1 127.0.0.1 --worker-ports {closes} {} --max-body-mb 1 \
             --routing round-robin --probe-interval-s 60",
            good.port()
        );
        let options: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let proxy = Proxy::start(&options, &[]).await;
        let kind = [("content-type", "multipart/form-data; boundary=b")];
        let path = "/v1/audio/transcriptions";
        for _ in 0..2 {
            assert_eq!(post_text(proxy.port, path, &kind, "voice").await.status, 200);
        }
        assert_eq!((taken.load(SeqCst), good.seen().len()), (1, 2));
        let large = "y".repeat(2 << 20);
        assert_eq!(post_text(proxy.port, path, &kind, &large).await.status, 413);
    });
}

#[test]
fn websockets_pass_both_ways() {
    // Goal: the switch, bytes both ways, the end from either side; a refusal is the server's own.
    block_on(async {
        let port = serve(|mut stream, _| async move {
            let Some(head) = read_request(&mut stream).await else { return };
            let head = head.to_ascii_lowercase();
            if !head.starts_with("get /v1/realtime") {
                let _ = stream.write_all(ok("{}").as_bytes()).await;
                return;
            }
            assert!(head.contains("upgrade: websocket") && head.contains("sec-websocket-key: k"));
            if head.contains("refuse") {
                let refusal = "HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno";
                let _ = stream.write_all(refusal.as_bytes()).await;
                return;
            }
            let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                          upgrade: websocket\r\nsec-websocket-accept: a\r\n\r\nhello";
            let _ = stream.write_all(switch.as_bytes()).await;
            let mut buffer = [0; 64];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                let _ = stream.write_all(&buffer[..read]).await;
            }
        })
        .await;
        let proxy = worker(&port, "").await;
        let ask = |path: &str| {
            format!(
                "GET {path} HTTP/1.1\r\nhost: p\r\nconnection: keep-alive, Upgrade\r\n\
                 upgrade: websocket\r\nsec-websocket-key: k\r\nsec-websocket-version: 13\r\n\r\n"
            )
        };
        let mut stream = TcpStream::connect(("127.0.0.1", proxy.port)).await.unwrap();
        stream.write_all(ask("/v1/realtime").as_bytes()).await.unwrap();
        let head = read_rest(&mut stream).await.to_ascii_lowercase();
        assert!(
            head.starts_with("http/1.1 101") && head.contains("sec-websocket-accept: a"),
            "{head}"
        );
        assert!(head.contains("upgrade: websocket") && head.ends_with("hello"), "{head}");
        for word in ["one", "two"] {
            stream.write_all(word.as_bytes()).await.unwrap();
            let mut back = [0; 3];
            stream.read_exact(&mut back).await.unwrap();
            assert_eq!(back, word.as_bytes());
        }
        assert_eq!(proxy.metric("ucm_proxy_instance_outstanding").await, 1.0);
        drop(stream);
        eventually("logged", || proxy.access_log().contains("\"status\":101")).await;
        assert_eq!(proxy.metric("ucm_proxy_instance_outstanding").await, 0.0);
        let refused = talk(proxy.port, ask("/v1/realtime?refuse").as_bytes()).await;
        assert!(refused.starts_with("HTTP/1.1 403") && refused.ends_with("no"), "{refused}");
        // An upgrade that nobody needs to follow is not followed.
        let headers = [("connection", "upgrade"), ("upgrade", "h2c")];
        let answer = send(proxy.port, request("GET", "/v1/models", &headers, "")).await.unwrap();
        assert_eq!(answer.rest().await.status, 200);
    });
}

#[test]
fn a_client_that_does_not_read_slows_its_server_down() {
    // Goal: the proxy does not gather what a client leaves lying; when it goes, the server is let go.
    const PLENTY: usize = 64 << 20; // sockets hold some MiB, not this
    block_on(async {
        let (sent, open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (sending, opened) = (sent.clone(), open.clone());
        let port = serve(move |mut stream, _| {
            let (sending, opened) = (sending.clone(), opened.clone());
            async move {
                let Some(request) = read_request(&mut stream).await else { return };
                if request.starts_with("GET") {
                    let _ = stream.write_all(ok("{}").as_bytes()).await;
                    return;
                }
                opened.fetch_add(1, SeqCst);
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
                let _ = stream.write_all(head.as_bytes()).await;
                let event = format!("data: {}\n\n", "x".repeat(65_536));
                while sending.load(SeqCst) < PLENTY
                    && stream.write_all(event.as_bytes()).await.is_ok()
                {
                    sending.fetch_add(event.len(), SeqCst);
                }
                opened.fetch_sub(1, SeqCst);
            }
        })
        .await;
        let proxy = worker(&port, "").await;
        let coming =
            send(proxy.port, request("POST", "/v1/completions", &[], STREAM)).await.unwrap();
        let mut before = usize::MAX;
        while before != sent.load(SeqCst) {
            before = sent.load(SeqCst);
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        assert!(before < PLENTY, "{before} bytes were taken for a client that reads none");
        assert_eq!(open.load(SeqCst), 1);
        drop(coming);
        eventually("the server is let go", || open.load(SeqCst) == 0).await;
        assert!(sent.load(SeqCst) < PLENTY);
    });
}

#[test]
fn nothing_is_left_open() {
    // Goal: after finished, failed, abandoned and refused requests the proxy holds the
    // descriptors that it held before.
    block_on(async {
        let server = Server::start(|seen: &Seen| match seen.path.as_str() {
            "/close" => Script::Close,
            "/hang" => Script::Hang,
            "/cut" => Script::events(vec![bytes("data: {}\n\n"), Step::Cut]),
            _ => echo(seen),
        })
        .await;
        let more = "--probe-interval-s 0.2 --eject-after 0 --retries 0";
        let proxy = Proxy::between(&[&server], &[&server], more).await;
        let open = || std::fs::read_dir(format!("/proc/{}/fd", proxy.child.id())).unwrap().count();
        assert_eq!(get(proxy.port, "/health").await.status, 200);
        let before = open();
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..200 {
            let port = proxy.port;
            clients.spawn(async move {
                match number % 4 {
                    0 => drop(post_text(port, "/v1/completions", &[], STREAM).await),
                    1 => drop(get(port, "/close").await),
                    2 => drop(get(port, "/cut").await),
                    _ => {
                        let hang = send(port, request("GET", "/hang", &[], ""));
                        let _ = tokio::time::timeout(Duration::from_millis(200), hang).await;
                    }
                }
            });
        }
        clients.join_all().await;
        // Kept connections to servers close after two seconds; a probe may be under way.
        eventually("descriptors are given back", || open() <= before + 2).await;
        eventually("the server sees it", || server.open() == 0).await;
    });
}
