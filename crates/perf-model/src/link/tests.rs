use super::*;

fn trained(transfers: u64, seconds: impl Fn(u64, u64) -> f64) -> LinkModel {
    let mut model = LinkModel::new(LinkPrior::SHARED_MEMORY);
    for i in 0..transfers {
        let bytes = (1 + i * 7 % 64) << 20;
        model.observe(bytes, seconds(i, bytes));
    }
    model
}

fn close(a: f64, b: f64, share: f64) -> bool {
    (a / b - 1.0).abs() < share
}

#[test]
fn the_prior_holds_until_something_moved() {
    let model = LinkModel::new(LinkPrior { latency_seconds: 0.5, bytes_per_second: 1000.0 });
    assert_eq!(model.seconds(0), 0.5);
    assert_eq!(model.seconds(500), 1.0);
    assert_eq!(model.bytes_per_second(), 1000.0);
}

#[test]
fn latency_and_bandwidth_are_told_apart() {
    let model =
        trained(300, |i, bytes| (3e-3 + bytes as f64 / 1e10) * (0.95 + 0.1 * (i * 13 % 17) as f64 / 16.0));
    assert!(close(model.bytes_per_second(), 1e10, 0.1), "{}", model.bytes_per_second());
    assert!(close(model.latency_seconds(), 3e-3, 0.15), "{}", model.latency_seconds());
}

#[test]
fn a_stalled_transfer_in_twenty_changes_little() {
    let model =
        trained(300, |i, bytes| (3e-3 + bytes as f64 / 1e10) * if i % 20 == 11 { 100.0 } else { 1.0 });
    assert!(
        close(model.seconds(32 << 20), 3e-3 + (32 << 20) as f64 / 1e10, 0.1),
        "{}",
        model.seconds(32 << 20)
    );
}

#[test]
fn a_link_that_lost_lanes_is_followed() {
    let mut model = trained(300, |_, bytes| 1e-3 + bytes as f64 / 1e10);
    for i in 0..300u64 {
        let bytes = (1 + i * 5 % 64) << 20;
        model.observe(bytes, 1e-3 + bytes as f64 / 1e9);
    }
    assert!(close(model.bytes_per_second(), 1e9, 0.15), "{}", model.bytes_per_second());
}

#[test]
fn equal_transfers_are_predicted_though_they_cannot_tell_latency_from_bandwidth() {
    let mut model = LinkModel::new(LinkPrior::SHARED_MEMORY);
    for _ in 0..100 {
        model.observe(8 << 20, 0.02);
    }
    assert!(close(model.seconds(8 << 20), 0.02, 0.01));
    assert!(model.seconds(16 << 20) > model.seconds(8 << 20));
}

#[test]
fn a_link_without_cost_per_byte_has_a_finite_bandwidth() {
    let model = trained(300, |_, _| 1e-3);
    assert!(model.bytes_per_second().is_finite() && model.seconds(64 << 20) < 1.2e-3);
}

#[test]
fn nonsense_is_ignored() {
    let mut model = LinkModel::new(LinkPrior::NVLINK);
    model.observe(1, f64::NAN);
    model.observe(1, -1.0);
    assert_eq!(model.samples(), 0);
}
