//! The bytes of wire version 1, kept so that a changed field number, type or enum value fails here before it fails
//! between two releases. Lines may be added to `wire_v1.txt`; one that is there may change only with the wire version.

use forebay_proto::v1::{self, from_agent::Body as AgentBody, from_gateway::Body as GatewayBody};
use prost::Message;

fn dialect(way: v1::hand_over::Way) -> v1::Dialect {
    v1::Dialect {
        name: "d".to_owned(),
        version: "v".to_owned(),
        model: "m".to_owned(),
        token_route: v1::TokenRoute::SglangGenerate.into(),
        hand_over: Some(v1::HandOver { way: Some(way) }),
        rank_pin: v1::RankPin::Field.into(),
        salts_cache: true,
        abort: v1::Abort::Sglang.into(),
    }
}

fn facts() -> v1::EngineFacts {
    let bootstrap = v1::hand_over::Bootstrap { host: "h".to_owned(), port: 1 };
    v1::EngineFacts {
        model: "m".to_owned(),
        served_aliases: vec!["a".to_owned()],
        dp_ranks: 1,
        block_size_tokens: 2,
        block_bytes: 3,
        blocks_total: 4,
        step_tokens_max: 5,
        context_tokens_max: 6,
        waiting_max: 7,
        kv_layout: 8,
        can_export: true,
        can_import: true,
        needs_warming: true,
        accepts_tokens: true,
        accepts_body: true,
        continues_sampling: true,
        dialect: Some(dialect(v1::hand_over::Way::Bootstrap(bootstrap))),
        step_prior: Some(v1::StepCoefficients {
            base_seconds: 1.0,
            per_prefill_token_seconds: 2.0,
            per_attention_seconds: 3.0,
            per_decode_seconds: 4.0,
            per_context_token_seconds: 5.0,
        }),
        notes: vec!["n".to_owned()],
    }
}

fn sight() -> v1::CacheSight {
    v1::CacheSight { sight: Some(v1::cache_sight::Sight::Events(v1::cache_sight::Events {})) }
}

fn hello() -> v1::Hello {
    v1::Hello {
        wire_version: 1,
        agent_version: "0".to_owned(),
        engine: "e".to_owned(),
        kind: "k".to_owned(),
        incarnation: 9,
        role: v1::Role::Both.into(),
        progress: Some(v1::Progress { state: v1::State::Ready.into(), sentence: "s".to_owned() }),
        facts: Some(facts()),
        data_plane: Some(v1::DataPlane { url: "u".to_owned(), api_key: "k".to_owned() }),
        labels: [("l".to_owned(), "v".to_owned())].into(),
        cache_sight: Some(sight()),
    }
}

fn deltas() -> v1::KvDeltas {
    let event = |event| v1::KvEvent { event: Some(event) };
    let stored =
        v1::KvStored { parent: Some(1), hashes: vec![2, 3], tier: v1::Tier::Device.into(), group: 4 };
    let removed = v1::KvRemoved { hashes: vec![4], tier: v1::Tier::Remote.into(), group: 5 };
    let groups = v1::KvGroups { groups: vec![v1::KvGroup { window_blocks: 6, step_blocks: 7 }] };
    v1::KvDeltas {
        deltas: vec![v1::KvDelta {
            dp_rank: 1,
            sequence: 5,
            events: vec![
                event(v1::kv_event::Event::Stored(stored)),
                event(v1::kv_event::Event::Removed(removed)),
                event(v1::kv_event::Event::Cleared(v1::KvCleared {})),
                event(v1::kv_event::Event::Groups(groups)),
            ],
        }],
    }
}

fn load() -> v1::Load {
    let load = v1::RankLoad {
        waiting: 1,
        running: 2,
        decoding: 3,
        prefill_tokens: 4,
        context_tokens: 5,
        blocks_total: 6,
        blocks_free: 7,
        preemptions: 8,
        cached_tokens: 9,
        prompt_tokens: 10,
    };
    v1::Load { dp_rank: 1, load: Some(load), age_ms: 11 }
}

fn tokenizer() -> v1::Tokenizer {
    v1::Tokenizer {
        request_id: 1,
        file: "f".to_owned(),
        file_bytes: 2,
        offset: 3,
        data: vec![4].into(),
        last: true,
        unavailable: "u".to_owned(),
    }
}

