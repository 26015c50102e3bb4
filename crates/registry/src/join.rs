//! The registry of fleets that have none: names to dial, resolved again and again.
//!
//! In: host names with ports. Out: every address that they resolve to, each a gateway. A name that does not resolve keeps
//! its last addresses: a name server's bad minute is not a fleet without gateways.

use std::{collections::BTreeMap, io, net::IpAddr, sync::Arc, time::Duration};

use futures::future::join_all;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::{
    BoxFuture,
    announcement::Announcement,
    publish::{OwnedTask, Publisher},
    record::{GATEWAYS_MAX, GatewayRecord, Gateways, HostPort},
    registry::{Registry, RegistryError, RegistryState, Watch},
};

/// Names of one list.
pub const JOIN_NAMES_MAX: usize = 64;

/// Turns a name into addresses.
pub trait Resolve: Send + Sync + 'static {
    /// All addresses of `host`, which may be an address itself.
    ///
    /// # Errors
    /// Whatever kept it from an answer; no answer is as bad as a wrong one.
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>>;
}

/// The host's own resolver.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, host: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            let addresses = tokio::net::lookup_host((host, 0)).await?;
            Ok(addresses.map(|address| address.ip()).collect())
        })
    }
}

/// How often names are resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JoinSettings {
    /// From one resolution to the next.
    pub every: Duration,
    /// How long one may take.
    pub answer_max: Duration,
}

impl Default for JoinSettings {
    fn default() -> Self {
        Self { every: Duration::from_secs(5), answer_max: Duration::from_secs(5) }
    }
}

/// Gateways by their names in DNS.
#[derive(Debug)]
pub struct Join {
    publisher: Publisher,
    _task: OwnedTask,
}

impl Join {
    /// Begins to resolve `names`. Needs a tokio runtime.
    ///
    /// # Errors
    /// There are no names, or more than [`JOIN_NAMES_MAX`].
    pub fn new(
        names: Vec<HostPort>,
        resolver: Arc<dyn Resolve>,
        settings: JoinSettings,
    ) -> Result<Self, RegistryError> {
        if names.is_empty() || names.len() > JOIN_NAMES_MAX {
            let reason = format!("{} names to join: give 1 to {JOIN_NAMES_MAX}, as HOST:PORT", names.len());
            return Err(RegistryError::Settings { reason });
        }
        let listed = names.iter().map(HostPort::to_string).collect::<Vec<_>>().join(", ");
        let publisher = Publisher::new(format!("resolving {listed} for the first time"));
        let resolving = resolve_forever(names, resolver, settings, publisher.clone());
        Ok(Self { publisher, _task: OwnedTask(tokio::spawn(resolving)) })
    }
}

impl Registry for Join {
    fn announce(&self, record: GatewayRecord) -> Result<Announcement, RegistryError> {
        record.check()?;
        let why = format!(
            "gateway {} is not announced: with --join, agents find gateways by the names they are given; let one of \
             those names resolve to {}",
            record.name, record.address
        );
        Ok(Announcement::not_needed(record, why))
    }

    fn watch(&self) -> Watch {
        self.publisher.watch()
    }

    fn state(&self) -> RegistryState {
        self.publisher.state()
    }
}

async fn resolve_forever(
    names: Vec<HostPort>,
    resolver: Arc<dyn Resolve>,
    settings: JoinSettings,
    publisher: Publisher,
) {
    // The last answer for each name.
    let mut answers: Vec<Option<Vec<IpAddr>>> = vec![None; names.len()];
    let mut tick = interval(settings.every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let attempts = names.iter().map(|name| resolve(&*resolver, name, settings.answer_max));
        let mut troubles = Vec::new();
        for ((name, known), outcome) in names.iter().zip(&mut answers).zip(join_all(attempts).await) {
            match outcome {
                Ok(addresses) => *known = Some(addresses),
                Err(wrong) => {
                    let stands = match known {
                        Some(_) => "its last answer stands",
                        None => "it never did; check the name, or the name server",
                    };
                    troubles.push(format!("{} does not resolve ({wrong}): {stands}", name.host()));
                }
            }
        }
        if answers.iter().any(Option::is_some) {
            publisher.publish(gateways(&names, &answers));
        }
        if troubles.is_empty() {
            let known = gateways(&names, &answers).len();
            publisher.confirm(format!("{} names resolve to {known} gateways", names.len()));
        } else {
            publisher.trouble(troubles.join("; "));
        }
    }
}

async fn resolve(
    resolver: &dyn Resolve,
    name: &HostPort,
    answer_max: Duration,
) -> Result<Vec<IpAddr>, String> {
    match timeout(answer_max, resolver.resolve(name.host())).await {
        Ok(Ok(addresses)) if addresses.is_empty() => Err("an empty answer".to_owned()),
        Ok(Ok(mut addresses)) => {
            addresses.truncate(GATEWAYS_MAX);
            Ok(addresses)
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer in {answer_max:?}")),
    }
}

/// One gateway for each address and port; the first name that leads there says what its certificate must name.
fn gateways(names: &[HostPort], answers: &[Option<Vec<IpAddr>>]) -> Gateways {
    let mut by_address = BTreeMap::new();
    for (name, answer) in names.iter().zip(answers) {
        for ip in answer.iter().flatten() {
            let address = HostPort::from(std::net::SocketAddr::new(*ip, name.port()));
            let server_name = name.ip().is_none().then(|| name.host().to_owned());
            let record = GatewayRecord { name: address.to_string(), address, server_name };
            by_address.entry(record.name.clone()).or_insert(record);
        }
    }
    Gateways::new(by_address.into_values())
}
