//! The `settings!` macro: one declaration gives the field, the flag, the environment name, the file key, the default,
//! the help text and the row of the reference page.

use std::path::PathBuf;

use super::layers::{Layers, Origins};
use super::problem::Problem;
use super::value::Form;

/// How much a setting is shown: common ones in the main help, the rest under "Advanced".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Audience {
    /// Most users meet it.
    Common,
    /// For those who look for it.
    Advanced,
}

/// One setting, as declared.
#[derive(Debug)]
pub(crate) struct Setting {
    /// Its name, which is also the key in a file: `queue_tokens_max`.
    pub(crate) name: &'static str,
    /// What it means: its doc comment, one sentence or more.
    pub(crate) doc: &'static [&'static str],
    /// Who needs it.
    pub(crate) audience: Audience,
    /// Never printed.
    pub(crate) secret: bool,
    /// How it is written on a command line and in a file.
    pub(crate) form: Form,
    /// What a value looks like: `a duration such as 10s`.
    pub(crate) expected: &'static str,
    /// What stands for a value in help texts: `DURATION`.
    pub(crate) placeholder: &'static str,
    /// The only texts that are allowed; empty if there are too many to list.
    pub(crate) choices: &'static [&'static str],
    /// The default, as text.
    pub(crate) default: fn() -> String,
}

impl Setting {
    /// `--queue-tokens-max`, without the dashes in front.
    pub(crate) fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// `FOREBAY_QUEUE_TOKENS_MAX`.
    pub(crate) fn environment_name(&self) -> String {
        format!("{}{}", super::layers::ENVIRONMENT_PREFIX, self.name.to_ascii_uppercase())
    }

    /// The doc comment as one paragraph.
    pub(crate) fn paragraph(&self) -> String {
        self.doc.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    }

    /// The first sentence of the doc comment, without its full stop.
    pub(crate) fn summary(&self) -> String {
        let paragraph = self.paragraph();
        let sentence = paragraph.split_once(". ").map_or(paragraph.as_str(), |(first, _)| first);
        sentence.trim_end_matches('.').to_owned()
    }
}

/// Settings that belong together: a chapter of the reference page, a struct in the code.
#[derive(Debug)]
pub(crate) struct Group {
    /// Title of the chapter.
    pub(crate) title: &'static str,
    /// What the chapter is about.
    pub(crate) doc: &'static [&'static str],
    /// In the order of declaration.
    pub(crate) settings: &'static [Setting],
}

/// A struct of settings that [`settings!`] declared.
pub(crate) trait Declared: Sized {
    /// What was declared.
    const GROUP: Group;

    /// Takes each setting from the highest layer that has it. What does not parse becomes a problem, and the default
    /// stands in, so that one pass finds every problem.
    fn resolve(layers: &Layers, origins: &mut Origins, problems: &mut Vec<Problem>) -> Self;

    /// Each setting's name and value as text, secrets included, in the order of declaration.
    fn texts(&self) -> Vec<(&'static str, String)>;
}

/// Declares a [`Group`] as a struct. A row is `name: Type = default => marks;` where `marks` are `common`, `advanced`
/// and `secret`.
macro_rules! settings {
    (
        $(#[doc = $group_doc:literal])*
        pub(crate) struct $group:ident from $title:literal {
            $(
                $(#[doc = $doc:literal])*
                $name:ident: $type:ty = $default:expr => $audience:ident $($secret:ident)?;
            )*
        }
    ) => {
        $(#[doc = $group_doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub(crate) struct $group {
            $(
                $(#[doc = $doc])*
                pub(crate) $name: $type,
            )*
        }

        impl $crate::settings::declare::Declared for $group {
            const GROUP: $crate::settings::declare::Group = $crate::settings::declare::Group {
                title: $title,
                doc: &[$($group_doc),*],
                settings: &[$(
                    $crate::settings::declare::Setting {
                        name: stringify!($name),
                        doc: &[$($doc),*],
                        audience: $crate::settings::declare::settings!(@audience $audience),
                        secret: $crate::settings::declare::settings!(@secret $($secret)?),
                        form: <$type as $crate::settings::value::Value>::FORM,
                        expected: <$type as $crate::settings::value::Value>::EXPECTED,
                        placeholder: <$type as $crate::settings::value::Value>::PLACEHOLDER,
                        choices: <$type as $crate::settings::value::Value>::CHOICES,
                        default: || $crate::settings::value::Value::show(&{ let value: $type = $default; value }),
                    },
                )*],
            };

            fn resolve(
                layers: &$crate::settings::layers::Layers,
                origins: &mut $crate::settings::layers::Origins,
                problems: &mut Vec<$crate::settings::problem::Problem>,
            ) -> Self {
                Self { $($name: layers.take(stringify!($name), origins, problems).unwrap_or_else(|| $default),)* }
            }

            fn texts(&self) -> Vec<(&'static str, String)> {
                vec![$((stringify!($name), $crate::settings::value::Value::show(&self.$name)),)*]
            }
        }
    };
    (@audience common) => { $crate::settings::declare::Audience::Common };
    (@audience advanced) => { $crate::settings::declare::Audience::Advanced };
    (@secret) => { false };
    (@secret secret) => { true };
}
pub(crate) use settings;

/// Where the file layer comes from: itself a setting, so that it has a flag and an environment name. A file cannot name
/// another file.
pub(crate) const CONFIG: Setting = Setting {
    name: "config",
    doc: &[
        "TOML file with settings. Keys are the names on this page; flags and environment variables override it.",
    ],
    audience: Audience::Common,
    secret: false,
    form: Form::Text,
    expected: <PathBuf as super::value::Value>::EXPECTED,
    placeholder: "FILE",
    choices: &[],
    default: || super::value::UNSET.to_owned(),
};
