//! Against doubles that are as strict as the real engines: what we send they take, and what comes out is right.

use std::time::Duration;

use forebay_engines::{
    Driver, KvHandle, Leg, LegEvent, LegStream, Work,
    remote::{Abort, HandOver, HeldKv, TokenRoute},
};
use forebay_testkit::{
    ApiKey, ConnectorOptions, Counts, Fault, KvRole, SglangDouble, SglangMode, SglangOptions, VllmDouble,
    VllmOptions, continuation,
};
use forebay_types::{LegId, Role, Sampling, TokenId};

use crate::rig::*;

const SEED: u64 = 1;

fn prompt() -> Vec<TokenId> {
    (0..50).map(|token| 100 + token % 7).collect()
}

/// A leg whose sampling stops at no token.
fn endless(id: u64, output_tokens_max: u32) -> Leg {
    let plain = leg(id, &prompt(), output_tokens_max);
    let mut sampling = (*plain.sampling).clone();
    sampling.stop_tokens = [].into();
    Leg { sampling: sampling.into(), ..plain }
}

fn tokens(events: &[LegEvent]) -> Vec<TokenId> {
    let mut expected = prompt().len() as u32;
    let token = |event: &LegEvent| match event {
        LegEvent::Token(token) => {
            assert_eq!(token.position, expected);
            expected += 1;
            Some(token.token)
        }
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

fn right(count: usize) -> Vec<TokenId> {
    continuation(SEED, &prompt(), count)
}

fn with_key(plan: Plan) -> Plan {
    let mut plan = plan;
    plan.speech.model = "double".into();
    plan
}

fn key() -> Option<ApiKey> {
    Some(ApiKey("the-key".into()))
}

#[tokio::test]
async fn vllm_answers_with_the_models_own_tokens_on_either_route() {
    let options = VllmOptions { scale_out: true, api_key: key(), ..VllmOptions::default() };
    let double = VllmDouble::start(options).await;
    for (id, route) in [(1, TokenRoute::Completions), (2, TokenRoute::VllmGenerate)] {
        let mut plan = with_key(vllm());
        plan.speech.tokens = Some(route);
        let attached = plan.attach(&double.url());
        let mut stream = attached.start(endless(id, 20));
        let events = read(&mut stream).await;
        assert_eq!(tokens(&events), right(20), "{route:?}");
        assert!(told(&events).ends_with("0:Length usage(50,0,20) ended") || id > 1, "{}", told(&events));
        // Several choices share a prompt, with chance in the draw or without.
        for temperature in [0.0, 0.8] {
            let several = Leg { choices: vec![0, 1], ..endless(id + 10, 5) };
            let sampling = Sampling { temperature, ..(*several.sampling).clone() };
            let mut stream = attached.start(Leg { sampling: sampling.into(), ..several });
            let events = read(&mut stream).await;
            let drawn = events.iter().filter(|event| matches!(event, LegEvent::Token(_))).count();
            assert_eq!(drawn, 10, "{}", told(&events));
        }
        assert_eq!(attached.notices(), []);
    }
}

#[tokio::test]
async fn sglang_answers_with_the_models_own_tokens_in_either_way_of_streaming() {
    for incremental_streaming in [false, true] {
        let options = SglangOptions { incremental_streaming, api_key: key(), ..SglangOptions::default() };
        let double = SglangDouble::start(options).await;
        let attached = with_key(sglang()).attach(&double.url());
        let mut stream = attached.start(endless(1, 20));
        let events = read(&mut stream).await;
        assert_eq!(tokens(&events), right(20), "incremental: {incremental_streaming}");
        assert!(told(&events).ends_with("0:Length usage(50,0,20) ended"), "{}", told(&events));
        assert_eq!(attached.notices(), []);
    }
}

/// A vLLM pair.
struct Pair {
    prefill: Attached,
    decode: Attached,
    at_prefill: VllmDouble,
    at_decode: VllmDouble,
}

async fn pair() -> Pair {
    let options = |role| {
        let connector = ConnectorOptions { lease: Duration::from_secs(600), ..ConnectorOptions::new(role) };
        VllmOptions { connector: Some(connector), api_key: key(), ..VllmOptions::default() }
    };
    let at_prefill = VllmDouble::start(options(KvRole::Producer)).await;
    let at_decode = VllmDouble::start(options(KvRole::Consumer)).await;
    let held = HeldKv::new();
    let plan = |incarnation, role| Plan { incarnation, role, held: held.clone(), ..with_key(vllm()) };
    let prefill = plan(1, Role::Prefill).attach(&at_prefill.url());
    let decode = plan(2, Role::Decode).attach(&at_decode.url());
    Pair { prefill, decode, at_prefill, at_decode }
}

fn handle(events: &[LegEvent]) -> KvHandle {
    let handle = events.iter().find_map(|event| match event {
        LegEvent::Prefilled(kv) => Some(kv.clone()),
        _ => None,
    });
    handle.unwrap_or_else(|| panic!("no handle: {}", told(events)))
}

impl Pair {
    async fn prefilled(&self, id: u64) -> KvHandle {
        let mut stream = self.prefill.start(Leg { work: Work::Prefill, ..endless(id, 20) });
        handle(&read(&mut stream).await)
    }

    fn decode(&self, id: u64, kv: KvHandle) -> LegStream {
        self.decode.start(Leg { work: Work::Decode { kv, first: Vec::new() }, ..endless(id, 20) })
    }
}

#[tokio::test]
async fn a_split_answer_is_the_same_and_its_kv_came_from_the_other_engine() {
    let pair = pair().await;
    let kv = pair.prefilled(1).await;
    assert!(pair.at_prefill.gauges(0).held > 0);
    let mut stream = pair.decode(2, kv);
    let events = read(&mut stream).await;
    assert_eq!(tokens(&events), right(20));
    assert!(told(&events).starts_with("started(0) arrived(4 blocks, 4000 bytes) 0@50="), "{}", told(&events));
    let Counts { external_hits, computed, .. } = pair.at_decode.counts(0);
    assert_eq!((external_hits, computed), (50, 0), "the decode engine computed none of the prompt");
    pair.prefill.engine.release_kv(LegId(1));
    pair.at_prefill.wait_until(PATIENCE, |double| double.gauges(0).held == 0).await;
    assert_eq!(pair.at_prefill.counts(0).late_notices, 0, "freed once");
}

#[tokio::test]
async fn kv_that_nobody_comes_for_is_freed_long_before_its_lease() {
    let pair = pair().await;
    pair.prefilled(1).await;
    assert!(pair.at_prefill.gauges(0).held > 0);
    pair.prefill.engine.release_kv(LegId(1));
    pair.at_prefill.wait_until(PATIENCE, |double| double.gauges(0).held == 0).await;
    let Counts { leases_expired, .. } = pair.at_prefill.counts(0);
    let Counts { computed, transfers, generated, .. } = pair.at_decode.counts(0);
    assert_eq!((leases_expired, computed, transfers, generated), (0, 0, 0, 0));
    // The decode engine lives, and so does the pair.
    let kv = pair.prefilled(2).await;
    assert_eq!(tokens(&read(&mut pair.decode(3, kv)).await), right(20));
}

#[tokio::test]
async fn kv_of_a_decode_leg_that_is_called_off_is_freed_too() {
    let pair = pair().await;
    let kv = pair.prefilled(1).await;
    pair.at_decode.control().pause();
    let stream = pair.decode(2, kv);
    pair.at_decode
        .wait_until(PATIENCE, |double| double.gauges(0).waiting + double.gauges(0).running > 0)
        .await;
    drop(stream);
    pair.prefill.engine.release_kv(LegId(1));
    pair.at_decode.control().resume();
    pair.at_prefill.wait_until(PATIENCE, |double| double.gauges(0).held == 0).await;
    assert_eq!(pair.at_prefill.counts(0).leases_expired, 0);
}

#[tokio::test]
async fn a_leg_that_nobody_reads_stops_computing() {
    for abort in [Abort::Close, Abort::VllmAbortRequests] {
        let options = VllmOptions { scale_out: true, api_key: key(), ..VllmOptions::default() };
        let double = VllmDouble::start(options).await;
        let mut plan = with_key(vllm());
        plan.speech.abort = abort;
        let attached = plan.attach(&double.url());
        let mut stream = attached.start(endless(1, 4000));
        read_until(&mut stream, |event| matches!(event, LegEvent::Token(_))).await;
        drop(stream);
        double.wait_until(PATIENCE, |double| double.gauges(0).running == 0).await;
        assert_eq!(double.counts(0).aborted, 1, "{abort:?}");
    }
}

#[tokio::test]
async fn a_poisoned_request_is_lost_with_its_engine() {
    let poison = Some("103".to_owned());
    let double = VllmDouble::start(VllmOptions { poison, api_key: key(), ..VllmOptions::default() }).await;
    let attached = with_key(vllm()).attach(&double.url());
    let body = r#"{"messages":[{"role":"user","content":"103"}],"max_tokens":5}"#;
    let mut stream = attached.start(client_leg(1, body, false));
    assert_eq!(told(&read(&mut stream).await), "lost");
    assert!(attached.was_in_trouble().await);
}

#[tokio::test]
async fn an_engine_that_dies_midway_loses_its_legs() {
    let double = VllmDouble::start(VllmOptions { api_key: key(), ..VllmOptions::default() }).await;
    let attached = with_key(vllm()).attach(&double.url());
    let mut stream = attached.start(endless(1, 4000));
    read_until(&mut stream, |event| matches!(event, LegEvent::Token(_))).await;
    double.control().die().await;
    assert!(told(&read(&mut stream).await).ends_with("lost"));
    assert_eq!(told(&read(&mut attached.start(endless(2, 1))).await), "failed", "refused at once");
    // Its next life is another one's; the wire is the same.
    double.control().restart().await.expect("the port is free");
    assert_eq!(tokens(&read(&mut attached.start(endless(3, 5))).await), right(5));
}

#[tokio::test]
async fn what_doubles_do_wrong_is_found_out() {
    let double = VllmDouble::start(VllmOptions { api_key: key(), ..VllmOptions::default() }).await;
    let check = async |fault: Fault, expected: &str| {
        let attached = with_key(vllm()).attach(&double.url());
        double.control().inject(fault.clone());
        let events = told(&read(&mut attached.start(endless(1, 5))).await);
        double.control().heal();
        assert!(events.ends_with(expected), "{fault:?}: {events}");
        attached.notices().len()
    };
    assert_eq!(check(Fault::InternalError, "failed").await, 0);
    assert_eq!(check(Fault::CloseAfterAccept, "lost").await, 0);
    assert_eq!(check(Fault::CloseAfter { tokens: 2 }, "lost").await, 0);
    assert_eq!(check(Fault::ErrorBody, "failed").await, 0);
    assert_eq!(check(Fault::EndlessLine, "failed").await, 1, "fenced");
    assert_eq!(check(Fault::InvalidUtf8, "failed").await, 1, "fenced");
}

#[tokio::test]
async fn a_clients_own_words_are_answered_in_the_engines() {
    let double = VllmDouble::start(VllmOptions { api_key: key(), ..VllmOptions::default() }).await;
    let attached = with_key(vllm()).attach(&double.url());
    let chat = r#"{"model":"model","messages":[{"role":"user","content":"hello"}],"stream":true,"max_tokens":3,"stream_options":{"include_usage":true}}"#;
    let events = told(&read(&mut attached.start(client_leg(1, chat, true))).await);
    assert!(events.starts_with("started(0) head(200, text/event-stream"), "{events}");
    assert!(events.contains("[DONE]") && events.ends_with("ended"), "{events}");
    let whole = r#"{"model":"model","messages":[{"role":"user","content":"hello"}],"max_tokens":3}"#;
    let events = told(&read(&mut attached.start(client_leg(2, whole, false))).await);
    assert!(events.contains(" head(200, application/json) data("), "{events}");
    let wrong = r#"{"model":"model","messages":"hello"}"#;
    let events = told(&read(&mut attached.start(client_leg(3, wrong, false))).await);
    assert!(events.starts_with("head(4"), "{events}");
}

#[tokio::test]
async fn a_pair_of_sglangs_gives_the_models_own_tokens() {
    let options = |mode| SglangOptions { mode, api_key: key(), ..SglangOptions::default() };
    let at_prefill = SglangDouble::start(options(SglangMode::Prefill)).await;
    let at_decode = SglangDouble::start(options(SglangMode::Decode)).await;
    let held = HeldKv::new();
    let mut plan = Plan { incarnation: 1, role: Role::Prefill, held: held.clone(), ..with_key(sglang()) };
    let port = at_prefill.bootstrap_port().expect("a prefill server has one");
    plan.speech.hand_over = HandOver::Bootstrap { host: "127.0.0.1".into(), port };
    let prefill = plan.attach(&at_prefill.url());
    let plan = Plan { incarnation: 2, role: Role::Decode, held, ..with_key(sglang()) };
    let decode = plan.attach(&at_decode.url());
    let mut first = prefill.start(Leg { work: Work::Prefill, ..endless(1, 20) });
    let kv = handle(&read_until(&mut first, |event| matches!(event, LegEvent::Prefilled(_))).await);
    let mut second = decode.start(Leg { work: Work::Decode { kv, first: Vec::new() }, ..endless(2, 20) });
    let events = read(&mut second).await;
    assert_eq!(tokens(&events), right(20), "{}", told(&events));
    prefill.engine.release_kv(LegId(1));
    assert_eq!(told(&read(&mut first).await), "ended");
    assert_eq!((prefill.notices(), decode.notices()), (vec![], vec![]));
}
