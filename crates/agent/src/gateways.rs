//! The gateways that are listed, each with its link.

use std::{collections::BTreeMap, sync::Arc};

use forebay_registry::{GatewayRecord, Watch};
use tokio::{sync::watch, task::JoinSet};

use crate::link::{Link, LinkState, Shared};

/// A link that runs.
struct Running {
    listed: watch::Sender<bool>,
    state: watch::Receiver<LinkState>,
}

/// How the links stand, by gateway record.
pub type LinkStates = BTreeMap<GatewayRecord, LinkState>;

/// Keeps a link to every gateway that `gateways` lists. Dropping the future ends them all.
pub(crate) async fn keep_links(shared: Arc<Shared>, mut gateways: Watch, states: watch::Sender<LinkStates>) {
    let mut links: BTreeMap<GatewayRecord, Running> = BTreeMap::new();
    let mut tasks: JoinSet<GatewayRecord> = JoinSet::new();
    let (changed, mut changes) = watch::channel(());
    let mut registry_gone = false;
    loop {
        tokio::select! {
            set = gateways.next(), if !registry_gone => match set {
                Some(set) => {
                    for (record, link) in &links {
                        link.listed.send_replace(set.records().contains(record));
                    }
                    for record in set.records() {
                        if !links.contains_key(record) {
                            let link = start(&shared, record, &mut tasks, changed.clone());
                            links.insert(record.clone(), link);
                        }
                    }
                }
                // The set of now stands.
                None => registry_gone = true,
            },
            Some(ended) = tasks.join_next() => {
                let Ok(record) = ended else { continue };
                // It may have been listed again in the instant in which its link ended.
                if links.remove(&record).is_some_and(|link| *link.listed.borrow()) {
                    let link = start(&shared, &record, &mut tasks, changed.clone());
                    links.insert(record, link);
                }
            }
            // Never an error: this function holds a sender.
            _ = changes.changed() => {}
        }
        states.send_replace(
            links.iter().map(|(record, link)| (record.clone(), link.state.borrow().clone())).collect(),
        );
    }
}

fn start(
    shared: &Arc<Shared>,
    record: &GatewayRecord,
    tasks: &mut JoinSet<GatewayRecord>,
    changed: watch::Sender<()>,
) -> Running {
    let (listed, follow) = watch::channel(true);
    let (link, state) = Link::new(shared.clone(), record.clone());
    let (record, mut news) = (record.clone(), state.clone());
    tasks.spawn(async move {
        let keep = link.keep(follow);
        tokio::pin!(keep);
        loop {
            tokio::select! {
                () = &mut keep => return record,
                changes = news.changed() => if changes.is_ok() { changed.send_replace(()); } else { keep.await; return record },
            }
        }
    });
    Running { listed, state }
}
