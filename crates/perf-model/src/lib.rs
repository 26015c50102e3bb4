#![doc = include_str!("../README.md")]

mod corrected;
mod fit;
mod link;
mod output;
mod profile;
mod rank;
mod step;
mod window;

pub use corrected::{CorrectedProfile, Corrections, FACTOR_MAX, FACTOR_MIN, ProfileModel};
pub use fit::ModelError;
pub use link::{LinkModel, LinkPrior};
pub use output::OutputLengths;
pub use profile::{
    BudgetFile, EntryProblem, GroupFile, HandoverFile, KvLayout, PROFILE_BYTES_MAX, PROFILE_POINTS_MAX,
    PrefillShape, Profile, ProfileError, ProfileFile, QueueShape, RankFile, RequestFile, StepShape,
    StepsFile,
};
pub use rank::{RankModel, RankPrices};
pub use step::{StepCoefficients, StepModel};
