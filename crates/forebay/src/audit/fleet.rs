//! The engines that are looked at: found, and checked to be of one kind and to say enough.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use anyhow::Context as _;
use forebay_audit::{Bench, Inferred, Reading};
use forebay_engine_wire::metrics::{Scrape, read_histograms};
use forebay_engines::{
    CacheSight,
    remote::{
        AttachError, Attached, Dialled, Examination,
        client::{Endpoint, Limits},
    },
};
use forebay_perf_model::Profile;
use forebay_twin::{EngineEntry, FleetFile, HandOver};
use tokio::runtime::Handle;

use crate::{
    cli::AuditArgs,
    exit::{Exit, Failed},
    serve,
    settings::{Settings, engine_spec::EngineSpec},
    terminal::{Terminal, Tone, without_controls},
};

/// Bytes of one answer of `/metrics`.
const METRICS_BYTES_MAX: usize = 8 << 20;
/// What metrics must have, and in which words of vLLM and SGLang: of each row one.
const NEEDED: [&[&str]; 4] = [
    &["time_to_first_token_seconds_bucket"],
    &["inter_token_latency_seconds_bucket", "time_per_output_token_seconds_bucket"],
    &["prompt_tokens_total"],
    &["generation_tokens_total"],
];

/// One engine.
pub(super) struct Engine {
    pub(super) name: String,
    pub(super) endpoint: Endpoint,
    /// Its first seat; its ranks have one each, in order.
    pub(super) seat: usize,
    pub(super) ranks: u16,
    /// The number by which its first rank goes in its figures.
    pub(super) first_rank: u16,
    pub(super) events: Vec<Dialled>,
    /// Why its events are not heard.
    pub(super) blind: Option<Arc<str>>,
    blocks_total: u32,
    block_size_tokens: u32,
    step_tokens_max: u32,
}

/// All of them.
pub(super) struct Fleet {
    pub(super) engines: Vec<Engine>,
    pub(super) model: String,
}

impl Fleet {
    /// Reads what the engines of the settings say of themselves.
    ///
    /// # Errors
    /// An engine that is none, cannot be reached or lacks metrics; engines of different models or block sizes.
    pub(super) async fn find(
        settings: &Settings,
        environment: &BTreeMap<String, String>,
        terminal: Terminal,
    ) -> anyhow::Result<Self> {
        let specs: Vec<_> = settings.engines.engine.iter().filter_map(EngineSpec::attached).collect();
        if specs.is_empty() {
            let sentence =
                "no engine is named: give `--engine http://HOST:PORT` for each of the fleet".to_owned();
            return Err(Failed { exit: Exit::Usage, sentence }.into());
        }
        let launchers = serve::attached_launchers(settings, environment, &Handle::current())?;
        let looks: Vec<_> = launchers
            .into_iter()
            .map(|launcher| tokio::spawn(async move { (launcher.look().await, launcher.endpoint().clone()) }))
            .collect();
        let mut fleet = Self { engines: Vec::new(), model: String::new() };
        let mut kind = None;
        for (spec, look) in specs.into_iter().zip(looks) {
            let name = spec.name();
            let (Examination { attached, .. }, endpoint) = look.await?;
            let attached = attached.map_err(|error| unusable(&name, &error))?;
            check_metrics(&name, &endpoint, &attached).await?;
            let its = (attached.facts.model.to_string(), attached.facts.block_size_tokens);
            let first = kind.get_or_insert_with(|| its.clone());
            if *first != its {
                return Err(different(&fleet.engines[0].name, first, &name, &its).into());
            }
            fleet.model.clone_from(&its.0);
            fleet.engines.push(engine(name, endpoint, attached, fleet.seats()));
        }
        for engine in &fleet.engines {
            if let Some(why) = &engine.blind {
                let label = terminal.paint_err.tone(Tone::Warning, "warning:");
                terminal.err(&format!(
                    "{label} {}: {}; what its prompts share is then known in the mean alone\n",
                    engine.name,
                    without_controls(why)
                ));
            }
        }
        Ok(fleet)
    }

    /// Ranks of all engines.
    pub(super) fn seats(&self) -> usize {
        self.engines.iter().map(|engine| usize::from(engine.ranks)).sum()
    }

