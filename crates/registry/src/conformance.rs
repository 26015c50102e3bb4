//! What every registry does, as cases that run against each of them.
//!
//! A registry's tests give a [`Harness`] and name their cases with [`conformance!`](crate::conformance!). Cases wait for
//! states, never for a time; what has to pass is a lease, and that is as short as the registry allows.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::time::{interval, timeout};

use crate::{
    Announcement, AnnouncementState, BoxFuture, GatewayRecord, Gateways, Health, HostPort, Registry, Watch,
};

/// How long a case waits for a state.
pub const WAIT_MAX: Duration = Duration::from_secs(30);

/// Where gateways listen in the cases; `Join` gives all addresses of a name one port.
pub const PORT: u16 = 7070;

/// A registry under test, and what may happen to it.
pub trait Harness: Send {
    /// The registry as one more process would open it.
    fn open(&self) -> Arc<dyn Registry>;

    /// Makes a gateway known, by announcing it in a process of its own or by whatever makes it known here.
    fn appear(&mut self, name: &str, address: HostPort) -> Box<dyn Presence>;

    /// The registry stops answering.
    fn break_off(&mut self) -> BoxFuture<'_, ()>;

    /// It answers again and knows what it knew.
    fn mend(&mut self) -> BoxFuture<'_, ()>;

    /// The lease of what is announced.
    fn lease(&self) -> Duration;
}

/// A gateway's being known.
pub trait Presence: Send {
    /// It says goodbye.
    fn withdraw(self: Box<Self>) -> BoxFuture<'static, ()>;

    /// It dies without a word.
    fn die(self: Box<Self>);

    /// Where its announcement stands; `None` where there are no announcements.
    fn announcement(&mut self) -> Option<&mut Announcement>;
}

/// A presence by announcement; the registry lives as long.
pub struct Announced {
    announcement: Announcement,
    _registry: Arc<dyn Registry>,
}

impl Announced {
    /// Announces a gateway.
    pub fn announce(registry: Arc<dyn Registry>, name: &str, address: HostPort) -> Box<dyn Presence> {
        let record = GatewayRecord::new(name, address).expect("cases use good records");
        let announcement = registry.announce(record).expect("cases use good records");
        Box::new(Self { announcement, _registry: registry })
    }
}

impl Presence for Announced {
    fn withdraw(self: Box<Self>) -> BoxFuture<'static, ()> {
        Box::pin(self.announcement.withdraw())
    }

    fn die(self: Box<Self>) {
        self.announcement.abandon();
    }

    fn announcement(&mut self) -> Option<&mut Announcement> {
        Some(&mut self.announcement)
    }
}

/// The address of gateway `n`.
pub fn address(n: u8) -> HostPort {
    HostPort::new(format!("127.0.0.{n}"), PORT).expect("an address")
}

/// The last bytes of a set's addresses, by which [`address`] made them.
fn numbers(set: &Gateways) -> BTreeSet<u8> {
    let number = |record: &GatewayRecord| record.address.host().rsplit('.').next()?.parse().ok();
    set.records().iter().map(|record| number(record).expect("an address of the suite")).collect()
}

/// A watcher that remembers.
pub struct Seen {
    watch: Watch,
    /// Every set that it was given, as numbers of addresses.
    pub history: Vec<BTreeSet<u8>>,
}

impl Seen {
    /// By a watcher of `registry`.
    pub fn by(registry: &dyn Registry) -> Self {
        Self { watch: registry.watch(), history: Vec::new() }
    }

    /// Waits until it is given exactly these gateways.
    pub async fn until(&mut self, expected: impl IntoIterator<Item = u8>) {
        let expected: BTreeSet<u8> = expected.into_iter().collect();
        if self.history.last() == Some(&expected) {
            return;
        }
        let waited = timeout(WAIT_MAX, async {
            loop {
                let set = self.watch.next().await.expect("the registry lives");
                self.history.push(numbers(&set));
                if self.history.last() == Some(&expected) {
                    return;
                }
            }
        });
        if waited.await.is_err() {
            panic!("gateways {expected:?} were not seen within {WAIT_MAX:?}, but {:?}", self.history);
        }
    }

    /// The set that a request for one would find now.
    pub fn now(&self) -> BTreeSet<u8> {
        self.watch.current().map(|set| numbers(&set)).unwrap_or_default()
    }
}

/// Waits until the registry says this of itself.
pub async fn until_health(registry: &dyn Registry, health: Health) {
    until(&format!("health {health}"), || registry.state().health == health).await;
}

