use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::object::Object;

fn sampling() -> Sampling {
    Sampling {
        temperature: 0.7,
        top_p: 0.95,
        top_k: 0,
        seed: u64::MAX,
        output_tokens_max: 40,
        stop_tokens: Arc::new([2, 9]),
        logprobs: None,
    }
}

fn request(sampling: &Sampling) -> TokenRequest<'_> {
    TokenRequest {
        id: "r-1",
        model: "m",
        prompt: &[1, 2, 3],
        choices: 1,
        sampling,
        salt: None,
        dp_rank: None,
        kv: Kv::Own,
    }
}

fn value(body: &[u8]) -> Value {
    serde_json::from_slice(body).expect("JSON")
}

fn raw(json: &str) -> Box<RawValue> {
    RawValue::from_string(json.to_owned()).expect("JSON")
}

const ROOM: Room<'static> = Room { host: "10.0.0.9", port: 8998, room: 77, prefill_dp_rank: Some(3) };

#[test]
fn completions_say_everything_that_bears_on_the_draw() {
    let body = value(&completions(&request(&sampling())));
    let expected = json!({
        "model": "m", "prompt": [1, 2, 3], "add_special_tokens": false, "n": 1, "max_tokens": 40,
        "temperature": 0.7, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": i64::MAX, "stop_token_ids": [2, 9], "ignore_eos": true,
        "skip_special_tokens": false, "return_token_ids": true, "stream": true, "stream_options": {"include_usage": true},
    });
    assert_eq!(body, expected, "and floats of 32 bits are written short");
}

#[test]
fn a_prefill_leg_draws_one_token_in_one_document() {
    let sampling = sampling();
    let request = TokenRequest { kv: Kv::Export, salt: Some("s"), choices: 1, ..request(&sampling) };
    for body in [completions(&request), vllm_generate(&request)] {
        let body = value(&body);
        let params = body.get("sampling_params").unwrap_or(&body);
        assert_eq!(params["max_tokens"], 1);
        assert_eq!(body["stream"], false);
        assert_eq!(body.get("stream_options"), None);
        assert_eq!(body["cache_salt"], "s");
        let asked = json!({"do_remote_decode": true, "do_remote_prefill": false});
        assert_eq!(body["kv_transfer_params"], asked);
    }
}

