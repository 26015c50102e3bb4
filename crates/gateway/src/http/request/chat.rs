//! The body of `/v1/chat/completions`.
//!
//! Tools are shown to the model through its template; an answer's tool calls are not parsed yet and arrive as text. So
//! `tool_choice` may be `auto` or `none`; anything that would have to be enforced is refused.

use forebay_text::{ChatTemplate, Conversation, Message, TemplateError};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Spec,
    common::{Own, Shared, check, declare_body, with_shared_fields},
};
use crate::http::{errors::ApiError, limits::RequestLimits};

/// `tool_choice`: a word, or an object that names a function.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum ToolChoice {
    Word(String),
    Function(serde::de::IgnoredAny),
}

with_shared_fields!(declare_body {
    /// As the client sent it.
    struct ChatBody {
        #[serde(borrow)]
        messages: Option<Vec<Message<'a>>>,
        max_completion_tokens: Option<i64>,
        logprobs: Option<bool>,
        top_logprobs: Option<i64>,
        #[serde(borrow)]
        tools: Option<&'a RawValue>,
        tool_choice: Option<ToolChoice>,
        #[serde(borrow)]
        chat_template_kwargs: Option<&'a RawValue>,
    }
});

/// Checked.
#[derive(Debug)]
pub(crate) struct Chat<'a> {
    pub(crate) spec: Spec,
    messages: Vec<Message<'a>>,
    tools: Option<&'a RawValue>,
    template_variables: Option<&'a RawValue>,
}

impl<'a> ChatBody<'a> {
    /// Checks every value but the messages, which the template judges.
    ///
    /// # Errors
    /// 400 naming the field.
    pub(crate) fn check(self, shared: Shared, limits: &RequestLimits) -> Result<Chat<'a>, ApiError> {
        let logprobs = match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, top) => Some((top.unwrap_or(0), "top_logprobs")),
            (false, None | Some(0)) => None,
            (false, Some(_)) => {
                let message = "top_logprobs needs `logprobs: true`";
                return Err(ApiError::invalid_value("top_logprobs", message));
            }
        };
        let own = Own { logprobs, max_completion_tokens: self.max_completion_tokens };
        let spec = check(shared, own, limits)?;
        let tools = match self.tool_choice {
            Some(ToolChoice::Word(word)) if word == "none" => None,
            Some(ToolChoice::Word(word)) if word == "auto" => self.tools,
            None => self.tools,
            Some(ToolChoice::Word(_) | ToolChoice::Function(_)) => {
                let message = "tool_choice must be `auto` or `none`; a call cannot be enforced here";
                return Err(ApiError::unsupported("tool_choice", message));
            }
        };
        if tools.is_some_and(|tools| !tools.get().starts_with('[')) {
            return Err(ApiError::invalid("invalid_type", "tools must be a list").at("tools"));
        }
        let Some(messages) = self.messages else {
            return Err(ApiError::invalid("missing_required_parameter", "messages is missing").at("messages"));
        };
        Ok(Chat { spec, messages, tools, template_variables: self.chat_template_kwargs })
    }
}

impl Chat<'_> {
    /// The prompt's text.
    ///
    /// # Errors
    /// 400 with the template's own words, naming the field where one is at fault.
    pub(crate) fn render(&self, template: &ChatTemplate) -> Result<String, ApiError> {
        let conversation = Conversation {
            messages: &self.messages,
            tools: self.tools,
            add_generation_prompt: true,
            extra: self.template_variables,
            // A prompt with the time of day in it would share no prefix with the next one.
            now: None,
        };
        template.render(&conversation).map_err(|error| explain(&error))
    }
}

fn explain(error: &TemplateError) -> ApiError {
    let message = error.to_string();
    match error {
        TemplateError::NoMessages => ApiError::invalid_value("messages", message),
        TemplateError::UnsupportedPart { message: index, part, .. } => {
            ApiError::invalid("unsupported_parameter", message)
                .at(format!("messages[{index}].content[{part}].type"))
        }
        TemplateError::Field { field, cause } => {
            ApiError::invalid_value(field.clone(), format!("{message}: {cause}"))
        }
        TemplateError::Reserved { .. } => ApiError::invalid_value("chat_template_kwargs", message),
        TemplateError::Syntax { .. }
        | TemplateError::NotCompiled { .. }
        | TemplateError::Refused { .. }
        | TemplateError::Exhausted
        | TemplateError::Failed { .. } => ApiError::invalid("template_error", message).at("messages"),
    }
}
