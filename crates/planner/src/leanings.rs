//! Which of several like engines are kept for prefill.
//!
//! In: what prompts left to compute, how much of its time each engine spends on prefills. Out: changes of leaning. Start
//! at [`Leanings::review`]; the rule is in the crate's README.

use std::time::Duration;

use forebay_perf_model::QueueShape;
use forebay_placement::{RankState, Snapshot};
use forebay_types::{Incarnation, Leaning, Role};

#[cfg(test)]
mod tests;

/// Weight of the newest prompt in the running means: a memory of some fifty.
const NEWEST_WEIGHT: f64 = 0.02;

/// What is asked for to begin is eased to this share to go on.
const EASE: f64 = 0.8;

/// Engines that lean to prefill beyond the load: a queue of prompts costs more than some idle time.
const LOAD_SPARE: f64 = 0.25;

/// Who places less than this share of what engines run knows too little of the load to speak of a smaller one.
const OWN_SHARE_MIN: f64 = 0.02;

/// When engines lean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LeaningSettings {
    /// Whether any do.
    pub enabled: bool,
    /// Between two looks at the engines.
    pub review_every: Duration,
    /// Time in which a load that was seen loses half its weight.
    pub half_life: Duration,
    /// From one move to the next.
    pub rest: Duration,
    /// Prefill load, in engines, from which one leans.
    pub load_min: f64,
    /// Share of the pools of engines that lean to decode that sequences may hold; beyond it fewer lean to prefill, at once.
    pub kv_use_max: f64,
    /// By how many engines the load must be past the point half way between two counts to move.
    pub load_margin: f64,
    /// Prompt tokens left to compute, in the mean, from which engines lean; they stop below four fifths of it.
    pub new_tokens_min: f64,
    /// The same of an answer's tokens.
    pub output_tokens_min: f64,
}

impl Default for LeaningSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            review_every: Duration::from_secs(1),
            half_life: Duration::from_secs(15),
            rest: Duration::from_secs(10),
            load_min: 0.5,
            kv_use_max: 0.75,
            load_margin: 0.15,
            new_tokens_min: 1500.0,
            output_tokens_min: 32.0,
        }
    }
}

/// What is seen of an engine that could lean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peer {
    /// Which life of which engine.
    pub incarnation: Incarnation,
    /// Tokens that one of its steps computes at most.
    pub step_tokens_max: u32,
    /// Share of recent time that prefills took, 0 to 1; of its first rank.
    pub prefill_share: f64,
    /// Seconds in which it would compute one prompt of the mean kind alone; of its first rank.
    pub prefill_seconds: f64,
    /// Share of its KV pool that sequences hold, its reservations included, 0 to 1; of its fullest rank.
    pub kv_use: f64,
    /// Its ranks.
    pub ranks: u32,
    /// How it leans now.
    pub leaning: Leaning,
}

/// What else bears on how many lean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Around {
    /// Of the engines' sequences, the share that was placed here, 0 to 1.
    pub own_share: f64,
    /// Engines that are pinned to prefill: what they compute, nobody has to lean for.
    pub pinned_prefills: u32,
}

impl Default for Around {
    fn default() -> Self {
        Self { own_share: 1.0, pinned_prefills: 0 }
    }
}

impl Around {
    /// What is around the engines of `model` in a snapshot.
    pub fn of(snapshot: &Snapshot, model: &str) -> Self {
        let pinned = snapshot.ranks().iter().filter(|rank| {
            let serves = rank.model.as_ref() == model && rank.state == RankState::Ready;
            serves && rank.role == Role::Prefill && rank.id.dp_rank == 0
        });
        Self { own_share: 1.0 - snapshot.others_share(), pinned_prefills: pinned.count() as u32 }
    }
}

/// What prompts are like, in the mean of the last fifty or so.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MeanPrompt {
    /// Tokens left to compute after its cached ones.
    pub new_tokens: f64,
    /// The attention work of those: `n·c + n²/2` for `n` after `c` cached ones.
    pub attention: f64,
    /// Tokens that are expected of its answer.
    pub output_tokens: f64,
}

/// The engines of one model that can exchange KV.
#[derive(Debug, Clone)]
pub struct Leanings {
    settings: LeaningSettings,
    prompt: MeanPrompt,
    /// Prompts placed, those of one half-life ago counted half; as of `counted_at`.
    prompts: f64,
    counted_at: Duration,
    began_at: Option<Duration>,
    /// Prefill load in engines, as of the last review.
    load: f64,
    reviewed_at: Option<Duration>,
    moved_at: Option<Duration>,
    prefills: usize,
}

