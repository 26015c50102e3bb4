//! What is said of an engine when it is registered, checked.

use std::fmt;

use forebay_engines::remote::{Dialled, KvSource, ZmqAddress};
use forebay_proto::limits::{BLOCK_SIZE_TOKENS_MAX, DP_RANKS_MAX, NAME_BYTES_MAX};

use super::refused::Refused;

/// Bytes of a topic.
const TOPIC_BYTES_MAX: usize = 1024;

/// An engine as it is registered. [`Default`] is one without a name: fill in `name` and `model`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EngineSpec {
    /// What it is called: visible ASCII without `/`.
    pub name: String,
    /// Under which prompts are hashed.
    pub model: String,
    /// Where its ranks publish KV events: one for each, or that of rank 0. None: it is fed by hand.
    pub events: Vec<String>,
    /// Where they can be asked for again.
    pub replay: Vec<String>,
    /// 0: as many as there are addresses, or one.
    pub dp_ranks: u32,
    /// Tokens of its own blocks, if known.
    pub block_size_tokens: Option<u32>,
    /// What to subscribe to.
    pub topic: String,
}

/// An engine whose specification is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedSpec {
    /// As it was said.
    pub spec: EngineSpec,
    /// Ranks, at least one.
    pub dp_ranks: u16,
    /// Where each publishes; none if it is fed by hand.
    pub sources: Vec<Dialled>,
}

impl EngineSpec {
    /// Reads `name=a,model=M,events=tcp://HOST:PORT[,replay=tcp://HOST:PORT][,dp-ranks=N][,block-size=N][,topic=T]`;
    /// `events` and `replay` may be repeated, one for each rank.
    ///
    /// # Errors
    /// A sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut spec = Self::default();
        for option in text.split(',') {
            let (name, value) = option.split_once('=').ok_or_else(|| {
                format!("`{option}` is no option; write name=NAME,model=MODEL,events=tcp://HOST:PORT")
            })?;
            let number = || value.parse().map_err(|_| format!("{name} is `{value}`; give a whole number"));
            match name {
                "name" => spec.name = value.to_owned(),
                "model" => spec.model = value.to_owned(),
                "events" => spec.events.push(value.to_owned()),
                "replay" => spec.replay.push(value.to_owned()),
                "topic" => spec.topic = value.to_owned(),
                "dp-ranks" => spec.dp_ranks = number()?,
                "block-size" => spec.block_size_tokens = Some(number()?),
                _ => {
                    return Err(format!(
                        "unknown option `{name}`; known are name, model, events, replay, dp-ranks, block-size, topic"
                    ));
                }
            }
        }
        match spec.clone().check() {
            Ok(_) => Ok(spec),
            Err(refused) => Err(refused.message),
        }
    }

    /// Checks what can be known without looking at other engines.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(self) -> Result<CheckedSpec, Refused> {
        name("name", &self.name)?;
        if self.name.contains('/') || !self.name.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Refused::value(
                "name",
                "`name` must be visible ASCII without `/`, such as host-8000",
            ));
        }
        name("model", &self.model)?;
        if self.topic.len() > TOPIC_BYTES_MAX {
            return Err(Refused::value("topic", format!("`topic` has more than {TOPIC_BYTES_MAX} bytes")));
        }
        if let Some(size) = self.block_size_tokens.filter(|size| !(1..=BLOCK_SIZE_TOKENS_MAX).contains(size))
        {
            let message = format!("`block_size_tokens` is {size}; give 1 to {BLOCK_SIZE_TOKENS_MAX}");
            return Err(Refused::value("block_size_tokens", message));
        }
        let addresses = self.events.len();
        let dp_ranks = if self.dp_ranks > 0 { self.dp_ranks as usize } else { addresses.max(1) };
        if dp_ranks > usize::from(DP_RANKS_MAX) {
            let message = format!("{dp_ranks} DP ranks, and at most {DP_RANKS_MAX} are taken");
            return Err(Refused::value("dp_ranks", message));
        }
        if addresses > 1 && addresses != dp_ranks {
            let message = format!(
                "`events` has {addresses} addresses for {dp_ranks} DP ranks; give one for each rank, or that of rank 0 alone"
            );
            return Err(Refused::value("events", message));
        }
        if !self.replay.is_empty() && self.replay.len() != addresses {
            let message = format!(
                "`replay` has {} addresses and `events` {addresses}; give as many, or no `replay`",
                self.replay.len()
            );
            return Err(Refused::value("replay", message));
        }
        let sources = self.sources(dp_ranks)?;
        Ok(CheckedSpec { dp_ranks: dp_ranks as u16, sources, spec: self })
    }

    fn sources(&self, dp_ranks: usize) -> Result<Vec<Dialled>, Refused> {
        for (param, addresses) in [("events", &self.events), ("replay", &self.replay)] {
            for address in addresses {
                let read = ZmqAddress::parse(address);
                let read = read.map_err(|error| Refused::value(param, error.to_string()))?;
                if read.is_wildcard() {
                    let message = format!("{address} names all addresses of a host; give the one to dial");
                    return Err(Refused::value(param, message));
                }
            }
        }
        let source = |dp_rank: u16, index: usize| KvSource {
            dp_rank,
            events: self.events[index].clone(),
            replay: self.replay.get(index).cloned(),
            topic: self.topic.clone(),
        };
        let sources: Vec<KvSource> = match self.events.len() {
            0 => return Ok(Vec::new()),
            1 => (0..dp_ranks as u16).map(|rank| source(0, 0).of_rank(rank)).collect::<Result<_, _>>(),
            _ => Ok((0..dp_ranks as u16).map(|rank| source(rank, rank.into())).collect()),
        }
        .map_err(|error| Refused::value("events", error.to_string()))?;
        let dialled = sources.iter().map(|source| source.dialled(""));
        dialled.collect::<Result<_, _>>().map_err(|error| Refused::value("events", error.to_string()))
    }
}

