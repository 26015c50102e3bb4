use std::borrow::Cow;

use super::*;

fn messages() -> [Message<'static>; 3] {
    [
        Message::new("system", "Be brief."),
        Message::new("user", "2 < 3 & 'x'?"),
        Message::new("assistant", "Yes."),
    ]
}

fn render(source: &str, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
    ChatTemplate::new(source, &Tokenizer::bytes())?.render(conversation)
}

/// Renders with three messages and nothing else.
fn simple(source: &str) -> Result<String, TemplateError> {
    render(
        source,
        &Conversation { messages: &messages(), add_generation_prompt: true, ..Conversation::default() },
    )
}

fn raw(json: &str) -> Box<RawValue> {
    serde_json::from_str(json).unwrap()
}

#[test]
fn chatml_is_what_its_models_were_trained_on() {
    let template = ChatTemplate::chatml();
    let messages = messages();
    let mut conversation =
        Conversation { messages: &messages, add_generation_prompt: true, ..Conversation::default() };
    let turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 < 3 & 'x'?<|im_end|>\n\
                 <|im_start|>assistant\nYes.<|im_end|>\n";
    assert_eq!(template.render(&conversation).unwrap(), format!("{turns}<|im_start|>assistant\n"));
    conversation.add_generation_prompt = false;
    assert_eq!(template.render(&conversation).unwrap(), turns);
}

#[test]
fn templates_find_what_transformers_gives_them() {
    #[rustfmt::skip]
    let table = [
        ("{{ messages[0]['content'].strip('.').split(' ')[1] }}",                    "brief"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",        "role=system;content=Be brief.;"),
        ("{{ messages[0].role.startswith('sys') }}",                                 "True"),
        ("{{ messages[0].get('name') }}",                                            "None"),
        ("{{ messages[1:] | length }}{{ messages[::-1][0].content }}",               "2Yes."),
        ("{{ messages[1].content }}",                                                "2 < 3 & 'x'?"),
        ("{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ tools is none }}{{ tools is defined }}{{ strftime_now is defined }}",   "TrueTrueFalse"),
        ("{{ bos_token }}|{{ eos_token }}|{{ missing }}|",                           "|<|im_end|>||"),
        ("{%- macro m(x) -%}[{{ x }}]{%- endmacro -%}{{ m('a') ~ m(1) }}",           "[a][1]"),
        ("  {% if true %}\n  x\n  {% endif %}\ny\n",                                 "  x\ny"),
        ("{% generation %}a {% endgeneration %}{%- generation -%} b{%- endgeneration -%}", "a b"),
        ("{{ messages[0] | tojson }}",                   "{\"role\": \"system\", \"content\": \"Be brief.\"}"),
        ("{{ messages[1].content | tojson }}",                                       "\"2 < 3 & 'x'?\""),
        ("{{ {'b': [1, 2.5, none, true], 'a': {}, 'é': '\\n😀'} | tojson }}",        "{\"b\": [1, 2.5, null, true], \"a\": {}, \"é\": \"\\n😀\"}"),
        ("{{ {'b': [1, []], 'a': {}} | tojson(indent=2) }}",                         "{\n  \"b\": [\n    1,\n    []\n  ],\n  \"a\": {}\n}"),
        ("{{ {'b': [1, 2]} | tojson(separators=(',', ':'), ensure_ascii=false) }}",   "{\"b\":[1,2]}"),
    ];
    for (source, expected) in table {
        assert_eq!(simple(source).unwrap(), expected, "{source}");
    }
}

#[test]
fn the_date_is_an_argument() {
    let messages = messages();
    let now = Some(UnixTime(1_732_233_600));
    let conversation = Conversation { messages: &messages, now, ..Conversation::default() };
    assert_eq!(render("{{ strftime_now('%d %b %Y') }}", &conversation).unwrap(), "22 Nov 2024");
    let error = render("{{ strftime_now('%Q') }}", &conversation).unwrap_err();
    assert!(error.to_string().contains("strftime_now does not know %Q"), "{error}");
}

#[test]
fn tools_and_extra_variables_keep_their_order() {
    let messages = messages();
    let tools = raw(r#"[{"type":"function","function":{"name":"f","parameters":{"z":1,"a":2}}}]"#);
    let extra = raw(r#"{"enable_thinking":false}"#);
    let conversation = Conversation {
        messages: &messages,
        tools: Some(&tools),
        extra: Some(&extra),
        ..Conversation::default()
    };
    let source = "{{ tools | tojson }}{% if enable_thinking is false %}!{% endif %}";
    assert_eq!(
        render(source, &conversation).unwrap(),
        r#"[{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}]!"#
    );
}

#[test]
fn messages_are_read_as_clients_send_them() {
    let json = r#"[
        {"role":"user","content":[{"type":"text","text":"one"},{"type":"text","text":"tw\u006f"}],"extra":1},
        {"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function",
            "function":{"name":"f","arguments":"{\"z\": 1, \"a\": [true]}"}}]},
        {"role":"tool","tool_call_id":"1","content":"42","name":"f"},
        {"role":"assistant"}
    ]"#;
    let messages: Vec<Message<'_>> = serde_json::from_str(json).unwrap();
    assert!(matches!(&messages[2].content, Some(Content::Text(Cow::Borrowed("42")))), "borrowed, not copied");
    let source = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}";
    let conversation = Conversation { messages: &messages, ..Conversation::default() };
    assert_eq!(
        render(source, &conversation).unwrap(),
        "{\"role\": \"user\", \"content\": \"one\\ntwo\"}\n\
         {\"role\": \"assistant\", \"content\": \"\", \"tool_calls\": [{\"id\": \"1\", \"type\": \"function\", \
         \"function\": {\"name\": \"f\", \"arguments\": {\"z\": 1, \"a\": [true]}}}]}\n\
         {\"role\": \"tool\", \"content\": \"42\", \"name\": \"f\", \"tool_call_id\": \"1\"}\n\
         {\"role\": \"assistant\", \"content\": \"\"}\n"
    );
}

