//! How a prefill and a decode server of SGLang meet: the bootstrap server, and the wait for each other.
//!
//! In: loads and offers of a rank ([`Partner`]). Out: KV, or the reason why none came. The prefill server runs an HTTP
//! server on its bootstrap port; `/route`, `/register_dp_rank`, `/query_dp_ranks` and `/health` are SGLang's own
//! (0.5.23's `disaggregation/common/conn.py`), `/double/join` is ours: the real KV goes by RDMA, which no orchestrator
//! sees.
//!
//! Always holds: a room is one request at one prefill rank. Both sides wait for each other no longer than
//! `bootstrap_timeout`; then each fails its own request with 500. A decode server whose page size differs dies
//! (`RuntimeError` in its scheduler).

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::FutureExt;
use futures::future::BoxFuture;
use http::Method;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Sglang;
use super::options::SglangMode;
use crate::client;
use crate::engine::nixl::Arrived;
use crate::engine::rank::Neighbours;
use crate::engine::request::Room;
use crate::engine::{Load, Offer};
use crate::tokenizer::Token;

/// `bootstrap_host` of requests that have no partner: warm-ups and health checks.
pub(crate) const FAKE_HOST: &str = "2.2.2.2";
/// Rooms that are remembered; the oldest are forgotten.
const ROOMS_MAX: usize = 4096;
/// How often a prefill server that does not answer is asked again.
const RETRY: Duration = Duration::from_millis(20);

/// What crosses from prefill to decode.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Handed {
    entries: Vec<u64>,
    first: Token,
}

/// A meeting place: (room, prefill rank).
type Place = (u64, u32);

#[derive(Debug, Default)]
struct Meeting {
    decode_is_here: bool,
    handed: Option<Handed>,
}

/// The rooms of a prefill server, and what is registered there.
#[derive(Debug)]
pub(super) struct Rooms {
    meetings: Mutex<BTreeMap<Place, Meeting>>,
    /// Ranks that were announced for rooms (`/register_dp_rank`).
    ranks: Mutex<BTreeMap<u64, u32>>,
    changed: watch::Sender<u64>,
}

impl Rooms {
    pub(super) fn new() -> Arc<Self> {
        let changed = watch::Sender::new(0);
        Arc::new(Self { meetings: Mutex::default(), ranks: Mutex::default(), changed })
    }

    fn change(&self, place: Place, change: impl FnOnce(&mut Meeting)) {
        let mut meetings = self.meetings.lock();
        if meetings.len() >= ROOMS_MAX {
            meetings.pop_first();
        }
        change(meetings.entry(place).or_default());
        drop(meetings);
        self.changed.send_modify(|version| *version += 1);
    }

    /// Waits until `look` finds something in the room.
    async fn wait<T>(&self, place: Place, mut look: impl FnMut(&mut Meeting) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(found) = self.meetings.lock().get_mut(&place).and_then(&mut look) {
                return found;
            }
            let _the_sender_is_ours = changed.changed().await;
        }
    }
}

/// The bootstrap server of a prefill server.
pub(super) fn router(sglang: &Arc<Sglang>, rooms: Arc<Rooms>) -> Router {
    Router::new()
        .route("/route", get(route).put(|| async { "OK" }))
        .route("/register_dp_rank", post(register))
        .route("/query_dp_ranks", post(query))
        .route("/health", get(|| async { "OK" }))
        .route("/double/join", post(join))
        .with_state((sglang.clone(), rooms))
}

type Server = State<(Arc<Sglang>, Arc<Rooms>)>;

#[derive(Deserialize)]
struct RouteQuery {
    prefill_dp_rank: Option<i64>,
    prefill_cp_rank: Option<i64>,
    target_tp_rank: Option<i64>,
    target_pp_rank: Option<i64>,
}

async fn route(State((sglang, _)): Server, Query(query): Query<RouteQuery>) -> Response {
    let ranks = [query.prefill_dp_rank, query.prefill_cp_rank, query.target_tp_rank, query.target_pp_rank];
    let options = &sglang.options;
    match ranks {
        [Some(-1), Some(-1), Some(-1), Some(-1)] => Json(json!({
            "attn_tp_size": 1, "attn_cp_size": 1, "dp_size": options.dp, "pp_size": 1,
            "page_size": options.page_size, "kv_cache_dtype": "auto", "follow_bootstrap_room": true,
            "enable_dsa_cache_layer_split": false, "enable_kv_cache_sharding": false,
            "prefill_http_port": sglang.body.port.number(), "decode_allocation_policy": "early",
        }))
        .into_response(),
        [Some(rank), Some(0), Some(0), Some(0)] if (0..options.dp as i64).contains(&rank) => {
            let port = sglang.body.port.number();
            Json(json!({"rank_ip": "127.0.0.1", "rank_port": port})).into_response()
        }
        [Some(rank), ..] => {
            (StatusCode::NOT_FOUND, format!("Bootstrap info not found for dp_rank={rank}")).into_response()
        }
        _ => (StatusCode::BAD_REQUEST, "Missing inputs for bootstrap server.").into_response(),
    }
}

#[derive(Deserialize)]
struct Register {
    bootstrap_room: u64,
    dp_rank: u32,
}

