use super::*;

static ONE: Tuning<1> =
    Tuning { forgetting: 0.5, prior_weight: 1.0, typical: [1.0], limits: Limits::NOT_NEGATIVE, owner: None };
static TWO: Tuning<2> = Tuning {
    forgetting: 0.5,
    prior_weight: 1.0,
    typical: [1.0, 1.0],
    limits: Limits::NOT_NEGATIVE,
    owner: None,
};

/// Eight observations that agree with the prior of 1 s a unit, so that the start changes nothing.
fn started() -> Fit<1, 1> {
    let mut fit = Fit::new([1.0], &ONE);
    for _ in 0..START {
        fit.observe(0, &[1.0], 1.0);
    }
    assert_eq!(fit.coefficients(), [1.0]);
    fit
}

/// By hand. The start: prior variance p = 1; each of its 8 replayed rows first doubles p (forgetting 1/2, but never
/// past 1), then p -> p / (1 + p), so after each row p = 1/2. The row (1 unit, 1.03 s): p doubles to 1; innovation
/// 0.03, within the clip of 4 x 0.01; gain 1 / (1 + 1); so 1 + 0.03 / 2. The next (2 units, 2.03 s): prediction 2.03,
/// nothing learned, but p = 1/2 doubles to 1, scaled row z = 2 / 2.03, and p -> 1 - z² / (1 + z²).
#[test]
fn one_coefficient_moves_as_computed_by_hand() {
    let mut fit = started();
    assert!((fit.covariance[0][0] - 0.5).abs() < 1e-12);
    fit.observe(0, &[1.0], 1.03);
    assert!((fit.coefficients()[0] - 1.015).abs() < 1e-12);
    fit.observe(0, &[2.0], 2.03);
    assert!((fit.coefficients()[0] - 1.015).abs() < 1e-12);
    let z = 2.0 / 2.03;
    assert!((fit.covariance[0][0] - 1.0 / (1.0 + z * z)).abs() < 1e-12);
}

/// By hand: innovation 49 against a clip of 0.04 gives weight 0.04 / 49, gain 1 / (1 + 49 / 0.04).
#[test]
fn an_outlier_moves_a_coefficient_as_far_as_the_clip_allows() {
    let mut fit = started();
    fit.observe(0, &[1.0], 50.0);
    let expected = 1.0 + 49.0 / (1.0 + 49.0 / 0.04);
    assert!((fit.coefficients()[0] - expected).abs() < 1e-12);
    assert!(fit.covariance[0][0] > 0.99, "a row that was not believed taught nothing");
}

/// By hand: both coefficients 1, covariance diagonal with variance 1/2 doubling to 1. The row (1, 0) takes a time that
/// would move the first to -1; correlation is nil, so the second stays and the first is pinned at 0.
#[test]
fn a_coefficient_is_pinned_at_zero_and_drags_what_it_correlates_with() {
    let mut fit = Fit::<2, 1>::new([1.0, 1.0], &TWO);
    fit.unit = [1.0, 1.0];
    fit.covariance = [[1.0, 0.0], [0.0, 1.0]];
    fit.coefficients = [-1.0, 2.0];
    fit.project();
    assert_eq!(fit.coefficients(), [0.0, 2.0]);
    fit.covariance = [[1.0, -0.5], [-0.5, 1.0]];
    fit.coefficients = [-1.0, 2.0];
    fit.project();
    assert_eq!(fit.coefficients(), [0.0, 1.5]);
}

#[test]
fn the_first_observations_scale_the_prior_and_keep_its_shape() {
    let mut fit = Fit::<2, 1>::new([1.0, 3.0], &TWO);
    fit.observe(0, &[1.0, 1.0], 400.0);
    assert_eq!(fit.coefficients(), [100.0, 300.0]);
    fit.observe(0, &[1.0, 0.0], 5000.0);
    assert_eq!(fit.coefficients(), [100.0, 300.0], "the slow one of two does not count");
}

#[test]
fn a_prior_of_nothing_still_learns() {
    let mut fit = Fit::<2, 1>::new([0.0, f64::NAN], &TWO);
    for i in 0..200 {
        let x = f64::from(i % 7);
        fit.observe(0, &[1.0, x], 0.5 + 0.25 * x);
    }
    let [base, slope] = fit.coefficients();
    assert!((base - 0.5).abs() < 1e-6 && (slope - 0.25).abs() < 1e-6, "{base} {slope}");
}

