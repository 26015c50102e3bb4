use super::*;

/// A command, prepared for a role with ports from 20000 on.
struct Case {
    role: Role,
    gpu: bool,
    transfer: bool,
    chunk_budget: Option<ChunkBudget>,
    environment: BTreeMap<String, String>,
    config: Option<&'static str>,
    url: Option<&'static str>,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            role: Role::Both,
            gpu: false,
            transfer: true,
            chunk_budget: None,
            environment: BTreeMap::new(),
            config: None,
            url: None,
        }
    }
}

impl Case {
    fn with_env(name: &str, value: &str) -> Self {
        Self { environment: BTreeMap::from([(name.to_owned(), value.to_owned())]), ..Self::default() }
    }

    fn prepare(&self, line: &str) -> Result<Prepared, CommandError> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let mut command = EngineCommand::read(&words)?;
        if let Some(yaml) = self.config {
            assert!(command.config_path().is_some());
            command.take_config(yaml);
        }
        let mut ports = Ports::new();
        let mut next = 20_000;
        for PortWish { purpose, count } in command.ports(self.role, &self.environment) {
            ports.insert(purpose, next);
            next += count;
        }
        command.prepare(&Setup {
            role: self.role,
            gpu: self.gpu,
            transfer: self.transfer,
            chunk_budget: self.chunk_budget,
            listen_host: "0.0.0.0",
            advertised_host: "host-a",
            key: &Secret::new("minted"),
            ports: &ports,
            environment: &self.environment,
            secret_file: "/state/engine.yaml",
            url: self.url,
        })
    }

    /// What was added, in one line.
    fn added(&self, line: &str) -> String {
        let prepared = self.prepare(line).expect("prepared");
        let given = line.split_whitespace().count();
        assert_eq!(prepared.words[..given].join(" "), line.split_whitespace().collect::<Vec<_>>().join(" "));
        prepared.words[given..].join(" ")
    }
}

const VLLM_EVENTS: &str = r#"--kv-events-config {"enable_kv_cache_events":true,"endpoint":"tcp://*:20001","publisher":"zmq","replay_endpoint":"tcp://*:20002","topic":"kv-events"}"#;

#[test]
fn vllm_gets_what_a_fleet_needs() {
    let nixl = |role: &str| {
        format!(
            r#"--kv-transfer-config {{"kv_connector":"NixlConnector","kv_load_failure_policy":"recompute","kv_role":"{role}"}}"#
        )
    };
    for (role, kv_role) in
        [(Role::Both, "kv_both"), (Role::Prefill, "kv_producer"), (Role::Decode, "kv_consumer")]
    {
        let case = Case { role, ..Case::default() };
        let expected = format!(
            "--host 0.0.0.0 --port 20000 {VLLM_EVENTS} {} --enable-prompt-tokens-details",
            nixl(kv_role)
        );
        assert_eq!(case.added("vllm serve org/model"), expected);
        assert_eq!(case.added("python3 -m vllm.entrypoints.openai.api_server --model org/model"), expected);
    }
    let prepared = Case::default().prepare("vllm serve org/model").expect("prepared");
    let variables: Vec<_> =
        prepared.variables.iter().map(|(name, value)| (name.as_str(), value.expose())).collect();
    assert_eq!(
        variables,
        [
            ("VLLM_API_KEY", "minted"),
            ("VLLM_NIXL_SIDE_CHANNEL_HOST", "host-a"),
            ("VLLM_NIXL_SIDE_CHANNEL_PORT", "20003")
        ]
    );
    assert_eq!(prepared.key, Some(Secret::new("minted")));
    assert!(prepared.key_fences);
    assert_eq!(prepared.model.as_deref(), Some("org/model"));
    assert_eq!(prepared.local_url, "http://127.0.0.1:20000");
    assert_eq!(prepared.advertised_url, "http://host-a:20000");
}

