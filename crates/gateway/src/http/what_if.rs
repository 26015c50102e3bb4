//! `POST /fleet/v1/placements`: where a request would go, without running it.

use axum::{
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    app::{Gateway, Shared},
    body,
    context::{Context, acting_for},
    errors::ApiError,
    generate::would_submit,
    pages::json,
};
use crate::{metrics::Endpoint, orchestrator::api::WhatIf};

/// Which of the generating routes a body is for.
#[derive(Deserialize)]
struct Kind {
    messages: Option<IgnoredAny>,
}

/// Takes the body of a chat or a completion. Nothing is reserved, recorded or counted; a bearer key that clients have
/// asks in the name of its tenant, whose prompts share a cache.
pub(crate) async fn placements(State(gateway): State<Gateway>, request: Request) -> Response {
    match ask(&gateway.0, request).await {
        Ok(what_if) => json(&what_if),
        Err(error) => error.into_response(),
    }
}

async fn ask(app: &Shared, request: Request) -> Result<WhatIf, ApiError> {
    let (parts, body) = request.into_parts();
    let context = parts.extensions.get::<Context>().expect("the middleware put it there");
    let context = acting_for(context, app.keys.as_ref(), &parts.headers)?;
    let body = body::read(&parts.headers, body, &app.http_limits, &app.bodies).await?;
    // What is no object with `messages` is read as a completion, whose errors say what is missing.
    let endpoint = match serde_json::from_slice(&body) {
        Ok(Kind { messages: Some(IgnoredAny) }) => Endpoint::Chat,
        _ => Endpoint::Completions,
    };
    let request = would_submit(app, &context, endpoint, &body).await?;
    app.orchestrator.what_if(&request).map_err(|error| ApiError::from_route(&error, "prompt"))
}
