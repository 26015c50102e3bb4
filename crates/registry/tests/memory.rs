//! The registry of one process against the suite.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

use std::{future::ready, sync::Arc, time::Duration};

use forebay_registry::{
    BoxFuture, HostPort, Memory, Registry,
    conformance::{Announced, Harness, Presence},
};

struct InProcess(Memory);

async fn harness() -> InProcess {
    InProcess(Memory::new(Duration::from_millis(600)))
}

impl Harness for InProcess {
    fn open(&self) -> Arc<dyn Registry> {
        Arc::new(self.0.clone())
    }

    fn appear(&mut self, name: &str, address: HostPort) -> Box<dyn Presence> {
        Announced::announce(self.open(), name, address)
    }

    fn break_off(&mut self) -> BoxFuture<'_, ()> {
        self.0.set_away(true);
        Box::pin(ready(()))
    }

    fn mend(&mut self) -> BoxFuture<'_, ()> {
        self.0.set_away(false);
        Box::pin(ready(()))
    }

    fn lease(&self) -> Duration {
        Duration::from_millis(600)
    }
}

forebay_registry::conformance!(harness();
    gateways_are_seen,
    withdrawn_gateways_go,
    the_last_gateway_goes_too,
    dropped_gateways_go,
    late_watchers_see_all,
    living_gateways_stay,
    dead_gateways_expire,
    outages_stop_changes_only,
    one_address_is_one_gateway,
    the_latest_has_the_name,
    a_restarted_gateway_is_back_at_once,
    renaming_leaves_no_gap,
    announcing_survives_an_outage,
);

#[tokio::test]
async fn a_watcher_hears_that_the_registry_is_gone() {
    let memory = Memory::new(Duration::from_secs(1));
    let mut watch = memory.watch();
    assert!(watch.next().await.is_some_and(|set| set.is_empty()));
    drop(memory);
    assert!(watch.next().await.is_none());
    assert!(watch.current().is_some(), "the last set stands");
}

#[tokio::test]
async fn records_that_nobody_could_use_are_refused() {
    let memory = Memory::new(Duration::from_secs(1));
    let good = forebay_registry::GatewayRecord::new("gw", "10.0.0.7:1".parse().unwrap()).unwrap();
    for bad in [
        forebay_registry::GatewayRecord { name: "a/b".to_owned(), ..good.clone() },
        forebay_registry::GatewayRecord { address: "0.0.0.0:1".parse().unwrap(), ..good.clone() },
    ] {
        assert!(memory.announce(bad).is_err());
    }
    assert!(memory.announce(good).is_ok());
}
