//! KV that goes from a prefill leg to a decode leg.

use std::time::{Duration, Instant};

use forebay_engines::{
    Bootstrap, Driver, FirstToken, KvHandle, KvPlace, Leg, LegEvent, StartError, Work,
    remote::{HandOver, RankPin},
};
use forebay_types::{LegId, Role};
use serde_json::{Value, json};

use crate::rig::*;

/// What a vLLM 0.32 prefill engine answered, with a prompt of 3 tokens.
fn prefill_answer() -> Value {
    let captured = include_str!("../../../engine-wire/fixtures/vllm/nixl_pd/tito_2_prefill_response.json");
    let mut answer: Value = serde_json::from_str(captured).expect("JSON");
    answer["usage"]["prompt_tokens"] = json!(3);
    answer
}

/// A vLLM pair with the servers that play it.
struct Pair {
    prefill: Attached,
    decode: Attached,
    at_prefill: Double,
    at_decode: Double,
}

async fn pair() -> Pair {
    let (at_prefill, at_decode) = (Double::start().await, Double::start().await);
    let held = forebay_engines::remote::HeldKv::new();
    let plan = |incarnation, role| Plan { incarnation, role, held: held.clone(), ..vllm() };
    Pair {
        prefill: plan(1, Role::Prefill).attach(&at_prefill.url),
        decode: plan(2, Role::Decode).attach(&at_decode.url),
        at_prefill,
        at_decode,
    }
}

fn prefill_leg(id: u64) -> Leg {
    Leg { work: Work::Prefill, ..leg(id, &[10, 11, 12], 8) }
}

fn decode_leg(id: u64, kv: &KvHandle) -> Leg {
    Leg { work: Work::Decode { kv: kv.clone(), first: Vec::new() }, ..leg(id, &[10, 11, 12], 8) }
}

fn handle(events: &[LegEvent]) -> KvHandle {
    let handle = events.iter().find_map(|event| match event {
        LegEvent::Prefilled(kv) => Some(kv.clone()),
        _ => None,
    });
    handle.unwrap_or_else(|| panic!("no handle: {}", told(events)))
}

impl Pair {
    /// A prompt computed and held.
    async fn prefilled(&mut self, id: u64) -> KvHandle {
        let mut stream = self.prefill.start(prefill_leg(id));
        let (_, line) = self.at_prefill.asked().await;
        line.json(200, &prefill_answer().to_string()).await;
        handle(&read(&mut stream).await)
    }
}

