//! The rank against a naive model: lists instead of tables, chains computed from the first token on each time.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// One engine block of a forest: its place is its hash.
#[derive(Debug, Clone)]
struct Node {
    /// A block before it.
    parent: Option<usize>,
    /// Whether it starts a salted prompt; of no meaning with a parent.
    salted: bool,
    tokens: Vec<TokenId>,
}

#[derive(Debug, Clone)]
enum Step {
    /// The nodes from one down to some descendant: which node, and how many of its ancestors.
    Store {
        node: prop::sample::Index,
        ancestors: usize,
        tier: Tier,
    },
    Remove {
        nodes: Vec<prop::sample::Index>,
        tier: Tier,
    },
    Clear,
}

/// Few tokens, so that siblings are often equal and complete the same block of ours.
fn forest(engine: usize) -> impl Strategy<Value = Vec<Node>> {
    let node =
        (any::<prop::sample::Index>(), 0..8_u32, any::<bool>(), prop::collection::vec(0..2_u32, engine));
    prop::collection::vec(node, 1..40).prop_map(|nodes| {
        let nodes = nodes.into_iter().enumerate();
        nodes
            .map(|(place, (parent, starts, salted, tokens))| Node {
                parent: (starts > 0 && place > 0).then(|| parent.index(place)),
                salted,
                tokens,
            })
            .collect()
    })
}

fn tier() -> impl Strategy<Value = Tier> {
    prop_oneof![4 => Just(Tier::Device), 1 => Just(Tier::Host), 1 => Just(Tier::Remote)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (any::<prop::sample::Index>(), 0..6_usize, tier())
            .prop_map(|(node, ancestors, tier)| Step::Store { node, ancestors, tier }),
        6 => (prop::collection::vec(any::<prop::sample::Index>(), 1..5), tier())
            .prop_map(|(nodes, tier)| Step::Remove { nodes, tier }),
        1 => Just(Step::Clear),
    ]
}

/// B, E and the rest.
fn scenario() -> impl Strategy<Value = (u32, u32, Vec<Node>, Vec<Step>)> {
    let sizes = [(16, 1), (16, 32), (16, 24), (16, 16), (4, 4), (4, 2), (4, 12), (3, 2), (2, 5), (4, 1)];
    prop::sample::select(sizes.to_vec()).prop_flat_map(|(own, engine)| {
        (Just(own), Just(engine), forest(engine as usize), prop::collection::vec(step(), 1..60))
    })
}

struct Model<'a> {
    own: u32,
    nodes: &'a [Node],
    /// One element a store that was not removed.
    stored: Vec<(usize, Tier)>,
}

impl Model<'_> {
    fn path(&self, node: usize) -> Vec<usize> {
        let mut path = vec![node];
        while let Some(parent) = self.nodes[path[0]].parent {
            path.insert(0, parent);
        }
        path
    }

    /// Our blocks that `node` completes.
    fn completes(&self, node: usize) -> Vec<BlockHash> {
        let path = self.path(node);
        let tokens: Vec<TokenId> = path.iter().flat_map(|&node| self.nodes[node].tokens.clone()).collect();
        let salt = if self.nodes[path[0]].salted { "s" } else { "" };
        let chain = hasher(self.own).chain(hasher(self.own).root("m", salt), &tokens);
        let before = (tokens.len() - self.nodes[node].tokens.len()) / self.own as usize;
        chain[before..].to_vec()
    }

    fn is_known(&self, node: usize) -> bool {
        self.stored.iter().any(|&(stored, _)| stored == node)
    }

    /// Says how many have no known prefix.
    fn store(&mut self, run: &[usize], tier: Tier) -> u64 {
        let mut has_place = self.nodes[run[0]].parent.is_none_or(|parent| self.is_known(parent));
        let mut unknown = 0;
        for &node in run {
            has_place |= self.is_known(node);
            if has_place {
                self.stored.push((node, tier));
            } else {
                unknown += 1;
            }
        }
        unknown
    }

    fn remove(&mut self, node: usize, tier: Tier) -> bool {
        let found = self.stored.iter().position(|&stored| stored == (node, tier));
        found.map(|at| self.stored.swap_remove(at)).is_some()
    }

    fn held(&self) -> BTreeSet<(Tier, BlockHash)> {
        let stored = self.stored.iter();
        stored
            .flat_map(|&(node, tier)| self.completes(node).into_iter().map(move |block| (tier, block)))
            .collect()
    }
}

