//! The HTTP side: paths, bodies and answers in JSON.
//!
//! Start at [`router`]; what bodies look like is in [`wire`], how refusals look in [`errors`].

mod body;
mod errors;
mod wire;

use std::time::Instant;

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{
        Path, Query, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{HeaderMap, StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{delete, get, post, put},
};
use futures::StreamExt as _;
use serde::Serialize;
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    listen::Limits,
    metrics::{CONTENT_TYPE, Door as Side},
    server::IndexServer,
    service::{Kind, Published, Recipient, Refused, clipped},
};

/// What handlers work with.
#[derive(Clone)]
struct Door {
    server: IndexServer,
    limits: Limits,
}

type Answer = Result<Response, Refused>;

pub(crate) fn router(server: IndexServer, limits: &Limits) -> Router {
    let door = Door { server, limits: limits.clone() };
    Router::new()
        .route("/v1/engines", get(engines).post(register))
        .route("/v1/engines/{name}", delete(unregister))
        .route("/v1/engines/{name}/ranks/{rank}/snapshot", put(snapshot))
        .route("/v1/query", post(query))
        .route("/v1/events", post(events))
        .route("/v1/dump", get(dump))
        .route("/v1/stats", get(stats))
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .with_state(door)
}

impl Door {
    /// Counts the call, and makes a response of a refusal.
    fn answer(&self, call: &'static str, answer: Answer) -> Response {
        let outcome = answer.as_ref().map_or_else(|refused| refused.code, |_| "ok");
        self.server.metrics().called(Side::Http, call, outcome);
        answer.unwrap_or_else(|refused| errors::response(&refused))
    }

    async fn body(&self, headers: &HeaderMap, body: Body) -> Result<Bytes, Refused> {
        body::read(headers, body, &self.limits).await
    }
}

