//! The task that follows the records of all gateways.

use std::{sync::Arc, time::Duration};

use etcd_client::{Client, Event, EventType, GetOptions, KeyValue, WatchOptions, WatchResponse};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::{
    EtcdSettings,
    dial::{Dialer, Trouble, call},
    record,
    view::View,
};
use crate::{
    publish::Publisher,
    record::{GATEWAYS_MAX, GatewayRecord},
};

/// Follows for good.
pub(super) async fn follow(settings: Arc<EtcdSettings>, publisher: Publisher) {
    let mut dialer = Dialer::new(Arc::clone(&settings), settings.seed);
    let mut follower = Follower { view: View::new(settings.lease), settings, publisher };
    loop {
        let Trouble(trouble) = match dialer.connect().await {
            Ok(client) => follower.session(client, &mut dialer).await,
            Err(trouble) => trouble,
        };
        follower.publisher.trouble(format!("etcd at {}: {trouble}", dialer.endpoint()));
        dialer.next_endpoint().await;
    }
}

/// Why a watch ended though etcd answers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WatchEnd {
    /// What it asked for is no longer in etcd's history: list again.
    Compacted,
}

pub(super) struct Follower {
    pub(super) settings: Arc<EtcdSettings>,
    pub(super) view: View,
    pub(super) publisher: Publisher,
}

impl Follower {
    /// Lists and watches over one connection until that fails.
    async fn session(&mut self, mut client: Client, dialer: &mut Dialer) -> Trouble {
        let mut after_outage = true;
        loop {
            let revision = match self.list(&mut client, dialer, after_outage).await {
                Ok(revision) => revision,
                Err(trouble) => return trouble,
            };
            match self.watch(&mut client, dialer, revision + 1).await {
                Ok(WatchEnd::Compacted) => after_outage = false,
                Err(trouble) => return trouble,
            }
        }
    }

    /// Takes all records; gives the revision at which they were so.
    async fn list(
        &mut self,
        client: &mut Client,
        dialer: &Dialer,
        after_outage: bool,
    ) -> Result<i64, Trouble> {
        let prefix = self.settings.prefix();
        // One more than are used, so that the view knows that there are more.
        let options = GetOptions::new().with_prefix().with_limit(GATEWAYS_MAX as i64 + 1);
        let mut answer = call(&self.settings, client.get(prefix.as_str(), Some(options))).await?;
        let revision = answer
            .take_header()
            .map(|header| header.revision())
            .ok_or_else(|| Trouble("an answer without a header".to_owned()))?;
        let records = answer.kvs().iter().filter_map(|pair| read(&prefix, pair));
        self.view.list(Instant::now(), after_outage, records);
        self.tell(dialer);
        Ok(revision)
    }

    /// Follows changes from `revision` on. Asks for a sign of life at intervals: a watch on which nothing happens looks
    /// like one whose etcd has stopped.
    pub(super) async fn watch(
        &mut self,
        client: &mut Client,
        dialer: &mut Dialer,
        revision: i64,
    ) -> Result<WatchEnd, Trouble> {
        let prefix = self.settings.prefix();
        let options = WatchOptions::new().with_prefix().with_start_revision(revision);
        let mut watch = call(&self.settings, client.watch(prefix.as_str(), Some(options))).await?;
        let every = (self.settings.lease / 5).clamp(Duration::from_millis(500), Duration::from_secs(2));
        let mut probe = interval_at(Instant::now() + every, every);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unanswered = false;
        loop {
            let held_until = self.view.deadline();
            let deadline = held_until.unwrap_or_else(Instant::now);
            tokio::select! {
                message = watch.message() => {
                    let message = message?.ok_or_else(|| Trouble("it closed the watch".to_owned()))?;
                    if message.canceled() {
                        return cancelled(&message);
                    }
                    unanswered = false;
                    self.apply(&prefix, message.events());
                    self.tell(dialer);
                    if !message.created() {
                        dialer.works();
                    }
                }
                _ = probe.tick() => {
                    if unanswered {
                        return Err(Trouble(format!("no sign of life in {every:?}")));
                    }
                    unanswered = true;
                    // Only that it answers counts. The revision in the answer may be ahead of events that are still on
                    // their way (etcd before 3.4.25 and 3.5.8), so nothing may be resumed from it.
                    call(&self.settings, watch.request_progress()).await?;
                }
                () = sleep_until(deadline), if held_until.is_some() => {
                    self.view.tick(Instant::now());
                    self.tell(dialer);
                }
            }
        }
    }

    fn apply(&mut self, prefix: &str, events: &[Event]) {
        for event in events {
            let Some(pair) = event.kv() else { continue };
            match event.event_type() {
                EventType::Put => {
                    if let Some((name, record)) = read(prefix, pair) {
                        self.view.put(name, record);
                    }
                }
                EventType::Delete => {
                    if let Some(name) = name(prefix, pair) {
                        self.view.delete(Instant::now(), &name);
                    }
                }
            }
        }
    }

    fn tell(&self, dialer: &Dialer) {
        self.publisher.publish(self.view.gateways());
        let EtcdSettings { fleet, .. } = &*self.settings;
        self.publisher.confirm(format!(
            "etcd at {}, fleet {fleet}: {}",
            dialer.endpoint(),
            self.view.sentence()
        ));
    }
}

fn cancelled(message: &WatchResponse) -> Result<WatchEnd, Trouble> {
    if message.compact_revision() > 0 {
        return Ok(WatchEnd::Compacted);
    }
    Err(Trouble(format!("it ended the watch: {}", message.cancel_reason())))
}

/// A gateway's name, from its key. A key that is not text names no gateway.
fn name(prefix: &str, pair: &KeyValue) -> Option<String> {
    Some(pair.key_str().ok()?.strip_prefix(prefix)?.to_owned())
}

/// A gateway's name and its record, if that can be read.
fn read(prefix: &str, pair: &KeyValue) -> Option<(String, Option<GatewayRecord>)> {
    let name = name(prefix, pair)?;
    let record = record::decode(&name, pair.value())
        .inspect_err(|wrong| tracing::warn!(name, wrong, "a gateway's record cannot be read"))
        .ok();
    Some((name, record))
}
