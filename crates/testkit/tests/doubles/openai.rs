//! What a plain server's double answers.

use forebay_testkit::{ApiKey, Fault, OpenAiDouble, OpenAiOptions, continuation, tokenizer};
use serde_json::{Value, json};

use crate::common::{get, post};

#[tokio::test]
async fn chat_and_completions_answer_with_text_alone() {
    let double = OpenAiDouble::start(OpenAiOptions::default()).await;
    let body = json!({"prompt": "tell me", "max_tokens": 30, "temperature": 0});
    let answer = post(&double.url(), "/v1/completions", &body).await.json();
    let expected = tokenizer::decode(&continuation(1, &tokenizer::encode("tell me"), 30), true);
    assert_eq!(answer["choices"][0]["text"], json!(expected));
    let mut chat =
        json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30, "temperature": 0});
    let whole = post(&double.url(), "/v1/chat/completions", &chat).await.json();
    assert!(whole["choices"][0].get("token_ids").is_none());
    chat["stream"] = json!(true);
    chat["stream_options"] = json!({"include_usage": true});
    let events = post(&double.url(), "/v1/chat/completions", &chat).await.events();
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let text: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(json!(text), whole["choices"][0]["message"]["content"]);
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], json!(30));
}

#[tokio::test]
async fn it_has_no_metrics_and_accepts_any_model() {
    let double = OpenAiDouble::start(OpenAiOptions::default()).await;
    assert_eq!(get(&double.url(), "/metrics").await.status, 404);
    assert_eq!(get(&double.url(), "/kv_event_sources").await.status, 404);
    assert_eq!(get(&double.url(), "/health").await.json(), json!({"status": "ok"}));
    assert_eq!(
        get(&double.url(), "/props").await.json()["default_generation_settings"]["n_ctx"],
        json!(4096)
    );
    let body = json!({"model": "whatever", "prompt": "x", "max_tokens": 1});
    assert_eq!(post(&double.url(), "/v1/completions", &body).await.json()["model"], json!("whatever"));
    let tokens = post(&double.url(), "/tokenize", &json!({"content": "ab"})).await.json();
    assert_eq!(tokens, json!({"tokens": [97, 98]}));
    let long = post(&double.url(), "/v1/completions", &json!({"prompt": "x".repeat(5000)})).await;
    assert_eq!((long.status, &long.json()["error"]["type"]), (400, &json!("invalid_request_error")));
    double.control().inject(Fault::InternalError);
    assert_eq!(post(&double.url(), "/v1/completions", &body).await.status, 500);
}

#[tokio::test]
async fn a_bare_server_has_only_what_openai_has() {
    let options = OpenAiOptions {
        props: false,
        tokenize: false,
        api_key: Some(ApiKey("k".into())),
        ..Default::default()
    };
    let double = OpenAiDouble::start(options).await;
    assert_eq!(get(&double.url(), "/props").await.status, 404);
    assert_eq!(post(&double.url(), "/tokenize", &json!({})).await.status, 404);
    assert_eq!(get(&double.url(), "/v1/models").await.status, 401);
}
