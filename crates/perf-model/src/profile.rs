//! A profile: what one kind of engine takes for a step, a prefill and a hand-over of KV, as it was measured.
//!
//! In: the JSON form ([`Profile::parse`]) or a name ([`Profile::built_in`]). Out: seconds. Start at
//! [`Profile::step_seconds`]. The terms are in [`cost`], the JSON form and its checks in [`mod@file`].
//!
//! Invariants: every answer is finite and at least 0, whatever the arguments; it never falls when work is added; none
//! of these calls allocates.

use serde::{Deserialize, Serialize};

mod cost;
mod curve;
mod file;
mod shape;

pub(crate) use cost::{AS_MEASURED, Factors, TERMS};
pub use file::{
    BudgetFile, EntryProblem, GroupFile, HandoverFile, ProfileError, ProfileFile, RankFile, RequestFile,
    StepsFile,
};
pub use shape::{PrefillShape, QueueShape, StepShape};

use cost::StepCost;

/// Bytes of a profile's JSON form.
pub const PROFILE_BYTES_MAX: usize = 64 * 1024;
/// Points of one curve or list in a profile, which a look-up passes in the worst case.
pub const PROFILE_POINTS_MAX: usize = 64;

/// How an engine lays out KV in memory, which decides how large the pieces of a hand-over are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvLayout {
    /// Every layer's blocks apart: pieces of 64 KiB for an 8B model. What engines do unless told otherwise.
    PerLayerBlocks,
    /// A block's layers together: pieces of 2 MiB.
    CrossLayerBlocks,
}

/// What one kind of engine takes, as it was measured.
///
/// A step on a rank that steps alone takes
///
/// ```text
/// L(P + n) + attention x A + context x C + [P > 0] mixed_context x C
/// ```
///
/// for P prompt tokens with attention work A beside n sequences that decode over C tokens of context; and no less
/// than a given time for each token if it has prefill and the engine's token budget is a narrow one. A step of an
/// expert-parallel group takes
///
/// ```text
/// (P = 0: base(N) | P > 0: the larger of base(N) and prefill_step + prefill_token x P) + decode x n + context x C
/// ```
///
/// for N sequences in the whole group and P, n and C of the rank with most of each.
///
/// Beyond the last measured point: L and base go on along their last slope, attention stays quadratic in the length
/// of the prompt (A is), everything else linear. Below their first point L and base are constant.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    name: String,
    measured: String,
    request: Request,
    steps: StepCost,
    handover: Box<[Handover]>,
}

/// Seconds of a request that no step accounts for.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Request {
    fixed: f64,
    /// Of a prompt token, cached or not.
    token: f64,
}

/// Seconds of a hand-over of KV.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Handover {
    layout: KvLayout,
    fixed: f64,
    token: f64,
    start_fixed: f64,
    start_token: f64,
}

impl Profile {
    /// The names that [`Profile::built_in`] knows.
    pub const BUILT_IN: [&str; 2] = ["h100-llama8b", "h100x2-qwen3-30b-a3b"];

    /// A profile that comes with this crate, by name: an 8B model on one H100, and a mixture of experts on two ranks of
    /// one expert-parallel group. Their numbers, and how far they are from each measured point: `profiles/README.md`.
    pub fn built_in(name: &str) -> Option<Self> {
        let text = match name {
            "h100-llama8b" => include_str!("../profiles/h100-llama8b.json"),
            "h100x2-qwen3-30b-a3b" => include_str!("../profiles/h100x2-qwen3-30b-a3b.json"),
            _ => return None,
        };
        Some(Self::parse(text).expect("built-in profiles are valid: a test reads them all"))
    }

    /// Reads the JSON form, version 1; `profiles/README.md` describes it.
    ///
    /// # Errors
    /// [`ProfileError`] says which entry is wrong and what to do: too long a text, another version, an entry that is
    /// missing, unknown, negative, not a number, out of order or one too many.
    pub fn parse(text: &str) -> Result<Self, ProfileError> {
        file::parse(text)
    }

