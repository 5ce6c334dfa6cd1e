//! The proxy as a process, on a free port.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::client;
use super::scripted::Server;

pub const BINARY: &str = env!("CARGO_BIN_EXE_ucm-proxy");

/// A running proxy; killed with its value.
pub struct Proxy {
    pub child: Child,
    pub port: u16,
    pub admin_port: u16,
    errors: Arc<Mutex<String>>,
    lines: Arc<Mutex<String>>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn follow(stream: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let text = Arc::new(Mutex::new(String::new()));
    let copy = text.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let mut copy = copy.lock().unwrap();
            copy.push_str(&line);
            copy.push('\n');
        }
    });
    text
}

/// Options that name these servers.
pub fn servers(prefill: &[&Server], decode: &[&Server]) -> Vec<String> {
    let ports = |servers: &[&Server]| servers.iter().map(|s| s.port()).collect::<Vec<_>>();
    let hosts = |servers: &[&Server]| vec!["127.0.0.1".to_owned(); servers.len()];
    let mut options = vec!["--prefiller-hosts".to_owned()];
    options.extend(hosts(prefill));
    options.push("--prefiller-ports".to_owned());
    options.extend(ports(prefill));
    options.push("--decoder-hosts".to_owned());
    options.extend(hosts(decode));
    options.push("--decoder-ports".to_owned());
    options.extend(ports(decode));
    options
}

impl Proxy {
    /// Between these servers, with more options.
    pub async fn between(prefill: &[&Server], decode: &[&Server], more: &str) -> Self {
        let mut options = servers(prefill, decode);
        options.extend(more.split_whitespace().map(str::to_owned));
        Self::start(&options, &[]).await
    }

    pub async fn start(options: &[String], environment: &[(&str, &str)]) -> Self {
        let mut child = Command::new(BINARY)
            .args(["--host", "127.0.0.1", "--port", "0", "--admin-port", "0"])
            .args(options)
            .env_remove("OPENAI_API_KEY")
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the proxy starts");
        let errors = follow(child.stderr.take().unwrap());
        let lines = follow(child.stdout.take().unwrap());
        let mut proxy = Self { child, port: 0, admin_port: 0, errors, lines };
        proxy.admin_port = proxy.port_after("admin endpoint on http://127.0.0.1:").await;
        let scheme = if options.iter().any(|o| o == "--tls-cert") { "https" } else { "http" };
        proxy.port = proxy.port_after(&format!("listening on {scheme}://127.0.0.1:")).await;
        proxy
    }

    async fn port_after(&mut self, text: &str) -> u16 {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let log = self.log();
            if let Some(at) = log.find(text) {
                let digits = log[at + text.len()..].chars().take_while(char::is_ascii_digit);
                return digits.collect::<String>().parse().expect("a port");
            }
            let ended = self.child.try_wait().expect("a child");
            assert!(ended.is_none() && Instant::now() < deadline, "the proxy said:\n{log}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What it said on standard error.
    pub fn log(&self) -> String {
        self.errors.lock().unwrap().clone()
    }

    /// Its access log.
    pub fn access_log(&self) -> String {
        self.lines.lock().unwrap().clone()
    }

    /// The value of a sample of `/metrics`, summed over those that begin like this.
    pub async fn metric(&self, beginning: &str) -> f64 {
        let text = client::get(self.port, "/metrics").await.text();
        let samples = text.lines().filter(|line| line.starts_with(beginning));
        samples.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
    }
}
