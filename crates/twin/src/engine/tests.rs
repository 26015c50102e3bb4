use forebay_engine_model::Work;
use forebay_types::{BlockHash, Incarnation};

use super::*;
use crate::{content, gateway::Gateway, scenario::Workload};

fn group(workload: Workload, ranks: u16) -> Group {
    let kind = workload.engine_kind(8192, Some(4000));
    let ids = (0..ranks).map(|dp_rank| RankId { incarnation: Incarnation(1), dp_rank });
    Group::new(kind, ids, Gateway::hasher(16))
}

fn job(leg: u64, prompt_tokens: u32, output_tokens: u32, work: Work) -> Job {
    let prompt = content::write([content::Piece { name: leg, tokens: prompt_tokens }].iter());
    let hashes = Gateway::hasher(16).chain(BlockHash(0), &prompt).into();
    Job {
        leg: LegId(leg),
        prompt,
        hashes,
        root: BlockHash(0),
        choices: vec![0],
        output_tokens_max: output_tokens,
        stop_tokens: [].into(),
        work,
    }
}

/// One step, from its beginning to its end: how long it took, and the legs that drew a token.
fn step(group: &mut Group, happened: &mut Happened) -> Option<(Begun, Vec<u64>)> {
    happened.clear();
    let begun = group.turn(1.0, happened)?;
    group.finish(|_, position| position, happened);
    let drew = happened.outputs.iter().filter_map(|output| match output {
        Output::Token { leg, .. } => Some(leg.0),
        _ => None,
    });
    Some((begun, drew.collect()))
}

#[test]
fn ranks_of_a_group_share_every_step_and_its_length() {
    let mut group = group(Workload::Moe, 3);
    let happened = &mut Happened::default();
    group.submit(0, job(1, 500, 8, Work::Aggregated)).unwrap();
    assert_eq!(step(&mut group, happened).unwrap().1, [1]);
    // A prompt on another rank stops the decode of the first as long as itself.
    group.submit(1, job(2, 4000, 8, Work::Aggregated)).unwrap();
    let (begun, drew) = step(&mut group, happened).unwrap();
    assert_eq!(drew, [1, 2]);
    let kind = Workload::Moe.engine_kind(8192, None);
    let shape = StepShape {
        prefill_tokens: 4000,
        prefill_attention: 8e6,
        decodes: 1,
        context_tokens: 501,
        group_decodes: 1,
        budget_tokens: 8192,
    };
    assert!((begun.seconds - kind.profile.step_seconds(&shape)).abs() < 1e-12);
    assert!(begun.prefill_tokens > 0);
    // Both ranks measured the same; the idle one measured nothing.
    let measured: Vec<f64> =
        happened.reports.iter().filter_map(|report| Some(report.step?.seconds)).collect();
    assert_eq!(measured, [begun.seconds; 2]);
    assert_eq!(group.computed_tokens().collect::<Vec<_>>(), [501, 4000, 0]);
}

#[test]
fn kv_that_arrives_at_a_busy_engine_is_noticed_at_the_second_boundary() {
    let mut group = group(Workload::Fresh, 1);
    let happened = &mut Happened::default();
    group.submit(0, job(1, 160, 50, Work::Aggregated)).unwrap();
    step(&mut group, happened);
    let alone = step(&mut group, happened).unwrap().0.seconds;

    group.submit(0, job(2, 1600, 50, Work::Decode { first: vec![(0, 9)] })).unwrap();
    let (begun, _) = step(&mut group, happened).unwrap();
    let kind = Workload::Fresh.engine_kind(8192, None);
    let started = kind.handover(100).begins_seconds;
    assert!((begun.seconds - alone - started).abs() < 1e-6, "starting it lengthens the step");
    let pulled = [Pull {
        leg: LegId(2),
        rank: RankId { incarnation: Incarnation(1), dp_rank: 0 },
        blocks: 100,
        cost: kind.handover(100),
    }];
    assert_eq!(happened.pulls, pulled);

    group.arrived(0, LegId(2), true);
    assert_eq!(step(&mut group, happened).unwrap().1, [1]);
    assert_eq!(step(&mut group, happened).unwrap().1, [1]);
    assert_eq!(happened.imported, [(LegId(2), true)], "known once this step is over");
    assert_eq!(step(&mut group, happened).unwrap().1, [1, 2]);
}

#[test]
fn kv_that_arrives_at_an_idle_engine_is_noticed_at_once() {
    let mut group = group(Workload::Fresh, 1);
    let happened = &mut Happened::default();
    group.submit(0, job(2, 1600, 50, Work::Decode { first: vec![(0, 9)] })).unwrap();
    assert_eq!(step(&mut group, happened), None);
    assert_eq!(happened.pulls.len(), 1);
    group.arrived(0, LegId(2), true);
    assert_eq!(step(&mut group, happened).unwrap().1, [2]);
}

#[test]
fn a_held_prefix_is_announced_and_found_again() {
    let mut group = group(Workload::Fresh, 1);
    let happened = &mut Happened::default();
    group.submit(0, job(7, 320, 1, Work::Prefill)).unwrap();
    step(&mut group, happened);
    let stored: usize =
        happened.reports.iter().flat_map(|report| &report.kv).map(|batch| batch.events.len()).sum();
    assert_eq!(stored, 1, "one run of blocks");
    group.release_held(0, LegId(7));
    let again = Job { leg: LegId(8), ..job(7, 320, 2, Work::Aggregated) };
    group.submit(0, again).unwrap();
    happened.clear();
    group.turn(1.0, happened);
    assert_eq!(happened.started, [(LegId(8), 304)], "all but the last block, of which a token is computed");
}

#[test]
fn tokens_wait_for_a_next_step_with_prefill_only() {
    let next = |seconds, prefills| Some(Begun { seconds, prefill_tokens: u32::from(prefills), decodes: 1 });
    assert_eq!(Delivery::Asynchronous.seconds(next(0.1, true)), (0.4 * 0.024, 0.024));
    assert_eq!(Delivery::Asynchronous.seconds(next(0.02, true)), (0.4 * 0.01, 0.01));
    assert_eq!(Delivery::Asynchronous.seconds(next(0.1, false)), (0.0, 0.0));
    assert_eq!(Delivery::Asynchronous.seconds(None), (0.0, 0.0));
    assert_eq!(Delivery::WithStep.seconds(next(0.1, true)), (0.0, 0.0));
}
