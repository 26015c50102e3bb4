//! Which path leads where: one table for each address.

use axum::{
    Router, middleware,
    routing::{MethodRouter, get, post},
};

use super::{app::Gateway, context, generate, pages, what_if};

/// One route: methods, path, handler. A `*` in the path means that the rest may hold slashes.
type Route = (&'static [&'static str], &'static str, MethodRouter<Gateway>);

/// What clients may ask.
pub(crate) fn public() -> Vec<Route> {
    vec![
        (&["post"], "/v1/chat/completions", post(generate::chat)),
        (&["post"], "/v1/completions", post(generate::completions)),
        (&["get"], "/v1/models", get(pages::models)),
        (&["get"], "/v1/models/{*id}", get(pages::model_by_id)),
        (&["get"], "/health", get(pages::health)),
        (&["get"], "/ready", get(pages::ready)),
        (&["get"], "/openapi.json", get(pages::openapi)),
    ]
}

/// What operators may ask.
pub(crate) fn admin() -> Vec<Route> {
    vec![
        (&["get"], "/metrics", get(pages::metrics)),
        (&["get"], "/fleet/v1/engines", get(pages::engines)),
        (&["get"], "/fleet/v1/links", get(pages::links)),
        (&["get"], "/fleet/v1/predictions", get(pages::predictions)),
        (&["post"], "/fleet/v1/drain", post(pages::drain)),
        (&["get"], "/fleet/v1/logs", get(pages::logs)),
        (&["get"], "/fleet/v1/decisions", get(pages::decisions)),
        (&["get"], "/fleet/v1/decisions/{*id}", get(pages::decision)),
        (&["post"], "/fleet/v1/placements", post(what_if::placements)),
        (&["get", "put"], "/fleet/v1/policy", get(pages::policy).put(pages::set_policy)),
        (&["get"], "/health", get(pages::health)),
        (&["get"], "/ready", get(pages::ready)),
        (&["get"], "/openapi.json", get(pages::openapi)),
    ]
}

fn router(routes: Vec<Route>) -> Router<Gateway> {
    routes
        .into_iter()
        .fold(Router::new(), |router, (_, path, handler)| router.route(path, handler))
        .fallback(pages::no_such_path)
        .method_not_allowed_fallback(pages::wrong_method)
}

impl Gateway {
    /// The public address as a service, for tests and for embedding; [`super::serve_public`] serves it on a socket.
    pub fn public_router(&self) -> Router {
        let surround = middleware::from_fn_with_state(self.clone(), context::public);
        router(public()).layer(surround).with_state(self.clone())
    }

    /// The admin address as a service.
    pub fn admin_router(&self) -> Router {
        let surround = middleware::from_fn_with_state(self.clone(), context::admin);
        router(admin()).layer(surround).with_state(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn openapi_describes_every_route_and_nothing_else() {
        let document: serde_json::Value = serde_json::from_str(pages::OPENAPI).unwrap();
        let paths = document["paths"].as_object().unwrap();
        let described: BTreeSet<(String, String)> = paths
            .iter()
            .flat_map(|(path, item)| {
                item.as_object().unwrap().keys().map(|method| (method.clone(), path.clone()))
            })
            .collect();
        let served: BTreeSet<(String, String)> = public()
            .into_iter()
            .chain(admin())
            .flat_map(|(methods, path, _)| {
                methods.iter().map(move |method| ((*method).to_owned(), path.replace('*', "")))
            })
            .collect();
        assert_eq!(described, served);
    }

    #[test]
    fn the_tables_methods_are_those_that_the_handlers_take() {
        for (methods, path, handler) in public().into_iter().chain(admin()) {
            let shown = format!("{handler:?}");
            for method in ["get", "post", "put", "patch", "delete"] {
                let taken = shown.contains(&format!(" {method}: BoxedHandler"));
                assert_eq!(taken, methods.contains(&method), "{method} {path}: {shown}");
            }
        }
    }

    #[test]
    fn openapi_references_resolve() {
        fn references<'a>(value: &'a serde_json::Value, found: &mut Vec<&'a str>) {
            match value {
                serde_json::Value::Object(members) => {
                    found.extend(members.get("$ref").and_then(|target| target.as_str()));
                    members.values().for_each(|member| references(member, found));
                }
                serde_json::Value::Array(items) => items.iter().for_each(|item| references(item, found)),
                _ => {}
            }
        }
        let document: serde_json::Value = serde_json::from_str(pages::OPENAPI).unwrap();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(found.len() > 10);
        for target in found {
            assert!(document.pointer(target.strip_prefix('#').unwrap()).is_some(), "{target}");
        }
    }
}
