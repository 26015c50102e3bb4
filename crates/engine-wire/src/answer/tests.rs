use forebay_types::FinishReason::{Length, Stop};
use proptest::prelude::*;

use super::*;
use crate::sse::{SseDecoder, SseLimits};

fn delta(index: u32, tokens: &[TokenId], finish: Option<FinishReason>) -> Delta {
    Delta { index, tokens: tokens.iter().copied().collect(), logprobs: Vec::new(), finish }
}

fn deltas(reader: &mut TokenReader, data: &str) -> Vec<Delta> {
    reader.read(data).unwrap_or_else(|error| panic!("{data}: {error}")).deltas.into_vec()
}

fn fault(status: Option<u16>, message: &str) -> Option<Fault> {
    Some(Fault { status, message: message.to_owned() })
}

/// The data of every event of a captured stream.
fn events(stream: &str) -> Vec<String> {
    let limits = SseLimits { line_bytes_max: 1 << 20, event_bytes_max: 1 << 20 };
    let mut decoder = SseDecoder::new(limits);
    let mut events = Vec::new();
    decoder.push(stream.as_bytes(), |event| events.push(event.data.to_owned())).expect("a sound stream");
    assert!(decoder.is_between_events());
    events
}

#[test]
fn the_captured_stream_of_vllm_is_read_to_its_end() {
    let mut events = events(include_str!("../../fixtures/vllm/nixl_pd/tito_4_decode_stream.txt"));
    assert!(is_done(&events.pop().expect("an end")));
    let mut reader = TokenReader::vllm_generate(None);
    let (mut tokens, mut finish, mut usage) = (Vec::new(), None, None);
    for event in &events {
        let chunk = reader.read(event).expect("a chunk");
        assert_eq!((chunk.fault, chunk.prompt), (None, None));
        usage = usage.or(chunk.usage);
        for delta in chunk.deltas {
            assert_eq!(delta.index, 0);
            tokens.extend(delta.tokens);
            finish = finish.or(delta.finish);
        }
    }
    assert_eq!(tokens.len(), 23);
    assert_eq!((tokens[0], tokens[22], finish), (38634, 2, Some(Stop)));
    let counted = Usage { prompt_tokens: Some(200), cached_tokens: Some(0), output_tokens: Some(23) };
    assert_eq!(usage, Some(counted));
}

/// What vLLM 0.32 answered, as `tests/vllm/capture.py` wrote it down.
macro_rules! captured {
    ($name:literal) => {
        serde_json::from_str::<serde_json::Value>(include_str!(concat!(
            "../../../../tests/vllm/captures/",
            $name,
            ".json"
        )))
        .expect("a capture is JSON")
    };
}

#[test]
fn what_vllm_streamed_is_read_token_by_token() {
    let check = |captured: &serde_json::Value, mut reader: TokenReader, expected: &[&[TokenId]]| {
        let mut events = events(captured["text"].as_str().expect("a stream"));
        assert!(is_done(&events.pop().expect("an end")));
        let mut choices: Vec<(Vec<TokenId>, Option<FinishReason>)> = vec![(Vec::new(), None); expected.len()];
        let (mut usage, mut echoes) = (None, 0);
        for event in &events {
            let chunk = reader.read(event).expect(event);
            assert_eq!(chunk.fault, None);
            usage = chunk.usage.or(usage);
            if let Some(prompt) = chunk.prompt {
                echoes += 1;
                assert!(prompt.is(&[504, 3575, 282, 7158, 314]));
            }
            for delta in chunk.deltas {
                let (tokens, finish) = &mut choices[delta.index as usize];
                tokens.extend(delta.tokens);
                *finish = delta.finish.or(*finish);
            }
        }
        for ((tokens, finish), expected) in choices.iter().zip(expected) {
            assert_eq!((&tokens[..], *finish), (*expected, Some(Length)));
        }
        let output_tokens = Some(expected.iter().map(|tokens| tokens.len() as u32).sum());
        assert_eq!(usage, Some(Usage { prompt_tokens: Some(5), cached_tokens: Some(0), output_tokens }));
        echoes
    };
    let completions = || TokenReader::completions(None);
    let one = check(&captured!("plain/completion_stream"), completions(), &[&[7268, 30, 198, 198]]);
    let two = captured!("plain/completion_stream_two_choices");
    let two = check(&two, completions(), &[&[7268, 28], &[253, 34046]]);
    let generate = TokenReader::vllm_generate(None);
    let none = check(&captured!("plain/generate_stream"), generate, &[&[7268, 30, 198, 198]]);
    assert_eq!((one, two, none), (1, 2, 0), "echoes of the prompt");
}

