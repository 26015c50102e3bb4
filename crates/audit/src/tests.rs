//! Fleets whose truth is known: what their engines would have shown is made by hand, and what is inferred is compared.

use std::collections::{BTreeMap, HashSet};

use forebay_engine_events::{EngineEvent, EngineHash, EventBatch, Stored};
use forebay_engine_wire::metrics::Histogram;
use forebay_twin::{Draw, EngineEntry, FleetFile, Session, Trace, TraceForm, mix};
use proptest::prelude::*;

use super::*;

const BLOCK: usize = 16;
const TTFT: f64 = 0.05;
const ITL: f64 = 0.01;

/// One request as it really was.
#[derive(Debug, Clone)]
struct Real {
    seat: usize,
    at: f64,
    prompt: Vec<u32>,
    answer: Vec<u32>,
}

/// Conversations over so many seats, routed at random, some of a shared beginning.
fn conversations(seed: u64, seats: usize, chats: usize, seconds: f64) -> Vec<Real> {
    let mut draw = Draw::new(seed, "test");
    let text = |draw: &mut Draw, tokens: u64| -> Vec<u32> {
        (0..tokens).map(|_| draw.below(50_000) as u32).collect()
    };
    let systems: Vec<Vec<u32>> = (0..3).map(|_| text(&mut draw, 500)).collect();
    let mut real = Vec::new();
    for _ in 0..chats {
        let mut said = systems[draw.below(3) as usize].clone();
        let mut at = draw.unit() * seconds * 0.8;
        for _ in 0..=draw.below(3) {
            let question = 30 + draw.below(700);
            said.extend(text(&mut draw, question));
            let length = 10 + draw.below(150);
            let answer = text(&mut draw, length);
            let seat = draw.below(seats as u64) as usize;
            real.push(Real { seat, at, prompt: said.clone(), answer: answer.clone() });
            said.extend(&answer);
            at += TTFT + ITL * answer.len() as f64 + 2.0 + draw.exponential(5.0);
        }
    }
    real.retain(|request| request.at < seconds - 3.0);
    real.sort_by(|one, other| one.at.total_cmp(&other.at));
    real
}

/// What the engines of a fleet showed.
struct Shown {
    /// When, where, and what was stored.
    events: Vec<(f64, usize, EventBatch)>,
    /// Of each seat: when, prompt tokens, cached ones, answer tokens.
    counted: Vec<(f64, usize, f64, f64, f64)>,
    prompt_tokens: f64,
    cached_tokens: f64,
    output_tokens: f64,
}

fn hashes(tokens: &[u32], seat: usize) -> Vec<u64> {
    let chunks = tokens.chunks_exact(BLOCK).scan(mix(seat as u64 + 1), |state, block| {
        *state = block.iter().fold(*state, |state, &token| mix(state ^ u64::from(token)));
        Some(*state)
    });
    chunks.collect()
}

fn stored(seconds: f64, all: &[u64], tokens: &[u32], from: usize, to: usize) -> EventBatch {
    let event = Stored::plain(
        from.checked_sub(1).map(|before| EngineHash(all[before])),
        all[from..to].iter().map(|&hash| EngineHash(hash)).collect(),
        tokens[from * BLOCK..to * BLOCK].into(),
        BLOCK as u32,
    );
    EventBatch { time_seconds: 1e9 + seconds, events: vec![EngineEvent::Stored(event)], dp_rank: None }
}

/// Engines that never evict, compute prompts in steps of `chunk_blocks` and hash as no other does.
fn shown(real: &[Real], seats: usize, chunk_blocks: usize) -> Shown {
    let mut caches: Vec<HashSet<u64>> = vec![HashSet::new(); seats];
    let mut shown = Shown {
        events: Vec::new(),
        counted: Vec::new(),
        prompt_tokens: 0.0,
        cached_tokens: 0.0,
        output_tokens: 0.0,
    };
    for request in real {
        let Real { seat, at, prompt, answer } = request;
        let whole: Vec<u32> = prompt.iter().chain(answer).copied().collect();
        let all = hashes(&whole, *seat);
        let cached =
            all[..(prompt.len() - 1) / BLOCK].iter().take_while(|hash| caches[*seat].contains(hash)).count();
        let full = prompt.len() / BLOCK;
        let mut from = cached;
        let mut step = at + TTFT;
        while from < full {
            let to = full.min(from + chunk_blocks);
            shown.events.push((step, *seat, stored(step, &all, &whole, from, to)));
            (from, step) = (to, step + 0.1);
        }
        for block in full..all.len() {
            let seconds = step + ITL * ((block + 1) * BLOCK - prompt.len()) as f64;
            shown.events.push((seconds, *seat, stored(seconds, &all, &whole, block, block + 1)));
        }
        caches[*seat].extend(&all);
        let (tokens, hits) = (prompt.len() as f64, (cached * BLOCK) as f64);
        shown.counted.push((at + TTFT, *seat, tokens, hits, answer.len() as f64));
        shown.prompt_tokens += tokens;
        shown.cached_tokens += hits;
        shown.output_tokens += answer.len() as f64;
    }
    shown.events.sort_by(|one, other| one.0.total_cmp(&other.0));
    shown.counted.sort_by(|one, other| one.0.total_cmp(&other.0));
    shown
}

