//! Why a request runs where it runs: a value that can be stored, served as JSON and printed as a table.
//!
//! Bounded whatever the size of the fleet: the cheapest candidates, the ranks they name, and a number for the rest.

use forebay_types::{EngineName, FirstToken, Leaning, RankId, Role};
use serde::{Deserialize, Serialize};

use crate::{
    choose::{Choice, Chooser, Pair},
    cost::Priced,
    filter::{Exclusion, Relaxed, Verdict},
    place::{Plan, Request},
    policy::Policy,
    snapshot::{Breaker, RankView, Reserved, Snapshot},
    standing::{self, Pool},
    weights::Weights,
};

/// Candidates that a record lists. A person compares a handful, and a thousand records must fit into a few megabytes.
const CANDIDATES_LISTED_MAX: usize = 16;

/// Excluded ranks that a record lists.
const EXCLUDED_LISTED_MAX: usize = 32;

/// Why a request runs where it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The rule that chose.
    pub policy: Policy,
    /// Generation of the snapshot that it looked at.
    pub generation: u64,
    /// What was known of the request.
    pub request: RequestInputs,
    /// Which rules were relaxed to find a place.
    pub relaxed: Relaxed,
    /// The cheapest candidates, cheapest first, and always the chosen one and the cheapest of each kind.
    pub candidates: Vec<Candidate>,
    /// Candidates that were compared and are not listed.
    pub candidates_omitted: u32,
    /// Index of the chosen one in `candidates`.
    pub chosen: u32,
    /// How many candidates the rule found equal; the seed chose among them. 1: it was the only one.
    pub tied: u32,
    /// The ranks that `candidates` name, in order of their ids.
    pub ranks: Vec<RankInputs>,
    /// The other ranks that could have been chosen, in order of their ids, each with its cheapest candidate's price. One
    /// that was too dear to be paired with any is left out.
    #[serde(default)]
    pub others: Vec<RankCost>,
    /// Ranks that could not be chosen, in order of their ids.
    pub excluded: Vec<Excluded>,
    /// Excluded ranks that are not listed.
    pub excluded_omitted: u32,
}

/// What was known of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestInputs {
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// Output expected of each choice.
    pub output_tokens_expected: u32,
    /// Answers asked for.
    pub choices: u32,
}

/// One way to run the request, and its price.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Where.
    pub plan: Plan,
    /// The price, term by term.
    pub terms: Terms,
    /// Their sum.
    pub total_seconds: f64,
    /// Predicted time to the first token.
    pub ttft_seconds: f64,
    /// Predicted mean time between tokens of the answer; `None` where decoding has no price, or one token is expected.
    #[serde(default)]
    pub itl_seconds: Option<f64>,
    /// Prompt tokens served from cache where the prompt is computed.
    pub cached_tokens: u32,
    /// Blocks that would move.
    pub transfer_blocks: u32,
    /// Their size.
    pub transfer_bytes: u64,
}

/// What a rank would have cost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RankCost {
    /// Which rank.
    pub rank: RankId,
    /// The price of the cheapest candidate that it is part of.
    pub total_seconds: f64,
}

/// The price of a candidate, in seconds, weights applied.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// Until the prompts ahead are computed, from the rest of the running step on.
    pub wait: f64,
    /// Computing what is not cached.
    pub prefill: f64,
    /// Moving the blocks that the decode rank lacks, and the hand-over.
    pub transfer: f64,
    /// The expected output at the decode rank's pace.
    pub decode: f64,
    /// What the running decodes of the prefilling rank lose.
    pub harm: f64,
    /// KV pools after admission.
    pub kv_pressure: f64,
}

impl Terms {
    /// Their sum.
    pub fn total(&self) -> f64 {
        let Self { wait, prefill, transfer, decode, harm, kv_pressure } = *self;
        wait + prefill + transfer + decode + harm + kv_pressure
    }

    /// Time to the first token: it comes from the rank that computes the prompt, or after the transfer from the one that
    /// goes on.
    pub(crate) fn ttft(&self, first: FirstToken) -> f64 {
        match first {
            FirstToken::Handed => self.wait + self.prefill,
            FirstToken::OfDecode => self.wait + self.prefill + self.transfer,
        }
    }
}

