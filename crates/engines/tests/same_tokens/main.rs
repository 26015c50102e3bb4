//! The central test: a request's tokens are the same whichever way it ran.
//!
//! Aggregated alone; sixteen at a time; over a warm prefix; preempted and resumed; split over two engines; moved
//! mid-stream after its engine died; n choices from one prefill. At temperature 0 and, seeded, at temperature 1. And to
//! show that the test can fail: one damaged block in a hand-over changes nearly every answer.

mod fleet;

use fleet::{AT_ONCE, Model, Rig};
use forebay_kv_move::{CopyPlan, Fault, MoveError};

/// Share of prompts whose answer must change when one transferred block is damaged.
const DAMAGE_SHOWS: f64 = 0.9;

async fn every_way_gives_the_same_tokens(model: Model, temperature: f32) {
    let requests = model.requests(temperature);
    let rig = Rig::new(&model, 4, &model.roomy());
    let expected = rig.one_by_one(0, &requests).await;

    let check = |way: &str, got: Vec<Vec<u32>>| {
        assert_eq!(got.len(), expected.len(), "{way}");
        for ((request, got), expected) in requests.iter().zip(got).zip(&expected) {
            assert_eq!(&got, expected, "{way}: prompt {} of {} tokens", request.number, request.prompt.len());
        }
    };
    check("sixteen at a time", rig.aggregated(1, &requests).await);
    let before = rig.load(1).await.cached_tokens;
    check("over a warm prefix", rig.aggregated(1, &requests).await);
    assert!(rig.load(1).await.cached_tokens > before, "the second time was meant to hit the cache");
    check("split over two engines", rig.split(2, 3, &requests).await);
    check("split, with the prefix warm on both", rig.split(2, 3, &requests).await);
    let mut moved = Vec::new();
    for sixteen in requests.chunks(AT_ONCE) {
        moved.extend(Rig::new(&model, 2, &model.roomy()).moved(sixteen).await);
    }
    check("moved after its engine died", moved);

    let tight = Rig::new(&model, 1, &model.tight(&requests));
    check("preempted and resumed", tight.aggregated(0, &requests).await);
    assert!(tight.load(0).await.preemptions > 0, "the pool was meant to be too small for sixteen");
}

/// Damages the first block of every hand-over and counts the answers that change.
async fn damage_shows(model: Model, fault: impl Fn(&CopyPlan) -> Option<Fault> + Send + Sync + 'static) {
    let requests = model.requests(0.0);
    let sound = Rig::new(&model, 2, &model.roomy()).split(0, 1, &requests).await;
    let damaged = Rig::with_faults(&model, 2, &model.roomy(), fault).split(0, 1, &requests).await;
    let changed = sound.iter().zip(&damaged).filter(|(sound, damaged)| sound != damaged).count();
    let share = changed as f64 / requests.len() as f64;
    assert!(share >= DAMAGE_SHOWS, "only {changed} of {} answers changed", requests.len());
}

fn zeroed(plan: &CopyPlan) -> Option<Fault> {
    (!plan.pairs().is_empty()).then_some(Fault::ZeroBlock(0))
}

/// Swaps the first block with the last; a single block has no other to be swapped with and is zeroed.
fn swapped(plan: &CopyPlan) -> Option<Fault> {
    match plan.pairs().len() {
        0 => None,
        1 => Some(Fault::ZeroBlock(0)),
        pairs => Some(Fault::SwapBlocks(0, pairs - 1)),
    }
}

/// A hand-over that fails, comes too late or is refused costs time, never tokens.
async fn without_kv_it_is_computed_again(model: Model) {
    let requests = model.requests(1.0);
    let expected = Rig::new(&model, 2, &model.roomy()).split(0, 1, &requests).await;
    let failing = |fault: fn() -> Fault| Rig::with_faults(&model, 2, &model.roomy(), move |_| Some(fault()));
    let rigs = [
        failing(|| Fault::Fail(MoveError::PeerGone)),
        failing(|| Fault::TimeOut),
        Rig::with_closed_mover(&model, 2, &model.roomy()),
    ];
    for rig in rigs {
        assert_eq!(rig.split(0, 1, &requests).await, expected);
    }
}

async fn choices_share_a_prefill(model: Model) {
    let rig = Rig::new(&model, 3, &model.roomy());
    for request in model.requests(1.0).into_iter().take(4) {
        let alone: Vec<Vec<u32>> = rig.choices_one_by_one(0, &request, 3).await;
        assert_ne!(alone[0], alone[1], "choices of one seed are to differ");
        assert_eq!(rig.choices_together(1, &request, 3).await, alone, "prompt {}", request.number);
        assert_eq!(rig.choices_split(1, 2, &request, 3).await, alone, "split, prompt {}", request.number);
    }
}

mod tiny {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn every_way_gives_the_same_tokens_at_temperature_0() {
        every_way_gives_the_same_tokens(Model::tiny(), 0.0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn every_way_gives_the_same_tokens_at_temperature_1() {
        every_way_gives_the_same_tokens(Model::tiny(), 1.0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_zeroed_block_shows() {
        damage_shows(Model::tiny(), zeroed).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_swapped_block_shows() {
        damage_shows(Model::tiny(), swapped).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn without_kv_it_is_computed_again() {
        super::without_kv_it_is_computed_again(Model::tiny()).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn choices_share_a_prefill() {
        super::choices_share_a_prefill(Model::tiny()).await;
    }
}

mod smollm2 {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn every_way_gives_the_same_tokens_at_temperature_0() {
        let Some(model) = Model::smollm2() else { return };
        every_way_gives_the_same_tokens(model, 0.0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn every_way_gives_the_same_tokens_at_temperature_1() {
        let Some(model) = Model::smollm2() else { return };
        every_way_gives_the_same_tokens(model, 1.0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_zeroed_block_shows() {
        let Some(model) = Model::smollm2() else { return };
        damage_shows(model, zeroed).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_swapped_block_shows() {
        let Some(model) = Model::smollm2() else { return };
        damage_shows(model, swapped).await;
    }
}

/// The simulated engine makes the same promise, through the same scheduler, mover and driver.
mod simulated {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn every_way_gives_the_same_tokens_at_temperature_1() {
        every_way_gives_the_same_tokens(Model::simulated(), 1.0).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_zeroed_block_shows() {
        damage_shows(Model::simulated(), zeroed).await;
    }
}
