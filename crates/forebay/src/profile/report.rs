//! What was measured beside what the profile says, for people and for programs.

use forebay_profiler::{Fit, Fitted, Kind, Progress, Why};
use serde_json::{Value, json};

use crate::{
    figures::count,
    table::{Cell, Table},
    terminal::{Paint, Tone},
};

/// Errors from which on a point is worth a look.
const NOTICEABLE: f64 = 0.1;

/// A row for each point, a line for each kind, and what is to be known of it.
pub(super) fn text(fit: &Fit, points: &[Progress], width: Option<usize>, paint: Paint) -> String {
    let mut table = Table::default()
        .text("KIND")
        .text("TOKENS")
        .number("SAMPLES")
        .number("MEASURED MS")
        .number("PROFILE MS")
        .number("ERROR");
    for fitted in &fit.points {
        table.row(vec![
            fitted.point.kind().name().into(),
            fitted.point.to_string().into(),
            fitted.samples.to_string().into(),
            ms(fitted.measured_ms).into(),
            ms(fitted.fitted_ms).into(),
            Cell::new(format!("{:+.1} %", 100.0 * fitted.error()), tone(fitted)),
        ]);
    }
    let mut text = table.render(width, paint);
    text.push('\n');
    for (kind, errors) in kinds(fit) {
        text += &format!(
            "{}: {}, P90 of errors {:.1} %, largest {:.1} %\n",
            kind.name(),
            count(errors.points as u64, "point"),
            100.0 * errors.p90,
            100.0 * errors.max
        );
    }
    for sentence in fit.notes.iter().map(|note| (*note).to_owned()).chain(left_out(points)) {
        text += &format!("{}\n", paint.tone(Tone::Warning, &sentence));
    }
    text
}

/// The same as JSON, with the profile itself.
pub(super) fn document(fit: &Fit, points: &[Progress], disturbed: u32, written: &str) -> String {
    let measured: Vec<Value> = fit
        .points
        .iter()
        .map(|fitted| {
            json!({
                "kind": fitted.point.kind().name(),
                "point": fitted.point.to_string(),
                "samples": fitted.samples,
                "measured_ms": fitted.measured_ms,
                "profile_ms": fitted.fitted_ms,
                "error": fitted.error(),
            })
        })
        .collect();
    let errors: Vec<Value> = kinds(fit)
        .map(|(kind, errors)| {
            json!({ "kind": kind.name(), "points": errors.points, "p90": errors.p90, "max": errors.max })
        })
        .collect();
    let notes: Vec<String> =
        fit.notes.iter().map(|note| (*note).to_owned()).chain(left_out(points)).collect();
    let document = json!({
        "version": 1,
        "file": written,
        "profile": fit.file,
        "points": measured,
        "errors": errors,
        "disturbed": disturbed,
        "notes": notes,
    });
    format!("{document:#}\n")
}

fn kinds(fit: &Fit) -> impl Iterator<Item = (Kind, forebay_profiler::Errors)> {
    Kind::ALL.into_iter().filter_map(|kind| Some((kind, fit.errors(kind)?)))
}

/// Points that have no sample, by the reason.
fn left_out(points: &[Progress]) -> impl Iterator<Item = String> {
    let of = |reason: Option<Why>, sentence: &'static str| {
        let those =
            points.iter().filter(move |progress| progress.samples.is_empty() && progress.dropped == reason);
        let names: Vec<String> =
            those.map(|progress| format!("{} {}", progress.point.kind().name(), progress.point)).collect();
        (!names.is_empty()).then(|| format!("not measured, as {sentence}: {}", names.join(", ")))
    };
    [
        of(Some(Why::TooLarge), "the engine does not hold so much"),
        of(Some(Why::TooSlow), "there was no time (--minutes)"),
        of(Some(Why::Missed), "it did not come about (is the prefix cache on?)"),
        of(None, "others used the engine or it ended before"),
    ]
    .into_iter()
    .flatten()
}

fn tone(fitted: &Fitted) -> Tone {
    if fitted.error().abs() >= NOTICEABLE { Tone::Warning } else { Tone::Plain }
}

fn ms(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.2}"),
        ms => format!("{ms:.1}"),
    }
}

/// How far it is, as one line.
pub(super) fn progress(share: f64, now: &str, seconds_left: f64) -> String {
    const CELLS: usize = 30;
    let full = ((share * CELLS as f64) as usize).min(CELLS);
    format!(
        "[{}{}] {:>3.0} %  {now}, about {} left",
        "#".repeat(full),
        ".".repeat(CELLS - full),
        100.0 * share,
        duration(seconds_left)
    )
}

/// `40 s`, `3 min`.
pub(super) fn duration(seconds: f64) -> String {
    if seconds < 90.0 { format!("{seconds:.0} s") } else { format!("{:.0} min", seconds / 60.0) }
}

#[cfg(test)]
mod tests {
    use forebay_perf_model::KvLayout;
    use forebay_profiler::{Point, Sample, Subject, fit};

    use super::*;

    fn measured() -> (Fit, Vec<Progress>) {
        let point = |point, seconds, context_tokens| {
            Progress::measured(point, vec![Sample { seconds, context_tokens, ..Sample::default() }])
        };
        let prefill = |new_tokens| Point::Prefill { new_tokens, cached_tokens: 0 };
        let points = vec![
            point(prefill(16), 0.012, 0.0),
            point(prefill(1_024), 0.040, 0.0),
            point(Point::Decode { sequences: 1, context_tokens: 16 }, 0.007, 32.0),
            Progress::measured(prefill(2_048), Vec::new()),
        ];
        let subject = Subject {
            name: "m".to_owned(),
            measured: "a test".to_owned(),
            step_tokens: 8_192,
            layout: KvLayout::PerLayerBlocks,
        };
        (fit(&points, &subject).expect("enough"), points)
    }

    #[test]
    fn a_report_has_every_point_and_what_is_missing() {
        let (fit, points) = measured();
        insta::assert_snapshot!(text(&fit, &points, None, Paint::NONE));
        let document: Value =
            serde_json::from_str(&document(&fit, &points, 3, "m.profile.json")).expect("JSON");
        assert_eq!((&document["disturbed"], &document["points"][0]["kind"]), (&json!(3), &json!("prefill")));
        assert_eq!(document["profile"]["version"], 1);
    }

    #[test]
    fn progress_says_what_is_measured_and_how_long_it_takes() {
        assert_eq!(
            progress(0.5, "decode 8 of 128", 61.0),
            format!("[{}{}]  50 %  decode 8 of 128, about 61 s left", "#".repeat(15), ".".repeat(15))
        );
        assert_eq!(duration(200.0), "3 min");
    }
}