/// Records from `from` seconds on: a look a second, and events if they are `heard`.
fn recorded(shown: &Shown, seats: usize, from: f64, seconds: f64, heard: bool) -> Recorder {
    let mut recorder = Recorder::new(seats, Limits::default());
    let mut readings: Vec<Reading> = vec![Reading::default(); seats];
    let empty = Histogram::with_bounds(&[0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1.0]);
    for reading in &mut readings {
        (reading.histograms.ttft, reading.histograms.itl) = (empty.clone(), empty.clone());
    }
    if heard {
        (0..seats).for_each(|seat| recorder.listening(seat));
    }
    let (mut events, mut counted) = (shown.events.iter().peekable(), shown.counted.iter().peekable());
    for second in 0..=seconds as usize {
        let now = second as f64;
        while let Some((at, seat, batch)) = events.next_if(|event| event.0 <= now) {
            if heard && *at >= from {
                recorder.heard(*seat, at - from, false, batch);
            }
        }
        while let Some(&(_, seat, prompt, cached, output)) = counted.next_if(|request| request.0 <= now) {
            let reading = &mut readings[seat];
            reading.figures.prompt_tokens += prompt;
            reading.figures.cached_tokens += cached;
            reading.figures.output_tokens += output;
            reading.histograms.ttft.observe(TTFT);
            (1..output as usize).for_each(|_| reading.histograms.itl.observe(ITL));
        }
        if now >= from {
            for (seat, reading) in readings.iter().enumerate() {
                recorder.read(seat, Reading { at_seconds: now - from, ..reading.clone() });
            }
        }
    }
    recorder
}

fn near(what: &str, value: f64, expected: f64, within: f64) {
    assert!((value / expected - 1.0).abs() <= within, "{what}: {value}, expected {expected}");
}

fn tokens(sessions: &[Session]) -> (f64, f64) {
    let prompts =
        sessions.iter().flat_map(|session| &session.turns[0].new).map(|piece| f64::from(piece.tokens));
    (prompts.sum(), sessions.iter().map(|session| f64::from(session.turns[0].answer.tokens)).sum())
}

fn bench(seats: usize) -> Bench {
    let file = FleetFile {
        engine: vec![EngineEntry { count: seats as u32, ..EngineEntry::default() }],
        ..FleetFile::of(0)
    };
    let profile = forebay_perf_model::Profile::built_in("h100-llama8b").expect("it is built in");
    let profile = std::sync::Arc::new(profile);
    Bench { engines: file.engines(&|_| Ok(profile.clone())).expect("a fleet"), slow: 1.0 }
}