#[test]
fn an_aborted_stream_of_vllm_is_no_answer() {
    for (captured, mut reader) in [
        (captured!("plain/abort_requests_completion_with_index_effect"), TokenReader::completions(None)),
        (captured!("plain/abort_requests_generate_effect"), TokenReader::vllm_generate(None)),
    ] {
        let tail = captured["seen"]["stream_ends_with"].as_str().expect("a stream");
        let last = tail.split("data: ").find(|data| data.contains("abort")).expect("the last event");
        let chunk = reader.read(last.trim()).expect("a chunk");
        assert_eq!(chunk.fault, fault(None, "the engine gave the request up"));
        assert_eq!(chunk.deltas.to_vec(), [delta(0, &[], None)]);
    }
}

#[test]
fn refusals_of_vllm_are_told_in_its_words() {
    let check = |captured: serde_json::Value, expected: &str| {
        assert_eq!(captured["status"], 400);
        let said = message_of(captured["answer"].to_string().as_bytes());
        assert!(said.starts_with(expected), "{said}");
    };
    check(captured!("plain/error_n_2_greedy"), "n must be 1 when using greedy sampling, got 2.");
    check(captured!("plain/generate_id_out_of_vocabulary"), "Token id 999999 is out of vocabulary");
    check(captured!("plain/error_context_too_long"), "This model's maximum context length is 2048 tokens.");
}

#[test]
fn completions_give_tokens_prompt_finish_and_usage() {
    let mut reader = TokenReader::completions(None);
    let first = r#"{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":" a",
        "logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":[1, 22,333],"token_ids":[5]}]}"#;
    let chunk = reader.read(first).expect("a chunk");
    assert_eq!(chunk.deltas.to_vec(), [delta(0, &[5], None)]);
    let prompt = chunk.prompt.expect("the prompt");
    assert!(prompt.is(&[1, 22, 333]));
    for other in [&[1, 22][..], &[1, 22, 333, 4], &[1, 22, 334], &[]] {
        assert!(!prompt.is(other), "{other:?}");
    }
    let last =
        r#"{"choices":[{"index":1,"text":"","finish_reason":"length","token_ids":[6,7]}],"usage":null}"#;
    assert_eq!(deltas(&mut reader, last), [delta(1, &[6, 7], Some(Length))]);
    let usage = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7,
        "prompt_tokens_details":{"cached_tokens":2}}}"#;
    let counted = Usage { prompt_tokens: Some(3), cached_tokens: Some(2), output_tokens: Some(4) };
    assert_eq!(reader.read(usage).expect("a chunk").usage, Some(counted));
}

#[test]
fn log_probabilities_of_completions_are_sorted_and_cut() {
    let data = r#"{"choices":[{"index":0,"token_ids":[9,4],"finish_reason":null,"logprobs":{"text_offset":[0,11],
        "tokens":["token_id:9","token_id:4"],"token_logprobs":[-3.5,null],
        "top_logprobs":[{"token_id:9":-3.5,"token_id:1":-0.25,"token_id:2":-1.5},null]}}]}"#;
    let logprobs = deltas(&mut TokenReader::completions(Some(2)), data).remove(0).logprobs;
    let first = TokenLogprobs { chosen: -3.5, top: vec![(1, -0.25), (2, -1.5)] };
    let second = TokenLogprobs { chosen: LOGPROB_MIN, top: Vec::new() };
    assert_eq!(logprobs, [first, second]);
    let none = deltas(&mut TokenReader::completions(None), data).remove(0).logprobs;
    assert_eq!(none, [], "nobody asked");
}

