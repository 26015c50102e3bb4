//! What arrived, in files, for `forebay simulate` to replay: times, lengths, how long it took, and ids of blocks by which prompts
//! that begin alike are known. Never text, and no tenant's name: ids are hashed with a salt that is drawn at the start and kept nowhere.
//!
//! A line is written when its request ends, for only then its answer's length is known; lines are in the order in which requests
//! came. One that runs for very long is left out rather than holding up all that came after it.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    io,
    sync::Arc,
};

use forebay_types::{BlockHash, TenantId};
use parking_lot::Mutex;
use serde::Serialize;

use crate::lines::{LineSink, SinkPlan};

/// Requests that may have ended while an earlier one runs.
const BEHIND_MAX: usize = 16_384;

/// Bits of an id: what every reader of JSON keeps exactly.
const ID_BITS: u32 = 52;

/// One request, in the form `forebay` of traces.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Arrival {
    at: f64,
    prompt_tokens: u32,
    output_tokens: u32,
    block_tokens: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    blocks: Vec<u64>,
    tenant: String,
    /// Seconds to its first token, and to its end; tokens that an engine had cached.
    #[serde(skip_serializing_if = "Option::is_none")]
    ttft: Option<f64>,
    e2e: f64,
    cached_tokens: u32,
}

/// What is known of a request that ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ended<'a> {
    pub(crate) tenant: &'a TenantId,
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens: u32,
    /// Of the prompt's full blocks of tokens; empty where they are not known.
    pub(crate) blocks: &'a [BlockHash],
    /// Since it came: its first token, and its end.
    pub(crate) ttft_seconds: Option<f64>,
    pub(crate) e2e_seconds: f64,
    pub(crate) cached_tokens: u32,
}

/// Writes what arrived.
#[derive(Debug)]
pub struct ArrivalRecorder {
    sink: LineSink<Arrival>,
    salt: RandomState,
    block_tokens: u32,
    order: Mutex<Order>,
}

#[derive(Debug, Default)]
struct Order {
    arrivals: u64,
    /// When the last one came, milliseconds since the Unix epoch. Clocks may be set back; a trace's do not.
    last_unix_ms: u64,
    /// Requests that came, from the first that runs on: when, and of those that ended their line.
    waiting: BTreeMap<u64, (u64, Option<Arc<Arrival>>)>,
    left_out: u64,
}

impl ArrivalRecorder {
    /// Opens the file, or goes on with one that is there. `block_tokens`: of the blocks that requests are hashed by.
    ///
    /// # Errors
    /// It cannot be opened for writing.
    pub fn open(plan: SinkPlan, block_tokens: u32) -> io::Result<Self> {
        Ok(Self {
            sink: LineSink::open(plan, "record")?,
            salt: RandomState::new(),
            block_tokens: block_tokens.max(1),
            order: Mutex::default(),
        })
    }

    /// A request came, so many milliseconds after the Unix epoch: its number.
    pub(crate) fn arrived(&self, unix_ms: u64) -> u64 {
        let mut order = self.order.lock();
        let number = order.arrivals;
        order.arrivals += 1;
        let at = unix_ms.max(order.last_unix_ms);
        order.last_unix_ms = at;
        order.waiting.insert(number, (at, None));
        if order.waiting.len() > BEHIND_MAX {
            // The first one runs still: those that ended are written at once.
            order.waiting.pop_first();
            order.left_out += 1;
            self.write(&mut order);
        }
        number
    }

    /// A request ended. One of which nothing was computed, or whose prompt nobody counted, is left out.
    pub(crate) fn ended(&self, number: u64, ended: &Ended<'_>) {
        let counts = ended.prompt_tokens > 0 && ended.output_tokens > 0;
        let mut arrival = counts.then(|| self.arrival(number, ended));
        let mut order = self.order.lock();
        match (order.waiting.get_mut(&number), arrival.take()) {
            (Some((at, line)), Some(mut arrival)) => {
                arrival.at = *at as f64 / 1e3;
                *line = Some(Arc::new(arrival));
            }
            (Some(_), None) => drop(order.waiting.remove(&number)),
            (None, _) => return,
        }
        self.write(&mut order);
    }

    fn write(&self, order: &mut Order) {
        while let Some(first) = order.waiting.first_entry()
            && first.get().1.is_some()
            && let (_, Some(line)) = first.remove()
        {
            self.sink.put(line);
        }
    }

    /// Its line but for when it came.
    fn arrival(&self, number: u64, ended: &Ended<'_>) -> Arrival {
        let id = |of: (u8, u64)| self.salt.hash_one(of) >> (64 - ID_BITS);
        let whole = (ended.prompt_tokens / self.block_tokens) as usize;
        let mut blocks = Vec::new();
        if ended.blocks.len() == whole && whole > 0 {
            blocks.extend(ended.blocks.iter().map(|hash| id((0, hash.0))));
            // A block that is not full is nobody else's.
            let is_part = !ended.prompt_tokens.is_multiple_of(self.block_tokens);
            blocks.extend(is_part.then(|| id((1, number))));
        }
        let tenant = self.salt.hash_one(ended.tenant.0.as_bytes());
        Arrival {
            at: 0.0,
            prompt_tokens: ended.prompt_tokens,
            output_tokens: ended.output_tokens,
            block_tokens: self.block_tokens,
            blocks,
            tenant: format!("{tenant:016x}"),
            ttft: ended.ttft_seconds.map(to_microseconds),
            e2e: to_microseconds(ended.e2e_seconds),
            cached_tokens: ended.cached_tokens,
        }
    }

