//! Look-ups: a prompt's beginning in, what each rank holds of it out.

use std::cell::RefCell;

use forebay_kv_index::{Overlaps, TierBlocks};
use forebay_types::{BlockHash, EngineName, RankId, TokenId};

use super::{
    Service,
    refused::{Kind, Refused, clipped},
    spec,
};

/// A prompt's beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prefix {
    /// Its tokens.
    Tokens {
        /// Whose; only ranks of this model are answered.
        model: String,
        /// From the first on.
        tokens: Vec<TokenId>,
        /// The tenant's cache salt; empty for none.
        salt: String,
        /// The adapter's name.
        lora: Option<String>,
    },
    /// Its blocks, by our hashes.
    Hashes {
        /// Only ranks of this model are answered, if it is given.
        model: Option<String>,
        /// From the first on.
        hashes: Vec<BlockHash>,
    },
}

/// What one rank holds of a prompt's beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap {
    /// Whose.
    pub engine: EngineName,
    /// Which rank of it.
    pub dp_rank: u16,
    /// Leading blocks by tier.
    pub tiers: TierBlocks,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Ranks that hold something, best first.
    pub ranks: Vec<Overlap>,
    /// The prompt's whole blocks.
    pub chain: Vec<BlockHash>,
}

thread_local! {
    /// What look-ups of this thread use again and again.
    static OVERLAPS: RefCell<Overlaps> = RefCell::default();
}

impl Service {
    /// Which ranks hold how much of a prompt's beginning: most on the device first, then most anywhere, then by name. At
    /// most `ranks_max` of them. Waits for no event.
    ///
    /// # Errors
    /// Too long a prompt, or a model that no engine has.
    pub fn query(&self, prefix: Prefix, ranks_max: usize) -> Result<Answer, Refused> {
        let (model, chain) = self.chain(prefix)?;
        let ranks = OVERLAPS.with_borrow_mut(|overlaps| {
            self.index.overlaps(&chain, overlaps);
            self.named(overlaps, model.as_deref())
        });
        let mut ranks = ranks;
        let order = |a: &Overlap, b: &Overlap| {
            let most = |of: &Overlap| (of.tiers.device, of.tiers.remote);
            most(b).cmp(&most(a)).then_with(|| (&a.engine, a.dp_rank).cmp(&(&b.engine, b.dp_rank)))
        };
        ranks.sort_unstable_by(order);
        ranks.truncate(ranks_max);
        Ok(Answer { ranks, chain })
    }

    fn chain(&self, prefix: Prefix) -> Result<(Option<String>, Vec<BlockHash>), Refused> {
        let limits = &self.settings.limits;
        match prefix {
            Prefix::Tokens { model, tokens, salt, lora } => {
                spec::name("model", &model)?;
                if let Some(lora) = &lora {
                    spec::name("lora", lora)?;
                }
                let max = limits.query_tokens_max;
                if tokens.len() > max {
                    return Err(Refused::too_many("tokens", "tokens", tokens.len(), max));
                }
                self.known(&model)?;
                // As engines' events are hashed: the adapter's name stands in the model's place.
                let root = self.hasher.root(lora.as_deref().unwrap_or(&model), &salt);
                let mut chain = Vec::new();
                self.chains.chain_into(root, &tokens, &mut chain);
                Ok((Some(model), chain))
            }
            Prefix::Hashes { model, hashes } => {
                let max = limits.query_hashes_max;
                if hashes.len() > max {
                    return Err(Refused::too_many("hashes", "hashes", hashes.len(), max));
                }
                if let Some(model) = &model {
                    self.known(model)?;
                }
                Ok((model, hashes))
            }
        }
    }

    /// A typing error in a model's name would look like an empty cache.
    fn known(&self, model: &str) -> Result<(), Refused> {
        let engines = self.engines.read();
        if engines.models.contains_key(model) {
            return Ok(());
        }
        let known: Vec<_> = engines.models.keys().map(|model| format!("`{model}`")).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        let message =
            format!("no engine of the model `{}` is registered; known models: {known}", clipped(model));
        Err(Refused::new(Kind::NotFound, "model_not_found", message).at("model"))
    }

    fn named(&self, overlaps: &Overlaps, model: Option<&str>) -> Vec<Overlap> {
        let engines = self.engines.read();
        let named = |(rank, tiers): (RankId, TierBlocks)| {
            let engine = engines.by_life.get(&rank.incarnation)?;
            let fits = model.is_none_or(|model| engine.spec.spec.model == model);
            fits.then(|| Overlap { engine: engine.name.clone(), dp_rank: rank.dp_rank, tiers })
        };
        let mut elsewhere: Vec<_> = overlaps.iter_tiers().collect();
        elsewhere.sort_unstable_by_key(|(rank, _)| *rank);
        let has_more = |rank: RankId| elsewhere.binary_search_by_key(&rank, |(rank, _)| *rank).is_ok();
        let device_only = overlaps
            .iter()
            .filter(|(rank, _)| !has_more(*rank))
            .map(|(rank, blocks)| (rank, TierBlocks::from([blocks; 4])));
        let some_of = |tiers: &TierBlocks| tiers.remote > 0;
        let elsewhere = elsewhere.iter().copied().filter(|(_, tiers)| some_of(tiers));
        device_only.chain(elsewhere).filter_map(named).collect()
    }
}
