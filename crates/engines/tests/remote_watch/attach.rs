//! What is found out about engines of every kind.

use std::{sync::Arc, time::Duration};

use forebay_engine_wire::compat::apart;
use forebay_engines::{
    CacheSight, EngineFacts,
    remote::{
        Abort, AttachError, AttachSpec, Attached, Dialect, Examination, HandOver, RankPin, Severity,
        TokenRoute, TokenizerProbe, client::HttpError, examine,
    },
};
use forebay_testkit::{
    ApiKey, ConnectorOptions, Fault, KvEventOptions, KvRole, VllmDouble, VllmOptions, VllmVersion,
};
use forebay_types::{Role, TokenId};
use serde_json::{Value, json};

use super::rig::{Scripted, Tokenizer, endpoint, soon, spec};

async fn examined(url: &str, spec: &AttachSpec) -> Examination {
    soon(examine(&endpoint(url, None), spec)).await
}

async fn attached(options: VllmOptions, spec: &AttachSpec) -> (VllmDouble, Attached, Vec<String>) {
    let double = VllmDouble::start(options).await;
    let Examination { attached, findings } = examined(&double.url(), spec).await;
    let findings = findings.iter().map(|finding| format!("{}: {finding}", finding.severity.name())).collect();
    (double, attached.unwrap(), findings)
}

fn has(findings: &[String], text: &str) -> bool {
    findings.iter().any(|finding| finding.contains(text))
}

#[tokio::test]
async fn a_plain_vllm_engine_is_known_at_once() {
    let (double, found, findings) = attached(VllmOptions::default(), &spec()).await;
    let EngineFacts { kind, model, role, dp_ranks, block_size_tokens, context_tokens_max, .. } =
        found.facts.clone();
    assert_eq!((kind, &*model, role, dp_ranks), ("vllm", "double", Role::Both, 1));
    assert_eq!((block_size_tokens, context_tokens_max), (16, 4096));
    assert_eq!(found.facts.blocks_total as usize, double.options().blocks);
    assert!(found.facts.accepts.tokens && found.facts.accepts.body);
    assert!(!found.facts.kv.can_export && !found.facts.kv.can_import);
    assert_eq!(found.facts.cache_sight, CacheSight::Events);
    let speech = &found.speech;
    assert_eq!((speech.dialect, speech.tokens), (Dialect::Vllm, Some(TokenRoute::Completions)));
    assert_eq!(
        (&speech.hand_over, speech.ranks, speech.abort),
        (&HandOver::None, RankPin::None, Abort::Close)
    );
    assert!(speech.salts_cache);
    let events = &double.event_endpoints()[0];
    assert_eq!(found.plan.events[0].events.to_string(), events.events);
    assert_eq!(found.plan.events[0].replay.as_ref().map(ToString::to_string), events.replay);
    assert!(found.facts.notes.is_empty(), "{:?}", found.facts.notes);
    assert!(has(&findings, "info: it has no NIXL connector"), "{findings:?}");
}

#[tokio::test]
async fn token_routes_are_taken_where_they_are_open() {
    let options = VllmOptions { scale_out: true, ..VllmOptions::default() };
    let (_double, found, _) = attached(options, &spec()).await;
    assert_eq!(found.speech.tokens, Some(TokenRoute::VllmGenerate));
    assert_eq!(found.speech.abort, Abort::VllmAbortRequests);
}

/// 0.25 has the route, but not for hand-overs, and nothing to abort by.
#[tokio::test]
async fn legs_go_where_transfer_parameters_are_heard() {
    let plain = VllmOptions { version: VllmVersion::V0_25, ..VllmOptions::default() };
    let (_double, found, _) = attached(plain, &spec()).await;
    assert_eq!((found.speech.tokens, found.speech.abort), (Some(TokenRoute::VllmGenerate), Abort::Close));
    let both = Some(ConnectorOptions::new(KvRole::Both));
    let pair = VllmOptions { version: VllmVersion::V0_25, connector: both, ..VllmOptions::default() };
    let (_double, found, findings) = attached(pair, &spec()).await;
    assert_eq!(found.speech.tokens, Some(TokenRoute::Completions));
    assert!(found.facts.kv.can_export && found.facts.kv.can_import);
    assert!(has(&findings, "enable_cross_layers_blocks"), "{findings:?}");
}

