//! `forebay doctor`: what was found out about each attached engine, what is missing, and the flag that mends it.
//!
//! In: the settings of `serve`. Out: a line for each finding, or JSON. Start at [`run`]. It asks the engines themselves;
//! no server needs to run.

use std::collections::BTreeMap;

use forebay_engines::{
    CacheSight,
    remote::{Attached, Examination, Severity},
};
use serde::Serialize;
use tokio::runtime::Handle;

use crate::{
    exit::Exit,
    serve,
    settings::{Settings, engine_spec::EngineSpec},
    terminal::{Paint, Terminal, Tone, without_controls},
};

/// One engine, for programs.
#[derive(Serialize)]
struct Report {
    engine: String,
    url: String,
    usable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    found: Option<Found>,
    findings: Vec<Line>,
}

#[derive(Serialize)]
struct Found {
    kind: &'static str,
    model: String,
    role: forebay_types::Role,
    dp_ranks: u16,
    context_tokens_max: u32,
    block_size_tokens: u32,
    blocks_total: u32,
    tokens: bool,
    text: bool,
    kv_events: bool,
    can_export: bool,
    can_import: bool,
    kv_layout: String,
}

#[derive(Serialize)]
struct Line {
    severity: &'static str,
    what: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

/// Examines every attached engine of the settings.
///
/// # Errors
/// Settings that cannot be used. An engine that cannot is a finding, and exit code 1.
pub(crate) async fn run(
    settings: &Settings,
    environment: &BTreeMap<String, String>,
    json: bool,
    terminal: Terminal,
) -> anyhow::Result<Exit> {
    let specs: Vec<_> = settings.engines.engine.iter().filter_map(EngineSpec::attached).collect();
    if specs.is_empty() {
        terminal.err("no engine is attached by URL: give `--engine http://HOST:PORT`\n");
        return Ok(Exit::Usage);
    }
    let launchers = serve::attached_launchers(settings, environment, &Handle::current())?;
    let mut usable = true;
    let mut reports = Vec::new();
    for (spec, launcher) in specs.into_iter().zip(launchers) {
        let examination = launcher.examine().await;
        usable &= examination.attached.is_ok();
        if json {
            reports.push(report(spec.name(), spec.url.clone(), &examination));
        } else {
            terminal.out(&text(&spec.name(), &spec.url, &examination, terminal.paint_out))?;
        }
    }
    if json {
        terminal.out(&format!("{}\n", serde_json::to_string_pretty(&reports)?))?;
    }
    Ok(if usable { Exit::Ok } else { Exit::Failure })
}

fn report(engine: String, url: String, examination: &Examination) -> Report {
    let lines = examination.findings.iter().map(|finding| Line {
        severity: finding.severity.name(),
        what: finding.what.to_string(),
        mend: finding.mend.as_ref().map(ToString::to_string),
    });
    Report {
        engine,
        url,
        usable: examination.attached.is_ok(),
        found: examination.attached.as_ref().ok().map(found),
        findings: lines.collect(),
    }
}

fn found(attached: &Attached) -> Found {
    let facts = &attached.facts;
    Found {
        kind: facts.kind,
        model: facts.model.to_string(),
        role: facts.role,
        dp_ranks: facts.dp_ranks,
        context_tokens_max: facts.context_tokens_max,
        block_size_tokens: facts.block_size_tokens,
        blocks_total: facts.blocks_total,
        tokens: facts.accepts.tokens,
        text: facts.accepts.body,
        kv_events: facts.cache_sight == CacheSight::Events,
        can_export: facts.kv.can_export,
        can_import: facts.kv.can_import,
        kv_layout: format!("{:016x}", facts.kv.layout),
    }
}

fn text(name: &str, url: &str, examination: &Examination, paint: Paint) -> String {
    let mut out = format!("{} {}\n", paint.tone(Tone::Strong, name), paint.tone(Tone::Faint, url));
    let mut line = |tone: Tone, mark: &str, text: &str| {
        out += &format!("  {} {}\n", paint.tone(tone, mark), without_controls(text));
    };
    match &examination.attached {
        Ok(attached) => {
            let found = found(attached);
            let yes = |yes: bool| if yes { "yes" } else { "no" };
            let ranks =
                if found.dp_ranks == 1 { "1 rank".to_owned() } else { format!("{} ranks", found.dp_ranks) };
            let summary = format!(
                "{}, model {}, {ranks}, context {} tokens, {} KV blocks of {} tokens",
                found.kind,
                found.model,
                found.context_tokens_max,
                found.blocks_total,
                found.block_size_tokens
            );
            line(Tone::Good, "ok", &summary);
            let abilities = format!(
                "tokens in and out: {}; KV events: {}; hands KV over: {}; takes KV in: {}",
                yes(found.tokens),
                yes(found.kv_events),
                yes(found.can_export),
                yes(found.can_import)
            );
            line(Tone::Good, "ok", &abilities);
        }
        Err(error) => line(Tone::Bad, "error", &error.to_string()),
    }
    for finding in examination.findings.iter() {
        let tone = match finding.severity {
            Severity::Info => Tone::Faint,
            Severity::Warning => Tone::Warning,
            Severity::Error => Tone::Bad,
        };
        line(tone, finding.severity.name(), &finding.what);
        if let Some(mend) = &finding.mend {
            line(Tone::Plain, "  ->", mend);
        }
    }
    out
}
