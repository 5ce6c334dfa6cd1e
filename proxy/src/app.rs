//! What all requests share: settings, the pools, metrics, the access log. Owns nothing of a
//! single request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use hyper::header::HeaderValue;

use crate::access_log::AccessLog;
use crate::headers;
use crate::instance::{Address, Instance, Role};
use crate::metrics::Metrics;
use crate::namespace;
use crate::pool::Pool;
use crate::routing::Routing;
use crate::settings::{Servers, Settings};

/// The shared state.
pub struct App {
    /// How the proxy was started.
    pub settings: Settings,
    /// Pools by what they are for.
    pub pools: Pools,
    /// Counters.
    pub metrics: Metrics,
    /// Where request lines go.
    pub access_log: AccessLog,
    /// `Bearer ...` for clients without credentials.
    pub key: Option<HeaderValue>,
    shutting_down: AtomicBool,
}

/// The servers, by mode.
pub enum Pools {
    /// Prefill and decode apart.
    Disaggregated {
        /// Where legs go.
        prefill: Arc<Pool>,
        /// Where requests go.
        decode: Arc<Pool>,
    },
    /// Every server does both.
    Mixed {
        /// Where requests go.
        workers: Arc<Pool>,
    },
}

impl Pools {
    fn new(settings: &Settings) -> Result<Self, String> {
        // An affinity of prompts is one of prefillers: decode keeps to its load.
        let decode_routing = match settings.routing {
            Routing::PrefixAffinity => Routing::LeastOutstanding,
            other => other,
        };
        let pool = |role, routing| Arc::new(Pool::new(role, routing, settings.limits));
        let fill = |pool: Arc<Pool>, addresses: &[Address]| {
            for address in addresses {
                pool.add(Instance::new(pool.role, address.clone(), settings)?);
            }
            Ok::<_, String>(pool)
        };
        Ok(match &settings.servers {
            Servers::Disaggregated { prefillers, decoders } => Self::Disaggregated {
                prefill: fill(pool(Role::Prefill, settings.routing), prefillers)?,
                decode: fill(pool(Role::Decode, decode_routing), decoders)?,
            },
            Servers::Mixed { workers } => {
                Self::Mixed { workers: fill(pool(Role::Worker, settings.routing), workers)? }
            }
        })
    }

    /// All pools.
    pub fn all(&self) -> Vec<&Arc<Pool>> {
        match self {
            Self::Disaggregated { prefill, decode } => vec![prefill, decode],
            Self::Mixed { workers } => vec![workers],
        }
    }

    /// The pool that answers clients.
    pub fn answering(&self) -> &Arc<Pool> {
        match self {
            Self::Disaggregated { decode, .. } => decode,
            Self::Mixed { workers } => workers,
        }
    }

    /// The pool that computes prompts only.
    pub fn prefill(&self) -> Option<&Arc<Pool>> {
        match self {
            Self::Disaggregated { prefill, .. } => Some(prefill),
            Self::Mixed { .. } => None,
        }
    }

    /// The pool of a role in this mode.
    pub fn of(&self, role: Role) -> Option<&Arc<Pool>> {
        self.all().into_iter().find(|pool| pool.role == role)
    }

    /// Whether routing looks at prompts.
    pub fn look_at_prefixes(&self) -> bool {
        self.all().iter().any(|pool| pool.routing() == Routing::PrefixAffinity)
    }

    /// Every server.
    pub fn members(&self) -> Vec<Arc<Instance>> {
        self.all().into_iter().flat_map(|pool| pool.members()).collect()
    }
}

impl App {
    /// Builds the state; opens the access log.
    pub fn new(settings: Settings) -> Result<Self, String> {
        Ok(Self {
            pools: Pools::new(&settings)?,
            access_log: AccessLog::open(&settings.access_log)?,
            metrics: Metrics::default(),
            key: headers::key_from_environment(),
            shutting_down: AtomicBool::new(false),
            settings,
        })
    }

    /// The text of `/metrics`.
    pub fn metrics_text(&self) -> String {
        let pools = self.pools.all();
        self.metrics.render(&pools, &namespace::metrics_text(&self.pools))
    }

    /// From now on `/health` says no; requests still finish.
    pub fn begin_shutdown(&self) {
        self.shutting_down.store(true, Relaxed);
    }

    /// Whether a shutdown has begun.
    pub fn is_shutting_down(&self) -> bool {
        self.shutting_down.load(Relaxed)
    }
}