/// Waits until the registry's sentence has `part` in it.
pub async fn until_sentence(registry: &dyn Registry, part: &str) {
    let said = comes(|| registry.state().sentence.contains(part)).await;
    assert!(said, "`{part}` was not said within {WAIT_MAX:?}, but: {}", registry.state().sentence);
}

/// Waits until `holds`.
pub async fn until(what: &str, holds: impl FnMut() -> bool) {
    assert!(comes(holds).await, "{what} did not come within {WAIT_MAX:?}");
}

/// Asks every few milliseconds, for what no event tells.
async fn comes(mut holds: impl FnMut() -> bool) -> bool {
    let asking = async {
        let mut tick = interval(Duration::from_millis(5));
        while !holds() {
            tick.tick().await;
        }
    };
    timeout(WAIT_MAX, asking).await.is_ok()
}

async fn until_registered(presence: &mut dyn Presence) {
    let announcement = presence.announcement().expect("an announcing registry");
    let waited = timeout(WAIT_MAX, announcement.registered()).await;
    assert!(waited.is_ok(), "not registered within {WAIT_MAX:?}, but: {}", announcement.state());
}

async fn until_superseded(presence: &mut dyn Presence) -> String {
    let announcement = presence.announcement().expect("an announcing registry");
    let waited = timeout(WAIT_MAX, async {
        loop {
            if let AnnouncementState::Superseded { why } = announcement.state() {
                return why;
            }
            announcement.changed().await;
        }
    });
    waited.await.expect("the former announcement is told")
}

/// Gateways are seen as they come, by a watcher that was there before.
pub async fn gateways_are_seen(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let _one = harness.appear("gw-1", address(1));
    seen.until([1]).await;
    let _two = harness.appear("gw-2", address(2));
    seen.until([1, 2]).await;
    until_health(&*registry, Health::Current).await;
    let state = registry.state();
    assert!(state.age.is_some_and(|age| age < WAIT_MAX) && !state.sentence.is_empty(), "{state:?}");
}

/// One that says goodbye is gone; the others stay.
pub async fn withdrawn_gateways_go(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let (one, _two) = (harness.appear("gw-1", address(1)), harness.appear("gw-2", address(2)));
    seen.until([1, 2]).await;
    one.withdraw().await;
    seen.until([2]).await;
}

/// The last one that says goodbye leaves an empty set.
pub async fn the_last_gateway_goes_too(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let one = harness.appear("gw-1", address(1));
    seen.until([1]).await;
    one.withdraw().await;
    seen.until([]).await;
}

/// Dropping an announcement is goodbye as well.
pub async fn dropped_gateways_go(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let one = harness.appear("gw-1", address(1));
    seen.until([1]).await;
    drop(one);
    seen.until([]).await;
}

/// A watcher that comes later is given the whole set first, in one piece.
pub async fn late_watchers_see_all(harness: &mut dyn Harness) {
    let early = harness.open();
    let mut seen = Seen::by(&*early);
    let _presences = [harness.appear("gw-1", address(1)), harness.appear("gw-2", address(2))];
    seen.until([1, 2]).await;
    let late = harness.open();
    let mut late_seen = Seen::by(&*late);
    late_seen.until([1, 2]).await;
    assert_eq!(late_seen.history.last(), Some(&BTreeSet::from([1, 2])));
    assert!(late_seen.history.len() <= 2, "in one piece: {:?}", late_seen.history);
    let mut same = Seen::by(&*late);
    same.until([1, 2]).await;
    assert_eq!(same.history.len(), 1, "a second watcher is given what is known at once");
}

/// One that lives stays, over several leases.
pub async fn living_gateways_stay(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let _one = harness.appear("gw-1", address(1));
    seen.until([1]).await;
    let mut watch = registry.watch();
    assert!(watch.next().await.is_some());
    let change = timeout(harness.lease() * 2, watch.next()).await;
    assert!(change.is_err(), "nothing changes while all live: {change:?}");
}

/// One that dies without a word is gone after its lease, and not before.
pub async fn dead_gateways_expire(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let (one, _two) = (harness.appear("gw-1", address(1)), harness.appear("gw-2", address(2)));
    seen.until([1, 2]).await;
    one.die();
    // Its last sign of life was at most a third of a lease ago.
    let early = timeout(harness.lease() / 3, seen.until([2])).await;
    assert!(early.is_err(), "it has a lease");
    seen.until([2]).await;
}