/// What was known of a rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankInputs {
    /// Which rank.
    pub rank: RankId,
    /// Its engine.
    pub engine: EngineName,
    /// The work it may be given.
    pub role: Role,
    /// Its breaker.
    pub breaker: Breaker,
    /// Leading blocks of the prompt that it holds.
    pub overlap_blocks: u32,
    /// Prompt tokens that it would have to compute.
    pub new_tokens: u32,
    /// Prompt tokens ahead, reported and reserved.
    pub queued_tokens: u64,
    /// Sequences in its queue, as reported.
    pub waiting: u32,
    /// Sequences that decode, reported and reserved.
    pub decodes: u32,
    /// Context that they read, as reported.
    pub context_tokens: u64,
    /// Work promised to it that its load does not show yet.
    pub reserved: Reserved,
    /// The phase that it was kept for.
    #[serde(default)]
    pub leaning: Leaning,
    /// Share of its time that prefills lately took from decodes.
    pub prefill_share: f64,
    /// Share of its KV pool in use or promised, before this request.
    pub kv_use: f64,
    /// Age of its load report.
    pub load_age_seconds: f64,
    /// Steps that its model has learned from; 0: prices come from the start-up probe alone.
    pub model_samples: u64,
}

/// A rank that could not be chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Excluded {
    /// Which rank.
    pub rank: RankId,
    /// Its engine.
    pub engine: EngineName,
    /// Why.
    #[serde(flatten)]
    pub reason: Exclusion,
}

impl Excluded {
    pub(crate) fn label(&self) -> String {
        label(&self.engine, self.rank)
    }
}

/// Text for people: one row for each candidate and each excluded rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Headings.
    pub columns: Vec<&'static str>,
    /// Chosen first, then by price, then what was excluded.
    pub rows: Vec<Row>,
}

/// One row of a [`Table`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// As many as there are columns.
    pub cells: Vec<String>,
    /// Whether this is the chosen candidate.
    pub chosen: bool,
}

/// What splitting a request is predicted to save and to cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Savings {
    /// Seconds until the first token; below 0 it costs some.
    pub ttft_seconds: f64,
    /// Seconds of decoding; below 0 it costs some.
    pub decode_seconds: f64,
    /// Seconds of moving KV.
    pub transfer_seconds: f64,
}

impl Explanation {
    /// What the chosen split saves against the cheapest plan on one rank, by `weights` that it was priced with. `None` if
    /// it is none, or could not have run on one rank.
    pub fn savings(&self, weights: &Weights) -> Option<Savings> {
        let is_split = |candidate: &Candidate| matches!(candidate.plan, Plan::Split { .. });
        let split = self.candidates.get(self.chosen as usize).filter(|chosen| is_split(chosen))?;
        let alone = self.candidates.iter().find(|candidate| !is_split(candidate))?;
        let unweighted = |seconds: f64, weight: f64| if weight > 0.0 { seconds / weight } else { 0.0 };
        Some(Savings {
            ttft_seconds: alone.ttft_seconds - split.ttft_seconds,
            decode_seconds: unweighted(alone.terms.decode - split.terms.decode, weights.decode),
            transfer_seconds: unweighted(split.terms.transfer, weights.transfer),
        })
    }

    /// The chosen candidate.
    pub fn chosen(&self) -> &Candidate {
        &self.candidates[self.chosen as usize]
    }

    /// The candidates and exclusions as text. Milliseconds; a candidate's terms add up to its total.
    pub fn table(&self) -> Table {
        let columns = vec!["plan", "wait", "prefill", "transfer", "decode", "harm", "kv", "total", "note"];
        let dashes = columns.len() - 2;
        let chosen = self.chosen as usize;
        let order = std::iter::once(chosen).chain((0..self.candidates.len()).filter(|&i| i != chosen));
        let mut rows: Vec<Row> = order.map(|i| self.row(&self.candidates[i], i == chosen)).collect();
        let row_of_dashes = |plan: String, note: String| {
            let mut cells = vec![plan];
            cells.extend(std::iter::repeat_n("–".to_owned(), dashes));
            cells.push(note);
            Row { cells, chosen: false }
        };
        if self.candidates_omitted > 0 {
            rows.push(row_of_dashes(format!("{} more", self.candidates_omitted), "dearer".to_owned()));
        }
        rows.extend(self.excluded.iter().map(|it| row_of_dashes(it.label(), it.reason.to_string())));
        if self.excluded_omitted > 0 {
            rows.push(row_of_dashes(format!("{} more", self.excluded_omitted), "excluded".to_owned()));
        }
        Table { columns, rows }
    }

