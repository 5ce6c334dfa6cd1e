//! Clients that vanish, and many of them at once: nothing leaks, nothing is lost or doubled.
#![allow(missing_docs, reason = "a test")]
#![forbid(unsafe_code)]

mod common;

use std::collections::HashMap;
use std::time::Duration;

use common::client::{self, post_text, request, send};
use common::proxy::Proxy;
use common::scripted::{Script, Seen, Server, Step, bytes, wait};
use common::{block_on, eventually};
use serde_json::json;

const STREAMS: usize = 1000;

fn prefills(seen: &Seen) -> Script {
    let of = if seen.is_probe() { json!(null) } else { seen.json()["prompt"].clone() };
    Script::json(200, &json!({"kv_transfer_params": {"ucm": {"of": of}}}))
}

fn hangs(seen: &Seen) -> Script {
    if seen.is_probe() { Script::json(200, &json!({})) } else { Script::Hang }
}

async fn is_quiet(proxy: &Proxy) -> bool {
    proxy.metric("ucm_proxy_in_flight").await == 0.0
        && proxy.metric("ucm_proxy_instance_outstanding").await == 0.0
}

#[test]
fn a_client_that_leaves_cancels_whatever_runs_for_it() {
    // Goal: during prefill, before decode's first byte, and within the stream.
    block_on(async {
        let body = "{\"prompt\":\"x\",\"stream\":true}";
        let begin = vec![bytes("data: {}\n\n"), Step::Hang];
        let streams = move |seen: &Seen| {
            if seen.is_probe() {
                Script::json(200, &json!({}))
            } else {
                Script::events(begin.clone())
            }
        };
        let stages: [(&str, Server, Server); 3] = [
            ("prefill", Server::start(hangs).await, Server::start(hangs).await),
            ("decode", Server::start(prefills).await, Server::start(hangs).await),
            ("stream", Server::start(prefills).await, Server::start(streams).await),
        ];
        for (stage, prefill, decode) in stages {
            let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
            let busy = if stage == "prefill" { &prefill } else { &decode };
            let sending = send(proxy.port, request("POST", "/v1/completions", &[], body));
            if stage == "stream" {
                let mut coming = sending.await.unwrap();
                assert!(coming.next().await.unwrap().is_ok());
                drop(coming);
            } else {
                let sending = tokio::spawn(sending);
                eventually("the request is there", || busy.open() == 1).await;
                sending.abort();
            }
            eventually("the server sees it", || busy.open() == 0 && busy.abandoned() == 1).await;
            if stage == "prefill" {
                assert_eq!(decode.seen().len(), 0, "nothing begins for a client that left");
            }
            for _ in 0..100 {
                if is_quiet(&proxy).await {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert!(is_quiet(&proxy).await, "{stage}");
            eventually("logged", || proxy.access_log().contains("client_gone")).await;
            assert_eq!(proxy.metric("ucm_proxy_instance_failures_total").await, 0.0, "{stage}");
        }
    });
}

#[test]
fn a_thousand_streams_at_once() {
    // Goal: each client gets exactly its own bytes, each request is at decode exactly once with
    // its own handoff, both decoders and both prefillers work, and all is quiet afterwards.
    block_on(async {
        let echo = |seen: &Seen| {
            if seen.is_probe() {
                return Script::json(200, &json!({}));
            }
            let prompt = seen.json()["prompt"].clone();
            let mut steps = Vec::new();
            for number in 0..5 {
                steps.push(bytes(format!("data: {{\"of\":{prompt},\"n\":{number}}}\n\n")));
                steps.push(wait(200));
            }
            steps.push(bytes("data: [DONE]\n\n"));
            Script::events(steps)
        };
        let prefill = [Server::start(prefills).await, Server::start(prefills).await];
        let decode = [Server::start(echo).await, Server::start(echo).await];
        let proxy =
            Proxy::between(&[&prefill[0], &prefill[1]], &[&decode[0], &decode[1]], "").await;
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..STREAMS {
            let port = proxy.port;
            clients.spawn(async move {
                let body = format!("{{\"prompt\":\"p{number}\",\"stream\":true}}");
                let answer = post_text(port, "/v1/completions", &[], &body).await;
                let event = |n| format!("data: {{\"of\":\"p{number}\",\"n\":{n}}}\n\n");
                let expected: String = (0..5).map(event).collect();
                assert!(answer.whole);
                assert_eq!(answer.text(), format!("{expected}data: [DONE]\n\n"));
            });
        }
        clients.join_all().await;
        let mut times: HashMap<String, usize> = HashMap::new();
        for seen in decode.iter().flat_map(Server::seen) {
            let request = seen.json();
            assert_eq!(request["kv_transfer_params"]["ucm"]["of"], request["prompt"]);
            *times.entry(request["prompt"].to_string()).or_default() += 1;
        }
        assert_eq!(times.len(), STREAMS);
        assert!(times.values().all(|times| *times == 1), "doubled at decode");
        for server in prefill.iter().chain(&decode) {
            let share = server.seen().len();
            assert!((STREAMS * 2 / 5..=STREAMS * 3 / 5).contains(&share), "{share}");
        }
        let finished = "ucm_proxy_requests_total{path=\"/v1/completions\",status=\"200\",\
                        outcome=\"finished\"}";
        assert_eq!(proxy.metric(finished).await, STREAMS as f64);
        assert!(is_quiet(&proxy).await);
        for _ in 0..100 {
            if proxy.metric("ucm_proxy_connections").await == 1.0 {
                return; // only this request's own
            }
        }
        panic!("connections are left over");
    });
}

#[test]
fn half_of_many_clients_vanish() {
    // Goal: those who stay get everything, what ran for the others ends.
    block_on(async {
        let echo = |seen: &Seen| {
            if seen.is_probe() {
                return Script::json(200, &json!({}));
            }
            let leave = seen.json()["leave"] == json!(true);
            let end = if leave { Step::Hang } else { bytes("data: [DONE]\n\n") };
            Script::events(vec![bytes("data: {}\n\n"), wait(300), end])
        };
        let prefill = Server::start(prefills).await;
        let decode = Server::start(echo).await;
        let proxy = Proxy::between(&[&prefill], &[&decode], "").await;
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..200 {
            let port = proxy.port;
            clients.spawn(async move {
                let leave = number % 2 == 0;
                let body = json!({"prompt": "x", "stream": true, "leave": leave}).to_string();
                let request = request("POST", "/v1/completions", &[], &body);
                let mut coming = client::send(port, request).await.unwrap();
                if leave {
                    let _ = coming.next().await;
                } else {
                    assert_eq!(coming.rest().await.text(), "data: {}\n\ndata: [DONE]\n\n");
                }
            });
        }
        clients.join_all().await;
        eventually("upstream let go", || decode.open() == 0 && decode.abandoned() == 100).await;
        for _ in 0..100 {
            if is_quiet(&proxy).await {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(is_quiet(&proxy).await);
        assert_eq!(decode.seen().len(), 200);
    });
}