#[test]
fn a_gpu_gets_the_layout_that_moves_fast() {
    let added = Case { gpu: true, ..Case::default() }.added("vllm serve m");
    assert!(added.contains(r#""kv_connector_extra_config":{"enable_cross_layers_blocks":true}"#), "{added}");
    assert!(!Case::default().added("vllm serve m").contains("cross_layers"));
}

#[test]
fn what_the_user_set_is_not_added_in_whatever_form() {
    //    said by the user                                     must not be added
    let rows = [
        ("--port 9", "--port"),
        ("--port=9", "--port"),
        ("--host 10.0.0.1", "--host"),
        ("--kv_events_config={}", "--kv-events-config"),
        ("--kv-events-config.enable_kv_cache_events true", "--kv-events-config"),
        ("--kv-transfer-config {}", "--kv-transfer-config"),
        ("--kv_transfer_config.kv_role=kv_both", "--kv-transfer-config"),
        ("--enable_prompt_tokens_details", "--enable-prompt-tokens-details"),
        ("--no-enable-prompt-tokens-details", "--enable-prompt-tokens-details"),
        ("--max_num_batched_tokens=512", "--max-num-batched-tokens"),
    ];
    let case = Case { chunk_budget: Some(ChunkBudget::ByRole), ..Case::default() };
    let plain = case.added("vllm serve m");
    for (said, flag) in rows {
        let added = case.added(&format!("vllm serve m {said}"));
        assert!(plain.contains(flag), "{flag} is not added at all");
        assert!(!added.contains(flag), "{said}: {added}");
    }
}

#[test]
fn a_configuration_file_counts_as_said_by_the_user() {
    let case = Case { config: Some("port: 9001\nkv_events_config:\n  publisher: zmq\n"), ..Case::default() };
    let prepared = case.prepare("vllm serve m --config f.yaml").expect("prepared");
    let added = prepared.words.join(" ");
    assert!(!added.contains("--port") && !added.contains("--kv-events-config"), "{added}");
    assert_eq!(prepared.local_url, "http://127.0.0.1:9001");
}

#[test]
fn the_users_keys_stay_and_are_known() {
    //    line, variable                                             key, fences
    let rows = [
        ("vllm serve m --api-key mine", Case::default(), Some("mine")),
        ("vllm serve m", Case::with_env("VLLM_API_KEY", "mine"), Some("mine")),
        ("sglang serve --model-path m --api_key=mine", Case::default(), Some("mine")),
        ("forebay engine --dialect vllm", Case::with_env("FOREBAY_ENGINE_API_KEY", "mine"), Some("mine")),
        ("llama-server --port 8080 --api-key mine", Case::default(), Some("mine")),
        ("llama-server --port 8080", Case::default(), None),
    ];
    for (line, case, key) in rows {
        let prepared = case.prepare(line).expect("prepared");
        assert_eq!(prepared.key.as_ref().map(Secret::expose), key, "{line}");
        assert!(!prepared.key_fences, "{line}");
        assert!(prepared.variables.values().all(|value| value.expose() != "minted"), "{line}");
    }
}

#[test]
fn no_minted_key_is_among_the_words() {
    for line in ["vllm serve m", "sglang serve --model-path m", "forebay engine --dialect vllm"] {
        let prepared = Case::default().prepare(line).expect("prepared");
        assert!(prepared.key_fences && prepared.words.iter().all(|word| !word.contains("minted")), "{line}");
        assert!(!format!("{prepared:?}").contains("minted"), "{line}");
    }
}

#[test]
fn ranks_get_ports_in_a_row_and_side_channels_of_the_user_stay() {
    let wishes = |line: &str, environment: &BTreeMap<String, String>| {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let command = EngineCommand::read(&words).expect("a command");
        command
            .ports(Role::Prefill, environment)
            .iter()
            .map(|wish| (wish.purpose, wish.count))
            .collect::<Vec<_>>()
    };
    use Purpose::{Bootstrap, Events, Http, Replay, SideChannel};
    let none = BTreeMap::new();
    assert_eq!(
        wishes("vllm serve m --data_parallel_size 4", &none),
        [(Http, 1), (Events, 4), (Replay, 4), (SideChannel, 4)]
    );
    assert_eq!(
        wishes("vllm serve m -dp 2 --port 1 --kv-transfer-config {}", &none),
        [(Events, 2), (Replay, 2)]
    );
    let side = BTreeMap::from([("VLLM_NIXL_SIDE_CHANNEL_PORT".to_owned(), "5600".to_owned())]);
    assert_eq!(wishes("vllm serve m", &side), [(Http, 1), (Events, 1), (Replay, 1)]);
    assert_eq!(
        wishes("python -m sglang.launch_server --model-path m --dp-size 2", &none),
        [(Http, 1), (Events, 2), (Replay, 2), (Bootstrap, 1)]
    );
    assert_eq!(
        wishes(
            "sglang serve --model-path m --disaggregation-mode decode --port 1 --kv-events-config {}",
            &none
        ),
        []
    );
    assert_eq!(wishes("llama-server --port 8080", &none), []);
}

#[test]
fn sglang_gets_what_a_fleet_needs() {
    let events = r#"--kv-events-config {"bind":true,"endpoint":"tcp://127.0.0.1:20001","publisher":"zmq","replay_endpoint":"tcp://127.0.0.1:20002","topic":"kv-events"}"#;
    let common = format!("--host 0.0.0.0 --port 20000 --config /state/engine.yaml --enable-metrics {events}");
    let rows = [
        (Role::Both, common.clone()),
        (Role::Decode, format!("{common} --disaggregation-mode decode")),
        (
            Role::Prefill,
            format!("{common} --disaggregation-mode prefill --disaggregation-bootstrap-port 20003"),
        ),
    ];
    for (role, expected) in rows {
        let case = Case { role, ..Case::default() };
        assert_eq!(case.added("python3 -m sglang.launch_server --model-path m"), expected);
        assert_eq!(case.added("/opt/bin/sglang serve --model-path m"), expected);
    }
    let prepared = Case::default().prepare("sglang serve --model-path m").expect("prepared");
    assert_eq!(prepared.secret_file.as_ref().map(Secret::expose), Some("api-key: \"minted\"\n"));
    assert_eq!(prepared.model.as_deref(), Some("m"));
    let own = Case::default().prepare("sglang serve --model-path m --config mine.yaml").expect("prepared");
    assert!(
        own.words.ends_with(&["--enable-metrics".to_owned()]) || own.words.contains(&"--api-key".to_owned())
    );
    assert!(
        own.secret_file.is_none() && own.notes.iter().any(|note| note.contains("list of processes")),
        "{:?}",
        own.notes
    );
}

#[test]
fn the_chunk_budget_is_only_set_when_told() {
    let budget = |line: &str, role, chunk_budget| Case { role, chunk_budget, ..Case::default() }.added(line);
    assert!(!budget("vllm serve m", Role::Both, None).contains("batched"));
    //    role            budget                    tokens
    let rows = [
        (Role::Prefill, ChunkBudget::ByRole, "8192"),
        (Role::Decode, ChunkBudget::ByRole, "1024"),
        (Role::Both, ChunkBudget::ByRole, "1024"),
        (Role::Both, ChunkBudget::Tokens(512), "512"),
    ];
    for (role, chunk, tokens) in rows {
        let vllm = budget("vllm serve m", role, Some(chunk));
        assert!(vllm.ends_with(&format!("--max-num-batched-tokens {tokens}")), "{vllm}");
        let sglang = budget("sglang serve --model-path m", role, Some(chunk));
        assert!(sglang.ends_with(&format!("--chunked-prefill-size {tokens}")), "{sglang}");
    }
}

#[test]
fn our_own_engine_gets_ports_and_a_role() {
    let added = Case { role: Role::Decode, ..Case::default() }
        .added("/usr/bin/forebay engine --dialect vllm --port 7");
    assert_eq!(
        added,
        "--host 0.0.0.0 --kv-events-port 20000 --kv-replay-port 20001 --side-channel-port 20002 --role decode"
    );
}

#[test]
fn programs_are_found_behind_what_starts_them() {
    //    line                                                               program            its model
    let rows = [
        ("vllm serve m", Program::Vllm, Some("m")),
        ("/venv/bin/vllm serve m --port 1", Program::Vllm, Some("m")),
        ("uv run vllm serve m", Program::Vllm, Some("m")),
        ("env CUDA_VISIBLE_DEVICES=1 numactl -N 0 vllm serve --model m", Program::Vllm, Some("m")),
        ("python3.12 -m vllm.entrypoints.openai.api_server --model=m", Program::Vllm, Some("m")),
        ("python -m vllm.entrypoints.cli.main serve m", Program::Vllm, Some("m")),
        ("sglang serve m --port 1", Program::Sglang, Some("m")),
        ("python -m sglang.launch_server --model m", Program::Sglang, Some("m")),
        ("forebay engine --dialect vllm --model m --port 1", Program::Forebay, Some("m")),
        ("vllm bench --port 1", Program::Unknown, None),
        ("llama-server -m m.gguf --port 1", Program::Unknown, None),
    ];
    for (line, program, model) in rows {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let command = EngineCommand::read(&words).expect("a command");
        assert_eq!((command.program(), command.model().as_deref()), (program, model), "{line}");
    }
}

#[test]
fn addresses_are_told_apart_from_what_is_listened_on() {
    //    line                                                   local                        advertised
    let rows = [
        ("vllm serve m", "http://127.0.0.1:20000", "http://host-a:20000"),
        ("vllm serve m --host :: --port 1", "http://[::1]:1", "http://host-a:1"),
        ("vllm serve m --host 10.0.0.7 --port 1", "http://10.0.0.7:1", "http://host-a:1"),
        ("vllm serve m --ssl-certfile c --ssl-keyfile k --port 1", "https://127.0.0.1:1", "https://host-a:1"),
        ("llama-server --port 8080", "http://127.0.0.1:8080", "http://host-a:8080"),
    ];
    for (line, local, reached) in rows {
        let prepared = Case::default().prepare(line).expect("prepared");
        assert_eq!(
            (prepared.local_url.as_str(), prepared.advertised_url.as_str()),
            (local, reached),
            "{line}"
        );
    }
    //    --url of the agent                  advertised
    let rows = [
        ("http://127.0.0.1:5/", "http://host-a:5"),
        ("https://[::1]:5", "https://host-a:5"),
        ("http://10.1.1.1:5", "http://10.1.1.1:5"),
    ];
    for (url, reached) in rows {
        let prepared =
            Case { url: Some(url), ..Case::default() }.prepare("something else").expect("prepared");
        assert_eq!(
            (prepared.local_url.as_str(), prepared.advertised_url.as_str()),
            (url.trim_end_matches('/'), reached)
        );
    }
}

#[test]
fn commands_that_cannot_be_reached_are_refused_in_sentences() {
    let refused = |line: &str| Case::default().prepare(line).expect_err("refused").to_string();
    assert!(refused("").contains("write the engine's after `--`"));
    assert!(
        refused("trtllm-serve m").contains("`trtllm-serve` listens (it has no --port"),
        "{}",
        refused("trtllm-serve m")
    );
    assert!(refused("vllm serve m --uds /tmp/s").contains("Unix socket"));
    assert!(refused("vllm serve m --headless").contains("headless"));
}

#[test]
fn an_unknown_command_runs_as_it_is_with_a_note() {
    let prepared = Case::default().prepare("trtllm-serve m --port 8000").expect("prepared");
    assert_eq!(prepared.words.join(" "), "trtllm-serve m --port 8000");
    assert!(prepared.variables.is_empty() && prepared.key.is_none());
    assert!(
        prepared
            .notes
            .iter()
            .any(|note| note.contains("`trtllm-serve` is not a command that the agent knows"))
    );
}
