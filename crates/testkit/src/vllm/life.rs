//! One life of a vLLM double: ranks, event sockets, side channels. A restart makes a new one on the same ports.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::options::{LoadFailure, VllmOptions, VllmVersion};
use super::{Vllm, side_channel};
use crate::double::net::{Port, Server};
use crate::double::ports::{PortPlan, RankPorts};
use crate::double::{Life, uuid};
use crate::engine::nixl::Connector;
use crate::engine::pool::Style;
use crate::engine::rank::{EventFormat, Neighbours, Rank};
use crate::engine::{Core, Settings};
use crate::events::publisher::{Options as PublisherOptions, Publisher};
use crate::events::wire::{HashFormat, Shape};
use crate::kv::{Model, mix};

/// How long reads of other engines' KV may take beyond the handshake.
pub(super) const TRANSFER_TIMEOUT: Duration = Duration::from_secs(30);

/// The ports that a server with these options needs, besides HTTP's.
pub(super) fn port_plan(options: &VllmOptions) -> PortPlan {
    let events = options.kv_events.as_ref();
    PortPlan {
        ranks: options.dp,
        events: events.map(|events| events.port),
        replay: events.is_some_and(|events| events.replay),
        scattered: events.is_some_and(|events| events.os_ports),
        other: options.connector.as_ref().map(|connector| connector.side_channel_port),
    }
}

/// Starts an engine's ranks; `number` counts the lives of one double.
pub(super) async fn start(vllm: &Arc<Vllm>, number: u64) -> io::Result<Life> {
    let (options, body) = (&vllm.options, &vllm.body);
    let identity = mix(body.identity, number);
    let engine_ids: Vec<String> = (0..options.dp).map(|rank| uuid(mix(identity, rank as u64 + 1))).collect();
    let mut ranks = Vec::new();
    for (index, ports) in body.ports.iter().enumerate() {
        let settings = settings(options, ports, &engine_ids[index], mix(identity, 0x726f_6f74));
        ranks.push(Arc::new(Rank {
            index: index as u32,
            core: Mutex::new(Core::new(settings)),
            wake: tokio::sync::Notify::new(),
            pace: body.pace.clone(),
            lies: body.lies.clone(),
            publisher: publisher(options, ports).await?,
            load_publisher: None,
            last_load: Mutex::new(None),
            format: format(options),
            stepped: body.stepped.clone(),
        }));
    }
    let mut side_channels = Vec::new();
    for (rank, ports) in ranks.iter().zip(&body.ports) {
        let Some(port) = &ports.other else { continue };
        let router = side_channel::router(rank.clone(), vllm.compatibility());
        side_channels.push(Server::start(port.listen()?, router));
    }
    let mut tasks = JoinSet::new();
    let neighbours: Arc<dyn Neighbours> = Arc::new(side_channel::Wire::new(vllm));
    for rank in &ranks {
        tasks.spawn(rank.clone().run(neighbours.clone()));
        if let Some(connector) = &options.connector {
            tasks.spawn(side_channel::heartbeats(rank.clone(), connector.lease / 6));
        }
    }
    Ok(Life::new(ranks, engine_ids, tasks, side_channels))
}

/// `/kv_event_sources`: the publishers' resolved configuration by rank.
pub(super) fn event_sources(vllm: &Vllm) -> Value {
    let Some(config) = &vllm.options.kv_events else { return json!({}) };
    let endpoint = |port: &Option<Port>| {
        let host = if config.os_ports { "127.0.0.1" } else { "*" };
        port.as_ref().map(|port| format!("tcp://{host}:{}", port.number()))
    };
    let source = |ports: &RankPorts| {
        json!({
            "enable_kv_cache_events": true,
            "publisher": "zmq",
            "endpoint": endpoint(&ports.events),
            "replay_endpoint": endpoint(&ports.replay),
            "buffer_steps": config.buffer_steps,
            "hwm": 100_000,
            "max_queue_size": 100_000,
            "topic": config.topic,
        })
    };
    vllm.body.ports.iter().enumerate().map(|(rank, ports)| (rank.to_string(), source(ports))).collect()
}

fn settings(options: &VllmOptions, ports: &RankPorts, engine_id: &str, hash_root: u64) -> Settings {
    let connector = options.connector.as_ref().zip(ports.other.as_ref()).map(|(connector, port)| Connector {
        mode: connector.mode,
        engine_id: engine_id.to_owned(),
        host: "127.0.0.1".into(),
        port: port.number(),
        lease: connector.lease,
        recompute: connector.load_failure == LoadFailure::Recompute,
    });
    Settings {
        block_size: options.block_size,
        blocks: options.blocks,
        prefix_caching: options.prefix_caching,
        style: Style::Table,
        running_max: options.running_max,
        by_priority: options.priority_scheduling,
        model: Model::new(options.model_seed, options.eos_one_in),
        hash_root,
        connector,
    }
}

fn format(options: &VllmOptions) -> EventFormat {
    let shape = if options.version >= VllmVersion::V0_25 { Shape::Maps } else { Shape::Arrays };
    let hashes = options.kv_events.as_ref().map_or(HashFormat::Unsigned, |config| config.hashes);
    EventFormat { shape, hashes }
}

async fn publisher(options: &VllmOptions, ports: &RankPorts) -> io::Result<Option<Publisher>> {
    let Some((config, events)) = options.kv_events.as_ref().zip(ports.events.as_ref()) else {
        return Ok(None);
    };
    let replay = ports.replay.as_ref().map(Port::listen_std).transpose()?;
    let publisher = PublisherOptions {
        topic: config.topic.clone(),
        buffer_steps: config.buffer_steps,
        replay_topic: options.version >= VllmVersion::V0_26,
    };
    Publisher::start(events.listen_std()?, replay, publisher).await.map(Some)
}
