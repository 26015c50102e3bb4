//! The one reader of the engine's reports: load for `/metrics`, KV events for the sockets, death for everybody.
//!
//! Why no block is announced without its tokens: an engine hands out a token one step before the step that fills a block
//! with it, and reports after it has handed out. So when a report is here, the tokens of its blocks are in the legs'
//! streams, and reading those first ([`Legs::drain`]) puts them into the ledger, however slow the clients are.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use forebay_engines::{Driver, KvSnapshot, LoadReport};
use forebay_types::{BlockHash, KvEvent, KvEventBatch, device_blocks};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    encode::{WireEvent, batch},
    ledger::{Block, Ledger},
    publish::Publisher,
};
use crate::{legs::Legs, metrics::Metrics};

/// Blocks of one `BlockStored`, where a whole cache is told again.
const STORED_BLOCKS_MAX: usize = 512;

/// The engine's last words, once it has said them.
pub(crate) type Death = Option<Arc<str>>;

/// Reads reports until the engine dies, which it tells by `death`.
pub(crate) async fn run(
    driver: Arc<dyn Driver>,
    legs: Arc<Legs>,
    metrics: Arc<Metrics>,
    mut publisher: Option<Publisher>,
    death: watch::Sender<Death>,
) {
    let mut stream = Stream { next: 0, awaiting_snapshot: false };
    let block_size = driver.facts().block_size_tokens;
    loop {
        let report = driver.reports().next().await;
        legs.drain();
        if let Some(publisher) = &mut publisher {
            for snapshot in &report.snapshots {
                let told = stream.snapshot(snapshot, legs.ledger());
                publish(publisher, &metrics, told, block_size).await;
            }
            for batch in &report.kv {
                match stream.batch(batch, legs.ledger()) {
                    Some(told) => publish(publisher, &metrics, told, block_size).await,
                    None => driver.request_snapshot(0),
                }
            }
        }
        // After the events: whoever sees an idle engine finds everything announced.
        if let Some(LoadReport { load, .. }) = report.loads.last() {
            metrics.update(|counters| counters.load = *load);
        }
        if report.died.is_some() {
            death.send_replace(report.died);
            return;
        }
    }
}

async fn publish(publisher: &mut Publisher, metrics: &Metrics, (events, unknown): Told, block_size: u32) {
    if unknown > 0 {
        tracing::warn!(blocks = unknown, "KV events of blocks with unknown tokens were left out");
        metrics.update(|counters| counters.blocks_unpublished += unknown as u64);
    }
    if !events.is_empty() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        publisher.publish(batch(now, &events, block_size, 0)).await;
    }
}

/// Where the reading of the engine's own batches has come to.
struct Stream {
    /// Number of the next batch.
    next: u64,
    /// Batches were lost: nothing is said until a snapshot has come.
    awaiting_snapshot: bool,
}

/// What to publish, and how many blocks had to be left out.
type Told = (Vec<WireEvent>, usize);

impl Stream {
    /// `None` where a batch is missing before it: a snapshot is needed.
    fn batch(&mut self, batch: &KvEventBatch, ledger: &Mutex<Ledger>) -> Option<Told> {
        if self.awaiting_snapshot || batch.sequence < self.next {
            return Some((Vec::new(), 0)); // it is, or will be, part of a snapshot
        }
        if batch.sequence > self.next {
            tracing::warn!(
                expected = self.next,
                found = batch.sequence,
                "the engine's KV event batches were lost"
            );
            self.awaiting_snapshot = true;
            return None;
        }
        self.next += 1;
        let mut ledger = ledger.lock();
        let mut told = (Vec::new(), 0);
        for event in &batch.events {
            convert(event, &mut ledger, &mut told);
        }
        Some(told)
    }

    fn snapshot(&mut self, snapshot: &KvSnapshot, ledger: &Mutex<Ledger>) -> Told {
        self.next = snapshot.sequence_next;
        self.awaiting_snapshot = false;
        let cached: Vec<_> = device_blocks(&snapshot.contents).collect();
        let (blocks, unknown) = ledger.lock().resync(&cached);
        let mut events = vec![WireEvent::Cleared];
        for (hash, block) in blocks {
            append(&mut events, hash, block.parent, &block, STORED_BLOCKS_MAX);
        }
        (events, unknown)
    }
}

fn convert(event: &KvEvent, ledger: &mut Ledger, (events, unknown): &mut Told) {
    match event {
        // An engine of ours has one group, which goes without saying.
        KvEvent::Groups(_) => {}
        KvEvent::Stored { parent, hashes, tier: _, group: _ } => {
            // What follows an unknown block goes on as a chain of its own, whose parent the reader does not know either.
            let (mut parent, mut begins) = (*parent, true);
            for &hash in hashes {
                match ledger.stored(hash) {
                    Some(block) => {
                        let blocks_max = if begins { 0 } else { usize::MAX };
                        append(events, hash, parent, block, blocks_max);
                        begins = false;
                    }
                    None => {
                        *unknown += 1;
                        begins = true;
                    }
                }
                parent = Some(hash);
            }
        }
        KvEvent::Removed { hashes, tier: _, group: _ } => {
            let known = hashes.iter().filter(|hash| ledger.removed(**hash));
            events.extend(known.map(|hash| WireEvent::Removed(*hash)));
        }
        KvEvent::Cleared => {
            ledger.cleared();
            events.push(WireEvent::Cleared);
        }
    }
}