    /// The profile that a form says, such as one that was just measured.
    ///
    /// # Errors
    /// As [`Profile::parse`], for what can be read and cannot be.
    pub fn from_file(file: ProfileFile) -> Result<Self, ProfileError> {
        file::checked(file)
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is of an expert-parallel group, whose ranks step together.
    pub fn is_of_group(&self) -> bool {
        matches!(self.steps, StepCost::Group(_))
    }

    /// What was measured: engine, model, machine.
    pub fn measured(&self) -> &str {
        &self.measured
    }

    /// Seconds of one step. 0 for a step that holds nothing.
    ///
    /// A group's profile takes the shape of the whole group ([`StepShape::of_group`]), or that of one rank as if the
    /// rest of its group were idle.
    pub fn step_seconds(&self, shape: &StepShape) -> f64 {
        self.steps.step_seconds(&AS_MEASURED, shape)
    }

    /// Seconds of a step that only decodes `decodes` sequences with `context_tokens` tokens of context together.
    pub fn decode_step_seconds(&self, decodes: u32, context_tokens: u64) -> f64 {
        self.step_seconds(&StepShape { decodes, context_tokens, ..StepShape::default() })
    }

    /// Seconds to compute `new_tokens` of a prompt whose first `cached_tokens` are cached, alone on the rank, in
    /// steps of at most `budget_tokens` (0: in one step). 0 if nothing is new. The request's own time is not in it
    /// ([`Profile::request_seconds`]).
    pub fn prefill_seconds(&self, new_tokens: u32, cached_tokens: u32, budget_tokens: u32) -> f64 {
        self.mixed_prefill_seconds(&PrefillShape {
            new_tokens,
            cached_tokens,
            budget_tokens,
            ..PrefillShape::default()
        })
    }

    /// Seconds to compute a prompt in chunks beside sequences that decode in every step: how long it runs, decodes
    /// included. In a group, `decodes` and `context_tokens` are the fullest rank's.
    pub fn mixed_prefill_seconds(&self, shape: &PrefillShape) -> f64 {
        self.steps.prefill_seconds(&AS_MEASURED, shape)
    }

    /// Seconds until prompts that wait are computed, one after another in steps as full as may be, beside sequences that
    /// decode in every step: how long it runs, decodes included. 0 if none wait. In a group they wait on the rank with
    /// most, and no other rank's prompts make its steps longer.
    pub fn queue_seconds(&self, shape: &QueueShape) -> f64 {
        self.steps.queue_seconds(&AS_MEASURED, shape)
    }

    /// Seconds of a request outside of all steps, from the client's sending it to the client's reading of its first
    /// token: HTTP, tokenising, scheduling. What a rank's own step times never show; TTFT has it.
    pub fn request_seconds(&self, prompt_tokens: u32) -> f64 {
        self.request.fixed + self.request.token * f64::from(prompt_tokens)
    }

    /// Seconds from a decode leg's arrival until the KV of `tokens` is there and its first step begins, both engines
    /// idle and on one host's NVLink; reading the leg's prompt is in it. On a busy engine the boundaries of its steps
    /// come on top. `None` if the layout was not measured.
    pub fn handover_seconds(&self, layout: KvLayout, tokens: u32) -> Option<f64> {
        self.handover(layout).map(|handover| handover.fixed + handover.token * f64::from(tokens))
    }

    /// Seconds by which starting that hand-over lengthens the decode engine's step of the moment. `None` if the
    /// layout was not measured.
    pub fn handover_start_seconds(&self, layout: KvLayout, tokens: u32) -> Option<f64> {
        self.handover(layout).map(|handover| handover.start_fixed + handover.start_token * f64::from(tokens))
    }

    pub(crate) fn steps(&self) -> &StepCost {
        &self.steps
    }

    fn handover(&self, layout: KvLayout) -> Option<&Handover> {
        self.handover.iter().find(|handover| handover.layout == layout)
    }
}

#[cfg(test)]
mod tests;