impl fmt::Display for EngineSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.model)
    }
}

/// A name of a model, an engine or an adapter.
pub(crate) fn name(param: &'static str, text: &str) -> Result<(), Refused> {
    let wrong = match text {
        "" => "is missing or empty; give one".to_owned(),
        _ if text.len() > NAME_BYTES_MAX => format!("has more than {NAME_BYTES_MAX} bytes"),
        _ if text.chars().any(char::is_control) => "has control characters in it".to_owned(),
        _ => return Ok(()),
    };
    Err(Refused::value(param, format!("`{param}` {wrong}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> EngineSpec {
        EngineSpec { name: "a".into(), model: "m".into(), ..EngineSpec::default() }
    }

    #[test]
    fn one_address_stands_for_all_ranks() {
        let check = |text: &str, expected: &[(&str, Option<&str>)]| {
            let checked = EngineSpec::parse(text).unwrap().check().unwrap();
            let sources: Vec<_> = checked
                .sources
                .iter()
                .map(|source| (source.events.to_string(), source.replay.as_ref().map(ToString::to_string)))
                .collect();
            let expected: Vec<_> = expected
                .iter()
                .map(|(events, replay)| ((*events).to_owned(), replay.map(ToOwned::to_owned)))
                .collect();
            assert_eq!(sources, expected, "{text}");
        };
        check("name=a,model=m", &[]);
        check("name=a,model=m,events=tcp://h:5557", &[("tcp://h:5557", None)]);
        check(
            "name=a,model=m,events=tcp://h:5557,replay=tcp://h:6557,dp-ranks=2",
            &[("tcp://h:5557", Some("tcp://h:6557")), ("tcp://h:5558", Some("tcp://h:6558"))],
        );
        check(
            "name=a,model=m,events=tcp://h:1,events=tcp://i:9",
            &[("tcp://h:1", None), ("tcp://i:9", None)],
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        let check = |text: &str, part: &str| {
            let error = EngineSpec::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        };
        check("a", "`a` is no option");
        check("name=a", "`model` is missing or empty");
        check("model=m", "`name` is missing or empty");
        check("name=a/b,model=m", "without `/`");
        check("name=a b,model=m", "visible ASCII");
        check("name=a,model=m,color=red", "unknown option `color`");
        check("name=a,model=m,dp-ranks=x", "give a whole number");
        check("name=a,model=m,dp-ranks=2000", "at most 1024");
        check("name=a,model=m,block-size=0", "give 1 to 65536");
        check("name=a,model=m,events=h:5557", "is not a TCP endpoint");
        check("name=a,model=m,events=tcp://h", "has no valid port");
        check("name=a,model=m,events=tcp://*:5557", "give the one to dial");
        check("name=a,model=m,events=tcp://h:1,events=tcp://h:2,dp-ranks=3", "2 addresses for 3 DP ranks");
        check("name=a,model=m,events=tcp://h:1,replay=tcp://h:2,replay=tcp://h:3", "give as many");
        check("name=a,model=m,replay=tcp://h:2", "give as many");
        check("name=a,model=m,events=tcp://h:65535,dp-ranks=2", "has no valid port");
        assert!(EngineSpec { name: "x".repeat(257), ..spec() }.check().is_err());
        assert!(EngineSpec { model: "x\ny".into(), ..spec() }.check().is_err());
        assert!(EngineSpec { topic: "x".repeat(1025), ..spec() }.check().is_err());
    }
}
