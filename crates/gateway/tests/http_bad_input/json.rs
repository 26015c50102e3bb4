//! Deep and wide JSON, numbers without end, fields that come twice.

use super::*;

/// Levels that would overflow any stack if each took one frame.
const DEEP: usize = 500_000;
/// Members, messages, strings: as many as fit into a few megabytes.
const WIDE: usize = 500_000;

fn arrays(depth: usize) -> String {
    format!("{}{}", "[".repeat(depth), "]".repeat(depth))
}

fn objects(depth: usize) -> String {
    format!("{}1{}", "{\"a\":".repeat(depth), "}".repeat(depth))
}

fn chat_with(members: &str) -> String {
    format!(r#"{{"model":"tiny","messages":[{{"role":"user","content":"hello"}}],{members}}}"#)
}

fn listed(item: &str) -> String {
    format!("[{}]", vec![item; WIDE].join(","))
}

/// Asks at the public address and what-if at the admin address; `expected` is a status and a part of the message.
async fn check(server: &Server, path: &str, body: &str, expected: (u16, &str)) {
    let begin = &body[..body.len().min(120)];
    let admin = server.admin.expect("it is served");
    for (address, path) in [(server.address, path), (admin, "/fleet/v1/placements")] {
        let exchange = post_raw(address, path, body.as_bytes()).await;
        let what_if_of_a_good_one = expected.0 == 200 && address == admin;
        if what_if_of_a_good_one {
            assert_eq!(exchange.error()["code"], "no_engine", "{path} {begin}: {}", exchange.answer);
            continue;
        }
        assert_eq!(exchange.status(), expected.0, "{path} {begin}: {}", exchange.answer);
        if expected.0 != 200 {
            let message = exchange.error()["message"].as_str().unwrap().to_owned();
            assert!(message.contains(expected.1) && message.len() < 1_000, "{path} {begin}: {message}");
        }
    }
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn nesting_is_bounded_wherever_it_is() {
    let server = Server::start(&greeter(), patient()).await.with_admin().await;
    for deep in [arrays(DEEP), objects(DEEP)] {
        let of_messages = format!(r#"{{"model":"tiny","messages":{deep}}}"#);
        check(&server, CHAT, &of_messages, (400, "expected")).await;
        let of_content = format!(r#"{{"model":"tiny","messages":[{{"role":"user","content":{deep}}}]}}"#);
        check(&server, CHAT, &of_content, (400, "messages[0].content")).await;
        let calls = r#"{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"#;
        let of_calls = format!(r#"{{"model":"tiny","messages":[{calls}{deep}}}}}]}}]}}"#);
        check(&server, CHAT, &of_calls, (400, "messages[0].tool_calls")).await;
        let in_text = deep.replace('"', "\\\"");
        let of_arguments = format!(r#"{{"model":"tiny","messages":[{calls}"{in_text}"}}}}]}}]}}"#);
        check(&server, CHAT, &of_arguments, (400, "messages[0].tool_calls")).await;
        check(&server, CHAT, &chat_with(&format!("\"tools\":[{deep}]")), (400, "recursion limit")).await;
        let kwargs = format!("\"chat_template_kwargs\":{{\"a\":{deep}}}");
        check(&server, CHAT, &chat_with(&kwargs), (400, "recursion limit")).await;
        let prompt = format!(r#"{{"model":"tiny","prompt":{deep}}}"#);
        check(&server, COMPLETIONS, &prompt, (400, "prompt")).await;
        // Skipping what nobody knows takes no stack.
        check(&server, CHAT, &chat_with(&format!("\"unknown\":{deep}")), (200, "")).await;
    }
    check(&server, CHAT, &arrays(DEEP), (400, "")).await;
    server.serves_another().await;
}

#[tokio::test]
async fn nesting_is_bounded_in_what_is_passed_on() {
    let fake = passing();
    let server = Server::start(&fake, patient()).await.with_admin().await;
    for deep in [arrays(DEEP), objects(DEEP), arrays(129)] {
        for field in ["tools", "unknown", "response_format", "chat_template_kwargs"] {
            let body = chat_with(&format!("\"{field}\":{deep}"));
            check(&server, CHAT, &body, (400, "nests deeper than 128 levels at line 1 column")).await;
        }
        let of_content = format!(r#"{{"model":"tiny","messages":[{{"role":"user","content":{deep}}}]}}"#);
        check(&server, CHAT, &of_content, (400, "nests deeper")).await;
    }
    assert!(fake.requests.lock().is_empty(), "nothing of it reached an engine");
    check(&server, CHAT, &chat_with(&format!("\"tools\":[{}]", arrays(100))), (200, "")).await;
}

#[tokio::test]
async fn width_is_bounded_by_the_body() {
    let server = Server::start(&greeter(), patient()).await.with_admin().await;
    let keys: Vec<String> = (0..WIDE).map(|index| format!("\"{index}\":0")).collect();
    let keys = keys.join(",");
    check(&server, CHAT, &chat_with(&keys), (200, "")).await;
    check(&server, CHAT, &chat_with(&format!("\"logit_bias\":{{{keys}}}")), (400, "logit_bias")).await;
    let message = r#"{"role":"user","content":""}"#;
    let messages = format!(r#"{{"model":"tiny","messages":{}}}"#, listed(message));
    check(&server, CHAT, &messages, (400, "limit of work")).await;
    let parts = listed(r#"{"type":"text","text":""}"#);
    let parts = format!(r#"{{"model":"tiny","messages":[{{"role":"user","content":{parts}}}]}}"#);
    check(&server, CHAT, &parts, (400, "tokens")).await;
    check(&server, CHAT, &chat_with(&format!("\"stop\":{}", listed("\"\""))), (400, "stop has 500000")).await;
    let ids = format!("\"stop_token_ids\":{}", listed("1"));
    check(&server, CHAT, &chat_with(&ids), (400, "stop_token_ids has 500000")).await;
    for (prompts, says) in [("\"\"", "500000 prompts"), ("[]", "500000 prompts"), ("1", "tokens")] {
        let body = format!(r#"{{"model":"tiny","prompt":{}}}"#, listed(prompts));
        check(&server, COMPLETIONS, &body, (400, says)).await;
    }
    server.serves_another().await;
}

#[tokio::test]
async fn width_is_bounded_in_what_is_passed_on() {
    let server = Server::start(&passing(), patient()).await.with_admin().await;
    let keys: Vec<String> = (0..WIDE).map(|index| format!("\"{index}\":0")).collect();
    check(&server, CHAT, &chat_with(&keys.join(",")), (400, "more than 256 fields")).await;
    let name = "n".repeat(WIDE);
    check(&server, CHAT, &chat_with(&format!("\"{name}\":1,\"{name}\":2")), (400, "nnn…")).await;
}

#[tokio::test]
async fn numbers_and_twice_given_fields_are_refused_by_name() {
    let server = Server::start(&greeter(), patient()).await.with_admin().await;
    let digits = "9".repeat(WIDE);
    let long = [digits.clone(), format!("-{digits}"), format!("0.{digits}e999999"), "1e999999".to_owned()];
    for number in &long {
        for field in ["n", "max_tokens", "temperature", "top_k", "seed"] {
            check(&server, CHAT, &chat_with(&format!("\"{field}\":{number}")), (400, field)).await;
        }
        // Nobody knows it, so nobody reads it.
        check(&server, CHAT, &chat_with(&format!("\"unknown\":{number}")), (200, "")).await;
    }
    // So small that it is 0.
    check(&server, CHAT, &chat_with("\"temperature\":1e-999999"), (200, "")).await;
    for twice in
        ["\"model\":\"tiny\"", "\"n\":1,\"n\":1", "\"\\u006e\":1,\"n\":1", "\"stream\":false,\"stream\":true"]
    {
        check(&server, CHAT, &chat_with(twice), (400, "duplicate field")).await;
    }
    // One that the server sets is no more let through for coming twice, or escaped.
    let server = Server::start(&passing(), patient()).await.with_admin().await;
    let escaped = r#""kv_transfer_par\u0061ms":{"do_remote_prefill":true}"#;
    check(&server, CHAT, &chat_with(escaped), (400, "kv_transfer_params is set by the server")).await;
    let twice = format!(r#""kv_transfer_params":null,{escaped}"#);
    check(&server, CHAT, &chat_with(&twice), (400, "comes twice")).await;
    // Before it is known whose it is, and so in what form it goes on.
    check(&server, CHAT, r#"{"a":1,"a":2}"#, (400, "`a` comes twice")).await;
    check(&server, CHAT, r#"{"a":1,"model":"nobody"}"#, (404, "nobody")).await;
}
