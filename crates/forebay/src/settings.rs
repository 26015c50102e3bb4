//! Settings: one declaration each, four layers, and where every value came from.
//!
//! In: flags, environment variables and the file that one of them names. Out: [`Settings`], typed and checked, or every
//! problem at once. Start at [`groups`], where settings are declared; [`layers`] says who overrides whom.
//!
//! Invariants: an unknown key is an error, in a file and in the environment; a value is read by one function, whatever
//! layer it came from; nothing below this module reads the environment.

pub(crate) mod attach_spec;
pub(crate) mod choices;
mod declare;
pub(crate) mod engine_spec;
mod file;
mod flags;
pub(crate) mod groups;
mod layers;
pub(crate) mod model_path;
mod nearest;
pub(crate) mod problem;
mod reference;
mod units;
mod value;

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use declare::{CONFIG, Declared, Group, Setting};
use layers::Layers;
use problem::{Problem, SettingsError};
use value::Value as _;

pub(crate) use flags::{SettingFlags, SharedFlags};
pub(crate) use layers::{Origin, Origins};
pub(crate) use nearest::nearest;
pub(crate) use reference::page as reference_page;
pub(crate) use units::parse_duration;

use engine_spec::{EngineKind, EngineSpec};
use groups::{Cluster, Doors, Engines, Http, Kv, Limits, Process, Routing};

/// Every setting of `forebay serve`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    /// Addresses and keys.
    pub(crate) doors: Doors,
    /// Engines and model.
    pub(crate) engines: Engines,
    /// Placement of requests.
    pub(crate) routing: Routing,
    /// Engines on other hosts.
    pub(crate) cluster: Cluster,
    /// KV blocks.
    pub(crate) kv: Kv,
    /// Bounds.
    pub(crate) limits: Limits,
    /// Bounds of connections and requests.
    pub(crate) http: Http,
    /// Threads and logs.
    pub(crate) process: Process,
    /// The settings file, if any, and who named it.
    config: (String, Origin),
    /// Who gave what is not a default.
    origins: Origins,
}

/// The groups, in the order of the reference page.
pub(crate) const GROUPS: &[Group] = &[
    Doors::GROUP,
    Engines::GROUP,
    Routing::GROUP,
    Cluster::GROUP,
    Kv::GROUP,
    Limits::GROUP,
    Http::GROUP,
    Process::GROUP,
];

/// Every declaration, `config` first.
pub(crate) fn known_settings() -> impl Iterator<Item = &'static Setting> {
    std::iter::once(&CONFIG).chain(GROUPS.iter().flat_map(|group| group.settings))
}

/// One line of `forebay config show`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Shown {
    /// The setting.
    pub(crate) name: &'static str,
    /// Its value as text; hidden if secret.
    pub(crate) value: String,
    /// Where the value came from.
    pub(crate) origin: String,
}

impl Settings {
    /// Reads every layer: flags over environment over file over defaults.
    ///
    /// # Errors
    /// Everything that is wrong, each with where it was written.
    pub(crate) fn load(
        flags: &SettingFlags,
        environment: &BTreeMap<String, String>,
    ) -> Result<Self, SettingsError> {
        let mut problems = Vec::new();
        let layers = Layers::gather(known_settings(), flags, environment, &mut problems);
        let mut origins = Origins::new();
        let settings = Self {
            doors: Doors::resolve(&layers, &mut origins, &mut problems),
            engines: Engines::resolve(&layers, &mut origins, &mut problems),
            routing: Routing::resolve(&layers, &mut origins, &mut problems),
            cluster: Cluster::resolve(&layers, &mut origins, &mut problems),
            kv: Kv::resolve(&layers, &mut origins, &mut problems),
            limits: Limits::resolve(&layers, &mut origins, &mut problems),
            http: Http::resolve(&layers, &mut origins, &mut problems),
            process: Process::resolve(&layers, &mut origins, &mut problems),
            config: layers.config(),
            origins,
        };
        if problems.is_empty() {
            problems = settings.validate();
        }
        if problems.is_empty() { Ok(settings) } else { Err(SettingsError(problems)) }
    }

    /// Reads a file over the defaults, as `forebay config check` does: this machine's environment has no say.
    ///
    /// # Errors
    /// As [`Settings::load`].
    pub(crate) fn load_file(path: &str) -> Result<Self, SettingsError> {
        let environment = BTreeMap::from([(CONFIG.environment_name(), path.to_owned())]);
        Self::load(&SettingFlags::default(), &environment)
    }

