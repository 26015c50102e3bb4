//! Messages to a prompt, by the model's own chat template.
//!
//! In: the messages, tools and options of one request. Out: the text to tokenise with [`Tokenizer::encode`]. Start at
//! [`ChatTemplate::render`]; what templates find beyond Jinja is in [`environment`], JSON for them in [`json`].
//!
//! Invariants: the same conversation gives the same text (no clock, no randomness); one rendering does at most
//! [`TEMPLATE_FUEL`] of work, whatever the messages. Of a template's own tricks one is not bounded: lists within lists, tens
//! of thousands deep or held twice at each of many levels, that it builds and compares.

mod bounds;
mod date;
mod environment;
mod json;
mod message;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc};

use minijinja::{Environment, ErrorKind, Value};
use serde_json::value::RawValue;

pub use date::UnixTime;
pub use message::{Content, Message, Part, Text};

use crate::Tokenizer;

/// Work that one rendering may do, in minijinja's fuel: one for an instruction, one for 64 bytes that it produces. So
/// it bounds time (about half a second) and memory (256 MB) of a hostile template; a conversation of a thousand
/// messages needs less than a tenth.
pub const TEMPLATE_FUEL: u64 = 4_000_000;

/// The format of the models that use `<|im_start|>` and `<|im_end|>`, and of the built-in byte tokenizer.
const CHATML: &str = "{%- for message in messages -%}\
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\
    {%- endfor -%}\
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// Size of a template. Those of today's models have 1 to 20 KB.
pub const TEMPLATE_BYTES_MAX: usize = 64 * 1024;

/// Stack to compile a template on: its compiler calls itself for each operator of a chain (`1+1+1+...`), with up to 640
/// bytes for each byte of the template. Only what is used becomes memory.
const COMPILER_STACK_BYTES: usize = 64 * 1024 * 1024;

/// Of a failing expression, what an error quotes.
const EXCERPT_CHARS_MAX: usize = 120;

/// Of a template's or its engine's words, what an error quotes.
const DETAIL_CHARS_MAX: usize = 500;

/// The one template of each environment.
const NAME: &str = "chat_template";

/// Names that a request's extra variables may not take.
const RESERVED: [&str; 7] =
    ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "strftime_now"];

/// Why there is no prompt. All but [`TemplateError::Syntax`] and [`TemplateError::NotCompiled`] concern one request.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template itself is no Jinja.
    #[error("the model's chat template has a syntax error in line {line}: {detail}")]
    Syntax {
        /// Line of the template, from 1.
        line: usize,
        /// What was expected.
        detail: String,
    },
    /// The template is too long, or there was no thread to compile it.
    #[error("the model's chat template cannot be compiled: {reason}")]
    NotCompiled {
        /// What to change.
        reason: String,
    },
    /// Templates need at least one message.
    #[error("messages is empty; give at least one message")]
    NoMessages,
    /// A part that is no text.
    #[error("messages[{message}].content[{part}] is of type {kind:?}; this model takes only text")]
    UnsupportedPart {
        /// Index of the message.
        message: usize,
        /// Index of the part.
        part: usize,
        /// The part's `type`.
        kind: String,
    },
    /// A value that templates cannot take.
    #[error("{field} cannot be given to the chat template")]
    Field {
        /// Which field of the request.
        field: String,
        /// What is wrong with it.
        #[source]
        cause: serde_json::Error,
    },
    /// An extra variable with the name of one that every template gets.
    #[error("the template variable {name:?} is set by the request itself; leave it out")]
    Reserved {
        /// Its name.
        name: String,
    },
    /// The template called `raise_exception`: it does not take such messages.
    #[error("the model's chat template refused the messages: {message}")]
    Refused {
        /// In the template's words.
        message: String,
    },
    /// [`TEMPLATE_FUEL`] was used up.
    #[error("the chat template did not finish within its limit of work; send fewer or shorter messages")]
    Exhausted,
    /// The template failed on these messages.
    #[error("the model's chat template failed in line {line} at `{at}`: {detail}")]
    Failed {
        /// Line of the template, from 1; 0 if unknown.
        line: usize,
        /// The expression, at most 120 characters of it.
        at: String,
        /// In the template engine's words.
        detail: String,
    },
}

/// One request's input to a template.
#[derive(Debug, Clone, Copy, Default)]
pub struct Conversation<'a> {
    /// In order.
    pub messages: &'a [Message<'a>],
    /// The request's `tools`: a JSON array.
    pub tools: Option<&'a RawValue>,
    /// Whether to open the assistant's turn after the last message. Almost always.
    pub add_generation_prompt: bool,
    /// The request's `chat_template_kwargs`: a JSON object of further variables (`{"enable_thinking": false}`).
    pub extra: Option<&'a RawValue>,
    /// What `strftime_now` shows to templates that print the date. Without it the function is undefined, for which
    /// such templates have a fallback. A prompt that holds the time of day cannot share a prefix with another.
    pub now: Option<UnixTime>,
}

/// A model's chat template, compiled. Clones share it.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Compiled>);

struct Compiled {
    environment: Environment<'static>,
    bos_token: Value,
    eos_token: Value,
}

