#![doc = include_str!("../README.md")]
#![allow(
    clippy::needless_pass_by_value,
    reason = "JSON values are made at the call and belong to the answer"
)]

mod api;
pub mod client;
mod double;
mod engine;
mod events;
mod kv;
mod msgpack;
pub mod openai;
pub mod sglang;
pub mod subscriber;
pub mod suite;
pub mod tokenizer;
pub mod vllm;

pub use double::control::{Control, EventGarbage};
pub use double::fault::Fault;
pub use double::seen::SeenRequest;
pub use double::{EventEndpoints, Running};
pub use engine::{Counts, Gauges};
pub use openai::{OpenAiDouble, OpenAiOptions};
pub use sglang::{SglangDouble, SglangEventOptions, SglangMode, SglangOptions};
pub use tokenizer::Token;
pub use vllm::{
    ApiKey, ConnectorOptions, HashFormat, KvEventOptions, KvRole, LoadFailure, TransferMode, VllmDouble,
    VllmOptions, VllmVersion,
};

/// The greedy continuation of `prompt` by a model: what every double with this `model_seed` generates at temperature 0
/// with `ignore_eos`, wherever its KV came from. `count` tokens.
pub fn continuation(model_seed: u64, prompt: &[Token], count: usize) -> Vec<Token> {
    let model = kv::Model::new(model_seed, 0);
    let mut tokens = prompt.to_vec();
    let mut context = model.start();
    let mut attended = 0;
    for _ in 0..count {
        for token in &tokens[attended..] {
            context = model.attend(context, model.entry(context, *token));
        }
        attended = tokens.len();
        let tail = &tokens[tokens.len().saturating_sub(2)..];
        tokens.push(model.next(context, tail, kv::Draw::Greedy, true));
    }
    tokens.split_off(prompt.len())
}
