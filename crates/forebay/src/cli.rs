//! The command line: names, help texts and examples. What the commands do is in modules of their names.

mod audit;
mod bench;
mod engines;
mod index_server;
mod profile;
mod simulate;

pub(crate) use audit::AuditArgs;
pub(crate) use bench::BenchArgs;
pub(crate) use engines::{AgentArgs, DoctorArgs, EngineArgs, EngineKindArg, RoleArg};
pub(crate) use index_server::IndexServerArgs;
pub(crate) use profile::ProfileArgs;
pub(crate) use simulate::{ArrivalArgs, SimulateArgs, SizeArgs};

use clap::{Args, Parser, Subcommand, builder::styling, error::ErrorKind};
use std::{ffi::OsString, time::Duration};

use crate::{
    exit,
    settings::{SettingFlags, parse_duration},
    terminal::ColorWhen,
};

/// Where `forebay serve` listens for the public if nobody says otherwise.
const PUBLIC_URL: &str = "http://127.0.0.1:8080";
/// Where it listens for operators.
const ADMIN_URL: &str = "http://127.0.0.1:8081";

/// Turns a room full of inference engines into one fast, fair and explainable service.
///
/// `forebay serve` runs a whole fleet in one process: it sends each request to where its KV cache already is, splits
/// prefill from decode where that pays, moves the KV between engines, and can say afterwards why.
#[derive(Debug, Parser)]
#[command(name = "forebay", version, propagate_version = true, max_term_width = 110)]
#[command(subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = exit_codes_and("Start here:
  forebay serve                  serve a small real model on four engines of this process
  forebay chat                   talk to it
  forebay status --watch         see the engines work
  forebay explain --last         see why the last request ran where it ran"))]