impl Leanings {
    /// Of engines that nobody has sent anything to.
    pub fn new(settings: LeaningSettings) -> Self {
        Self {
            settings,
            prompt: MeanPrompt::default(),
            prompts: 0.0,
            counted_at: Duration::ZERO,
            began_at: None,
            load: 0.0,
            reviewed_at: None,
            moved_at: None,
            prefills: 0,
        }
    }

    /// A prompt was placed at `now` (time since the caller's origin, not going back) that leaves `new_tokens` to compute
    /// after `cached_tokens`, and for which `output_tokens` are expected.
    pub fn placed(&mut self, now: Duration, new_tokens: u32, cached_tokens: u32, output_tokens: u32) {
        let (new, cached) = (f64::from(new_tokens), f64::from(cached_tokens));
        let this = [new, new * cached + new * new / 2.0, f64::from(output_tokens)];
        let is_first = self.began_at.is_none();
        self.began_at.get_or_insert(now);
        let weight = if is_first { 1.0 } else { NEWEST_WEIGHT };
        let MeanPrompt { new_tokens, attention, output_tokens } = &mut self.prompt;
        for (mean, value) in [new_tokens, attention, output_tokens].into_iter().zip(this) {
            *mean += weight * (value - *mean);
        }
        self.prompts = self.prompts_at(now) + 1.0;
        self.counted_at = now;
    }

    /// What prompts are like.
    pub fn prompt(&self) -> &MeanPrompt {
        &self.prompt
    }

    fn prompts_at(&self, now: Duration) -> f64 {
        self.prompts * self.kept(now.saturating_sub(self.counted_at))
    }

    /// Share of its weight that is left of what was seen so long ago.
    fn kept(&self, ago: Duration) -> f64 {
        (-ago.as_secs_f64() / self.settings.half_life.as_secs_f64().max(1e-3)).exp2()
    }

    /// Prompts a second. What a steady rate would have counted up by now is what the count is held against.
    fn rate(&self, now: Duration) -> f64 {
        let Some(began) = self.began_at else { return 0.0 };
        let half_life = self.settings.half_life.as_secs_f64().max(1e-3);
        let seconds = (1.0 - self.kept(now.saturating_sub(began))) * half_life / std::f64::consts::LN_2;
        if seconds > 0.0 { self.prompts_at(now) / seconds } else { 0.0 }
    }

    /// Whether it is time for [`Leanings::review`].
    pub fn is_due(&self, now: Duration) -> bool {
        self.settings.enabled && self.reviewed_at.is_none_or(|at| now >= at + self.settings.review_every)
    }

    /// Looks at the engines at `now`: which are to lean otherwise.
    pub fn review(&mut self, now: Duration, peers: &[Peer], around: &Around) -> Vec<(Incarnation, Leaning)> {
        self.see(now, peers, around);
        let wanted = self.wanted(peers);
        let last = self.moved_at.or(self.began_at).unwrap_or(now);
        let is_urgent = wanted < self.prefills && self.is_tight(peers);
        if wanted != self.prefills && (is_urgent || now >= last + self.settings.rest) {
            self.prefills = wanted;
            self.moved_at = Some(now);
        }
        // Engines may have gone meanwhile.
        self.prefills = self.prefills.min(peers.len().saturating_sub(1));
        self.assign(peers)
    }

    /// Engines that lean to prefill.
    pub fn prefills(&self) -> usize {
        self.prefills
    }

    /// The load in engines of the kind that would be asked first: that with the largest steps. What pinned ones take is not
    /// in it.
    fn see(&mut self, now: Duration, peers: &[Peer], around: &Around) {
        self.reviewed_at = Some(now);
        let first = peers.iter().max_by_key(|peer| peer.step_tokens_max);
        let seconds = first.map_or(0.0, |peer| peer.prefill_seconds / f64::from(peer.ranks.max(1)));
        let all = self.rate(now) * seconds / around.own_share.clamp(OWN_SHARE_MIN, 1.0);
        let load = all - f64::from(around.pinned_prefills);
        self.load = if load.is_finite() { load.max(0.0) } else { 0.0 };
    }

