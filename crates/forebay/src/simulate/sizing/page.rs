//! The page: the frontier as a plot, and every fleet tried.
//!
//! Drawn once, as SVG: nothing on it moves, so it needs no script.

use std::fmt::Write as _;

use forebay_twin::{Search, Trial};

use super::{
    Found,
    show::{self, ttft_ms},
};
use crate::cli::SizeArgs;

const TEMPLATE: &str = include_str!("frontier.html");
/// Of the plot, in pixels.
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 48.0;
/// Marks on an axis, about.
const TICKS: f64 = 6.0;
/// Colours of shapes; there are no more shapes.
const COLOURS: usize = 8;

/// The page, whole.
pub(super) fn render(args: &SizeArgs, name: &str, found: &Found) -> String {
    let promise = format!("P{} within {}", 100.0 * args.percentile, show::promised(args));
    let answer = match found.best() {
        Some(best) => format!("{} GPUs: {}, {:.2} requests a second", best.gpus, best.shape, best.goodput),
        None => format!("no fleet of up to {} GPUs keeps it", args.gpus),
    };
    let kv = found.kv.as_ref().map_or_else(String::new, show::needed);
    let parts = [
        ("{title}", escaped(name)),
        ("{promise}", escaped(&promise)),
        ("{answer}", escaped(&answer)),
        ("{kv}", escaped(&kv)),
        ("{plot}", plot(found)),
        ("{legend}", legend(&found.searches)),
        ("{rows}", found.frontier().into_iter().map(row).collect()),
    ];
    // Each name once, from the first to the last: what is put in is not looked at again.
    let (mut page, mut rest) = (String::new(), TEMPLATE);
    for (place, text) in parts {
        let (before, after) = rest.split_once(place).expect("the template has every place, in this order");
        page.push_str(before);
        page.push_str(&text);
        rest = after;
    }
    page + rest
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// From what is counted to pixels.
struct Scale {
    gpus: f64,
    goodput: f64,
}

impl Scale {
    fn x(&self, gpus: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * gpus / self.gpus
    }

    fn y(&self, goodput: f64) -> f64 {
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * goodput / self.goodput
    }
}

/// A round distance of which about [`TICKS`] fit into `most`.
fn tick(most: f64) -> f64 {
    let rough = most / TICKS;
    let unit = 10_f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * unit).find(|&step| step >= rough).unwrap_or(rough)
}

fn marks(most: f64, least_step: f64) -> impl Iterator<Item = f64> {
    let step = tick(most).max(least_step);
    (0..).map(move |number| f64::from(number) * step).take_while(move |&at| at <= most * 1.000_001)
}

/// The frontier as a line, every fleet tried as a point: full where the promise was kept.
fn plot(found: &Found) -> String {
    let trials: Vec<(usize, &Trial)> = trials(found).collect();
    let most = |of: fn(&Trial) -> f64| trials.iter().map(|(_, trial)| of(trial)).fold(1e-9, f64::max);
    let scale = Scale {
        gpus: 1.05 * most(|trial| f64::from(trial.gpus)),
        goodput: 1.08 * most(|trial| trial.goodput),
    };
    let mut svg = String::new();
    let (left, right, top, bottom) = (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM);
    for at in marks(scale.goodput, 0.0) {
        let (y, label) = (scale.y(at), (1e3 * at).round() / 1e3);
        let _ = write!(svg, "<path class=rule d='M{left} {y:.1}H{right}'/>");
        let _ = write!(svg, "<text x='{:.1}' y='{:.1}' text-anchor=end>{label}</text>", left - 8.0, y + 4.0);
    }
    for at in marks(scale.gpus, 1.0) {
        let x = scale.x(at);
        let _ = write!(svg, "<path class=rule d='M{x:.1} {top}V{bottom}'/>");
        let _ = write!(svg, "<text x='{x:.1}' y='{:.1}' text-anchor=middle>{at}</text>", bottom + 18.0);
    }
    let _ = write!(
        svg,
        "<text x='{:.1}' y='{:.1}' text-anchor=middle>GPUs</text>",
        (left + right) / 2.0,
        HEIGHT - 8.0
    );
    let points = found.frontier().into_iter().map(|trial| (f64::from(trial.gpus), trial.goodput));
    let line: Vec<String> =
        points.map(|(gpus, goodput)| format!("{:.1} {:.1}", scale.x(gpus), scale.y(goodput))).collect();
    if line.len() > 1 {
        let _ = write!(svg, "<path class=frontier d='M{}'/>", line.join("L"));
    }
    for (shape, trial) in &trials {
        let (x, y) = (scale.x(f64::from(trial.gpus)), scale.y(trial.goodput));
        let kept = if trial.keeps() { "kept" } else { "broken" };
        let label = escaped(&words(trial));
        let class = format!("s{} {kept}", shape % COLOURS);
        let _ = write!(
            svg,
            "<circle class='{class}' cx='{x:.1}' cy='{y:.1}' r='5'><title>{label}</title></circle>"
        );
    }
    svg
}

/// Every fleet tried, with the number of its shape; those that kept the promise last, so that they are seen.
fn trials(found: &Found) -> impl Iterator<Item = (usize, &Trial)> {
    let all = || {
        let searched = found.searches.iter().enumerate();
        let searched =
            searched.flat_map(|(shape, search)| search.trials.iter().map(move |trial| (shape, trial)));
        searched.chain(found.more.iter().map(|trial| (0, trial)))
    };
    all().filter(|(_, trial)| !trial.keeps()).chain(all().filter(|(_, trial)| trial.keeps()))
}

fn legend(searches: &[Search]) -> String {
    let shapes = searches.iter().enumerate().map(|(number, search)| {
        format!(
            "<span><svg viewBox='0 0 12 12'><circle class='s{} kept' cx=6 cy=6 r=5 /></svg>{}</span>",
            number % COLOURS,
            escaped(&search.shape().to_string())
        )
    });
    shapes.collect()
}

/// One fleet, in a line.
fn words(trial: &Trial) -> String {
    let promise = trial.binds.map_or("keeps the promise".to_owned(), |binds| format!("breaks {binds}"));
    format!(
        "{} GPUs, {}: {:.2} a second, TTFT {} ms, ITL {:.1} ms, {promise}",
        trial.gpus,
        trial.shape,
        trial.goodput,
        ttft_ms(trial),
        1e3 * trial.itl_seconds
    )
}

fn row(trial: &Trial) -> String {
    let promise = trial.binds.map_or("kept".to_owned(), |binds| format!("broken: {binds}"));
    let cells = [
        trial.gpus.to_string(),
        format!("{:.2}", trial.goodput),
        trial.shape.to_string(),
        ttft_ms(trial),
        format!("{:.1}", 1e3 * trial.itl_seconds),
        promise,
    ];
    let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", escaped(cell))).collect();
    format!("<tr>{cells}</tr>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_asks_nobody_for_anything() {
        for outside in ["http://", "https://", "src=", "@import", "url(", "<script"] {
            assert!(!TEMPLATE.contains(outside), "{outside}");
        }
    }

    #[test]
    fn marks_are_round_and_never_parts_of_a_gpu() {
        assert_eq!(marks(10.5, 1.0).collect::<Vec<_>>(), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(marks(2.1, 1.0).collect::<Vec<_>>(), [0.0, 1.0, 2.0]);
        assert_eq!(marks(0.6, 0.0).count(), 7);
    }
}