pub(crate) struct Cli {
    /// When to colour; `NO_COLOR` is honoured.
    #[arg(long, global = true, value_name = "WHEN", value_enum, default_value_t = ColorWhen::Auto)]
    pub(crate) color: ColorWhen,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a fleet of engines behind one OpenAI-compatible address.
    #[command(after_help = "Examples:
  forebay serve
  forebay serve --engine embedded:2,role=prefill --engine embedded:2,role=decode
  forebay serve --engine sim:64 --sim-speed 0 --policy round-robin
  forebay serve --model random-tiny --listen 0.0.0.0:8080 --api-keys keys.txt
  forebay serve --config forebay.toml

Every setting can also come from the environment or from a TOML file: `forebay config reference`
explains them all, `forebay config show` tells what is in force and why. `-h` shows the common
settings, `--help` all of them.")]
    Serve {
        /// Settings.
        #[command(flatten)]
        settings: SettingFlags,
    },
    /// Run one engine of this program as a server of its own, in the words of vLLM: a whole fleet without GPUs.
    #[command(after_help = "Examples:
  forebay engine embedded --port 8000
  forebay engine sim --port 8001 --sim-speed 10 --role prefill
  forebay serve --engine vllm=http://127.0.0.1:8000 --engine vllm=http://127.0.0.1:8001

Prints its addresses as one line of JSON once it serves. FOREBAY_ENGINE_API_KEY holds the key that its
clients must send.")]
    Engine(EngineArgs),
    /// Start an engine, follow it, and speak for it to gateways.
    #[command(after_help = "Examples:
  forebay agent --join gateways.example:8082 -- vllm serve Qwen/Qwen3-8B --port 8000
  forebay agent --registry etcd://10.0.0.5:2379/prod --role prefill --advertise 10.0.0.7 -- vllm serve ...
  forebay agent --stop-engine --name host-8000

SIGTERM ends the agent alone: the engine serves on, and the next agent with the same name finds it (with
--stop-engine it ends both, after a drain, as Ctrl-C always does). Other signals go to the engine.")]
    Agent(AgentArgs),
    /// Serve the KV prefix index alone, over HTTP and gRPC, for a router of your own.
    #[command(after_help = "Examples:
  forebay index-server
  forebay index-server --engine name=a,model=m,events=tcp://10.0.0.7:5557,replay=tcp://10.0.0.7:5558
  FOREBAY_HASH_KEY=... forebay index-server --listen 0.0.0.0:8082 --insecure

Prints its addresses as one line of JSON once it serves. docs/index-server.md shows what can be asked.")]
    IndexServer(IndexServerArgs),
    /// Measure a live engine into a profile, which `serve` and `simulate` take.
    #[command(after_help = "Examples:
  forebay profile --engine http://10.0.0.7:8000
  forebay profile --engine http://h:8000,key-env=KEY --about 'one H100 80GB' --out h100-8b.json
  forebay profile --engine http://10.0.0.7:8000 --pair http://10.0.0.8:8000 --kv-layout cross-layer

The engine must be idle. It is sent made-up prompts of token ids, up to 128 at once.
Ctrl-C cancels what runs and writes no profile, but what was measured until then to FILE.partial.
docs/profile.md says how to read the errors.")]
    Profile(Box<ProfileArgs>),
    /// Put load on an OpenAI-compatible server and say how it bears it: TTFT, ITL, goodput.
    #[command(after_help = "Examples:
  forebay bench --url http://127.0.0.1:8080
  forebay bench --url http://10.0.0.7:8000 --rate 20 --duration 2m --slo ttft=500ms,itl=30ms
  forebay bench --url http://new:8080 --against http://old:8080 --requests 200 --slices 8
  forebay bench --url http://127.0.0.1:8080 --turns 5 --think 2s --shared-tokens 1000 --groups 8

Ctrl-C ends it and prints what was measured. docs/bench.md says what the figures mean.")]
    Bench(Box<BenchArgs>),
    /// Try a fleet and its policies in virtual time, on a trace or a generated workload.
    #[command(after_help = "Examples:
  forebay simulate --workload five-turn --engines 8 --rate 40 --policy cost,round-robin
  forebay simulate --fleet fleet.toml --trace conversation_trace.jsonl --speed x2 --report out.html
  forebay simulate --trace azure.csv --engines 16 --slo ttft=300ms,itl=20ms --policy all --json -

The cores that decide in production decide here; engines take what their measured profiles say. One seed,
one result, to the byte.")]
    Simulate(SimulateArgs),
    /// Find the smallest fleet that keeps a promise, by simulation.
    #[command(after_help = "Examples:
  forebay size --trace conversation_trace.jsonl --slo ttft=500ms,itl=30ms --gpus 64
  forebay size --workload five-turn --rate 60 --percentile p99 --slo ttft=300ms,itl=20ms
  forebay size --fleet fleet.toml --trace azure.csv --speed x4 --json -

Tries fleets whose engines are all alike, with large and small steps, fleets of which half have small steps,
and fixed splits; says which is the smallest of each shape, and what one engine less would break. Exit code 1
if no fleet keeps the promise; then it says which is nearest.")]
    Size(SizeArgs),
    /// Look on at a fleet that runs without Forebay, and say what it would gain: TTFT, ITL, cached share, GPU seconds.
    #[command(after_help = "Examples:
  forebay audit --engine http://10.0.0.7:8000 --engine http://10.0.0.8:8000
  forebay audit --engine http://10.0.0.7:8000,events=tcp://10.0.0.7:5557 --minutes 10 --fit
  forebay audit --config forebay.toml --record arrivals.jsonl --json report.json

Read only: metrics and KV events, never a request. What arrives is inferred and replayed in the twin as it seems to
be placed, round robin, and by Forebay. docs/audit.md says how to read the error bars.")]
    Audit(AuditArgs),
    /// Examine attached engines: what was found, what is missing, and the flag that mends it.
    #[command(after_help = "Examples:
  forebay doctor --engine http://10.0.0.7:8000
  forebay doctor --config forebay.toml
  forebay doctor --config forebay.toml --json | jq '.[] | select(.usable | not)'

Exit code 1 if an engine cannot be used.")]
    Doctor {
        /// How to print.
        #[command(flatten)]
        args: DoctorArgs,
        /// Settings, as `forebay serve` takes them.
        #[command(flatten)]
        settings: SettingFlags,
    },
    /// Chat in the terminal with Forebay or any OpenAI-compatible server.
    #[command(after_help = "Examples:
  forebay chat
  forebay chat -m 'Why is the sky blue?'
  git diff | forebay chat --system 'Review this change.' -m -
  FOREBAY_API_KEY=... forebay chat --url http://gateway:8080 --model smollm2-135m

Keys: Ctrl-C stops the answer, Ctrl-D leaves. Commands: /help /reset /explain")]
    Chat(ChatArgs),
    /// Show the fleet as a table.
    #[command(after_help = "Examples:
  forebay status
  forebay status --watch
  forebay status --json | jq '.data[] | select(.state != \"ready\")'")]
    Status(StatusArgs),
    /// Show why a request ran where it ran, and what else it would have cost.
    #[command(after_help = "Examples:
  forebay explain --last
  forebay explain 0f3c9a42
  forebay explain --last --json | jq .transfers

The id of a request is in the header x-request-id of its answer.")]
    Explain(ExplainArgs),
    /// List what was decided lately: the newest, the worst predicted or the slowest requests.
    #[command(after_help = "Examples:
  forebay decisions                        the newest
  forebay decisions --worst-error          whose time to the first token was predicted worst
  forebay decisions --slowest --engine e0  the slowest that ran on an engine
  forebay explain ID                       all about one of them")]
    Decisions(DecisionsArgs),
    /// Show or change how a running server places requests.
    #[command(subcommand)]
    #[command(after_help = "Examples:
  forebay policy show
  forebay policy set round-robin    takes effect with the next request: the kill switch
  forebay policy set cost")]
    Policy(PolicyCommand),
    /// Let an engine finish what runs and give it nothing new.
    #[command(after_help = "Examples:
  forebay drain vllm-3
  forebay drain host:8000 && forebay status --watch")]
    Drain(DrainArgs),
    /// Print the last lines that an engine logged; its agent keeps them.
    #[command(after_help = "Examples:
  forebay logs vllm-3
  forebay logs vllm-3 --lines 1000 | grep -i error")]
    Logs(LogsArgs),
    /// Show, check and document settings.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Make API keys.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Print a completion script for a shell.
    #[command(after_help = "Examples:
  forebay completions bash > ~/.local/share/bash-completion/completions/forebay
  forebay completions zsh  > \"${fpath[1]}/_forebay\"
  forebay completions fish > ~/.config/fish/completions/forebay.fish")]
    Completions {
        /// Which shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Print the version.
    Version,
}

/// Flags of `chat`.
#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// Address of the server.
    #[arg(long, value_name = "URL", env = "FOREBAY_URL", hide_env_values = true, default_value = PUBLIC_URL)]
    pub(crate) url: String,
    /// Address at which `/explain` asks.
    #[arg(long, value_name = "URL", env = "FOREBAY_ADMIN_URL", hide_env_values = true, default_value = ADMIN_URL)]
    pub(crate) admin_url: String,
    /// Model to talk to; by default the first one that the server lists.
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Ask this, print the answer alone, and leave. `-` reads the question from standard input.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) message: Option<String>,
    /// System prompt.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Sampling temperature; 0 always takes the likeliest token.
    #[arg(long, value_name = "X")]
    pub(crate) temperature: Option<f64>,
    /// Longest answer, in tokens.
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    /// Seed of the sampling: the same seed repeats the same answer.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Id for the request, to find it again with `forebay explain`.
    #[arg(long, value_name = "ID", requires = "message")]
    pub(crate) request_id: Option<String>,
    /// Messages of the conversation that are kept and sent; the oldest go first.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) history_max: u32,
}