fn json(status: StatusCode, value: &impl Serialize) -> Response {
    let body = serde_json::to_vec(value).expect("answers always serialise");
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

async fn register(State(door): State<Door>, headers: HeaderMap, body: Body) -> Response {
    let answer = async {
        let spec: wire::Register = wire::parse(&door.body(&headers, body).await?)?;
        let spec = spec.into_spec();
        let name = spec.name.clone();
        let created = door.server.register(spec)?;
        let status = if created { StatusCode::CREATED } else { StatusCode::OK };
        Ok(json(status, &serde_json::json!({ "name": name, "created": created })))
    };
    let answer = answer.await;
    door.answer("register", answer)
}

async fn unregister(State(door): State<Door>, path: Result<Path<String>, PathRejection>) -> Response {
    let name = path.map_err(|error| unreadable(&error));
    let answer = name.and_then(|Path(name)| door.server.unregister(&name));
    door.answer("unregister", answer.map(|()| StatusCode::NO_CONTENT.into_response()))
}

async fn engines(State(door): State<Door>) -> Response {
    let status = door.server.service().status(Instant::now());
    let engines: Vec<wire::Engine> = status.into_iter().map(Into::into).collect();
    door.answer("engines", Ok(json(StatusCode::OK, &wire::List { data: engines })))
}

async fn query(State(door): State<Door>, headers: HeaderMap, body: Body) -> Response {
    let answer = async {
        let query: wire::Query = wire::parse(&door.body(&headers, body).await?)?;
        let (prefix, ranks_max, with_hashes) = query.into_prefix()?;
        let began = Instant::now();
        let service = door.server.service();
        let found = service.query(prefix, ranks_max)?;
        door.server.metrics().queried(began.elapsed());
        let block_size_tokens = service.settings().block_size_tokens;
        Ok(json(StatusCode::OK, &wire::Found::new(found, block_size_tokens, with_hashes)))
    };
    let answer = answer.await;
    door.answer("query", answer)
}

async fn events(State(door): State<Door>, headers: HeaderMap, body: Body) -> Response {
    let answer = async {
        let published: wire::Publish = wire::parse(&door.body(&headers, body).await?)?;
        let wire::Publish { engine, life, dp_rank, batches } = published;
        if batches.len() > wire::BATCHES_MAX {
            return Err(Refused::too_many("batches", "batches", batches.len(), wire::BATCHES_MAX));
        }
        let to = Recipient { engine: &engine, life: &life, dp_rank };
        let mut total = Published::default();
        for (index, batch) in batches.into_iter().enumerate() {
            let published = door.server.service().publish(to, batch.into(), Instant::now());
            let Published { applied, repeated, notes } =
                published.map_err(|refused| in_batch(refused, index))?;
            total.applied += applied;
            total.repeated += repeated;
            total.notes.extend(notes.into_iter().take(wire::NOTES_MAX - total.notes.len()));
            // Many batches in one body, and others want their turns.
            tokio::task::yield_now().await;
        }
        Ok(json(StatusCode::OK, &wire::published(&total)))
    };
    let answer = answer.await;
    door.answer("publish", answer)
}

/// Says which batch was refused; those before it count.
fn in_batch(mut refused: Refused, index: usize) -> Refused {
    if let Some(param) = &refused.param
        && ["events", "sequence"].iter().any(|field| param.starts_with(field))
    {
        refused.param = Some(format!("batches[{index}].{param}").into());
    }
    if index > 0 {
        refused.message.push_str(&format!(" (batch {index} of this body, from 0; those before it count)"));
    }
    refused
}

async fn snapshot(
    State(door): State<Door>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let answer = async {
        let Path((name, rank)) = path.map_err(|error| unreadable(&error))?;
        let dp_rank = rank.parse().map_err(|_| {
            Refused::value("dp_rank", format!("`{}` in the path is no DP rank", clipped(&rank)))
        })?;
        let snapshot: wire::Snapshot = wire::parse(&door.body(&headers, body).await?)?;
        let wire::Snapshot { life, sequence_next, stored } = snapshot;
        let to = Recipient { engine: &name, life: &life, dp_rank };
        let stored = stored.into_iter().map(Into::into).collect();
        let published = door.server.service().snapshot(to, sequence_next, stored, Instant::now())?;
        Ok(json(StatusCode::OK, &wire::published(&published)))
    };
    let answer = answer.await;
    door.answer("snapshot", answer)
}

async fn dump(State(door): State<Door>, asked: Result<Query<wire::Dump>, QueryRejection>) -> Response {
    let asked = asked.map_err(|error| unreadable(&error));
    let items = asked.and_then(|Query(asked)| door.server.dump(asked.engine.as_deref()));
    let answer = items.map(|items| {
        let lines =
            ReceiverStream::new(items).map(|item| Ok::<_, std::convert::Infallible>(wire::dump_line(item)));
        ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
    });
    door.answer("dump", answer)
}

/// A path or a query that does not decode.
fn unreadable(error: &impl std::fmt::Display) -> Refused {
    Refused::new(Kind::Invalid, "invalid_value", error.to_string())
}

async fn stats(State(door): State<Door>) -> Response {
    let stats = wire::stats(&door.server.service().stats());
    door.answer("stats", Ok(json(StatusCode::OK, &stats)))
}

async fn metrics(State(door): State<Door>) -> Response {
    let service = door.server.service();
    let text = door.server.metrics().render(&service.stats(), &service.status(Instant::now()));
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response()
}

async fn health() -> Response {
    json(StatusCode::OK, &serde_json::json!({ "status": "ok" }))
}

/// Whether what every engine announced before is known or was asked for. One that cannot be reached was asked for: its
/// state says so.
async fn ready(State(door): State<Door>) -> Response {
    let unasked = door.server.service().unasked();
    let (status, text) = match unasked {
        0 => (StatusCode::OK, "ready"),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "connecting"),
    };
    json(status, &serde_json::json!({ "status": text, "engines_connecting": unasked }))
}

async fn no_such_path(uri: Uri) -> Response {
    let message =
        format!("there is nothing at {}; docs/index-server.md lists the paths", clipped(uri.path()));
    errors::response(&Refused::new(Kind::NoPath, "not_found", message))
}

async fn wrong_method(uri: Uri) -> Response {
    let message =
        format!("{} does not take this method; the header `allow` says which it takes", clipped(uri.path()));
    errors::response(&Refused::new(Kind::WrongMethod, "method_not_allowed", message))
}