/// Adds a block to the chain that ends the list, where it continues one of less than `blocks_max`; else begins one.
fn append(
    events: &mut Vec<WireEvent>,
    hash: BlockHash,
    parent: Option<BlockHash>,
    block: &Block,
    blocks_max: usize,
) {
    if let Some(WireEvent::Stored { hashes, tokens, salts, .. }) = events.last_mut()
        && parent.is_some()
        && hashes.last().copied() == parent
        && hashes.len() < blocks_max
    {
        hashes.push(hash);
        tokens.extend_from_slice(&block.tokens);
        salts.push(block.salt.clone());
        return;
    }
    events.push(WireEvent::Stored {
        hashes: vec![hash],
        parent,
        tokens: block.tokens.to_vec(),
        salts: vec![block.salt.clone()],
    });
}

#[cfg(test)]
mod tests {
    use forebay_kv_hash::{BlockHasher, HashKey};
    use forebay_types::{Incarnation, RankId, Tier};

    use super::*;

    const RANK: RankId = RankId { incarnation: Incarnation(1), dp_rank: 0 };

    fn setup(blocks: u32) -> (Mutex<Ledger>, Vec<BlockHash>, Vec<u32>) {
        let hasher = BlockHasher::new(HashKey([1; 16]), 2);
        let tokens: Vec<u32> = (0..blocks * 2).collect();
        let hashes = hasher.chain(hasher.root("m", "s"), &tokens);
        let mut ledger = Ledger::new(hasher, 64);
        ledger.begin(hasher.root("m", "s"), &"s".into(), &tokens, &hashes);
        (Mutex::new(ledger), hashes, tokens)
    }

    fn stored(hashes: &[BlockHash], parent: Option<BlockHash>) -> KvEvent {
        KvEvent::Stored { parent, hashes: hashes.to_vec(), tier: Tier::Device, group: 0 }
    }

    fn numbered(sequence: u64, events: Vec<KvEvent>) -> KvEventBatch {
        KvEventBatch { rank: RANK, sequence, events }
    }

    #[test]
    fn a_chain_carries_its_tokens_and_the_salt_of_its_first_block() {
        let (ledger, hashes, tokens) = setup(3);
        let mut stream = Stream { next: 0, awaiting_snapshot: false };
        let told = stream.batch(&numbered(0, vec![stored(&hashes, None)]), &ledger).unwrap();
        let expected = WireEvent::Stored {
            hashes: hashes.clone(),
            parent: None,
            tokens,
            salts: vec![Some("s".into()), None, None],
        };
        assert_eq!(told, (vec![expected], 0));
        let removed =
            KvEvent::Removed { hashes: vec![hashes[2], BlockHash(9)], tier: Tier::Device, group: 0 };
        let told = stream.batch(&numbered(1, vec![removed]), &ledger).unwrap();
        assert_eq!(told, (vec![WireEvent::Removed(hashes[2])], 0), "what was never told is not taken back");
    }

    #[test]
    fn an_unknown_block_is_left_out_and_what_follows_it_is_not() {
        let (ledger, hashes, _) = setup(3);
        let mut stream = Stream { next: 0, awaiting_snapshot: false };
        let with_hole = [hashes[0], BlockHash(5), hashes[2]];
        let (events, unknown) = stream.batch(&numbered(0, vec![stored(&with_hole, None)]), &ledger).unwrap();
        assert_eq!((events.len(), unknown), (2, 1));
        let WireEvent::Stored { hashes: behind, parent, .. } = &events[1] else { panic!("{events:?}") };
        assert_eq!((behind, *parent), (&vec![hashes[2]], Some(BlockHash(5))));
    }

    #[test]
    fn after_a_gap_everything_is_told_again() {
        let (ledger, hashes, _) = setup(4);
        let mut stream = Stream { next: 0, awaiting_snapshot: false };
        assert!(stream.batch(&numbered(0, vec![stored(&hashes[..1], None)]), &ledger).is_some());
        assert_eq!(stream.batch(&numbered(2, vec![stored(&hashes[2..3], Some(hashes[1]))]), &ledger), None);
        let late = stream.batch(&numbered(3, vec![stored(&hashes[3..], Some(hashes[2]))]), &ledger);
        assert_eq!(late, Some((Vec::new(), 0)), "nothing is said in between");
        let contents = hashes[..3].iter().rev().map(|&hash| stored(&[hash], None)).collect();
        let snapshot = KvSnapshot { rank: RANK, sequence_next: 4, contents };
        let (events, unknown) = stream.snapshot(&snapshot, &ledger);
        assert_eq!((events.len(), &events[0], unknown), (2, &WireEvent::Cleared, 0));
        let WireEvent::Stored { hashes: chain, parent: None, tokens, .. } = &events[1] else {
            panic!("{events:?}")
        };
        assert_eq!((chain.as_slice(), tokens.len()), (&hashes[..3], 6));
        let late = stream.batch(&numbered(3, vec![stored(&hashes[3..], None)]), &ledger);
        assert_eq!(late, Some((Vec::new(), 0)));
        let next = stream.batch(&numbered(4, vec![KvEvent::Cleared]), &ledger);
        assert_eq!(next, Some((vec![WireEvent::Cleared], 0)));
    }
}