impl ChatTemplate {
    /// Compiles the Jinja `source`; `tokenizer` gives `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`TemplateError::Syntax`] and [`TemplateError::NotCompiled`].
    pub fn new(source: &str, tokenizer: &Tokenizer) -> Result<Self, TemplateError> {
        let text = |token| match token {
            Some(token) => Value::from(String::from_utf8_lossy(tokenizer.token_bytes(token))),
            None => Value::from(""),
        };
        let environment = compile(source)?;
        Ok(Self(Arc::new(Compiled {
            environment,
            bos_token: text(tokenizer.bos()),
            eos_token: text(tokenizer.eos().first().copied()),
        })))
    }

    /// The template that came with the tokenizer's files; `None` if there was none.
    ///
    /// # Errors
    /// Those of [`Self::new`].
    pub fn of(tokenizer: &Tokenizer) -> Result<Option<Self>, TemplateError> {
        tokenizer.chat_template().map(|source| Self::new(source, tokenizer)).transpose()
    }

    /// ChatML: `<|im_start|>ROLE\nCONTENT<|im_end|>\n` for each message. What [`Tokenizer::bytes`] is used with.
    pub fn chatml() -> Self {
        Self::new(CHATML, &Tokenizer::bytes()).expect("the built-in template compiles")
    }

    /// The prompt for `conversation`.
    ///
    /// Content parts are joined by newlines, a missing content is the empty string, and the JSON text in a tool
    /// call's `arguments` becomes the object that templates expect: all as vLLM does it.
    ///
    /// # Errors
    /// Every variant but those of [`Self::new`].
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        if conversation.messages.is_empty() {
            return Err(TemplateError::NoMessages);
        }
        let template = self.0.environment.get_template(NAME).expect("it was added under this name");
        template.render(self.variables(conversation)?).map_err(|error| failure(&error, template.source()))
    }

    fn variables(&self, conversation: &Conversation<'_>) -> Result<Value, TemplateError> {
        let mut variables = match conversation.extra {
            Some(extra) => extra_variables(extra)?,
            None => Vec::new(),
        };
        let messages: Result<Vec<Value>, TemplateError> = conversation
            .messages
            .iter()
            .enumerate()
            .map(|(index, message)| message.to_value(index))
            .collect();
        let tools = match conversation.tools {
            Some(tools) => json::parse(tools)
                .map_err(|cause| TemplateError::Field { field: "tools".to_owned(), cause })?,
            None => Value::from(()),
        };
        let mut set = |name: &str, value: Value| variables.push((name.to_owned(), value));
        set("messages", Value::from(messages?));
        set("tools", tools);
        set("documents", Value::from(()));
        set("add_generation_prompt", Value::from(conversation.add_generation_prompt));
        set("bos_token", self.0.bos_token.clone());
        set("eos_token", self.0.eos_token.clone());
        if let Some(now) = conversation.now {
            set("strftime_now", environment::strftime_now(now));
        }
        Ok(Value::from_pairs(variables))
    }
}

fn compile(source: &str) -> Result<Environment<'static>, TemplateError> {
    if source.len() > TEMPLATE_BYTES_MAX {
        let reason = format!("it has {} bytes; at most {TEMPLATE_BYTES_MAX} are taken", source.len());
        return Err(TemplateError::NotCompiled { reason });
    }
    let compiled = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(COMPILER_STACK_BYTES);
        let compiling = thread.spawn_scoped(scope, || environment::compile(NAME, source, TEMPLATE_FUEL));
        let compiling =
            compiling.map_err(|error| TemplateError::NotCompiled { reason: error.to_string() })?;
        let reason = || TemplateError::NotCompiled { reason: "its compiler failed on it".to_owned() };
        compiling.join().map_err(|_| reason())
    })?;
    compiled
        .map_err(|error| TemplateError::Syntax { line: error.line().unwrap_or(0), detail: detail(&error) })
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").finish_non_exhaustive()
    }
}

fn extra_variables(extra: &RawValue) -> Result<Vec<(String, Value)>, TemplateError> {
    let variables = json::parse_object(extra)
        .map_err(|cause| TemplateError::Field { field: "chat_template_kwargs".to_owned(), cause })?;
    match variables.iter().find(|(name, _)| RESERVED.contains(&name.as_str())) {
        Some((name, _)) => Err(TemplateError::Reserved { name: name.clone() }),
        None => Ok(variables),
    }
}

fn failure(error: &minijinja::Error, source: &str) -> TemplateError {
    if let Some(message) = environment::raised(error) {
        return TemplateError::Refused { message: message.chars().take(DETAIL_CHARS_MAX).collect() };
    }
    match error.kind() {
        ErrorKind::OutOfFuel => TemplateError::Exhausted,
        _ => {
            let at = error.range().and_then(|range| source.get(range)).unwrap_or_default();
            TemplateError::Failed {
                line: error.line().unwrap_or(0),
                at: at.chars().take(EXCERPT_CHARS_MAX).collect(),
                detail: detail(error),
            }
        }
    }
}

fn detail(error: &minijinja::Error) -> String {
    match error.detail() {
        // It may quote a message.
        Some(detail) => {
            format!("{}: {}", error.kind(), detail.chars().take(DETAIL_CHARS_MAX).collect::<String>())
        }
        None => error.kind().to_string(),
    }
}
