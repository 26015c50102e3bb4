//! The fields that both bodies share, declared once, and what their values may be.

use std::{collections::BTreeMap, ops::RangeInclusive};

use forebay_types::TokenId;
use serde::{Deserialize, de::IgnoredAny};

use super::{
    Delivery, Spec,
    fields::{OneOrMany, Seed},
};
use crate::http::{
    errors::{ApiError, abridged},
    limits::RequestLimits,
};

/// Below this a temperature would only overflow the softmax; it means "the most likely token" (as in vLLM).
const TEMPERATURE_MIN: f64 = 1e-5;

/// `stream_options`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: Option<bool>,
}

/// `response_format`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ResponseFormat {
    #[serde(rename = "type")]
    pub(crate) kind: String,
}

/// Hands the shared fields to `$declare`. (serde's `flatten` would buffer every value, and lose borrowing and the
/// paths of errors.)
macro_rules! with_shared_fields {
    ($declare:ident { $($own:tt)* }) => {
        $declare! {
            { $($own)* }
            {
                model: String,
                stream: bool,
                stream_options: $crate::http::request::common::StreamOptions,
                n: i64,
                max_tokens: i64,
                temperature: f64,
                top_p: f64,
                top_k: i64,
                seed: $crate::http::request::fields::Seed,
                stop: $crate::http::request::fields::OneOrMany,
                stop_token_ids: Vec<i64>,
                ignore_eos: bool,
                min_tokens: i64,
                min_p: f64,
                presence_penalty: f64,
                frequency_penalty: f64,
                repetition_penalty: f64,
                logit_bias: std::collections::BTreeMap<String, serde::de::IgnoredAny>,
                response_format: $crate::http::request::common::ResponseFormat,
            }
        }
    };
}

