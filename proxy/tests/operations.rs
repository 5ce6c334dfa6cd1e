//! Running the proxy: adding, removing, draining, reloading, limits, TLS, namespaces, shutdown.
#![allow(missing_docs, reason = "a test")]
#![forbid(unsafe_code)]

mod common;

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::client::{get, post, post_text, request, send};
use common::proxy::{BINARY, Proxy};
use common::scripted::{Script, Seen, Server, bytes, wait};
use common::{block_on, eventually, raw};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn named(name: &'static str) -> impl Fn(&Seen) -> Script + Send + Sync + 'static {
    move |_| Script::json(200, &json!({"of": name}))
}

async fn ask(proxy: &Proxy) -> String {
    let answer = post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await;
    answer.json()["of"].as_str().unwrap_or("nobody").to_owned()
}

fn signal(proxy: &Proxy, name: &str) {
    let status = Command::new("kill").args([name, &proxy.child.id().to_string()]).status();
    assert!(status.expect("kill runs").success());
}

#[test]
fn servers_come_drain_and_go_at_run_time() {
    // Goal: the admin endpoint adds, drains, returns and removes, and refuses nonsense by name.
    block_on(async {
        let (first, second) =
            (Server::start(named("first")).await, Server::start(named("second")).await);
        let options = ["--worker-hosts", "127.0.0.1", "--worker-ports", &first.port()];
        let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let admin = proxy.admin_port;
        let new = json!({"role": "worker", "host": "127.0.0.1", "port": second.address.port()});
        assert_eq!(post(admin, "/instances", &new).await.status, 201);
        assert_eq!(post(admin, "/instances", &new).await.status, 409);
        let listed = get(admin, "/instances").await.json();
        assert_eq!(listed["instances"].as_array().unwrap().len(), 2);
        let path = format!("/instances/worker/{}", first.address);
        let drained = post_text(admin, &format!("{path}/drain"), &[], "").await.json();
        assert_eq!(drained["draining"], true);
        for _ in 0..6 {
            assert_eq!(ask(&proxy).await, "second");
        }
        post_text(admin, &format!("{path}/undrain"), &[], "").await;
        let mut answers = Vec::new();
        for _ in 0..4 {
            answers.push(ask(&proxy).await);
        }
        assert!(answers.contains(&"first".to_owned()), "{answers:?}");
        let delete = request("DELETE", &format!("/instances/worker/{}", second.address), &[], "");
        assert_eq!(send(admin, delete).await.unwrap().rest().await.status, 200);
        for _ in 0..4 {
            assert_eq!(ask(&proxy).await, "first");
        }
        let wrong = json!({"role": "prefill", "host": "a", "port": 1});
        assert_eq!(post(admin, "/instances", &wrong).await.status, 400);
        let name = json!({"role": "worker", "host": "no-such-host.invalid", "port": 1});
        assert!(post(admin, "/instances", &name).await.text().contains("no-such-host.invalid"));
        assert_eq!(post_text(admin, "/instances/worker/x:1/drain", &[], "").await.status, 404);
        assert_eq!(get(proxy.port, "/instances").await.json()["of"], "first", "not on this port");
    });
}

#[test]
fn a_request_in_flight_survives_the_removal_of_its_server() {
    // Goal: removing and draining never cut a stream.
    block_on(async {
        let steps = vec![bytes("data: {}\n\n"), wait(300), bytes("data: [DONE]\n\n")];
        let leaving = Server::start(move |_| Script::events(steps.clone())).await;
        let options = ["--worker-hosts", "127.0.0.1", "--worker-ports", &leaving.port()];
        let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let body = "{\"prompt\":\"x\",\"stream\":true}";
        let coming = send(proxy.port, request("POST", "/v1/completions", &[], body)).await.unwrap();
        let path = format!("/instances/worker/{}", leaving.address);
        let removed = send(proxy.admin_port, request("DELETE", &path, &[], "")).await.unwrap();
        assert_eq!(removed.rest().await.status, 200);
        assert_eq!(coming.rest().await.text(), "data: {}\n\ndata: [DONE]\n\n");
        let nobody = post_text(proxy.port, "/v1/completions", &[], body).await;
        assert_eq!((nobody.status, nobody.header("retry-after")), (503, "1"));
    });
}

#[test]
fn sighup_reads_the_file_again() {
    // Goal: servers come and go with the file; a mistake in it changes nothing and is named.
    block_on(async {
        let (first, second) =
            (Server::start(named("first")).await, Server::start(named("second")).await);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("proxy.yaml");
        let write = |port: &str| {
            let text = format!("worker_hosts: [127.0.0.1]\nworker_ports: [{port}]\n");
            std::fs::write(&path, text).unwrap();
        };
        write(&first.port());
        let options = ["--config".to_owned(), path.display().to_string()];
        let proxy = Proxy::start(&options, &[]).await;
        assert_eq!(ask(&proxy).await, "first");
        write(&second.port());
        signal(&proxy, "-HUP");
        eventually("reloaded", || proxy.log().contains("is read again")).await;
        assert_eq!(ask(&proxy).await, "second");
        write("seven");
        signal(&proxy, "-HUP");
        eventually("refused", || proxy.log().contains("SIGHUP changes nothing")).await;
        assert_eq!(ask(&proxy).await, "second");
    });
}

#[test]
fn shutdown_lets_requests_finish() {
    // Goal: after SIGTERM a stream in flight ends whole, new connections are refused, exit is 0.
    block_on(async {
        let steps = vec![bytes("data: {}\n\n"), wait(500), bytes("data: [DONE]\n\n")];
        let worker = Server::start(move |_| Script::events(steps.clone())).await;
        let options = ["--worker-hosts", "127.0.0.1", "--worker-ports", &worker.port()];
        let mut proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let body = "{\"prompt\":\"x\",\"stream\":true}";
        let coming = send(proxy.port, request("POST", "/v1/completions", &[], body)).await.unwrap();
        signal(&proxy, "-TERM");
        eventually("shutting down", || proxy.log().contains("shutting down")).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(tokio::net::TcpStream::connect(("127.0.0.1", proxy.port)).await.is_err());
        assert_eq!(coming.rest().await.text(), "data: {}\n\ndata: [DONE]\n\n");
        let started = Instant::now();
        let status = loop {
            if let Some(status) = proxy.child.try_wait().unwrap() {
                break status;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert_eq!(status.code(), Some(0));
    });
}

#[test]
fn the_last_lines_of_the_access_log_are_written() {
    // Goal: lines are gathered before they are written, and a shutdown writes what was gathered.
    block_on(async {
        let worker = Server::start(named("worker")).await;
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("access.log");
        let options = ["--worker-hosts", "127.0.0.1", "--worker-ports", &worker.port()];
        let mut options = options.map(str::to_owned).to_vec();
        options.extend(["--access-log".to_owned(), log.display().to_string()]);
        let mut proxy = Proxy::start(&options, &[]).await;
        for _ in 0..50 {
            assert_eq!(ask(&proxy).await, "worker");
        }
        signal(&proxy, "-TERM");
        let started = Instant::now();
        while proxy.child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(20), "does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let text = std::fs::read_to_string(&log).unwrap();
        assert_eq!(text.lines().count(), 50);
        for line in text.lines() {
            assert!(serde_json::from_str::<Value>(line).is_ok(), "{line}");
        }
    });
}

#[test]
fn a_second_signal_ends_at_once() {
    // Goal: whoever asks twice does not wait for requests in flight.
    block_on(async {
        let hangs = |seen: &Seen| match seen.method.as_str() {
            "GET" => Script::json(200, &json!({})),
            _ => Script::Hang,
        };
        let worker = Server::start(hangs).await;
        let options = ["--worker-hosts", "127.0.0.1", "--worker-ports", &worker.port()];
        let mut proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let sending = send(proxy.port, request("POST", "/v1/completions", &[], "{}"));
        let _sending = tokio::spawn(sending);
        eventually("in flight", || worker.open() == 1).await;
        signal(&proxy, "-TERM");
        eventually("shutting down", || proxy.log().contains("shutting down")).await;
        assert!(proxy.child.try_wait().unwrap().is_none(), "the first one waits");
        signal(&proxy, "-INT");
        let started = Instant::now();
        while proxy.child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(10), "the second one does not");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
}

#[test]
fn what_goes_everywhere_asks_only_those_who_know_it() {
    // Goal: a server without a profiler does not turn the others' success into a 404; a failure
    // of one is told.
    block_on(async {
        let without = |seen: &Seen| match seen.path.as_str() {
            "/start_profile" => Script::json(404, &json!({"detail": "Not Found"})),
            _ => Script::json(500, &json!({"of": "prefill"})),
        };
        let (prefill, decode) =
            (Server::start(without).await, Server::start(named("decode")).await);
        let proxy = Proxy::between(&[&prefill], &[&decode], "--probe-interval-s 60").await;
        let answer = post_text(proxy.port, "/start_profile", &[], "").await;
        assert_eq!((answer.status, answer.json()["of"].as_str()), (200, Some("decode")));
        let answer = post_text(proxy.port, "/stop_profile", &[], "").await;
        assert_eq!((answer.status, answer.json()["of"].as_str()), (500, Some("prefill")));
    });
}

#[test]
fn namespaces_that_cannot_share_are_told_loudly() {
    // Goal: the field is named; other byte order and no metric are something else; it changes live.
    block_on(async {
        let with = |labels: &'static str| {
            move |seen: &Seen| {
                let metric = format!("vllm:ucm_namespace_info{{engine=\"0\",{labels}}} 1.0\n");
                let body = if seen.path == "/metrics" { metric } else { String::new() };
                Script::Reply { status: 200, headers: vec![], body: body.into() }
            }
        };
        let bf16 = "logical=\"a\",order=\"nhd\",dtype=\"bfloat16\",block_size=\"128\"";
        let fp16 = "logical=\"b\",order=\"nhd\",dtype=\"float16\",block_size=\"128\"";
        let prefill = Server::start(with(bf16)).await;
        let decode = Server::start(with(fp16)).await;
        let proxy = Proxy::between(&[&prefill], &[&decode], "--probe-interval-s 0.05").await;
        let loud = "dtype is bfloat16 at prefill and float16 at decode";
        eventually("told", || proxy.log().contains(loud)).await;
        assert!(proxy.log().contains("CAN NEVER SHARE KV"));
        assert!(!proxy.log().contains("block_size is"));
        assert_eq!(get(proxy.port, "/healthcheck").await.json()["kv_sharing"], "mismatch");
        let pair = format!("prefill=\"{}\",decode=\"{}\"", prefill.address, decode.address);
        let gauge = format!("ucm_proxy_namespace{{{pair},state=\"mismatch\"}}");
        assert_eq!(proxy.metric(&gauge).await, 1.0);

        let same = Server::start(with(bf16)).await;
        let proxy = Proxy::between(&[&prefill], &[&same], "--probe-interval-s 0.05").await;
        eventually("told", || proxy.log().contains("share KV")).await;
        assert_eq!(get(proxy.port, "/healthcheck").await.json()["kv_sharing"], "ok");

        let silent = Server::start(named("x")).await;
        let proxy = Proxy::between(&[&prefill], &[&silent], "--probe-interval-s 0.05").await;
        let unknown = format!("decode server {} publishes no ucm_namespace_info", silent.address);
        eventually("said", || proxy.log().contains(&unknown)).await;
        assert_eq!(get(proxy.port, "/healthcheck").await.json()["kv_sharing"], "unknown");
    });
}

#[test]
fn bodies_and_heads_have_limits() {
    // Goal: 413 with a remedy, announced or not; 431 for the head; both in the form of errors.
    block_on(async {
        let worker = Server::start(named("worker")).await;
        let options = [
            "--worker-hosts",
            "127.0.0.1",
            "--worker-ports",
            &worker.port(),
            "--max-body-mb",
            "1",
            "--max-header-kb",
            "8",
        ];
        let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let large = "x".repeat(48 << 20);
        let answer = post_text(proxy.port, "/v1/completions", &[], &large).await;
        assert_eq!(answer.status, 413, "also for a client that sends everything before it reads");
        assert!(answer.text().contains("--max-body-mb"));
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", proxy.port)).await.unwrap();
        let head = "POST /v1/completions HTTP/1.1\r\nhost: p\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        let chunk = format!("80000\r\n{}\r\n", "y".repeat(0x80000));
        for _ in 0..3 {
            let _ = stream.write_all(chunk.as_bytes()).await;
        }
        let mut answer = vec![0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, b"HTTP/1.1 413");
        let long = "v".repeat(20_000);
        let answer = send(proxy.port, request("GET", "/version", &[("x-long", &long)], "")).await;
        assert_eq!(answer.unwrap().rest().await.status, 431);
        assert_eq!(worker.seen().len(), 0);
        assert_eq!(ask(&proxy).await, "worker", "and goes on");
    });
}

#[test]
fn https_towards_clients() {
    // Goal: with a certificate the same requests work through TLS, and plain HTTP does not.
    block_on(async {
        let worker = Server::start(named("worker")).await;
        let directory = tempfile::tempdir().unwrap();
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let (cert, key) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
        std::fs::write(&cert, certified.cert.pem()).unwrap();
        std::fs::write(&key, certified.signing_key.serialize_pem()).unwrap();
        let options = [
            "--worker-hosts",
            "127.0.0.1",
            "--worker-ports",
            &worker.port(),
            "--tls-cert",
            &cert.display().to_string(),
            "--tls-key",
            &key.display().to_string(),
        ];
        let proxy = Proxy::start(&options.map(str::to_owned), &[]).await;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(certified.cert.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let port = proxy.port;
        let answer = tokio::task::spawn_blocking(move || {
            let name = "localhost".try_into().unwrap();
            let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
            let socket = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
            let mut stream = rustls::StreamOwned::new(session, socket);
            stream
                .write_all(
                    b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
                )
                .unwrap();
            let mut text = String::new();
            let _ = stream.read_to_string(&mut text);
            text
        });
        let answer = answer.await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("worker"), "{answer}");
        assert!(send(port, request("GET", "/health", &[], "")).await.is_err());
    });
}

#[test]
fn https_towards_servers() {
    // Goal: a server named as https:// is spoken to in TLS and believed only with a certificate
    // that is trusted; else the error says what to do.
    block_on(async {
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let trusted = directory.path().join("ca.pem");
        std::fs::write(&trusted, certified.cert.pem()).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], key.unwrap())
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let plain = Server::start(named("behind-tls")).await;
        let behind = plain.address;
        let port = raw::serve(move |stream, _| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut plain = tokio::net::TcpStream::connect(behind).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut plain).await;
            }
        })
        .await;
        let options = |more: &[&str]| {
            let servers = ["--worker-hosts", "https://localhost", "--worker-ports", &port];
            servers.iter().chain(more).map(|word| (*word).to_owned()).collect::<Vec<_>>()
        };
        let trusted = trusted.display().to_string();
        let proxy = Proxy::start(&options(&["--upstream-ca", &trusted]), &[]).await;
        for _ in 0..3 {
            assert_eq!(ask(&proxy).await, "behind-tls");
        }
        let seen = plain.seen();
        assert_eq!(seen[0].header("host"), format!("localhost:{port}"));
        let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let untrusted = directory.path().join("other.pem");
        std::fs::write(&untrusted, other.cert.pem()).unwrap();
        let untrusted = untrusted.display().to_string();
        let proxy = Proxy::start(&options(&["--upstream-ca", &untrusted]), &[]).await;
        let answer = post(proxy.port, "/v1/completions", &json!({"prompt": "x"})).await;
        assert_eq!(answer.status, 502);
        assert!(answer.text().contains("TLS") && answer.text().contains("certificate"));
        let wrong = Command::new(BINARY)
            .args(options(&["--port", "0", "--upstream-ca", "/no/such.pem"]))
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&wrong.stderr).into_owned();
        assert!(error.contains("--upstream-ca `/no/such.pem`"), "{error}");
    });
}

