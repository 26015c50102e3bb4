//! `forebay engine`: one engine of this program as a server of its own, in the words of vLLM.
//!
//! In: flags. Out: a server, and its addresses as one line of JSON on standard output. Start at [`run`].

use std::collections::BTreeMap;

use anyhow::Context as _;
use forebay_dialect::{ApiKey, ConnectorOptions, Ended, EngineModel, EngineOptions, EventOptions, KvRole};
use forebay_engines::{EngineLimits, simulated::StepCoefficients};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

use crate::{
    cli::{EngineArgs, EngineKindArg, RoleArg},
    exit::{Exit, Failed},
    terminal::Terminal,
};

/// The variable that holds the key which clients must send.
const KEY_VARIABLE: &str = "FOREBAY_ENGINE_API_KEY";
/// Context of the model that a simulated engine stands for; its pool may hold less.
const SIMULATED_CONTEXT_TOKENS: u32 = 131_072;

/// Serves until a signal to stop, or until the engine dies.
///
/// # Errors
/// What kept it from starting, or its last words.
pub(crate) async fn run(
    args: &EngineArgs,
    environment: &BTreeMap<String, String>,
    terminal: Terminal,
) -> anyhow::Result<Exit> {
    let address = (args.host, args.port);
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot listen on {}:{}: choose another port, or end what uses this one",
            args.host, args.port
        )
    })?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let say = |addresses: &forebay_dialect::Addresses| {
        let line = serde_json::to_string(addresses).expect("addresses serialise");
        let _ = terminal.out(&format!("{line}\n")); // nobody may be reading
    };
    match forebay_dialect::run(options(args, environment), listener, say, stop).await? {
        Ended::EngineDied { reason } => {
            Err(Failed { exit: Exit::Failure, sentence: format!("the engine died: {reason}") }.into())
        }
        _ => Ok(Exit::Ok),
    }
}

fn options(args: &EngineArgs, environment: &BTreeMap<String, String>) -> EngineOptions {
    let model = match (args.kind, args.model.as_str()) {
        (EngineKindArg::Sim, _) => EngineModel::Simulated {
            speed: args.sim_speed,
            context_tokens_max: SIMULATED_CONTEXT_TOKENS,
            timing: StepCoefficients::H100_8B,
        },
        (EngineKindArg::Embedded, "random-tiny") => EngineModel::RandomTiny,
        (EngineKindArg::Embedded, path) => EngineModel::Gguf(path.into()),
    };
    let defaults = EngineLimits::default();
    let key = environment.get(KEY_VARIABLE).filter(|key| !key.is_empty());
    let role = match args.role {
        RoleArg::Prefill => KvRole::Producer,
        RoleArg::Decode => KvRole::Consumer,
        RoleArg::Both => KvRole::Both,
    };
    EngineOptions {
        served_model_name: args.served_model_name.clone(),
        tokenizer: args.tokenizer.clone(),
        limits: EngineLimits {
            blocks_total: args.blocks.get(),
            block_size_tokens: args.block_size.get(),
            step_tokens_max: match args.kind {
                EngineKindArg::Embedded => defaults.step_tokens_max,
                EngineKindArg::Sim => 8_192,
            },
            ..defaults
        },
        api_key: key.map(|key| ApiKey::new(key)),
        events: Some(EventOptions {
            bind: args.host,
            port: args.kv_events_port,
            replay_port: args.kv_replay_port,
            ..EventOptions::default()
        }),
        connector: Some(ConnectorOptions {
            bind: args.host,
            port: args.side_channel_port,
            ..ConnectorOptions::loopback(role)
        }),
        insecure: args.insecure,
        ..EngineOptions::new(model)
    }
}
