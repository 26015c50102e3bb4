use serde_json::{Value, json};

use super::*;

const CAPTURED: &str = include_str!("../../fixtures/vllm/nixl_pd/2_prefill_response.json");
const CAPTURED_TOKENS: &str = include_str!("../../fixtures/vllm/nixl_pd/tito_2_prefill_response.json");
const CAPTURED_MULTI: &str = include_str!("../../fixtures/vllm/nixl_pd/multiconnector_prefill_response.json");

fn read(answer: &Value) -> Result<PrefillAnswer, Incomplete> {
    PrefillAnswer::read(answer.to_string().as_bytes())
}

/// The captured answer with its parameters changed.
fn changed(change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> Result<PrefillAnswer, Incomplete> {
    let mut answer: Value = serde_json::from_str(CAPTURED).expect("JSON");
    change(answer["kv_transfer_params"].as_object_mut().expect("an object"));
    read(&answer)
}

#[test]
fn captured_answers_are_complete_and_kept_word_for_word() {
    for (captured, prompt, cached) in
        [(CAPTURED, 194, 192), (CAPTURED_TOKENS, 200, 0), (CAPTURED_MULTI, 199, 0)]
    {
        let answer = PrefillAnswer::read(captured.as_bytes()).expect("a complete answer");
        assert!(captured.contains(answer.params.get()), "word for word");
        assert_eq!((answer.mode, answer.expires, answer.blocks), (TransferMode::Pull, None, 7));
        let usage =
            Usage { prompt_tokens: Some(prompt), cached_tokens: Some(cached), output_tokens: Some(1) };
        assert_eq!(answer.usage, usage);
    }
}

#[test]
fn the_decode_request_that_vllm_took_holds_the_same_parameters() {
    let answer = PrefillAnswer::read(CAPTURED.as_bytes()).expect("a complete answer");
    let request: Value =
        serde_json::from_str(include_str!("../../fixtures/vllm/nixl_pd/3_decode_request.json"))
            .expect("JSON");
    let params: Value = serde_json::from_str(answer.params.get()).expect("JSON");
    assert_eq!(request["kv_transfer_params"], params);
}

#[test]
fn every_field_that_a_decode_engine_needs_is_needed() {
    for field in [
        "do_remote_prefill",
        "remote_engine_id",
        "remote_request_id",
        "remote_block_ids",
        "remote_host",
        "remote_port",
        "tp_size",
    ] {
        let refused = |what: &str, answer: Result<PrefillAnswer, Incomplete>| {
            assert_eq!(answer.err(), Some(Incomplete::Field(field)), "{field} {what}");
        };
        refused("absent", changed(|params| drop(params.remove(field))));
        refused("null", changed(|params| params[field] = Value::Null));
    }
    let check = |field: &'static str, value: Value| {
        assert_eq!(changed(|params| params[field] = value).err(), Some(Incomplete::Field(field)), "{field}");
    };
    check("do_remote_prefill", json!(false));
    check("remote_block_ids", json!([]));
    check("remote_block_ids", json!([[], []]));
    check("remote_engine_id", json!(""));
    check("remote_host", json!(""));
    check("remote_port", json!(0));
    check("tp_size", json!(0));
    let odd = changed(|params| params["remote_port"] = json!("5600")).err();
    assert_eq!(odd, Some(Incomplete::Field("shape")));
}

#[test]
fn blocks_may_be_one_list_or_a_list_for_each_group() {
    let check = |ids: Value, expected: u32| {
        let answer = changed(|params| params["remote_block_ids"] = ids).expect("complete");
        assert_eq!(answer.blocks, expected);
    };
    check(json!([1, 2, 3]), 3);
    check(json!([[1, 2], [3]]), 3);
    check(json!([[], [3]]), 1);
}

#[test]
fn answers_that_are_none_say_why() {
    let mut none: Value = serde_json::from_str(CAPTURED).expect("JSON");
    none["kv_transfer_params"] = Value::Null;
    assert_eq!(read(&none).err(), Some(Incomplete::NoParams), "null");
    none.as_object_mut().expect("an object").remove("kv_transfer_params");
    assert_eq!(read(&none).err(), Some(Incomplete::NoParams), "absent");
    let error = read(&json!({"error": {"message": "dead", "code": 500}})).err();
    let fault = Fault { status: Some(500), message: "dead".to_owned() };
    assert_eq!(error, Some(Incomplete::Fault(fault)));
    let text = PrefillAnswer::read(b"<html>").err();
    assert_eq!(text, Some(Incomplete::NoDocument("<html>".to_owned())));
    assert!(matches!(PrefillAnswer::read(b"\xff"), Err(Incomplete::NoDocument(_))));
}

#[test]
fn push_mode_is_told_apart() {
    let captured = include_str!("../../../../tests/vllm/captures/push/push_completion_prefill.json");
    let captured: Value = serde_json::from_str(captured).expect("JSON");
    let answer = read(&captured["answer"]).expect("complete");
    assert_eq!((answer.mode, answer.blocks), (TransferMode::Push, 8), "vLLM's push connector");
    let answer = changed(|params| params["transfer_mode"] = json!("push")).expect("complete");
    assert_eq!(answer.mode, TransferMode::Push);
    let answer = changed(|params| drop(params.remove("transfer_mode"))).expect("complete");
    assert_eq!(answer.mode, TransferMode::Pull, "older versions know no other");
}

#[test]
fn blocks_are_held_as_long_as_the_engine_says_on_a_clock_that_we_have() {
    let unix = Duration::from_secs(1_800_000_000);
    let lease = Duration::from_secs(30);
    let check = |expires: Value, expected: u64| {
        let answer = changed(|params| params["remote_blocks_expiry_time"] = expires).expect("complete");
        assert_eq!(answer.held_for(unix, lease), Duration::from_secs(expected));
    };
    check(Value::Null, 30);
    check(json!(1_800_000_012.0), 12);
    check(json!(1_799_999_999.0), 0);
    // Seconds since the engine's host started: no clock of ours.
    check(json!(12_345.5), 30);
}

#[test]
fn what_is_discarded_is_named_word_for_word() {
    let params = RawValue::from_string(r#"{"do_remote_prefill": true}"#.to_owned()).expect("JSON");
    let body = discard_request("none", &params);
    let expected =
        r#"{"model":"none","prompt":[0],"max_tokens":1,"kv_transfer_params":{"do_remote_prefill": true}}"#;
    assert_eq!(String::from_utf8(body).expect("text"), expected);
}