fn from_agent() -> Vec<(&'static str, AgentBody)> {
    let step = v1::StepObservation {
        prefill_tokens: 1,
        prefill_attention: 2.0,
        decodes: 3,
        context_tokens: 4,
        seconds: 5.0,
    };
    let snapshot = v1::KvSnapshot {
        dp_rank: 1,
        sequence_next: 2,
        chunk_index: 3,
        last: true,
        blocks_total: 4,
        contents: deltas().deltas.remove(0).events,
    };
    let note = v1::notice::News::Note(v1::notice::Note { text: "t".to_owned() });
    let fenced = v1::notice::News::Fenced(v1::notice::Fenced { why: "w".to_owned() });
    let params = v1::hand_over::Way::TransferParams(v1::hand_over::TransferParams {});
    let facts = v1::EngineFacts { dialect: Some(dialect(params)), ..v1::EngineFacts::default() };
    let ready = v1::Ready { facts: Some(facts), cache_sight: Some(sight()) };
    let text = || "t".to_owned();
    vec![
        ("hello", AgentBody::Hello(hello())),
        (
            "progress",
            AgentBody::Progress(v1::Progress { state: v1::State::Draining.into(), sentence: text() }),
        ),
        ("ready", AgentBody::Ready(ready)),
        ("heartbeat", AgentBody::Heartbeat(v1::Heartbeat { counter: 300 })),
        ("load", AgentBody::Load(load())),
        ("steps", AgentBody::Steps(v1::Steps { dp_rank: 1, steps: vec![step] })),
        ("kv_snapshot", AgentBody::KvSnapshot(snapshot)),
        ("kv_deltas", AgentBody::KvDeltas(deltas())),
        ("drain", AgentBody::Drain(v1::Drain { sentence: text() })),
        ("died", AgentBody::Died(v1::Died { last_words: text(), log_tail: vec![text()] })),
        ("logs", AgentBody::Logs(v1::Logs { request_id: 1, lines: vec![text()] })),
        ("tokenizer", AgentBody::Tokenizer(tokenizer())),
        ("notice: note", AgentBody::Notice(v1::Notice { news: Some(note) })),
        ("notice: fenced", AgentBody::Notice(v1::Notice { news: Some(fenced) })),
    ]
}

fn from_gateway() -> Vec<(&'static str, GatewayBody)> {
    let welcome = v1::Welcome {
        wire_version: 1,
        gateway: "g".to_owned(),
        hash_key: Some(v1::HashKey { key: vec![2; 16], block_size_tokens: 3 }),
        heartbeat_interval_ms: 4,
        lease_ms: 5,
    };
    let reject = v1::Reject { sentence: "s".to_owned(), reason: v1::RejectReason::TooManyEngines.into() };
    vec![
        ("welcome", GatewayBody::Welcome(welcome)),
        ("request_snapshot", GatewayBody::RequestSnapshot(v1::RequestSnapshot { dp_rank: 1 })),
        ("request_logs", GatewayBody::RequestLogs(v1::RequestLogs { request_id: 1, lines: 2 })),
        ("request_tokenizer", GatewayBody::RequestTokenizer(v1::RequestTokenizer { request_id: 1 })),
        ("drain_engine", GatewayBody::DrainEngine(v1::DrainEngine {})),
        ("reject", GatewayBody::Reject(reject)),
        ("ack", GatewayBody::Ack(v1::Ack { counter: 1 })),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn messages_have_the_bytes_of_version_1() {
    let mut lines = Vec::new();
    for (name, body) in from_agent() {
        let message = v1::FromAgent::from(body);
        let bytes = message.encode_to_vec();
        lines.push(format!("agent {name} {}", hex(&bytes)));
        assert_eq!(v1::FromAgent::decode(bytes.as_slice()), Ok(message));
    }
    for (name, body) in from_gateway() {
        let message = v1::FromGateway::from(body);
        let bytes = message.encode_to_vec();
        lines.push(format!("gateway {name} {}", hex(&bytes)));
        assert_eq!(v1::FromGateway::decode(bytes.as_slice()), Ok(message));
    }
    let kept: Vec<&str> = include_str!("wire_v1.txt").lines().collect();
    assert_eq!(lines, kept, "as it is now:\n{}\n", lines.join("\n"));
}

/// Field 15 of a text, which no message has: what a newer version may add.
const NEWER_FIELD: [u8; 3] = [15 << 3 | 2, 1, b'x'];

#[test]
fn fields_of_a_newer_version_are_skipped() {
    for (name, message) in [("load", load().encode_to_vec()), ("hello", hello().encode_to_vec())] {
        let mut newer = message;
        newer.extend(NEWER_FIELD);
        match name {
            "load" => assert_eq!(v1::Load::decode(newer.as_slice()), Ok(load())),
            _ => assert_eq!(v1::Hello::decode(newer.as_slice()), Ok(hello())),
        }
    }
}

#[test]
fn messages_of_a_newer_version_have_no_body() {
    assert_eq!(v1::FromAgent::decode(NEWER_FIELD.as_slice()), Ok(v1::FromAgent { body: None }));
    assert_eq!(v1::FromGateway::decode(NEWER_FIELD.as_slice()), Ok(v1::FromGateway { body: None }));
}
