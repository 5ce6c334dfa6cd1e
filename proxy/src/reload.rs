//! SIGHUP: the servers and the routing of the configuration file, read again. Owns the difference
//! between what runs and what is written; everything else in the file takes a restart.

use std::sync::Arc;

use crate::app::App;
use crate::instance::{Address, Instance, Role, Scheme};
use crate::log;
use crate::options;
use crate::routing::Routing;
use crate::settings::Servers;
use crate::upstream;
use crate::watch;

/// Applies the file. A mistake in it changes nothing.
pub async fn reload(app: &Arc<App>) {
    let applied = match options::reload(&app.settings.command_line) {
        Ok((servers, routing)) => apply(app, servers, routing).await,
        Err(why) => Err(why),
    };
    match applied {
        Ok(()) => log::info("SIGHUP: the configuration file is read again"),
        Err(why) => log::warn(format!("SIGHUP changes nothing: {why}")),
    }
}

async fn apply(app: &Arc<App>, servers: Servers, routing: Option<Routing>) -> Result<(), String> {
    let wanted: Vec<(Role, Vec<Address>)> = match servers {
        Servers::Disaggregated { prefillers, decoders } => {
            vec![(Role::Prefill, prefillers), (Role::Decode, decoders)]
        }
        Servers::Mixed { workers } => vec![(Role::Worker, workers)],
    };
    for (role, addresses) in &wanted {
        if app.pools.of(*role).is_none() {
            return Err("changing between disaggregated and mixed mode takes a restart".to_owned());
        }
        for address in addresses {
            upstream::resolve(address).await?;
            if address.scheme == Scheme::Https {
                app.settings.trust.connector()?;
            }
        }
    }
    for (role, addresses) in wanted {
        let Some(pool) = app.pools.of(role) else { continue };
        for address in &addresses {
            let instance = Instance::new(role, address.clone(), &app.settings)?;
            if pool.add(instance.clone()) {
                log::info(format!("{role} server {address} is added"));
                watch::spawn(app.clone(), instance);
            }
        }
        for member in pool.members() {
            if !addresses.contains(&member.address) {
                pool.remove(&member.name);
                log::info(format!("{role} server {} is removed", member.name));
            }
        }
        if let Some(routing) = routing {
            pool.set_routing(match (role, routing) {
                (Role::Decode, Routing::PrefixAffinity) => Routing::LeastOutstanding,
                (_, routing) => routing,
            });
        }
    }
    Ok(())
}