    /// Requests whose lines were not written, since the start.
    pub fn lost(&self) -> u64 {
        self.sink.lost() + self.order.lock().left_out
    }
}

/// Seconds, as precise as anybody needs them.
fn to_microseconds(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const MS: u64 = 1_700_000_000_125;

    fn ended<'a>(tenant: &'a TenantId, prompt_tokens: u32, blocks: &'a [BlockHash]) -> Ended<'a> {
        let (ttft_seconds, e2e_seconds) = (Some(0.25), 1.5);
        Ended {
            tenant,
            prompt_tokens,
            output_tokens: 7,
            blocks,
            ttft_seconds,
            e2e_seconds,
            cached_tokens: 16,
        }
    }

    fn recorded(act: impl FnOnce(&ArrivalRecorder)) -> Vec<Value> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("arrivals.jsonl");
        let recorder =
            ArrivalRecorder::open(SinkPlan { path: path.clone(), bytes_max: 1 << 20, files_max: 2 }, 16)
                .unwrap();
        act(&recorder);
        drop(recorder);
        let text = std::fs::read_to_string(path).unwrap();
        assert!(!text.contains("secret"), "{text}");
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    const CHAIN: &[BlockHash] = &[BlockHash(11), BlockHash(12)];

    #[test]
    fn lines_come_in_the_order_of_arrival_with_salted_ids() {
        let (alice, bob) = (TenantId::from("secret-alice"), TenantId::from("secret-bob"));
        let lines = recorded(|recorder| {
            // The clock was set back between two of them.
            let numbers = [MS, MS + 3000, MS + 1000, MS + 4000].map(|at| recorder.arrived(at));
            recorder.ended(numbers[3], &ended(&bob, 32, CHAIN));
            recorder.ended(numbers[1], &ended(&alice, 40, CHAIN));
            recorder.ended(numbers[0], &ended(&alice, 33, CHAIN));
            // One that failed before its first token is not a line.
            recorder.ended(numbers[2], &Ended { output_tokens: 0, ..ended(&alice, 50, CHAIN) });
            recorder.ended(99, &ended(&alice, 50, CHAIN));
        });
        let tokens: Vec<u64> = lines.iter().map(|line| line["prompt_tokens"].as_u64().unwrap()).collect();
        assert_eq!(tokens, [33, 40, 32]);
        let ids = |line: usize| lines[line]["blocks"].as_array().unwrap().clone();
        assert_eq!((ids(0).len(), ids(1).len(), ids(2).len()), (3, 3, 2));
        assert_eq!(ids(0)[..2], ids(1)[..2]);
        assert_eq!(ids(0)[..2], ids(2)[..]);
        assert_ne!(ids(0)[2], ids(1)[2], "what is not full is not shared");
        assert_ne!(ids(0)[0], 11);
        assert!(ids(0).iter().all(|id| id.as_u64().is_some_and(|id| id < 1 << 52)));
        let times = ["ttft", "e2e", "cached_tokens"].map(|name| lines[0][name].as_f64().unwrap());
        assert_eq!(times, [0.25, 1.5, 16.0]);
        assert_eq!(lines[0]["tenant"], lines[1]["tenant"]);
        assert_ne!(lines[0]["tenant"], lines[2]["tenant"]);
        let at: Vec<f64> = lines.iter().map(|line| line["at"].as_f64().unwrap()).collect();
        assert_eq!(at, [1_700_000_000.125, 1_700_000_003.125, 1_700_000_004.125]);
    }

    #[test]
    fn another_start_has_another_salt() {
        let tenant = TenantId::from("secret");
        let line = || {
            recorded(|recorder| {
                let number = recorder.arrived(MS);
                recorder.ended(number, &ended(&tenant, 32, CHAIN));
            })
        };
        assert_ne!(line()[0]["blocks"], line()[0]["blocks"]);
    }

    #[test]
    fn a_request_that_never_ends_holds_up_only_so_many() {
        let tenant = TenantId::from("secret");
        let lines = recorded(|recorder| {
            let first = recorder.arrived(MS);
            for _ in 0..BEHIND_MAX + 10 {
                let number = recorder.arrived(MS);
                recorder.ended(number, &ended(&tenant, 8, &[]));
                assert!(recorder.order.lock().waiting.len() <= BEHIND_MAX);
            }
            recorder.ended(first, &ended(&tenant, 8, &[]));
            assert!(recorder.lost() >= 1);
        });
        assert!(lines.len() > 10, "{}", lines.len());
        assert!(lines[0].get("blocks").is_none(), "a prompt without a whole block shares nothing");
    }
}