/// Flags of `status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Admin address of the server.
    #[arg(long, value_name = "URL", env = "FOREBAY_ADMIN_URL", hide_env_values = true, default_value = ADMIN_URL)]
    pub(crate) admin_url: String,
    /// Print what the server sent, unchanged.
    #[arg(long)]
    pub(crate) json: bool,
    /// Again and again, until Ctrl-C.
    #[arg(long)]
    pub(crate) watch: bool,
    /// Time between two looks.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = positive_duration, requires = "watch")]
    pub(crate) interval: Duration,
}

/// Flags of `explain`.
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// Id of the request.
    #[arg(required_unless_present = "last", conflicts_with = "last")]
    pub(crate) id: Option<String>,
    /// The newest request.
    #[arg(long)]
    pub(crate) last: bool,
    /// Admin address of the server.
    #[arg(long, value_name = "URL", env = "FOREBAY_ADMIN_URL", hide_env_values = true, default_value = ADMIN_URL)]
    pub(crate) admin_url: String,
    /// Print the record as the server sent it.
    #[arg(long, conflicts_with = "inputs")]
    pub(crate) json: bool,
    /// Also show what was known of each engine when it was compared.
    #[arg(long)]
    pub(crate) inputs: bool,
}

/// Flags of `decisions`.
#[derive(Debug, Args)]
pub(crate) struct DecisionsArgs {
    /// Those first whose time to the first token was predicted worst.
    #[arg(long, conflicts_with = "slowest")]
    pub(crate) worst_error: bool,
    /// Those first with the longest time to the first token.
    #[arg(long)]
    pub(crate) slowest: bool,
    /// Only requests that ran on this engine.
    #[arg(long, value_name = "NAME")]
    pub(crate) engine: Option<String>,
    /// How many.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) limit: u32,
    /// Print the records as the server sent them.
    #[arg(long)]
    pub(crate) json: bool,
    /// Where.
    #[command(flatten)]
    pub(crate) door: AdminDoor,
}

/// What to do with the placement policy.
#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Print the policy in force.
    Show(AdminDoor),
    /// Change it from the next placement on. A restart goes back to the setting `policy`.
    Set {
        /// One of cost, round-robin, least-load, random, lmetric.
        name: forebay_placement::Policy,
        /// Where.
        #[command(flatten)]
        door: AdminDoor,
    },
}

