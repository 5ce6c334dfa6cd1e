//! Servers that are dead, slow, half-dead, lying or break off, and what clients see of it.
#![allow(missing_docs, reason = "a test")]
#![forbid(unsafe_code)]

mod common;

use std::time::{Duration, Instant};

use common::client::{get, post, post_text};
use common::proxy::Proxy;
use common::scripted::{Script, Seen, Server, Step, bytes, wait};
use common::{block_on, eventually};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

fn good(name: &'static str) -> impl Fn(&Seen) -> Script + Send + Sync + 'static {
    move |seen| {
        if !seen.is_probe() && seen.json()["stream"] == json!(true) {
            let event = format!("data: {{\"of\":\"{name}\"}}\n\n");
            return Script::events(vec![bytes(event), bytes("data: [DONE]\n\n")]);
        }
        let params = json!({"ucm": {"version": 1, "of": name}});
        Script::json(200, &json!({"of": name, "kv_transfer_params": params}))
    }
}

/// Healthy when probed, otherwise this.
fn except_probes(script: Script) -> impl Fn(&Seen) -> Script + Send + Sync + 'static {
    move |seen| if seen.is_probe() { Script::json(200, &json!({})) } else { script.clone() }
}

async fn ask(proxy: &Proxy) -> Value {
    post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await.json()
}

/// A port where nobody listens.
async fn dead_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().port().to_string()
}

#[test]
fn whatever_happens_at_prefill_decode_answers() {
    // Goal: closed, hanging, failing, nonsense, cut: the request is never lost, and is sent to
    // decode exactly once, without transfer parameters.
    block_on(async {
        let lies: Vec<(&str, Script)> = vec![
            ("closes", Script::Close),
            ("hangs", Script::Hang),
            ("fails", Script::json(500, &json!({"error": {"message": "engine"}}))),
            ("overloaded", Script::json(503, &json!({}))),
            ("refuses", Script::json(400, &json!({"error": {"message": "too long"}}))),
            ("html", Script::Reply { status: 200, headers: vec![], body: "<html>".into() }),
            ("list", Script::json(200, &json!({"kv_transfer_params": [1, 2]}))),
            ("text", Script::json(200, &json!({"kv_transfer_params": "x", "usage": 7}))),
            ("null", Script::json(200, &json!({"kv_transfer_params": null, "usage": null}))),
            ("large", Script::json(200, &json!({"kv_transfer_params": {"x": "y".repeat(70_000)}}))),
            (
                "cut",
                Script::Stream {
                    status: 200,
                    content_type: "application/json".to_owned(),
                    steps: vec![bytes("{\"kv_transfer_params\":{\"ucm\":"), wait(20), Step::Cut],
                },
            ),
            ("stream", Script::events(vec![bytes("data: {}\n\n")])),
        ];
        for (name, script) in lies {
            let prefill = Server::start(except_probes(script)).await;
            let decode = Server::start(good("decode")).await;
            let more = "--prefill-timeout-s 0.3";
            let proxy = Proxy::between(&[&prefill], &[&decode], more).await;
            assert_eq!(ask(&proxy).await["of"], "decode", "{name}");
            let [sent] = &decode.seen()[..] else { panic!("{name}: not once at decode") };
            assert_eq!(sent.body, "{\"prompt\":\"x\"}", "{name}");
            assert_eq!(prefill.seen().len(), 1, "{name}");
        }
    });
}

#[test]
fn nobody_listens_at_prefill() {
    // Goal: a refused connection costs the client nothing but the prefill.
    block_on(async {
        let decode = Server::start(good("decode")).await;
        let options = [
            "--prefiller-port",
            &dead_port().await,
            "--decoder-hosts",
            "127.0.0.1",
            "--decoder-ports",
            &decode.port(),
        ];
        let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let started = Instant::now();
        assert_eq!(ask(&proxy).await["of"], "decode");
        assert!(started.elapsed() < Duration::from_secs(30));
        assert_eq!(proxy.metric("ucm_proxy_decode_alone_total").await, 1.0);
    });
}

#[test]
fn prefill_is_retried_elsewhere_when_asked_to() {
    // Goal: --on-prefill-failure retry finds the good one; a refusal of the request is not retried.
    block_on(async {
        let broken = Server::start(except_probes(Script::Close)).await;
        let whole = Server::start(good("prefill")).await;
        let decode = Server::start(good("decode")).await;
        let more = "--on-prefill-failure retry --routing round-robin --eject-after 0";
        let proxy = Proxy::between(&[&broken, &whole], &[&decode], more).await;
        for _ in 0..4 {
            ask(&proxy).await;
        }
        assert_eq!(whole.seen().len(), 4);
        for sent in decode.seen() {
            assert_eq!(sent.json()["kv_transfer_params"]["ucm"]["of"], "prefill");
        }
        let refuses = || except_probes(Script::json(400, &json!({})));
        let (first, second) = (Server::start(refuses()).await, Server::start(refuses()).await);
        let proxy = Proxy::between(&[&first, &second], &[&decode], more).await;
        ask(&proxy).await;
        assert_eq!(first.seen().len() + second.seen().len(), 1);
    });
}