    fn row(&self, candidate: &Candidate, chosen: bool) -> Row {
        let Terms { wait, prefill, transfer, decode, harm, kv_pressure } = candidate.terms;
        let mut cells = vec![self.plan_text(candidate.plan)];
        let seconds = [wait, prefill, transfer, decode, harm, kv_pressure, candidate.total_seconds];
        cells.extend(seconds.map(|term| format!("{:.1}", term * 1e3)));
        cells.push(self.note(candidate, chosen));
        Row { cells, chosen }
    }

    fn plan_text(&self, plan: Plan) -> String {
        let name = |id: RankId| match self.ranks.iter().find(|inputs| inputs.rank == id) {
            Some(inputs) => label(&inputs.engine, id),
            None => id.to_string(),
        };
        match plan {
            Plan::Aggregated { rank } => name(rank),
            Plan::Split { prefill, decode } => format!("{} → {}", name(prefill), name(decode)),
        }
    }

    fn note(&self, candidate: &Candidate, chosen: bool) -> String {
        let mut parts = Vec::new();
        if chosen {
            parts.push(match (self.tied, self.policy) {
                (1, Policy::Cost) => "chosen".to_owned(),
                (1, policy) => format!("chosen by {policy}"),
                (tied, _) => format!("chosen by seed among {tied} equal"),
            });
            match self.relaxed {
                Relaxed::Nothing => {}
                Relaxed::Failed => parts.push("nothing but failed ranks left".to_owned()),
                Relaxed::Breakers => parts.push("nothing but open breakers left".to_owned()),
            }
        }
        if candidate.cached_tokens > 0 {
            parts
                .push(format!("{} of {} tokens cached", candidate.cached_tokens, self.request.prompt_tokens));
        }
        if matches!(candidate.plan, Plan::Split { .. }) {
            let mebibytes = candidate.transfer_bytes as f64 / f64::from(1 << 20);
            parts.push(format!("moves {} blocks, {mebibytes:.1} MiB", candidate.transfer_blocks));
        }
        parts.join("; ")
    }
}

/// An engine's name, with the DP rank if it is not the first.
fn label(engine: &EngineName, rank: RankId) -> String {
    if rank.dp_rank == 0 { engine.to_string() } else { format!("{engine}/{}", rank.dp_rank) }
}

/// What a record is made from.
pub(crate) struct Record<'a> {
    pub(crate) chooser: &'a Chooser<'a>,
    pub(crate) request: &'a Request<'a>,
    pub(crate) policy: Policy,
    pub(crate) relaxed: Relaxed,
    pub(crate) verdicts: &'a [Verdict],
}

