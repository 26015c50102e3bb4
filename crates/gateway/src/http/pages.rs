//! The routes that only show something: models, health, the fleet, metrics.

use std::{borrow::Cow, time::Duration};

use axum::{
    body::Body,
    extract::{
        Path, Query, Request, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

use super::{
    app::Gateway,
    body,
    errors::{ApiError, ErrorType, abridged},
    request,
};
use crate::{
    decisions::{DecisionOrder, DecisionQuery},
    metrics,
    orchestrator::api::{LogsAnswer, ServedModel},
};

/// The checked-in description of both addresses.
pub(crate) const OPENAPI: &str = include_str!("openapi.json");

/// Decisions shown when the request does not say how many.
const DECISIONS_DEFAULT: usize = 50;
/// Most decisions of one page.
const DECISIONS_MAX: usize = 1_000;

#[derive(Serialize)]
struct List<T> {
    object: &'static str,
    data: Vec<T>,
}

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    /// vLLM's name for the longest sequence, which clients already read.
    max_model_len: u32,
}

#[derive(Serialize)]
struct Health {
    status: &'static str,
}

/// `?limit=&order=&engine=`
#[derive(Debug, Deserialize)]
pub(crate) struct Page {
    limit: Option<usize>,
    order: Option<String>,
    engine: Option<String>,
}

fn model(served: &ServedModel) -> Model<'_> {
    let ServedModel { id, context_tokens_max, created, takes_tokens: _, takes_body: _ } = served;
    Model { id, object: "model", created: *created, owned_by: "forebay", max_model_len: *context_tokens_max }
}

pub(super) fn json(value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => typed("application/json", body),
        Err(error) => {
            tracing::error!(%error, "a page could not be rendered");
            ApiError {
                status: StatusCode::INTERNAL_SERVER_ERROR,
                kind: ErrorType::ServerError,
                ..ApiError::invalid("internal_error", "this page could not be rendered; see the server's log")
            }
            .into_response()
        }
    }
}