    /// The same fleet in the twin: each rank an engine of its own.
    ///
    /// # Errors
    /// If the profile and the engines' sizes do not go together.
    pub(super) fn bench(
        &self,
        inferred: &Inferred,
        args: &AuditArgs,
        profile: &Arc<Profile>,
    ) -> anyhow::Result<Bench> {
        let block_size_tokens = inferred.block_tokens;
        let mut file = FleetFile::of(0);
        file.engine = self
            .engines
            .iter()
            .map(|engine| {
                let tokens = u64::from(engine.blocks_total) * u64::from(engine.block_size_tokens);
                EngineEntry {
                    count: u32::from(engine.ranks),
                    gpus: (args.gpus / u32::from(engine.ranks.max(1))).max(1),
                    blocks: u32::try_from(tokens / u64::from(block_size_tokens)).unwrap_or(u32::MAX),
                    block_size_tokens,
                    step_tokens_max: engine.step_tokens_max,
                    // What a connector would allow is not asked, so nothing is handed over.
                    hand_over: HandOver::None,
                    ..EngineEntry::default()
                }
            })
            .collect();
        let engines = file.engines(&|_| Ok(profile.clone())).context("the fleet cannot be simulated")?;
        Ok(Bench { engines, slow: 1.0 })
    }
}

impl Engine {
    /// Reads its metrics: of each seat what it says.
    pub(super) async fn read(
        &self,
        began: Instant,
        within: std::time::Duration,
    ) -> anyhow::Result<Vec<(usize, Reading)>> {
        let body = metrics(&self.endpoint, within).await?;
        let (scrape, mut histograms) = (Scrape::read(&body), read_histograms(&body));
        let at_seconds = began.elapsed().as_secs_f64();
        let ranks = (0..self.ranks).map(|rank| {
            let number = self.first_rank + rank;
            let figures = scrape.ranks.get(&number).copied().unwrap_or_default();
            let histograms = histograms.remove(&number).unwrap_or_default();
            (self.seat + usize::from(rank), Reading { at_seconds, figures, histograms })
        });
        Ok(ranks.collect())
    }
}

async fn metrics(endpoint: &Endpoint, within: std::time::Duration) -> anyhow::Result<bytes::Bytes> {
    let limits = Limits { body_bytes_max: METRICS_BYTES_MAX, deadline: Instant::now() + within };
    Ok(endpoint.get("/metrics", limits).await?.body)
}

fn engine(name: String, endpoint: Endpoint, attached: Attached, seat: usize) -> Engine {
    let Attached { facts, plan, .. } = attached;
    let blind = match &facts.cache_sight {
        CacheSight::Approximate { why } => Some(why.clone()),
        _ => None,
    };
    Engine {
        name,
        endpoint,
        seat,
        ranks: facts.dp_ranks.max(1),
        first_rank: plan.first_rank,
        events: plan.events,
        blind,
        blocks_total: facts.blocks_total,
        block_size_tokens: facts.block_size_tokens,
        step_tokens_max: facts.step_tokens_max,
    }
}

fn unusable(name: &str, error: &AttachError) -> Failed {
    let exit = if matches!(error, AttachError::Unreachable(_)) { Exit::Unreachable } else { Exit::Failure };
    let mend = error.mend().map_or(String::new(), |mend| format!("; {mend}"));
    Failed { exit, sentence: without_controls(&format!("engine {name}: {error}{mend}")) }
}

async fn check_metrics(name: &str, endpoint: &Endpoint, attached: &Attached) -> anyhow::Result<()> {
    let failed = |sentence: String| Failed { exit: Exit::Failure, sentence };
    if !attached.plan.metrics {
        let sentence = format!(
            "engine {name} has no /metrics of vLLM or SGLang, without which nothing is known of it: start vLLM without \
             --disable-log-stats, SGLang with --enable-metrics"
        );
        return Err(failed(sentence).into());
    }
    let body = metrics(endpoint, std::time::Duration::from_secs(5))
        .await
        .with_context(|| format!("engine {name}"))?;
    let text = String::from_utf8_lossy(&body);
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|names| !names.iter().any(|name| text.contains(name)))
        .map(|names| names[0])
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let sentence = format!(
        "the /metrics of engine {name} lack {}: without them there is nothing to compare with. Some engines show them only \
         after the first request",
        missing.join(", ")
    );
    Err(failed(sentence).into())
}

fn different(first: &str, of_first: &(String, u32), other: &str, of_other: &(String, u32)) -> Failed {
    let sentence = format!(
        "engine {first} serves {} in blocks of {} tokens, {other} serves {} in blocks of {}: audit the engines of each kind \
         by themselves",
        of_first.0, of_first.1, of_other.0, of_other.1
    );
    Failed { exit: Exit::Usage, sentence: without_controls(&sentence) }
}