/// The admin address of a server.
#[derive(Debug, Args)]
pub(crate) struct AdminDoor {
    /// Admin address of the server.
    #[arg(long, value_name = "URL", env = "FOREBAY_ADMIN_URL", hide_env_values = true, default_value = ADMIN_URL)]
    pub(crate) admin_url: String,
}

/// Flags of `drain`.
#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// Name of the engine, as `forebay status` shows it.
    pub(crate) engine: String,
    /// Where.
    #[command(flatten)]
    pub(crate) door: AdminDoor,
}

/// Flags of `logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Name of the engine, as `forebay status` shows it.
    pub(crate) engine: String,
    /// How many lines.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) lines: u32,
    /// Where.
    #[command(flatten)]
    pub(crate) door: AdminDoor,
}

/// What to do with settings.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print every setting with its value and where that came from.
    #[command(after_help = "Examples:
  forebay config show
  forebay config show --config forebay.toml --policy least-load
  FOREBAY_SIM_SPEED=2 forebay config show --json")]
    Show {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Settings, as `forebay serve` takes them.
        #[command(flatten)]
        settings: SettingFlags,
    },
    /// Read a settings file and say what is wrong with it. Nothing is started; flags and environment have no say.
    #[command(after_help = "Examples:
  forebay config check forebay.toml && systemctl restart forebay")]
    Check {
        /// The file.
        #[arg(value_hint = clap::ValueHint::FilePath)]
        file: String,
    },
    /// Print the reference of all settings, in Markdown.
    Reference,
}

/// What to do with API keys.
#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a new random key for a tenant. It is shown once; the file holds only its hash.
    #[command(after_help = "Examples:
  forebay keys add acme              prints the key and the line for the file
  forebay keys add acme >> keys.txt  writes the line, and shows the key on the terminal
  forebay serve --listen 0.0.0.0:8080 --api-keys keys.txt")]
    Add {
        /// Name of the tenant: visible ASCII without spaces, at most 64 characters.
        tenant: String,
    },
}

/// Reads the command line.
///
/// # Errors
/// What clap has to say: a mistake, or the help text that was asked for.
pub(crate) fn parse(arguments: &[OsString]) -> Result<Cli, clap::Error> {
    use clap::{CommandFactory as _, FromArgMatches as _};
    let color = match color_asked_for(arguments) {
        Some("always") => clap::ColorChoice::Always,
        Some("never") => clap::ColorChoice::Never,
        _ => clap::ColorChoice::Auto,
    };
    let mut command = Cli::command().color(color).styles(STYLES);
    let matches = command.try_get_matches_from_mut(arguments)?;
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

/// The exit code of what clap has to say: asking for help is no mistake.
pub(crate) fn exit_of(error: &clap::Error) -> exit::Exit {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => exit::Exit::Ok,
        _ => exit::Exit::Usage,
    }
}

/// Help texts are coloured before flags are read, so this one is looked for by hand.
fn color_asked_for(arguments: &[OsString]) -> Option<&str> {
    let mut words = arguments.iter().map_while(|word| word.to_str());
    while let Some(word) = words.next() {
        match word.split_once('=') {
            _ if word == "--" => return None,
            Some(("--color", when)) => return Some(when),
            None if word == "--color" => return words.next(),
            _ => {}
        }
    }
    None
}

const STYLES: styling::Styles = styling::Styles::styled()
    .header(styling::Style::new().bold())
    .usage(styling::Style::new().bold())
    .literal(styling::AnsiColor::Cyan.on_default())
    .placeholder(styling::Style::new().dimmed());

fn exit_codes_and(examples: &str) -> String {
    format!("{examples}\n\n{}", exit::HELP)
}

fn positive_duration(text: &str) -> Result<Duration, String> {
    parse_duration(text)
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "expected a duration such as 1s or 500ms".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples() {
        fn visit(command: &clap::Command, parent_has_some: bool) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let has_some = parent_has_some || help.contains("Examples:\n  ");
            if !command.has_subcommands() && !["version", "reference"].contains(&command.get_name()) {
                assert!(has_some, "{} has no examples", command.get_name());
            }
            command.get_subcommands().for_each(|command| visit(command, has_some));
        }
        visit(&Cli::command(), false);
    }

    #[test]
    fn color_is_found_before_parsing() {
        let check = |words: &[&str], expected: Option<&str>| {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            assert_eq!(color_asked_for(&words), expected, "{words:?}");
        };
        check(&["forebay", "--help"], None);
        check(&["forebay", "--color", "never", "--help"], Some("never"));
        check(&["forebay", "status", "--color=always"], Some("always"));
        check(&["forebay", "chat", "--", "--color=always"], None);
    }
}