#[test]
fn log_probabilities_of_generate_leave_an_unlikely_draw_out_of_the_likely() {
    let data = r#"{"choices":[{"index":0,"token_ids":[9],"logprobs":{"content":[{"token_id":9,"logprob":-7.5,"rank":40,
        "top_logprobs":[{"token_id":9,"logprob":-7.5,"rank":40},{"token_id":1,"logprob":-0.5,"rank":1}]}]}}]}"#;
    let logprobs = deltas(&mut TokenReader::vllm_generate(Some(1)), data).remove(0).logprobs;
    assert_eq!(logprobs, [TokenLogprobs { chosen: -7.5, top: vec![(1, -0.5)] }]);
}

fn sglang(ids: &str, total: u32, finish: &str) -> String {
    format!(
        r#"{{"text":"x","output_ids":{ids},"meta_info":{{"id":"r","finish_reason":{finish},"prompt_tokens":7,
        "completion_tokens":{total},"cached_tokens":4,"e2e_latency":0.1}}}}"#
    )
}

#[test]
fn sglang_streams_all_tokens_or_the_new_ones_and_both_are_told_apart() {
    let stop = r#"{"type":"stop","matched":2}"#;
    let whole = [sglang("[5]", 1, "null"), sglang("[5,6,8]", 3, "null"), sglang("[5,6,8,2]", 4, stop)];
    let new = [sglang("[5]", 1, "null"), sglang("[6,8]", 3, "null"), sglang("[2]", 4, stop)];
    for stream in [whole, new] {
        let mut reader = TokenReader::sglang_generate(None);
        let read: Vec<Delta> = stream.iter().flat_map(|data| deltas(&mut reader, data)).collect();
        assert_eq!(read, [delta(0, &[5], None), delta(0, &[6, 8], None), delta(0, &[2], Some(Stop))]);
    }
    // The list of an event may have grown after its count was taken.
    let mut reader = TokenReader::sglang_generate(None);
    assert_eq!(deltas(&mut reader, &sglang("[5,6]", 1, "null")), [delta(0, &[5, 6], None)]);
    assert_eq!(deltas(&mut reader, &sglang("[5,6]", 2, "null")), [delta(0, &[], None)]);
    let usage = reader.read(&sglang("[5,6,7]", 3, "null")).expect("a chunk").usage;
    let counted = Usage { prompt_tokens: Some(7), cached_tokens: Some(4), output_tokens: None };
    assert_eq!(usage, Some(counted));
}