#[test]
fn a_decode_leg_passes_the_parameters_on_word_for_word() {
    let sampling = sampling();
    let params = raw(r#"{"remote_port" : 5600, "b": [1,  2]}"#);
    let request = TokenRequest { kv: Kv::Import(&params), ..request(&sampling) };
    for body in [completions(&request), vllm_generate(&request)] {
        let text = String::from_utf8(body).expect("text");
        let verbatim = format!(r#""kv_transfer_params":{}"#, params.get());
        assert!(text.contains(&verbatim), "{text}");
        assert!(text.contains(r#""stream":true"#));
    }
}

#[test]
fn generate_has_the_fields_of_the_captured_request() {
    let sampling = sampling();
    let ours = value(&vllm_generate(&request(&sampling)));
    let captured: Value =
        serde_json::from_str(include_str!("../../fixtures/vllm/nixl_pd/tito_3_decode_request.json"))
            .expect("JSON");
    for key in captured.as_object().expect("an object").keys().filter(|key| *key != "kv_transfer_params") {
        assert!(ours.get(key).is_some(), "{key}");
    }
    for key in captured["sampling_params"].as_object().expect("an object").keys() {
        assert!(ours["sampling_params"].get(key).is_some(), "{key}");
    }
    assert_eq!(ours["sampling_params"]["detokenize"], false);
    assert_eq!(ours["output_mode"], "tokens");
}

#[test]
fn seeds_are_given_where_chance_has_a_part_and_fit_63_bits() {
    let check = |temperature: f32, seed: u64, expected: Option<u64>| {
        let sampling = Sampling { temperature, seed, ..sampling() };
        let bodies = [completions, vllm_generate].map(|body| value(&body(&request(&sampling))));
        assert_eq!(bodies[0].get("seed").and_then(Value::as_u64), expected);
        assert_eq!(bodies[1]["sampling_params"].get("seed").and_then(Value::as_u64), expected);
        let sglang = value(&sglang_generate(&request(&sampling)));
        assert_eq!(sglang["sampling_params"].get("sampling_seed").and_then(Value::as_u64), expected);
    };
    check(0.0, 5, None);
    check(1.0, 5, Some(5));
    check(1.0, u64::MAX, Some(i64::MAX as u64));
}

#[test]
fn log_probabilities_are_asked_for_as_each_route_counts_them() {
    let check = |k: u8, generate: u8| {
        let sampling = Sampling { logprobs: Some(k), ..sampling() };
        let request = request(&sampling);
        let body = value(&completions(&request));
        assert_eq!((&body["logprobs"], &body["return_tokens_as_token_ids"]), (&json!(k), &json!(true)));
        assert_eq!(value(&vllm_generate(&request))["sampling_params"]["logprobs"], generate);
        let sglang = value(&sglang_generate(&request));
        assert_eq!((&sglang["return_logprob"], &sglang["top_logprobs_num"]), (&json!(true), &json!(k)));
    };
    check(0, 1);
    check(5, 6);
    check(20, 20);
    let body = value(&completions(&request(&sampling())));
    assert_eq!((body.get("logprobs"), body.get("return_tokens_as_token_ids")), (None, None));
}

#[test]
fn sglang_is_told_stops_as_it_understands_them() {
    let check = |stop_tokens: &[TokenId], ignore_eos: bool| {
        let sampling = Sampling { stop_tokens: stop_tokens.into(), ..sampling() };
        let params = value(&sglang_generate(&request(&sampling)))["sampling_params"].clone();
        assert_eq!(
            (&params["ignore_eos"], &params["stop_token_ids"]),
            (&json!(ignore_eos), &json!(stop_tokens))
        );
        assert_eq!((&params["top_k"], &params["max_new_tokens"]), (&json!(-1), &json!(40)));
    };
    check(&[2], false);
    check(&[], true);
}

#[test]
fn both_sides_of_an_sglang_pair_are_told_the_room() {
    let sampling = sampling();
    let body = |part| {
        let kv = Kv::Meet { room: ROOM, part };
        value(&sglang_generate(&TokenRequest { kv, dp_rank: Some(1), ..request(&sampling) }))
    };
    for (part, streams, hint) in [(Part::Prefill, false, None), (Part::Decode, true, Some(json!(3)))] {
        let body = body(part);
        assert_eq!(body["bootstrap_host"], "10.0.0.9");
        assert_eq!((&body["bootstrap_port"], &body["bootstrap_room"]), (&json!(8998), &json!(77)));
        assert_eq!((&body["stream"], &body["routed_dp_rank"]), (&json!(streams), &json!(1)));
        assert_eq!(body.get("disagg_prefill_dp_rank"), hint.as_ref());
        assert_eq!(body["rid"], "r-1");
    }
}

fn edits(kv: Kv<'_>) -> ClientEdits<'_> {
    ClientEdits { model: "served", id: None, salt: None, dp_rank: None, kv }
}

fn rewritten(body: &str, edits: &ClientEdits<'_>) -> Result<String, SeveralChoices> {
    let object = Object::parse(Bytes::copy_from_slice(body.as_bytes())).expect("an object");
    rewrite(&object, edits).map(|body| String::from_utf8(body).expect("text"))
}

#[test]
fn a_clients_body_keeps_all_but_the_models_name() {
    let check =
        |body: &str, expected: &str| assert_eq!(rewritten(body, &edits(Kv::Own)).as_deref(), Ok(expected));
    check(
        r#"{"model":"x","messages":[ {"a" : 1e400} ],"n":2}"#,
        r#"{"model":"served","messages":[ {"a" : 1e400} ],"n":2}"#,
    );
    check(" { \"a\\u0062\" : \"\\u00e4\" } ", r#"{"a\u0062":"\u00e4","model":"served"}"#);
    check(
        r#"{"stream":true,"stream_options":{"include_usage":true},"model":null}"#,
        r#"{"stream":true,"stream_options":{"include_usage":true},"model":"served"}"#,
    );
    check("{}", r#"{"model":"served"}"#);
}

#[test]
fn nothing_that_a_client_says_of_kv_gets_past() {
    for key in [
        "kv_transfer_params",
        "ec_transfer_params",
        "bootstrap_room",
        "routed_dp_rank",
        "disagg_prefill_dp_rank",
    ] {
        let escaped = format!("\\u00{:02x}{}", key.as_bytes()[0], &key[1..]);
        for key in [key, &escaped] {
            let body = format!(r#"{{"{key}":{{"do_remote_prefill":true}},"model":"x"}}"#);
            assert_eq!(rewritten(&body, &edits(Kv::Own)).as_deref(), Ok(r#"{"model":"served"}"#), "{key}");
        }
    }
}

#[test]
fn a_clients_prefill_leg_is_the_captured_one() {
    let captured = include_str!("../../fixtures/vllm/nixl_pd/1_prefill_request.json");
    let mut client: Value = serde_json::from_str(captured).expect("JSON");
    let expected = {
        let mut expected = client.clone();
        expected["kv_transfer_params"] = json!({"do_remote_decode": true, "do_remote_prefill": false});
        expected
    };
    let object = client.as_object_mut().expect("an object");
    object.remove("kv_transfer_params");
    object.remove("max_completion_tokens");
    object.insert("max_tokens".into(), json!(48));
    object.insert("min_tokens".into(), json!(4));
    object.insert("stream".into(), json!(true));
    object.insert("stream_options".into(), json!({"include_usage": true}));
    let edits = ClientEdits { model: "smol", ..edits(Kv::Export) };
    let body = rewritten(&client.to_string(), &edits).expect("a body");
    assert_eq!(serde_json::from_str::<Value>(&body).expect("JSON"), expected);
}

#[test]
fn a_clients_decode_leg_has_the_parameters_word_for_word() {
    let params = raw(r#"{"remote_port" : 5600}"#);
    let body = rewritten(r#"{"model":"x","stream":true}"#, &edits(Kv::Import(&params)));
    assert_eq!(
        body.as_deref(),
        Ok(r#"{"model":"served","stream":true,"kv_transfer_params":{"remote_port" : 5600}}"#)
    );
}

#[test]
fn a_clients_sglang_legs_meet() {
    let client = r#"{"model":"x","stream":true,"stream_options":{}}"#;
    let body = |part, id| {
        let kv = Kv::Meet { room: ROOM, part };
        rewritten(client, &ClientEdits { id, dp_rank: Some(2), salt: Some("t"), ..edits(kv) })
    };
    let prefill = r#"{"model":"served","stream":false,"rid":"r","cache_salt":"t","routed_dp_rank":2,"bootstrap_host":"10.0.0.9","bootstrap_port":8998,"bootstrap_room":77}"#;
    assert_eq!(body(Part::Prefill, Some("r")).as_deref(), Ok(prefill));
    let decode = r#"{"model":"served","stream":true,"stream_options":{},"cache_salt":"t","routed_dp_rank":2,"bootstrap_host":"10.0.0.9","bootstrap_port":8998,"bootstrap_room":77,"disagg_prefill_dp_rank":3}"#;
    assert_eq!(body(Part::Decode, None).as_deref(), Ok(decode));
}

#[test]
fn kv_is_handed_over_for_one_choice() {
    let check = |body: &str, taken: bool| {
        assert_eq!(rewritten(body, &edits(Kv::Export)).is_ok(), taken, "{body}");
        assert!(rewritten(body, &edits(Kv::Own)).is_ok(), "{body}");
    };
    check(r#"{"n":2}"#, false);
    check(r#"{"n":1.0}"#, false);
    check(r#"{"n":1}"#, true);
    check(r#"{"n":null}"#, true);
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from)
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z\"\\\\]{0,4}", inner, 0..4).prop_map(Value::from_iter),
        ]
    })
}

proptest! {
    #[test]
    fn only_what_is_edited_changes(entries in prop::collection::btree_map("[a-zä\"\\\\]{0,6}", json_value(), 0..8)) {
        let before = Value::from_iter(entries);
        let after = rewritten(&before.to_string(), &edits(Kv::Own)).expect("a body");
        let mut expected = before;
        expected["model"] = json!("served");
        prop_assert_eq!(serde_json::from_str::<Value>(&after).expect("JSON"), expected);
    }
}