#[test]
fn another_decoder_answers_while_nothing_was_answered() {
    // Goal: dead, closing, failing, hanging, ending before the first event, cut inside a whole
    // answer: the other decoder answers, and the client sees one clean answer.
    block_on(async {
        let cut_json = |steps| Script::Stream {
            status: 200,
            content_type: "application/json".to_owned(),
            steps,
        };
        let failing: Vec<(&str, Script)> = vec![
            ("closes", Script::Close),
            ("hangs", Script::Hang),
            ("fails", Script::json(500, &json!({"error": {"message": "engine"}}))),
            ("overloaded", Script::json(503, &json!({}))),
            ("cut at once", cut_json(vec![wait(10), Step::Cut])),
            ("cut within", cut_json(vec![bytes("{\"of\":\"no"), wait(10), Step::Cut])),
            ("no event", Script::events(vec![])),
            ("cut before the first event", Script::events(vec![wait(10), Step::Cut])),
        ];
        for (name, script) in failing {
            let prefill = Server::start(good("prefill")).await;
            let bad = Server::start(except_probes(script)).await;
            let whole = Server::start(good("decode")).await;
            let more = "--routing round-robin --first-byte-timeout-s 0.3 --eject-after 0";
            let proxy = Proxy::between(&[&prefill], &[&bad, &whole], more).await;
            for stream in [false, true, false, true] {
                let request = json!({"prompt": "x", "stream": stream});
                let answer = post(proxy.port, "/v1/completions", &request).await;
                assert_eq!(answer.status, 200, "{name}: {answer:?}");
                assert!(answer.whole && answer.text().contains("decode"), "{name}: {answer:?}");
            }
            assert_eq!(whole.seen().len(), 4, "{name}");
            assert!(!bad.seen().is_empty(), "{name}");
            assert_eq!(prefill.seen().len(), 4, "{name}: prefill is not repeated");
            eventually("the hanging one was let go", || bad.open() == 0).await;
        }
    });
}

#[test]
fn the_only_decoder_fails() {
    // Goal: its own error where it gave one, else an error that names it; Retry-After when down.
    block_on(async {
        let prefill = Server::start(good("prefill")).await;
        let broken = json!({"error": {"message": "engine died", "code": 500}});
        let fails = Server::start(except_probes(Script::json(500, &broken))).await;
        let proxy = Proxy::between(&[&prefill], &[&fails], "").await;
        let answer = post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await;
        assert_eq!((answer.status, answer.json()), (500, broken));

        let closes = Server::start(except_probes(Script::Close)).await;
        let proxy = Proxy::between(&[&prefill], &[&closes], "").await;
        let answer = post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await;
        assert_eq!(answer.status, 502);
        let message = answer.json()["error"]["message"].to_string();
        assert!(message.contains(&closes.address.to_string()), "{message}");

        let hangs = Server::start(except_probes(Script::Hang)).await;
        let more = "--first-byte-timeout-s 0.2";
        let proxy = Proxy::between(&[&prefill], &[&hangs], more).await;
        let answer = post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await;
        assert_eq!(answer.status, 504);

        let options = ["--worker-ports", &dead_port().await, "--probe-interval-s", "0.02"];
        let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        eventually("down", || proxy.log().contains("is down")).await;
        let answer = post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await;
        assert_eq!((answer.status, answer.header("retry-after")), (503, "1"));
        assert_eq!(get(proxy.port, "/health").await.status, 503);
    });
}

