//! How listings and events become a set. Time is an argument; nothing here waits or asks.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::Duration,
};

use tokio::time::Instant;

use crate::record::{GATEWAYS_MAX, GatewayRecord, Gateways};

/// Names of unreadable records that are remembered, to be counted.
const UNREADABLE_MAX: usize = 64;

/// What is known of the records.
///
/// After an outage, absence is doubtful for the length of one lease: etcd may have let leases lapse whose owners could
/// not reach it either and are about to come back. Until then a gateway that vanished stays in the set. What is new or has
/// changed counts at once.
#[derive(Debug)]
pub struct View {
    lease: Duration,
    /// As etcd has them. `None` before the first listing.
    listed: Option<BTreeMap<String, GatewayRecord>>,
    /// Vanished since the outage, and not believed yet.
    held: BTreeMap<String, GatewayRecord>,
    held_until: Option<Instant>,
    unreadable: BTreeSet<String>,
    beyond_bound: bool,
}

impl View {
    /// Knows nothing. `lease` is that of the records.
    pub fn new(lease: Duration) -> Self {
        Self {
            lease,
            listed: None,
            held: BTreeMap::new(),
            held_until: None,
            unreadable: BTreeSet::new(),
            beyond_bound: false,
        }
    }

    /// Takes all records, each by its name; one that cannot be read is `None`. `after_outage`: etcd did not answer for a
    /// while before.
    pub fn list(
        &mut self,
        now: Instant,
        after_outage: bool,
        records: impl IntoIterator<Item = (String, Option<GatewayRecord>)>,
    ) {
        if after_outage && self.listed.is_some() {
            self.held_until = Some(now + self.lease);
        }
        let before = mem::take(&mut self.listed).unwrap_or_default();
        self.unreadable.clear();
        self.beyond_bound = false;
        self.listed = Some(BTreeMap::new());
        for (name, record) in records {
            self.put(name, record);
        }
        for (name, record) in before {
            self.hold(name, record);
        }
        self.tick(now);
    }

    /// A record was written.
    pub fn put(&mut self, name: String, record: Option<GatewayRecord>) {
        let listed = self.listed.get_or_insert_default();
        let Some(record) = record else {
            listed.remove(&name);
            if self.unreadable.len() < UNREADABLE_MAX {
                self.unreadable.insert(name);
            }
            return;
        };
        self.unreadable.remove(&name);
        self.held.remove(&name);
        if listed.len() >= GATEWAYS_MAX && !listed.contains_key(&name) {
            self.beyond_bound = true;
            return;
        }
        listed.insert(name, record);
    }

    /// A record was deleted, or its lease lapsed: etcd tells both alike.
    pub fn delete(&mut self, now: Instant, name: &str) {
        self.unreadable.remove(name);
        if let Some(record) = self.listed.get_or_insert_default().remove(name) {
            self.hold(name.to_owned(), record);
        }
        self.tick(now);
    }

    fn hold(&mut self, name: String, record: GatewayRecord) {
        let gone = self.listed.as_ref().is_none_or(|listed| !listed.contains_key(&name));
        if gone && self.held_until.is_some() && !self.unreadable.contains(&name) {
            self.held.insert(name, record);
        }
    }

    /// Lets time pass.
    pub fn tick(&mut self, now: Instant) {
        if self.held_until.is_some_and(|until| until <= now) {
            self.held_until = None;
            self.held.clear();
        }
    }

    /// When [`View::tick`] is due if nothing else happens first.
    pub fn deadline(&self) -> Option<Instant> {
        self.held_until.filter(|_| !self.held.is_empty())
    }

    /// The set, as watchers are to see it.
    pub fn gateways(&self) -> Gateways {
        let listed = self.listed.iter().flat_map(BTreeMap::values);
        Gateways::new(listed.chain(self.held.values()).cloned())
    }

