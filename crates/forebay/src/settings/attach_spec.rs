//! `[KIND=]URL[,OPTION=VALUE...]`: an engine that runs elsewhere.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use forebay_types::Role;

use super::{
    engine_spec::{parse_role, role_name},
    nearest::nearest,
};

/// An engine that runs elsewhere.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AttachSpec {
    /// `vllm`, `sglang`, `trtllm` or `openai`; found out if not said.
    pub(crate) kind: Option<String>,
    /// `http` or `https`, without user, password, query and a last slash.
    pub(crate) url: String,
    /// What it may be asked to do; found out if not said.
    pub(crate) role: Option<Role>,
    /// What operators call it; host and port if not said.
    pub(crate) name: Option<String>,
    /// The environment variable that holds its API key.
    pub(crate) key_env: Option<String>,
    /// The file that holds its API key.
    pub(crate) key_file: Option<PathBuf>,
    /// PEM file of the authority that signed its certificate, besides the system's.
    pub(crate) ca_file: Option<PathBuf>,
    /// Where it publishes KV events, if that cannot be found out: `tcp://host:port`.
    pub(crate) events: Option<String>,
    /// Where it replays them.
    pub(crate) replay: Option<String>,
    /// How fast it is taken to be compared with others of its kind, until its own rates are measured.
    pub(crate) weight: f64,
    /// For operators.
    pub(crate) labels: BTreeMap<String, String>,
}

const KINDS: [&str; 4] = ["vllm", "sglang", "trtllm", "openai"];
const OPTIONS: [&str; 9] =
    ["role", "name", "key-env", "key-file", "ca-file", "events", "replay", "weight", "label"];

impl AttachSpec {
    /// `None` if the text does not mean an engine elsewhere.
    pub(super) fn from_text(text: &str) -> Option<Result<Self, String>> {
        let (head, options) = text.split_once(',').map_or((text, None), |(head, rest)| (head, Some(rest)));
        // A query's `=` is not ours.
        let (kind, url) = match head.split_once('=').filter(|(kind, _)| !kind.contains("://")) {
            Some((kind, url)) => (Some(kind), url),
            None => (None, head),
        };
        let is_url = url.starts_with("http://") || url.starts_with("https://");
        let bare = head.split(':').next().unwrap_or_default();
        if !is_url && kind.is_none() && !KINDS.contains(&bare) && !url.contains("://") {
            return None;
        }
        Some(Self::read(kind, url, is_url, options))
    }

    fn read(kind: Option<&str>, url: &str, is_url: bool, options: Option<&str>) -> Result<Self, String> {
        if let Some(kind) = kind.filter(|kind| !KINDS.contains(kind)) {
            let near = nearest(kind, KINDS);
            let hint = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            return Err(format!("unknown kind of server `{kind}`, known are {}{hint}", KINDS.join(", ")));
        }
        if !is_url {
            return Err(format!(
                "`{url}` is no URL; give one such as {}=http://host:8000",
                kind.unwrap_or("vllm")
            ));
        }
        let mut spec = Self {
            kind: kind.map(ToOwned::to_owned),
            url: checked_url(url)?,
            role: None,
            name: None,
            key_env: None,
            key_file: None,
            ca_file: None,
            events: None,
            replay: None,
            weight: 1.0,
            labels: BTreeMap::new(),
        };
        let mut given: Vec<&str> = Vec::new();
        for option in options.into_iter().flat_map(|options| options.split(',')) {
            let Some((name, value)) = option.split_once('=').filter(|(name, _)| OPTIONS.contains(name))
            else {
                return Err(unknown_option(option));
            };
            if name != "label" && given.contains(&name) {
                return Err(format!("{name} is given twice"));
            }
            given.push(name);
            spec.set(name, value)?;
        }
        if spec.key_env.is_some() && spec.key_file.is_some() {
            return Err("key-env and key-file are both given; one of them holds the key".to_owned());
        }
        Ok(spec)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        if value.is_empty() {
            return Err(format!("{name} is empty"));
        }
        let text = || Some(value.to_owned());
        match name {
            "role" => self.role = Some(parse_role(value)?),
            "name" => self.name = text(),
            "key-env" => self.key_env = text(),
            "key-file" => self.key_file = Some(value.into()),
            "ca-file" => self.ca_file = Some(value.into()),
            "events" => self.events = Some(endpoint(name, value)?),
            "replay" => self.replay = Some(endpoint(name, value)?),
            "weight" => {
                let weight = value.parse().ok().filter(|weight: &f64| weight.is_finite() && *weight > 0.0);
                self.weight = weight.ok_or_else(|| format!("weight is `{value}`; give a number above 0"))?;
            }
            _ => {
                let label = value.split_once(':').filter(|(key, _)| !key.is_empty());
                let (key, value) =
                    label.ok_or_else(|| format!("label is `{value}`; write label=KEY:VALUE"))?;
                self.labels.insert(key.to_owned(), value.to_owned());
            }
        }
        Ok(())
    }

