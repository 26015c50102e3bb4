use forebay_proto::{Accepts, Dialect, KvAbilities};
use forebay_types::{BlockHash, KvEvent, Tier};

use super::*;

fn facts(dp_ranks: u16) -> EngineFacts {
    use forebay_engines::remote;
    EngineFacts {
        model: "m".to_owned(),
        served_aliases: Vec::new(),
        dp_ranks,
        block_size_tokens: 16,
        block_bytes: 0,
        blocks_total: 0,
        step_tokens_max: 1,
        context_tokens_max: 1,
        waiting_max: 1,
        kv: KvAbilities { layout: 0, can_export: false, can_import: false, needs_warming: false },
        accepts: Accepts { tokens: false, body: true },
        continues_sampling: false,
        dialect: Dialect {
            version: String::new(),
            speech: remote::Speech {
                dialect: remote::Dialect::Openai,
                model: "m".into(),
                tokens: None,
                hand_over: remote::HandOver::None,
                ranks: remote::RankPin::None,
                salts_cache: false,
                abort: remote::Abort::Close,
            },
        },
        step_prior: forebay_perf_model::StepCoefficients::H100_8B,
        notes: Vec::new(),
    }
}

fn board() -> Board {
    let board = Board::new(FeedLimits::default());
    let data_plane = DataPlane { url: "http://h:1".to_owned(), api_key: None };
    let progress = Progress { state: EngineState::Loading, sentence: String::new() };
    board.begin(Incarnation(1), "openai".to_owned(), data_plane, progress);
    board
}

/// Everything that a stream is told, in a word each.
fn all(board: &Board, told: &mut Told) -> Vec<String> {
    let mut words = Vec::new();
    loop {
        match board.next(told, Instant::now()) {
            NextMessage::Say(body) => words.push(word(&body)),
            NextMessage::Nothing => return words,
            NextMessage::Over => {
                words.push("over".to_owned());
                return words;
            }
        }
    }
}

fn word(body: &Body) -> String {
    match body {
        Body::Progress(progress) => format!("{:?}", progress.state()),
        Body::Ready(_) => "ready".to_owned(),
        Body::Load(load) => format!("load {}", load.dp_rank),
        Body::Steps(steps) => format!("{} steps of {}", steps.steps.len(), steps.dp_rank),
        Body::KvSnapshot(piece) => format!("snapshot of {}", piece.dp_rank),
        Body::KvDeltas(deltas) => format!("{} deltas", deltas.deltas.len()),
        Body::Drain(_) => "drain".to_owned(),
        Body::Died(_) => "died".to_owned(),
        Body::Notice(notice) => match Notice::try_from(notice.clone()).expect("valid") {
            Notice::Note(text) => text,
            Notice::Silent { .. } => "silent".to_owned(),
            Notice::Heard => "heard".to_owned(),
            Notice::Fenced { .. } => "fenced".to_owned(),
            Notice::CacheSight(_) => "sight".to_owned(),
        },
        other => format!("{other:?}"),
    }
}

const KEY: HashKey = HashKey { key: [1; 16], block_size_tokens: 16 };

/// The engine serves, and is watched under the fleet's key.
fn serve(board: &Board, dp_ranks: u16) {
    board.ready(facts(dp_ranks), "openai".to_owned(), CacheSight::Events);
    board.restart_feed(Some(KEY));
}

/// A stream that a gateway of the fleet has welcomed.
fn stream(board: &Board) -> Told {
    let (_, mut told) = board.opening().expect("a life");
    told.welcomed(KEY);
    told
}

fn load() -> RankLoad {
    RankLoad::default()
}

#[test]
fn ranks_are_named_after_the_facts_that_count_them() {
    let board = board();
    let mut told = stream(&board);
    board.load(0, load(), Instant::now());
    board.steps([(0, StepObservation::default())]);
    board.notice(Notice::Note("hello".to_owned()));
    assert_eq!(all(&board, &mut told), ["hello"]);
    serve(&board, 2);
    board.load(1, load(), Instant::now());
    assert_eq!(all(&board, &mut told), ["ready", "load 1", "snapshot of 0", "snapshot of 1", "1 steps of 0"]);
    assert_eq!(all(&board, &mut told), Vec::<String>::new());
}