/// Share of prompt tokens that a cache without end would have, were every request to run where its key says.
fn cached_share(sessions: &[Session], counted_from: f64) -> f64 {
    let mut caches: BTreeMap<u64, HashSet<u64>> = BTreeMap::new();
    let (mut cached, mut all) = (0.0, 0.0);
    for (session, request) in sessions.iter().zip(trace(sessions, BLOCK as u32)) {
        let cache = caches.entry(session.key).or_default();
        let full = request.prompt_tokens as usize / BLOCK;
        let hits = request.blocks[..full].iter().take_while(|&id| cache.contains(id)).count();
        cache.extend(&request.blocks[..full]);
        if session.at.seconds() >= counted_from {
            cached += (hits * BLOCK) as f64;
            all += f64::from(request.prompt_tokens);
        }
    }
    cached / all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_events_show_whole_is_inferred_whole(seed: u64, seats in 1usize..5, chunk_blocks in 20usize..200) {
        let real = conversations(seed, seats, 120, 300.0);
        let shown = shown(&real, seats, chunk_blocks);
        let recorder = recorded(&shown, seats, 0.0, 300.0, true);
        let inferred = recorder.infer().unwrap();
        let sessions = inferred.sessions(seed);
        near("requests", sessions.len() as f64, real.len() as f64, 0.03);
        let (prompts, outputs) = tokens(&sessions);
        near("tokens of prompts", prompts, shown.prompt_tokens, 0.02);
        near("tokens of answers", outputs, shown.output_tokens, 0.02);
        let share = shown.cached_tokens / shown.prompt_tokens;
        // Answers are no prompts: what later turns repeat of them is not in this reckoning.
        let found = cached_share(&sessions, 0.0);
        prop_assert!((found - share).abs() < 0.1, "{} of {}", found, share);
        prop_assert!(sessions.is_sorted_by_key(|session| session.at));
        prop_assert_eq!(&inferred.sessions(seed), &sessions, "one seed, one answer");
    }

    #[test]
    fn nothing_that_engines_say_ends_the_process(
        events in prop::collection::vec((0usize..2, 0u64..6, prop::collection::vec(0u64..6, 0..4), 0u32..20, 0usize..40, any::<bool>()), 0..60),
    ) {
        let mut recorder = Recorder::new(2, Limits { rank_blocks_max: 8, blocks_max: 8, requests_max: 10 });
        for (second, (seat, parent, hashes, block_size_tokens, tokens, clears)) in events.into_iter().enumerate() {
            let mut batch = stored(second as f64, &[1], &[7; BLOCK], 0, 1);
            let EngineEvent::Stored(stored) = &mut batch.events[0] else { unreachable!() };
            stored.parent = (parent > 0).then_some(EngineHash(parent));
            stored.hashes = hashes.into_iter().map(EngineHash).collect();
            stored.block_size_tokens = block_size_tokens;
            stored.tokens = vec![second as u32; tokens];
            if clears {
                batch.events.push(EngineEvent::Cleared);
            }
            recorder.heard(seat, second as f64, second % 3 == 0, &batch);
        }
        prop_assert!(recorder.chains.requests.len() <= 10);
        let _too_little = recorder.infer();
    }
}

#[test]
fn the_replay_as_seen_finds_the_share_that_was_measured() {
    let real = conversations(7, 3, 150, 300.0);
    let shown = shown(&real, 3, 512);
    let inferred = recorded(&shown, 3, 0.0, 300.0, true).infer().unwrap();
    let measured = inferred.measured.cached_share().unwrap();
    let bench = bench(3);
    let run = |way| bench.run(&inferred, way, 1, &mut |_| true);
    let seen = run(Way::AsSeen);
    assert!((seen.cached_share - measured).abs() < 0.02, "{} of {measured}", seen.cached_share);
    near("requests that count", seen.requests as f64, inferred.measured.requests, 0.03);
    assert_eq!(seen.unfinished, 0);
    let forebay = run(Way::Forebay);
    assert!(forebay.cached_share > seen.cached_share + 0.1, "{} {}", forebay.cached_share, seen.cached_share);
}

#[test]
fn beginnings_that_were_cached_before_are_as_long_as_the_hit_counters_say() {
    let real = conversations(11, 2, 200, 400.0);
    let shown = shown(&real, 2, 512);
    // Whoever comes after 100 seconds never hears of the system prompts, and of the first turns of some.
    let inferred = recorded(&shown, 2, 100.0, 400.0, true).infer().unwrap();
    let later: Vec<&Real> = real.iter().filter(|request| request.at + TTFT > 100.0).collect();
    assert!(inferred.sight.rooted > later.len() / 2, "{:?}", inferred.sight);
    let prompts: f64 = later.iter().map(|request| request.prompt.len() as f64).sum();
    for seed in 1..5 {
        let sessions = inferred.sessions(seed);
        near("requests", sessions.len() as f64, later.len() as f64, 0.05);
        near("tokens of prompts", tokens(&sessions).0, prompts, 0.05);
    }
    let measured = inferred.measured.cached_share().unwrap();
    let seen = bench(2).run(&inferred, Way::AsSeen, 1, &mut |_| true);
    assert!((seen.cached_share - measured).abs() < 0.08, "{} of {measured}", seen.cached_share);
    // Conversations that moved from rank to rank show that both had the same beginnings, though each hashes as no other does.
    for seed in 1..3 {
        let [seen, forebay] = [Way::AsSeen, Way::Forebay]
            .map(|way| bench(2).run(&inferred, way, seed, &mut |_| true).cached_share);
        assert!(forebay > seen + 0.05, "seed {seed}: {forebay} {seen}");
    }
}

