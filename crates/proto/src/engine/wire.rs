//! The forms of [`super`] from and into messages.

use std::collections::{BTreeMap, BTreeSet};

use forebay_perf_model::StepCoefficients;
use forebay_types::{Incarnation, Role};

use super::{Accepts, CacheSight, DataPlane, EngineFacts, EngineState, Hello, KvAbilities, Progress, Ready};
use crate::{
    error::WireError,
    limits::{
        ALIASES_MAX, API_KEY_BYTES_MAX, BLOCK_SIZE_TOKENS_MAX, DP_RANKS_MAX, LABEL_VALUE_BYTES_MAX,
        LABELS_MAX, NOTES_MAX, URL_BYTES_MAX,
    },
    secret::Secret,
    text::{name, optional_name, sentence},
    v1,
};

/// A required part of a message.
pub(crate) fn required<T>(
    part: Option<T>,
    message: &'static str,
    field: &'static str,
) -> Result<T, WireError> {
    part.ok_or(WireError::Missing { message, field })
}

/// A number that is at least 1.
fn positive(what: &'static str, got: u32) -> Result<u32, WireError> {
    if got == 0 {
        return Err(WireError::Range { what, got: "0".to_owned(), must: "at least 1" });
    }
    Ok(got)
}

impl TryFrom<v1::Hello> for Hello {
    type Error = WireError;

    fn try_from(message: v1::Hello) -> Result<Self, WireError> {
        let role = message.role();
        let v1::Hello {
            wire_version,
            agent_version,
            engine,
            kind,
            incarnation,
            role: role_number,
            progress,
            facts,
            data_plane,
            labels,
            cache_sight,
        } = message;
        if incarnation == 0 {
            return Err(WireError::Range {
                what: "the incarnation",
                got: "0".to_owned(),
                must: "drawn at random, and not 0",
            });
        }
        let progress: Progress = required(progress, "Hello", "progress")?.try_into()?;
        let facts = facts.map(EngineFacts::try_from).transpose()?;
        if progress.state == EngineState::Ready && facts.is_none() {
            return Err(WireError::Missing { message: "Hello of a ready engine", field: "facts" });
        }
        Ok(Self {
            wire_version,
            agent_version: optional_name("the agent's version", agent_version)?,
            engine: name("the engine's name", engine)?.into(),
            kind: name("the engine's kind", kind)?,
            incarnation: Incarnation(incarnation),
            role: role_from_wire(role, role_number)?,
            progress,
            facts,
            data_plane: required(data_plane, "Hello", "data_plane")?.try_into()?,
            labels: checked_labels(labels)?,
            cache_sight: required(cache_sight, "Hello", "cache_sight")?.try_into()?,
        })
    }
}

impl From<Hello> for v1::Hello {
    fn from(hello: Hello) -> Self {
        let Hello {
            wire_version,
            agent_version,
            engine,
            kind,
            incarnation,
            role,
            progress,
            facts,
            data_plane,
            labels,
            cache_sight,
        } = hello;
        Self {
            wire_version,
            agent_version,
            engine: engine.as_str().to_owned(),
            kind,
            incarnation: incarnation.0,
            role: v1::Role::from(role).into(),
            progress: Some(progress.into()),
            facts: facts.map(Into::into),
            data_plane: Some(data_plane.into()),
            labels,
            cache_sight: Some(cache_sight.into()),
        }
    }
}

fn checked_labels(labels: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, WireError> {
    WireError::at_most("the labels", "labels", labels.len(), LABELS_MAX)?;
    for (key, value) in &labels {
        name("a label's key", key.clone())?;
        WireError::at_most("a label's value", "bytes", value.len(), LABEL_VALUE_BYTES_MAX)?;
    }
    Ok(labels)
}

fn role_from_wire(role: v1::Role, number: i32) -> Result<Role, WireError> {
    match role {
        // What an unknown number decodes to as well.
        v1::Role::Unspecified => Err(WireError::Unknown { what: "the role", got: number.into() }),
        v1::Role::Prefill => Ok(Role::Prefill),
        v1::Role::Decode => Ok(Role::Decode),
        v1::Role::Both => Ok(Role::Both),
    }
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Prefill => Self::Prefill,
            Role::Decode => Self::Decode,
            Role::Both => Self::Both,
        }
    }
}

impl TryFrom<v1::Progress> for Progress {
    type Error = WireError;

