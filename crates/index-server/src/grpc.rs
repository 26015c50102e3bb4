//! The gRPC side: `forebay.index.v1.Index`. The same calls as over HTTP; what differs is how they are written.

use std::{pin::Pin, time::Instant};

use axum::Router;
use forebay_kv_index::IndexStats;
use forebay_proto::index_v1::{
    self as v1,
    index_server::{Index, IndexServer as Door},
};
use forebay_types::{BlockHash, Tier};
use futures::{Stream, StreamExt as _};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Response, Status, Streaming,
    metadata::{MetadataMap, MetadataValue},
    service::Routes,
};

use crate::{
    listen::Limits,
    metrics::Door as Side,
    server::{DumpItem, IndexServer},
    service::{
        EngineSpec, EngineStatus, FedBatch, FedEvent, FedLayers, FedStored, Kind, Overlap, Prefix, Published,
        RankStatus, Recipient, Refused, State,
    },
};

pub(crate) fn router(server: IndexServer, limits: &Limits) -> Router {
    let door = Door::new(Calls(server))
        .max_decoding_message_size(limits.body_bytes_max)
        .max_encoding_message_size(limits.body_bytes_max);
    Routes::new(door).prepare().into_axum_router()
}

struct Calls(IndexServer);

/// The table.
fn code(kind: Kind) -> Code {
    match kind {
        Kind::Invalid => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::Exists => Code::AlreadyExists,
        Kind::Conflict => Code::FailedPrecondition,
        Kind::Gap => Code::OutOfRange,
        Kind::Full | Kind::TooLarge => Code::ResourceExhausted,
        Kind::TooSlow => Code::DeadlineExceeded,
        Kind::NoPath | Kind::WrongMethod => Code::Unimplemented,
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let Refused { kind, code: stable, message, param: _ } = refused;
        let mut metadata = MetadataMap::new();
        metadata.insert("forebay-code", MetadataValue::from_static(stable));
        Status::with_metadata(code(kind), message, metadata)
    }
}

impl Calls {
    fn answer<T>(&self, call: &'static str, answer: Result<T, Refused>) -> Result<Response<T>, Status> {
        let outcome = answer.as_ref().map_or_else(|refused| refused.code, |_| "ok");
        self.0.metrics().called(Side::Grpc, call, outcome);
        answer.map(Response::new).map_err(Into::into)
    }

    fn query_now(&self, request: v1::QueryRequest) -> Result<v1::QueryResponse, Refused> {
        let v1::QueryRequest { model, tokens, hashes, salt, lora, ranks_max, with_hashes } = request;
        let prefix = match (tokens.is_empty(), hashes.is_empty()) {
            (false, false) => return Err(Refused::value("tokens", "give either `tokens` or `hashes`")),
            (true, false) if !salt.is_empty() || !lora.is_empty() => {
                let message = "`salt` and `lora` go with `tokens`: hashes have them in them already";
                return Err(Refused::value("hashes", message));
            }
            (true, false) => {
                Prefix::Hashes { model: some(model), hashes: hashes.into_iter().map(BlockHash).collect() }
            }
            // An empty prompt of a model has no blocks.
            (_, true) => Prefix::Tokens { model, tokens, salt, lora: some(lora) },
        };
        let ranks_max = if ranks_max == 0 { usize::MAX } else { ranks_max as usize };
        let began = Instant::now();
        let service = self.0.service();
        let found = service.query(prefix, ranks_max)?;
        self.0.metrics().queried(began.elapsed());
        let block_size_tokens = service.settings().block_size_tokens;
        let overlap = |Overlap { engine, dp_rank, tiers }: Overlap| v1::Overlap {
            engine: engine.as_str().to_owned(),
            dp_rank: dp_rank.into(),
            blocks: tiers.device,
            tokens: u64::from(tiers.device) * u64::from(block_size_tokens),
            blocks_host: tiers.host,
            blocks_disk: tiers.disk,
            blocks_remote: tiers.remote,
        };
        Ok(v1::QueryResponse {
            ranks: found.ranks.into_iter().map(overlap).collect(),
            blocks: u32::try_from(found.chain.len()).unwrap_or(u32::MAX),
            block_size_tokens,
            hashes: if with_hashes { numbers(found.chain) } else { Vec::new() },
        })
    }

