use forebay_perf_model::StepCoefficients;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::{
    WireError,
    limits::{self, SENTENCE_BYTES_MAX},
    v1,
};
use forebay_engines::remote::HandOver;
use forebay_types::Role;

fn speech() -> Speech {
    Speech {
        dialect: forebay_engines::remote::Dialect::Sglang,
        model: "Qwen/Qwen3-8B".into(),
        tokens: Some(forebay_engines::remote::TokenRoute::SglangGenerate),
        hand_over: HandOver::Bootstrap { host: "10.0.0.7".into(), port: 8998 },
        ranks: forebay_engines::remote::RankPin::Field,
        salts_cache: true,
        abort: forebay_engines::remote::Abort::SglangAbortRequest,
    }
}

fn facts() -> EngineFacts {
    EngineFacts {
        model: "Qwen3-8B".to_owned(),
        served_aliases: vec!["chat".to_owned(), "qwen".to_owned()],
        dp_ranks: 2,
        block_size_tokens: 16,
        block_bytes: 2 << 20,
        blocks_total: 20_000,
        step_tokens_max: 8_192,
        context_tokens_max: 32_768,
        waiting_max: 256,
        kv: KvAbilities { layout: 99, can_export: true, can_import: false, needs_warming: true },
        accepts: Accepts { tokens: true, body: true },
        continues_sampling: false,
        dialect: Dialect { version: "0.32.0".to_owned(), speech: speech() },
        step_prior: StepCoefficients::H100_8B,
        notes: vec!["KV events are off: start it with --kv-events-config …".to_owned()],
    }
}

pub(crate) fn hello() -> Hello {
    Hello {
        wire_version: 1,
        agent_version: "0.1.0".to_owned(),
        engine: "vllm-0".into(),
        kind: "vllm".to_owned(),
        incarnation: Incarnation(0xfeed_beef),
        role: Role::Both,
        progress: Progress { state: EngineState::Ready, sentence: String::new() },
        facts: Some(facts()),
        data_plane: DataPlane { url: "http://10.0.0.7:8000".to_owned(), api_key: Some(Secret::new("sk-x")) },
        labels: [("zone".to_owned(), "a".to_owned())].into(),
        cache_sight: CacheSight::Events,
    }
}

/// Through bytes, as on the wire.
fn send(hello: Hello) -> Result<Hello, WireError> {
    let bytes = v1::Hello::from(hello).encode_to_vec();
    v1::Hello::decode(bytes.as_slice()).expect("own encoding").try_into()
}

proptest! {
    #[test]
    fn every_field_comes_back(
        numbers in any::<[u32; 6]>(),
        large in any::<[u64; 2]>(),
        flags in any::<[bool; 7]>(),
        incarnation in 1_u64..,
        dp_ranks in 1..=limits::DP_RANKS_MAX,
        block_size_tokens in 1..=limits::BLOCK_SIZE_TOKENS_MAX,
        rates in prop::array::uniform5(0.0..10.0_f64),
        texts in prop::collection::vec("[a-z äß/.-]{1,40}", 8),
        role in prop::sample::select(vec![Role::Prefill, Role::Decode, Role::Both]),
        state in prop::sample::select(vec![EngineState::Loading, EngineState::Compiling, EngineState::Warming,
                                           EngineState::Ready, EngineState::Draining]),
    ) {
        let sent = Hello {
            wire_version: numbers[0],
            agent_version: texts[0].clone(),
            engine: texts[1].as_str().into(),
            kind: texts[2].clone(),
            incarnation: Incarnation(incarnation),
            role,
            progress: Progress { state, sentence: texts[3].clone() },
            facts: (flags[0] || state == EngineState::Ready).then(|| EngineFacts {
                model: texts[4].clone(),
                served_aliases: vec![texts[5].clone()],
                dp_ranks,
                block_size_tokens,
                block_bytes: large[0],
                blocks_total: numbers[1],
                step_tokens_max: numbers[2].max(1),
                context_tokens_max: numbers[3].max(1),
                waiting_max: numbers[4],
                kv: KvAbilities {
                    layout: large[1], can_export: flags[1], can_import: flags[2], needs_warming: flags[3],
                },
                accepts: Accepts { tokens: flags[4], body: flags[5] },
                continues_sampling: flags[6],
                dialect: Dialect {
                    version: texts[7].clone(),
                    speech: Speech { model: texts[6].as_str().into(), ..speech() },
                },
                step_prior: StepCoefficients::from_array(rates),
                notes: vec![texts[0].clone(), texts[1].clone()],
            }),
            data_plane: DataPlane {
                url: "https://engine.example:8443".to_owned(),
                api_key: flags[1].then(|| Secret::new("sk-y")),
            },
            labels: [(texts[2].clone(), texts[3].clone())].into(),
            cache_sight: if flags[2] { CacheSight::Events } else {
                CacheSight::Approximate { why: texts[4].clone() }
            },
        };
        prop_assert_eq!(send(sent.clone()), Ok(sent));
    }
}