#[test]
fn localhost_means_all_its_addresses() {
    // Goal: clients that try IPv4 first and those that try IPv6 first both get through.
    block_on(async {
        let worker = Server::start(named("worker")).await;
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut child = Command::new(BINARY)
            .args(["--host", "localhost", "--port", &port.to_string()])
            .args(["--worker-hosts", "127.0.0.1", "--worker-ports", &worker.port()])
            .args(["--access-log", "off"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut addresses = vec!["127.0.0.1"];
        if std::net::TcpListener::bind("[::1]:0").is_ok() {
            addresses.push("::1");
        }
        for address in addresses {
            let deadline = Instant::now() + Duration::from_secs(10);
            while tokio::net::TcpStream::connect((address, port)).await.is_err() {
                assert!(Instant::now() < deadline, "{address}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
    });
}

#[test]
fn prefixes_stay_with_their_prefill_server() {
    // Goal: with prefix affinity a conversation's next turn goes where its last one was computed.
    block_on(async {
        let prefill = [
            Server::start(named("0")).await,
            Server::start(named("1")).await,
            Server::start(named("2")).await,
        ];
        let decode = Server::start(named("decode")).await;
        let all = [&prefill[0], &prefill[1], &prefill[2]];
        let proxy = Proxy::between(&all, &[&decode], "--routing prefix-affinity").await;
        for turn in 1..=4 {
            for conversation in 0..9 {
                let text = format!("conversation {conversation} ").repeat(40);
                let messages: Vec<Value> = (0..turn)
                    .map(|n| json!({"role": "user", "content": format!("{text}{n}")}))
                    .collect();
                let request = json!({"model": "m", "messages": messages});
                post(proxy.port, "/v1/chat/completions", &request).await;
            }
        }
        for conversation in 0..9 {
            let name = format!("conversation {conversation} ");
            let has = |server: &&Server| {
                server.seen().iter().any(|seen| String::from_utf8_lossy(&seen.body).contains(&name))
            };
            assert_eq!(prefill.iter().filter(has).count(), 1, "{name} moved");
        }
        let shares: Vec<_> = prefill.iter().map(|server| server.seen().len()).collect();
        assert!(shares.iter().all(|share| *share >= 4), "all work: {shares:?}");
    });
}

#[test]
fn the_command_line_explains_itself_and_its_mistakes() {
    // Goal: help for newcomers; errors name the option, exit status 2.
    let run = |line: &str| {
        let output = Command::new(BINARY).args(line.split_whitespace()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (status, help, _) = run("--help");
    assert_eq!(status, Some(0));
    for word in ["Examples:", "--prefiller-hosts", "--decoder-ports", "--worker-hosts", "--config"]
    {
        assert!(help.contains(word), "{word}");
    }
    let (status, _, error) = run("--prefiller-hosts A B --prefiller-ports 1 --decoder-port 2");
    assert_eq!(status, Some(2));
    assert!(
        error.contains("--prefiller-hosts has 2 (A B), --prefiller-ports has 1 (1)"),
        "{error}"
    );
    let line = "--prefiller-host no-such-host.invalid --prefiller-port 1 --decoder-port 2";
    let (status, _, error) = run(line);
    assert_eq!(status, Some(1));
    assert!(error.contains("no-such-host.invalid"), "{error}");
    let (_, _, error) = run("--worker-port 1 --config /no/such/file.yaml");
    assert!(error.contains("/no/such/file.yaml"), "{error}");
}

#[test]
fn the_python_launcher_is_the_same_program() {
    // Goal: arguments, output and exit status are the binary's; without a binary it says where it
    // looked.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../python/ucm/pd/toy_proxy_server.py");
    let run = |binary: &str, arguments: &[&str]| {
        let mut command = Command::new("python3");
        command.arg(script).args(arguments).env("UCM_PROXY", binary);
        let output = command.output().expect("python3 runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (status, version, _) = run(BINARY, &["--version"]);
    assert_eq!((status, version.split(' ').next()), (Some(0), Some("ucm-proxy")));
    let (status, _, error) = run(BINARY, &["--prefiller-hosts", "A", "B", "--prefiller-port", "1"]);
    assert_eq!(status, Some(2));
    assert!(error.contains("prefiller hosts"), "{error}");
    let (status, _, error) = run("/no/such/program", &[]);
    assert_eq!(status, Some(1));
    assert!(error.contains("UCM_PROXY") && error.contains("/no/such/program"), "{error}");
}