    fn try_from(message: v1::Progress) -> Result<Self, WireError> {
        let state = match message.state() {
            v1::State::Unspecified => {
                return Err(WireError::Unknown { what: "the engine's state", got: message.state.into() });
            }
            v1::State::Loading => EngineState::Loading,
            v1::State::Compiling => EngineState::Compiling,
            v1::State::Warming => EngineState::Warming,
            v1::State::Ready => EngineState::Ready,
            v1::State::Draining => EngineState::Draining,
        };
        let v1::Progress { state: _, sentence: text } = message;
        Ok(Self { state, sentence: sentence(text) })
    }
}

impl From<Progress> for v1::Progress {
    fn from(progress: Progress) -> Self {
        let Progress { state, sentence: text } = progress;
        let state = match state {
            EngineState::Loading => v1::State::Loading,
            EngineState::Compiling => v1::State::Compiling,
            EngineState::Warming => v1::State::Warming,
            EngineState::Ready => v1::State::Ready,
            EngineState::Draining => v1::State::Draining,
        };
        Self { state: state.into(), sentence: sentence(text) }
    }
}

impl TryFrom<v1::Ready> for Ready {
    type Error = WireError;

    fn try_from(message: v1::Ready) -> Result<Self, WireError> {
        let v1::Ready { facts, cache_sight } = message;
        Ok(Self {
            facts: required(facts, "Ready", "facts")?.try_into()?,
            cache_sight: required(cache_sight, "Ready", "cache_sight")?.try_into()?,
        })
    }
}

impl From<Ready> for v1::Ready {
    fn from(ready: Ready) -> Self {
        let Ready { facts, cache_sight } = ready;
        Self { facts: Some(facts.into()), cache_sight: Some(cache_sight.into()) }
    }
}

impl TryFrom<v1::EngineFacts> for EngineFacts {
    type Error = WireError;

    fn try_from(message: v1::EngineFacts) -> Result<Self, WireError> {
        let v1::EngineFacts {
            model,
            served_aliases,
            dp_ranks,
            block_size_tokens,
            block_bytes,
            blocks_total,
            step_tokens_max,
            context_tokens_max,
            waiting_max,
            kv_layout,
            can_export,
            can_import,
            needs_warming,
            accepts_tokens,
            accepts_body,
            continues_sampling,
            dialect,
            step_prior,
            notes,
        } = message;
        WireError::at_most("the served aliases", "names", served_aliases.len(), ALIASES_MAX)?;
        WireError::at_most("the notes", "sentences", notes.len(), NOTES_MAX)?;
        let size = positive("the block size", block_size_tokens)?;
        WireError::at_most("the block size", "tokens", size as usize, BLOCK_SIZE_TOKENS_MAX as usize)?;
        let ranks = positive("the number of DP ranks", dp_ranks)?;
        let Some(dp_ranks) = u16::try_from(ranks).ok().filter(|&ranks| ranks <= DP_RANKS_MAX) else {
            let (got, max) = (ranks.into(), DP_RANKS_MAX.into());
            return Err(WireError::TooMuch { what: "the DP ranks", got, max, unit: "ranks" });
        };
        let served: BTreeSet<String> = served_aliases
            .into_iter()
            .map(|alias| name("a served alias", alias))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            model: name("the model's name", model)?,
            served_aliases: served.into_iter().collect(),
            dp_ranks,
            block_size_tokens,
            block_bytes,
            blocks_total,
            step_tokens_max: positive("the token budget of a step", step_tokens_max)?,
            context_tokens_max: positive("the context length", context_tokens_max)?,
            waiting_max,
            kv: KvAbilities { layout: kv_layout, can_export, can_import, needs_warming },
            accepts: Accepts { tokens: accepts_tokens, body: accepts_body },
            continues_sampling,
            dialect: required(dialect, "EngineFacts", "dialect")?.try_into()?,
            step_prior: coefficients(required(step_prior, "EngineFacts", "step_prior")?)?,
            notes: notes.into_iter().map(sentence).collect(),
        })
    }
}

