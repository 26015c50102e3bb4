//! One step of a [`Core`]: who runs, what is computed, which tokens come of it.

use serde_json::Value;
use tokio::time::Instant;

use super::nixl::{self, Demand};
use super::request::{Ending, Phase, Sampled, Sequence, Transfer};
use super::{Core, Delivery, Load, Offer, Step};
use crate::kv::{Draw, mix};
use crate::tokenizer::{END_OF_TEXT, IM_END, Token};

/// Whether a waiting request could start.
enum Admission {
    Started,
    Waits,
    NoRoom,
    Dead,
}

impl Core {
    /// Takes one step. `now` decides about leases.
    pub(crate) fn step(&mut self, now: Instant) -> Step {
        let mut step = Step::default();
        if self.dead {
            return step;
        }
        self.expire(now);
        self.counts.steps += 1;
        self.grow_running();
        if !self.admit(&mut step) {
            self.die();
            step.died = true;
            return step;
        }
        let running = std::mem::take(&mut self.running);
        for mut sequence in running {
            self.compute(&mut sequence);
            let sampled = self.draw(&mut sequence);
            step.decoded += 1;
            self.counts.generated += 1;
            self.counts.gaps += u64::from(sequence.generated() > 1);
            match self.ending(&sequence, sampled.token) {
                None => {
                    step.deliveries.push(delivery(&sequence, Some(sampled), None, None));
                    self.running.push(sequence);
                }
                Some(ending) => {
                    let counter = if ending == Ending::Length {
                        &mut self.counts.length
                    } else {
                        &mut self.counts.stopped
                    };
                    *counter += 1;
                    let params = self.finish(&sequence, &mut step);
                    step.deliveries.push(delivery(&sequence, Some(sampled), Some(ending), params));
                }
            }
        }
        step.events = self.pool.take_events();
        step
    }