#[test]
fn a_stream_that_breaks_off_ends_with_an_error() {
    // Goal: every byte that came, then one error event in the client's dialect, no [DONE], and no
    // second decoder.
    block_on(async {
        let cuts: Vec<(&str, Vec<Step>, &str)> = vec![
            (
                "between events",
                vec![bytes("data: {\"a\":1}\n\n"), wait(30), Step::Cut],
                "data: {\"a\":1}\n\n",
            ),
            (
                "inside an event",
                vec![bytes("data: {\"a\""), wait(30), Step::Cut],
                "data: {\"a\"\n\n",
            ),
            ("silence", vec![bytes("data: {\"a\":1}\n\n"), Step::Hang], "data: {\"a\":1}\n\n"),
        ];
        for (name, steps, beginning) in cuts {
            for (path, error_at) in [
                ("/v1/completions", "/error/message"),
                ("/v1/chat/completions", "/error/message"),
                ("/v1/messages", "/error/message"),
                ("/v1/responses", "/message"),
            ] {
                let prefill = Server::start(good("prefill")).await;
                let decode = Server::start(except_probes(Script::events(steps.clone()))).await;
                let other = Server::start(except_probes(Script::events(steps.clone()))).await;
                let more = "--idle-timeout-s 0.3";
                let proxy = Proxy::between(&[&prefill], &[&decode, &other], more).await;
                let answer = post(proxy.port, path, &json!({"stream": true})).await;
                assert!(answer.whole, "{name}: the answer itself ends as it should");
                let text = answer.text();
                let rest = text.strip_prefix(beginning).unwrap_or_else(|| panic!("{name}: {text}"));
                let data = rest.strip_prefix("event: error\n").unwrap_or(rest);
                assert_eq!(data.len() < rest.len(), !path.contains("completions"), "{text}");
                let data = data.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
                let error: Value = serde_json::from_str(data).expect("one event of JSON");
                assert!(error.pointer(error_at).is_some_and(Value::is_string), "{error}");
                assert_eq!(decode.seen().len() + other.seen().len(), 1, "{name}");
                assert_eq!(proxy.metric("ucm_proxy_instance_failures_total").await, 1.0);
            }
        }
    });
}

#[test]
fn a_stream_without_length_that_is_cut_is_noticed() {
    // Goal: an answer that ends with its connection and without [DONE] is not taken as whole.
    block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut buffer = [0; 4096];
                let read = stream.read(&mut buffer).await.unwrap_or(0);
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
                let end = match std::str::from_utf8(&buffer[..read]).unwrap() {
                    text if text.contains("finish") => "data: [DONE]\n\n",
                    _ => "",
                };
                let answer = format!("{head}data: {{\"a\":1}}\n\n{end}");
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        let options = ["--worker-hosts", "127.0.0.1", "--worker-ports", &port];
        let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let path = "/v1/completions";
        let cut = post(proxy.port, path, &json!({"stream": true})).await.text();
        assert!(cut.starts_with("data: {\"a\":1}\n\ndata: {\"error\":"), "{cut}");
        let whole = post(proxy.port, path, &json!({"stream": true, "finish": 1})).await.text();
        assert_eq!(whole, "data: {\"a\":1}\n\ndata: [DONE]\n\n");
    });
}

