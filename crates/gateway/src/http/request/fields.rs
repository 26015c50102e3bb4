//! Fields that come in several shapes.

use std::{borrow::Cow, fmt};

use forebay_types::TokenId;
use serde::{
    Deserialize, Deserializer,
    de::{self, SeqAccess, Visitor},
};

/// One string or several.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct OneOrMany(pub(crate) Vec<String>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shape;
        impl<'de> Visitor<'de> for Shape {
            type Value = OneOrMany;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(OneOrMany(vec![text.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut strings = Vec::new();
                while let Some(text) = list.next_element()? {
                    strings.push(text);
                }
                Ok(OneOrMany(strings))
            }
        }
        deserializer.deserialize_any(Shape)
    }
}

/// Any 64 bits: OpenAI's seeds are signed, those that Forebay reports are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seed(pub(crate) u64);

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shape;
        impl Visitor<'_> for Shape {
            type Value = Seed;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer of 64 bits")
            }
            fn visit_u64<E: de::Error>(self, seed: u64) -> Result<Seed, E> {
                Ok(Seed(seed))
            }
            fn visit_i64<E: de::Error>(self, seed: i64) -> Result<Seed, E> {
                Ok(Seed(seed.cast_unsigned()))
            }
        }
        deserializer.deserialize_any(Shape)
    }
}

/// One prompt of `/v1/completions`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Prompt<'a> {
    /// To be tokenised.
    Text(Cow<'a, str>),
    /// Taken as they are.
    Tokens(Vec<TokenId>),
}

/// `prompt` in any of its four shapes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Prompts<'a> {
    pub(crate) prompts: Vec<Prompt<'a>>,
    /// A list of prompts rather than one; tells how to name a prompt in an error.
    pub(crate) listed: bool,
}

/// What a list may hold.
enum Element<'a> {
    Text(Cow<'a, str>),
    Token(TokenId),
    Tokens(Vec<TokenId>),
}

fn token<E: de::Error>(id: u64) -> Result<TokenId, E> {
    TokenId::try_from(id).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(id), &"a token id"))
}

impl<'de: 'a, 'a> Deserialize<'de> for Element<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shape;
        impl<'de> Visitor<'de> for Shape {
            type Value = Element<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }
            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Element::Text(Cow::Borrowed(text)))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Element::Text(Cow::Owned(text.to_owned())))
            }
            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Self::Value, E> {
                token(id).map(Element::Token)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut tokens = Vec::new();
                while let Some(id) = list.next_element()? {
                    tokens.push(id);
                }
                Ok(Element::Tokens(tokens))
            }
        }
        deserializer.deserialize_any(Shape)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Prompts<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Shape;
        impl<'de> Visitor<'de> for Shape {
            type Value = Prompts<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of strings, a list of token ids or a list of such lists")
            }
            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Prompts { prompts: vec![Prompt::Text(Cow::Borrowed(text))], listed: false })
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Prompts { prompts: vec![Prompt::Text(Cow::Owned(text.to_owned()))], listed: false })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                collect(list)
            }
        }
        deserializer.deserialize_any(Shape)
    }
}

/// All elements must be of the first one's kind.
fn collect<'de, A: SeqAccess<'de>>(mut list: A) -> Result<Prompts<'de>, A::Error> {
    let mut prompts = Vec::new();
    let mut tokens = Vec::new();
    while let Some(element) = list.next_element::<Element<'de>>()? {
        match element {
            Element::Token(id) => tokens.push(id),
            Element::Text(text) => prompts.push(Prompt::Text(text)),
            Element::Tokens(ids) => prompts.push(Prompt::Tokens(ids)),
        }
        if !tokens.is_empty() && !prompts.is_empty() {
            return Err(de::Error::custom("token ids and prompts are mixed in one list"));
        }
    }
    let strings = prompts.iter().filter(|prompt| matches!(prompt, Prompt::Text(_))).count();
    if strings != 0 && strings != prompts.len() {
        return Err(de::Error::custom("strings and lists of token ids are mixed in one list"));
    }
    if tokens.is_empty() {
        Ok(Prompts { prompts, listed: true })
    } else {
        Ok(Prompts { prompts: vec![Prompt::Tokens(tokens)], listed: false })
    }
}