/// While the registry does not answer, the last set stands and its age is known; afterwards changes are seen again.
pub async fn outages_stop_changes_only(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let (_one, two) = (harness.appear("gw-1", address(1)), harness.appear("gw-2", address(2)));
    seen.until([1, 2]).await;
    until_health(&*registry, Health::Current).await;

    harness.break_off().await;
    until_health(&*registry, Health::Away).await;
    assert_eq!(seen.now(), [1, 2].into(), "the last set stands");
    let state = registry.state();
    let aged = || registry.state().age > state.age;
    until("a rising age", aged).await;
    assert!(state.sentence.contains("stand"), "{}", state.sentence);
    let _three = harness.appear("gw-3", address(3));
    assert_eq!(seen.now(), [1, 2].into());

    harness.mend().await;
    seen.until([1, 2, 3]).await;
    until_health(&*registry, Health::Current).await;
    let complete = |set: &BTreeSet<u8>| set.contains(&1) && set.contains(&2);
    let since = seen.history.iter().position(complete).expect("seen before");
    assert!(seen.history[since..].iter().all(complete), "nobody was missing at any time: {:?}", seen.history);
    two.withdraw().await;
    seen.until([1, 3]).await;
}

/// Two presences at one address are one gateway, until both are gone.
pub async fn one_address_is_one_gateway(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let _other = harness.appear("gw-2", address(2));
    let first = harness.appear("gw-1", address(1));
    seen.until([1, 2]).await;
    let second = harness.appear("gw-1", address(1));
    let third = harness.appear("gw-3", address(3));
    seen.until([1, 2, 3]).await;
    let set = registry.watch().next().await.expect("known");
    assert_eq!(set.len(), 3, "{set:?}");
    second.withdraw().await;
    third.withdraw().await;
    seen.until([1, 2]).await;
    first.withdraw().await;
    seen.until([2]).await;
}

/// A name belongs to whoever announced it last; the former is told, waits, and has it back.
pub async fn the_latest_has_the_name(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let mut former = harness.appear("gw", address(1));
    seen.until([1]).await;
    let mut latest = harness.appear("gw", address(2));
    seen.until([2]).await;
    let why = until_superseded(&mut *former).await;
    assert!(why.contains("gateway gw") && why.contains("127.0.0.2"), "{why}");
    until_registered(&mut *latest).await;
    latest.withdraw().await;
    seen.until([1]).await;
    until_registered(&mut *former).await;
}

/// A gateway that crashed and comes back needs not wait for its old lease; the end of that takes nothing from it.
pub async fn a_restarted_gateway_is_back_at_once(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let old = harness.appear("gw", address(1));
    seen.until([1]).await;
    old.die();
    let mut new = harness.appear("gw", address(2));
    seen.until([2]).await;
    assert!(
        seen.history.iter().skip_while(|set| set.is_empty()).all(|set| !set.is_empty()),
        "before the old lease lapsed"
    );
    until_registered(&mut *new).await;
    let change = timeout(harness.lease() * 2, seen.until([])).await;
    assert!(change.is_err(), "the old lease's end takes nothing: {:?}", seen.history);
}

/// A renamed gateway is never missing: it announces its new name before it drops the old one.
pub async fn renaming_leaves_no_gap(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    let old = harness.appear("old", address(1));
    seen.until([1]).await;
    let mut new = harness.appear("new", address(1));
    until_registered(&mut *new).await;
    until("both names", || registry.watch().current().is_some_and(|set| set.len() == 2)).await;
    old.withdraw().await;
    until("the new name alone", || {
        let set = registry.watch().current().expect("known");
        assert!(!set.is_empty(), "never missing");
        set.len() == 1 && set.get("new").is_some()
    })
    .await;
    seen.until([1]).await;
    assert!(seen.history.iter().skip_while(|set| set.is_empty()).all(|set| set == &BTreeSet::from([1])));
}

/// A gateway that comes during an outage says that it waits, and is seen after it.
pub async fn announcing_survives_an_outage(harness: &mut dyn Harness) {
    let registry = harness.open();
    let mut seen = Seen::by(&*registry);
    seen.until([]).await;
    harness.break_off().await;
    until_health(&*registry, Health::Away).await;
    let mut one = harness.appear("gw-1", address(1));
    let announcement = one.announcement().expect("an announcing registry");
    let waits = |state: &AnnouncementState| matches!(state, AnnouncementState::Pending { .. });
    assert!(waits(&announcement.changed().await) && seen.now().is_empty());
    harness.mend().await;
    until_registered(&mut *one).await;
    seen.until([1]).await;
}

/// Makes one test of each named case.
#[macro_export]
macro_rules! conformance {
    ($harness:expr; $($case:ident),+ $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                $crate::conformance::$case(&mut $harness.await).await;
            }
        )+
    };
}
