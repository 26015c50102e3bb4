#![doc = include_str!("../README.md")]

mod fit;
mod link;
mod step;
mod window;

pub use fit::ModelError;
pub use link::{LinkModel, LinkPrior};
pub use step::{StepCoefficients, StepModel};
