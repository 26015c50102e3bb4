//! Fields of a JSON body, read as pydantic reads them: unknown ones are ignored, wrong types are refused with 400.

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::tokenizer::Token;

/// A body's fields.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    prefix: &'static str,
}

type Read<T> = Result<Option<T>, ApiError>;

impl<'a> Fields<'a> {
    /// Of a whole body.
    pub(crate) fn of(body: &'a Value) -> Result<Self, ApiError> {
        let map = body.as_object().ok_or_else(|| {
            ApiError::malformed("body", "model_attributes_type", "Input should be a valid dictionary")
        })?;
        Ok(Self { map, prefix: "body" })
    }

    /// Of an object within it.
    pub(crate) fn nested(map: &'a Map<String, Value>, prefix: &'static str) -> Self {
        Self { map, prefix }
    }

    /// The value, unless it is missing or null.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    fn wrong<T>(&self, name: &str, kind: &str, message: &str) -> Read<T> {
        Err(ApiError::malformed(&format!("{}.{name}", self.prefix), kind, message))
    }

    pub(crate) fn missing(&self, name: &str) -> ApiError {
        ApiError::malformed(&format!("{}.{name}", self.prefix), "missing", "Field required")
    }

    pub(crate) fn text(&self, name: &str) -> Read<String> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => self.wrong(name, "string_type", "Input should be a valid string"),
        }
    }

    pub(crate) fn int(&self, name: &str) -> Read<i64> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let whole = |number: f64| (number.fract() == 0.0).then_some(number as i64);
        let read = match value {
            Value::Number(number) => number.as_i64().or_else(|| number.as_f64().and_then(whole)),
            Value::String(text) => text.trim().parse().ok(),
            Value::Bool(value) => Some(i64::from(*value)),
            _ => None,
        };
        match read {
            Some(number) => Ok(Some(number)),
            None => self.wrong(name, "int_parsing", "Input should be a valid integer"),
        }
    }

    pub(crate) fn number(&self, name: &str) -> Read<f64> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let read = match value {
            Value::Number(number) => number.as_f64(),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        };
        match read {
            Some(number) => Ok(Some(number)),
            None => self.wrong(name, "float_parsing", "Input should be a valid number"),
        }
    }

    pub(crate) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        let Some(value) = self.get(name) else { return Ok(false) };
        let read = match value {
            Value::Bool(value) => Some(*value),
            Value::Number(number) => {
                number.as_i64().filter(|number| *number == 0 || *number == 1).map(|one| one == 1)
            }
            Value::String(text) => match text.to_lowercase().as_str() {
                "true" | "1" | "yes" | "on" | "t" | "y" => Some(true),
                "false" | "0" | "no" | "off" | "f" | "n" => Some(false),
                _ => None,
            },
            _ => None,
        };
        match read {
            Some(value) => Ok(value),
            None => self
                .wrong(name, "bool_parsing", "Input should be a valid boolean")
                .map(|_: Option<bool>| false),
        }
    }

    pub(crate) fn object(&self, name: &str) -> Read<&'a Map<String, Value>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(_) => self.wrong(name, "dict_type", "Input should be a valid dictionary"),
        }
    }

    pub(crate) fn list(&self, name: &str) -> Read<&'a Vec<Value>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(_) => self.wrong(name, "list_type", "Input should be a valid list"),
        }
    }

    /// A list of token ids.
    pub(crate) fn tokens(&self, name: &str) -> Read<Vec<Token>> {
        match self.list(name)? {
            None => Ok(None),
            Some(items) => Ok(Some(tokens(items).ok_or_else(|| {
                ApiError::malformed(
                    &format!("{}.{name}", self.prefix),
                    "int_type",
                    "Input should be a valid integer",
                )
            })?)),
        }
    }

    /// A string or a list of strings.
    pub(crate) fn texts(&self, name: &str) -> Result<Vec<String>, ApiError> {
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) => Ok(vec![text.clone()]),
            Some(Value::Array(items)) => {
                let texts: Option<Vec<String>> =
                    items.iter().map(|item| item.as_str().map(str::to_owned)).collect();
                texts.ok_or_else(|| {
                    ApiError::malformed(
                        &format!("{}.{name}", self.prefix),
                        "string_type",
                        "Input should be a valid string",
                    )
                })
            }
            Some(_) => self
                .wrong(name, "string_type", "Input should be a valid string")
                .map(|_: Option<()>| Vec::new()),
        }
    }
}

/// Token ids, if all items are integers that are not negative. Too large ones become ids that no vocabulary has.
pub(crate) fn tokens(items: &[Value]) -> Option<Vec<Token>> {
    items.iter().map(|item| item.as_u64().map(|id| Token::try_from(id).unwrap_or(Token::MAX))).collect()
}

/// Messages as (role, content); for `/tokenize` too.
pub(crate) fn chat_messages(fields: &Fields<'_>) -> Result<Vec<(String, String)>, ApiError> {
    let messages = fields.list("messages")?.ok_or_else(|| fields.missing("messages"))?;
    if messages.is_empty() {
        return Err(ApiError::invalid("list object has no element 0"));
    }
    messages.iter().map(message).collect()
}

fn message(message: &Value) -> Result<(String, String), ApiError> {
    let malformed =
        |field: &str, text: &str| ApiError::malformed(&format!("body.messages.{field}"), "missing", text);
    let role = message["role"].as_str().ok_or_else(|| malformed("role", "Field required"))?;
    let content = match &message["content"] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        Value::Array(parts) => {
            let part = |part: &Value| match part["type"].as_str() {
                Some("text") => part["text"].as_str().map(str::to_owned),
                _ => None,
            };
            let texts: Option<Vec<String>> = parts.iter().map(part).collect();
            texts.ok_or_else(|| ApiError::invalid("the model is not a multimodal model"))?.join("\n")
        }
        _ => return Err(malformed("content", "Input should be a valid string")),
    };
    Ok((role.to_owned(), content))
}
