//! The top-level fields of a JSON object, without a tree of what is in them.
//!
//! In: a client's body. Out: its fields in order, each value as the bytes that it was, to look at, take out, replace and
//! write again. A long conversation is one borrowed value here.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, Visitor},
};
use serde_json::value::RawValue;

/// Fields that one body may have.
const FIELDS_MAX: usize = 256;

/// The fields of one object.
#[derive(Debug, Clone)]
pub struct Fields<'a>(Vec<(Cow<'a, str>, Value<'a>)>);

#[derive(Debug, Clone)]
enum Value<'a> {
    /// As it came.
    Raw(&'a RawValue),
    /// JSON text that was put in.
    New(Cow<'a, str>),
}

impl Value<'_> {
    fn get(&self) -> &str {
        match self {
            Self::Raw(raw) => raw.get(),
            Self::New(json) => json,
        }
    }
}

impl<'a> Fields<'a> {
    /// The fields of `json`, which must be one object.
    ///
    /// # Errors
    /// If it is none, a field comes twice, or there are more than 256.
    pub fn parse(json: &'a [u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// A field's value as JSON text.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.get())
    }

    /// Takes a field out; whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|(key, _)| key != name);
        self.0.len() < before
    }

    /// Puts JSON text in, in the place of a field of that name or at the end.
    pub fn set(&mut self, name: &'a str, json: impl Into<Cow<'a, str>>) {
        let value = Value::New(json.into());
        match self.0.iter_mut().find(|(key, _)| key == name) {
            Some((_, present)) => *present = value,
            None => self.0.push((Cow::Borrowed(name), value)),
        }
    }

    /// The object as JSON.
    pub fn to_bytes(&self) -> Vec<u8> {
        let size: usize = self.0.iter().map(|(key, value)| key.len() + value.get().len() + 4).sum();
        let mut out = Vec::with_capacity(size + 2);
        out.push(b'{');
        for (index, (key, value)) in self.0.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            serde_json::to_writer(&mut out, key).expect("writing to a vector does not fail");
            out.push(b':');
            out.extend_from_slice(value.get().as_bytes());
        }
        out.push(b'}');
        out
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields: Vec<(Cow<'de, str>, Value<'de>)> = Vec::new();
                while let Some((Key(key), value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    if fields.iter().any(|(known, _)| *known == key) {
                        return Err(de::Error::custom(format_args!("the field `{key}` comes twice")));
                    }
                    if fields.len() == FIELDS_MAX {
                        return Err(de::Error::custom(format_args!("more than {FIELDS_MAX} fields")));
                    }
                    fields.push((key, Value::Raw(value)));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// A field's name, borrowed unless it is escaped.
struct Key<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Key<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl<'de> Visitor<'de> for Name {
            type Value = Key<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field's name")
            }
            fn visit_borrowed_str<E: de::Error>(self, name: &'de str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Borrowed(name)))
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(Name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(json: &str, change: impl FnOnce(&mut Fields<'_>)) -> String {
        let mut fields = Fields::parse(json.as_bytes()).unwrap();
        change(&mut fields);
        String::from_utf8(fields.to_bytes()).unwrap()
    }

    #[test]
    fn fields_are_changed_and_the_rest_stays_as_it_was() {
        let body = r#"{ "model": "a", "messages": [ {"x" : 1.50} ], "caf\u00e9":null}"#;
        assert_eq!(rewritten(body, |_| {}), r#"{"model":"a","messages":[ {"x" : 1.50} ],"café":null}"#);
        let changed = rewritten(body, |fields| {
            assert!(fields.remove("café") && !fields.remove("absent"));
            fields.set("model", "\"b\"");
            fields.set("n", "1");
        });
        assert_eq!(changed, r#"{"model":"b","messages":[ {"x" : 1.50} ],"n":1}"#);
    }

    #[test]
    fn what_is_no_plain_object_is_refused() {
        let check = |json: &str, says: &str| {
            let error = Fields::parse(json.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(says), "{json}: {error}");
        };
        check("[]", "an object");
        check(r#"{"a":1,"a":2}"#, "`a` comes twice");
        check(r#"{"a":1,"\u0061":2}"#, "`a` comes twice");
        check(r#"{"a":1"#, "EOF");
        check("\"\u{1}\"", "control character");
        let many: Vec<String> = (0..257).map(|n| format!("\"{n}\":0")).collect();
        check(&format!("{{{}}}", many.join(",")), "more than 256");
    }
}
