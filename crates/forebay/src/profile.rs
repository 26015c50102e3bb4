//! `forebay profile`: measures a live engine into a profile that placement and the twin use.
//!
//! In: flags. Out: a profile, and how far it is from each measured point. What is measured, in which order, and what the
//! measurements make is decided by `forebay-profiler`; this sends the requests and reads the times. Start at [`run`].

mod prober;
mod prompts;
mod report;
mod streams;
mod target;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use forebay_profiler::{Fit, FitError, Outcome, Scope, Subject, Survey, fit, plan};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{sleep_until, timeout},
};

use self::{
    prober::Prober,
    target::{Shared, Target},
};
use crate::{
    cli::ProfileArgs,
    exit::{Exit, Failed, unless_interrupted},
    files::{folder_of, write_whole},
    serve::entropy,
    terminal::Terminal,
};

/// How long an engine is looked at before it is believed to be idle.
const IDLE_FOR: Duration = Duration::from_secs(1);
/// How much longer than there is time the last measurement may take.
const GRACE: Duration = Duration::from_secs(5);
/// Share of the time that finding out the engine's token budget may take.
const BUDGET_SHARE: f64 = 0.05;
/// Characters of the text that says what was measured.
const MEASURED_MAX: usize = 256;

/// The command.
///
/// # Errors
/// An engine that cannot be used, is busy or dies; a file that cannot be written; too little time for any profile.
pub(crate) async fn run(
    args: &ProfileArgs,
    environment: &BTreeMap<String, String>,
    terminal: Terminal,
) -> anyhow::Result<Exit> {
    let mut interrupts = signal(SignalKind::interrupt())?;
    let out = args.out.clone();
    check_folder(out.as_deref().unwrap_or(Path::new(".")))?;
    let attached = async {
        let shared = Shared::new()?;
        let engine = Target::attach(&args.engine, 1, environment, &shared).await?;
        let pair = match &args.pair {
            Some(spec) => Some(Target::attach(spec, 2, environment, &shared).await?),
            None => None,
        };
        check(args, &engine, pair.as_ref(), terminal).await?;
        anyhow::Ok((engine, pair))
    };
    let Some((engine, pair)) = unless_interrupted(&mut interrupts, attached).await.transpose()? else {
        return Ok(Exit::Interrupted);
    };
    let out = out.unwrap_or_else(|| PathBuf::from(format!("{}.profile.json", slug(&engine.facts.model))));
    let mut session =
        Session { args, engine: &engine, pair: pair.as_ref(), terminal, survey: None, step_tokens: 0 };
    let measured = unless_interrupted(&mut interrupts, session.measure()).await;
    terminal.progress("");
    session.end(measured, &out)
}

/// One run of the command, once its engines are known.
struct Session<'a> {
    args: &'a ProfileArgs,
    engine: &'a Target,
    pair: Option<&'a Target>,
    terminal: Terminal,
    /// What was measured; outlives an interrupt.
    survey: Option<Survey>,
    step_tokens: u32,
}