#[test]
fn impossible_observations_are_ignored() {
    let mut fit = started();
    for (row, seconds) in
        [(1.0, 0.0), (1.0, -1.0), (1.0, f64::NAN), (1.0, f64::INFINITY), (f64::NAN, 1.0), (-1.0, 1.0)]
    {
        fit.observe(0, &[row], seconds);
    }
    assert_eq!((fit.samples(), fit.coefficients()), (START as u64, [1.0]));
}

#[test]
fn error_describes_predictions_made_before_learning() {
    let mut fit = started();
    assert_eq!(fit.error(), ModelError { p50: 0.0, p90: 0.0, bias: 0.0, samples: 8 });
    for _ in 0..ERROR_WINDOW {
        fit.coefficients = [1.0];
        fit.observe(0, &[1.0], 2.0);
    }
    assert_eq!(fit.error(), ModelError { p50: 0.5, p90: 0.5, bias: -0.5, samples: 128 });
}

static WITHIN: Tuning<2> = Tuning {
    forgetting: 0.5,
    prior_weight: 1.0,
    typical: [1.0, 1.0],
    limits: Limits { least: 0.5, most: 2.0 },
    owner: None,
};

/// By hand, as above: 3 is 1 beyond the limit of 2, and with a correlation of -1/2 the other rises by half of that.
#[test]
fn a_coefficient_is_pinned_at_either_limit_from_the_prior_on() {
    let mut fit = Fit::<2, 1>::new([9.0, 0.1], &WITHIN);
    assert_eq!(fit.coefficients(), [2.0, 0.5]);
    fit.unit = [1.0, 1.0];
    fit.covariance = [[1.0, -0.5], [-0.5, 1.0]];
    for (outside, expected) in [([3.0, 1.0], [2.0, 1.5]), ([0.0, 1.0], [0.5, 0.75])] {
        fit.coefficients = outside;
        fit.project();
        assert_eq!(fit.coefficients(), expected);
    }
    for seconds in [1e9, 1e-9] {
        for _ in 0..100 {
            fit.observe(0, &[1.0, 1.0], seconds);
            assert!(fit.coefficients().iter().all(|value| (0.5..=2.0).contains(value)));
        }
    }
}

static OWNED: Tuning<2> = Tuning {
    forgetting: 0.998,
    prior_weight: 1.0,
    typical: [1.0, 1.0],
    limits: Limits::NOT_NEGATIVE,
    owner: Some([0, 1]),
};

/// By hand: the 8 rows of the start fill the window of innovations with zeros. Its median is taken anew at every 8th
/// row, and is that of the jump once those are half of the window: 8 of 16.
#[test]
fn a_jump_is_followed_by_its_owner_alone_once_it_is_half_of_what_is_remembered() {
    let mut fit = Fit::<2, 2>::new([1.0, 1.0], &OWNED);
    for _ in 0..START {
        fit.observe(0, &[1.0, 0.0], 1.0);
    }
    for row in 1..=8 {
        assert!(fit.coefficients()[0] < 1.2, "row {row}: {:?}", fit.coefficients());
        fit.observe(0, &[1.0, 0.0], 10.0);
    }
    let [jumped, other] = fit.coefficients();
    assert!((jumped - 10.0).abs() < 0.5 && other == 1.0, "{jumped} {other}");
    // The part of the other owner, 10 of 12 s, is taken off before the ratio: 31 s leave 21 where 2 were expected.
    fit.coefficients = [10.0, 2.0];
    for _ in 0..8 {
        fit.observe(1, &[1.0, 1.0], 31.0);
    }
    let [first, second] = fit.coefficients();
    assert!(
        first < 13.0 && (second - 21.0).abs() < 2.0,
        "{first} {second}: some was learned before the jump was seen"
    );
}

#[test]
fn a_drift_is_no_jump() {
    let mut fit = Fit::<2, 2>::new([1.0, 1.0], &OWNED);
    for row in 0..4 * START {
        fit.observe(0, &[1.0, 0.0], if row < START { 1.0 } else { 1.3 });
        assert!(row >= 2 * START || fit.coefficients()[0] < 1.2, "row {row}: {:?}", fit.coefficients());
    }
    assert!((fit.coefficients()[0] - 1.3).abs() < 0.1, "{:?}", fit.coefficients());
}
