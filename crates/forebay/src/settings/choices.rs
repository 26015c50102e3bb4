//! Settings whose values are names, keys or filters.

use std::{fmt, path::PathBuf};

use forebay_kv_hash::HashKey;
use forebay_placement::Policy;
use forebay_registry::EtcdLocation;
pub(crate) use forebay_registry::HostPort;
use tracing_subscriber::EnvFilter;

use super::{
    nearest::nearest,
    value::{Form, Value},
};

/// Which model the engines serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ModelChoice {
    /// SmolLM2-135M-Instruct, from the model folder.
    Smollm2,
    /// Seeded random weights: nothing to download, nothing to say.
    RandomTiny,
    /// A GGUF file.
    File(PathBuf),
}

impl ModelChoice {
    const NAMES: [&'static str; 2] = ["smollm2-135m", "random-tiny"];
}

impl fmt::Display for ModelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelChoice::Smollm2 => f.write_str("smollm2-135m"),
            ModelChoice::RandomTiny => f.write_str("random-tiny"),
            ModelChoice::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Value for ModelChoice {
    const FORM: Form = Form::Text;
    const EXPECTED: &'static str =
        "smollm2-135m, random-tiny or the path of a GGUF file (with a `/` in it, or ending in .gguf)";
    const PLACEHOLDER: &'static str = "PATH|NAME";

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "smollm2-135m" => Ok(ModelChoice::Smollm2),
            "random-tiny" => Ok(ModelChoice::RandomTiny),
            _ if text.contains('/') || text.ends_with(".gguf") => Ok(ModelChoice::File(PathBuf::from(text))),
            _ => {
                Err(nearest(text, Self::NAMES)
                    .map_or(String::new(), |near| format!("did you mean `{near}`?")))
            }
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for Policy {
    const FORM: Form = Form::Text;
    const EXPECTED: &'static str =
        "one of cost, round-robin, least-load, random, power-of-two, prefix-affinity, lmetric, dynamo";
    const PLACEHOLDER: &'static str = "NAME";
    const CHOICES: &'static [&'static str] = &[
        "cost",
        "round-robin",
        "least-load",
        "random",
        "power-of-two",
        "prefix-affinity",
        "lmetric",
        "dynamo",
    ];

    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| {
            nearest(text, Self::CHOICES.iter().copied())
                .map_or(String::new(), |near| format!("did you mean `{near}`?"))
        })
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for HostPort {
    const FORM: Form = Form::Text;
    const EXPECTED: &'static str = "a host and a port such as gateway-0.example:8082";
    const PLACEHOLDER: &'static str = "HOST:PORT";

    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|error: forebay_registry::RecordError| error.to_string())
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// Where gateways announce themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RegistryUrl {
    /// As written, without a password.
    shown: String,
    pub(crate) location: EtcdLocation,
}

impl Value for RegistryUrl {
    const FORM: Form = Form::Text;
    const EXPECTED: &'static str = "the URL of a registry such as etcd://10.0.0.5:2379,10.0.0.6:2379/fleet-a";
    const PLACEHOLDER: &'static str = "URL";

    fn parse(text: &str) -> Result<Self, String> {
        let location = EtcdLocation::parse(text).map_err(|error| error.to_string())?;
        let shown = match (text.rsplit_once('@'), &location.password) {
            (Some((_, rest)), Some(_)) => format!("etcd://***@{rest}"),
            _ => text.to_owned(),
        };
        Ok(Self { shown, location })
    }

    fn show(&self) -> String {
        self.shown.clone()
    }
}

/// Shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// For machines: one object a line.
    Json,
}

impl Value for LogFormat {
    const FORM: Form = Form::Text;
    const EXPECTED: &'static str = "text or json";
    const PLACEHOLDER: &'static str = "FORMAT";
    const CHOICES: &'static [&'static str] = &["text", "json"];

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err(String::new()),
        }
    }

    fn show(&self) -> String {
        match self {
            LogFormat::Text => "text".to_owned(),
            LogFormat::Json => "json".to_owned(),
        }
    }
}

/// Which log lines are written: checked when settings are read, made when logging starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogFilter(String);

