//! Questions to a server, each within its bounds.

use std::time::Instant;

use bytes::Bytes;
use forebay_engine_wire::{
    discovery::{self, Clues, Server, error_message, identify, llama_cpp, sglang},
    metrics::Scrape,
};
use serde_json::Value;

use super::{AttachError, AttachSettings, First, dialect};
use crate::remote::{
    Dialect,
    client::{Endpoint, HttpError, Limits},
    findings::Findings,
};

/// One engine that is being asked.
pub(super) struct Probe<'a> {
    pub(super) endpoint: &'a Endpoint,
    settings: &'a AttachSettings,
}

impl<'a> Probe<'a> {
    pub(super) fn new(endpoint: &'a Endpoint, settings: &'a AttachSettings) -> Self {
        Self { endpoint, settings }
    }

    /// A document.
    pub(super) async fn document(&self, path: &str) -> Result<Bytes, HttpError> {
        let limits = Limits {
            body_bytes_max: self.settings.document_bytes_max,
            deadline: Instant::now() + self.settings.document_within,
        };
        self.endpoint.get(path, limits).await.map(|answer| answer.body)
    }

    /// A document that the server makes slowly: vLLM's `/server_info` looks through the whole installation first.
    pub(super) async fn slow_document(&self, path: &str) -> Result<Bytes, HttpError> {
        let limits = Limits {
            body_bytes_max: self.settings.document_bytes_max,
            deadline: Instant::now() + self.settings.generate_within,
        };
        self.endpoint.get(path, limits).await.map(|answer| answer.body)
    }

    /// Something that is computed. A body that is no JSON is as good as none.
    pub(super) async fn ask(&self, path: &str, question: &Value) -> Result<Value, HttpError> {
        let limits = Limits {
            body_bytes_max: self.settings.document_bytes_max,
            deadline: Instant::now() + self.settings.generate_within,
        };
        let question = serde_json::to_vec(question).expect("a JSON value can be written");
        let answer = self.endpoint.post_json(path, question.into(), limits).await?;
        Ok(serde_json::from_slice(&answer.body).unwrap_or(Value::Null))
    }

    /// What every server is asked first.
    pub(super) async fn first(&self) -> Result<First, AttachError> {
        let (models, metrics, version) =
            tokio::join!(self.document("/v1/models"), self.document("/metrics"), self.document("/version"));
        let metrics = metrics.ok().map(|body| Scrape::read(&body)).filter(|scrape| scrape.server().is_some());
        let version = version.ok().and_then(|body| discovery::version(&body).ok());
        let models = match models {
            Ok(body) => discovery::models(&body)
                .map(Some)
                .map_err(|error| AttachError::NoEngine(format!("/v1/models answers {error}").into()))?,
            Err(error) => match error {
                HttpError::Status { status: 401 | 403, .. } => return Err(AttachError::Key(error)),
                HttpError::Status { status: 502..=504, .. } => return Err(AttachError::NotReady(error)),
                HttpError::Status { .. } | HttpError::TooLarge { .. } => None,
                error => return Err(AttachError::Unreachable(error)),
            },
        };
        Ok(First { models, metrics, version })
    }

    /// Whose server it is: what the operator says, or what it shows.
    pub(super) async fn server(
        &self,
        first: &First,
        said: Option<Dialect>,
        findings: &mut Findings,
    ) -> Result<Server, AttachError> {
        let mut clues =
            Clues { models: first.models.as_ref(), metrics: first.metrics.as_ref(), ..Clues::default() };
        let mut shown = identify(&clues);
        let (sglang, llama_cpp);
        if matches!(shown, None | Some(Server::Other)) {
            let (server_info, props) = tokio::join!(self.document("/server_info"), self.document("/props"));
            sglang = server_info.ok().and_then(|body| sglang::server_info(&body).ok());
            llama_cpp = props.ok().and_then(|body| llama_cpp::props(&body).ok());
            clues.sglang = sglang.as_ref();
            clues.llama_cpp = llama_cpp.as_ref();
            shown = identify(&clues);
        }
        let Some(said) = said else {
            let nothing = "it answers none of the routes that engines have";
            return shown.ok_or_else(|| AttachError::NoEngine(nothing.into()));
        };
        let taken = match said {
            Dialect::Vllm => Server::Vllm,
            Dialect::Sglang => Server::Sglang,
            Dialect::Trtllm => Server::Trtllm,
            Dialect::Openai => shown.filter(|shown| *shown == Server::LlamaCpp).unwrap_or(Server::Other),
        };
        if let Some(shown) = shown
            && dialect(shown) != said
            && said != Dialect::Openai
        {
            let (said, shown) = (said.name(), dialect(shown).name());
            findings.warn(
                format!("it is taken for {said}, but it shows itself as {shown}"),
                "leave the kind out, so that it is found out",
            );
        }
        Ok(taken)
    }
}

/// The status of an answer that is not good; `None` if there was none.
pub(super) fn status(error: &HttpError) -> Option<u16> {
    match error {
        HttpError::Status { status, .. } => Some(*status),
        _ => None,
    }
}

/// Why a question was not answered, as the server says it.
pub(super) fn reason(error: &HttpError) -> String {
    match error {
        HttpError::Status { status, body, .. } => match error_message(body) {
            Some(message) => format!("status {status}, {message}"),
            None => format!("status {status}"),
        },
        error => error.to_string(),
    }
}
