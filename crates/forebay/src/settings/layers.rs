//! Flags over environment over file over defaults, and who won.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    path::PathBuf,
};

use super::{
    declare::{CONFIG, Setting},
    file,
    flags::SettingFlags,
    nearest::nearest,
    problem::Problem,
    value::{UNSET, Value},
};

/// What every environment name of a setting begins with.
pub(crate) const ENVIRONMENT_PREFIX: &str = "FOREBAY_";

/// Variables that other commands read; they share the prefix and are no settings.
const CLIENT_VARIABLES: [&str; 5] =
    ["FOREBAY_API_KEY", "FOREBAY_URL", "FOREBAY_ADMIN_URL", "FOREBAY_ENGINE_API_KEY", "FOREBAY_AGENT_LIFE"];

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A flag, by its name without dashes.
    Flag(String),
    /// An environment variable, by its name.
    Environment(String),
    /// A line of the settings file, counted from 1.
    File {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
    },
    /// Nobody said anything.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Flag(flag) => write!(f, "flag --{flag}"),
            Origin::Environment(name) => write!(f, "environment {name}"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Default => f.write_str("default"),
        }
    }
}

/// Where each setting's value came from; a setting without an entry has its default.
pub(crate) type Origins = BTreeMap<&'static str, Origin>;

/// What one layer says about one setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Given {
    /// One text, or several where the setting is a list.
    pub(crate) texts: Vec<String>,
    /// Who said it.
    pub(crate) origin: Origin,
}

/// What is said about each setting by the highest layer that says anything.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    given: BTreeMap<&'static str, Given>,
    known: HashMap<&'static str, &'static Setting>,
}

impl Layers {
    /// Reads the layers above the defaults, lowest first.
    pub(crate) fn gather(
        known: impl Iterator<Item = &'static Setting>,
        flags: &SettingFlags,
        environment: &BTreeMap<String, String>,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut layers = Layers { given: BTreeMap::new(), known: known.map(|s| (s.name, s)).collect() };
        let from_flags = flags.given();
        let from_environment = layers.environment(environment, problems);
        let config = from_flags.get(CONFIG.name).or_else(|| from_environment.get(CONFIG.name));
        if let Some(path) = config.and_then(|given| given.texts.last()).filter(|path| !path.is_empty()) {
            layers.given = file::read(&PathBuf::from(path), &layers.known, problems);
        }
        layers.given.extend(from_environment);
        layers.given.extend(from_flags);
        layers
    }

    /// The settings that `FOREBAY_*` variables give. Unknown ones are problems, except those that a cluster adds by
    /// itself to every process near a service called `forebay`.
    fn environment(
        &self,
        variables: &BTreeMap<String, String>,
        problems: &mut Vec<Problem>,
    ) -> BTreeMap<&'static str, Given> {
        let mut given = BTreeMap::new();
        for (name, text) in variables {
            let Some(rest) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
            let key = rest.to_ascii_lowercase();
            match self.known.get(key.as_str()).filter(|setting| setting.environment_name() == *name) {
                Some(setting) => {
                    let origin = Origin::Environment(name.clone());
                    given.insert(setting.name, Given { texts: vec![text.clone()], origin });
                }
                None if CLIENT_VARIABLES.contains(&name.as_str()) || is_service_link(rest) => {}
                None => problems.push(Problem::UnknownVariable {
                    name: name.clone(),
                    nearest: nearest(&key, self.names()).map(|name| self.known[name].environment_name()),
                }),
            }
        }
        given
    }

    fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.known.keys().copied().collect();
        names.sort_unstable();
        names
    }

    /// The value of one setting, `None` if it keeps its default. Records who gave it.
    pub(crate) fn take<T: Value>(
        &self,
        name: &'static str,
        origins: &mut Origins,
        problems: &mut Vec<Problem>,
    ) -> Option<T> {
        let given = self.given.get(name)?;
        match T::parse_all(&given.texts) {
            Ok(value) => {
                origins.insert(name, given.origin.clone());
                Some(value)
            }
            Err(detail) => {
                let secret = self.known.get(name).is_some_and(|setting| setting.secret);
                problems.push(Problem::Wrong {
                    name,
                    value: if secret { "(hidden)".to_owned() } else { given.texts.join(" ") },
                    expected: T::EXPECTED,
                    origin: given.origin.clone(),
                    detail,
                });
                None
            }
        }
    }

    /// The settings file, if one was named, and who named it.
    pub(crate) fn config(&self) -> (String, Origin) {
        self.given.get(CONFIG.name).map_or_else(
            || (UNSET.to_owned(), Origin::Default),
            |given| (given.texts.join(" "), given.origin.clone()),
        )
    }
}

/// Whether a variable (its prefix taken off) is one of those that Kubernetes and container links set for a service:
/// `SERVICE_HOST`, `SERVICE_PORT_HTTP`, `PORT`, `PORT_8080_TCP_ADDR`, or the same for `forebay-gateway` and its like.
fn is_service_link(rest: &str) -> bool {
    let after = |marker: &str| {
        rest.match_indices(marker).find_map(|(at, _)| {
            (at == 0 || rest.as_bytes()[at - 1] == b'_').then(|| &rest[at + marker.len()..])
        })
    };
    after("SERVICE_HOST").is_some_and(str::is_empty)
        || after("SERVICE_PORT").is_some_and(|tail| tail.is_empty() || tail.starts_with('_'))
        || after("PORT").is_some_and(|tail| {
            tail.is_empty()
                || tail.strip_prefix('_').is_some_and(|tail| tail.starts_with(|c: char| c.is_ascii_digit()))
        })
}

#[cfg(test)]
mod tests {
    use super::is_service_link;

    #[test]
    fn variables_of_cluster_services_are_recognised() {
        for link in [
            "SERVICE_HOST",
            "SERVICE_PORT",
            "SERVICE_PORT_HTTP",
            "PORT",
            "PORT_8080_TCP",
            "PORT_8080_TCP_ADDR",
            "GATEWAY_SERVICE_HOST",
            "GATEWAY_PORT",
            "GATEWAY_PORT_80_TCP_PROTO",
        ] {
            assert!(is_service_link(link), "{link}");
        }
        for other in ["LISTEN", "PORTS", "IMPORT", "SERVICE_HOSTS", "PORT_X", "API_KEYS"] {
            assert!(!is_service_link(other), "{other}");
        }
    }
}
