//! How long answers will be.
//!
//! In: lengths of answers that ended. Out: [`OutputLengths::expected`], for a tenant and a model. Bounded: of too many
//! tenants those are forgotten whose answers ended longest ago.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use forebay_types::TenantId;

/// Tokens expected of a model's answers before any has ended.
const PRIOR_TOKENS: f64 = 64.0;

/// Weight of the newest answer in a running mean: a memory of some fifty.
const NEWEST_WEIGHT: f64 = 0.02;

/// Answers of a tenant that count as much as all that is known of the model: with fewer, a tenant is taken to be like the
/// others (the shrinkage of a James-Stein estimate, with a constant for the ratio of variances).
const TENANT_ANSWERS: f64 = 10.0;

/// Mean lengths of answers, by model, and by tenant of a model.
#[derive(Debug, Clone)]
pub struct OutputLengths {
    tenants_max: usize,
    models: HashMap<Arc<str>, OfModel>,
    /// Who was heard of when, the longest ago first: what to forget.
    order: BTreeMap<u64, (Arc<str>, TenantId)>,
    clock: u64,
}

#[derive(Debug, Clone, Default)]
struct OfModel {
    mean: Mean,
    tenants: HashMap<TenantId, (Mean, u64)>,
}

/// A mean that forgets.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    tokens: f64,
    answers: f64,
}

impl Mean {
    fn learn(&mut self, tokens: f64) {
        self.answers = (self.answers + 1.0).min(1.0 / NEWEST_WEIGHT);
        self.tokens += (tokens - self.tokens) / self.answers;
    }

    /// Shrunk towards `prior`, as if that had been seen `weight` times.
    fn shrunk(&self, prior: f64, weight: f64) -> f64 {
        (self.answers * self.tokens + weight * prior) / (self.answers + weight)
    }
}

impl OutputLengths {
    /// One that has seen no answer, for at most so many tenants of all models together; about 200 bytes each.
    pub fn new(tenants_max: usize) -> Self {
        Self { tenants_max: tenants_max.max(1), models: HashMap::new(), order: BTreeMap::new(), clock: 0 }
    }

    /// Tokens that are expected of an answer.
    pub fn expected(&self, model: &str, tenant: &TenantId) -> f64 {
        let Some(of) = self.models.get(model) else { return PRIOR_TOKENS };
        let of_model = of.mean.shrunk(PRIOR_TOKENS, 1.0);
        of.tenants.get(tenant).map_or(of_model, |(mean, _)| mean.shrunk(of_model, TENANT_ANSWERS))
    }

    /// An answer ended after so many tokens. One that its own limit cut off says only that it would have been longer: it
    /// counts where it is longer than expected anyway. What is not a length changes nothing.
    ///
    /// Models are the caller's to bound: only those that are served have answers.
    pub fn learn(&mut self, model: &Arc<str>, tenant: &TenantId, tokens: f64, cut_off: bool) {
        let is_length = tokens.is_finite() && tokens >= 0.0;
        if !is_length || (cut_off && tokens <= self.expected(model, tenant)) {
            return;
        }
        self.clock += 1;
        let of = self.models.entry(model.clone()).or_default();
        of.mean.learn(tokens);
        let (mean, heard) = of.tenants.entry(tenant.clone()).or_default();
        mean.learn(tokens);
        let before = std::mem::replace(heard, self.clock);
        let key = self.order.remove(&before).unwrap_or_else(|| (model.clone(), tenant.clone()));
        self.order.insert(self.clock, key);
        if self.order.len() > self.tenants_max
            && let Some((_, (model, tenant))) = self.order.pop_first()
            && let Some(of) = self.models.get_mut(&model)
        {
            of.tenants.remove(&tenant);
        }
    }

    /// Tenants that are remembered.
    pub fn tenants(&self) -> usize {
        self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn model() -> Arc<str> {
        "m".into()
    }

    fn tenant(number: u32) -> TenantId {
        TenantId::from(format!("tenant-{number}").as_str())
    }

    fn learned(lengths: &mut OutputLengths, number: u32, tokens: f64, times: u32) {
        for _ in 0..times {
            lengths.learn(&model(), &tenant(number), tokens, false);
        }
    }

    #[test]
    fn a_tenant_is_taken_for_the_others_until_it_is_known() {
        let mut lengths = OutputLengths::new(10);
        assert_eq!(lengths.expected("m", &tenant(1)), PRIOR_TOKENS);
        learned(&mut lengths, 1, 1000.0, 100);
        assert!(lengths.expected("m", &tenant(1)) > 950.0);
        assert!(lengths.expected("m", &tenant(2)) > 950.0, "nothing else is known");
        learned(&mut lengths, 2, 10.0, 1);
        assert!(lengths.expected("m", &tenant(2)) > 500.0, "one answer says little");
        learned(&mut lengths, 2, 10.0, 400);
        assert!(lengths.expected("m", &tenant(2)) < 50.0);
        assert!(lengths.expected("m", &tenant(1)) > 800.0, "and is another's no longer");
        assert_eq!(lengths.expected("other", &tenant(1)), PRIOR_TOKENS);
    }

    #[test]
    fn an_answer_that_was_cut_off_says_that_it_would_have_been_longer() {
        let mut lengths = OutputLengths::new(10);
        learned(&mut lengths, 1, 100.0, 200);
        let before = lengths.expected("m", &tenant(1));
        lengths.learn(&model(), &tenant(1), 20.0, true);
        assert_eq!(lengths.expected("m", &tenant(1)), before);
        lengths.learn(&model(), &tenant(1), 400.0, true);
        assert!(lengths.expected("m", &tenant(1)) > before);
    }

    #[test]
    fn tenants_heard_of_longest_ago_are_forgotten() {
        let mut lengths = OutputLengths::new(3);
        (0..3).for_each(|number| learned(&mut lengths, number, 500.0, 50));
        learned(&mut lengths, 0, 500.0, 1);
        learned(&mut lengths, 9, 5.0, 60);
        assert_eq!(lengths.tenants(), 3);
        let of = &lengths.models["m"].tenants;
        assert!(of.contains_key(&tenant(0)) && !of.contains_key(&tenant(1)));
    }

    proptest! {
        #[test]
        fn whatever_is_learned_it_is_bounded_and_a_length(
            answers in prop::collection::vec(
                (0u32..40, prop_oneof![Just(f64::NAN), Just(-1.0), Just(f64::INFINITY), 0.0..1e6f64], any::<bool>()),
                0..400,
            ),
        ) {
            let mut lengths = OutputLengths::new(8);
            for (number, tokens, cut_off) in answers {
                lengths.learn(&model(), &tenant(number), tokens, cut_off);
                let expected = lengths.expected("m", &tenant(number));
                prop_assert!((0.0..=1e6).contains(&expected));
                prop_assert!(lengths.tenants() <= 8);
                let kept: usize = lengths.models.values().map(|of| of.tenants.len()).sum();
                prop_assert_eq!(kept, lengths.tenants());
            }
        }
    }
}