#[test]
fn servers_that_speak_no_http_are_survived() {
    // Goal: garbage, a lying length and an endless head are failures of that server, no more.
    block_on(async {
        let answers: [&[u8]; 4] = [
            b"SSH-2.0-OpenSSH_9.2\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{\"short\":1}",
            b"HTTP/1.1 200 OK\r\ncontent-length: -7\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        ];
        for answer in answers {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port().to_string();
            tokio::spawn(async move {
                loop {
                    let (mut stream, _) = listener.accept().await.unwrap();
                    let mut buffer = [0; 4096];
                    let _ = stream.read(&mut buffer).await;
                    let _ = stream.write_all(answer).await;
                }
            });
            let whole = Server::start(good("decode")).await;
            let options = [
                "--worker-hosts",
                "127.0.0.1",
                "127.0.0.1",
                "--worker-ports",
                &port,
                &whole.port(),
                "--routing",
                "round-robin",
                "--eject-after",
                "0",
                "--probe-interval-s",
                "60",
            ];
            let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
            for _ in 0..4 {
                assert_eq!(ask(&proxy).await["of"], "decode");
            }
        }
    });
}

#[test]
fn a_failing_server_is_ejected_and_comes_back_slowly() {
    // Goal: after three failures in a row it gets nothing; back again it gets less than its share.
    block_on(async {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
        let well = Arc::new(AtomicBool::new(false));
        let state = well.clone();
        let prefill = Server::start(good("prefill")).await;
        let whole = Server::start(good("decode")).await;
        let flaky = Server::start(move |seen| {
            let well = state.load(SeqCst) || seen.is_probe();
            if well { Script::json(200, &json!({})) } else { Script::Close }
        })
        .await;
        let more = "--routing round-robin --eject-s 0.5 --slow-return-s 30";
        let proxy = Proxy::between(&[&prefill], &[&flaky, &whole], more).await;
        for _ in 0..20 {
            assert_eq!(ask(&proxy).await["of"], "decode");
        }
        assert_eq!(flaky.seen().len(), 3, "ejected after three failures");
        assert!(proxy.log().contains("failed 3 time(s) in a row"));
        well.store(true, SeqCst);
        tokio::time::sleep(Duration::from_millis(600)).await;
        for _ in 0..40 {
            ask(&proxy).await;
        }
        let returned = flaky.seen().len() - 3;
        assert!((1..=12).contains(&returned), "{returned} of 40 while returning");
    });
}

#[test]
fn over_the_limit_requests_wait_and_then_get_503() {
    // Goal: one at a time at the server, one waiting, the third is turned away with Retry-After.
    block_on(async {
        let answer = Script::json(200, &json!({"of": "slow"}));
        let slow = Script::Later(Duration::from_millis(400), Box::new(answer));
        let worker = Server::start(except_probes(slow)).await;
        let options = [
            "--worker-hosts",
            "127.0.0.1",
            "--worker-ports",
            &worker.port(),
            "--max-outstanding",
            "1",
            "--queue-depth",
            "1",
        ];
        let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let port = proxy.port;
        let body = "{\"prompt\":\"x\"}";
        let first = tokio::spawn(post_text(port, "/v1/completions", &[], body));
        eventually("at the server", || worker.open() == 1).await;
        let second = tokio::spawn(post_text(port, "/v1/completions", &[], body));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let third = post_text(port, "/v1/completions", &[], body).await;
        assert_eq!((third.status, third.header("retry-after")), (503, "1"));
        assert_eq!((first.await.unwrap().status, second.await.unwrap().status), (200, 200));
        assert_eq!(worker.seen().len(), 2);
        assert_eq!(proxy.metric("ucm_proxy_queue_refused_total").await, 0.0, "refused at the door");
    });
}

#[test]
fn a_request_ends_with_its_deadline() {
    // Goal: before the first byte 504, within a stream an error event.
    block_on(async {
        let events = [bytes("data: {}\n\n"), wait(100)];
        let events: Vec<Step> = events.iter().cycle().take(100).cloned().collect();
        let worker = Server::start(move |seen| match seen.path.as_str() {
            "/v1/completions" => Script::events(events.clone()),
            _ => Script::Hang,
        });
        let worker = worker.await;
        let options = [
            "--worker-hosts",
            "127.0.0.1",
            "--worker-ports",
            &worker.port(),
            "--request-timeout-s",
            "0.5",
            "--probe-interval-s",
            "60",
        ];
        let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let started = Instant::now();
        let stream = post(proxy.port, "/v1/completions", &json!({"stream": true})).await;
        assert!(stream.text().contains("deadline"), "{}", stream.text());
        let hanging = post(proxy.port, "/v1/chat/completions", &json!({"messages": []})).await;
        assert_eq!(hanging.status, 504);
        assert!(started.elapsed() < Duration::from_secs(8));
        eventually("upstream let go", || worker.open() <= 1).await;
    });
}

#[test]
fn the_deadline_holds_for_prefill_too() {
    // Goal: a prefill server that hangs does not take longer than the whole request may.
    block_on(async {
        let prefill = Server::start(except_probes(Script::Hang)).await;
        let decode = Server::start(good("decode")).await;
        let more = "--request-timeout-s 0.5 --prefill-timeout-s 60";
        let proxy = Proxy::between(&[&prefill], &[&decode], more).await;
        let request = json!({"prompt": "x"});
        let sending = post(proxy.port, "/v1/completions", &request);
        let answer = tokio::time::timeout(Duration::from_secs(20), sending).await;
        assert_eq!(answer.expect("long before the prefill's deadline").status, 504);
        eventually("prefill let go", || prefill.open() == 0).await;
    });
}

#[test]
fn a_retry_that_waits_for_one_server_does_not_block_the_others() {
    // Goal: a request whose server failed waits for the busy other one; a newcomer gets the free
    // server at once. And clients that left the queue make room in it.
    block_on(async {
        let answer = Script::json(200, &json!({"of": "slow"}));
        let slow = Script::Later(Duration::from_secs(3), Box::new(answer));
        let busy = Server::start(except_probes(slow)).await;
        let flaky = Server::start(move |seen| match seen.is_probe() {
            false if seen.json()["prompt"] == "fails" => Script::Close,
            _ => Script::json(200, &json!({"of": "free"})),
        })
        .await;
        let options = [
            "--worker-hosts",
            "127.0.0.1",
            "127.0.0.1",
            "--worker-ports",
            &busy.port(),
            &flaky.port(),
            "--max-outstanding",
            "1",
            "--queue-depth",
            "2",
            "--routing",
            "round-robin",
            "--eject-after",
            "0",
        ];
        let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let port = proxy.port;
        let path = "/v1/completions";
        let first = tokio::spawn(post_text(port, path, &[], "{\"prompt\":\"first\"}"));
        eventually("busy", || busy.open() == 1).await;
        let failing = tokio::spawn(post_text(port, path, &[], "{\"prompt\":\"fails\"}"));
        eventually("tried", || flaky.seen().len() == 1 && flaky.open() == 0).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let third = post_text(port, path, &[], "{\"prompt\":\"x\"}").await;
        assert_eq!(third.json()["of"], "free");
        assert!(!first.is_finished() && !failing.is_finished(), "not after those before it");
        assert_eq!(failing.await.unwrap().json()["of"], "slow");
        assert_eq!(first.await.unwrap().json()["of"], "slow");
    });
}
