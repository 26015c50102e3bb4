use super::*;

const LENGTHS: &str = r#"{"0": {"input_tokens": "{100: 0.25, 300: 0.75}", "output_tokens": "{10: 1.0}", "image_tokens": "{}"},
    "1200": {"input_tokens": "{7: 1.0}", "output_tokens": "{0: 1.0}"},
    "600": {"input_tokens": "{}", "output_tokens": "{}"}}"#;

fn mix(windows: &[&str]) -> ClientMix {
    let mut mix = ClientMix::default();
    for (number, windows) in windows.iter().enumerate() {
        mix.add(&format!("client-{number}"), windows, LENGTHS).unwrap();
    }
    mix
}

fn excerpt(from_seconds: f64, seconds: f64) -> Excerpt {
    Excerpt { from_seconds, seconds, rate: None }
}

/// Mean and coefficient of variation.
fn moments(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64;
    (mean, variance.sqrt() / mean)
}

#[test]
fn gaps_have_a_mean_of_one_and_the_scatter_of_their_shape() {
    let scatter_of_weibull =
        |shape: f64| ((ln_gamma(1.0 + 2.0 / shape) - 2.0 * ln_gamma(1.0 + 1.0 / shape)).exp() - 1.0).sqrt();
    for shape in [0.3, 1.0, 4.0] {
        for (renewal, scatter) in [
            (Renewal::Gamma { shape }, 1.0 / shape.sqrt()),
            (Renewal::Weibull { shape: shape.max(0.6) }, scatter_of_weibull(shape.max(0.6))),
        ] {
            let mut draw = Draw::new(1, "gaps");
            let gaps: Vec<f64> = (0..400_000).map(|_| renewal.gap(&mut draw)).collect();
            let (mean, found) = moments(&gaps);
            assert!((mean - 1.0).abs() < 0.015, "{renewal:?}: {mean}");
            assert!((found / scatter - 1.0).abs() < 0.03, "{renewal:?}: {found} {scatter}");
            // What is left of a gap at any moment: (1 + cv²) / 2 (the inspection paradox).
            let rests: Vec<f64> = (0..400_000).map(|_| renewal.rest(&mut draw)).collect();
            let expected = (1.0 + scatter * scatter) / 2.0;
            assert!((moments(&rests).0 / expected - 1.0).abs() < 0.03, "{renewal:?}: {expected}");
        }
    }
    assert!((ln_gamma(5.0) - 24.0_f64.ln()).abs() < 1e-9 && (ln_gamma(0.5) - 0.572_364_942_9).abs() < 1e-9);
}

#[test]
fn every_window_has_its_rate() {
    let mix = mix(&["0,2,3,Gamma,0.111,4.5\n600,,,,,\n1200,8,1.5,Weibull,0.7,0.1"]);
    let mut counts = [0.0_f64; 3];
    for seed in 0..40 {
        let trace = mix.trace(&excerpt(0.0, 1800.0), seed).unwrap();
        assert!(trace.requests.is_sorted_by_key(|request| request.at_seconds));
        trace.requests.iter().for_each(|request| counts[(request.at_seconds / 600.0) as usize] += 1.0 / 40.0);
    }
    assert!((counts[0] / 1200.0 - 1.0).abs() < 0.05 && counts[1] == 0.0, "{counts:?}");
    assert!((counts[2] / 4800.0 - 1.0).abs() < 0.05, "{counts:?}");
}