impl LogFilter {
    /// A filter known to be right.
    pub(crate) fn literal(directives: &'static str) -> Self {
        Self(directives.to_owned())
    }

    /// The filter itself.
    pub(crate) fn filter(&self) -> EnvFilter {
        EnvFilter::builder().parse_lossy(&self.0)
    }
}

impl Value for LogFilter {
    const FORM: Form = Form::Text;
    const EXPECTED: &'static str =
        "a level (error, warn, info, debug, trace, off) or directives such as info,forebay_gateway=debug";
    const PLACEHOLDER: &'static str = "FILTER";

    fn parse(text: &str) -> Result<Self, String> {
        // A bare word would be taken for the name of a crate, and silence everything else: a level was meant.
        let levels = ["error", "warn", "info", "debug", "trace", "off"];
        for directive in text.split(',').filter(|directive| !directive.contains(['=', ':', '['])) {
            if !levels.contains(&directive.to_ascii_lowercase().as_str()) {
                let near = nearest(directive, levels)
                    .map_or(String::new(), |near| format!("; did you mean `{near}`?"));
                return Err(format!("`{directive}` is no level{near}"));
            }
        }
        match EnvFilter::builder().parse(text) {
            Ok(_) => Ok(Self(text.to_owned())),
            Err(error) => Err(error.to_string()),
        }
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

impl Value for HashKey {
    const FORM: Form = Form::Text;
    const EXPECTED: &'static str = "32 hexadecimal digits";
    const PLACEHOLDER: &'static str = "HEX";

    fn parse(text: &str) -> Result<Self, String> {
        let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
        let digits = digits.ok_or_else(String::new)?;
        let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
        match <[u8; 16]>::try_from(bytes) {
            Ok(key) if digits.len() == 32 => Ok(HashKey(key)),
            _ => Err(format!("there are {}", digits.len())),
        }
    }

    /// Never the key itself.
    fn show(&self) -> String {
        "(hidden)".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_a_known_name_or_plainly_a_path() {
        let check = |text: &str, expected: Result<ModelChoice, &str>| {
            assert_eq!(ModelChoice::parse(text), expected.map_err(ToOwned::to_owned), "{text}");
        };
        check("smollm2-135m", Ok(ModelChoice::Smollm2));
        check("random-tiny", Ok(ModelChoice::RandomTiny));
        check("./model", Ok(ModelChoice::File("./model".into())));
        check("model.gguf", Ok(ModelChoice::File("model.gguf".into())));
        check("smollm2-135", Err("did you mean `smollm2-135m`?"));
        check("llama", Err(""));
    }

    #[test]
    fn log_filters_are_checked_when_read() {
        let check = |text: &str, expected: Result<(), &str>| {
            let result = LogFilter::parse(text).map(|_| ());
            match expected {
                Ok(()) => assert_eq!(result, Ok(()), "{text}"),
                Err(part) => assert!(result.clone().is_err_and(|e| e.contains(part)), "{text}: {result:?}"),
            }
        };
        check("info", Ok(()));
        check("INFO", Ok(()));
        check("warn,forebay_gateway=debug", Ok(()));
        check("off,forebay[request{id=7}]=trace", Ok(()));
        check("inf", Err("`inf` is no level; did you mean `info`?"));
        check("forebay=loud", Err("expected one of"));
    }

    #[test]
    fn a_hash_key_is_read_whole_and_never_shown() {
        let text = "000102030405060708090a0b0c0d0e0F";
        assert_eq!(HashKey::parse(text), Ok(HashKey::GOLDEN));
        assert_eq!(HashKey::GOLDEN.show(), "(hidden)");
        for wrong in
            ["", "00", &text[..31], &format!("{text}0"), &format!("{text}00"), &text.replace('0', "g")]
        {
            assert!(HashKey::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_policy_on_the_list_parses_and_shows_itself() {
        assert_eq!(Policy::CHOICES, Policy::ALL.map(Policy::name));
        for name in Policy::CHOICES {
            assert_eq!(Policy::parse(name).map(|policy| policy.show()), Ok((*name).to_owned()));
            assert!(Policy::EXPECTED.contains(name));
        }
        assert_eq!(Policy::parse("rond-robin"), Err("did you mean `round-robin`?".to_owned()));
    }
}
