//! How to speak to an engine, from and into messages.

use forebay_engines::remote::{Abort, Dialect as Kind, HandOver, RankPin, Speech, TokenRoute};

use super::{Dialect, wire::required};
use crate::{
    error::WireError,
    text::{name, optional_name},
    v1,
};

impl TryFrom<v1::Dialect> for Dialect {
    type Error = WireError;

    fn try_from(message: v1::Dialect) -> Result<Self, WireError> {
        let (tokens, ranks, abort) = (message.token_route(), message.rank_pin(), message.abort());
        let v1::Dialect {
            name: dialect,
            version,
            model,
            token_route,
            hand_over,
            rank_pin,
            salts_cache,
            abort: abort_number,
        } = message;
        let unknown = |what, got: i32| Err(WireError::Unknown { what, got: got.into() });
        let Some(dialect) = Kind::named(&name("the dialect's name", dialect)?) else {
            return Err(WireError::Text {
                what: "the dialect's name",
                wrong: "is none that this version knows",
            });
        };
        let speech = Speech {
            dialect,
            model: name("the model's name at the engine", model)?.into(),
            tokens: match tokens {
                v1::TokenRoute::Unspecified if token_route != 0 => {
                    return unknown("the token route", token_route);
                }
                v1::TokenRoute::Unspecified => None,
                v1::TokenRoute::VllmGenerate => Some(TokenRoute::VllmGenerate),
                v1::TokenRoute::Completions => Some(TokenRoute::Completions),
                v1::TokenRoute::SglangGenerate => Some(TokenRoute::SglangGenerate),
            },
            hand_over: hand_over.map_or(Ok(Way(HandOver::None)), Way::try_from)?.0,
            ranks: match ranks {
                v1::RankPin::Unspecified if rank_pin != 0 => return unknown("the rank pin", rank_pin),
                v1::RankPin::Unspecified => RankPin::None,
                v1::RankPin::Header => RankPin::Header,
                v1::RankPin::Field => RankPin::Field,
            },
            salts_cache,
            abort: match abort {
                v1::Abort::Unspecified if abort_number != 0 => {
                    return unknown("the abort call", abort_number);
                }
                v1::Abort::Unspecified => Abort::Close,
                v1::Abort::Vllm => Abort::VllmAbortRequests,
                v1::Abort::Sglang => Abort::SglangAbortRequest,
            },
        };
        Ok(Self { version: optional_name("the dialect's version", version)?, speech })
    }
}

impl From<Dialect> for v1::Dialect {
    fn from(dialect: Dialect) -> Self {
        let Dialect { version, speech } = dialect;
        let Speech { dialect, model, tokens, hand_over, ranks, salts_cache, abort } = speech;
        let token_route = match tokens {
            None => v1::TokenRoute::Unspecified,
            Some(TokenRoute::VllmGenerate) => v1::TokenRoute::VllmGenerate,
            Some(TokenRoute::Completions) => v1::TokenRoute::Completions,
            Some(TokenRoute::SglangGenerate) => v1::TokenRoute::SglangGenerate,
        };
        let rank_pin = match ranks {
            RankPin::None => v1::RankPin::Unspecified,
            RankPin::Header => v1::RankPin::Header,
            RankPin::Field => v1::RankPin::Field,
        };
        let abort = match abort {
            Abort::Close => v1::Abort::Unspecified,
            Abort::VllmAbortRequests => v1::Abort::Vllm,
            Abort::SglangAbortRequest => v1::Abort::Sglang,
        };
        Self {
            name: dialect.name().to_owned(),
            version,
            model: model.to_string(),
            token_route: token_route.into(),
            hand_over: Way(hand_over).into(),
            rank_pin: rank_pin.into(),
            salts_cache,
            abort: abort.into(),
        }
    }
}

/// Written by `From` and read by `TryFrom` of [`Dialect`].
struct Way(HandOver);

impl TryFrom<v1::HandOver> for Way {
    type Error = WireError;

    fn try_from(message: v1::HandOver) -> Result<Self, WireError> {
        match required(message.way, "HandOver", "way that this version knows")? {
            v1::hand_over::Way::TransferParams(v1::hand_over::TransferParams {}) => {
                Ok(Self(HandOver::TransferParams))
            }
            v1::hand_over::Way::Bootstrap(v1::hand_over::Bootstrap { host, port }) => {
                let Some(port) = u16::try_from(port).ok().filter(|port| *port > 0) else {
                    let (what, got) = ("the bootstrap port", port.to_string());
                    return Err(WireError::Range { what, got, must: "from 1 to 65,535" });
                };
                Ok(Self(HandOver::Bootstrap { host: name("the bootstrap host", host)?.into(), port }))
            }
        }
    }
}

impl From<Way> for Option<v1::HandOver> {
    fn from(Way(hand_over): Way) -> Self {
        let way = match hand_over {
            HandOver::None => return None,
            HandOver::TransferParams => v1::hand_over::Way::TransferParams(v1::hand_over::TransferParams {}),
            HandOver::Bootstrap { host, port } => v1::hand_over::Way::Bootstrap(v1::hand_over::Bootstrap {
                host: host.to_string(),
                port: port.into(),
            }),
        };
        Some(v1::HandOver { way: Some(way) })
    }
}