#[test]
fn an_excerpt_begins_where_it_is_told_and_has_the_rate_that_it_is_told() {
    let mix = mix(&["0,1,1,Gamma,1,1\n600,9,1,Gamma,1,1", "0,1,1,Gamma,1,1\n600,1,1,Gamma,1,1"]);
    assert_eq!(mix.end_seconds(), 1200.0);
    let trace = mix.trace(&Excerpt { rate: Some(50.0), ..excerpt(600.0, 600.0) }, 3).unwrap();
    assert!((trace.requests.len() as f64 / 30_000.0 - 1.0).abs() < 0.03, "{}", trace.requests.len());
    assert!(trace.requests.iter().all(|request| (0.0..600.0).contains(&request.at_seconds)));
    assert_eq!(trace.tenants, ["client-0", "client-1"]);
    let first = trace.requests.iter().filter(|request| request.tenant == 0).count();
    assert!((first as f64 / trace.requests.len() as f64 - 0.9).abs() < 0.01, "shares stay");
    assert_eq!(trace, mix.trace(&Excerpt { rate: Some(50.0), ..excerpt(600.0, 600.0) }, 3).unwrap());
}

#[test]
fn lengths_are_those_of_the_hour() {
    let mix = mix(&["0,20,1,Gamma,1,1\n600,20,1,Gamma,1,1\n1200,20,1,Gamma,1,1"]);
    let trace = mix.trace(&excerpt(0.0, 1800.0), 1).unwrap();
    let (early, late): (Vec<_>, Vec<_>) =
        trace.requests.iter().partition(|request| request.at_seconds < 1200.0);
    let short = early.iter().filter(|request| request.prompt_tokens == 100).count() as f64;
    assert!((short / early.len() as f64 - 0.25).abs() < 0.01, "times without lengths take those before");
    assert!(early.iter().all(|it| [100, 300].contains(&it.prompt_tokens) && it.output_tokens == 10));
    assert!(late.iter().all(|it| (it.prompt_tokens, it.output_tokens) == (7, 1)), "an answer has a token");
}

#[test]
fn what_is_wrong_is_named() {
    let check = |windows: &str, lengths: &str, expected: &str| {
        let error = ClientMix::default().add("c", windows, lengths).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let good = "0,1,1,Gamma,1,1";
    check("", LENGTHS, "it has no requests");
    check("0,1,1,Gamma", LENGTHS, "line 1, column 1: expected 6 fields");
    check("0,1,1,Gamma,1,1\n0,1,1,Gamma,1,1", LENGTHS, "line 2, column 1: it starts at 0 s, no later");
    check("0,-1,1,Gamma,1,1", LENGTHS, "line 1, column 3: expected a number from 0 up, found `-1`");
    check(
        "0,1,1,Pareto,1,1",
        LENGTHS,
        "line 1, column 7: expected Gamma, Weibull or nothing, found `Pareto`",
    );
    check("0,1,1,Weibull,0.001,1", LENGTHS, "line 1, column 15: a shape of 0.001; expected 0.02 to");
    check("0,1,1,Gamma,NaN,1", LENGTHS, "found `NaN`");
    check(good, "{", "line 1, column 1: EOF");
    check(good, r#"{"0": {"input_tokens": "{}"}}"#, "missing field `output_tokens`");
    let with = |dict: &str| format!(r#"{{"0": {{"input_tokens": "{dict}", "output_tokens": "{{1: 1}}"}}}}"#);
    check(good, &with("5"), "`input_tokens` from 0 s on: expected {length: probability");
    check(good, &with("{1: x}"), "found `1: x`");
    check(good, &with("{1: 0.5}"), "probabilities of 0.5 together; expected 1");
    check(good, r#"{"noon": {"input_tokens": "{1: 1}", "output_tokens": "{1: 1}"}}"#, "found `noon`");

    let mut silent = ClientMix::default();
    silent.add("c", "0,,,,,", LENGTHS).unwrap();
    silent.add("d", good, "{}").unwrap();
    assert_eq!(silent.silent, 2);
    assert!(silent.trace(&excerpt(0.0, 600.0), 1).unwrap_err().contains("no client sends anything"));
    let over = mix(&["0,1,1,Gamma,1,1"]).trace(&excerpt(600.0, 60.0), 1).unwrap_err();
    assert!(over.contains("its windows end at 600 s"), "{over}");
    let many = mix(&["0,100000,1,Gamma,1,1"]);
    assert!(many.trace(&excerpt(0.0, 600.0), 1).unwrap_err().contains("60000000 requests in 600 s"));
}
