//! The fleet as operators see it.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
};

use forebay_engines::CacheSight;
use forebay_placement::{Breaker, RankState, Snapshot};
use forebay_types::{Leaning, RankLoad};

use super::{
    Shared,
    api::{EngineStatus, LinkStatus, RankStatus},
    caches::Caches,
    engines::Slot,
};

/// Every engine, in the order in which they came.
pub(super) fn status(shared: &Shared) -> Vec<EngineStatus> {
    let slots: Vec<Arc<Slot>> = shared.slots.read().clone();
    let snapshot = shared.core.lock().snapshot(shared.now());
    slots.iter().map(|slot| engine(slot, &shared.caches, &snapshot)).collect()
}

/// Every pair of engines that was measured or rests, in the order of their lives.
pub(super) fn links(shared: &Shared) -> Vec<LinkStatus> {
    let links = shared.core.lock().snapshot(shared.now()).links.clone();
    let mut pairs: BTreeSet<_> = links.measured().map(|(from, to, _)| (from, to)).collect();
    pairs.extend(links.resting());
    let drivers = shared.drivers.read();
    let one = |(from, to)| {
        let (source, target) = (drivers.get(&from)?.facts(), drivers.get(&to)?.facts());
        let model = links.get(from, to);
        let state = if links.is_resting(from, to) { "resting" } else { "ready" };
        let bytes_per_second = model.bytes_per_second();
        let token_bytes = target.block_bytes_or_nominal() as f64 / f64::from(target.block_size_tokens.max(1));
        Some(LinkStatus {
            from: source.engine.clone(),
            to: target.engine.clone(),
            state: state.to_owned(),
            latency_seconds: model.latency_seconds(),
            tokens_per_second: bytes_per_second / token_bytes,
            bytes_per_second: (target.block_bytes > 0).then_some(bytes_per_second),
            transfers: model.samples(),
        })
    };
    pairs.into_iter().filter_map(one).collect()
}

fn engine(slot: &Slot, caches: &Caches, snapshot: &Snapshot) -> EngineStatus {
    let current = slot.current.lock().clone();
    let facts = current.as_ref().map(|driver| driver.facts());
    let views: Vec<_> =
        facts.iter().flat_map(|facts| facts.ranks()).filter_map(|rank| snapshot.rank(rank)).collect();
    let ranks: Vec<RankStatus> = views
        .iter()
        .map(|view| RankStatus {
            dp_rank: view.id.dp_rank,
            load: view.load,
            load_age_seconds: view.load_age.as_secs_f64(),
            reserved_sequences: view.reserved.sequences,
            indexed_blocks: [&caches.index, &caches.routed]
                .iter()
                .filter_map(|index| index.rank(view.id))
                .map(|rank| rank.blocks)
                .sum(),
        })
        .collect();
    let first = views.first();
    let said = slot.said.lock();
    EngineStatus {
        engine: slot.name.clone(),
        kind: said.kind.to_owned(),
        incarnation: facts.map_or(0, |facts| facts.incarnation.0),
        state: first.map_or(said.state, |rank| state_name(rank.state)).to_owned(),
        detail: said.detail.to_string(),
        role: facts.map_or(slot.role, |facts| facts.role),
        model: facts.map_or_else(|| "".into(), |facts| facts.model.clone()),
        load: sum(ranks.iter().map(|rank| rank.load)),
        breaker: first.map_or("closed", |rank| breaker_name(rank.breaker)).to_owned(),
        leaning: first.map_or(Leaning::Neither, |rank| rank.leaning),
        prefill_share: first.map_or(0.0, |rank| rank.prefill_share),
        indexed_blocks: ranks.iter().map(|rank| rank.indexed_blocks).sum(),
        restarts: slot.restarts.load(Ordering::Relaxed),
        cache_sight: match &said.cache_sight {
            None => String::new(),
            Some(CacheSight::Events) => "events".to_owned(),
            Some(CacheSight::Approximate { why }) => format!("approximate: {why}"),
        },
        notes: said.notes.clone(),
        ranks,
    }
}

fn sum(loads: impl Iterator<Item = RankLoad>) -> RankLoad {
    loads.fold(RankLoad::default(), |sum, load| {
        let RankLoad {
            waiting,
            running,
            decoding,
            prefill_tokens,
            context_tokens,
            blocks_total,
            blocks_free,
            preemptions,
            cached_tokens,
            prompt_tokens,
        } = load;
        RankLoad {
            waiting: sum.waiting.saturating_add(waiting),
            running: sum.running.saturating_add(running),
            decoding: sum.decoding.saturating_add(decoding),
            prefill_tokens: sum.prefill_tokens.saturating_add(prefill_tokens),
            context_tokens: sum.context_tokens.saturating_add(context_tokens),
            blocks_total: sum.blocks_total.saturating_add(blocks_total),
            blocks_free: sum.blocks_free.saturating_add(blocks_free),
            preemptions: sum.preemptions.saturating_add(preemptions),
            cached_tokens: sum.cached_tokens.saturating_add(cached_tokens),
            prompt_tokens: sum.prompt_tokens.saturating_add(prompt_tokens),
        }
    })
}

fn state_name(state: RankState) -> &'static str {
    match state {
        RankState::Starting => "starting",
        RankState::Ready => "ready",
        RankState::Draining => "draining",
        RankState::Silent => "silent",
        RankState::Fenced => "fenced",
        RankState::Lost => "lost",
    }
}

fn breaker_name(breaker: Breaker) -> &'static str {
    match breaker {
        Breaker::Closed => "closed",
        Breaker::Open => "open",
        Breaker::HalfOpen => "half_open",
    }
}
