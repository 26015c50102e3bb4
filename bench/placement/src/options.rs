//! The command line.

use std::{path::PathBuf, time::Duration};

use forebay_admission::GatherSettings;
use forebay_fleet::LoadSight;
use forebay_placement::Weights;
use forebay_planner::LeaningSettings;
use forebay_types::FirstToken;

use forebay_twin::{
    BUDGET_TOKENS, Defaults, Delivery, EngineSpec, GatewaySettings, Rule, RunSettings, SLO, Slo, Time,
    Workload,
};

pub const USAGE: &str = "forebay-bench-placement COMMAND [OPTIONS]
  run      one run (with --policies, one for each)
  goodput  the highest rate with 95 % of requests within the SLO
  table    goodput of every policy, then each at 40, 70 and 95 % of that of least-load
  check    replay a recorded run on one engine: check FILE
  time     how long one placement takes: look-up, choice, record, reservation
options
  --workload five-turn|fresh|trace|stand-in|moe    trace reads the file that MOONCAKE_TRACE names
  --policy NAME, --policies NAME,NAME|all          of placement, sticky, static-2p6d
  --rate R, --rate-step R                          requests a second; between the rates that a search tries
  --seed S, --seeds N                              the first seed; how many
  --engines N, --dp-ranks N                        engines; ranks of each, which step together
  --seconds T, --warm-up T                         the measured window; before it
  --budget TOKENS[,TOKENS], --blocks N             of a step, engine by engine; of a rank's KV pool
  --chunk TOKENS[,TOKENS]                          of one prompt in a step, engine by engine
  --block-tokens TOKENS                            of a KV block, in pools as large
  --imports first|in-order                         whether decode legs wait behind prompts; vLLM's do
  --weights JSON                                   of placement's cost
  --gateways N                                     gateways that share the load and do not know each other's
  --gather WAIT_MS,WEIGHT                          how long prompts wait to share a step at most; what a stall is worth
  --leanings on|off                                whether engines are kept for a phase
  --first-token handed|of-decode                   which leg of a split sends it
  --model profile|learned                          what placement starts from: the engines' profile, or five rates
  --delivery asynchronous|with-step                when tokens leave an engine
  --report-delay-ms D                              until the gateway has a rank's report
  --sight steps|sampled                            whether ranks report every step, or are asked once a second
  --slo TTFT_S,PREFILLS,ITL_S                      0.5,2,0.025
  --json                                           of run and check; the others write nothing else to standard output";

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Run,
    Goodput,
    Table,
    Check,
    Time,
}

#[derive(Debug, Clone)]
pub struct Options {
    pub command: Command,
    pub workload: Workload,
    /// All of them if empty.
    pub rules: Vec<Rule>,
    pub rate: Option<f64>,
    pub rate_step: Option<f64>,
    pub seed: u64,
    pub seeds: Option<u64>,
    pub engines: Option<usize>,
    pub dp_ranks: Option<u16>,
    pub seconds: Option<f64>,
    pub warm_up: Option<f64>,
    /// Engine by engine, over again where there are more engines.
    pub budgets: Vec<u32>,
    pub chunks: Vec<u32>,
    pub imports_first: bool,
    /// Tokens of a KV block, of pools as large.
    pub block_tokens: Option<u32>,
    pub blocks: Option<u32>,
    pub weights: Weights,
    pub gather: GatherSettings,
    pub leanings: bool,
    pub first_token: FirstToken,
    pub profiled: bool,
    pub gateways: usize,
    pub delivery: Delivery,
    pub report_delay_ms: f64,
    pub sight: LoadSight,
    pub slo: Slo,
    pub json: bool,
    /// Of `check`.
    pub files: Vec<PathBuf>,
}