    /// A block for each running request that needs one; the youngest goes back to the queue if there is none.
    fn grow_running(&mut self) {
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &self.running[index];
            let needed = sequence.tokens.len().div_ceil(self.settings.block_size) - sequence.table.len();
            match self.pool.allocate(needed) {
                Some(blocks) => {
                    let mut sequence = self.running.remove(index);
                    sequence.table.extend(blocks);
                    self.announce(&mut sequence);
                    self.running.insert(index, sequence);
                    index += 1;
                }
                None => {
                    let mut youngest = self.running.pop().expect("index is below its length");
                    self.pool.release(&youngest.table);
                    youngest.reset();
                    self.counts.preempted += 1;
                    self.waiting.push_front(youngest);
                }
            }
        }
    }

    /// Starts waiting requests, in order, until one does not fit. False if one of them killed the engine.
    fn admit(&mut self, step: &mut Step) -> bool {
        if self.settings.by_priority {
            let waiting = self.waiting.make_contiguous();
            waiting.sort_by_key(|sequence| (sequence.work.priority, sequence.arrival));
        }
        let mut index = 0;
        while index < self.waiting.len() && self.running.len() < self.settings.running_max {
            if self.waiting[index].phase != Phase::Waiting {
                index += 1;
                continue;
            }
            let mut sequence = self.waiting.remove(index).expect("index is below its length");
            match self.start(&mut sequence, step) {
                Admission::Started => self.running.push(sequence),
                Admission::Waits => {
                    self.waiting.insert(index, sequence);
                    index += 1;
                }
                Admission::NoRoom => {
                    self.waiting.insert(index, sequence);
                    return true;
                }
                Admission::Dead => {
                    self.waiting.insert(index, sequence);
                    return false;
                }
            }
        }
        true
    }

    fn start(&mut self, sequence: &mut Sequence, step: &mut Step) -> Admission {
        if sequence.table.is_empty() {
            let block_size = self.settings.block_size;
            sequence.hashes = self.pool.hashes(&sequence.tokens, &sequence.work.identity);
            // The last token is always computed, or there would be nothing to draw from.
            let hit_max =
                if self.settings.prefix_caching { (sequence.tokens.len() - 1) / block_size } else { 0 };
            sequence.table = self.pool.take_cached(&sequence.hashes, hit_max);
            let hit = sequence.table.len() * block_size;
            let needed = sequence.tokens.len().div_ceil(block_size) - sequence.table.len();
            let Some(blocks) = self.pool.allocate(needed) else {
                self.pool.release(&sequence.table);
                sequence.table.clear();
                return Admission::NoRoom;
            };
            sequence.cached_blocks = sequence.table.len();
            sequence.table.extend(blocks);
            sequence.computed = hit;
            if sequence.generated() == 0 {
                sequence.hit = hit;
                self.counts.prefix_queries += sequence.work.prompt.len() as u64;
                self.counts.prefix_hits += hit as u64;
            }
            match self.load(sequence, step) {
                Admission::Started => {}
                other => return other,
            }
        }
        // A first token that came with the prompt's KV may need a block more.
        let lacking = sequence.tokens.len().div_ceil(self.settings.block_size) - sequence.table.len();
        let Some(blocks) = self.pool.allocate(lacking) else { return Admission::NoRoom };
        sequence.table.extend(blocks);
        self.announce(sequence);
        sequence.phase = Phase::Running;
        self.counts.external_hits += sequence.external as u64;
        let prompt = sequence.work.prompt.len();
        let local = prompt.saturating_sub(sequence.hit + sequence.external);
        self.counts.computed += local as u64;
        step.prefilled += sequence.tokens.len() - sequence.computed.min(sequence.tokens.len());
        Admission::Started
    }

    /// What a request's transfer asks before it can run.
    fn load(&mut self, sequence: &mut Sequence, step: &mut Step) -> Admission {
        if sequence.loaded {
            return Admission::Started;
        }
        let lacking = sequence.table.len() - sequence.cached_blocks;
        let load = match &sequence.work.transfer {
            Transfer::Room(room) | Transfer::Offer(room) => {
                Load::Room { request: sequence.work.id.clone(), room: room.clone() }
            }
            transfer @ Transfer::Params(params) => {
                let Some(connector) = self.connector_for(transfer) else { return Admission::Started };
                match nixl::demand(connector.mode, &sequence.work.id, params, lacking) {
                    Demand::Nothing => return Admission::Started,
                    Demand::Die => return Admission::Dead,
                    Demand::Strand => {
                        sequence.phase = Phase::Stranded;
                        return Admission::Waits;
                    }
                    Demand::Fetch(source) => Load::Remote { request: sequence.work.id.clone(), source },
                }
            }
            _ => return Admission::Started,
        };
        sequence.reported_cached = nixl::reported_cached(&sequence.work.transfer);
        if !matches!(sequence.work.transfer, Transfer::Offer(_)) {
            self.counts.external_queries += (sequence.work.prompt.len() - sequence.hit) as u64;
        }
        sequence.phase = Phase::Loading;
        step.loads.push(load);
        Admission::Waits
    }

    /// Announces the blocks that this step fills.
    fn announce(&mut self, sequence: &mut Sequence) {
        let full = sequence.tokens.len() / self.settings.block_size;
        if full > sequence.hashes.len() {
            sequence.hashes = self.pool.hashes(&sequence.tokens, &sequence.work.identity);
        }
        let range = (sequence.cached_blocks, full);
        self.pool.cache(&sequence.tokens, &sequence.work.identity, &sequence.hashes, &sequence.table, range);
        sequence.cached_blocks = full.max(sequence.cached_blocks);
    }

    /// Attends over the KV that is there and computes what is not.
    fn compute(&mut self, sequence: &mut Sequence) {
        for position in sequence.attended..sequence.tokens.len() {
            let entry = if position < sequence.computed {
                self.pool.entry(&sequence.table, position)
            } else {
                let entry = sequence.model.entry(sequence.context, sequence.tokens[position]);
                self.pool.write(&sequence.table, position, entry);
                entry
            };
            sequence.context = sequence.model.attend(sequence.context, entry);
        }
        sequence.attended = sequence.tokens.len();
        sequence.computed = sequence.tokens.len();
    }

    fn draw(&mut self, sequence: &mut Sequence) -> Sampled {
        let sampling = &sequence.work.sampling;
        let place = sequence.generated() as u64;
        let draw =
            sampling.generator.map_or(Draw::Greedy, |generator| Draw::Sampled(mix(generator, place) | 1));
        let end_allowed = sequence.generated() >= sampling.min_tokens;
        let tail = &sequence.tokens[sequence.tokens.len().saturating_sub(2)..];
        let token = sequence.model.next(sequence.context, tail, draw, end_allowed);
        sequence.tokens.push(token);
        sampled(token, place, sequence.tokens.len())
    }

    /// Takes the first token from the prefill server; true if the answer ends with it.
    pub(super) fn begin_with(&mut self, sequence: &mut Sequence, first: Token) -> bool {
        sequence.tokens.push(first);
        self.counts.generated += 1;
        let sampled = sampled(first, 0, sequence.tokens.len());
        let ending = self.ending(sequence, first);
        let ends = ending.is_some();
        if ends {
            let counter = if ending == Some(Ending::Length) {
                &mut self.counts.length
            } else {
                &mut self.counts.stopped
            };
            *counter += 1;
            self.counts.external_hits += sequence.external as u64;
            self.pool.release(&sequence.table);
        }
        delivery(sequence, Some(sampled), ending, None).perform();
        ends
    }

    fn ending(&self, sequence: &Sequence, token: Token) -> Option<Ending> {
        let sampling = &sequence.work.sampling;
        if sequence.generated() > sampling.min_tokens || sampling.min_tokens == 0 {
            if !sampling.ignore_eos && matches!(token, IM_END | END_OF_TEXT) {
                return Some(Ending::Stop(None));
            }
            if sampling.stop_token_ids.contains(&token) {
                return Some(Ending::Stop(Some(token)));
            }
        }
        let context_max = self.pool.usable() * self.settings.block_size;
        let full = sequence.generated() >= sampling.max_tokens || sequence.tokens.len() > context_max;
        full.then_some(Ending::Length)
    }

    /// Frees a finished request's blocks, or keeps them for another engine and says how to get them.
    fn finish(&mut self, sequence: &Sequence, step: &mut Step) -> Option<Value> {
        if let Transfer::Offer(room) = &sequence.work.transfer {
            let first = sequence.tokens[sequence.work.prompt.len()];
            step.offers.push(Offer { room: room.clone(), entries: self.prompt_entries(sequence), first });
        }
        let connector = self.connector_for(&sequence.work.transfer).cloned();
        match connector {
            Some(connector) if nixl::hands_over(&sequence.work.transfer) => {
                self.hold(sequence, connector.lease);
                Some(nixl::handed_over(&connector, sequence))
            }
            _ => {
                self.pool.release(&sequence.table);
                None
            }
        }
    }
}

/// A token with a log probability that depends on nothing but its place.
fn sampled(token: Token, place: u64, length: usize) -> Sampled {
    let state = mix(mix(u64::from(token), place), length as u64);
    Sampled { token, logprob: -((state % 4000) as f64) / 1000.0 - 0.001, state }
}

fn delivery(
    sequence: &Sequence,
    token: Option<Sampled>,
    ending: Option<Ending>,
    transfer_params: Option<Value>,
) -> Delivery {
    Delivery {
        outlet: sequence.outlet.clone(),
        token,
        ending,
        cached_tokens: sequence.reported_cached.unwrap_or(sequence.hit),
        transfer_params,
    }
}
