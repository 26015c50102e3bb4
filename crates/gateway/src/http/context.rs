//! What surrounds every request: its id, its trace, its tenant.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue},
    middleware::Next,
    response::{IntoResponse, Response},
};
use forebay_types::{RequestId, TenantId};
use sha2::{Digest as _, Sha256};
use tracing::Instrument;

use super::{app::Gateway, errors::ApiError, keys::ApiKeys, live::LiveId};

static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Who asks, when there are no keys to tell by.
const ANONYMOUS: &str = "anonymous";

/// One request's surroundings, for handlers.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// Live until the last clone is gone: a streamed answer keeps one.
    live: Arc<LiveId>,
    pub(crate) tenant: TenantId,
    /// What separates the tenant's prompts from others' in caches. Engines are told it, so it does not tell who it is.
    pub(crate) salt: Arc<str>,
}

impl Context {
    pub(crate) fn id(&self) -> &RequestId {
        self.live.id()
    }
}

/// Middleware of the public address: also checks the key of everything under `/v1/`.
pub(crate) async fn public(State(gateway): State<Gateway>, request: Request, next: Next) -> Response {
    let keys = gateway.0.keys.as_ref().filter(|_| request.uri().path().starts_with("/v1/"));
    let tenant = match keys {
        None => Ok(TenantId::from(ANONYMOUS)),
        Some(keys) => tenant(keys, request.headers()),
    };
    surround(&gateway, tenant, request, next).await
}

/// Middleware of the admin address.
pub(crate) async fn admin(State(gateway): State<Gateway>, request: Request, next: Next) -> Response {
    surround(&gateway, Ok(TenantId::from(ANONYMOUS)), request, next).await
}

async fn surround(
    gateway: &Gateway,
    tenant: Result<TenantId, ApiError>,
    mut request: Request,
    next: Next,
) -> Response {
    let wish = request.headers().get(&REQUEST_ID).map(HeaderValue::as_bytes);
    let live = Arc::new(gateway.0.live.take(wish, || gateway.0.seeds.draw()));
    let traceparent =
        request.headers().get(&TRACEPARENT).filter(|value| is_traceparent(value.as_bytes())).cloned();
    let id = HeaderValue::from_str(live.id().as_str()).expect("ids are visible ASCII");
    let span = tracing::info_span!(
        "request",
        id = live.id().as_str(),
        traceparent = traceparent.as_ref().and_then(|value| value.to_str().ok())
    );
    let mut response = match tenant {
        Ok(tenant) => {
            let salt = salt(&tenant);
            request.extensions_mut().insert(Context { live, tenant, salt });
            next.run(request).instrument(span).await
        }
        Err(error) => error.into_response(),
    };
    response.headers_mut().insert(REQUEST_ID.clone(), id);
    if let Some(traceparent) = traceparent {
        response.headers_mut().insert(TRACEPARENT.clone(), traceparent);
    }
    response
}

/// The surroundings as a client's key gives them, for an operator who names one; without a key as they are.
pub(crate) fn acting_for(
    context: &Context,
    keys: Option<&ApiKeys>,
    headers: &HeaderMap,
) -> Result<Context, ApiError> {
    let named = headers.contains_key(axum::http::header::AUTHORIZATION);
    let Some(keys) = keys.filter(|_| named) else { return Ok(context.clone()) };
    let tenant = tenant(keys, headers)?;
    Ok(Context { salt: salt(&tenant), tenant, ..context.clone() })
}

/// Empty without keys: everybody is the same tenant then.
fn salt(tenant: &TenantId) -> Arc<str> {
    if tenant.as_str() == ANONYMOUS {
        return "".into();
    }
    let digest = Sha256::digest(format!("cache salt of {tenant}"));
    digest[..16].iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()
}

fn tenant(keys: &ApiKeys, headers: &HeaderMap) -> Result<TenantId, ApiError> {
    let header = headers.get(axum::http::header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key = header.and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    key.and_then(|key| keys.tenant(key)).cloned().ok_or_else(ApiError::unauthenticated)
}

/// W3C Trace Context, version 00: `00-<32 hex>-<16 hex>-<2 hex>` in lower case, neither id all zeros. Anything else is
/// not passed on, as the recommendation demands.
fn is_traceparent(value: &[u8]) -> bool {
    let hex = |part: &[u8]| part.iter().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte));
    let not_zero = |part: &[u8]| part.iter().any(|byte| *byte != b'0');
    let [b'0', b'0', b'-', rest @ ..] = value else { return false };
    if rest.len() != 52 || rest[32] != b'-' || rest[49] != b'-' {
        return false;
    }
    let (trace, parent, flags) = (&rest[..32], &rest[33..49], &rest[50..]);
    hex(trace) && hex(parent) && hex(flags) && not_zero(trace) && not_zero(parent)
}

#[cfg(test)]
mod tests {
    use super::is_traceparent;

    #[test]
    fn only_well_formed_traces_are_passed_on() {
        let check =
            |value: &str, expected: bool| assert_eq!(is_traceparent(value.as_bytes()), expected, "{value}");
        check("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", true);
        check("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1", false);
        check("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", false);
        check("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", false);
        check("00-00000000000000000000000000000000-b7ad6b7169203331-01", false);
        check("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", false);
        check("", false);
    }
}
