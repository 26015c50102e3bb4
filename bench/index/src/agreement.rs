//! Whether the indexes are right: their answers against a set of (rank, hash).

use std::collections::HashSet;

use crate::{
    contender::Contender,
    workload::{Change, Event, Query, Workload},
};

/// Queries with the answers that are right once all stores were applied, and once all removals were as well.
pub struct Sample {
    queries: Vec<Query>,
    filled: Vec<Vec<(u32, u32)>>,
    emptied: Vec<Vec<(u32, u32)>>,
}

#[derive(Clone, Copy)]
pub enum State {
    Filled,
    Emptied,
}

type Held = HashSet<(u32, u64)>;

fn replay(held: &mut Held, workload: &Workload, events: &[Event]) {
    for event in events {
        let chain = &workload.sequences[event.sequence as usize].chained;
        for &hash in &chain[event.from as usize..event.to as usize] {
            match event.change {
                Change::Store => held.insert((event.rank, hash)),
                Change::Remove => held.remove(&(event.rank, hash)),
            };
        }
    }
}

fn answer(held: &Held, workload: &Workload, query: &Query) -> Vec<(u32, u32)> {
    let chain = workload.query_chained(query);
    let leading = |rank: u32| chain.iter().take_while(|&&hash| held.contains(&(rank, hash))).count() as u32;
    (0..workload.shape.ranks as u32)
        .map(|rank| (rank, leading(rank)))
        .filter(|&(_, blocks)| blocks > 0)
        .collect()
}

impl Sample {
    /// Queries that know all of a sequence, what its group shares, nothing, or any number of blocks.
    pub fn new(workload: &Workload) -> Self {
        let (depth, shared) = (workload.shape.depth, workload.shape.shared);
        let seed = workload.shape.seed ^ 0xa5a5;
        let kinds = [depth, shared, 0, 1, shared / 2 + 1, (shared + depth) / 2, depth - 1];
        let queries: Vec<Query> = kinds
            .iter()
            .enumerate()
            .flat_map(|(kind, &known)| workload.queries(64, known, seed + kind as u64))
            .collect();
        let mut held = Held::new();
        let answers =
            |held: &Held| queries.iter().map(|query| answer(held, workload, query)).collect::<Vec<_>>();
        replay(&mut held, workload, &workload.stores);
        let filled = answers(&held);
        replay(&mut held, workload, &workload.removes);
        let emptied = answers(&held);
        Self { queries, filled, emptied }
    }

    /// Compares one contender. The error names the first wrong answer.
    pub fn check(
        &self,
        name: &str,
        contender: &mut dyn Contender,
        workload: &Workload,
        state: State,
    ) -> Result<(), String> {
        let (right, when) = match state {
            State::Filled => (&self.filled, "filled"),
            State::Emptied => (&self.emptied, "emptied"),
        };
        for (number, (query, expected)) in self.queries.iter().zip(right).enumerate() {
            if let Some(answer) = contender.overlaps(workload, query)
                && answer != *expected
            {
                let ranks = workload.shape.ranks;
                return Err(format!(
                    "WRONG ANSWER: {name}, {ranks} ranks, {when}, query {number}: {answer:?}, not {expected:?}"
                ));
            }
        }
        contender.check().map_err(|problem| format!("{name}: {problem}"))
    }
}