type Change = fn(&mut v1::Hello);

#[test]
fn what_cannot_be_is_refused_in_a_sentence() {
    fn facts(hello: &mut v1::Hello) -> &mut v1::EngineFacts {
        hello.facts.as_mut().unwrap()
    }
    fn data_plane(hello: &mut v1::Hello) -> &mut v1::DataPlane {
        hello.data_plane.as_mut().unwrap()
    }
    #[rustfmt::skip]
    let rows: &[(Change, &str)] = &[
        (|h| h.incarnation = 0, "the incarnation is 0; it must be drawn at random, and not 0"),
        (|h| h.engine.clear(), "the engine's name is empty"),
        (|h| h.kind = "vl\u{1b}[2Jlm".to_owned(), "the engine's kind has a control character in it"),
        (|h| h.role = 0, "the role is 0, which this version does not know"),
        (|h| h.role = 9, "the role is 9, which this version does not know"),
        (|h| h.progress = None, "Hello has no progress, which is required"),
        (|h| h.progress.as_mut().unwrap().state = 77, "the engine's state is 77, which this version does not know"),
        (|h| h.facts = None, "Hello of a ready engine has no facts, which is required"),
        (|h| h.data_plane = None, "Hello has no data_plane, which is required"),
        (|h| h.cache_sight = None, "Hello has no cache_sight, which is required"),
        (|h| h.cache_sight.as_mut().unwrap().sight = None, "CacheSight has no sight, which is required"),
        (|h| h.labels = (0..65).map(|n| (n.to_string(), String::new())).collect(), "the labels: 65 labels, at most 64 are allowed"),
        (|h| _ = h.labels.insert("k".to_owned(), "v".repeat(1_025)), "a label's value: 1025 bytes, at most 1024 are allowed"),
        (|h| facts(h).model.clear(), "the model's name is empty"),
        (|h| facts(h).served_aliases = vec!["a".to_owned(); 65], "the served aliases: 65 names, at most 64 are allowed"),
        (|h| facts(h).served_aliases.push(String::new()), "a served alias is empty"),
        (|h| facts(h).dp_ranks = 0, "the number of DP ranks is 0; it must be at least 1"),
        (|h| facts(h).dp_ranks = 65_537, "the DP ranks: 65537 ranks, at most 1024 are allowed"),
        (|h| facts(h).block_size_tokens = 0, "the block size is 0; it must be at least 1"),
        (|h| facts(h).block_size_tokens = 65_537, "the block size: 65537 tokens, at most 65536 are allowed"),
        (|h| facts(h).step_tokens_max = 0, "the token budget of a step is 0; it must be at least 1"),
        (|h| facts(h).context_tokens_max = 0, "the context length is 0; it must be at least 1"),
        (|h| facts(h).dialect = None, "EngineFacts has no dialect, which is required"),
        (|h| facts(h).step_prior = None, "EngineFacts has no step_prior, which is required"),
        (|h| facts(h).step_prior.as_mut().unwrap().base_seconds = f64::INFINITY, "a coefficient of the step's cost is inf; it must be finite and at least 0"),
        (|h| facts(h).step_prior.as_mut().unwrap().per_decode_seconds = -1e-3, "a coefficient of the step's cost is -0.001; it must be finite and at least 0"),
        (|h| facts(h).notes = vec![String::new(); 33], "the notes: 33 sentences, at most 32 are allowed"),
        (|h| data_plane(h).url = "10.0.0.7:8000".to_owned(), "the data plane's URL is not of the form http://host:port or https://host:port"),
        (|h| data_plane(h).url = "ftp://h:1".to_owned(), "the data plane's URL is not of the form http://host:port or https://host:port"),
        (|h| data_plane(h).url = "http://user:word@h:1".to_owned(), "the data plane's URL is not of the form http://host:port or https://host:port"),
        (|h| data_plane(h).url = format!("http://{}:1", "h".repeat(2_048)), "the data plane's URL: 2057 bytes, at most 2048 are allowed"),
        (|h| data_plane(h).api_key = "sk\r\nx: y".to_owned(), "the API key has a byte in it that a header cannot carry"),
        (|h| data_plane(h).api_key = "k".repeat(513), "the API key: 513 bytes, at most 512 are allowed"),
    ];
    for (change, sentence) in rows {
        let mut message = v1::Hello::from(hello());
        change(&mut message);
        assert_eq!(Hello::try_from(message).expect_err(sentence).to_string(), *sentence);
    }
}

