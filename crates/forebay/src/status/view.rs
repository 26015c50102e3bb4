//! The picture of a fleet, as text.

use forebay_gateway::{decisions::Accuracy, orchestrator::api::EngineStatus};
use forebay_types::{Leaning, RankLoad, Role};

use crate::{
    figures::{count, percent},
    table::{Align, Cell, Table},
    terminal::{Paint, Tone, without_controls},
};

/// A row for each engine, a line for all, and one for the predictions of each model.
pub(super) fn render(
    engines: &[EngineStatus],
    predictions: &[Accuracy],
    width: Option<usize>,
    paint: Paint,
) -> String {
    if engines.is_empty() {
        return "no engines\n".to_owned();
    }
    let mut table = Table::default()
        .text("ENGINE")
        .optional("KIND", Align::Left)
        .text("STATE")
        .text("ROLE")
        .number("RUNNING")
        .number("WAITING")
        .number("KV USED")
        .number("KV%")
        .number("HIT RATE")
        .optional("PREFILL SHARE", Align::Right)
        .optional("BREAKER", Align::Left)
        .optional("RESTARTS", Align::Right)
        .optional("MODEL", Align::Left);
    for engine in engines {
        table.row(row(engine));
    }
    let remarks: String = engines.iter().flat_map(|engine| remarks(engine, paint)).collect();
    let summary = paint.tone(Tone::Faint, &summary(engines));
    let predictions: String = predictions.iter().map(|of| accuracy(of, paint)).collect();
    format!("{}\n{remarks}{summary}\n{predictions}", table.render(width, paint))
}

/// How far off the predictions of a model are, over the requests that are remembered.
fn accuracy(of: &Accuracy, paint: Paint) -> String {
    let ms = |seconds: f64| format!("{:.0}", 1e3 * seconds);
    let itl = if of.itl_p50_seconds > 0.0 {
        let tenths = |seconds: f64| format!("{:.1}", 1e3 * seconds);
        let [p50, p90, p99] =
            [of.itl_error_p50_seconds, of.itl_error_p90_seconds, of.itl_error_p99_seconds].map(tenths);
        format!(", ITL by {p50} / {p90} / {p99} ms (median ITL {} ms)", tenths(of.itl_p50_seconds))
    } else {
        String::new()
    };
    let line = format!(
        "predictions for {}: TTFT off by {} / {} / {} ms (P50/P90/P99, median TTFT {} ms){itl}, {} of the tokens expected in \
         caches were missing; {} requests",
        without_controls(&of.model),
        ms(of.ttft_error_p50_seconds),
        ms(of.ttft_error_p90_seconds),
        ms(of.ttft_error_p99_seconds),
        ms(of.ttft_p50_seconds),
        percent(of.cached_tokens_missed as f64, of.cached_tokens_predicted as f64),
        of.requests,
    );
    format!("{}\n", paint.tone(Tone::Faint, &line))
}

fn row(engine: &EngineStatus) -> Vec<Cell> {
    let load = &engine.load;
    let used = blocks_used(load);
    vec![
        Cell::new(without_controls(engine.engine.as_str()), Tone::Strong),
        without_controls(&engine.kind).into(),
        Cell::new(without_controls(&engine.state), state_tone(&engine.state)),
        role(engine).into(),
        load.running.to_string().into(),
        Cell::new(load.waiting.to_string(), if load.waiting > 0 { Tone::Warning } else { Tone::Plain }),
        format!("{used}/{}", load.blocks_total).into(),
        percent(f64::from(used), f64::from(load.blocks_total)).into(),
        percent(load.cached_tokens as f64, load.prompt_tokens as f64).into(),
        percent(engine.prefill_share, 1.0).into(),
        Cell::new(without_controls(&engine.breaker), breaker_tone(&engine.breaker)),
        Cell::new(engine.restarts.to_string(), if engine.restarts > 0 { Tone::Warning } else { Tone::Plain }),
        without_controls(&engine.model).into(),
    ]
}

/// What it may be asked, and what it is kept for at present.
fn role(engine: &EngineStatus) -> String {
    let role = role_name(engine.role);
    match engine.leaning {
        Leaning::Neither => role.to_owned(),
        Leaning::Prefill => format!("{role}, prefills"),
        Leaning::Decode => format!("{role}, decodes"),
    }
}

/// What an operator should know of an engine beyond its figures: a line each.
fn remarks(engine: &EngineStatus, paint: Paint) -> Vec<String> {
    let mut lines = Vec::new();
    if !engine.detail.is_empty() {
        lines.push((state_tone(&engine.state), engine.detail.clone()));
    }
    if engine.cache_sight.starts_with("approximate") {
        lines.push((Tone::Faint, format!("KV cache is guessed, {}", engine.cache_sight)));
    }
    lines.extend(engine.notes.iter().map(|note| (Tone::Faint, note.to_string())));
    let line = |(tone, text): (Tone, String)| {
        let text = format!("{}: {text}", engine.engine);
        format!("{}\n", paint.tone(tone, &without_controls(&text)))
    };
    lines.into_iter().map(line).collect()
}

