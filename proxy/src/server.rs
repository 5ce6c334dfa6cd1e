//! Listeners, client connections and the proxy's life from start to the last finished request.
//! Owns sockets; what a request gets is the service's.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use crate::admin;
use crate::app::{App, Pools};
use crate::log;
use crate::reload;
use crate::service;
use crate::settings::Settings;
use crate::socket;
use crate::tls;
use crate::upstream;
use crate::watch as watching;

/// After an error of accept, such as no descriptors left, the listener rests this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that may wait to be accepted: a thousand clients that come in one moment are more
/// than the usual 1024 with those of the moment before. The kernel lowers it to its own limit.
const BACKLOG: u32 = 65_535;
/// A TLS handshake takes at most this.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Runs the proxy until a signal ends it.
pub async fn run(settings: Settings) -> Result<(), String> {
    for notice in &settings.notices {
        log::info(notice);
    }
    check_names(&settings).await?;
    let tls = settings.tls.as_ref().map(tls::acceptor).transpose()?;
    let listeners = bind(&settings.host, settings.port).await?;
    let admin_listener = match settings.admin_port {
        Some(port) => Some(admin::bind(port).await?),
        None => None,
    };
    let app = Arc::new(App::new(settings)?);
    let mut hangup = signal(SignalKind::hangup()).map_err(|error| error.to_string())?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
    let (stop, stopping) = watch::channel(());
    for instance in app.pools.members() {
        watching::spawn(app.clone(), instance);
    }
    announce(&app, &listeners);
    let shared = Shared {
        app: app.clone(),
        tls,
        places: Arc::new(Semaphore::new(app.settings.max_connections)),
        stopping,
    };
    for listener in listeners {
        tokio::spawn(accept_all(listener, shared.clone()));
    }
    if let Some(listener) = admin_listener {
        tokio::spawn(admin::serve(listener, app.clone()));
    }
    drop(shared);
    loop {
        tokio::select! {
            _ = hangup.recv() => reload::reload(&app).await,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    tokio::select! {
        () = shut_down(&app, stop) => {}
        _ = terminate.recv() => log::warn("a second signal: requests in flight are cut off"),
        _ = interrupt.recv() => log::warn("a second signal: requests in flight are cut off"),
    }
    Ok(())
}

async fn check_names(settings: &Settings) -> Result<(), String> {
    let app_pools = match &settings.servers {
        crate::settings::Servers::Disaggregated { prefillers, decoders } => {
            vec![("prefill", prefillers), ("decode", decoders)]
        }
        crate::settings::Servers::Mixed { workers } => vec![("worker", workers)],
    };
    for (role, addresses) in app_pools {
        for address in addresses {
            let resolved = upstream::resolve(address).await;
            resolved.map_err(|why| format!("{role} server {address}: {why}"))?;
        }
    }
    Ok(())
}

/// Listens on every address that `host` has. One that this machine does not offer (IPv6 turned
/// off) is left out as long as another one works.
async fn bind(host: &str, port: u16) -> Result<Vec<TcpListener>, String> {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let found = tokio::net::lookup_host((bare, port)).await;
    let found = found.map_err(|error| format!("--host `{host}` cannot be resolved: {error}"))?;
    let mut addresses: Vec<SocketAddr> = found.collect();
    if bare == "localhost" {
        // A hosts file may name one family only; clients try both.
        addresses.push(SocketAddr::from(([127, 0, 0, 1], port)));
        addresses.push(SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port)));
    }
    addresses.sort();
    addresses.dedup();
    let mut listeners: Vec<TcpListener> = Vec::new();
    for mut address in addresses {
        if let (0, Some(first)) = (port, listeners.first()) {
            let chosen = first.local_addr().map_err(|error| error.to_string())?;
            address.set_port(chosen.port()); // one free port for all addresses
        }
        match listen(address) {
            Ok(listener) => listeners.push(listener),
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(format!("cannot listen on {address}: {error}")),
        }
    }
    if listeners.is_empty() {
        return Err(format!("--host `{host}` has no address of this machine"));
    }
    Ok(listeners)
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?; // a restart finds connections of the run before in TIME_WAIT
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Whether this machine does not have the address: not assigned, or its family is turned off.
fn is_absent(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
}

fn announce(app: &App, listeners: &[TcpListener]) {
    let mode = match app.pools {
        Pools::Disaggregated { .. } => "PD disaggregation",
        Pools::Mixed { .. } => "mixed workers",
    };
    for pool in app.pools.all() {
        let names: Vec<_> = pool.members().iter().map(|member| member.name.clone()).collect();
        log::info(format!("{mode}: {} servers: {}", pool.role, names.join(", ")));
    }
    let scheme = if app.settings.tls.is_some() { "https" } else { "http" };
    for listener in listeners {
        if let Ok(address) = listener.local_addr() {
            log::info(format!("listening on {scheme}://{address}"));
        }
    }
}

#[derive(Clone)]
struct Shared {
    app: Arc<App>,
    tls: Option<TlsAcceptor>,
    places: Arc<Semaphore>,
    stopping: watch::Receiver<()>,
}

async fn accept_all(listener: TcpListener, mut shared: Shared) {
    loop {
        // Over the limit of connections the next ones wait in the kernel's backlog.
        let Ok(place) = shared.places.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = shared.stopping.changed() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                let shared = shared.clone();
                tokio::spawn(async move {
                    shared.app.metrics.connections.fetch_add(1, Relaxed);
                    connection(stream, peer, &shared).await;
                    shared.app.metrics.connections.fetch_sub(1, Relaxed);
                    drop(place);
                });
            }
            Err(error) => {
                log::warn(format!("accepting a connection failed: {error}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, shared: &Shared) {
    // Best effort: without these options it works, later.
    let _ = socket::tune(&stream);
    match &shared.tls {
        None => serve(stream, peer, shared).await,
        Some(tls) => {
            // A client that does not finish its handshake has nobody to be told about it.
            let handshake = Box::pin(tokio::time::timeout(HANDSHAKE_MAX, tls.accept(stream)));
            if let Ok(Ok(stream)) = handshake.await {
                Box::pin(serve(stream, peer, shared)).await;
            }
        }
    }
}

async fn serve<S>(stream: S, peer: SocketAddr, shared: &Shared)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // Boxed, so that an idle connection does not hold the room of a request.
    let service =
        service_fn(|request| Box::pin(service::answer(shared.app.clone(), request, peer)));
    let settings = &shared.app.settings;
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(settings.body_timeout)
        .max_buf_size(settings.max_header)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let mut stopping = shared.stopping.clone();
    tokio::select! {
        // Errors are clients that went away or spoke no HTTP; hyper has answered what it could.
        _ = connection.as_mut() => {}
        _ = stopping.changed() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

/// Takes no more connections, lets requests finish, and ends.
async fn shut_down(app: &App, stop: watch::Sender<()>) {
    app.begin_shutdown();
    let limit = app.settings.shutdown_timeout;
    log::info(format!("shutting down; requests in flight get {} s", limit.as_secs_f64()));
    let _ = stop.send(());
    // Every connection holds a receiver; when the last one is gone all are closed.
    if tokio::time::timeout(limit, stop.closed()).await.is_err() {
        let left = app.metrics.in_flight.load(Relaxed);
        log::warn(format!("{left} request(s) did not finish in time and are cut off"));
    }
}