    /// What each setting is and where that came from, in the order of the reference page.
    pub(crate) fn shown(&self) -> Vec<Shown> {
        let texts = [
            self.doors.texts(),
            self.engines.texts(),
            self.routing.texts(),
            self.cluster.texts(),
            self.kv.texts(),
            self.limits.texts(),
            self.http.texts(),
            self.process.texts(),
        ];
        let config =
            Shown { name: CONFIG.name, value: self.config.0.clone(), origin: self.config.1.to_string() };
        std::iter::once(config)
            .chain(texts.into_iter().flatten().map(|(name, value)| Shown {
                name,
                value,
                origin: self.origins.get(name).unwrap_or(&Origin::Default).to_string(),
            }))
            .collect()
    }

    /// The folder in which named models lie: the setting, or `forebay/models` in the user's cache folder. `None` if
    /// neither is known.
    pub(crate) fn model_folder(&self, environment: &BTreeMap<String, String>) -> Option<PathBuf> {
        let folder = |name: &str| environment.get(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        self.engines
            .model_folder
            .clone()
            .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("forebay/models")))
            .or_else(|| folder("HOME").map(|home| home.join(".cache/forebay/models")))
    }

    /// What no single setting can know: whether they go together. Runs once, at load.
    fn validate(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut refuse = |sentence: String| problems.push(Problem::Together(sentence));
        let Doors { listen, admin_listen, api_keys, insecure } = &self.doors;
        if is_exposed(*listen) && api_keys.is_none() && !insecure {
            refuse(format!(
                "`listen` is {listen}, which other machines can reach, and there are no keys: give `api_keys` a file \
                 (`forebay keys add TENANT` makes its lines), or set `insecure` if that is meant"
            ));
        }
        if is_exposed(*admin_listen) && !insecure {
            refuse(format!(
                "`admin_listen` is {admin_listen}, which other machines can reach, and the admin address asks for no \
                 key: use a loopback address, or set `insecure` if that is meant"
            ));
        }
        if listen == admin_listen && listen.port() != 0 {
            refuse(format!("`listen` and `admin_listen` are both {listen}; they need an address each"));
        }
        let Cluster { cluster_listen, cluster_cert, cluster_key, cluster_ca, .. } = &self.cluster;
        let files = [cluster_cert, cluster_key, cluster_ca].iter().filter(|file| file.is_some()).count();
        if files != 0 && files != 3 {
            refuse(
                "`cluster_cert`, `cluster_key` and `cluster_ca` go together: agents and gateways show each other \
                 certificates; give all three or none"
                    .to_owned(),
            );
        }
        if let Some(address) =
            cluster_listen.filter(|address| is_exposed(*address) && files == 0 && !insecure)
        {
            refuse(format!(
                "`cluster_listen` is {address}, which other machines can reach, and keys of engines would travel in the \
                 clear: give `cluster_cert`, `cluster_key` and `cluster_ca`, or set `insecure` if that is meant"
            ));
        }
        if self.cluster.registry.is_some() && cluster_listen.is_none() {
            refuse("`registry` is set and `cluster_listen` is not: there is nothing to announce".to_owned());
        }
        if self.cluster.lease_seconds <= self.cluster.silence_seconds_max {
            refuse("`lease_seconds` must be more than `silence_seconds_max`".to_owned());
        }
        let Engines { step_tokens_max, sequences_max, block_size_tokens, engine, .. } = &self.engines;
        if !block_size_tokens.is_power_of_two() {
            refuse(format!("`block_size_tokens` is {block_size_tokens}; give a power of two, such as 16"));
        } else if block_size_tokens.get() < 16
            && engine.iter().filter_map(EngineSpec::local).any(|spec| spec.kind == EngineKind::Embedded)
        {
            refuse(format!("`block_size_tokens` is {block_size_tokens}; embedded engines need 16 or more"));
        }
        if step_tokens_max < sequences_max {
            refuse(format!(
                "`step_tokens_max` is {step_tokens_max}, less than `sequences_max`, {sequences_max}: a step could not \
                 give each running sequence a token; raise the one or lower the other"
            ));
        }
        let index_bytes = self.limits.index_bytes_max;
        if index_bytes.as_usize() < forebay_kv_index::BYTES_MIN {
            refuse(format!(
                "`index_bytes_max` is {}, too little for the cache of one rank: give 1MiB or more, some 24 bytes for each \
                 KV block of the fleet",
                index_bytes.show()
            ));
        }
        if let Err(error) = self.routing.weights().validate() {
            refuse(error.to_string());
        }
        if let Err(error) = self.routing.gather().validate() {
            refuse(format!("gather_stall_weight: {error}"));
        }
        problems
    }
}

/// Whether other machines can reach an address that this process listens on.
pub(crate) fn is_exposed(address: SocketAddr) -> bool {
    !address.ip().to_canonical().is_loopback()
}