    /// How many should lean to prefill.
    fn wanted(&self, peers: &[Peer]) -> usize {
        let LeaningSettings { load_min, load_margin, new_tokens_min, output_tokens_min, .. } = self.settings;
        let ease = if self.prefills > 0 { EASE } else { 1.0 };
        let pays = self.prompt.new_tokens >= ease * new_tokens_min
            && self.prompt.output_tokens >= ease * output_tokens_min
            && self.load >= ease * load_min;
        if !pays {
            return 0;
        }
        let load = self.load + LOAD_SPARE;
        let most = self.most(peers, if self.prefills > 0 { 1.0 } else { EASE });
        let wanted = match self.prefills {
            0 => (load.round() as usize).max(1),
            here if load > here as f64 + 0.5 + load_margin => here + 1,
            here if load < here as f64 - 0.5 - load_margin || self.is_tight(peers) => here - 1,
            here => here,
        };
        // Fewer than the load takes would keep prompts waiting: then rather none.
        let is_enough = |prefills: usize| prefills as f64 >= load - 0.5 - load_margin;
        let wanted = wanted.min(most);
        if is_enough(wanted) { wanted } else { 0 }
    }

    /// How many may lean to prefill so that what all hold fits into the pools of the others, filled to so much of
    /// `kv_use_max`.
    fn most(&self, peers: &[Peer], filled: f64) -> usize {
        let held: f64 = peers.iter().map(|peer| peer.kv_use).sum();
        let decoding = (held / (filled * self.settings.kv_use_max)).ceil().max(1.0);
        peers.len().saturating_sub(decoding as usize)
    }

    /// Whether those that decode for others run out of room.
    fn is_tight(&self, peers: &[Peer]) -> bool {
        let decoding = peers.iter().filter(|peer| peer.leaning == Leaning::Decode);
        decoding.map(|peer| peer.kv_use).fold(0.0, f64::max) > self.settings.kv_use_max
    }

    fn assign(&self, peers: &[Peer]) -> Vec<(Incarnation, Leaning)> {
        let mut order: Vec<&Peer> = peers.iter().collect();
        order.sort_by(|a, b| {
            let leans = |peer: &Peer| peer.leaning == Leaning::Prefill;
            let by_size = b.step_tokens_max.cmp(&a.step_tokens_max);
            let by_leaning = || leans(b).cmp(&leans(a));
            let by_share = || b.prefill_share.total_cmp(&a.prefill_share);
            by_size.then_with(by_leaning).then_with(by_share).then(a.incarnation.cmp(&b.incarnation))
        });
        let leaning = |place: usize| match self.prefills {
            0 => Leaning::Neither,
            prefills if place < prefills => Leaning::Prefill,
            _ => Leaning::Decode,
        };
        let places = order.into_iter().enumerate();
        let changes = places.filter(|&(place, peer)| peer.leaning != leaning(place));
        changes.map(|(place, peer)| (peer.incarnation, leaning(place))).collect()
    }
}

impl Peer {
    /// The engines of `model` that may lean: ready, of both roles, able to hand KV to each other, and stepping rank by
    /// rank. Those of the KV layout that most have; the others are left as they are.
    pub fn of(snapshot: &Snapshot, model: &str, prompt: &MeanPrompt) -> Vec<Self> {
        let ranks = snapshot.ranks().iter().filter(|rank| {
            rank.model.as_ref() == model
                && rank.role == Role::Both
                && rank.state == RankState::Ready
                && rank.can_export
                && rank.can_import
                && !rank.steps_together
        });
        let mut layouts: Vec<((u64, u32), Vec<Self>)> = Vec::new();
        for rank in ranks {
            let layout = (rank.kv_layout, rank.block_size_tokens);
            let at = layouts.iter().position(|(known, _)| *known == layout).unwrap_or_else(|| {
                layouts.push((layout, Vec::new()));
                layouts.len() - 1
            });
            let peers = &mut layouts[at].1;
            // Ranks of one engine are neighbours.
            match peers.last_mut().filter(|peer| peer.incarnation == rank.id.incarnation) {
                Some(peer) => {
                    peer.ranks += 1;
                    peer.kv_use = peer.kv_use.max(rank.kv_use());
                }
                None => peers.push(Self {
                    incarnation: rank.id.incarnation,
                    step_tokens_max: rank.step_tokens_max,
                    prefill_share: rank.prefill_share,
                    prefill_seconds: rank.perf.prices().queue_seconds(&QueueShape {
                        tokens: prompt.new_tokens.round() as u64,
                        attention: prompt.attention,
                        budget_tokens: rank.step_tokens_max,
                        ..QueueShape::default()
                    }),
                    kv_use: rank.kv_use(),
                    ranks: 1,
                    leaning: rank.leaning,
                }),
            }
        }
        // The first of the largest.
        let largest = layouts.into_iter().rev().max_by_key(|(_, peers)| peers.len());
        largest.map_or_else(Vec::new, |(_, peers)| peers)
    }
}
