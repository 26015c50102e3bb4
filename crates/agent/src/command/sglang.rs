//! What SGLang's server needs.
//!
//! Written from the sources of SGLang 0.5.23; never run against a real one. Its key has no variable; to keep it out of the
//! process's words it goes into a configuration file (`--config`), unless the user has one already.

use forebay_proto::Secret;
use forebay_types::Role;
use serde_json::json;

use super::{Additions, EngineCommand, PortWish, Purpose, Setup, vllm::TOPIC};

pub(super) fn ports(command: &EngineCommand, role: Role) -> Vec<PortWish> {
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
    let prefills = match command.flags.value("disaggregation-mode") {
        Some(mode) => mode == "prefill",
        None => role == Role::Prefill,
    };
    if prefills && !command.flags.is_set("disaggregation-bootstrap-port") {
        wish(Purpose::Bootstrap, 1);
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
    if !flags.is_set("enable-metrics") {
        additions.switch("--enable-metrics");
    }
    let ports = (setup.ports.get(&Purpose::Events), setup.ports.get(&Purpose::Replay));
    if let (false, (Some(events), Some(replay))) = (flags.is_set("kv-events-config"), ports) {
        // `bind` lets the publisher stay on the loopback, where only this agent listens.
        let config = json!({
            "bind": true,
            "endpoint": format!("tcp://127.0.0.1:{events}"),
            "publisher": "zmq",
            "replay_endpoint": format!("tcp://127.0.0.1:{replay}"),
            "topic": TOPIC,
        });
        additions.flag("--kv-events-config", config.to_string());
    }
    if setup.transfer && !flags.is_set("disaggregation-mode") {
        match setup.role {
            Role::Prefill => additions.flag("--disaggregation-mode", "prefill"),
            Role::Decode => additions.flag("--disaggregation-mode", "decode"),
            Role::Both => {}
        }
    }
    if let Some(port) = setup.ports.get(&Purpose::Bootstrap) {
        additions.flag("--disaggregation-bootstrap-port", port.to_string());
    }
    if let Some(budget) = setup.chunk_budget.filter(|_| !flags.is_set("chunked-prefill-size")) {
        additions.flag("--chunked-prefill-size", budget.tokens(setup.role).to_string());
    }
}

fn key(command: &EngineCommand, setup: &Setup<'_>, additions: &mut Additions) {
    if command.flags.is_set("api-key") {
        additions.users_key(command.flags.value("api-key"));
        return;
    }
    additions.key = Some(setup.key.clone());
    additions.key_fences = true;
    if command.flags.is_set("config") {
        additions.flag("--api-key", setup.key.expose());
        additions.note(
            "the engine's API key shows in this host's list of processes: SGLang takes it from a --config file or from \
             its words, and the command names a --config of its own",
        );
    } else {
        additions.flag("--config", setup.secret_file);
        additions.secret_file = Some(Secret::new(format!("api-key: \"{}\"\n", setup.key.expose())));
    }
}
