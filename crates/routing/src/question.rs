//! What a router is asked.

use std::sync::Arc;

use forebay_kv_index::Overlaps;
use forebay_placement::Form;
use forebay_types::{BlockHash, RankId, TenantId};

/// What the numbers of a prompt are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PromptUnit {
    /// Token ids of the model.
    Tokens,
    /// Stretches of text of about a token's length, for routing alone.
    Text,
}

/// A request that seeks a place.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The model that is to answer.
    pub model: &'a Arc<str>,
    /// Whose it is.
    pub tenant: &'a TenantId,
    /// Length of the prompt.
    pub prompt_tokens: u32,
    /// What it counts.
    pub unit: PromptUnit,
    /// How it is given to an engine.
    pub form: Form,
    /// Tokens that the client allows each answer.
    pub output_tokens_max: u32,
    /// Answers.
    pub choices: u32,
    /// Ranks that failed it.
    pub excluded: &'a [RankId],
    /// The prompt's blocks.
    pub chain: &'a [BlockHash],
}

/// What is cached of one prompt.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// By what ranks say. Empty for prompts of text.
    pub announced: Overlaps,
    /// By what was routed to them.
    pub routed: Overlaps,
}
