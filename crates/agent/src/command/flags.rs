//! What a user wrote on an engine's command line, in any form that Python's argparse and vLLM's parser accept.
//!
//! In: words and, where one is named, the text of a configuration file. Out: which flags are set and to what. Start at
//! [`Flags::read`].

use std::collections::BTreeMap;

/// Shortest abbreviation of a flag that is taken for it, without the dashes. argparse accepts any that is unambiguous.
const ABBREVIATION_MIN: usize = 3;

/// The flags that are set, from the command line and from a configuration file.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// Names without dashes in front, with dashes inside, in order. `None`: a switch, or the value is not a plain one.
    given: Vec<(String, Option<String>)>,
    /// Of a configuration file; the command line goes before it.
    configured: BTreeMap<String, Option<String>>,
}

impl Flags {
    /// Reads `--name value`, `--name=value`, `--na_me value`, `--name.key value` (a part of a JSON value counts as the whole
    /// flag), `-n value`.
    pub fn read(words: &[String]) -> Self {
        let mut given = Vec::new();
        for (index, word) in words.iter().enumerate() {
            let Some(name) = word.strip_prefix('-').filter(|_| is_flag(word)) else {
                continue;
            };
            let name = name.trim_start_matches('-');
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, words.get(index + 1).filter(|next| !is_flag(next)).cloned()),
            };
            match name.split_once('.') {
                Some((whole, _)) => given.push((normal(whole), None)),
                None => given.push((normal(name), value)),
            }
        }
        Self { given, configured: BTreeMap::new() }
    }

    /// Adds the top-level keys of a YAML file. Its scalars are read, lists and maps are known to be there.
    pub fn take_config(&mut self, yaml: &str) {
        for line in yaml.lines() {
            if line.starts_with([' ', '\t', '#', '-']) {
                continue;
            }
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            let key = normal(key.trim().trim_matches(['"', '\'']));
            self.configured.insert(key, scalar(value));
        }
    }

    /// Whether the user has said anything about this flag, its denial `--no-NAME` included.
    pub fn is_set(&self, name: &str) -> bool {
        self.find(name).is_some() || self.find(&format!("no-{name}")).is_some()
    }

    /// Its value, if it is a plain one; the last one given.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.find(name)?.as_deref()
    }

    /// Its value as a number.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.value(name)?.parse().ok()
    }

    fn find(&self, name: &str) -> Option<&Option<String>> {
        let means = |given: &str| {
            given == name
                || (given.len() >= ABBREVIATION_MIN && given.len() < name.len() && name.starts_with(given))
        };
        let given = self.given.iter().rev().find(|(given, _)| means(given)).map(|(_, value)| value);
        given.or_else(|| self.configured.get(name))
    }
}

/// A word that argparse takes for a flag: not a lone dash, not a negative number.
fn is_flag(word: &str) -> bool {
    let mut letters = word.chars();
    letters.next() == Some('-')
        && letters.next().is_some_and(|second| second == '-' || second.is_ascii_alphabetic())
}

fn normal(name: &str) -> String {
    name.replace('_', "-")
}

/// A YAML scalar of one line, without quotes and comment; `None` for anything else.
fn scalar(text: &str) -> Option<String> {
    let text = text.trim();
    let quoted = |quote: char| {
        text.strip_prefix(quote).and_then(|rest| rest.split_once(quote)).map(|(value, _)| value)
    };
    if let Some(value) = quoted('"').or_else(|| quoted('\'')) {
        return Some(value.to_owned());
    }
    let value = text.split(" #").next().unwrap_or_default().trim();
    let plain = !value.is_empty() && !value.starts_with(['{', '[', '|', '>', '&', '#']);
    plain.then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(line: &str) -> Flags {
        Flags::read(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn a_flag_is_found_in_every_form() {
        //    line                                   flag                  set    value
        let rows = [
            ("m --port 8000", "port", true, Some("8000")),
            ("m --port=8000", "port", true, Some("8000")),
            ("m --port 1 --port=2", "port", true, Some("2")),
            ("m --api_key k", "api-key", true, Some("k")),
            ("m --kv_transfer-config={}", "kv-transfer-config", true, Some("{}")),
            ("m --kv-transfer-config.kv_role kv_both", "kv-transfer-config", true, None),
            ("m --kv-transfer-config.kv_role=kv_both", "kv-transfer-config", true, None),
            ("m --kv-events {}", "kv-events-config", true, Some("{}")),
            ("m --enable-metrics --port 1", "enable-metrics", true, None),
            ("m --no-enable-metrics", "enable-metrics", true, None),
            ("m -tp 2", "tp", true, Some("2")),
            ("m --top-p -1", "top-p", true, Some("-1")),
            ("m --ports 8000", "port", false, None),
            ("m --po 8000", "port", false, None),
            ("m port 8000", "port", false, None),
            ("m --model=--port", "port", false, None),
            ("m", "port", false, None),
        ];
        for (line, flag, set, value) in rows {
            assert_eq!((flags(line).is_set(flag), flags(line).value(flag)), (set, value), "{flag} in {line}");
        }
    }

    #[test]
    fn a_configuration_file_counts_behind_the_command_line() {
        let mut flags = flags("m --port 1");
        flags.take_config(
            "# ours\nport: 9\nhost: \"0.0.0.0\" # all\nkv_events_config:\n  publisher: zmq\napi-key: 'a # b'\nlora-modules:\n- x: y\nempty:\n",
        );
        let rows = [
            ("port", true, Some("1")),
            ("host", true, Some("0.0.0.0")),
            ("kv-events-config", true, None),
            ("publisher", false, None),
            ("api-key", true, Some("a # b")),
            ("lora-modules", true, None),
            ("empty", true, None),
        ];
        for (flag, set, value) in rows {
            assert_eq!((flags.is_set(flag), flags.value(flag)), (set, value), "{flag}");
        }
    }
}