impl From<EngineFacts> for v1::EngineFacts {
    fn from(facts: EngineFacts) -> Self {
        let EngineFacts {
            model,
            served_aliases,
            dp_ranks,
            block_size_tokens,
            block_bytes,
            blocks_total,
            step_tokens_max,
            context_tokens_max,
            waiting_max,
            kv: KvAbilities { layout: kv_layout, can_export, can_import, needs_warming },
            accepts: Accepts { tokens: accepts_tokens, body: accepts_body },
            continues_sampling,
            dialect,
            step_prior,
            notes,
        } = facts;
        Self {
            model,
            served_aliases,
            dp_ranks: dp_ranks.into(),
            block_size_tokens,
            block_bytes,
            blocks_total,
            step_tokens_max,
            context_tokens_max,
            waiting_max,
            kv_layout,
            can_export,
            can_import,
            needs_warming,
            accepts_tokens,
            accepts_body,
            continues_sampling,
            dialect: Some(dialect.into()),
            step_prior: Some(step_prior.into()),
            notes: notes.into_iter().take(NOTES_MAX).map(sentence).collect(),
        }
    }
}

fn coefficients(message: v1::StepCoefficients) -> Result<StepCoefficients, WireError> {
    let v1::StepCoefficients {
        base_seconds,
        per_prefill_token_seconds,
        per_attention_seconds,
        per_decode_seconds,
        per_context_token_seconds,
    } = message;
    let coefficients = StepCoefficients {
        base_seconds,
        per_prefill_token_seconds,
        per_attention_seconds,
        per_decode_seconds,
        per_context_token_seconds,
    };
    for rate in coefficients.to_array() {
        if !(rate.is_finite() && rate >= 0.0) {
            let (what, got) = ("a coefficient of the step's cost", rate.to_string());
            return Err(WireError::Range { what, got, must: "finite and at least 0" });
        }
    }
    Ok(coefficients)
}

impl From<StepCoefficients> for v1::StepCoefficients {
    fn from(coefficients: StepCoefficients) -> Self {
        let StepCoefficients {
            base_seconds,
            per_prefill_token_seconds,
            per_attention_seconds,
            per_decode_seconds,
            per_context_token_seconds,
        } = coefficients;
        Self {
            base_seconds,
            per_prefill_token_seconds,
            per_attention_seconds,
            per_decode_seconds,
            per_context_token_seconds,
        }
    }
}

impl TryFrom<v1::DataPlane> for DataPlane {
    type Error = WireError;

    fn try_from(message: v1::DataPlane) -> Result<Self, WireError> {
        let v1::DataPlane { url, api_key } = message;
        WireError::at_most("the data plane's URL", "bytes", url.len(), URL_BYTES_MAX)?;
        let dialable = url.parse::<http::Uri>().is_ok_and(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
                && uri.query().is_none()
        });
        if !dialable {
            let wrong = "is not of the form http://host:port or https://host:port";
            return Err(WireError::Text { what: "the data plane's URL", wrong });
        }
        WireError::at_most("the API key", "bytes", api_key.len(), API_KEY_BYTES_MAX)?;
        if !api_key.bytes().all(|byte| byte.is_ascii_graphic()) {
            let wrong = "has a byte in it that a header cannot carry";
            return Err(WireError::Text { what: "the API key", wrong });
        }
        Ok(Self { url, api_key: (!api_key.is_empty()).then(|| Secret::new(api_key)) })
    }
}

impl From<DataPlane> for v1::DataPlane {
    fn from(data_plane: DataPlane) -> Self {
        let DataPlane { url, api_key } = data_plane;
        Self { url, api_key: api_key.map(|key| key.expose().to_owned()).unwrap_or_default() }
    }
}

impl TryFrom<v1::CacheSight> for CacheSight {
    type Error = WireError;

    fn try_from(message: v1::CacheSight) -> Result<Self, WireError> {
        let v1::CacheSight { sight } = message;
        Ok(match required(sight, "CacheSight", "sight")? {
            v1::cache_sight::Sight::Events(v1::cache_sight::Events {}) => Self::Events,
            v1::cache_sight::Sight::Approximate(v1::cache_sight::Approximate { why }) => {
                Self::Approximate { why: sentence(why) }
            }
        })
    }
}

impl From<CacheSight> for v1::CacheSight {
    fn from(sight: CacheSight) -> Self {
        let sight = match sight {
            CacheSight::Events => v1::cache_sight::Sight::Events(v1::cache_sight::Events {}),
            CacheSight::Approximate { why } => {
                v1::cache_sight::Sight::Approximate(v1::cache_sight::Approximate { why: sentence(why) })
            }
        };
        Self { sight: Some(sight) }
    }
}