impl Options {
    /// # Errors
    /// What is wrong, for a person; the usage if that was asked for.
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let command = match arguments.next().as_deref() {
            Some("run") => Command::Run,
            Some("goodput") => Command::Goodput,
            Some("table") => Command::Table,
            Some("check") => Command::Check,
            Some("time") => Command::Time,
            Some(other) if other != "--help" => return Err(format!("unknown command {other}\n{USAGE}")),
            _ => return Err(USAGE.to_owned()),
        };
        let mut options = Self {
            command,
            workload: Workload::FiveTurn,
            rules: vec![],
            rate: None,
            rate_step: None,
            seed: 1,
            seeds: None,
            engines: None,
            dp_ranks: None,
            seconds: None,
            warm_up: None,
            budgets: vec![BUDGET_TOKENS],
            chunks: vec![],
            imports_first: false,
            block_tokens: None,
            blocks: None,
            weights: Weights::default(),
            gather: GatherSettings::default(),
            leanings: true,
            first_token: FirstToken::Handed,
            profiled: true,
            gateways: 1,
            delivery: Delivery::Asynchronous,
            report_delay_ms: 0.0,
            sight: LoadSight::EveryStep,
            slo: SLO,
            json: false,
            files: vec![],
        };
        while let Some(name) = arguments.next() {
            options.take(&name, &mut arguments)?;
        }
        options.check()?;
        Ok(options)
    }

    fn take(&mut self, name: &str, rest: &mut impl Iterator<Item = String>) -> Result<(), String> {
        if name == "--help" {
            return Err(USAGE.to_owned());
        }
        if name == "--json" {
            self.json = true;
            return Ok(());
        }
        if !name.starts_with("--") {
            self.files.push(name.into());
            return Ok(());
        }
        let value = rest.next().ok_or_else(|| format!("{name} needs a value\n{USAGE}"))?;
        let value = value.as_str();
        match name {
            "--workload" => self.workload = value.parse()?,
            "--policy" | "--policies" if value == "all" => self.rules.clear(),
            "--policy" | "--policies" => {
                self.rules = value.split(',').map(str::parse).collect::<Result<_, _>>()?
            }
            "--rate" => self.rate = Some(number(name, value)?),
            "--rate-step" => self.rate_step = Some(number(name, value)?),
            "--seed" => self.seed = number(name, value)?,
            "--seeds" => self.seeds = Some(number(name, value)?),
            "--engines" => self.engines = Some(number(name, value)?),
            "--dp-ranks" => self.dp_ranks = Some(number(name, value)?),
            "--seconds" => self.seconds = Some(number(name, value)?),
            "--warm-up" => self.warm_up = Some(number(name, value)?),
            "--budget" => {
                self.budgets = value.split(',').map(|value| number(name, value)).collect::<Result<_, _>>()?
            }
            "--chunk" => {
                self.chunks = value.split(',').map(|value| number(name, value)).collect::<Result<_, _>>()?
            }
            "--imports" if value == "first" => self.imports_first = true,
            "--imports" if value == "in-order" => self.imports_first = false,
            "--block-tokens" => self.block_tokens = Some(number(name, value)?),
            "--blocks" => self.blocks = Some(number(name, value)?),
            "--weights" => {
                self.weights = serde_json::from_str(value).map_err(|error| format!("{name}: {error}"))?
            }
            "--gateways" => self.gateways = number(name, value)?,
            "--leanings" if value == "on" => self.leanings = true,
            "--leanings" if value == "off" => self.leanings = false,
            "--gather" => self.gather = gather(value)?,
            "--first-token" if value == "handed" => self.first_token = FirstToken::Handed,
            "--first-token" if value == "of-decode" => self.first_token = FirstToken::OfDecode,
            "--model" if value == "profile" => self.profiled = true,
            "--model" if value == "learned" => self.profiled = false,
            "--delivery" if value == "asynchronous" => self.delivery = Delivery::Asynchronous,
            "--delivery" if value == "with-step" => self.delivery = Delivery::WithStep,
            "--report-delay-ms" => self.report_delay_ms = number(name, value)?,
            "--sight" if value == "steps" => self.sight = LoadSight::EveryStep,
            "--sight" if value == "sampled" => self.sight = LoadSight::Sampled,
            "--slo" => self.slo = slo(value)?,
            _ => return Err(format!("{name} {value}: unknown\n{USAGE}")),
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        self.weights.validate().map_err(|error| format!("--weights: {error}"))?;
        let above_0 = |name: &str, value: Option<f64>| match value {
            Some(value) if !(value.is_finite() && value > 0.0) => Err(format!("{name}: must be above 0")),
            _ => Ok(()),
        };
        above_0("--rate", self.rate)?;
        above_0("--rate-step", self.rate_step)?;
        above_0("--seconds", self.seconds)?;
        above_0("--engines, --dp-ranks", Some(self.engines() as f64 * f64::from(self.dp_ranks())))?;
        let least = self.budgets.iter().min().copied().unwrap_or(0);
        above_0("--block-tokens", self.block_tokens.map(f64::from))?;
        above_0("--budget, --blocks", Some(f64::from(least) * f64::from(self.blocks.unwrap_or(1))))?;
        above_0("--gateways", Some(self.gateways as f64))?;
        above_0("--seeds", self.seeds.map(|seeds| seeds as f64))?;
        let waits = self.report_delay_ms.min(self.warm_up.unwrap_or(0.0));
        if !(waits.is_finite() && waits >= 0.0) {
            return Err("--warm-up, --report-delay-ms: must not be below 0".to_owned());
        }
        for rule in &self.rules {
            if rule.engines().is_some_and(|engines| engines != self.engines()) {
                return Err(format!("{rule} is not for {} engines", self.engines()));
            }
        }
        Ok(())
    }

    fn defaults(&self) -> Defaults {
        self.workload.defaults()
    }

    pub fn engines(&self) -> usize {
        self.engines.unwrap_or(self.defaults().engines)
    }

    fn dp_ranks(&self) -> u16 {
        self.dp_ranks.unwrap_or(self.defaults().dp_ranks)
    }

    pub fn rate(&self) -> f64 {
        self.rate.unwrap_or(self.defaults().rate)
    }

    pub fn rate_step(&self) -> f64 {
        self.rate_step.unwrap_or(self.defaults().rate_step)
    }

    /// The seeds of one figure, or so many as it has if none is asked for.
    pub fn seeds(&self, usual: u64) -> impl Iterator<Item = u64> + Clone + use<> {
        self.seed..self.seed + self.seeds.unwrap_or(usual)
    }

    /// Those asked for, or all.
    pub fn rules(&self) -> Vec<Rule> {
        if !self.rules.is_empty() {
            return self.rules.clone();
        }
        let hands_over = self.workload.engine_kind(self.budgets[0], self.blocks).hands_over();
        Rule::all(self.engines(), hands_over)
    }

    /// The run that this asks for.
    pub fn run_settings(&self, rule: Rule, seed: u64) -> RunSettings {
        let defaults = self.defaults();
        let warm_up = self.warm_up.unwrap_or(defaults.warm_up_seconds);
        let end = Time::from_seconds(warm_up + self.seconds.unwrap_or(defaults.seconds));
        RunSettings {
            gateway: self.gateway_settings(rule, seed),
            gateways: self.gateways,
            delivery: self.delivery,
            report_delay_seconds: self.report_delay_ms / 1e3,
            warm_up: Time::from_seconds(warm_up),
            ..RunSettings::new(self.fleet(rule), rule, seed, end)
        }
    }
}