impl Record<'_> {
    /// Writes the record of `choice`.
    pub(crate) fn write(&self, choice: Choice) -> Explanation {
        let Choice { pairs, chosen, tied } = choice;
        let compared = pairs.len();
        let mut least = vec![f64::INFINITY; self.chooser.priced.len()];
        for pair in &pairs {
            for rank in [pair.prefill, pair.decode] {
                least[rank] = least[rank].min(pair.total_seconds);
            }
        }
        let listed = cheapest(pairs, chosen);
        let snapshot = self.chooser.snapshot;
        let mut named: Vec<usize> = listed.0.iter().flat_map(|pair| [pair.prefill, pair.decode]).collect();
        named.sort_unstable();
        named.dedup();
        named.iter().for_each(|&rank| least[rank] = f64::INFINITY);
        let others = self.chooser.priced.iter().zip(least).filter(|(_, least)| least.is_finite());
        let barred = || self.verdicts.iter().filter(|verdict| !verdict.eligible(self.relaxed));
        let excluded: Vec<Excluded> =
            barred().filter_map(|verdict| excluded(snapshot, verdict)).take(EXCLUDED_LISTED_MAX).collect();
        Explanation {
            policy: self.policy,
            generation: snapshot.generation,
            request: RequestInputs {
                prompt_tokens: self.request.prompt_tokens,
                output_tokens_expected: self.request.output_tokens(),
                choices: self.request.choices(),
            },
            relaxed: self.relaxed,
            candidates_omitted: (compared - listed.0.len()) as u32,
            candidates: listed.0.iter().map(|pair| self.candidate(pair)).collect(),
            chosen: listed.1 as u32,
            tied,
            ranks: named.into_iter().map(|rank| self.rank_inputs(&self.chooser.priced[rank])).collect(),
            others: others.map(|(rank, total_seconds)| RankCost { rank: rank.id, total_seconds }).collect(),
            excluded_omitted: (barred().count() - excluded.len()) as u32,
            excluded,
        }
    }

    fn candidate(&self, pair: &Pair) -> Candidate {
        let priced = self.chooser.priced;
        let (prefill, decode) = (&priced[pair.prefill], &priced[pair.decode]);
        let terms = self.chooser.terms(pair.prefill, pair.decode);
        let moves = pair.prefill != pair.decode;
        // The price of decoding is its seconds, weighted, of the tokens after the first.
        let weighted_gaps = self.chooser.weights.decode * f64::from(self.request.output_tokens() - 1);
        Candidate {
            plan: pair.plan(priced),
            terms,
            total_seconds: pair.total_seconds,
            ttft_seconds: self.chooser.ttft(pair.prefill, pair.decode),
            itl_seconds: (weighted_gaps > 0.0).then(|| terms.decode / weighted_gaps),
            cached_tokens: prefill.cached_tokens,
            transfer_blocks: if moves { decode.missing_blocks } else { 0 },
            transfer_bytes: if moves { decode.missing_bytes() } else { 0 },
        }
    }

    fn rank_inputs(&self, priced: &Priced) -> RankInputs {
        let rank: &RankView = &self.chooser.snapshot.ranks()[priced.index];
        RankInputs {
            rank: rank.id,
            engine: rank.engine.clone(),
            role: rank.role,
            breaker: rank.breaker,
            overlap_blocks: priced.overlap_blocks,
            new_tokens: priced.new_tokens,
            queued_tokens: standing::queued_tokens(rank),
            waiting: rank.load.waiting,
            decodes: standing::decodes(rank),
            context_tokens: rank.load.context_tokens,
            reserved: rank.reserved,
            leaning: rank.leaning,
            prefill_share: rank.prefill_share,
            kv_use: Pool::of(rank).use_with(0),
            load_age_seconds: rank.load_age.as_secs_f64(),
            model_samples: rank.perf.samples(),
        }
    }
}

/// The cheapest pairs in order, and where the chosen one is among them. It and the cheapest of each kind take the last
/// places if they are dearer.
fn cheapest(mut pairs: Vec<Pair>, chosen: usize) -> (Vec<Pair>, usize) {
    let order = |a: &Pair, b: &Pair| {
        let by_place = (a.prefill, a.decode).cmp(&(b.prefill, b.decode));
        a.total_seconds.total_cmp(&b.total_seconds).then(by_place)
    };
    let chosen = pairs[chosen];
    let is_split = |pair: &&Pair| pair.prefill != pair.decode;
    let kept = [
        Some(chosen),
        pairs.iter().filter(|pair| !is_split(pair)).min_by(|a, b| order(a, b)).copied(),
        pairs.iter().filter(is_split).min_by(|a, b| order(a, b)).copied(),
    ];
    if pairs.len() > CANDIDATES_LISTED_MAX {
        pairs.select_nth_unstable_by(CANDIDATES_LISTED_MAX - 1, order);
        pairs.truncate(CANDIDATES_LISTED_MAX);
        pairs.sort_unstable_by(order);
        for pair in kept.into_iter().flatten() {
            if !pairs.contains(&pair) {
                let dearest = pairs.iter().rposition(|pair| !kept.contains(&Some(*pair)));
                pairs[dearest.expect("more are listed than are kept")] = pair;
            }
        }
    }
    pairs.sort_unstable_by(order);
    let position = pairs.iter().position(|&pair| pair == chosen).expect("it is kept");
    (pairs, position)
}

/// The record of an excluded rank; `None` for one that was not.
pub(crate) fn excluded(snapshot: &Snapshot, verdict: &Verdict) -> Option<Excluded> {
    let rank = &snapshot.ranks()[verdict.index];
    verdict.exclusion.map(|reason| Excluded { rank: rank.id, engine: rank.engine.clone(), reason })
}
