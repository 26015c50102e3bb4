//! Names to dial against the suite (the cases that need no announcing), and what is particular to them.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

use std::{future::ready, net::IpAddr, sync::Arc, time::Duration};

use forebay_registry::{
    Announcement, AnnouncementState, BoxFuture, GatewayRecord, Health, HostPort, Join, JoinSettings,
    Registry, SystemResolver,
    conformance::{Harness, PORT, Presence, Seen, address, until, until_health},
    parse_join,
    testing::FakeNames,
};

const HOST: &str = "gateways.example";
const EVERY: Duration = Duration::from_millis(20);

fn settings() -> JoinSettings {
    JoinSettings { every: EVERY, answer_max: Duration::from_millis(200) }
}

/// A name server, whose records operators write.
struct Names {
    names: FakeNames,
    present: Arc<parking_lot::Mutex<Vec<IpAddr>>>,
}

async fn harness() -> Names {
    Names { names: FakeNames::default(), present: Arc::default() }
}

struct Address {
    names: FakeNames,
    present: Arc<parking_lot::Mutex<Vec<IpAddr>>>,
    ip: IpAddr,
}

impl Harness for Names {
    fn open(&self) -> Arc<dyn Registry> {
        let names = parse_join(&format!("{HOST}:{PORT}")).unwrap();
        Arc::new(Join::new(names, Arc::new(self.names.clone()), settings()).unwrap())
    }

    fn appear(&mut self, _name: &str, address: HostPort) -> Box<dyn Presence> {
        let ip = address.ip().unwrap();
        let mut present = self.present.lock();
        present.push(ip);
        self.names.set(HOST, present.iter().copied());
        Box::new(Address { names: self.names.clone(), present: Arc::clone(&self.present), ip })
    }

    fn break_off(&mut self) -> BoxFuture<'_, ()> {
        self.names.fail(true);
        Box::pin(ready(()))
    }

    fn mend(&mut self) -> BoxFuture<'_, ()> {
        self.names.fail(false);
        Box::pin(ready(()))
    }

    fn lease(&self) -> Duration {
        10 * EVERY
    }
}

impl Presence for Address {
    fn withdraw(self: Box<Self>) -> BoxFuture<'static, ()> {
        let mut present = self.present.lock();
        let at = present.iter().position(|ip| *ip == self.ip).unwrap();
        present.remove(at);
        self.names.set(HOST, present.iter().copied());
        Box::pin(ready(()))
    }

    fn die(self: Box<Self>) {
        unreachable!("a name server does not notice");
    }

    fn announcement(&mut self) -> Option<&mut Announcement> {
        None
    }
}

forebay_registry::conformance!(harness();
    gateways_are_seen,
    withdrawn_gateways_go,
    late_watchers_see_all,
    living_gateways_stay,
    outages_stop_changes_only,
    one_address_is_one_gateway,
);

fn ip(n: u8) -> IpAddr {
    address(n).ip().unwrap()
}

#[tokio::test]
async fn each_address_of_each_name_is_a_gateway_whose_certificate_has_the_name() {
    let names = FakeNames::default();
    names.set("a.example", [ip(1), ip(2)]);
    names.set("b.example", [ip(2), "fd00::7".parse().unwrap()]);
    names.set("127.0.0.9", [ip(9)]);
    let list = parse_join("a.example:7070, b.example:7070,127.0.0.9:7071").unwrap();
    let join = Join::new(list, Arc::new(names), settings()).unwrap();
    let set = join.watch().next().await.unwrap();
    let record = |record: &GatewayRecord| (record.address.to_string(), record.server_name.clone());
    let name = |name: &str| Some(name.to_owned());
    assert_eq!(
        set.records().iter().map(record).collect::<Vec<_>>(),
        [
            ("127.0.0.1:7070".to_owned(), name("a.example")),
            ("127.0.0.2:7070".to_owned(), name("a.example")),
            ("127.0.0.9:7071".to_owned(), None),
            ("[fd00::7]:7070".to_owned(), name("b.example")),
        ]
    );
}

#[tokio::test]
async fn one_name_that_fails_keeps_its_answer_while_another_moves() {
    let names = FakeNames::default();
    names.set("a.example", [ip(1)]);
    names.set("b.example", [ip(2)]);
    let list = parse_join("a.example:7070,b.example:7070").unwrap();
    let join = Join::new(list, Arc::new(names.clone()), settings()).unwrap();
    let mut seen = Seen::by(&join);
    seen.until([1, 2]).await;
    until_health(&join, Health::Current).await;
    // An empty answer is as good as none.
    names.set("a.example", []);
    names.set("b.example", [ip(3)]);
    seen.until([1, 3]).await;
    until_health(&join, Health::Away).await;
    let sentence = join.state().sentence;
    assert!(
        sentence.starts_with("a.example does not resolve (an empty answer): its last answer stands"),
        "{sentence}"
    );
}

#[tokio::test]
async fn a_name_that_never_resolved_is_named() {
    let names = FakeNames::default();
    let list = parse_join("typo.example:7070").unwrap();
    let join = Join::new(list, Arc::new(names.clone()), settings()).unwrap();
    until("its sentence", || {
        join.state().sentence.starts_with("typo.example does not resolve (no such name)")
    })
    .await;
    let state = join.state();
    assert_eq!((state.health, state.age, join.watch().current()), (Health::Starting, None, None));
    names.set("typo.example", [ip(1)]);
    Seen::by(&join).until([1]).await;
}

#[tokio::test]
async fn a_name_server_that_hangs_is_not_waited_for() {
    let names = FakeNames::default();
    names.set(HOST, [ip(1)]);
    let join =
        Join::new(parse_join("gateways.example:7070").unwrap(), Arc::new(names.clone()), settings()).unwrap();
    let mut seen = Seen::by(&join);
    seen.until([1]).await;
    names.hang(true);
    until_health(&join, Health::Away).await;
    assert!(join.state().sentence.contains("no answer in 200ms"), "{}", join.state().sentence);
    names.hang(false);
    names.set(HOST, [ip(2)]);
    seen.until([2]).await;
    until_health(&join, Health::Current).await;
}

#[tokio::test]
async fn announcing_does_nothing_and_says_what_to_do_instead() {
    let names = FakeNames::default();
    names.set(HOST, [ip(1)]);
    let join = Join::new(parse_join("gateways.example:7070").unwrap(), Arc::new(names), settings()).unwrap();
    let record = GatewayRecord::new("gw-0", address(5)).unwrap();
    let mut announcement = join.announce(record).unwrap();
    announcement.registered().await;
    let AnnouncementState::NotNeeded { why } = announcement.state() else {
        panic!("{}", announcement.state())
    };
    assert!(why.starts_with("gateway gw-0 is not announced") && why.contains("127.0.0.5:7070"), "{why}");
    announcement.withdraw().await;
}

#[tokio::test]
async fn the_hosts_resolver_is_asked() {
    let list = parse_join("localhost:7070").unwrap();
    let join = Join::new(list, Arc::new(SystemResolver), JoinSettings::default()).unwrap();
    let set = join.watch().next().await.unwrap();
    let loopback =
        |record: &GatewayRecord| record.address.ip().unwrap().is_loopback() && record.address.port() == 7070;
    assert!(!set.is_empty() && set.records().iter().all(loopback), "{set:?}");
}
