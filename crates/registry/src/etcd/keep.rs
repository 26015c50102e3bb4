//! The task that keeps one gateway registered.
//!
//! It holds a lease and, under it, the gateway's key. A key belongs to the lease it was last written under, so its lease
//! says whose it is. Every sign of life also looks after the key: whatever became of it, it is put back, unless somebody
//! else announced the name later.

use std::{convert::Infallible, mem, sync::Arc, time::Duration};

use etcd_client::{
    Client, Compare, CompareOp, KeyValue, LeaseKeepAliveStream, LeaseKeeper, PutOptions, Txn, TxnOp,
};
use tokio::{
    sync::{oneshot, watch},
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};

use super::{
    EtcdSettings,
    dial::{Dialer, Trouble, call},
    record,
};
use crate::{
    announcement::{Abandon, AnnouncementState, WITHDRAW_MAX},
    record::GatewayRecord,
};

/// Attempts at a key that others write at the same moment.
const CLAIMS_MAX: usize = 3;

/// Keeps `record` registered until `ended` resolves.
pub(super) async fn keep(
    settings: Arc<EtcdSettings>,
    seed: u64,
    record: GatewayRecord,
    state: watch::Sender<AnnouncementState>,
    mut ended: oneshot::Receiver<Abandon>,
) {
    let mut dialer = Dialer::new(Arc::clone(&settings), seed);
    let mut keeper =
        Keeper { settings: Arc::clone(&settings), record, state, lease: None, was_registered: false };
    let end = tokio::select! {
        end = &mut ended => end,
        never = keeper.run(&mut dialer) => match never {},
    };
    if let (Err(_), Some(lease)) = (end, keeper.lease) {
        // Beyond this bound the lease ends it.
        _ = timeout(WITHDRAW_MAX, revoke(&settings, &mut dialer, lease)).await;
    }
}

/// Ends a lease, and with it the key.
async fn revoke(settings: &EtcdSettings, dialer: &mut Dialer, lease: i64) {
    loop {
        if let Ok(mut client) = dialer.connect().await
            && call(settings, client.lease_revoke(lease)).await.is_ok()
        {
            return;
        }
        dialer.next_endpoint().await;
    }
}

struct Keeper {
    settings: Arc<EtcdSettings>,
    record: GatewayRecord,
    state: watch::Sender<AnnouncementState>,
    /// Granted, and not known to have lapsed.
    lease: Option<i64>,
    was_registered: bool,
}

impl Keeper {
    async fn run(&mut self, dialer: &mut Dialer) -> Infallible {
        loop {
            let Trouble(trouble) = match dialer.connect().await {
                Ok(client) => match self.session(client, dialer).await {
                    // A lapsed lease needs a new one, not a pause.
                    Ok(LeaseLapsed) => continue,
                    Err(trouble) => trouble,
                },
                Err(trouble) => trouble,
            };
            let why = format!("gateway {}: etcd at {}: {trouble}", self.record.name, dialer.endpoint());
            self.stands(AnnouncementState::Pending { why });
            dialer.next_endpoint().await;
        }
    }

    /// Holds lease and key over one connection until that fails or the lease is found to have lapsed.
    async fn session(&mut self, mut client: Client, dialer: &mut Dialer) -> Result<LeaseLapsed, Trouble> {
        let Some((lease, mut keeper, mut signs)) = self.lease(&mut client).await? else {
            return Ok(LeaseLapsed);
        };
        let every: Duration = self.settings.lease / 3;
        let mut tick = interval_at(Instant::now() + every, every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let state = self.claim(&mut client, lease).await?;
            self.was_registered |= state == AnnouncementState::Registered;
            self.stands(state);
            tick.tick().await;
            if !self.sign_of_life(&mut keeper, &mut signs).await? {
                return Ok(LeaseLapsed);
            }
            dialer.works();
        }
    }