    fn take(&self, message: v1::PublishRequest) -> Result<Published, Refused> {
        let v1::PublishRequest { engine, life, dp_rank, body } = message;
        let to = Recipient { engine: &engine, life: &life, dp_rank };
        let service = self.0.service();
        match body {
            Some(v1::publish_request::Body::Batch(v1::Batch { sequence, events })) => {
                let events = events.into_iter().enumerate().map(|(index, event)| fed_event(index, event));
                let batch = FedBatch { sequence, events: events.collect::<Result<_, _>>()? };
                service.publish(to, batch, Instant::now())
            }
            Some(v1::publish_request::Body::Snapshot(v1::Snapshot { sequence_next, stored })) => {
                let stored = stored.into_iter().enumerate();
                let stored = stored.map(|(index, stored)| fed_stored("stored", index, stored));
                service.snapshot(to, sequence_next, stored.collect::<Result<_, _>>()?, Instant::now())
            }
            None => Err(Refused::value("body", "the message has neither `batch` nor `snapshot`")),
        }
    }
}

#[tonic::async_trait]
impl Index for Calls {
    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        let v1::RegisterRequest { name, model, events, replay, dp_ranks, block_size_tokens, topic } =
            request.into_inner();
        let block_size_tokens = Some(block_size_tokens).filter(|size| *size > 0);
        let spec = EngineSpec { name, model, events, replay, dp_ranks, block_size_tokens, topic };
        let created = self.0.register(spec);
        self.answer("register", created.map(|created| v1::RegisterResponse { created }))
    }

    async fn unregister(
        &self,
        request: Request<v1::UnregisterRequest>,
    ) -> Result<Response<v1::UnregisterResponse>, Status> {
        let gone = self.0.unregister(&request.into_inner().name);
        self.answer("unregister", gone.map(|()| v1::UnregisterResponse {}))
    }

    async fn engines(&self, _: Request<v1::EnginesRequest>) -> Result<Response<v1::EnginesResponse>, Status> {
        let engines = self.0.service().status(Instant::now()).into_iter().map(engine).collect();
        self.answer("engines", Ok(v1::EnginesResponse { engines }))
    }

    async fn query(&self, request: Request<v1::QueryRequest>) -> Result<Response<v1::QueryResponse>, Status> {
        let found = self.query_now(request.into_inner());
        self.answer("query", found)
    }

    type DumpStream = Pin<Box<dyn Stream<Item = Result<v1::DumpResponse, Status>> + Send>>;

    async fn dump(&self, request: Request<v1::DumpRequest>) -> Result<Response<Self::DumpStream>, Status> {
        let engine = some(request.into_inner().engine);
        let items = self.0.dump(engine.as_deref());
        let stream = items.map(|items| {
            let pieces = ReceiverStream::new(items).map(|item| Ok(dump_response(item)));
            Box::pin(pieces) as Self::DumpStream
        });
        self.answer("dump", stream)
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        let stats = self.0.service().stats();
        let IndexStats {
            blocks,
            entries,
            segments,
            bytes,
            ranks,
            ranks_stale,
            refused,
            evicted,
            removals_unknown,
            gaps,
            duplicates,
        } = stats.index;
        let answer = v1::StatsResponse {
            blocks,
            entries,
            segments,
            bytes,
            bytes_max: stats.bytes_max,
            ranks,
            ranks_stale,
            refused,
            evicted,
            removals_unknown,
            gaps,
            duplicates,
            block_size_tokens: stats.block_size_tokens,
            engines: stats.engines,
        };
        self.answer("stats", Ok(answer))
    }

    async fn publish(
        &self,
        request: Request<Streaming<v1::PublishRequest>>,
    ) -> Result<Response<v1::PublishResponse>, Status> {
        let mut messages = request.into_inner();
        let mut total = v1::PublishResponse::default();
        while let Some(message) = messages.message().await? {
            match self.take(message) {
                Ok(Published { applied, repeated, notes: _ }) => {
                    total.applied += applied;
                    total.repeated += repeated;
                }
                Err(refused) => return self.answer("publish", Err(refused)),
            }
            // Messages that are here already take no waiting, so nobody else would have a turn.
            tokio::task::yield_now().await;
        }
        self.answer("publish", Ok(total))
    }
}

