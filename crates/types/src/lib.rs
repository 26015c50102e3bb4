#![doc = include_str!("../README.md")]

mod ids;
mod kv;
mod load;
mod sampling;

pub use ids::{
    BlockHash, EngineName, Incarnation, LegId, RankId, RequestId, ReservationId, TenantId, TokenId,
};
pub use kv::{KV_GROUPS_MAX, KvEvent, KvEventBatch, KvGroup, Tier, device_blocks};
pub use load::{Leaning, RankLoad, Role, StepObservation};
pub use sampling::{FinishReason, FirstToken, SampledToken, Sampling, TokenLogprobs};
