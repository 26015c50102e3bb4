use forebay_text::{ChatTemplate, Tokenizer};
use serde_json::{Value, json};

use super::*;

fn read(body: &Value) -> Result<(Spec, Vec<Prompt>), ApiError> {
    completions(body.to_string().as_bytes(), "m", &HttpLimits::default())
}

fn read_chat(body: &Value) -> Result<(Spec, String), ApiError> {
    let text = ModelText {
        tokenizer: Tokenizer::bytes(),
        template: ChatTemplate::chatml(),
        stop_tokens: [].into(),
        vocabulary_tokens: 300,
    };
    chat(body.to_string().as_bytes(), "m", &text, &HttpLimits::default())
}

fn with(changes: &Value) -> Value {
    let mut body = json!({"model": "m", "prompt": "hello"});
    body.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    body
}

#[test]
fn prompts_come_in_four_shapes() {
    let prompts = |prompt: Value| read(&with(&json!({"prompt": prompt}))).unwrap().1;
    let text = |text: &str| Prompt::Text(text.to_owned());
    assert_eq!(prompts(json!("a")), [text("a")]);
    assert_eq!(prompts(json!(["a", "b"])), [text("a"), text("b")]);
    assert_eq!(prompts(json!([1, 2])), [Prompt::Tokens(vec![1, 2])]);
    assert_eq!(prompts(json!([[1], [2, 3]])), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]);
}

#[test]
fn what_is_not_said_is_as_vllm_has_it() {
    let (spec, _) = read(&with(&json!({}))).unwrap();
    assert_eq!((spec.choices, spec.temperature, spec.top_p, spec.top_k), (1, 1.0, 1.0, 0));
    assert_eq!((spec.output_tokens_max, spec.seed, spec.delivery), (Some(16), None, Delivery::Whole));
    assert!(spec.stop.is_none() && spec.logprobs.is_none() && spec.transfer == Transfer::None);
    let (spec, prompt) = read_chat(&json!({"messages": [{"role": "user", "content": "hi"}]})).unwrap();
    assert_eq!(spec.output_tokens_max, None, "as many as fit");
    assert!(prompt.ends_with("<|im_start|>assistant\n"));
}

#[test]
fn values_arrive_as_they_were_sent() {
    let (spec, _) = read(&with(&json!({
        "n": 3, "max_tokens": 7, "temperature": 1e-7, "top_p": 0.5, "top_k": -1, "seed": -1, "stop": "x",
        "stop_token_ids": [5], "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true},
        "return_token_ids": true, "cache_salt": "s", "logprobs": 2, "presence_penalty": 0, "min_p": 0.0,
        "logit_bias": {}, "response_format": {"type": "text"}, "unknown": 1, "priority": 3,
        "kv_transfer_params": null,
    })))
    .unwrap();
    assert_eq!((spec.choices, spec.output_tokens_max, spec.temperature), (3, Some(7), 0.0));
    assert_eq!((spec.top_k, spec.seed, spec.logprobs), (0, Some(u64::MAX), Some(2)));
    assert_eq!(spec.stop.unwrap().strings.to_vec(), ["x"]);
    assert_eq!((spec.stop_token_ids, spec.ignore_eos, spec.return_token_ids), (vec![5], true, true));
    assert_eq!((spec.delivery, &*spec.salt), (Delivery::Stream { include_usage: true }, "s"));
    let (spec, _) =
        read(&with(&json!({"seed": u64::MAX, "max_completion_tokens": 3, "max_tokens": 9}))).unwrap();
    assert_eq!((spec.seed, spec.output_tokens_max), (Some(u64::MAX), Some(3)));
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    for (changes, named) in [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": vec!["a"; 1000]}), "prompt"),
        (json!({"n": 0}), "n is 0"),
        (json!({"n": 65}), "n is 65"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"temperature": "hot"}), "hot"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": vec!["a"; 99]}), "stop"),
        (json!({"stop_token_ids": vec![1; 999]}), "stop_token_ids"),
        (json!({"stream_options": {}}), "stream_options"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"min_tokens": 3}), "min_tokens"),
        (json!({"presence_penalty": 0.5}), "presence_penalty"),
        (json!({"repetition_penalty": 1.1}), "repetition_penalty"),
        (json!({"logit_bias": {"5": 1}}), "logit_bias"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"structured_outputs": {"regex": "a"}}), "structured_outputs"),
        (json!({"echo": true}), "echo"),
        (json!({"suffix": "x"}), "suffix"),
        (json!({"cache_salt": "x".repeat(2000)}), "cache_salt"),
        (json!({"kv_transfer_params": 3}), "kv_transfer_params"),
        (json!({"kv_transfer_params": {"do_remote_prefill": true}}), "remote_block_ids"),
        (json!({"kv_transfer_params": {"do_remote_decode": true}}), "max_tokens"),
        (
            json!({"kv_transfer_params": {"do_remote_decode": true}, "max_tokens": 1, "stream": true}),
            "stream",
        ),
        (
            json!({"kv_transfer_params": {"do_remote_decode": true}, "max_tokens": 1, "prompt": ["a", "b"]}),
            "kv_transfer_params",
        ),
    ] {
        let error = read(&with(&changes)).map(|_| ()).unwrap_err();
        assert_eq!(error.status.as_u16(), 400, "{changes}");
        assert!(error.to_json().contains(named), "{changes}: {}", error.to_json());
    }
    assert_eq!(read(&with(&json!({"model": "other"}))).unwrap_err().status.as_u16(), 404);
    for body in ["", "[]", "[\"m\"]", "{", "{\"prompt\": \"a\"", "\u{7f}"] {
        assert!(completions(body.as_bytes(), "m", &HttpLimits::default()).is_err(), "{body:?}");
    }
}

#[test]
fn chat_takes_text_and_shows_tools_to_the_template() {
    let message = json!([{"role": "user", "content": "hi"}]);
    for (changes, named) in [
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "image_url"),
        (json!({"messages": message, "tool_choice": "required"}), "tool_choice"),
        (json!({"messages": message, "tool_choice": {"type": "function"}}), "tool_choice"),
        (json!({"messages": message, "top_logprobs": 2}), "top_logprobs"),
    ] {
        let error = read_chat(&changes).map(|_| ()).unwrap_err();
        assert!(error.to_json().contains(named), "{changes}: {}", error.to_json());
    }
    let tools = json!({"messages": message, "tools": [{"type": "function"}], "tool_choice": "auto"});
    assert!(read_chat(&tools).is_ok());
}
