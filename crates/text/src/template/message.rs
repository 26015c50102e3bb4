//! One message of a conversation, borrowed from the request's JSON.

use std::{borrow::Cow, fmt};

use minijinja::Value;
use serde::{
    Deserialize, Deserializer,
    de::{self, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{TemplateError, json};

/// Text that borrows from the JSON it was read from unless it was escaped there. (Within an `Option`, serde's own
/// `Cow` always copies.)
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Text<'a>(#[serde(borrow)] pub Cow<'a, str>);

impl<'a> From<&'a str> for Text<'a> {
    fn from(text: &'a str) -> Self {
        Self(Cow::Borrowed(text))
    }
}

impl From<String> for Text<'_> {
    fn from(text: String) -> Self {
        Self(Cow::Owned(text))
    }
}

/// A message as OpenAI's chat API has it. Deserialise from a string or slice (`tool_calls` is kept as it was written,
/// which needs one). Unknown members are ignored.
#[derive(Debug, Clone, Deserialize)]
pub struct Message<'a> {
    /// `system`, `user`, `assistant`, `tool`, or what else the template knows.
    #[serde(borrow)]
    pub role: Text<'a>,
    /// What was said. May be missing beside tool calls.
    #[serde(borrow, default)]
    pub content: Option<Content<'a>>,
    /// Who said it, where several share a role.
    #[serde(borrow, default)]
    pub name: Option<Text<'a>>,
    /// Which tool call a tool's message answers.
    #[serde(borrow, default)]
    pub tool_call_id: Option<Text<'a>>,
    /// The assistant's thoughts before `content`, for templates that repeat them.
    #[serde(borrow, default)]
    pub reasoning_content: Option<Text<'a>>,
    /// The assistant's tool calls: a JSON array.
    #[serde(borrow, default)]
    pub tool_calls: Option<&'a RawValue>,
}

/// The content of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content<'a> {
    /// A string.
    Text(Cow<'a, str>),
    /// A list of parts.
    Parts(Vec<Part<'a>>),
}

/// One part of a message's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part<'a> {
    /// `{"type": "text", "text": …}`.
    Text(Cow<'a, str>),
    /// Any other type, by name. Rendering refuses it.
    Other(Cow<'a, str>),
}

impl<'a> Message<'a> {
    /// A message of text.
    pub fn new(role: &'a str, content: &'a str) -> Self {
        Self {
            role: role.into(),
            content: Some(Content::Text(Cow::Borrowed(content))),
            name: None,
            tool_call_id: None,
            reasoning_content: None,
            tool_calls: None,
        }
    }

    /// The message as templates see it; `index` is for errors.
    pub(super) fn to_value(&self, index: usize) -> Result<Value, TemplateError> {
        // Without `..`: a new member must be given to templates or left out knowingly.
        let Self { role, content, name, tool_call_id, reasoning_content, tool_calls } = self;
        let mut members =
            vec![("role", Value::from(&*role.0)), ("content", content_value(content.as_ref(), index)?)];
        let optional =
            [("name", name), ("tool_call_id", tool_call_id), ("reasoning_content", reasoning_content)];
        for (key, text) in optional {
            if let Some(Text(text)) = text {
                members.push((key, Value::from(&**text)));
            }
        }
        if let Some(calls) = tool_calls {
            let calls = tool_call_values(calls).map_err(|cause| TemplateError::Field {
                field: format!("messages[{index}].tool_calls"),
                cause,
            })?;
            members.push(("tool_calls", calls));
        }
        Ok(Value::from_pairs(members))
    }
}

fn content_value(content: Option<&Content<'_>>, message: usize) -> Result<Value, TemplateError> {
    let parts = match content {
        None => return Ok(Value::from("")),
        Some(Content::Text(text)) => return Ok(Value::from(&**text)),
        Some(Content::Parts(parts)) => parts,
    };
    let mut joined = String::new();
    for (part, content) in parts.iter().enumerate() {
        match content {
            Part::Text(text) => {
                if part > 0 {
                    joined.push('\n');
                }
                joined.push_str(text);
            }
            Part::Other(kind) => {
                let kind = kind.chars().take(64).collect();
                return Err(TemplateError::UnsupportedPart { message, part, kind });
            }
        }
    }
    Ok(Value::from(joined))
}

/// The calls with each function's `arguments`, a string of JSON in the API, as the value it spells.
fn tool_call_values(calls: &RawValue) -> Result<Value, serde_json::Error> {
    let mut values = Vec::new();
    for call in serde_json::from_str::<Vec<&RawValue>>(calls.get())? {
        let mut call = json::parse_object(call)?;
        for (key, value) in &mut call {
            if key == "function" {
                *value = function_value(value)?;
            }
        }
        values.push(Value::from_pairs(call));
    }
    Ok(Value::from(values))
}

fn function_value(function: &Value) -> Result<Value, serde_json::Error> {
    let keys = function.try_iter().map_err(de::Error::custom)?;
    let mut members = Vec::new();
    for key in keys {
        let value = function.get_item(&key).map_err(de::Error::custom)?;
        let value = match value.as_str() {
            Some(arguments) if key.as_str() == Some("arguments") => serde_json::from_str(arguments)?,
            _ => value,
        };
        members.push((key, value));
    }
    Ok(Value::from_pairs(members))
}

impl<'de: 'a, 'a> Deserialize<'de> for Content<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrParts;
        impl<'de> Visitor<'de> for TextOrParts {
            type Value = Content<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }
            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Content::Text(Cow::Borrowed(text)))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Content::Text(Cow::Owned(text.to_owned())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = list.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(TextOrParts)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Part<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw<'a> {
            #[serde(borrow, rename = "type")]
            kind: Cow<'a, str>,
            #[serde(borrow, default)]
            text: Option<Text<'a>>,
        }
        let Raw { kind, text } = Raw::deserialize(deserializer)?;
        match (kind.as_ref(), text) {
            ("text", Some(Text(text))) => Ok(Part::Text(text)),
            ("text", None) => Err(de::Error::missing_field("text")),
            _ => Ok(Part::Other(kind)),
        }
    }
}