#[test]
fn sglang_counts_each_choice_by_itself() {
    let mut reader = TokenReader::sglang_generate(None);
    let of = |index: u32, ids: &str, total: u32| {
        sglang(ids, total, "null").replacen('{', &format!(r#"{{"index":{index},"#), 1)
    };
    assert_eq!(deltas(&mut reader, &of(1, "[5]", 1)), [delta(1, &[5], None)]);
    assert_eq!(deltas(&mut reader, &of(0, "[6]", 1)), [delta(0, &[6], None)]);
    assert_eq!(deltas(&mut reader, &of(1, "[5,7]", 2)), [delta(1, &[7], None)]);
}

#[test]
fn log_probabilities_of_sglang_are_the_last_of_the_list() {
    let data = |ids: &str, total: u32, chosen: &str, top: &str| {
        let meta = format!(r#""output_token_logprobs":{chosen},"output_top_logprobs":{top},"id""#);
        sglang(ids, total, "null").replacen(r#""id""#, &meta, 1)
    };
    let first = data("[5]", 1, "[[-0.5,5,null]]", "[[[-0.5,5,null],[-1.5,6,null]]]");
    let both = "[[[-0.5,5,null],[-1.5,6,null]],[[-0.25,8,null],[-2.5,9,null]]]";
    let second = data("[5,9]", 2, "[[-0.5,5,null],[-2.5,9,\"t\"]]", both);
    let mut reader = TokenReader::sglang_generate(Some(2));
    let likely = |top: &[(TokenId, f32)], chosen| TokenLogprobs { chosen, top: top.to_vec() };
    assert_eq!(deltas(&mut reader, &first)[0].logprobs, [likely(&[(5, -0.5), (6, -1.5)], -0.5)]);
    assert_eq!(deltas(&mut reader, &second)[0].logprobs, [likely(&[(8, -0.25), (9, -2.5)], -2.5)]);
}

#[test]
fn what_an_engine_complains_about_is_found_in_every_shape() {
    let mut reader = TokenReader::completions(None);
    let mut check = |data: &str, status, message: &str| {
        assert_eq!(reader.read(data).expect(data).fault, fault(status, message), "{data}");
    };
    check(r#"{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}"#, Some(400), "no");
    check(r#"{"error":{"message":"no","code":"500"}}"#, Some(500), "no");
    check(r#"{"error":{"message":"no","code":"model_not_found"}}"#, None, "no");
    check(r#"{"error":" the engine died "}"#, None, "the engine died");
    check(r#"{"error":{"reason":"x"}}"#, None, r#"{"reason":"x"}"#);
    check(r#"{"object":"error","message":"old","type":"x","code":503}"#, Some(503), "old");
    check(r#"{"detail":"Not Found"}"#, None, "Not Found");
    check(
        r#"{"choices":[{"index":0,"token_ids":[],"finish_reason":"abort"}]}"#,
        None,
        "the engine gave the request up",
    );
    let aborted =
        sglang("[]", 0, r#"{"type":"abort","message":"The request queue is full.","status_code":503}"#);
    let chunk = TokenReader::sglang_generate(None).read(&aborted).expect("a chunk").fault;
    assert_eq!(chunk, fault(Some(503), "The request queue is full."));
}

#[test]
fn answers_that_cannot_be_believed_are_errors() {
    let check = |mut reader: TokenReader, data: &str, expected: AnswerError| {
        assert_eq!(reader.read(data), Err(expected), "{data}");
    };
    let unreadable = |data: &str, expected: &str| match TokenReader::completions(None).read(data) {
        Err(AnswerError::Unreadable { kind, column }) => {
            assert_eq!(kind, expected, "{data}");
            assert!(column <= data.len());
        }
        other => panic!("{data}: {other:?}"),
    };
    unreadable(r#"{"choices":[{"token_ids":[-1]}]}"#, "of an unexpected shape");
    unreadable(r#"{"choices":[{"token_ids":[4294967296]}]}"#, "of an unexpected shape");
    unreadable(r#"{"choices":[{"token_ids":["1"]}]}"#, "of an unexpected shape");
    unreadable(r#"{"choices":[{"index":-1,"token_ids":[]}]}"#, "of an unexpected shape");
    unreadable(r#"{"choices":[{"token_ids":[1"#, "cut off");
    unreadable("hello", "no JSON");
    let completions = || TokenReader::completions(None);
    check(completions(), r#"{"choices":[{"index":0,"text":"hello"}]}"#, AnswerError::NoTokenIds);
    check(completions(), r#"{"choices":[{"index":0,"token_ids":null}]}"#, AnswerError::NoTokenIds);
    check(completions(), r#"{"hello":1}"#, AnswerError::Unexpected);
    let odd = r#"{"choices":[{"token_ids":[1],"finish_reason":"whatever"}]}"#;
    check(completions(), odd, AnswerError::UnknownFinish);
    let asked = r#"{"choices":[{"token_ids":[1],"logprobs":null}]}"#;
    check(TokenReader::completions(Some(1)), asked, AnswerError::NoLogprobs);
    let generate = asked.replace(r#""token_ids""#, r#""index":0,"token_ids""#);
    check(TokenReader::vllm_generate(Some(0)), &generate, AnswerError::NoLogprobs);
    let sglang_reader = || TokenReader::sglang_generate(None);
    check(sglang_reader(), &sglang("[1]", 3, "null"), AnswerError::Count { ids: 1, known: 0, total: 3 });
    check(sglang_reader(), &sglang("[-1]", 1, "null"), AnswerError::NoTokenIds);
    check(sglang_reader(), &sglang("\"no\"", 1, "null"), AnswerError::NoTokenIds);
    check(sglang_reader(), &sglang("null", 1, "null"), AnswerError::NoTokenIds);
    check(sglang_reader(), r#"{"text":"x"}"#, AnswerError::Unexpected);
}

#[test]
fn a_refusal_is_told_in_the_engines_words() {
    let check = |body: &str, expected: &str| assert_eq!(message_of(body.as_bytes()), expected, "{body}");
    check(r#"{"error":{"message":"too long","code":400}}"#, "too long");
    check(r#"{"detail":[{"loc":["body"],"msg":"x"}]}"#, r#"[{"loc":["body"],"msg":"x"}]"#);
    check("<html>Bad Gateway</html>\n", "<html>Bad Gateway</html>");
    check("", "no reason given");
    assert_eq!(message_of(b"\xff\xfe"), "\u{fffd}\u{fffd}");
    assert_eq!(message_of("ä".repeat(9000).as_bytes()).chars().count(), 500);
}

#[test]
fn an_engine_with_enough_to_do_is_told_from_one_that_is_broken() {
    let check = |status, message: &str, expected| {
        assert_eq!(is_full(status, message), expected, "{status} {message}")
    };
    check(429, "", true);
    check(503, "The request queue is full.", true);
    check(503, "The engine is currently busy and cannot accept new requests.", true);
    check(503, "The engine has reached its prefill token backlog limit.", true);
    check(503, "no healthy upstream", false);
    check(503, "", false);
    check(500, "queue", false);
}

#[test]
fn a_glance_finds_counts_and_complaints_alone() {
    let check = |text: &str, fault: Option<Fault>, usage: Option<Usage>| {
        assert_eq!(glance(text), Glance { fault, usage }, "{text}");
    };
    check(r#"{"choices":[{"delta":{"content":"the \"error\" and \"usage\""}}]}"#, None, None);
    check(r#"{"choices":[{"delta":{"tool_calls":[{"error":1}]}}],"usage":null}"#, None, None);
    check(r#"{"choices":[],"error":null}"#, None, None);
    check(r#"{"error":{"message":"no","code":500}}"#, fault(Some(500), "no"), None);
    check("no JSON at all", None, None);
    let document = include_str!("../../fixtures/vllm/nixl_pd/4_decode_response.json");
    let counted = Usage { prompt_tokens: Some(194), cached_tokens: Some(192), output_tokens: Some(17) };
    check(document, None, Some(counted));
}

proptest! {
    #[test]
    fn no_event_makes_a_reader_panic(data in ".{0,80}", ids in prop::collection::vec(any::<i64>(), 0..6), total in any::<u32>()) {
        let list = serde_json::to_string(&ids).expect("numbers");
        for mut reader in [TokenReader::completions(Some(3)), TokenReader::vllm_generate(None), TokenReader::sglang_generate(Some(1))] {
            let _ = reader.read(&data);
            let _ = reader.read(&sglang(&list, total, "null"));
            let _ = reader.read(&format!(r#"{{"choices":[{{"index":0,"token_ids":{list}}}]}}"#));
        }
        let _ = glance(&data);
        let _ = message_of(data.as_bytes());
    }

    #[test]
    fn the_prompt_that_an_engine_echoes_is_compared_number_by_number(
        prompt in prop::collection::vec(any::<TokenId>(), 0..20),
        other in prop::collection::vec(any::<TokenId>(), 0..20),
    ) {
        let json = format!(
            r#"{{"choices":[{{"index":0,"token_ids":[],"prompt_token_ids":{}}}]}}"#,
            serde_json::to_string(&prompt).expect("numbers")
        );
        let mut reader = TokenReader::completions(None);
        let echo = reader.read(&json).expect("a chunk").prompt.expect("the prompt");
        prop_assert!(echo.is(&prompt));
        prop_assert_eq!(echo.is(&other), prompt == other);
    }
}