    /// What operators call it.
    pub(crate) fn name(&self) -> String {
        let host = self.url.split("://").nth(1).unwrap_or(&self.url);
        self.name.clone().unwrap_or_else(|| host.to_owned())
    }
}

fn unknown_option(option: &str) -> String {
    let name = option.split('=').next().unwrap_or_default();
    let near = nearest(name, OPTIONS);
    let hint = near.map_or(String::new(), |near| format!("; did you mean `{near}=`?"));
    format!(
        "unknown option `{option}`, known are {}{hint}",
        OPTIONS.map(|name| format!("{name}=")).join(", ")
    )
}

fn endpoint(name: &str, value: &str) -> Result<String, String> {
    let known = value.starts_with("tcp://") || value.starts_with("ipc://");
    if known { Ok(value.to_owned()) } else { Err(format!("{name} is `{value}`; give tcp://HOST:PORT")) }
}

/// A URL that can be shown: a password in it would end up in logs.
fn checked_url(url: &str) -> Result<String, String> {
    let url = url.trim_end_matches('/');
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or_default();
    if host.is_empty() {
        return Err("the URL has no host; give one such as http://host:8000".to_owned());
    }
    if host.contains('@') {
        return Err(
            "the URL holds a user or password; give the key by key-env=VARIABLE or key-file=PATH".to_owned()
        );
    }
    if rest.contains(['?', '#']) {
        return Err(format!("`{url}` has a query; give the server's address alone"));
    }
    Ok(url.trim_end_matches("/v1").to_owned())
}

impl fmt::Display for AttachSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(kind) = &self.kind {
            write!(f, "{kind}=")?;
        }
        f.write_str(&self.url)?;
        if let Some(role) = self.role {
            write!(f, ",role={}", role_name(role))?;
        }
        let texts = [
            ("name", &self.name),
            ("key-env", &self.key_env),
            ("events", &self.events),
            ("replay", &self.replay),
        ];
        for (name, value) in texts {
            if let Some(value) = value {
                write!(f, ",{name}={value}")?;
            }
        }
        for (name, value) in [("key-file", &self.key_file), ("ca-file", &self.ca_file)] {
            if let Some(value) = value {
                write!(f, ",{name}={}", value.display())?;
            }
        }
        if self.weight != 1.0 {
            write!(f, ",weight={}", self.weight)?;
        }
        self.labels.iter().try_for_each(|(key, value)| write!(f, ",label={key}:{value}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<AttachSpec, String> {
        AttachSpec::from_text(text).expect("it means an engine elsewhere")
    }

    #[test]
    fn attached_engines_read_and_show_themselves() {
        let check = |text: &str, shown: &str| {
            let spec = read(text).expect(text);
            assert_eq!(spec.to_string(), shown, "{text}");
            assert_eq!(read(shown), Ok(spec), "{shown}");
        };
        check("http://h:8000", "http://h:8000");
        check("vllm=http://h:8000/", "vllm=http://h:8000");
        check("openai=https://api.example/v1", "openai=https://api.example");
        check("sglang=http://h,role=prefill,name=p0", "sglang=http://h,role=prefill,name=p0");
        check(
            "http://h:1,label=zone:a,label=rack:b:c,weight=2.5,key-env=KEY,events=tcp://h:5557",
            "http://h:1,key-env=KEY,events=tcp://h:5557,weight=2.5,label=rack:b:c,label=zone:a",
        );
        assert_eq!(read("http://h:8000/x").map(|spec| spec.name()), Ok("h:8000/x".to_owned()));
        assert_eq!(AttachSpec::from_text("embedded:4"), None);
        assert_eq!(AttachSpec::from_text("sim"), None);
    }

    #[test]
    fn mistakes_are_named() {
        let check = |text: &str, expected: &str| {
            let error = read(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        };
        check("vlm=http://h", "did you mean `vllm`?");
        check("vllm", "give one such as vllm=http://host:8000");
        check("vllm:2", "is no URL");
        check("vllm=h:8000", "`h:8000` is no URL");
        check("ftp://h", "is no URL");
        check("http://", "no host");
        check("http://user:secret@h", "key-env=VARIABLE");
        check("http://h?key=1", "has a query");
        check("http://h,role=prefil", "did you mean `prefill`?");
        check("http://h,rolle=both", "did you mean `role=`?");
        check("http://h,", "unknown option ``");
        check("http://h,name=", "name is empty");
        check("http://h,name=a,name=b", "name is given twice");
        check("http://h,key-env=A,key-file=b", "one of them");
        check("http://h,weight=0", "above 0");
        check("http://h,label=x", "label=KEY:VALUE");
        check("http://h,events=5557", "tcp://HOST:PORT");
        assert!(!read("http://user:secret@h").expect_err("refused").contains("secret"));
    }
}