fn summary(engines: &[EngineStatus]) -> String {
    let sum = |of: fn(&RankLoad) -> u64| engines.iter().map(|engine| of(&engine.load)).sum::<u64>();
    let ready = engines.iter().filter(|engine| engine.state == "ready").count();
    let (used, total) = (sum(|load| blocks_used(load).into()), sum(|load| load.blocks_total.into()));
    let (cached, prompts) = (sum(|load| load.cached_tokens), sum(|load| load.prompt_tokens));
    format!(
        "{}, {ready} ready; {} running, {} waiting; KV {} used; hit rate {} of {}; {}",
        count(engines.len() as u64, "engine"),
        sum(|load| load.running.into()),
        sum(|load| load.waiting.into()),
        percent(used as f64, total as f64),
        percent(cached as f64, prompts as f64),
        count(prompts, "prompt token"),
        count(sum(|load| load.preemptions), "preemption"),
    )
}

/// Blocks that sequences use. Blocks that are only cached count as free: they are there for the taking.
fn blocks_used(load: &RankLoad) -> u32 {
    load.blocks_total.saturating_sub(load.blocks_free)
}

fn state_tone(state: &str) -> Tone {
    match state {
        "ready" => Tone::Good,
        "lost" | "fenced" => Tone::Bad,
        _ => Tone::Warning,
    }
}

fn breaker_tone(breaker: &str) -> Tone {
    match breaker {
        "closed" => Tone::Plain,
        "open" => Tone::Bad,
        _ => Tone::Warning,
    }
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Both => "both",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(name: &str, role: Role, state: &str, load: RankLoad) -> EngineStatus {
        EngineStatus {
            engine: name.into(),
            kind: "embedded".to_owned(),
            incarnation: 1,
            state: state.to_owned(),
            role,
            leaning: Leaning::Neither,
            model: "smollm2-135m".into(),
            load,
            breaker: "closed".to_owned(),
            prefill_share: 0.374,
            indexed_blocks: 12,
            restarts: 0,
            detail: String::new(),
            ranks: Vec::new(),
            cache_sight: "events".to_owned(),
            notes: Vec::new(),
        }
    }

    fn fleet() -> Vec<EngineStatus> {
        let busy = RankLoad {
            running: 3,
            waiting: 1,
            blocks_total: 512,
            blocks_free: 384,
            cached_tokens: 640,
            prompt_tokens: 1_000,
            preemptions: 1,
            ..RankLoad::default()
        };
        let idle = RankLoad { blocks_total: 512, blocks_free: 512, ..RankLoad::default() };
        let mut lost = engine("embedded-2", Role::Decode, "lost", RankLoad::default());
        lost.breaker = "open".to_owned();
        lost.restarts = 2;
        vec![
            engine("embedded-0", Role::Both, "ready", busy),
            engine("embedded-1", Role::Prefill, "ready", idle),
            lost,
        ]
    }

    #[test]
    fn a_fleet_is_a_row_for_each_engine_and_a_line_for_all() {
        insta::assert_snapshot!(render(&fleet(), &[], None, Paint::NONE));
    }

    #[test]
    fn a_terminal_of_80_columns_keeps_what_matters() {
        insta::assert_snapshot!(render(&fleet(), &[], Some(80), Paint::NONE));
    }

    #[test]
    fn trouble_is_colored() {
        let picture = render(&fleet(), &[], None, Paint { on: true });
        for painted in
            ["\x1b[31mlost\x1b[0m", "\x1b[32mready\x1b[0m", "\x1b[31mopen\x1b[0m", "\x1b[33m2\x1b[0m"]
        {
            assert!(picture.contains(painted), "{painted:?} in {picture:?}");
        }
    }

    #[test]
    fn what_an_engine_is_kept_for_stands_beside_its_role() {
        let engines = [Leaning::Prefill, Leaning::Decode].map(|leaning| {
            let engine = engine("a", Role::Both, "ready", RankLoad::default());
            EngineStatus { leaning, ..engine }
        });
        let picture = render(&engines, &[], None, Paint::NONE);
        assert!(picture.contains("both, prefills") && picture.contains("both, decodes"), "{picture}");
    }

    #[test]
    fn no_engines_is_said_in_words() {
        assert_eq!(render(&[], &[], None, Paint::NONE), "no engines\n");
    }
}
