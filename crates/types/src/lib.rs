//! Words of the domain: ids, roles, tiers, events, sampling parameters. No behaviour beyond what a word needs.
//!
//! Everything in the workspace may use this crate; it uses nothing of the workspace. Counts are plain integers whose
//! field names end in their unit (`_tokens`, `_blocks`, `_bytes`, `_seconds`); identities are newtypes, so two of them
//! cannot be swapped.

mod ids;
mod kv;
mod load;
mod sampling;

pub use ids::{
    BlockHash, EngineName, Incarnation, LegId, RankId, RequestId, ReservationId, TenantId, TokenId,
};
pub use kv::{KvEvent, KvEventBatch, Tier};
pub use load::{RankLoad, Role, StepObservation};
pub use sampling::{FinishReason, SampledToken, Sampling, TokenLogprobs};
