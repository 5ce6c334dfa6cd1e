//! What the proxy costs: added latency against the server itself, and requests per second at
//! saturation against nginx as a plain reverse proxy, all in one run, in rounds that alternate so
//! that a noisy machine is noisy for all of them.
//!
//! `cargo bench -p ucm-proxy --bench overhead` measures (nginx from `NGINX`, else from `PATH`);
//! run as a test it only checks, in a second, that every way answers the right bytes.
#![allow(missing_docs, reason = "a bench")]
#![forbid(unsafe_code)]

use std::convert::Infallible;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

/// A prompt of some 250 tokens, and the server's answer to it.
const PROMPT_BYTES: usize = 1024;
const ANSWER: &str = "{\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"model\":\"m\",\"choices\":[{\
    \"index\":0,\"text\":\"It is a day like any other, and I cannot look at a calendar.\",\
    \"finish_reason\":\"length\"}],\"usage\":{\"prompt_tokens\":250,\"completion_tokens\":20}}";

struct Effort {
    rounds: usize,
    requests: usize,
    connections: usize,
    saturation: Duration,
}

const MEASURE: Effort =
    Effort { rounds: 7, requests: 2000, connections: 64, saturation: Duration::from_secs(2) };
const CHECK: Effort =
    Effort { rounds: 1, requests: 20, connections: 4, saturation: Duration::from_millis(50) };

fn main() {
    let measuring = std::env::args().any(|argument| argument == "--bench");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.expect("a runtime").block_on(run(if measuring { &MEASURE } else { &CHECK }));
}

/// Where requests go.
struct Way {
    name: &'static str,
    address: SocketAddr,
    /// Requests at the server for each of the client: what nginx would need two requests for.
    legs: f64,
    p50: Vec<f64>,
    p99: Vec<f64>,
    rate: Vec<f64>,
    /// Processor time a request, microseconds: what stays the same on a machine that others use too.
    cpu: Vec<f64>,
    child: Option<Running>,
}

struct Running(Child);

impl Running {
    /// Processor time of the process and its children (nginx's workers), so far.
    fn cpu_seconds(&self) -> f64 {
        const TICKS_PER_SECOND: f64 = 100.0; // USER_HZ, the same on all that matter
        let id = self.0.id();
        let children = format!("/proc/{id}/task/{id}/children");
        let children = std::fs::read_to_string(children).unwrap_or_default();
        let ids = children.split_whitespace().map(str::to_owned).chain([id.to_string()]);
        let ticks = ids.map(|id| {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            // Behind the name, which may hold anything: state, and user and system time as 12th, 13th.
            let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
            fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>()
        });
        ticks.sum::<f64>() / TICKS_PER_SECOND
    }
}