impl Session<'_> {
    async fn measure(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        let seconds_max = 60.0 * self.args.minutes;
        let seed = entropy();
        let mut prober = Prober::new(self.engine, self.pair, seed);
        prober.ignores_others = self.args.even_if_busy;
        let mut scope = self.scope();
        self.terminal.progress("first requests");
        let mut pace = prober.warm_up(seed, scope.longest()).await?;
        self.step_tokens = match self.args.step_tokens {
            Some(tokens) => {
                prober.set_step_tokens(tokens);
                tokens
            }
            None => prober.find_step_tokens(&pace, scope.longest(), BUDGET_SHARE * seconds_max).await?,
        };
        (scope.step_tokens, pace.step_tokens) = (self.step_tokens, self.step_tokens);
        let survey = Survey::new(plan(&scope), pace, seconds_max);
        let elapsed = began.elapsed().as_secs_f64();
        self.terminal.err(&format!(
            "{}: {} points, about {}; steps of {} tokens. Ctrl-C ends it.\n",
            self.engine.facts.engine,
            survey.points().len(),
            report::duration(survey.seconds_left(elapsed)),
            self.step_tokens
        ));
        let survey = self.survey.insert(survey);
        while let Some(index) = survey.next(began.elapsed().as_secs_f64()) {
            let elapsed = began.elapsed().as_secs_f64();
            let left = survey.seconds_left(elapsed);
            let point = survey.points()[index].point;
            let now = format!("{} {point}", point.kind().name());
            self.terminal.progress(&report::progress(elapsed / (elapsed + left), &now, left));
            let started = Instant::now();
            let limit = Duration::from_secs_f64((seconds_max - elapsed).max(0.0)) + GRACE;
            let outcome = timeout(limit, prober.measure(point)).await.unwrap_or(Ok(Outcome::Missed))?;
            survey.took(index, outcome, started.elapsed().as_secs_f64());
        }
        Ok(())
    }

    fn scope(&self) -> Scope {
        let facts = &self.engine.facts;
        let others = self.pair.map(|pair| &pair.facts);
        let context = others
            .map_or(facts.context_tokens_max, |its| its.context_tokens_max.min(facts.context_tokens_max));
        Scope {
            context_tokens_max: context,
            pool_tokens: u64::from(facts.blocks_total) * u64::from(facts.block_size_tokens),
            block_size_tokens: facts.block_size_tokens,
            step_tokens: facts.step_tokens_max,
            prompt_tokens_max: self.args.prompt_tokens_max,
            sequences_max: self.args.sequences_max,
            caches: true,
            hands_over: self.pair.is_some(),
        }
    }

    /// Writes the profile and says how good it is. `measured`: `None` after an interrupt.
    fn end(&self, measured: Option<anyhow::Result<()>>, out: &Path) -> anyhow::Result<Exit> {
        let fitted = self.fit();
        match measured {
            Some(Ok(())) => {}
            cut_short => {
                let partial = PathBuf::from(format!("{}.partial", out.display()));
                let kept = fitted.ok().map(|fit| write_whole(&partial, &json_of(&fit)));
                let kept = match kept {
                    Some(Ok(())) => format!("; what was measured until then made {}", partial.display()),
                    _ => String::new(),
                };
                self.terminal.err(&format!("{} was not written{kept}\n", out.display()));
                return cut_short.map_or(Ok(Exit::Interrupted), |measured| measured.map(|()| Exit::Failure));
            }
        }
        let (points, disturbed) = match &self.survey {
            Some(survey) => (survey.points(), survey.disturbed()),
            None => (&[][..], 0),
        };
        let fit = fitted.map_err(|error| self.no_profile(&error, disturbed))?;
        write_whole(out, &json_of(&fit))?;
        let written = out.display().to_string();
        if self.args.json {
            self.terminal.out(&report::document(&fit, points, disturbed, &written))?;
        } else {
            self.terminal.out(&report::text(&fit, points, self.terminal.width(), self.terminal.paint_out))?;
            self.terminal
                .out(&format!("{written} is written: give it to `forebay serve --profile {written}`\n"))?;
        }
        if disturbed > 0 {
            self.terminal
                .err(&format!("{disturbed} measurements were disturbed by others and do not count\n"));
        }
        Ok(Exit::Ok)
    }

    fn fit(&self) -> Result<Fit, FitError> {
        let facts = &self.engine.facts;
        let version = self.engine.attached.layout.version.as_deref().unwrap_or("");
        let about = self.args.about.as_deref().map_or(String::new(), |about| format!(", {about}"));
        let measured = format!(
            "{} {version}, {}{about}; steps of {} tokens; by forebay profile {}",
            facts.kind,
            facts.model,
            self.step_tokens,
            env!("CARGO_PKG_VERSION")
        );
        let name = self.args.name.clone().unwrap_or_else(|| slug(&facts.model));
        let subject = Subject {
            name: name.chars().take(MEASURED_MAX).collect(),
            measured: measured.chars().take(MEASURED_MAX).collect(),
            step_tokens: self.step_tokens,
            layout: self.args.kv_layout.into(),
        };
        fit(self.survey.as_ref().map_or(&[], Survey::points), &subject)
    }

    fn no_profile(&self, error: &FitError, disturbed: u32) -> anyhow::Error {
        let mend = if disturbed > 0 {
            format!(
                "{disturbed} measurements were disturbed by others: take the engine out of service, or --even-if-busy"
            )
        } else {
            "give it more --minutes".to_owned()
        };
        Failed { exit: Exit::Failure, sentence: format!("no profile: {error}; {mend}") }.into()
    }
}

fn json_of(fit: &Fit) -> Vec<u8> {
    let mut json = serde_json::to_vec_pretty(&fit.file).expect("numbers and texts are JSON");
    json.push(b'\n');
    json
}

/// Whether the engines can be measured now.
async fn check(
    args: &ProfileArgs,
    engine: &Target,
    pair: Option<&Target>,
    terminal: Terminal,
) -> anyhow::Result<()> {
    let refuse = |sentence: String| anyhow::Error::from(Failed { exit: Exit::Failure, sentence });
    if let Some(sentence) = pair.and_then(|pair| engine.cannot_hand_to(pair)) {
        return Err(refuse(sentence));
    }
    if engine.facts.dp_ranks > 1 {
        terminal.err(&format!(
            "{} has {} ranks: the first is measured, as if each stepped alone\n",
            engine.facts.engine, engine.facts.dp_ranks
        ));
    }
    if args.even_if_busy {
        return Ok(());
    }
    for target in [Some(engine), pair].into_iter().flatten() {
        let name = &target.facts.engine;
        let before = target.look().await;
        sleep_until(tokio::time::Instant::now() + IDLE_FOR).await;
        let (Some(before), Some(after)) = (before, target.look().await) else {
            return Err(refuse(format!(
                "whether others use {name} cannot be seen: it has no /metrics (vLLM: start it without --disable-log-stats; \
                 SGLang: with --enable-metrics); if nobody does, say --even-if-busy"
            )));
        };
        let moved = after.prompt_tokens > before.prompt_tokens || after.output_tokens > before.output_tokens;
        let requests = before.requests.max(after.requests);
        if moved || requests > 0.0 {
            let how_many = match requests as u64 {
                1 => "1 request runs or waits".to_owned(),
                requests => format!("{requests} requests run or wait"),
            };
            return Err(refuse(format!(
                "{name} serves others ({how_many}): take it out of service first \
                 (`forebay drain`), or say --even-if-busy and slow them down"
            )));
        }
    }
    Ok(())
}

/// A name that any file system and shell takes: `org/Model-8B` is `model-8b`.
fn slug(model: &str) -> String {
    let last = model.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c.to_ascii_lowercase() } else { '-' }
    };
    let slug: String = last.trim_start_matches('.').chars().map(plain).take(64).collect();
    if slug.is_empty() { "engine".to_owned() } else { slug }
}

fn check_folder(out: &Path) -> anyhow::Result<()> {
    let folder = folder_of(out);
    if folder.is_dir() && !out.is_dir() || out == Path::new(".") {
        return Ok(());
    }
    let sentence = format!("--out {}: give a file in a folder that exists", out.display());
    Err(Failed { exit: Exit::Usage, sentence }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_name_files() {
        for (model, expected) in [
            ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
            ("/models/My Model/", "my-model"),
            ("../..", "engine"),
            ("", "engine"),
        ] {
            assert_eq!(slug(model), expected, "{model}");
        }
    }
}