/// What proto3 leaves out is empty.
fn some(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn numbers(hashes: Vec<BlockHash>) -> Vec<u64> {
    hashes.into_iter().map(|BlockHash(hash)| hash).collect()
}

fn fed_event(index: usize, event: v1::Event) -> Result<FedEvent, Refused> {
    match event.event {
        Some(v1::event::Event::Stored(stored)) => fed_stored("events", index, stored).map(FedEvent::Stored),
        Some(v1::event::Event::Removed(v1::Removed { hashes, tier, group })) => {
            Ok(FedEvent::Removed { hashes, tier: fed_tier("events", index, tier)?, group })
        }
        Some(v1::event::Event::Cleared(v1::Cleared {})) => Ok(FedEvent::Cleared),
        // To pass it over would make the index claim what the engine may not hold.
        None => Err(Refused::value(format!("events[{index}]"), "it is of no kind that this version knows")),
    }
}

fn fed_stored(list: &str, index: usize, stored: v1::Stored) -> Result<FedStored, Refused> {
    let v1::Stored {
        parent,
        hashes,
        tokens,
        block_size_tokens,
        salt,
        lora,
        tier,
        group,
        kind,
        window_tokens,
    } = stored;
    Ok(FedStored {
        parent,
        hashes,
        tokens,
        block_size_tokens,
        salt: some(salt),
        lora: some(lora),
        tier: fed_tier(list, index, tier)?,
        layers: FedLayers { group, kind: some(kind), window_tokens },
    })
}

fn fed_tier(list: &str, index: usize, number: i32) -> Result<Tier, Refused> {
    match v1::Tier::try_from(number) {
        Ok(v1::Tier::Unspecified | v1::Tier::Device) => Ok(Tier::Device),
        Ok(v1::Tier::Host) => Ok(Tier::Host),
        Ok(v1::Tier::Disk) => Ok(Tier::Disk),
        Ok(v1::Tier::Remote) => Ok(Tier::Remote),
        Err(_) => Err(Refused::value(format!("{list}[{index}]"), "its tier is none that this version knows")),
    }
}

fn state(state: State) -> i32 {
    v1::State::from(state).into()
}

impl From<State> for v1::State {
    fn from(state: State) -> Self {
        match state {
            State::Connecting => Self::Connecting,
            State::Following => Self::Following,
            State::Stale => Self::Stale,
            State::Unreachable => Self::Unreachable,
            State::Refused => Self::Refused,
        }
    }
}

fn engine(status: EngineStatus) -> v1::Engine {
    let EngineStatus { name, model, state: worst, detail, incarnation, restarts, ranks } = status;
    v1::Engine {
        name: name.as_str().to_owned(),
        model,
        state: state(worst),
        detail: detail.unwrap_or_default(),
        incarnation: incarnation.0,
        restarts,
        ranks: ranks.into_iter().map(rank).collect(),
    }
}

fn rank(status: RankStatus) -> v1::Rank {
    let RankStatus { dp_rank, state: heard, blocks, batches, batches_lost, last_event, detail } = status;
    v1::Rank {
        dp_rank: dp_rank.into(),
        state: state(heard),
        blocks,
        batches,
        batches_lost,
        last_event_seconds: last_event.map(|age| age.as_secs_f64()),
        detail: detail.unwrap_or_default(),
    }
}

fn dump_response(item: DumpItem) -> v1::DumpResponse {
    let body = match item {
        DumpItem::Piece { engine, rank, hashes, missing } => v1::dump_response::Body::Piece(v1::DumpPiece {
            engine: engine.as_str().to_owned(),
            dp_rank: rank.dp_rank.into(),
            incarnation: rank.incarnation.0,
            hashes: numbers(hashes),
            missing: missing.unwrap_or_default(),
        }),
        DumpItem::Done { ranks, blocks } => v1::dump_response::Body::Done(v1::DumpDone { ranks, blocks }),
    };
    v1::DumpResponse { body: Some(body) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_keep_their_code() {
        let status = Status::from(Refused::new(Kind::Gap, "sequence_gap", "missing"));
        assert_eq!((status.code(), status.message()), (Code::OutOfRange, "missing"));
        assert_eq!(status.metadata().get("forebay-code").unwrap(), "sequence_gap");
    }
}