impl Drop for Running {
    /// By signal, not by force: nginx's workers outlive a master that is killed.
    fn drop(&mut self) {
        let ended = Command::new("kill").arg(self.0.id().to_string()).status();
        if !ended.is_ok_and(|status| status.success()) {
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

async fn run(effort: &Effort) {
    let directory = tempfile::tempdir().expect("a directory");
    let server = serve().await;
    let port = server.port().to_string();
    let local = "127.0.0.1";
    let mut ways = vec![Way::new("server itself", server, 1.0, None)];
    match nginx(directory.path(), server).await {
        Some((address, child)) => ways.push(Way::new("nginx", address, 1.0, Some(child))),
        None => eprintln!("no nginx (set NGINX or install it): no ratios against it"),
    }
    let mixed = ["--worker-hosts", local, "--worker-ports", &port];
    let (address, child) = proxy(&mixed);
    ways.push(Way::new("ucm-proxy, one leg", address, 1.0, Some(child)));
    let apart = [
        "--prefiller-host",
        local,
        "--prefiller-port",
        &port,
        "--decoder-host",
        local,
        "--decoder-port",
        &port,
    ];
    let (address, child) = proxy(&apart);
    ways.push(Way::new("ucm-proxy, prefill and decode", address, 2.0, Some(child)));
    for _ in 0..effort.rounds {
        for way in &mut ways {
            way.measure(effort).await;
        }
    }
    report(&ways);
}

impl Way {
    fn new(name: &'static str, address: SocketAddr, legs: f64, child: Option<Running>) -> Self {
        let empty = Vec::new;
        Self { name, address, legs, p50: empty(), p99: empty(), rate: empty(), cpu: empty(), child }
    }

    async fn measure(&mut self, effort: &Effort) {
        let mut times = Vec::with_capacity(effort.requests);
        let mut client = Client::connect(self.address).await;
        for _ in 0..effort.requests {
            let started = Instant::now();
            client.ask().await;
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        self.p50.push(times[times.len() / 2]);
        self.p99.push(times[times.len() * 99 / 100]);
        let cpu_before = self.child.as_ref().map_or(0.0, Running::cpu_seconds);
        let until = Instant::now() + effort.saturation;
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..effort.connections {
            let address = self.address;
            clients.spawn(async move {
                let mut client = Client::connect(address).await;
                let mut count = 0_u64;
                while Instant::now() < until {
                    client.ask().await;
                    count += 1;
                }
                count
            });
        }
        let count: u64 = clients.join_all().await.iter().sum();
        self.rate.push(count as f64 / effort.saturation.as_secs_f64());
        let cpu = self.child.as_ref().map_or(0.0, Running::cpu_seconds) - cpu_before;
        self.cpu.push(cpu * 1e6 / count as f64);
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn report(ways: &[Way]) {
    let direct = &ways[0];
    let nginx = ways.iter().find(|way| way.name == "nginx");
    println!(
        "{:<30} {:>9} {:>9} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9}",
        "way",
        "p50 ms",
        "p99 ms",
        "added p50",
        "added p99",
        "req/s",
        "of nginx",
        "per leg",
        "CPU us"
    );
    for way in ways {
        let added = |of: fn(&Way) -> &Vec<f64>| {
            let differences = of(way).iter().zip(of(direct)).map(|(ours, theirs)| ours - theirs);
            median(&differences.collect::<Vec<_>>())
        };
        // Ratios are taken round by round: both sides of each saw the same noise.
        let ratio = nginx.map_or(f64::NAN, |nginx| {
            let ratios = way.rate.iter().zip(&nginx.rate).map(|(ours, theirs)| ours / theirs);
            median(&ratios.collect::<Vec<_>>())
        });
        println!(
            "{:<30} {:>9.3} {:>9.3} {:>10.3} {:>10.3} {:>9.0} {:>9.2} {:>9.2} {:>9.0}",
            way.name,
            median(&way.p50),
            median(&way.p99),
            added(|way| &way.p50),
            added(|way| &way.p99),
            median(&way.rate),
            ratio,
            ratio * way.legs,
            median(&way.cpu)
        );
    }
    println!(
        "medians of {} alternating rounds; every answer's bytes were compared",
        ways[0].p50.len()
    );
}

/// One connection of a client.
struct Client {
    sender: SendRequest<Full<Bytes>>,
    body: Bytes,
}

impl Client {
    async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("it listens");
        let _ = stream.set_nodelay(true);
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        tokio::spawn(async move {
            let _ = connection.await;
        });
        let body = serde_json::json!({"model": "m", "prompt": "p".repeat(PROMPT_BYTES),
            "max_tokens": 20, "temperature": 0});
        Self { sender, body: body.to_string().into() }
    }

    async fn ask(&mut self) {
        self.sender.ready().await.expect("the connection is kept");
        let request = Request::post("/v1/completions")
            .header("host", "bench")
            .header("content-type", "application/json")
            .body(Full::new(self.body.clone()))
            .expect("a request");
        let response = self.sender.send_request(request).await.expect("an answer");
        assert_eq!(response.status(), 200);
        let body = response.into_body().collect().await.expect("a whole answer").to_bytes();
        assert!(body == ANSWER, "other bytes");
    }
}

/// The server behind: reads the request, answers at once.
async fn serve() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            let _ = stream.set_nodelay(true);
            tokio::spawn(async move {
                let service = service_fn(|request: Request<Incoming>| async move {
                    let _ = request.into_body().collect().await;
                    let response = Response::builder().header("content-type", "application/json");
                    let body = Full::new(Bytes::from_static(ANSWER.as_bytes()));
                    Ok::<_, Infallible>(response.body(body).expect("a response"))
                });
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    address
}

fn proxy(options: &[&str]) -> (SocketAddr, Running) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ucm-proxy"))
        .args(["--host", "127.0.0.1", "--port", "0", "--access-log", "/dev/null"])
        .args(options)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the proxy starts");
    let stderr = child.stderr.take().expect("standard error");
    let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
    let listening = "listening on http://";
    let line = lines.find(|line| line.contains(listening)).expect("it listens");
    let address = line.rsplit(listening).next().expect("an address").parse().expect("an address");
    std::thread::spawn(move || lines.for_each(drop));
    (address, Running(child))
}

async fn nginx(directory: &Path, server: SocketAddr) -> Option<(SocketAddr, Running)> {
    let program = std::env::var_os("NGINX").map_or("nginx".into(), PathBuf::from);
    let free = TcpListener::bind("127.0.0.1:0").await.ok()?.local_addr().ok()?;
    let path = directory.display();
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    let config = format!(
        "daemon off; worker_processes {workers}; pid {path}/pid; error_log {path}/errors;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log /dev/null;\n\
           client_body_temp_path {path}/a; proxy_temp_path {path}/b; fastcgi_temp_path {path}/c;\n\
           uwsgi_temp_path {path}/d; scgi_temp_path {path}/e;\n\
           upstream server {{ server {server}; keepalive 256; }}\n\
           server {{ listen {free}; keepalive_requests 100000000;\n\
             location / {{ proxy_pass http://server; proxy_http_version 1.1;\n\
               proxy_set_header Connection \"\"; proxy_buffering off; }} }} }}\n"
    );
    let file = directory.join("nginx.conf");
    std::fs::write(&file, config).ok()?;
    let child = Command::new(program)
        .args(["-p".as_ref(), directory.as_os_str(), "-c".as_ref(), file.as_os_str()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let child = Running(child.ok()?);
    let deadline = Instant::now() + Duration::from_secs(5);
    while TcpStream::connect(free).await.is_err() {
        if Instant::now() > deadline {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Some((free, child))
}