#[test]
fn without_events_sums_and_the_measured_share_are_kept() {
    let real = conversations(13, 2, 150, 300.0);
    let shown = shown(&real, 2, 512);
    let inferred = recorded(&shown, 2, 0.0, 300.0, false).infer().unwrap();
    assert_eq!((inferred.sight.blind_ranks, inferred.sight.by_events), (2, 0));
    let sessions = inferred.sessions(3);
    assert_eq!(sessions.len(), real.len());
    let (prompts, outputs) = tokens(&sessions);
    near("tokens of prompts", prompts, shown.prompt_tokens, 0.01);
    near("tokens of answers", outputs, shown.output_tokens, 0.02);
    let measured = inferred.measured.cached_share().unwrap();
    for way in Way::ALL {
        let share = bench(2).run(&inferred, way, 3, &mut |_| true).cached_share;
        assert!((share - measured).abs() < 0.08, "{way:?}: {share} of {measured}");
    }
}

#[test]
fn prompts_that_store_nothing_are_made_up_from_the_counters() {
    let mut real = conversations(17, 1, 60, 200.0);
    // The same question again and again, answered with a word.
    let mut asked = Real { answer: vec![1, 2, 3], ..real[0].clone() };
    asked.prompt.truncate(515);
    real.extend((1..40).map(|nth| Real { at: asked.at + 4.0 * f64::from(nth), ..asked.clone() }));
    real.sort_by(|one, other| one.at.total_cmp(&other.at));
    real.retain(|request| request.at < 197.0);
    let shown = shown(&real, 1, 512);
    let inferred = recorded(&shown, 1, 0.0, 200.0, true).infer().unwrap();
    assert!(inferred.sight.made_up > 20, "{:?}", inferred.sight);
    let sessions = inferred.sessions(2);
    near("requests", sessions.len() as f64, real.len() as f64, 0.02);
    near("tokens of prompts", tokens(&sessions).0, shown.prompt_tokens, 0.15);
}

#[test]
fn too_little_is_said_and_not_guessed_from() {
    let real = conversations(19, 1, 8, 60.0);
    let recorder = recorded(&shown(&real, 1, 512), 1, 0.0, 60.0, true);
    let error = recorder.infer().unwrap_err();
    assert!(matches!(error, TooLittle::Requests { needed: 20.0, .. }), "{error}");
    assert_eq!(recorder.requests(), real.len() as f64);
    assert!(Recorder::new(0, Limits::default()).infer().is_err());
}

#[test]
fn an_engine_that_restarts_counts_from_nothing_again() {
    let real = conversations(23, 1, 60, 200.0);
    let shown = shown(&real, 1, 512);
    let mut recorder = recorded(&shown, 1, 0.0, 200.0, true);
    let before = recorder.requests();
    let mut anew = Reading { at_seconds: 201.0, ..Reading::default() };
    anew.histograms.ttft = Histogram::with_bounds(&[0.1]);
    (0..3).for_each(|_| anew.histograms.ttft.observe(TTFT));
    anew.figures.prompt_tokens = 300.0;
    recorder.restarted(0);
    recorder.read(0, anew);
    assert_eq!(recorder.requests(), before + 3.0);
}

#[test]
fn what_was_recorded_is_read_by_simulate() {
    let real = conversations(29, 2, 60, 200.0);
    let inferred = recorded(&shown(&real, 2, 512), 2, 0.0, 200.0, true).infer().unwrap();
    let sessions = inferred.sessions(1);
    let requests = trace(&sessions, inferred.block_tokens);
    let text: Vec<String> = requests.iter().map(forebay_twin::TraceRequest::line).collect();
    let read = Trace::parse(&text.join("\n"), TraceForm::Forebay, false).unwrap();
    assert_eq!(read.requests, requests);
    let ids: HashSet<u64> = requests.iter().flat_map(|request| request.blocks.clone()).collect();
    let blocks: usize = requests.iter().map(|request| request.blocks.len()).sum();
    assert!(ids.len() < blocks * 3 / 4, "{} of {blocks} blocks are distinct", ids.len());
}