async fn register(State((_, rooms)): Server, Json(register): Json<Register>) -> &'static str {
    let mut ranks = rooms.ranks.lock();
    if ranks.len() >= ROOMS_MAX {
        ranks.pop_first();
    }
    ranks.insert(register.bootstrap_room, register.dp_rank);
    "OK"
}

#[derive(Deserialize)]
struct QueryRanks {
    bootstrap_rooms: Vec<u64>,
}

async fn query(State((_, rooms)): Server, Json(query): Json<QueryRanks>) -> Json<Value> {
    let ranks = rooms.ranks.lock();
    let known =
        query.bootstrap_rooms.iter().filter_map(|room| Some((room.to_string(), json!(ranks.get(room)?))));
    Json(Value::Object(known.collect()))
}

#[derive(Serialize, Deserialize)]
struct Join {
    room: u64,
    rank: u32,
}

/// A decode server is ready for this room; answered when the prompt is computed.
async fn join(State((_, rooms)): Server, Json(join): Json<Join>) -> Json<Handed> {
    let place = (join.room, join.rank);
    rooms.change(place, |meeting| meeting.decode_is_here = true);
    let handed = rooms.wait(place, |meeting| meeting.handed.take()).await;
    rooms.meetings.lock().remove(&place);
    Json(handed)
}

/// What reaches a rank's partners.
#[derive(Debug)]
pub(super) struct Partner {
    sglang: Weak<Sglang>,
    rooms: Option<Arc<Rooms>>,
    rank: u32,
}

impl Partner {
    pub(super) fn new(sglang: &Arc<Sglang>, rooms: Option<Arc<Rooms>>, rank: u32) -> Self {
        Self { sglang: Arc::downgrade(sglang), rooms, rank }
    }
}

impl Neighbours for Partner {
    fn fetch(&self, load: Load) -> BoxFuture<'static, Result<Arrived, String>> {
        let (Load::Room { request, room }, Some(sglang)) = (load, self.sglang.upgrade()) else {
            return futures::future::ready(Err("no such load".to_owned())).boxed();
        };
        let (rooms, rank) = (self.rooms.clone(), self.rank);
        async move {
            let until = Instant::now() + sglang.options.bootstrap_timeout;
            let (phase, result) = match rooms {
                _ if sglang.options.mode == SglangMode::Null => return Err("not disaggregated".to_owned()),
                Some(rooms) => {
                    let met = tokio::time::timeout_at(until, partner_came(&rooms, &room, rank)).await;
                    ("Prefill bootstrap", met.map_err(|_| "the decode server never came".to_owned()))
                }
                None => {
                    let met = tokio::time::timeout_at(until, handed_over(&sglang, &room)).await;
                    ("Decode transfer", met.map_err(|_| "the prefill server never came".to_owned()))
                }
            };
            result.map_err(|reason| {
                let room = room.room;
                format!(
                    "{phase} failed for request rank={rank} req.rid='{request}' req.bootstrap_room={room} with \
                     exception {reason}"
                )
            })
        }
        .boxed()
    }

    fn offer(&self, offer: Offer) {
        let Some(rooms) = &self.rooms else { return };
        if !offer.room.fake {
            let handed = Handed { entries: offer.entries, first: offer.first };
            rooms.change((offer.room.room, self.rank), |meeting| meeting.handed = Some(handed));
        }
    }

    fn died(&self) {
        if let Some(sglang) = self.sglang.upgrade() {
            sglang.died();
        }
    }
}

/// On a prefill server: the prompt is computed when a decode server has room for it.
async fn partner_came(rooms: &Rooms, room: &Room, rank: u32) -> Arrived {
    if !room.fake {
        rooms.wait((room.room, rank), |meeting| meeting.decode_is_here.then_some(())).await;
    }
    Arrived::Partner
}

/// On a decode server: asks the prefill server who it is, joins the room, and waits for the KV.
async fn handed_over(sglang: &Arc<Sglang>, room: &Room) -> Arrived {
    if room.fake {
        return Arrived::Prompt { entries: Vec::new(), first: Token::from(b'?') };
    }
    let base = format!("http://{}:{}", room.host, room.port);
    loop {
        if let Some(handed) = attempt(sglang, &base, room).await {
            return Arrived::Prompt { entries: handed.entries, first: handed.first };
        }
        tokio::time::sleep_until(Instant::now() + RETRY).await;
    }
}

async fn attempt(sglang: &Arc<Sglang>, base: &str, room: &Room) -> Option<Handed> {
    let timeout = sglang.options.bootstrap_timeout;
    let path = "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1";
    let info =
        client::send(Method::GET, &format!("{base}{path}"), &[], &Value::Null, timeout).await.ok()?.json();
    let page_size = info["page_size"].as_u64()?;
    if page_size != sglang.options.page_size as u64 {
        sglang.died();
        return std::future::pending().await;
    }
    let dp = u32::try_from(info["dp_size"].as_u64()?).ok()?;
    let rank = room.prefill_rank.unwrap_or((room.room % u64::from(dp.max(1))) as u32);
    let join = serde_json::to_value(Join { room: room.room, rank }).ok()?;
    let answer =
        client::send(Method::POST, &format!("{base}/double/join"), &[], &join, timeout).await.ok()?;
    serde_json::from_slice(&answer.body).ok()
}