/// Declares a body: its own fields, then the shared ones.
macro_rules! declare_body {
    (
        { $(#[$doc:meta])* struct $name:ident { $($(#[$attribute:meta])* $own:ident: $own_type:ty,)* } }
        { $($field:ident: $type:ty,)* }
    ) => {
        $(#[$doc])*
        #[derive(Debug, serde::Deserialize)]
        pub(crate) struct $name<'a> {
            $($(#[$attribute])* pub(crate) $own: $own_type,)*
            $($field: Option<$type>,)*
        }

        impl $name<'_> {
            /// Splits the shared fields off.
            pub(crate) fn take_shared(&mut self) -> $crate::http::request::common::Shared {
                $crate::http::request::common::Shared { $($field: self.$field.take(),)* }
            }
        }
    };
}

macro_rules! declare_shared {
    ({} { $($field:ident: $type:ty,)* }) => {
        /// What both bodies have. All optional, and `null` means absent.
        #[derive(Debug, Default)]
        pub(crate) struct Shared {
            $(pub(crate) $field: Option<$type>,)*
        }
    };
}

with_shared_fields!(declare_shared {});
pub(crate) use {declare_body, with_shared_fields};

/// What the endpoints name differently.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Own {
    /// Alternatives for each token, with the name of the field that asks for them.
    pub(crate) logprobs: Option<(i64, &'static str)>,
    /// Chat's newer name of `max_tokens`, which wins.
    pub(crate) max_completion_tokens: Option<i64>,
}

/// Bounds and units are checked here; whether prompt and output fit the model is checked by [`Spec::sampling`].
///
/// # Errors
/// 400 naming the first field that is impossible or cannot be honoured.
pub(crate) fn check(shared: Shared, own: Own, limits: &RequestLimits) -> Result<Spec, ApiError> {
    refuse_unsupported(&shared)?;
    let delivery = delivery(shared.stream, shared.stream_options)?;
    let choices_max = i64::from(limits.choices_max);
    let choices = integer("n", shared.n, 1..=choices_max)?.unwrap_or(1);
    let wanted = match own.max_completion_tokens {
        Some(tokens) => (Some(tokens), "max_completion_tokens"),
        None => (shared.max_tokens, "max_tokens"),
    };
    let output_tokens_max =
        integer(wanted.1, wanted.0, 1..=i64::from(u32::MAX))?.map(|tokens| (tokens, wanted.1));
    let temperature = number("temperature", shared.temperature, 0.0..=2.0)?.unwrap_or(1.0);
    let top_p = number("top_p", shared.top_p, 0.0..=1.0)?.unwrap_or(1.0);
    if top_p <= 0.0 {
        return Err(ApiError::invalid_value("top_p", "top_p is 0; it must be above 0 and at most 1"));
    }
    // -1 is vLLM's other way to say "all".
    let top_k = integer("top_k", shared.top_k.map(|k| if k == -1 { 0 } else { k }), 0..=i64::from(u32::MAX))?;
    let logprobs = match own.logprobs {
        None => None,
        Some((count, field)) => integer(field, Some(count), 0..=i64::from(limits.top_logprobs_max))?,
    };
    let spec = Spec {
        delivery,
        choices,
        temperature: if temperature < TEMPERATURE_MIN { 0.0 } else { temperature as f32 },
        top_p: top_p as f32,
        top_k: top_k.unwrap_or(0),
        seed: shared.seed.map(|Seed(seed)| seed),
        output_tokens_max,
        stop: stop_strings(shared.stop.unwrap_or_default(), limits)?.into(),
        stop_token_ids: stop_token_ids(shared.stop_token_ids.unwrap_or_default(), limits)?,
        ignore_eos: shared.ignore_eos.unwrap_or(false),
        logprobs: logprobs.map(|count| u8::try_from(count).expect("bounded by top_logprobs_max")),
    };
    check_min_tokens(shared.min_tokens, &spec)?;
    Ok(spec)
}

fn delivery(stream: Option<bool>, options: Option<StreamOptions>) -> Result<Delivery, ApiError> {
    match (stream.unwrap_or(false), options) {
        (true, options) => {
            let include_usage = options.and_then(|options| options.include_usage).unwrap_or(false);
            Ok(Delivery::Stream { include_usage })
        }
        (false, None) => Ok(Delivery::Whole),
        (false, Some(_)) => Err(ApiError::invalid_value(
            "stream_options",
            "stream_options needs `stream: true`; leave it out",
        )),
    }
}

/// Fields that change the answer and that no engine here can honour yet, unless their value changes nothing.
fn refuse_unsupported(shared: &Shared) -> Result<(), ApiError> {
    let neutral = [
        ("presence_penalty", shared.presence_penalty, 0.0),
        ("frequency_penalty", shared.frequency_penalty, 0.0),
        ("repetition_penalty", shared.repetition_penalty, 1.0),
        ("min_p", shared.min_p, 0.0),
    ];
    for (field, value, neutral) in neutral {
        if let Some(value) = value.filter(|value| *value != neutral) {
            let message =
                format!("{field} is {value}, which is not supported; leave it out or send {neutral}");
            return Err(ApiError::unsupported(field, message));
        }
    }
    if shared.logit_bias.as_ref().is_some_and(|bias: &BTreeMap<String, IgnoredAny>| !bias.is_empty()) {
        return Err(ApiError::unsupported("logit_bias", "logit_bias is not supported; leave it out"));
    }
    match &shared.response_format {
        Some(format) if format.kind != "text" => {
            let message = format!(
                "response_format `{}` is not supported; leave it out or send `text`",
                abridged(&format.kind)
            );
            Err(ApiError::unsupported("response_format", message))
        }
        _ => Ok(()),
    }
}

/// `min_tokens` cannot be forced on an engine, but where nothing can end a choice early it holds by itself.
fn check_min_tokens(min_tokens: Option<i64>, spec: &Spec) -> Result<(), ApiError> {
    let Some(wanted) = integer("min_tokens", min_tokens, 0..=i64::from(u32::MAX))? else { return Ok(()) };
    if let Some((most, field)) = spec.output_tokens_max.filter(|(most, _)| *most < wanted) {
        let message = format!("min_tokens is {wanted}, more than {field}, which is {most}");
        return Err(ApiError::invalid_value("min_tokens", message));
    }
    let cannot_end_early = spec.ignore_eos && spec.stop.is_empty() && spec.stop_token_ids.is_empty();
    if wanted == 0 || cannot_end_early {
        return Ok(());
    }
    let message = "min_tokens is only supported with `ignore_eos: true` and without stop and stop_token_ids";
    Err(ApiError::unsupported("min_tokens", message))
}

fn stop_strings(OneOrMany(strings): OneOrMany, limits: &RequestLimits) -> Result<Vec<String>, ApiError> {
    if strings.len() > limits.stop_strings_max {
        let message =
            format!("stop has {} strings; at most {} are allowed", strings.len(), limits.stop_strings_max);
        return Err(ApiError::invalid_value("stop", message));
    }
    for (index, string) in strings.iter().enumerate() {
        let (length, longest) = (string.len(), limits.stop_string_bytes_max);
        if length == 0 || length > longest {
            let message = format!("stop[{index}] has {length} bytes; a stop string has 1 to {longest}");
            return Err(ApiError::invalid_value(format!("stop[{index}]"), message));
        }
    }
    Ok(strings)
}

fn stop_token_ids(ids: Vec<i64>, limits: &RequestLimits) -> Result<Vec<TokenId>, ApiError> {
    if ids.len() > limits.stop_token_ids_max {
        let message = format!("stop_token_ids has {} ids; at most {}", ids.len(), limits.stop_token_ids_max);
        return Err(ApiError::invalid_value("stop_token_ids", message));
    }
    let id = |(index, id): (usize, i64)| {
        TokenId::try_from(id).map_err(|_| {
            let message = format!("stop_token_ids[{index}] is {id}, which is no token id");
            ApiError::invalid_value(format!("stop_token_ids[{index}]"), message)
        })
    };
    ids.into_iter().enumerate().map(id).collect()
}

/// An integer within bounds that fit `u32`.
fn integer(
    field: &'static str,
    value: Option<i64>,
    bounds: RangeInclusive<i64>,
) -> Result<Option<u32>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    if bounds.contains(&value) {
        return Ok(Some(u32::try_from(value).expect("the bounds fit u32")));
    }
    let (low, high) = bounds.into_inner();
    let message = if high == i64::from(u32::MAX) {
        format!("{field} is {value}; it must be at least {low}")
    } else {
        format!("{field} is {value}; it must be between {low} and {high}")
    };
    Err(ApiError::invalid_value(field, message))
}

fn number(
    field: &'static str,
    value: Option<f64>,
    bounds: RangeInclusive<f64>,
) -> Result<Option<f64>, ApiError> {
    match value {
        Some(value) if !bounds.contains(&value) => {
            let (low, high) = bounds.into_inner();
            Err(ApiError::invalid_value(
                field,
                format!("{field} is {value}; it must be between {low} and {high}"),
            ))
        }
        value => Ok(value),
    }
}
