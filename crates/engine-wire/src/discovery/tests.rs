use proptest::prelude::*;

use super::*;

const VLLM_MODELS: &str = r#"{"object":"list","data":[
    {"id":"chat","object":"model","created":1795345280,"owned_by":"vllm","root":"/models/smol","parent":null,
     "max_model_len":2048,"permission":[]},
    {"id":"chat-alias","owned_by":"vllm","root":"/models/smol","parent":null,"max_model_len":2048},
    {"id":"legal","owned_by":"vllm","root":"/adapters/legal","parent":"chat","max_model_len":null}]}"#;

#[test]
fn models_and_adapters_are_told_apart() {
    let found = models(VLLM_MODELS.as_bytes()).unwrap();
    let names = |models: &[FoundModel]| models.iter().map(|model| model.id.clone()).collect::<Vec<_>>();
    assert_eq!(names(&found.base), ["chat", "chat-alias"]);
    assert_eq!(names(&found.adapters), ["legal"]);
    assert_eq!(found.base[0].root.as_deref(), Some("/models/smol"));
    assert_eq!(found.base[0].context_tokens_max, Some(2048));
    assert!(found.one_model());
}

#[test]
fn two_models_under_one_server_are_noticed() {
    let found = models(br#"{"data":[{"id":"a","root":"/x"},{"id":"b","root":"/y"}]}"#).unwrap();
    assert!(!found.one_model());
}

#[test]
fn what_is_missing_or_odd_counts_as_not_told() {
    let found =
        models(br#"{"data":[7,{"id":3},{"id":""},{"id":"m","root":[],"max_model_len":-1}]}"#).unwrap();
    assert_eq!(found.base, [FoundModel { id: "m".into(), ..FoundModel::default() }]);
    let long = format!(r#"{{"data":[{{"id":"{}"}}]}}"#, "x".repeat(NAME_BYTES_MAX + 1));
    assert_eq!(models(long.as_bytes()).unwrap(), FoundModels::default());
}

#[test]
fn another_document_is_unreadable() {
    let missing = Unreadable::Shape { missing: "list `data`" };
    assert_eq!(models(br#"{"error":"no"}"#), Err(missing.clone()));
    assert_eq!(models(b"[]"), Err(missing));
    assert_eq!(models(b"<html>"), Err(Unreadable::NotJson { line: 1, column: 1 }));
    assert!(version(br#"{"version":32}"#).is_err());
    assert!(vllm::server_info(br#"{"disaggregation_mode":"null"}"#).is_err());
    assert!(sglang::server_info(br#"{"vllm_config":{}}"#).is_err());
    assert!(llama_cpp::props(br#"{"error":{"code":404}}"#).is_err());
}

#[test]
fn routes_are_read_by_name() {
    let found =
        routes(br#"{"openapi":"3.1.0","paths":{"/health":{"get":{}},"/tokenize":{"post":{}}}}"#).unwrap();
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["/health", "/tokenize"]);
}

#[test]
fn sentences_of_errors_are_found_in_every_shape() {
    let check =
        |body: &str, sentence: Option<&str>| assert_eq!(error_message(body.as_bytes()).as_deref(), sentence);
    check(r#"{"error":{"message":"no such model","code":404}}"#, Some("no such model"));
    check(r#"{"object":"error","message":"too long","code":400}"#, Some("too long"));
    check(r#"{"detail":"Not Found"}"#, Some("Not Found"));
    check(r#"{"error":"Unauthorized"}"#, Some("Unauthorized"));
    check(r#"{"choices":[]}"#, None);
    check("oops", None);
    let cut = error_message(format!(r#"{{"detail":"{}"}}"#, "é".repeat(NAME_BYTES_MAX)).as_bytes()).unwrap();
    assert_eq!(cut.len(), NAME_BYTES_MAX);
}

/// As vLLM 0.32 answered, and what a rank without events looks like there.
#[test]
fn vllm_says_where_its_events_are() {
    let found = vllm::kv_event_sources(
        br#"{"0":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:15557",
                  "replay_endpoint":"tcp://*:15558","buffer_steps":10000,"hwm":100000,"max_queue_size":100000,
                  "topic":"kv-events"},
             "1":{"enable_kv_cache_events":false,"publisher":"null","endpoint":"tcp://*:5557"},
             "x":{}}"#,
    )
    .unwrap();
    assert_eq!(found.ranks, 2);
    assert_eq!(found.sources.len(), 1);
    let dialled = found.sources[&0].dialled("10.0.0.7").unwrap();
    assert_eq!(dialled.events.to_string(), "tcp://10.0.0.7:15557");
    assert_eq!(dialled.replay.unwrap().to_string(), "tcp://10.0.0.7:15558");
    assert_eq!(dialled.topic, "kv-events");
    assert!(found.sources[&0].vllm_binds());
}

#[test]
fn addresses_are_dialled_where_the_engine_is() {
    let check = |endpoint: &str, host: &str, dialled: Result<&str, ()>| {
        let found = ZmqAddress::parse(endpoint).map(|address| address.reached_at(host).to_string());
        assert_eq!(found.map_err(drop), dialled.map(str::to_owned), "{endpoint}");
    };
    check("tcp://*:5557", "node-3", Ok("tcp://node-3:5557"));
    check("tcp://0.0.0.0:5557", "node-3", Ok("tcp://node-3:5557"));
    check("tcp://[::]:5557", "[fd00::7]", Ok("tcp://[fd00::7]:5557"));
    check("tcp://:::5557", "fd00::7", Ok("tcp://[fd00::7]:5557"));
    check("tcp://10.1.1.1:5557", "node-3", Ok("tcp://10.1.1.1:5557"));
    check("ipc:///tmp/events", "node-3", Err(()));
    check("tcp://*", "node-3", Err(()));
    check("tcp://*:0", "node-3", Err(()));
    check("tcp://*:70000", "node-3", Err(()));
    check("tcp://:5557", "node-3", Err(()));
}

#[test]
fn ports_count_up_with_ranks() {
    let source = |port: u16| KvSource {
        dp_rank: 0,
        events: format!("tcp://*:{port}"),
        replay: Some("tcp://*:6000".into()),
        topic: String::new(),
    };
    let third = source(5557).of_rank(3).unwrap();
    assert_eq!(
        (third.dp_rank, &*third.events, third.replay.as_deref()),
        (3, "tcp://*:5560", Some("tcp://*:6003"))
    );
    assert!(source(65535).of_rank(1).is_err());
}

#[test]
fn development_mode_tells_the_configuration() {
    let found = vllm::server_info(
        br#"{"vllm_config":{"model_config":{"dtype":"torch.bfloat16"},
             "cache_config":{"block_size":16,"cache_dtype":"fp8","enable_prefix_caching":false},
             "scheduler_config":{"max_num_batched_tokens":8192,"max_num_seqs":256},
             "parallel_config":{"data_parallel_size":2},
             "kv_transfer_config":{"kv_connector":"NixlConnector","kv_role":"kv_producer",
                 "kv_load_failure_policy":"recompute",
                 "kv_connector_extra_config":{"enable_cross_layers_blocks":"True"}},
             "kv_events_config":null},"vllm_env":{},"system_env":{}}"#,
    )
    .unwrap();
    assert_eq!(found.dtype.as_deref(), Some("bfloat16"));
    assert_eq!(found.cache_dtype.as_deref(), Some("fp8"));
    assert_eq!(found.prefix_caching, Some(false));
    assert_eq!(
        (found.step_tokens_max, found.sequences_max, found.dp_ranks),
        (Some(8192), Some(256), Some(2))
    );
    let connector = found.connector.unwrap().unwrap();
    assert!(connector.is_nixl && connector.cross_layers);
    assert_eq!(connector.role.as_deref(), Some("kv_producer"));
    assert_eq!(connector.load_failure_policy.as_deref(), Some("recompute"));
    assert_eq!(found.kv_events, Some(None));
    let class = |config: &str| {
        let document = format!(r#"{{"vllm_config":{{"kv_transfer_config":{config}}}}}"#);
        vllm::server_info(document.as_bytes()).unwrap().connector.unwrap().map(|it| (it.class, it.is_nixl))
    };
    let multi = r#"{"kv_connector":"MultiConnector","kv_connector_extra_config":{"connectors":
                    [{"kv_connector":"ExampleConnector"},{"kv_connector":"NixlPullConnector"}]}}"#;
    assert_eq!(class(multi), Some(("MultiConnector".into(), true)));
    assert_eq!(class(r#"{"kv_connector":"MooncakeConnector"}"#), Some(("MooncakeConnector".into(), false)));
    assert_eq!(class("null"), None);
    // Before `config_format` there was only Python's text.
    assert_eq!(vllm::server_info(br#"{"vllm_config":"model='x'"}"#).unwrap(), vllm::FoundVllm::default());
}

#[test]
fn sglang_tells_its_arguments() {
    let found = sglang::server_info(
        br#"{"model_path":"Qwen/Qwen3-8B","served_model_name":"qwen","dp_size":2,"tp_size":4,"page_size":64,
             "context_length":null,"chunked_prefill_size":8192,"max_running_requests":128,"kv_cache_dtype":"auto",
             "dtype":"auto","disaggregation_mode":"prefill","disaggregation_bootstrap_port":9001,
             "disaggregation_transfer_backend":"nixl","disable_radix_cache":false,"max_total_num_tokens":400000,
             "version":"0.5.23","internal_states":[{"effective_max_running_requests_per_dp":64}],
             "kv_events":{"publisher":"zmq","endpoint_host":"*","endpoint_port_base":5557,"topic":"","block_size":64,
                          "dp_size":2,"replay_endpoint_port_base":5600}}"#,
    )
    .unwrap();
    assert_eq!(found.disaggregation, sglang::Disaggregation::Prefill);
    assert_eq!((found.bootstrap_port, found.dp_ranks), (9001, 2));
    assert_eq!((found.page_size_tokens, found.sequences_max), (Some(64), Some(64)));
    assert_eq!(found.context_tokens_max, None);
    assert!(found.prefix_caching);
    let second = found.kv_events.unwrap().of_rank(1).unwrap().dialled("gpu-1").unwrap();
    assert_eq!(second.events.to_string(), "tcp://gpu-1:5558");
    assert_eq!(second.replay.unwrap().to_string(), "tcp://gpu-1:5601");
}

#[test]
fn llama_cpp_tells_its_slots() {
    let found = llama_cpp::props(
        br#"{"default_generation_settings":{"n_ctx":4096},"total_slots":4,"model_path":"/m.gguf","build_info":"b8840"}"#,
    )
    .unwrap();
    assert_eq!((found.context_tokens_max, found.slots), (Some(4096), Some(4)));
    assert_eq!(found.build.as_deref(), Some("b8840"));
}

#[test]
fn a_server_is_what_it_calls_itself() {
    let owned = |owner: &str| {
        models(format!(r#"{{"data":[{{"id":"m","owned_by":"{owner}"}}]}}"#).as_bytes()).unwrap()
    };
    let metrics = Scrape::read(b"vllm:num_requests_running{engine=\"0\"} 0\n");
    let check = |owner: Option<&str>, metrics: Option<&Scrape>, server: Option<Server>| {
        let models = owner.map(owned);
        let clues = Clues { models: models.as_ref(), metrics, ..Clues::default() };
        assert_eq!(identify(&clues), server, "{owner:?}");
    };
    check(Some("vllm"), None, Some(Server::Vllm));
    check(Some("sglang"), Some(&metrics), Some(Server::Sglang));
    check(Some("tensorrt_llm"), None, Some(Server::Trtllm));
    check(Some("llamacpp"), None, Some(Server::LlamaCpp));
    check(Some("openai"), None, Some(Server::Other));
    // A vLLM that lists its models only with a key, or under an owner that a proxy wrote.
    check(None, Some(&metrics), Some(Server::Vllm));
    check(Some("acme"), Some(&metrics), Some(Server::Vllm));
    check(None, None, None);
}

proptest! {
    #[test]
    fn nothing_panics(body in prop_oneof![any::<Vec<u8>>(), "[\\[\\]{}\":,a-z0-9]{0,64}".prop_map(String::into_bytes)]) {
        let _ = (models(&body), version(&body), routes(&body), error_message(&body));
        let _ = (vllm::server_info(&body), vllm::kv_event_sources(&body));
        let _ = (sglang::server_info(&body), llama_cpp::props(&body));
    }

    #[test]
    fn an_address_reads_what_it_prints(host in "[a-z][a-z0-9.-]{0,20}|[0-9a-f]{1,4}::[0-9a-f]{1,4}", port in 1u16..) {
        let address = ZmqAddress { host, port };
        prop_assert_eq!(ZmqAddress::parse(&address.to_string()), Ok(address));
    }
}
