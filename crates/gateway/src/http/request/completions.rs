//! The body of `/v1/completions`.

use super::{
    Spec,
    common::{Own, Shared, check, declare_body, with_shared_fields},
    fields::{Prompt, Prompts},
};
use crate::http::{errors::ApiError, limits::RequestLimits};

with_shared_fields!(declare_body {
    /// As the client sent it.
    struct CompletionsBody {
        #[serde(borrow)]
        prompt: Option<Prompts<'a>>,
        logprobs: Option<i64>,
        echo: Option<bool>,
        best_of: Option<i64>,
        suffix: Option<String>,
    }
});

/// Checked.
#[derive(Debug)]
pub(crate) struct Completions<'a> {
    pub(crate) spec: Spec,
    /// At least one.
    pub(crate) prompts: Vec<Prompt<'a>>,
    listed: bool,
}

impl<'a> CompletionsBody<'a> {
    /// Checks every value.
    ///
    /// # Errors
    /// 400 naming the field.
    pub(crate) fn check(self, shared: Shared, limits: &RequestLimits) -> Result<Completions<'a>, ApiError> {
        let n = shared.n.unwrap_or(1);
        if self.echo == Some(true) {
            return Err(ApiError::unsupported("echo", "echo is not supported; leave it out"));
        }
        if self.best_of.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::unsupported(
                "best_of",
                "best_of other than n is not supported; leave it out",
            ));
        }
        if self.suffix.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::unsupported("suffix", "suffix is not supported; leave it out"));
        }
        let own =
            Own { logprobs: self.logprobs.map(|count| (count, "logprobs")), max_completion_tokens: None };
        let spec = check(shared, own, limits)?;
        let Some(Prompts { prompts, listed }) = self.prompt else {
            return Err(ApiError::invalid("missing_required_parameter", "prompt is missing").at("prompt"));
        };
        let (count, most) = (prompts.len(), limits.prompts_max);
        if count == 0 || count > most {
            let message = format!("prompt has {count} prompts; it must have 1 to {most}");
            return Err(ApiError::invalid_value("prompt", message));
        }
        let sequences = count * spec.choices as usize;
        if sequences > limits.sequences_max {
            let message = format!(
                "{count} prompts with n = {} make {sequences} answers; at most {} are allowed in one request",
                spec.choices, limits.sequences_max
            );
            return Err(ApiError::invalid_value("n", message));
        }
        Ok(Completions { spec, prompts, listed })
    }
}

impl Completions<'_> {
    /// How errors name the prompt at `index`.
    pub(crate) fn prompt_path(&self, index: usize) -> String {
        if self.listed { format!("prompt[{index}]") } else { "prompt".to_owned() }
    }
}
