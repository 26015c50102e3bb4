//! The flag layer: one clap argument for each setting, made from its declaration.

use std::collections::BTreeMap;

use clap::{
    Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueHint, builder::PossibleValuesParser,
    parser::ValueSource,
};

use super::{
    declare::{Audience, Setting},
    known_settings,
    layers::{Given, Origin},
    value::Form,
};

/// What the command line said about settings, as text: parsing is one for all layers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SettingFlags(BTreeMap<&'static str, Vec<String>>);

impl SettingFlags {
    /// As a layer.
    pub(crate) fn given(&self) -> BTreeMap<&'static str, Given> {
        let flag = |name: &str| Origin::Flag(name.replace('_', "-"));
        self.0
            .iter()
            .map(|(name, texts)| (*name, Given { texts: texts.clone(), origin: flag(name) }))
            .collect()
    }

    /// From flags of another command that mean settings; those without a text were not given.
    pub(crate) fn from_texts(texts: impl IntoIterator<Item = (&'static str, Vec<String>)>) -> Self {
        Self(texts.into_iter().filter(|(_, texts)| !texts.is_empty()).collect())
    }

    /// Takes what the command line says about some settings.
    fn take(&mut self, settings: impl Iterator<Item = &'static Setting>, matches: &ArgMatches) {
        for setting in settings {
            if matches.value_source(setting.name) == Some(ValueSource::CommandLine) {
                let texts = matches.get_many::<String>(setting.name).into_iter().flatten().cloned().collect();
                self.0.insert(setting.name, texts);
            }
        }
    }

    /// Flags as a test gives them.
    #[cfg(test)]
    pub(crate) fn of(flags: &[(&'static str, &str)]) -> Self {
        let mut given = BTreeMap::<_, Vec<_>>::new();
        for (name, text) in flags {
            given.entry(*name).or_default().push((*text).to_owned());
        }
        Self(given)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.take(known_settings(), matches);
        Ok(())
    }
}

impl Args for SettingFlags {
    fn augment_args(command: Command) -> Command {
        known_settings().fold(command, |command, setting| command.arg(argument(setting)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// Settings that `index-server` shares with `serve`: the same names, variables, keys and defaults.
const SHARED: [&str; 11] = [
    "config",
    "insecure",
    "block_size_tokens",
    "hash_key",
    "index_bytes_max",
    "chain_bytes_max",
    "connections_max",
    "body_bytes_max",
    "threads",
    "log_filter",
    "log_format",
];

/// The flags of settings that another command shares with `serve`.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedFlags(SettingFlags);

impl SharedFlags {
    /// What was said.
    pub(crate) fn flags(&self) -> &SettingFlags {
        &self.0
    }

    fn settings() -> impl Iterator<Item = &'static Setting> {
        known_settings().filter(|setting| SHARED.contains(&setting.name))
    }
}

impl FromArgMatches for SharedFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.take(Self::settings(), matches);
        Ok(())
    }
}

impl Args for SharedFlags {
    fn augment_args(command: Command) -> Command {
        // Few enough to be shown together.
        let one = |setting: &'static Setting| {
            let arg = argument(setting).help_heading("Settings").hide_short_help(false);
            match setting.name {
                // There is one index here.
                "index_bytes_max" => {
                    let help = format!("Memory of the index, some 24 bytes a block {}", notes(setting));
                    arg.help(help.clone()).long_help(help)
                }
                _ => arg,
            }
        };
        Self::settings().fold(command, |command, setting| command.arg(one(setting)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn argument(setting: &'static Setting) -> Arg {
    let notes = notes(setting);
    let arg = Arg::new(setting.name)
        .long(setting.flag())
        .value_name(setting.placeholder)
        .help(format!("{} {notes}", setting.summary()))
        .long_help(format!("{} {notes}", setting.paragraph()))
        .allow_hyphen_values(false);
    let arg = match setting.audience {
        Audience::Common => arg.help_heading("Settings"),
        Audience::Advanced => arg.help_heading("Advanced").hide_short_help(true),
    };
    let arg = match setting.form {
        Form::List | Form::Engines => arg.action(ArgAction::Append),
        Form::Switch => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
        _ => arg.action(ArgAction::Set),
    };
    let arg = match setting.placeholder {
        "PATH" | "FILE" => arg.value_hint(ValueHint::FilePath),
        _ => arg,
    };
    if setting.choices.is_empty() {
        arg
    } else {
        arg.value_parser(PossibleValuesParser::new(setting.choices))
    }
}

/// `[env: FOREBAY_LISTEN] [default: 127.0.0.1:8080]`.
fn notes(setting: &Setting) -> String {
    let default = (setting.default)();
    match default.as_str() {
        // A switch that is off by default needs no words.
        super::value::UNSET | "false" => format!("[env: {}]", setting.environment_name()),
        _ => format!("[env: {}] [default: {default}]", setting.environment_name()),
    }
}