#[tokio::test]
async fn a_pair_of_vllms_hands_over_what_was_answered_word_for_word() {
    let mut pair = pair().await;
    let mut stream = pair.prefill.start(prefill_leg(1));
    let (asked, line) = pair.at_prefill.asked().await;
    let body = asked.json();
    assert_eq!((&body["max_tokens"], &body["stream"]), (&json!(1), &json!(false)));
    assert_eq!(body["kv_transfer_params"], json!({"do_remote_decode": true, "do_remote_prefill": false}));
    let params = r#"{"do_remote_prefill" : true, "remote_block_ids": [[ 1 ]], "remote_engine_id":"e", "remote_request_id":"r","remote_host":"h","remote_port":5600,"tp_size":1,"new":null}"#;
    let answer = format!(
        r#"{{"choices":[],"kv_transfer_params":{params},"usage":{{"prompt_tokens":3,"prompt_tokens_details":{{"cached_tokens":2}}}}}}"#
    );
    line.json(200, &answer).await;
    let events = read(&mut stream).await;
    assert_eq!(told(&events), "started(2) prefilled ended");
    let kv = handle(&events);
    assert_eq!((kv.leg, kv.tokens, kv.first), (LegId(1), 3, FirstToken::OfDecode));
    let left = kv.held_until - Instant::now();
    assert!(left > Duration::from_secs(25) && left < Duration::from_secs(30), "{left:?}");

    let mut stream = pair.decode.start(decode_leg(2, &kv));
    let (asked, mut line) = pair.at_decode.asked().await;
    let body = String::from_utf8(asked.body.to_vec()).expect("text");
    assert!(body.contains(&format!(r#""kv_transfer_params":{params}"#)), "{body}");
    assert_eq!(asked.json()["max_tokens"], 8);
    line.events().await;
    line.event(&chunk(0, &[5, 2], Some("stop"))).await;
    line.done().await;
    let expected = "started(0) arrived(1 blocks, 1000 bytes) 0@3=5 0@4=2 0:Stop ended";
    assert_eq!(told(&read(&mut stream).await), expected);
    // The decode engine has told the prefill engine that it is done with the blocks: nothing is left to do.
    pair.prefill.engine.release_kv(LegId(1));
    pair.decode.idle().await;
    assert!(pair.at_decode.is_idle() && pair.at_prefill.is_idle());
}

#[tokio::test]
async fn a_clients_own_words_are_split_too() {
    let mut pair = pair().await;
    let chat = r#"{"model":"x","messages":[],"stream":true,"max_tokens":50,"n":1}"#;
    let mut stream = pair.prefill.start(Leg { work: Work::Prefill, ..client_leg(1, chat, true) });
    let (asked, line) = pair.at_prefill.asked().await;
    assert_eq!(asked.path, "/v1/chat/completions");
    assert_eq!((&asked.json()["max_tokens"], &asked.json()["stream"]), (&json!(1), &json!(false)));
    line.json(200, &prefill_answer().to_string()).await;
    let kv = handle(&read(&mut stream).await);
    assert_eq!(kv.tokens, 3, "as the engine counted them");
    let work = Work::Decode { kv, first: Vec::new() };
    let mut stream = pair.decode.start(Leg { work, ..client_leg(2, chat, true) });
    let (asked, mut line) = pair.at_decode.asked().await;
    assert_eq!(asked.json()["kv_transfer_params"], prefill_answer()["kv_transfer_params"]);
    assert_eq!(asked.json()["max_tokens"], 50);
    line.events().await;
    line.event(r#"{"choices":[{"delta":{"content":"a"}}]}"#).await;
    line.done().await;
    let events = told(&read(&mut stream).await);
    assert!(events.starts_with("started(0) arrived(1 blocks, 1000 bytes) head(200,"), "{events}");
}

#[tokio::test]
async fn incomplete_answers_never_reach_a_decode_engine() {
    for field in ["remote_block_ids", "remote_engine_id", "remote_port", "do_remote_prefill"] {
        let mut pair = pair().await;
        let mut stream = pair.prefill.start(prefill_leg(1));
        let (_, line) = pair.at_prefill.asked().await;
        let mut answer = prefill_answer();
        answer["kv_transfer_params"][field] = Value::Null;
        line.json(200, &answer.to_string()).await;
        let events = read(&mut stream).await;
        match &events[..] {
            [LegEvent::Refused(StartError::Failed { message })] => {
                assert!(message.contains(field), "{message}")
            }
            other => panic!("{field}: {}", told(other)),
        }
    }
}

#[tokio::test]
async fn kv_that_nobody_comes_for_is_given_up_at_once() {
    let mut pair = pair().await;
    let kv = pair.prefilled(1).await;
    pair.prefill.engine.release_kv(kv.leg);
    // vLLM frees the blocks of a request that its decode side refuses: one is sent that it must refuse.
    let (asked, line) = pair.at_decode.asked().await;
    assert_eq!(asked.path, "/v1/completions");
    let body = asked.json();
    assert_eq!(body["kv_transfer_params"], prefill_answer()["kv_transfer_params"]);
    assert_ne!(body["model"], "served");
    line.json(404, r#"{"error":{"message":"no such model","code":404}}"#).await;
    // Once given up it is never taken.
    let mut late = pair.decode.start(decode_leg(2, &kv));
    assert_eq!(told(&read(&mut late).await), format!("refused: {}", StartError::ForeignKv));
    pair.prefill.engine.release_kv(kv.leg);
    assert!(pair.at_decode.is_idle());
}

#[tokio::test]
async fn kv_whose_handle_was_never_read_is_given_up_too() {
    let mut pair = pair().await;
    let stream = pair.prefill.start(prefill_leg(1));
    let (_, line) = pair.at_prefill.asked().await;
    line.json(200, &prefill_answer().to_string()).await;
    pair.prefill.idle().await;
    drop(stream);
    let (asked, line) = pair.at_decode.asked().await;
    assert_eq!(asked.json()["kv_transfer_params"], prefill_answer()["kv_transfer_params"]);
    line.json(404, "").await;
}

#[tokio::test]
async fn kv_that_may_be_read_is_never_given_up() {
    let mut pair = pair().await;
    let kv = pair.prefilled(1).await;
    let stream = pair.decode.start(decode_leg(2, &kv));
    let (_, line) = pair.at_decode.asked().await;
    pair.prefill.engine.release_kv(kv.leg);
    drop(stream);
    line.closed().await;
    pair.decode.idle().await;
    assert!(pair.at_decode.is_idle(), "the decode engine aborts the request and frees the blocks itself");
    // Written by the prefill engine, they are its own matter.
    let mut stream = pair.prefill.start(prefill_leg(3));
    let (_, line) = pair.at_prefill.asked().await;
    let mut answer = prefill_answer();
    answer["kv_transfer_params"]["transfer_mode"] = json!("push");
    line.json(200, &answer.to_string()).await;
    handle(&read(&mut stream).await);
    pair.prefill.engine.release_kv(LegId(3));
    assert!(pair.at_decode.is_idle());
}

#[tokio::test]
async fn a_decode_engine_that_was_never_reached_leaves_the_kv_to_another() {
    let mut pair = pair().await;
    let kv = pair.prefilled(1).await;
    let gone = Plan { incarnation: 3, ..vllm() };
    let gone = gone.attach(&nowhere().await);
    let mut stream = gone.start(decode_leg(2, &kv));
    assert_eq!(told(&read(&mut stream).await), "failed");
    let mut stream = pair.decode.start(decode_leg(3, &kv));
    let (_, mut line) = pair.at_decode.asked().await;
    line.events().await;
    line.event(&chunk(0, &[5], Some("length"))).await;
    line.done().await;
    assert!(told(&read(&mut stream).await).ends_with("0@3=5 0:Length ended"));
    // It was read, and freed with that.
    let mut again = pair.decode.start(decode_leg(4, &kv));
    assert_eq!(told(&read(&mut again).await), format!("refused: {}", StartError::ForeignKv));
}

#[tokio::test]
async fn handles_that_no_engine_can_use_are_refused_at_once() {
    let mut pair = pair().await;
    let kv = pair.prefilled(1).await;
    let refused = |attached: &Attached, leg| attached.engine.start(leg).err();
    let lapsed = KvHandle { held_until: Instant::now(), ..kv.clone() };
    assert_eq!(refused(&pair.decode, decode_leg(2, &lapsed)), Some(StartError::ForeignKv));
    let handed = KvHandle { first: FirstToken::Handed, ..kv.clone() };
    assert_eq!(refused(&pair.decode, decode_leg(2, &handed)), Some(StartError::ForeignKv));
    let bootstrap = Bootstrap { host: "h".into(), port: 1, room: 1, prefill_dp_rank: None };
    let other = KvHandle { place: KvPlace::Bootstrap(bootstrap), ..kv.clone() };
    assert_eq!(refused(&pair.decode, decode_leg(2, &other)), Some(StartError::ForeignKv));
    let first = Leg { work: Work::Decode { kv: kv.clone(), first: vec![(0, 5)] }, ..decode_leg(2, &kv) };
    assert_eq!(refused(&pair.decode, first), Some(StartError::ForeignKv));
    // Each choice would read the blocks, and the first one to have done so frees them.
    for several in [prefill_leg(2), decode_leg(2, &kv)] {
        let several = Leg { choices: vec![0, 1], ..several };
        assert!(matches!(refused(&pair.decode, several), Some(StartError::Malformed { .. })));
    }
    let body = client_leg(2, r#"{"n":2}"#, false);
    let of_elsewhere = KvHandle { leg: LegId(99), ..kv };
    let work = Work::Decode { kv: of_elsewhere, first: Vec::new() };
    let mut stream = pair.decode.start(Leg { work, ..body });
    assert!(told(&read(&mut stream).await).starts_with("refused: malformed leg"));
}

#[tokio::test]
async fn kv_of_one_prompt_is_never_given_to_another() {
    let mut pair = pair().await;
    let kv = pair.prefilled(1).await;
    let refused = async |attached: &Attached, leg: Leg| match attached.engine.start(leg) {
        Err(error) => error,
        Ok(mut stream) => match &read(&mut stream).await[..] {
            [LegEvent::Refused(error)] => error.clone(),
            other => panic!("{}", told(other)),
        },
    };
    let as_decode = |leg: Leg| Leg { work: Work::Decode { kv: kv.clone(), first: Vec::new() }, ..leg };
    // vLLM would answer the first with the other's KV; the second and third are longer, and would end it.
    assert_eq!(refused(&pair.decode, as_decode(leg(2, &[10, 11, 13], 8))).await, StartError::ForeignKv);
    assert_eq!(refused(&pair.decode, as_decode(leg(2, &[10; 40], 8))).await, StartError::ForeignKv);
    let words = as_decode(client_leg(2, r#"{"prompt":"10 11 12"}"#, false));
    assert_eq!(refused(&pair.decode, words).await, StartError::ForeignKv);
    assert!(pair.at_decode.is_idle());
    // It is still there for the one that it is of.
    let _stream = pair.decode.start(decode_leg(3, &kv));
    pair.at_decode.asked().await;
}

#[tokio::test]
async fn a_prefill_leg_that_is_called_off_stops_computing() {
    let mut pair = pair().await;
    let stream = pair.prefill.start(prefill_leg(1));
    let (_, line) = pair.at_prefill.asked().await;
    drop(stream);
    line.closed().await;
}

#[tokio::test]
async fn a_prefill_engine_that_refuses_says_so() {
    let check = async |status: u16, body: &str, expected: &str| {
        let mut pair = pair().await;
        let mut stream = pair.prefill.start(prefill_leg(1));
        let (_, line) = pair.at_prefill.asked().await;
        line.json(status, body).await;
        assert_eq!(told(&read(&mut stream).await), expected, "{status} {body}");
    };
    check(400, r#"{"error":{"message":"long"}}"#, "rejected(400, long)").await;
    check(500, "", "failed").await;
    check(503, r#"{"error":"queue full"}"#, "full").await;
    check(200, r#"{"error":{"message":"dead","code":500}}"#, "failed").await;
    let mut other = prefill_answer();
    other["usage"]["prompt_tokens"] = json!(4);
    check(200, &other.to_string(), "failed").await;
}

/// An SGLang pair with the servers that play it.
async fn sglang_pair() -> Pair {
    let (at_prefill, at_decode) = (Double::start().await, Double::start().await);
    let held = forebay_engines::remote::HeldKv::new();
    let mut prefill =
        Plan { incarnation: 1, role: Role::Prefill, held: held.clone(), dp_ranks: 2, ..sglang() };
    prefill.speech.hand_over = HandOver::Bootstrap { host: "10.0.0.9".into(), port: 8998 };
    prefill.speech.ranks = RankPin::Field;
    prefill.speech.abort = forebay_engines::remote::Abort::Close;
    let mut decode = Plan { incarnation: 2, role: Role::Decode, held, ..sglang() };
    decode.speech.abort = forebay_engines::remote::Abort::Close;
    Pair {
        prefill: prefill.attach(&at_prefill.url),
        decode: decode.attach(&at_decode.url),
        at_prefill,
        at_decode,
    }
}

impl Pair {
    /// Both legs under way: their streams, their requests, their lines.
    async fn meet(&mut self) -> [(forebay_engines::LegStream, Asked, Line); 2] {
        let mut prefill = self.prefill.start(Leg { dp_rank: 1, ..prefill_leg(1) });
        let events = read_until(&mut prefill, |event| matches!(event, LegEvent::Prefilled(_))).await;
        let kv = handle(&events);
        let decode = self.decode.start(decode_leg(2, &kv));
        let (at_prefill, prefill_line) = self.at_prefill.asked().await;
        let (at_decode, decode_line) = self.at_decode.asked().await;
        [(prefill, at_prefill, prefill_line), (decode, at_decode, decode_line)]
    }
}

fn sglang_event(ids: &str, total: u32, finish: &str) -> String {
    format!(
        r#"{{"text":"x","output_ids":{ids},"meta_info":{{"id":"r","finish_reason":{finish},"prompt_tokens":3,"completion_tokens":{total},"cached_tokens":0}}}}"#
    )
}

#[tokio::test]
async fn a_pair_of_sglangs_meets_in_a_room() {
    let mut pair = sglang_pair().await;
    let [(mut prefill, asked_prefill, prefill_line), (mut decode, asked_decode, mut decode_line)] =
        pair.meet().await;
    let [p, d] = [asked_prefill.json(), asked_decode.json()];
    for field in ["bootstrap_host", "bootstrap_port", "bootstrap_room", "input_ids"] {
        assert_eq!(p[field], d[field], "{field}");
        assert!(!p[field].is_null(), "{field}");
    }
    assert_eq!((&p["bootstrap_host"], &p["bootstrap_port"]), (&json!("10.0.0.9"), &json!(8998)));
    assert_eq!((&p["routed_dp_rank"], &p["stream"]), (&json!(1), &json!(false)));
    assert_eq!((&d["disagg_prefill_dp_rank"], &d["stream"]), (&json!(1), &json!(true)));
    decode_line.events().await;
    decode_line.event(&sglang_event("[5]", 1, "null")).await;
    let first = read_until(&mut decode, |event| matches!(event, LegEvent::Token(_))).await;
    assert_eq!(told(&first), "started(0) arrived(1 blocks, 1000 bytes) 0@3=5");
    // The KV is there: releasing it leaves the prefill server to end by itself.
    pair.prefill.engine.release_kv(LegId(1));
    prefill_line.json(200, &sglang_event("[5]", 1, r#"{"type":"length","length":1}"#)).await;
    assert_eq!(told(&read(&mut prefill).await), "ended");
    decode_line.event(&sglang_event("[5,2]", 2, r#"{"type":"stop","matched":2}"#)).await;
    decode_line.done().await;
    assert_eq!(told(&read(&mut decode).await), "0@4=2 0:Stop usage(3,0,2) ended");
}

#[tokio::test]
async fn a_prefill_server_that_fails_frees_the_decode_leg_that_waits() {
    let mut pair = sglang_pair().await;
    let [(mut prefill, _, prefill_line), (mut decode, _, decode_line)] = pair.meet().await;
    prefill_line.json(500, r#"{"error":{"message":"out of memory"}}"#).await;
    assert_eq!(told(&read(&mut prefill).await), "failed");
    let events = read(&mut decode).await;
    match &events[..] {
        [LegEvent::Refused(StartError::Failed { message })] => {
            assert!(message.contains("out of memory"), "{message}");
        }
        other => panic!("{}", told(other)),
    }
    decode_line.closed().await;
}

#[tokio::test]
async fn a_prefill_server_that_is_gone_frees_a_decode_leg_that_comes_late() {
    let mut pair = sglang_pair().await;
    let mut prefill = pair.prefill.start(prefill_leg(1));
    let kv = handle(&read_until(&mut prefill, |event| matches!(event, LegEvent::Prefilled(_))).await);
    let (_, line) = pair.at_prefill.asked().await;
    drop(line);
    assert_eq!(told(&read(&mut prefill).await), "lost");
    let mut decode = pair.decode.start(decode_leg(2, &kv));
    assert_eq!(told(&read(&mut decode).await), format!("refused: {}", StartError::ForeignKv));
    assert!(pair.at_decode.is_idle());
}

#[tokio::test]
async fn a_prefill_server_stops_when_its_kv_is_not_wanted() {
    let mut pair = sglang_pair().await;
    let [(_prefill, _, prefill_line), (decode, _, decode_line)] = pair.meet().await;
    drop(decode);
    decode_line.closed().await;
    pair.prefill.engine.release_kv(LegId(1));
    prefill_line.closed().await;
}
