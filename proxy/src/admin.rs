//! The admin endpoint, on loopback only: lists, adds, removes and drains servers at run time.
//!
//! - `GET /instances`
//! - `POST /instances` with `{"role": "prefill", "host": "node3", "port": 7800}`
//! - `DELETE /instances/{role}/{host:port}`: no new requests, those in flight finish
//! - `POST /instances/{role}/{host:port}/drain` and `.../undrain`

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::app::App;
use crate::instance::{Address, Instance, Role};
use crate::intake;
use crate::log;
use crate::passage::Refused;
use crate::pool::Pool;
use crate::reply::{self, Reply};
use crate::service::describe;
use crate::upstream;
use crate::watch;

/// After an error of accept the listener rests this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Listens on loopback.
pub async fn bind(port: u16) -> Result<TcpListener, String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listener = TcpListener::bind(address).await;
    let listener = listener.map_err(|error| format!("--admin-port: {address}: {error}"))?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    log::info(format!("admin endpoint on http://{address}/instances"));
    Ok(listener)
}

/// Answers admin requests for ever.
pub async fn serve(listener: TcpListener, app: Arc<App>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await; // no descriptors left: later there may be
            continue;
        };
        let app = app.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let app = app.clone();
                async move {
                    let answer = handle(&app, request).await;
                    Ok::<_, Infallible>(
                        answer.unwrap_or_else(|(status, why)| reply::error(status, &why)),
                    )
                }
            });
            // A client that breaks off an admin request gets none of it done but what was.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

type Handled = Result<Response<Reply>, Refused>;

async fn handle(app: &Arc<App>, request: Request<Incoming>) -> Handled {
    let path = request.uri().path().trim_matches('/').replace("%3A", ":");
    let words: Vec<&str> = path.split('/').collect();
    match (request.method().clone(), &words[..]) {
        (Method::GET, ["instances"]) => {
            let all: Vec<Value> =
                app.pools.members().iter().map(|instance| describe(instance)).collect();
            Ok(reply::json(StatusCode::OK, &json!({ "instances": all })))
        }
        (Method::POST, ["instances"]) => add(app, request).await,
        (Method::DELETE, ["instances", role, name]) => {
            let (pool, instance) = find(app, role, name)?;
            pool.remove(&instance.name);
            log::info(format!("{} server {} is removed", instance.role, instance.name));
            Ok(reply::json(StatusCode::OK, &describe(&instance)))
        }
        (Method::POST, ["instances", role, name, action @ ("drain" | "undrain")]) => {
            let (pool, instance) = find(app, role, name)?;
            instance.set_draining(*action == "drain");
            pool.grant_waiters();
            log::info(format!("{} server {}: {action}", instance.role, instance.name));
            Ok(reply::json(StatusCode::OK, &describe(&instance)))
        }
        _ => Err((
            StatusCode::NOT_FOUND,
            "GET or POST /instances, DELETE /instances/ROLE/HOST:PORT, \
             POST /instances/ROLE/HOST:PORT/drain or /undrain"
                .to_owned(),
        )),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewInstance {
    role: Role,
    host: String,
    port: u16,
}

async fn add(app: &Arc<App>, request: Request<Incoming>) -> Handled {
    let bad = |why: String| (StatusCode::BAD_REQUEST, why);
    let (parts, body) = request.into_parts();
    let body = intake::read(app, &parts.headers, body).await?;
    let new: NewInstance = serde_json::from_slice(&body).map_err(|error| bad(error.to_string()))?;
    let address = Address::new(&new.host, new.port).map_err(bad)?;
    upstream::resolve(&address).await.map_err(bad)?;
    let pool = pool_of(app, new.role)?;
    let instance = Instance::new(new.role, address, &app.settings).map_err(bad)?;
    if !pool.add(instance.clone()) {
        let why = format!("{} server {} is there already", new.role, instance.name);
        return Err((StatusCode::CONFLICT, why));
    }
    log::info(format!("{} server {} is added", new.role, instance.name));
    watch::spawn(app.clone(), instance.clone());
    Ok(reply::json(StatusCode::CREATED, &describe(&instance)))
}

fn pool_of(app: &App, role: Role) -> Result<&Arc<Pool>, Refused> {
    app.pools.of(role).ok_or_else(|| {
        let roles: Vec<_> = app.pools.all().iter().map(|pool| pool.role.to_string()).collect();
        let why = format!("no {role} servers in this mode; roles are {}", roles.join(" and "));
        (StatusCode::BAD_REQUEST, why)
    })
}

fn find<'a>(
    app: &'a App,
    role: &str,
    name: &str,
) -> Result<(&'a Arc<Pool>, Arc<Instance>), Refused> {
    let not_found = |why: String| (StatusCode::NOT_FOUND, why);
    let parsed: Role = serde_json::from_value(Value::from(role))
        .map_err(|_| not_found(format!("no role `{role}`: prefill, decode or worker")))?;
    let pool = pool_of(app, parsed)?;
    let mut members = pool.members().into_iter();
    match members.find(|instance| instance.name == name) {
        Some(instance) => Ok((pool, instance)),
        None => Err(not_found(format!("no {role} server `{name}`"))),
    }
}