#[test]
fn states_are_told_as_they_are_and_logs_from_their_oldest_entry() {
    let board = board();
    serve(&board, 1);
    let mut told = stream(&board);
    all(&board, &mut told);
    for _ in 0..10 {
        board.load(0, load(), Instant::now());
    }
    for number in 0..NOTICES_MAX + 10 {
        board.notice(Notice::Note(number.to_string()));
    }
    board.steps(
        (0..STEPS_MAX + 100)
            .map(|n| (0, StepObservation { decodes: n as u32, ..StepObservation::default() })),
    );
    let words = all(&board, &mut told);
    assert_eq!(words[0], "10", "the oldest that is left");
    assert_eq!(
        words[NOTICES_MAX..],
        ["load 0", "256 steps of 0", "256 steps of 0", "256 steps of 0", "256 steps of 0"]
    );
}

#[test]
fn the_most_important_comes_first_and_nothing_after_a_death() {
    let board = board();
    let mut told = stream(&board);
    serve(&board, 1);
    board.load(0, load(), Instant::now());
    board.drain("enough".to_owned());
    let mut late = stream(&board);
    assert_eq!(all(&board, &mut told), ["drain", "ready", "load 0", "snapshot of 0"]);
    assert_eq!(all(&board, &mut late), ["drain", "load 0", "snapshot of 0"], "its Hello had the facts");
    board.load(0, load(), Instant::now());
    board.died("bang", Vec::new());
    board.died("bang again", Vec::new());
    assert_eq!(all(&board, &mut told), ["died"]);
    assert!(told.is_over() && board.is_over(&told) && board.opening().is_none());
    board.load(0, load(), Instant::now());
    assert_eq!(all(&board, &mut told), Vec::<String>::new());
}

#[test]
fn a_stream_of_an_earlier_life_is_over() {
    let board = board();
    let mut told = stream(&board);
    let data_plane = DataPlane { url: "http://h:1".to_owned(), api_key: None };
    let progress = Progress { state: EngineState::Loading, sentence: String::new() };
    board.begin(Incarnation(2), "openai".to_owned(), data_plane, progress);
    assert_eq!(all(&board, &mut told), ["over"]);
    assert_eq!(board.opening().expect("a life").0.incarnation, Incarnation(2));
}

#[test]
fn a_drain_is_not_undone_by_becoming_ready() {
    let board = board();
    board.drain("enough".to_owned());
    board.progress(Progress { state: EngineState::Compiling, sentence: String::new() });
    serve(&board, 1);
    assert_eq!(board.opening().expect("a life").0.progress.state, EngineState::Draining);
}

#[test]
fn an_engine_is_idle_only_by_what_it_said_since() {
    let board = board();
    let began = Instant::now();
    assert_eq!(board.busy(began), None, "nothing is known");
    serve(&board, 2);
    let later = began + Duration::from_secs(1);
    board.load(0, RankLoad { running: 2, waiting: 1, ..load() }, later);
    assert_eq!(board.busy(began), None, "one rank has not said");
    board.load(1, load(), later);
    assert_eq!(board.busy(began), Some(3));
    assert_eq!(board.busy(later), None, "that was before");
}

#[test]
fn a_cache_that_is_watched_anew_is_told_anew() {
    let board = board();
    serve(&board, 1);
    let rank = RankId { incarnation: Incarnation(1), dp_rank: 0 };
    let stored = KvEvent::Stored { parent: None, hashes: vec![BlockHash(1)], tier: Tier::Device, group: 0 };
    board.snapshot(forebay_engines::KvSnapshot { rank, sequence_next: 9, contents: vec![stored] });
    let mut told = stream(&board);
    assert_eq!(all(&board, &mut told), ["snapshot of 0"]);
    board.restart_feed(Some(KEY));
    assert_eq!(all(&board, &mut told), ["snapshot of 0"]);
    let batch = KvEventBatch { rank, sequence: 0, events: Vec::new() };
    assert_eq!(board.kv([batch]), Vec::<u16>::new(), "numbers begin anew");
    assert_eq!(all(&board, &mut told), ["1 deltas"]);
}

#[test]
fn no_hash_goes_to_a_gateway_that_names_blocks_otherwise() {
    let board = board();
    board.ready(facts(1), "openai".to_owned(), CacheSight::Events);
    let mut told = stream(&board);
    board.restart_feed(None);
    assert_eq!(all(&board, &mut told), Vec::<String>::new(), "watched under a key of the agent's own");
    board.restart_feed(Some(HashKey { key: [2; 16], ..KEY }));
    assert_eq!(all(&board, &mut told), Vec::<String>::new(), "under another fleet's");
    board.restart_feed(Some(KEY));
    let (_, mut early) = board.opening().expect("a life");
    assert_eq!(all(&board, &mut early), Vec::<String>::new(), "not welcomed yet");
    assert_eq!(all(&board, &mut told), ["snapshot of 0"]);
}
