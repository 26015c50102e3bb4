//! What a setting's type must be able to do, and the plain types that can.

use std::{
    net::SocketAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    time::Duration,
};

use super::units;

/// What stands for "not set" where a value is shown.
pub(crate) const UNSET: &str = "(not set)";

/// How a value is written on a command line and in a TOML file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Text only.
    Text,
    /// A whole number in a file.
    Integer,
    /// Any number in a file.
    Number,
    /// `true` or `false`; the flag alone means `true`.
    Switch,
    /// A number, or text with a unit.
    Quantity,
    /// The flag may be repeated; an array in a file.
    List,
    /// As [`Form::List`]; in a file each may also be a table.
    Engines,
}

/// A type that a setting may have. The same text form serves flags, environment variables and files.
pub(crate) trait Value: Sized {
    /// How it is written.
    const FORM: Form;
    /// What it is, for error texts: `a duration such as 10s`.
    const EXPECTED: &'static str;
    /// What stands for it in help texts: `DURATION`.
    const PLACEHOLDER: &'static str;
    /// The only texts that are allowed; empty if there are too many to list.
    const CHOICES: &'static [&'static str] = &[];

    /// Reads the text form.
    ///
    /// # Errors
    /// What is wrong beyond "not what was expected", or an empty text.
    fn parse(text: &str) -> Result<Self, String>;

    /// Reads every text that one layer gave; one unless the form is [`Form::List`].
    ///
    /// # Errors
    /// As [`Value::parse`].
    fn parse_all(texts: &[String]) -> Result<Self, String> {
        match texts {
            [one] => Self::parse(one),
            _ => Err("one value is allowed".to_owned()),
        }
    }

    /// The text form, which parses back to the same value.
    fn show(&self) -> String;
}

/// Implements [`Value`] by `FromStr` and `Display`.
macro_rules! plain_value {
    ($type:ty, $form:ident, $expected:literal, $placeholder:literal, $read:expr) => {
        impl Value for $type {
            const FORM: Form = Form::$form;
            const EXPECTED: &'static str = $expected;
            const PLACEHOLDER: &'static str = $placeholder;

            fn parse(text: &str) -> Result<Self, String> {
                let read: fn(&str) -> Option<$type> = $read;
                read(text).ok_or_else(String::new)
            }

            fn show(&self) -> String {
                self.to_string()
            }
        }
    };
}

/// Digits with underscores between them, as TOML and Rust write them.
fn digits(text: &str) -> String {
    text.replace('_', "")
}

plain_value!(SocketAddr, Text, "an IP address and a port such as 127.0.0.1:8080", "ADDR:PORT", |text| text
    .parse()
    .ok());
plain_value!(u8, Integer, "a whole number from 0 to 255", "N", |text| digits(text).parse().ok());
plain_value!(u32, Integer, "a whole number", "N", |text| digits(text).parse().ok());
plain_value!(NonZeroU32, Integer, "a whole number of at least 1", "N", |text| digits(text).parse().ok());
plain_value!(NonZeroUsize, Integer, "a whole number of at least 1", "N", |text| digits(text).parse().ok());
plain_value!(f64, Number, "a number of at least 0", "X", |text| {
    digits(text).parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0)
});
plain_value!(bool, Switch, "true or false", "BOOL", |text| match text {
    "true" | "1" | "yes" | "on" => Some(true),
    "false" | "0" | "no" | "off" => Some(false),
    _ => None,
});

impl Value for PathBuf {
    const FORM: Form = Form::Text;
    const EXPECTED: &'static str = "a path";
    const PLACEHOLDER: &'static str = "PATH";

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Err("the path is empty".to_owned()) } else { Ok(PathBuf::from(text)) }
    }

    fn show(&self) -> String {
        self.display().to_string()
    }
}

impl Value for Duration {
    const FORM: Form = Form::Quantity;
    const EXPECTED: &'static str = "a duration such as 10s, 500ms, 2m or 1h (a bare number is seconds)";
    const PLACEHOLDER: &'static str = "DURATION";

    fn parse(text: &str) -> Result<Self, String> {
        units::parse_duration(text).ok_or_else(String::new)
    }

    fn show(&self) -> String {
        units::show_duration(*self)
    }
}

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ByteCount(pub(crate) u64);

impl ByteCount {
    /// For sizes of things in memory. What does not fit is more than memory, so the most that does fit is as good.
    pub(crate) fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl Value for ByteCount {
    const FORM: Form = Form::Quantity;
    const EXPECTED: &'static str = "a size such as 4MiB, 512KiB or 1GB (a bare number is bytes)";
    const PLACEHOLDER: &'static str = "SIZE";

    fn parse(text: &str) -> Result<Self, String> {
        units::parse_bytes(text).map(ByteCount).ok_or_else(String::new)
    }

    fn show(&self) -> String {
        units::show_bytes(self.0)
    }
}

/// A setting that may be left unset. An empty text means unset, so that an environment can undo what a file says.
impl<T: Value> Value for Option<T> {
    const FORM: Form = T::FORM;
    const EXPECTED: &'static str = T::EXPECTED;
    const PLACEHOLDER: &'static str = T::PLACEHOLDER;
    const CHOICES: &'static [&'static str] = T::CHOICES;

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Ok(None) } else { T::parse(text).map(Some) }
    }

    fn show(&self) -> String {
        self.as_ref().map_or_else(|| UNSET.to_owned(), T::show)
    }
}