fn typed(content_type: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// An id that is no text once its percent signs are resolved.
fn unreadable_id() -> ApiError {
    ApiError::invalid_value("id", "the id in the path is no UTF-8 text; check its percent encoding")
}

fn not_found(message: String) -> ApiError {
    ApiError::invalid("not_found", message).with_status(StatusCode::NOT_FOUND)
}

/// `GET /v1/models`
pub(crate) async fn models(State(gateway): State<Gateway>) -> Response {
    let served = gateway.0.orchestrator.models();
    json(&List { object: "list", data: served.iter().map(model).collect() })
}

/// `GET /v1/models/{id}`; ids may hold slashes.
pub(crate) async fn model_by_id(
    State(gateway): State<Gateway>,
    id: Result<Path<String>, PathRejection>,
) -> Response {
    let Ok(Path(id)) = id else { return unreadable_id().into_response() };
    let served = gateway.0.orchestrator.models();
    match served.iter().find(|model| *model.id == *id) {
        Some(found) => json(&model(found)),
        None => ApiError::unknown_model(&id, served.iter().map(|model| &*model.id)).into_response(),
    }
}

/// `GET /health`: the process answers.
pub(crate) async fn health() -> Response {
    json(&Health { status: "ok" })
}

/// `GET /ready`: some model can be served.
pub(crate) async fn ready(State(gateway): State<Gateway>) -> Response {
    if gateway.0.orchestrator.is_ready() {
        return json(&Health { status: "ready" });
    }
    ApiError {
        status: StatusCode::SERVICE_UNAVAILABLE,
        kind: ErrorType::ServerError,
        retry_after_seconds: Some(1),
        ..ApiError::invalid(
            "not_ready",
            "no engine can serve yet; see /fleet/v1/engines on the admin address",
        )
    }
    .into_response()
}

/// `GET /openapi.json`
pub(crate) async fn openapi() -> Response {
    typed("application/json", OPENAPI)
}

/// `GET /metrics`
pub(crate) async fn metrics(State(gateway): State<Gateway>) -> Response {
    gateway.0.metrics.set_text_cache(&gateway.0.texts.stats());
    typed(metrics::CONTENT_TYPE, gateway.0.metrics.render(&gateway.0.orchestrator.engines()))
}

/// `GET /fleet/v1/engines`
pub(crate) async fn engines(State(gateway): State<Gateway>) -> Response {
    json(&List { object: "list", data: gateway.0.orchestrator.engines() })
}

/// `GET /fleet/v1/links`
pub(crate) async fn links(State(gateway): State<Gateway>) -> Response {
    json(&List { object: "list", data: gateway.0.orchestrator.links() })
}

/// `GET /fleet/v1/predictions`
pub(crate) async fn predictions(State(gateway): State<Gateway>) -> Response {
    json(&List { object: "list", data: gateway.0.orchestrator.accuracy() })
}

/// `?engine=&lines=`
#[derive(Debug, Deserialize)]
pub(crate) struct WhichEngine {
    engine: Option<String>,
    lines: Option<usize>,
}

/// Log lines shown when the request does not say how many.
const LOG_LINES_DEFAULT: usize = 100;
/// Most log lines of one answer.
const LOG_LINES_MAX: usize = 1_000;
/// Longest that an engine's agent may take to answer for its log.
const LOGS_WITHIN: Duration = Duration::from_secs(5);

fn which_engine(query: Result<Query<WhichEngine>, QueryRejection>) -> Result<(String, usize), ApiError> {
    let Ok(Query(WhichEngine { engine, lines })) = query else {
        return Err(ApiError::invalid_value("lines", "lines must be a whole number"));
    };
    let Some(engine) = engine else {
        return Err(ApiError::invalid("missing_required_parameter", "say which: ?engine=NAME").at("engine"));
    };
    let lines = lines.unwrap_or(LOG_LINES_DEFAULT);
    if !(1..=LOG_LINES_MAX).contains(&lines) {
        let message = format!("lines is {lines}; it must be between 1 and {LOG_LINES_MAX}");
        return Err(ApiError::invalid_value("lines", message));
    }
    Ok((engine, lines))
}

fn no_such_engine(name: &str) -> ApiError {
    let name = abridged(name);
    not_found(format!("there is no engine called `{name}`; `/fleet/v1/engines` lists them"))
}

/// `POST /fleet/v1/drain?engine=`: it finishes what runs and is given nothing new.
pub(crate) async fn drain(
    State(gateway): State<Gateway>,
    query: Result<Query<WhichEngine>, QueryRejection>,
) -> Response {
    match which_engine(query) {
        Ok((engine, _)) if gateway.0.orchestrator.drain(&engine) => json(&Health { status: "draining" }),
        Ok((engine, _)) => no_such_engine(&engine).into_response(),
        Err(error) => error.into_response(),
    }
}

/// `GET /fleet/v1/logs?engine=&lines=`: the engine's last words so far, oldest first.
pub(crate) async fn logs(
    State(gateway): State<Gateway>,
    query: Result<Query<WhichEngine>, QueryRejection>,
) -> Response {
    let (engine, lines) = match which_engine(query) {
        Ok(asked) => asked,
        Err(error) => return error.into_response(),
    };
    let asked = match gateway.0.orchestrator.logs(&engine, lines) {
        LogsAnswer::UnknownEngine => return no_such_engine(&engine).into_response(),
        LogsAnswer::NotKept => {
            let engine = abridged(&engine);
            let message =
                format!("nobody keeps the log of `{engine}`: it was not started by `forebay agent`");
            return not_found(message).into_response();
        }
        LogsAnswer::Asked(asked) => asked,
    };
    let answered = tokio::time::timeout(LOGS_WITHIN, asked).await;
    match answered.unwrap_or_else(|_| Err("its agent did not answer in time".to_owned())) {
        Ok(lines) => json(&List { object: "list", data: lines }),
        Err(why) => ApiError {
            kind: ErrorType::ServerError,
            retry_after_seconds: Some(1),
            ..ApiError::invalid("agent_unavailable", why).with_status(StatusCode::SERVICE_UNAVAILABLE)
        }
        .into_response(),
    }
}

/// `GET /fleet/v1/decisions?limit=&order=&engine=`
pub(crate) async fn decisions(
    State(gateway): State<Gateway>,
    page: Result<Query<Page>, QueryRejection>,
) -> Response {
    let (limit, order, engine) = match page {
        Ok(Query(Page { limit, order, engine })) => (limit.unwrap_or(DECISIONS_DEFAULT), order, engine),
        Err(rejection) => {
            let message = format!("limit must be a whole number: {}", abridged(&rejection.body_text()));
            return ApiError::invalid_value("limit", message).into_response();
        }
    };
    if !(1..=DECISIONS_MAX).contains(&limit) {
        let message = format!("limit is {limit}; it must be between 1 and {DECISIONS_MAX}");
        return ApiError::invalid_value("limit", message).into_response();
    }
    let order = match order.as_deref() {
        None | Some("newest") => DecisionOrder::Newest,
        Some("worst-error") => DecisionOrder::WorstError,
        Some("slowest") => DecisionOrder::Slowest,
        Some(other) => {
            let message = format!("order is `{}`; give newest, worst-error or slowest", abridged(other));
            return ApiError::invalid_value("order", message).into_response();
        }
    };
    let query = DecisionQuery { order, engine, limit };
    json(&List { object: "list", data: gateway.0.orchestrator.decisions(&query) })
}

/// `GET /fleet/v1/decisions/{id}`
pub(crate) async fn decision(
    State(gateway): State<Gateway>,
    id: Result<Path<String>, PathRejection>,
) -> Response {
    let Ok(Path(id)) = id else { return unreadable_id().into_response() };
    match gateway.0.orchestrator.decision(&id.as_str().into()) {
        Some(record) => json(&*record),
        None => {
            let message =
                format!("no decision is kept for request `{}`; only the newest ones are", abridged(&id));
            not_found(message).into_response()
        }
    }
}

/// The placement policy, as it is shown and set.
#[derive(Debug, Serialize, Deserialize)]
struct PolicyName<'a> {
    #[serde(borrow)]
    policy: Cow<'a, str>,
}

