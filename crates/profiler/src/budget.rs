//! The token budget of a step, from how often a long prompt let another sequence go on.

/// Lengths of the prompt that shows it, longest first. No power of two divides them evenly, less a sequence that decodes, so
/// the last chunk is never so short that its step looks like any other.
const PROBES: [u32; 7] = [30_000, 12_100, 6_100, 3_000, 1_500, 750, 375];

/// The length of the prompt that shows the budget of an engine which takes prompts of `prompt_tokens_max`. `None`: too short
/// ones show nothing.
pub fn probe_tokens(prompt_tokens_max: u32) -> Option<u32> {
    PROBES.into_iter().find(|probe| *probe <= prompt_tokens_max)
}

/// Steps that may be miscounted, as a share: a delay is taken for a chunk, a quick chunk for none. One of several may always
/// be.
const MISCOUNTED: f64 = 0.15;
const SEVERAL: u32 = 4;

/// The budget of an engine that computed a prompt of `probe_tokens` in `steps` steps beside one sequence that decoded, given
/// what is `expected` of it: that, if it can be; else the least power of two that can, or that nearly can where there are
/// steps enough to miscount; else the least number that can.
pub fn step_tokens(probe_tokens: u32, steps: u32, expected: u32) -> u32 {
    if steps == 0 {
        return expected;
    }
    let off = |budget: u32| match budget {
        0 | 1 => u32::MAX,
        budget => probe_tokens.div_ceil(budget - 1).abs_diff(steps),
    };
    let known = || [expected].into_iter().chain((4..=20).map(|bits| 1_u32 << bits));
    let may_be_off = ((MISCOUNTED * f64::from(steps)) as u32).max(u32::from(steps >= SEVERAL));
    let nearest = known().min_by_key(|budget| off(*budget)).filter(|budget| off(*budget) <= may_be_off);
    nearest.unwrap_or(probe_tokens.div_ceil(steps) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_show_in_the_number_of_steps() {
        //        prompt  steps expected  budget
        for (probe, steps, expected, budget) in [
            (12_100, 2, 8_192, 8_192),
            (12_100, 1, 8_192, 16_384),
            (12_100, 6, 8_192, 2_048),
            (12_100, 24, 8_192, 512),
            (30_000, 4, 8_192, 8_192),
            (30_000, 5, 8_192, 8_192),
            (30_000, 8, 8_192, 4_096),
            (30_000, 9, 8_192, 4_096),
            (30_000, 2, 8_192, 16_384),
            (30_000, 11, 8_192, 2_729),
            (6_100, 1, 8_192, 8_192),
            (750, 3, 8_192, 256),
            (3_000, 11, 8_192, 256),
            (3_000, 14, 8_192, 256),
            (12_100, 0, 8_192, 8_192),
        ] {
            assert_eq!(step_tokens(probe, steps, expected), budget, "{probe} in {steps}");
        }
    }

    #[test]
    fn every_usual_budget_is_told_from_the_others() {
        for probe in PROBES {
            for bits in 8..=13 {
                let budget = 1_u32 << bits;
                let steps = probe.div_ceil(budget - 1);
                let found = step_tokens(probe, steps, 8_192);
                assert!(found == budget || steps == 1, "{probe}, {budget}: {found}");
                assert!(
                    steps == 1 || probe % (budget - 1) > (budget - 1) / 8,
                    "{probe}, {budget}: a short last step"
                );
            }
        }
    }

    #[test]
    fn short_contexts_show_nothing() {
        assert_eq!(
            (probe_tokens(131_072), probe_tokens(2_000), probe_tokens(300)),
            (Some(30_000), Some(1_500), None)
        );
    }
}
