//! What `vllm serve` needs.
//!
//! Flag names and shapes are those of vLLM 0.25 to 0.32. `enable_cross_layers_blocks` is NIXL's switch for KV blocks that
//! are contiguous over the layers; from 0.29 on it is ignored, and a variable, not set here because it was never run on a
//! GPU, takes its place. Of the two keys of the API the variable is used, because everybody on the host can read a
//! process's words.

use std::collections::BTreeMap;

use forebay_types::Role;
use serde_json::{Map, Value, json};

use super::{Additions, EngineCommand, PortWish, Purpose, Setup};

/// What subscribers of KV events ask for.
pub(super) const TOPIC: &str = "kv-events";

pub(super) fn ports(command: &EngineCommand, environment: &BTreeMap<String, String>) -> Vec<PortWish> {
    let ranks = command.dp_ranks();
    let mut wishes = Vec::new();
    let mut wish = |purpose, count| wishes.push(PortWish { purpose, count });
    if !command.flags.is_set("port") {
        wish(Purpose::Http, 1);
    }
    if !command.flags.is_set("kv-events-config") {
        wish(Purpose::Events, ranks);
        wish(Purpose::Replay, ranks);
    }
    if !command.flags.is_set("kv-transfer-config") && !environment.contains_key("VLLM_NIXL_SIDE_CHANNEL_PORT")
    {
        wish(Purpose::SideChannel, ranks);
    }
    wishes
}

pub(super) fn add(command: &EngineCommand, setup: &Setup<'_>, additions: &mut Additions) {
    let flags = &command.flags;
    if !flags.is_set("host") {
        additions.flag("--host", setup.listen_host);
    }
    if let Some(port) = setup.ports.get(&Purpose::Http).filter(|_| !flags.is_set("port")) {
        additions.flag("--port", port.to_string());
    }
    key(command, setup, additions);
    events(command, setup, additions);
    transfer(command, setup, additions);
    if !flags.is_set("enable-prompt-tokens-details") {
        additions.switch("--enable-prompt-tokens-details");
    }
    if let Some(budget) = setup.chunk_budget.filter(|_| !flags.is_set("max-num-batched-tokens")) {
        additions.flag("--max-num-batched-tokens", budget.tokens(setup.role).to_string());
    }
}

fn key(command: &EngineCommand, setup: &Setup<'_>, additions: &mut Additions) {
    let given = setup.environment.get("VLLM_API_KEY").filter(|key| !key.is_empty());
    if command.flags.is_set("api-key") {
        additions.users_key(command.flags.value("api-key"));
    } else if let Some(given) = given {
        additions.users_key(Some(given));
    } else {
        additions.variable("VLLM_API_KEY", setup.key.expose());
        additions.key = Some(setup.key.clone());
        additions.key_fences = true;
    }
}

fn events(command: &EngineCommand, setup: &Setup<'_>, additions: &mut Additions) {
    let ports = (setup.ports.get(&Purpose::Events), setup.ports.get(&Purpose::Replay));
    let (false, (Some(events), Some(replay))) = (command.flags.is_set("kv-events-config"), ports) else {
        return;
    };
    // A wildcard is the only TCP address that vLLM's publisher binds; to any other it connects.
    let config = json!({
        "enable_kv_cache_events": true,
        "endpoint": format!("tcp://*:{events}"),
        "publisher": "zmq",
        "replay_endpoint": format!("tcp://*:{replay}"),
        "topic": TOPIC,
    });
    additions.flag("--kv-events-config", config.to_string());
    additions.note(format!(
        "vLLM publishes KV events, which hold token ids, on all addresses of this host, ports {events} and {replay}: keep \
         them closed to other hosts"
    ));
}

fn transfer(command: &EngineCommand, setup: &Setup<'_>, additions: &mut Additions) {
    if command.flags.is_set("kv-transfer-config") {
        return;
    }
    if !setup.transfer {
        additions.note("no KV transfer is configured: prompts computed here cannot be continued elsewhere, or the other way");
        return;
    }
    let mut config = Map::new();
    config.insert("kv_connector".to_owned(), json!("NixlConnector"));
    if setup.gpu {
        config.insert("kv_connector_extra_config".to_owned(), json!({ "enable_cross_layers_blocks": true }));
        if !setup.environment.contains_key("VLLM_KV_CACHE_LAYOUT") {
            additions.note(
                "up to vLLM 0.28 KV moves in large pieces by the flag that is added; from 0.29 on set \
                 VLLM_KV_CACHE_LAYOUT=BLHNC for that, the same for every engine of the fleet",
            );
        }
    }
    config.insert("kv_load_failure_policy".to_owned(), json!("recompute"));
    config.insert("kv_role".to_owned(), json!(kv_role(setup.role)));
    additions.flag("--kv-transfer-config", Value::Object(config).to_string());
    if !setup.environment.contains_key("VLLM_NIXL_SIDE_CHANNEL_HOST") {
        additions.variable("VLLM_NIXL_SIDE_CHANNEL_HOST", setup.advertised_host);
    }
    if let Some(port) = setup.ports.get(&Purpose::SideChannel) {
        additions.variable("VLLM_NIXL_SIDE_CHANNEL_PORT", &port.to_string());
    }
}

fn kv_role(role: Role) -> &'static str {
    match role {
        Role::Prefill => "kv_producer",
        Role::Decode => "kv_consumer",
        Role::Both => "kv_both",
    }
}
