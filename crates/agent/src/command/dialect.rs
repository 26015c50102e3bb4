//! What `forebay engine` needs: ports and a role; its key comes in a variable.

use forebay_types::Role;

use super::{Additions, EngineCommand, PortWish, Purpose, Setup};

/// The variable in which `forebay engine` finds its API key.
pub(super) const API_KEY_VARIABLE: &str = "FOREBAY_ENGINE_API_KEY";

const PORTS: [(Purpose, &str); 4] = [
    (Purpose::Http, "port"),
    (Purpose::Events, "kv-events-port"),
    (Purpose::Replay, "kv-replay-port"),
    (Purpose::SideChannel, "side-channel-port"),
];

pub(super) fn ports(command: &EngineCommand) -> Vec<PortWish> {
    let unset = PORTS.iter().filter(|(_, flag)| !command.flags.is_set(flag));
    let count = |purpose| if purpose == Purpose::Http { 1 } else { command.dp_ranks() };
    unset.map(|&(purpose, _)| PortWish { purpose, count: count(purpose) }).collect()
}

pub(super) fn add(command: &EngineCommand, setup: &Setup<'_>, additions: &mut Additions) {
    let flags = &command.flags;
    if !flags.is_set("host") {
        additions.flag("--host", setup.listen_host);
    }
    for (purpose, flag) in PORTS {
        if let Some(port) = setup.ports.get(&purpose).filter(|_| !flags.is_set(flag)) {
            additions.flag(&format!("--{flag}"), port.to_string());
        }
    }
    if !flags.is_set("role") {
        let role = match setup.role {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::Both => "both",
        };
        additions.flag("--role", role);
    }
    let given = setup.environment.get(API_KEY_VARIABLE).filter(|key| !key.is_empty());
    if flags.is_set("api-key") {
        additions.users_key(flags.value("api-key"));
    } else if let Some(given) = given {
        additions.users_key(Some(given));
    } else {
        additions.variable(API_KEY_VARIABLE, setup.key.expose());
        additions.key = Some(setup.key.clone());
        additions.key_fences = true;
    }
}