    /// One sentence for people.
    pub fn sentence(&self) -> String {
        let listed = self.listed.as_ref().map_or(0, BTreeMap::len);
        let mut sentence = format!("{listed} gateways are registered");
        if !self.held.is_empty() {
            sentence += &format!(
                "; {} more were, and are given {:?} to come back after the outage",
                self.held.len(),
                self.lease
            );
        }
        if let Some(first) = self.unreadable.first() {
            sentence +=
                &format!("; {} records cannot be read, the first of gateway {first}", self.unreadable.len());
        }
        if self.beyond_bound {
            sentence += &format!("; there are more than {GATEWAYS_MAX}, the rest is ignored");
        }
        sentence
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::record::HostPort;

    const LEASE: Duration = Duration::from_secs(10);

    fn entry(name: &str) -> (String, Option<GatewayRecord>) {
        entry_at(name, 1)
    }

    fn entry_at(name: &str, port: u16) -> (String, Option<GatewayRecord>) {
        let record = GatewayRecord::new(name, HostPort::new("h", port).unwrap()).unwrap();
        (name.to_owned(), Some(record))
    }

    fn names(view: &View) -> String {
        view.gateways().records().iter().map(|record| record.name.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn events_follow_a_listing() {
        let now = Instant::now();
        let mut view = View::new(LEASE);
        assert_eq!(names(&view), "");
        view.list(now, false, [entry("a"), entry("b")]);
        let (name, record) = entry("c");
        view.put(name, record);
        view.delete(now, "a");
        view.delete(now, "never there");
        assert_eq!((names(&view).as_str(), view.deadline()), ("b c", None));
    }

    #[test]
    fn after_an_outage_absence_counts_only_after_a_lease() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut view = View::new(LEASE);
        view.list(at(0), false, [entry("a"), entry("b"), entry("c")]);
        // The lease of `a` lapsed during the outage, that of `b` right after; `d` is new.
        view.list(at(60), true, [entry("b"), entry("c"), entry("d")]);
        view.delete(at(61), "b");
        assert_eq!((names(&view).as_str(), view.deadline()), ("a b c d", Some(at(70))));
        assert!(view.sentence().starts_with("2 gateways are registered; 2 more were"), "{}", view.sentence());
        // `b` comes back elsewhere: the new record counts at once.
        let (name, record) = entry_at("b", 9);
        view.put(name, record);
        assert_eq!(view.gateways().get("b").unwrap().address.port(), 9);
        view.tick(at(69));
        assert_eq!(names(&view), "a b c d");
        view.tick(at(70));
        assert_eq!((names(&view).as_str(), view.deadline()), ("b c d", None));
    }

    #[test]
    fn the_first_listing_and_one_after_a_compaction_hold_nothing() {
        let now = Instant::now();
        let mut view = View::new(LEASE);
        view.list(now, true, [entry("a")]);
        view.list(now, false, []);
        assert_eq!((names(&view).as_str(), view.deadline()), ("", None));
    }

    #[test]
    fn an_unreadable_record_takes_its_gateway_out_and_is_counted() {
        let now = Instant::now();
        let mut view = View::new(LEASE);
        view.list(now, false, [entry("a"), ("b".to_owned(), None)]);
        assert_eq!(
            view.sentence(),
            "1 gateways are registered; 1 records cannot be read, the first of gateway b"
        );
        view.put("a".to_owned(), None);
        assert_eq!(names(&view), "");
        let (name, record) = entry("b");
        view.put(name, record);
        view.delete(now, "a");
        assert_eq!((names(&view).as_str(), view.sentence().as_str()), ("b", "1 gateways are registered"));
    }

    #[test]
    fn it_is_bounded() {
        let mut view = View::new(LEASE);
        view.list(Instant::now(), false, (0..1_000).map(|n| entry(&format!("gw-{n:04}"))));
        assert_eq!(view.gateways().len(), GATEWAYS_MAX);
        assert!(view.sentence().ends_with("there are more than 256, the rest is ignored"));
    }

    proptest! {
        /// Whatever happens, once a lease has passed since the last outage the set is what etcd has; and before that it
        /// has all of that.
        #[test]
        fn the_set_becomes_what_etcd_has(
            steps in prop::collection::vec((0_u8..4, 0_usize..5, 0_u64..8), 0..60)
        ) {
            let start = Instant::now();
            let mut seconds = 0;
            let mut view = View::new(LEASE);
            let mut truth: BTreeSet<usize> = BTreeSet::new();
            let name = |n: usize| format!("gw-{n}");
            for (step, n, wait) in steps {
                seconds += wait;
                let now = start + Duration::from_secs(seconds);
                match step {
                    0 => { truth.insert(n); let (name, record) = entry(&name(n)); view.put(name, record); }
                    1 => { truth.remove(&n); view.delete(now, &name(n)); }
                    // An outage, in which one more may vanish unseen.
                    2 => {
                        truth.remove(&n);
                        view.list(now, true, truth.iter().map(|&n| entry(&name(n))).collect::<Vec<_>>());
                    }
                    _ => view.tick(now),
                }
                let set = view.gateways();
                prop_assert!(truth.iter().all(|&n| set.get(&name(n)).is_some()));
            }
            view.tick(start + Duration::from_secs(seconds) + LEASE);
            let names: Vec<String> = truth.into_iter().map(name).collect();
            let set = view.gateways();
            prop_assert_eq!(set.records().iter().map(|record| &record.name).collect::<Vec<_>>(), names.iter().collect::<Vec<_>>());
        }
    }
}