#[test]
fn sentences_are_cut_not_refused() {
    let long = "ä".repeat(SENTENCE_BYTES_MAX);
    let mut message = v1::Hello::from(hello());
    message.progress.as_mut().unwrap().sentence = long.clone();
    message.facts.as_mut().unwrap().notes = vec![long.clone()];
    let read = Hello::try_from(message).expect("cut");
    let notes = read.facts.expect("ready").notes;
    for text in [&read.progress.sentence, &notes[0]] {
        assert!(text.len() <= SENTENCE_BYTES_MAX && text.ends_with("ä…"), "{} bytes", text.len());
    }
    let sent = v1::Progress::from(Progress { state: EngineState::Loading, sentence: long });
    assert!(sent.sentence.len() <= SENTENCE_BYTES_MAX);
}

#[test]
fn an_engine_that_loads_needs_no_facts() {
    let progress = Progress { state: EngineState::Loading, sentence: "7 of 16 shards".to_owned() };
    let loading = Hello { progress, facts: None, ..hello() };
    assert_eq!(send(loading.clone()), Ok(loading));
}

#[test]
fn ready_comes_back() {
    let ready = Ready { facts: facts(), cache_sight: CacheSight::Events };
    assert_eq!(v1::Ready::from(ready.clone()).try_into(), Ok(ready));
}

#[test]
fn every_way_of_speaking_comes_back() {
    use forebay_engines::remote::{Abort, Dialect as Kind, RankPin, TokenRoute};
    let plain = Speech {
        dialect: Kind::Openai,
        model: "m".into(),
        tokens: None,
        hand_over: HandOver::None,
        ranks: RankPin::None,
        salts_cache: false,
        abort: Abort::Close,
    };
    let vllm = Speech {
        dialect: Kind::Vllm,
        tokens: Some(TokenRoute::Completions),
        hand_over: HandOver::TransferParams,
        ranks: RankPin::Header,
        abort: Abort::VllmAbortRequests,
        ..plain.clone()
    };
    let generate = Speech { tokens: Some(TokenRoute::VllmGenerate), dialect: Kind::Trtllm, ..plain.clone() };
    for speech in [plain, vllm, generate, speech()] {
        let dialect = Dialect { version: "1".to_owned(), speech };
        assert_eq!(Dialect::try_from(v1::Dialect::from(dialect.clone())), Ok(dialect));
    }
    let refused = |change: fn(&mut v1::Dialect)| {
        let mut message = v1::Dialect::from(Dialect { version: String::new(), speech: speech() });
        change(&mut message);
        Dialect::try_from(message).expect_err("refused").to_string()
    };
    assert!(refused(|message| message.name = "tgi".to_owned()).contains("none that this version knows"));
    assert!(refused(|message| message.token_route = 99).contains("the token route is 99"));
    assert!(refused(|message| message.hand_over = Some(v1::HandOver { way: None })).contains("way"));
}
