//! The command line of `bench`.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use forebay_loadgen::Promise;

use super::{
    positive_duration,
    simulate::{positive, slo},
};
use crate::settings::parse_duration;

/// Flags of `bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Address of the server: http://HOST:PORT. For https use a local proxy that speaks TLS.
    #[arg(long, value_name = "URL")]
    pub(crate) url: String,
    /// Model to ask; by default the only one that the server lists.
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Environment variable that holds the key; by default `FOREBAY_API_KEY`, if it is set.
    #[arg(long, value_name = "VAR", conflicts_with = "key_file")]
    pub(crate) key_env: Option<String>,
    /// File that holds the key.
    #[arg(long, value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
    /// Ask for whole answers. Then no time to the first token is seen, nor between tokens.
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// So many requests at once, the next as soon as one has ended.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) concurrency: u32,
    /// Requests a second, at times of chance, whatever the server does. With `--turns`: conversations that begin.
    #[arg(long, value_name = "R", conflicts_with = "concurrency", value_parser = positive)]
    pub(crate) rate: Option<f64>,
    /// Requests to send, to each target and in each slice.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) requests: Option<u64>,
    /// Start requests for so long; 30s unless `--requests` is given. Those that run are waited for.
    #[arg(long, value_name = "DURATION", value_parser = positive_duration)]
    pub(crate) duration: Option<Duration>,
    /// Requests sent before, which do not count.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) warmup: u64,
    /// Length of what is asked, in words of about a token.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) prompt_tokens: u32,
    /// Length of an answer. The server is asked to go on when the model would stop.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) output_tokens: u32,
    /// Length of a system prompt that sessions of a group share.
    #[arg(long, value_name = "T", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(crate) shared_tokens: u32,
    /// Groups, each with a system prompt of its own.
    #[arg(long, value_name = "G", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), requires = "shared_tokens")]
    pub(crate) groups: u32,
    /// Requests of a conversation. Each sends all that was said before.
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) turns: u32,
    /// Time between an answer and the next turn.
    #[arg(long, value_name = "S", default_value = "0s", value_parser = duration, requires = "turns")]
    pub(crate) think: Duration,
    /// A request that takes longer has failed.
    #[arg(long, value_name = "DURATION", default_value = "600s", value_parser = positive_duration)]
    pub(crate) timeout: Duration,
    /// What prompts and arrivals are drawn from. One seed, the same bytes; by default a fresh one, which is printed.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// What a client is promised, such as ttft=500ms,itl=30ms: how many requests keep it.
    #[arg(long, value_name = "SLO", conflicts_with = "no_stream", value_parser = promise)]
    pub(crate) slo: Option<Promise>,
    /// A second server, measured in turns with the first.
    #[arg(long, value_name = "URL2")]
    pub(crate) against: Option<String>,
    /// Turns of each of both, with fresh prompts in each. Fewer than six cannot tell a difference from noise.
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=1_000), requires = "against")]
    pub(crate) slices: u32,
    /// A process of this host: its CPU seconds for 1,000 requests and its peak memory. Repeat the flag for more.
    #[arg(long, value_name = "NAME=PID", value_parser = watch)]
    pub(crate) watch: Vec<(String, u32)>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the JSON here too.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
}

/// As `simulate` reads it, but what is not named is not promised, and an idle engine's time is not known.
fn promise(text: &str) -> Result<Promise, String> {
    let read = slo(text)?;
    let names = |name: &str| text.split(',').any(|part| part.split('=').next() == Some(name));
    if names("prefills") {
        return Err(
            "`prefills` is for simulations; give ttft and itl, such as ttft=500ms,itl=30ms".to_owned()
        );
    }
    let or_none = |name: &str, seconds: f64| if names(name) { seconds } else { f64::INFINITY };
    Ok(Promise {
        ttft_seconds: or_none("ttft", read.ttft_seconds),
        itl_seconds: or_none("itl", read.itl_seconds),
    })
}

fn duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "expected a duration such as 2s or 500ms".to_owned())
}

fn watch(text: &str) -> Result<(String, u32), String> {
    let pair = text.split_once('=').and_then(|(name, pid)| Some((name.to_owned(), pid.parse().ok()?)));
    pair.filter(|(name, pid)| !name.is_empty() && *pid > 0)
        .ok_or_else(|| "expected a name and a process id, such as router=4711".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_is_promised() {
        let read = promise("ttft=500ms").unwrap();
        assert_eq!((read.ttft_seconds, read.itl_seconds), (0.5, f64::INFINITY));
        assert!(promise("itl=30ms,prefills=2").unwrap_err().contains("simulations"));
        assert!(promise("soon").is_err());
    }

    #[test]
    fn processes_have_names() {
        assert_eq!(watch("router=12"), Ok(("router".to_owned(), 12)));
        for wrong in ["12", "=12", "router=", "router=x", "router=0"] {
            assert!(watch(wrong).is_err(), "{wrong}");
        }
    }
}