/// `GET /fleet/v1/policy`
pub(crate) async fn policy(State(gateway): State<Gateway>) -> Response {
    json(&PolicyName { policy: gateway.0.orchestrator.policy().into() })
}

/// `PUT /fleet/v1/policy`: from the next placement on.
pub(crate) async fn set_policy(State(gateway): State<Gateway>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let set = async {
        let body = body::read(&parts.headers, body, &gateway.0.http_limits, &gateway.0.bodies).await?;
        let PolicyName { policy: name } = request::parse(&body)?;
        let before = gateway.0.orchestrator.policy();
        gateway
            .0
            .orchestrator
            .set_policy(&name)
            .map_err(|sentence| ApiError::invalid_value("policy", sentence))?;
        tracing::info!(from = before, to = %name, "placement policy set");
        Ok::<(), ApiError>(())
    };
    match set.await {
        Ok(()) => policy(State(gateway.clone())).await,
        Err(error) => error.into_response(),
    }
}

/// Everything that no route takes.
pub(crate) async fn no_such_path(uri: axum::http::Uri) -> Response {
    not_found(format!("there is nothing at `{}`; see /openapi.json", abridged(uri.path()))).into_response()
}

/// A route that exists, asked in another way.
pub(crate) async fn wrong_method(method: axum::http::Method, uri: axum::http::Uri) -> Response {
    let message =
        format!("`{}` does not take {}; see /openapi.json", abridged(uri.path()), abridged(method.as_str()));
    ApiError::invalid("method_not_allowed", message)
        .with_status(StatusCode::METHOD_NOT_ALLOWED)
        .into_response()
}