#[test]
fn every_failure_says_what_to_do() {
    let check = |result: Result<String, TemplateError>, expected: &str| {
        assert_eq!(result.unwrap_err().to_string(), expected);
    };
    check(
        simple("a\n{% if %}"),
        "the model's chat template has a syntax error in line 2: syntax error: unexpected end of block",
    );
    check(
        simple("{{ raise_exception('roles must alternate') }}"),
        "the model's chat template refused the messages: roles must alternate",
    );
    check(
        simple("{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}"),
        "the model's chat template refused the messages: deep",
    );
    check(
        simple("x\n{{ messages[0].nothing.at.all }}"),
        "the model's chat template failed in line 2 at `.nothing.at`: undefined value",
    );
    check(render("", &Conversation::default()), "messages is empty; give at least one message");
    let messages: Vec<Message<'_>> =
        serde_json::from_str(r#"[{"role":"user","content":[{"type":"image_url","image_url":{}}]}]"#).unwrap();
    check(
        render("", &Conversation { messages: &messages, ..Conversation::default() }),
        "messages[0].content[0] is of type \"image_url\"; this model takes only text",
    );
    let extra = raw(r#"{"messages":[]}"#);
    check(
        render("", &Conversation { messages: &messages, extra: Some(&extra), ..Conversation::default() }),
        "the template variable \"messages\" is set by the request itself; leave it out",
    );
    let calls = r#"[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{no json"}}]}]"#;
    let messages: Vec<Message<'_>> = serde_json::from_str(calls).unwrap();
    check(
        render("", &Conversation { messages: &messages, ..Conversation::default() }),
        "messages[0].tool_calls cannot be given to the chat template",
    );
}

#[test]
fn work_and_memory_of_a_hostile_template_are_bounded() {
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
    let huge = "{% set x = 'x' * 1000000 %}{% for a in range(9999) %}{{ x }}{% endfor %}";
    let doubling =
        "{% set ns = namespace(x='x') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}";
    for source in [endless, huge, doubling] {
        let result = simple(source);
        assert!(matches!(result, Err(TemplateError::Exhausted)), "{:?}", result.map(|text| text.len()));
    }
}

#[test]
fn bad_messages_are_refused_by_the_parser() {
    let error = |json: &str| serde_json::from_str::<Message<'_>>(json).unwrap_err().to_string();
    assert!(error(r#"{"content":"x"}"#).contains("missing field `role`"));
    assert!(error(r#"{"role":"user","content":7}"#).contains("expected a string or a list of content parts"));
    assert!(error(r#"{"role":"user","content":[{"type":"text"}]}"#).contains("missing field `text`"));
}