    /// A live lease: the one of before if it still lives, else a new one. `None` if that of before has lapsed.
    async fn lease(
        &mut self,
        client: &mut Client,
    ) -> Result<Option<(i64, LeaseKeeper, LeaseKeepAliveStream)>, Trouble> {
        let lease = match self.lease {
            Some(lease) => {
                let answer = call(&self.settings, client.lease_time_to_live(lease, None)).await?;
                if answer.ttl() <= 0 {
                    self.lapsed();
                    return Ok(None);
                }
                lease
            }
            None => {
                let grant = client.lease_grant(self.settings.lease_seconds(), None);
                let lease = call(&self.settings, grant).await?.id();
                self.lease = Some(lease);
                lease
            }
        };
        let (keeper, signs) = call(&self.settings, client.lease_keep_alive(lease)).await?;
        Ok(Some((lease, keeper, signs)))
    }

    /// Renews the lease; whether it still lived.
    async fn sign_of_life(
        &mut self,
        keeper: &mut LeaseKeeper,
        signs: &mut LeaseKeepAliveStream,
    ) -> Result<bool, Trouble> {
        let answer = call(&self.settings, async {
            keeper.keep_alive().await?;
            signs.message().await
        });
        let answer = answer.await?.ok_or_else(|| Trouble("it closed the lease's stream".to_owned()))?;
        if answer.ttl() <= 0 {
            self.lapsed();
            return Ok(false);
        }
        Ok(true)
    }

    fn lapsed(&mut self) {
        self.lease = None;
        let why = format!("gateway {}: its lease lapsed; it is being registered again", self.record.name);
        self.stands(AnnouncementState::Pending { why });
    }

    /// Sees to it that the key is there and under the lease, unless somebody else announced the name later.
    async fn claim(&self, client: &mut Client, lease: i64) -> Result<AnnouncementState, Trouble> {
        let key = format!("{}{}", self.settings.prefix(), self.record.name);
        let value = record::encode(&self.record);
        for _ in 0..CLAIMS_MAX {
            let found = call(&self.settings, client.get(key.as_str(), None)).await?;
            let unchanged = match found.kvs().first() {
                None => Compare::version(key.as_str(), CompareOp::Equal, 0),
                Some(pair) if pair.lease() == lease && pair.value() == value => {
                    return Ok(AnnouncementState::Registered);
                }
                Some(pair) => {
                    // The first time, it takes the name from whoever has it: most likely its own former life.
                    if pair.lease() != lease && self.was_registered {
                        return Ok(self.superseded(pair));
                    }
                    Compare::mod_revision(key.as_str(), CompareOp::Equal, pair.mod_revision())
                }
            };
            let put = TxnOp::put(key.as_str(), value.clone(), Some(PutOptions::new().with_lease(lease)));
            let written =
                call(&self.settings, client.txn(Txn::new().when([unchanged]).and_then([put]))).await?;
            if written.succeeded() {
                return Ok(AnnouncementState::Registered);
            }
        }
        Err(Trouble(format!("key {key} changed {CLAIMS_MAX} times while it was written")))
    }

    fn superseded(&self, pair: &KeyValue) -> AnnouncementState {
        let GatewayRecord { name, .. } = &self.record;
        let other = record::decode(name, pair.value()).ok();
        AnnouncementState::superseded(name, other.as_ref().map(|other| &other.address))
    }

    fn stands(&self, stands: AnnouncementState) {
        self.state.send_if_modified(|known| {
            let changed = *known != stands;
            let another_kind = mem::discriminant(known) != mem::discriminant(&stands);
            let gateway = &self.record.name;
            match &stands {
                AnnouncementState::Registered if another_kind => tracing::info!(gateway, "registered"),
                // Once for all endpoints that fail in turn.
                _ if another_kind => tracing::warn!(gateway, "{stands}"),
                _ if changed => tracing::debug!(gateway, "{stands}"),
                _ => {}
            }
            *known = stands;
            changed
        });
    }
}

/// The lease is gone; etcd answers.
struct LeaseLapsed;