/// Follows events as an index does, strictly.
fn follow(
    index: &mut BTreeSet<(Tier, BlockHash)>,
    parents: &BTreeMap<BlockHash, Option<BlockHash>>,
    events: &[KvEvent],
) {
    for event in events {
        match event {
            KvEvent::Stored { parent, hashes, tier, group: _ } => {
                let mut before = *parent;
                for &hash in hashes {
                    assert!(index.insert((*tier, hash)), "stored though held");
                    assert_eq!(parents[&hash], before, "a chain links what follows each other");
                    before = Some(hash);
                }
            }
            KvEvent::Removed { hashes, tier, group: _ } => {
                assert!(hashes.iter().all(|&hash| index.remove(&(*tier, hash))), "removed though not held");
            }
            KvEvent::Cleared => index.clear(),
            KvEvent::Groups(_) => panic!("one group goes without saying"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn a_rank_holds_what_the_model_holds((own, engine, nodes, steps) in scenario()) {
        let mut model = Model { own, nodes: &nodes, stored: vec![] };
        let mut parents = BTreeMap::new();
        for node in 0..nodes.len() {
            let path: Vec<BlockHash> = model.path(node).into_iter().flat_map(|node| model.completes(node)).collect();
            for (place, &block) in path.iter().enumerate() {
                parents.insert(block, place.checked_sub(1).map(|before| path[before]));
            }
        }
        let mut cache = cache_of(own, Some(engine), 1000);
        let mut index = BTreeSet::new();
        let mut left_out = 0;
        for step in steps {
            match step {
                Step::Store { node, ancestors, tier } => {
                    let path = model.path(node.index(nodes.len()));
                    let run = &path[path.len().saturating_sub(1 + ancestors)..];
                    let first = &nodes[run[0]];
                    let event = Stored {
                        hashes: run.iter().map(|&node| EngineHash(node as u64)).collect(),
                        parent: first.parent.map(|parent| EngineHash(parent as u64)),
                        tokens: run.iter().flat_map(|&node| nodes[node].tokens.clone()).collect(),
                        salt: (first.parent.is_none() && first.salted).then(|| "s".into()),
                        tier,
                        ..stored_as(engine, None, &[])
                    };
                    let unknown = model.store(run, tier);
                    let applied = cache.says(event);
                    let reported = match applied.faults[..] {
                        [] => 0,
                        [Fault::UnknownParent { blocks, explained, .. }] => {
                            prop_assert_eq!(explained, left_out > 0);
                            blocks
                        }
                        ref other => panic!("{other:?}"),
                    };
                    prop_assert_eq!(reported, unknown);
                    left_out += unknown;
                    follow(&mut index, &parents, &applied.events);
                }
                Step::Remove { nodes: which, tier } => {
                    let hashes: Vec<usize> = which.iter().map(|node| node.index(nodes.len())).collect();
                    let mut unknown = 0;
                    for &node in &hashes {
                        if !model.remove(node, tier) {
                            if left_out > 0 { left_out -= 1 } else { unknown += 1 }
                        }
                    }
                    let hashes: Vec<u64> = hashes.into_iter().map(|node| node as u64).collect();
                    let applied = cache.says(Removed { tier, ..removed(&hashes) });
                    let reported = match applied.faults[..] {
                        [] => 0,
                        [Fault::UnknownRemoval { blocks, .. }] => blocks,
                        ref other => panic!("{other:?}"),
                    };
                    prop_assert_eq!(reported, unknown);
                    follow(&mut index, &parents, &applied.events);
                }
                Step::Clear => {
                    left_out = model.stored.iter().filter(|(_, tier)| *tier != Tier::Device).count() as u64;
                    model.stored.clear();
                    let applied = cache.says(EngineEvent::Cleared);
                    prop_assert_eq!(&applied, &only([KvEvent::Cleared]));
                    follow(&mut index, &parents, &applied.events);
                }
            }
            prop_assert_eq!(&index, &model.held());
            let mut snapshot = BTreeSet::new();
            follow(&mut snapshot, &parents, &cache.snapshot());
            prop_assert_eq!(&snapshot, &index);
            let stats = cache.stats();
            let all = stats.blocks_device + stats.blocks_host + stats.blocks_disk + stats.blocks_remote;
            prop_assert_eq!((all, stats.left_out), (index.len() as u64, left_out));
            let known: BTreeSet<usize> = model.stored.iter().map(|&(node, _)| node).collect();
            prop_assert_eq!(stats.engine_blocks, known.len() as u64);
        }
        for (node, tier) in model.stored.drain(..).rev() {
            follow(&mut index, &parents, &cache.says(Removed { tier, ..removed(&[node as u64]) }).events);
        }
        prop_assert!(index.is_empty());
        prop_assert_eq!((cache.held.runs.len(), cache.held.has_more()), (0, false), "nothing stays behind");
    }
}