#[tokio::test]
async fn every_rank_of_a_group_is_a_target() {
    let (double, found, _) = attached(VllmOptions { dp: 3, ..VllmOptions::default() }, &spec()).await;
    assert_eq!((found.facts.dp_ranks, found.speech.ranks), (3, RankPin::Header));
    let dialled: Vec<_> = found.plan.events.iter().map(|source| source.events.to_string()).collect();
    let bound: Vec<_> = double.event_endpoints().into_iter().map(|endpoints| endpoints.events).collect();
    assert_eq!(dialled, bound);
}

#[tokio::test]
async fn a_pair_is_one_by_its_layout() {
    let (_p, prefill, findings) = attached(VllmOptions::prefill(), &spec()).await;
    let (_d, decode, _) =
        attached(VllmOptions::decode(), &AttachSpec { role: Some(Role::Decode), ..spec() }).await;
    assert!(prefill.facts.kv.can_export && prefill.facts.kv.can_import && prefill.facts.kv.needs_warming);
    assert!(decode.facts.kv.can_import && !decode.facts.kv.can_export, "its role says so");
    assert_eq!(prefill.speech.hand_over, HandOver::TransferParams);
    assert_eq!(prefill.facts.kv.layout, decode.facts.kv.layout);
    assert_eq!(apart(("p", &prefill.layout), ("d", &decode.layout)), None);
    assert!(has(&findings, "VLLM_KV_CACHE_LAYOUT=BLHNC"), "{findings:?}");
    assert!(has(&findings, r#""kv_load_failure_policy":"recompute""#), "{findings:?}");

    let (_o, other, _) = attached(VllmOptions { block_size: 32, ..VllmOptions::decode() }, &spec()).await;
    assert_ne!(prefill.facts.kv.layout, other.facts.kv.layout);
    assert_eq!(
        apart(("p", &prefill.layout), ("o", &other.layout)).unwrap(),
        "p and o cannot exchange KV: the block size of p is 16 tokens, of o 32 tokens"
    );
}

/// Without development mode the connector shows in metrics, and in what a prefill leg answers.
#[tokio::test]
async fn a_connector_is_found_from_outside() {
    let options = VllmOptions {
        dev_mode: false,
        connector: Some(ConnectorOptions::new(KvRole::Both)),
        ..VllmOptions::default()
    };
    let (double, found, findings) = attached(options, &spec()).await;
    assert!(found.facts.kv.can_export && found.facts.kv.can_import);
    assert!(has(&findings, "how its connector is configured is not told"), "{findings:?}");
    let asked = double.seen();
    assert!(
        asked.iter().all(|request| request.body.pointer("/kv_transfer_params/do_remote_prefill")
            != Some(&Value::Bool(true))),
        "what kills an engine is never asked"
    );
}

#[tokio::test]
async fn what_is_missing_is_said_with_its_flag() {
    let bare = VllmOptions {
        kv_events: None,
        prompt_tokens_details: false,
        prefix_caching: false,
        ..VllmOptions::default()
    };
    let pinned = AttachSpec { role: Some(Role::Prefill), ..spec() };
    let (_double, found, findings) = attached(bare, &pinned).await;
    let CacheSight::Approximate { why } = &found.facts.cache_sight else { panic!("events are off") };
    assert_eq!(&**why, "its KV events are off");
    for said in [
        r#"--kv-events-config '{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5558"}'"#,
        "--enable-prompt-tokens-details",
        "--no-enable-prefix-caching",
        r#""kv_connector":"NixlConnector","kv_role":"kv_producer""#,
    ] {
        assert!(has(&findings, said), "{said} in {findings:?}");
        assert!(found.facts.notes.iter().any(|note| note.contains(said)), "{said} among the notes");
    }
    let events = KvEventOptions { replay: false, ..KvEventOptions::default() };
    let (_double, found, findings) =
        attached(VllmOptions { kv_events: Some(events), ..VllmOptions::default() }, &spec()).await;
    assert_eq!(found.facts.cache_sight, CacheSight::Events);
    assert!(has(&findings, r#""replay_endpoint":"tcp://*:PORT""#), "{findings:?}");
}

#[tokio::test]
async fn older_engines_are_told_where_their_events_are() {
    let options = VllmOptions { version: VllmVersion::V0_22, ..VllmOptions::default() };
    let (double, found, findings) = attached(options, &spec()).await;
    assert!(matches!(found.facts.cache_sight, CacheSight::Approximate { .. }));
    assert!(has(&findings, "name the endpoint (`events="), "{findings:?}");
    let endpoints = double.event_endpoints().remove(0);
    let mut told = spec();
    told.overrides.kv_events = Some(forebay_engine_wire::discovery::KvSource {
        dp_rank: 0,
        events: endpoints.events,
        replay: endpoints.replay,
        topic: "kv-events".into(),
    });
    let found = examined(&double.url(), &told).await.attached.unwrap();
    assert_eq!(found.facts.cache_sight, CacheSight::Events);
}

#[tokio::test]
async fn keys_are_asked_for_and_used() {
    let options = VllmOptions { api_key: Some(ApiKey("sesame".into())), ..VllmOptions::default() };
    let double = VllmDouble::start(options).await;
    let Examination { attached, findings } = examined(&double.url(), &spec()).await;
    assert!(matches!(attached, Err(AttachError::Key(_))), "{attached:?}");
    let said = findings.iter().last().unwrap();
    assert_eq!(said.severity, Severity::Error);
    assert!(said.mend.as_ref().unwrap().contains("give its key"), "{said}");
    let opened = soon(examine(&endpoint(&double.url(), Some("sesame")), &spec())).await;
    assert!(opened.attached.unwrap().facts.accepts.tokens);
}

/// As ours, but for one character.
struct Other;

impl TokenizerProbe for Other {
    fn prompt(&self, text: &str) -> Result<Vec<TokenId>, String> {
        let tokens = Tokenizer.prompt(text)?;
        Ok(tokens.into_iter().map(|token| if token == u32::from(b'\t') { 32 } else { token }).collect())
    }

    fn chat(&self, messages: &[(&str, &str)]) -> Result<Vec<TokenId>, String> {
        Tokenizer.chat(messages)
    }
}

/// With a system message it says something of its own.
struct OtherTemplate;

impl TokenizerProbe for OtherTemplate {
    fn prompt(&self, text: &str) -> Result<Vec<TokenId>, String> {
        Tokenizer.prompt(text)
    }

    fn chat(&self, messages: &[(&str, &str)]) -> Result<Vec<TokenId>, String> {
        match messages[0].0 {
            "system" => Err("no system messages".into()),
            _ => Tokenizer.chat(messages),
        }
    }
}

#[tokio::test]
async fn another_tokenizer_means_text() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let with = async |tokenizer: Option<Arc<dyn TokenizerProbe>>| {
        let Examination { attached, findings } =
            examined(&double.url(), &AttachSpec { tokenizer, ..spec() }).await;
        let found = attached.unwrap();
        assert!(found.facts.accepts.body && !found.facts.accepts.tokens);
        assert!(found.speech.tokens.is_some(), "it could");
        findings.notes().join("; ")
    };
    let said = with(Some(Arc::new(Other))).await;
    assert!(said.contains(r#"disagrees with ours on the text "  two leading spaces, a tab\there"#), "{said}");
    assert!(said.contains("token 27 is 9 there, 32 here"), "{said}");
    let said = with(Some(Arc::new(OtherTemplate))).await;
    assert!(said.contains(r#"disagrees with ours on the chat [("system""#), "{said}");
    assert!(said.contains("here it is refused, no system messages"), "{said}");
    let said = with(None).await;
    assert!(said.contains("there is no tokenizer for its model here"), "{said}");
}

#[tokio::test]
async fn another_model_is_refused() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    double.control().inject(Fault::WrongModel { name: "impostor".into() });
    let wanted = AttachSpec { model: Some("double".into()), ..spec() };
    let error = examined(&double.url(), &wanted).await.attached.unwrap_err();
    assert_eq!(error.to_string(), "it serves impostor, not double");
}

#[tokio::test]
async fn what_does_not_answer_does_not_hold_up() {
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = examined(&format!("http://{nobody}"), &spec()).await.attached.unwrap_err();
    assert!(matches!(error, AttachError::Unreachable(_)) && error.mend().is_some(), "{error}");
    let double = VllmDouble::start(VllmOptions::default()).await;
    double.control().inject(Fault::Hang);
    let mut hasty = spec();
    hasty.settings.document_within = Duration::from_millis(100);
    let error = examined(&double.url(), &hasty).await.attached.unwrap_err();
    assert!(matches!(error, AttachError::Unreachable(HttpError::TooSlow { .. })), "{error}");
}

#[tokio::test]
async fn what_is_no_engine_is_told_by_a_sentence() {
    let check = async |answers: &[(&str, u16, &str)], said: &str| {
        let server = Scripted::fixed(answers).await;
        let error = examined(&server.url, &spec()).await.attached.unwrap_err();
        assert!(error.to_string().contains(said), "{error}, not {said}");
    };
    check(&[("GET /v1/models", 200, "<html>hello</html>")], "not JSON").await;
    check(&[("GET /v1/models", 200, r#"{"error":"no"}"#)], "no list `data` in it").await;
    check(&[], "none of the routes").await;
    check(&[("GET /v1/models", 503, "{}")], "not ready").await;
    check(&[("GET /v1/models", 200, r#"{"data":[]}"#)], "does not say which model").await;
}

#[tokio::test]
async fn two_models_at_one_address_are_noticed() {
    let server = Scripted::fixed(&[
        (
            "GET /v1/models",
            200,
            r#"{"data":[{"id":"a","root":"/x","owned_by":"me"},{"id":"b","root":"/y"}]}"#,
        ),
        ("POST /v1/chat/completions", 200, "{}"),
    ])
    .await;
    let Examination { attached, findings } = examined(&server.url, &spec()).await;
    assert_eq!(&*attached.unwrap().facts.model, "a");
    assert!(findings.notes().iter().any(|note| note.contains("it lists several models: /x, /y")));
}

#[tokio::test]
async fn any_openai_server_is_given_text() {
    let server = Scripted::fixed(&[
        ("GET /v1/models", 200, r#"{"data":[{"id":"m","owned_by":"llamacpp"}]}"#),
        (
            "GET /props",
            200,
            r#"{"default_generation_settings":{"n_ctx":2048},"total_slots":2,"build_info":"b8840"}"#,
        ),
        ("POST /v1/chat/completions", 200, r#"{"choices":[]}"#),
    ])
    .await;
    let found = examined(&server.url, &spec()).await.attached.unwrap();
    assert_eq!((found.facts.kind, found.facts.context_tokens_max), ("openai", 2048));
    assert!(found.facts.accepts.body && !found.facts.accepts.tokens);
    assert_eq!(found.facts.block_size_tokens, super::rig::BLOCK);
    assert_eq!(
        found.facts.cache_sight,
        CacheSight::Approximate { why: "llama.cpp publishes no KV events".into() }
    );
    assert_eq!(found.plan.health, "/health");
}

/// SGLang's servers, by its sources: a prefill server answers only requests with a partner.
fn sglang(mode: &'static str) -> impl Fn(&str, &Value) -> Option<(u16, String)> + Send + Sync + 'static {
    move |route, body| {
        let answer = match route {
            "GET /v1/models" => json!({"data": [{"id": "q", "owned_by": "sglang", "max_model_len": 8192}]}),
            "GET /server_info" => json!({
                "model_path": "Qwen/Qwen3-8B", "version": "0.5.23", "dp_size": 2, "page_size": 64,
                "max_total_num_tokens": 6400, "disaggregation_mode": mode, "disaggregation_bootstrap_port": 9001,
                "disaggregation_transfer_backend": "nixl", "kv_cache_dtype": "auto", "kv_events": null,
            }),
            "GET /v1/loads" => json!({"loads": [{"dp_rank": 0}, {"dp_rank": 1}]}),
            "POST /generate" => {
                if mode != "null" && (body["bootstrap_host"] != "2.2.2.2" || body["bootstrap_room"].is_null())
                {
                    return Some((500, "an assertion failed".into()));
                }
                assert!(body["input_ids"].is_array());
                json!({"output_ids": [5], "meta_info": {}})
            }
            "POST /tokenize" => {
                json!({"tokens": forebay_testkit::tokenizer::encode(body["prompt"].as_str()?)})
            }
            "POST /v1/chat/completions" => {
                let messages: Vec<(String, String)> = body["messages"]
                    .as_array()?
                    .iter()
                    .map(|it| {
                        (it["role"].as_str().unwrap().to_owned(), it["content"].as_str().unwrap().to_owned())
                    })
                    .collect();
                let prompt = forebay_testkit::tokenizer::render_chat(&messages, true);
                json!({"usage": {"prompt_tokens": forebay_testkit::tokenizer::encode(&prompt).len()}})
            }
            _ => return None,
        };
        Some((200, answer.to_string()))
    }
}

#[tokio::test]
async fn sglang_servers_are_what_they_were_started_as() {
    let plain = Scripted::start(sglang("null")).await;
    let Examination { attached, findings } = examined(&plain.url, &spec()).await;
    let found = attached.unwrap();
    assert_eq!((found.facts.kind, found.facts.dp_ranks, found.facts.role), ("sglang", 2, Role::Both));
    assert_eq!((found.facts.block_size_tokens, found.facts.blocks_total), (64, 100));
    assert_eq!((found.speech.tokens, found.speech.ranks), (Some(TokenRoute::SglangGenerate), RankPin::Field));
    assert!(found.facts.accepts.tokens, "{:?}", found.facts.notes);
    assert_eq!(found.speech.hand_over, HandOver::None);
    assert!(found.plan.loads);
    assert!(findings.iter().any(|finding| finding.what.contains("never run against a real server")));

    let prefill = Scripted::start(sglang("prefill")).await;
    let found = examined(&prefill.url, &spec()).await.attached.unwrap();
    assert_eq!(found.facts.role, Role::Prefill);
    assert!(found.facts.kv.can_export && !found.facts.kv.can_import);
    assert_eq!(found.speech.hand_over, HandOver::Bootstrap { host: "127.0.0.1".into(), port: 9001 });
    let decode = Scripted::start(sglang("decode")).await;
    let found = examined(&decode.url, &spec()).await.attached.unwrap();
    assert_eq!(found.facts.role, Role::Decode);
    assert!(found.facts.kv.can_import && !found.facts.kv.can_export);
}

/// A server's front outlives its core for a moment, and lists its models meanwhile.
#[tokio::test]
async fn a_server_whose_core_is_dead_is_not_taken() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    double.control().inject(forebay_testkit::Fault::InternalError);
    let Examination { attached, .. } = examined(&double.url(), &spec()).await;
    assert!(matches!(attached, Err(AttachError::NotReady(_))), "{attached:?}");
    double.control().heal();
    assert!(examined(&double.url(), &spec()).await.attached.is_ok());
}
