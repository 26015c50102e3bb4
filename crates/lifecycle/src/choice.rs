//! One of a request's answers: its tokens, and who may add to them.

use forebay_types::{FinishReason, LegId, TokenId};

#[derive(Debug, Default)]
pub(crate) struct Choice {
    pub(crate) tokens: Vec<TokenId>,
    /// The leg whose tokens are accepted. None while the choice is between legs, and once it is finished.
    pub(crate) owner: Option<LegId>,
    pub(crate) finished: bool,
    pub(crate) migrations: u32,
}

impl Choice {
    /// Why the choice has ended, if its tokens say so: an engine may die after the last token and before it could say it.
    pub(crate) fn ended_by_its_tokens(
        &self,
        stop_tokens: &[TokenId],
        output_tokens_max: u32,
    ) -> Option<FinishReason> {
        match self.tokens.last() {
            Some(last) if stop_tokens.contains(last) => Some(FinishReason::Stop),
            _ if self.tokens.len() >= output_tokens_max as usize => Some(FinishReason::Length),
            _ => None,
        }
    }
}