impl Options {
    fn fleet(&self, rule: Rule) -> Vec<EngineSpec> {
        let engine = |number: usize| {
            let mut kind = self.workload.engine_kind(self.budgets[number % self.budgets.len()], self.blocks);
            kind.scheduler.imports_first = self.imports_first;
            if let Some(tokens) = self.block_tokens {
                let scheduler = &mut kind.scheduler;
                let all = u64::from(scheduler.blocks_total) * u64::from(scheduler.block_size_tokens);
                scheduler.blocks_total = (all / u64::from(tokens)) as u32;
                scheduler.block_size_tokens = tokens;
            }
            if !self.chunks.is_empty() {
                kind.scheduler.chunk_tokens_max = self.chunks[number % self.chunks.len()];
            }
            EngineSpec {
                kind,
                dp_ranks: self.dp_ranks(),
                role: rule.role(number),
                gpus: u32::from(self.dp_ranks()),
                startup: Time::ZERO,
            }
        };
        (0..self.engines()).map(engine).collect()
    }

    /// The deciding half of that run.
    pub fn gateway_settings(&self, rule: Rule, seed: u64) -> GatewaySettings {
        GatewaySettings {
            rule,
            weights: self.weights,
            gather: self.gather,
            leanings: LeaningSettings { enabled: self.leanings, ..LeaningSettings::default() },
            first_token: self.first_token,
            sight: self.sight,
            profiled: self.profiled,
            seed,
        }
    }
}

fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{name} {text}: not a number that fits"))
}

fn gather(text: &str) -> Result<GatherSettings, String> {
    let wrong = || format!("--gather {text}: two numbers from 0 up, like 250,1");
    let (wait_ms, weight) = text.split_once(',').ok_or_else(wrong)?;
    let [wait_ms, stall_weight]: [f64; 2] = [number("--gather", wait_ms)?, number("--gather", weight)?];
    if !(0.0..=1e6).contains(&wait_ms) || !(0.0..=1e6).contains(&stall_weight) {
        return Err(wrong());
    }
    Ok(GatherSettings { wait_max: Duration::from_secs_f64(wait_ms / 1e3), stall_weight })
}

fn slo(text: &str) -> Result<Slo, String> {
    let numbers: Vec<f64> = text.split(',').map(|part| number("--slo", part)).collect::<Result<_, _>>()?;
    match numbers[..] {
        [ttft_seconds, ttft_prefills, itl_seconds] => Ok(Slo { ttft_seconds, ttft_prefills, itl_seconds }),
        _ => Err(format!("--slo {text}: three numbers, like 0.5,2,0.025")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Options, String> {
        Options::parse(text.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_override_what_belongs_to_the_workload() {
        let options =
            parse("run --workload fresh --policy static-3p5d --engines 8 --rate 10 --seconds 20").unwrap();
        let settings = options.run_settings(options.rules()[0], 4);
        assert_eq!((settings.engines.len(), settings.engines[7].dp_ranks, options.rate()), (8, 1, 10.0));
        assert_eq!(settings.end, Time::from_seconds(30.0));
        assert_eq!(
            parse("table --workload moe").unwrap().run_settings(Rule::Sticky, 1).engines[0].dp_ranks,
            8
        );
        assert_eq!(parse("run --slo 0.5,0,0.02").unwrap().slo.itl_seconds, 0.02);
        assert_eq!(parse(r#"run --weights {"harm":0.1}"#).unwrap().weights.harm, 0.1);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for wrong in [
            "",
            "walk",
            "run --rate 0",
            "run --engines 0",
            "run --policy static-2p6d",
            "run --slo 1",
            "run --seeds 0",
            "run --warm-up -1",
            "run --weights {\"harm\":-1}",
            "run --nonsense 1",
            "run --rate",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
