//! The JSON form of a profile, version 1, and its checks. Every number in it is in ms and tokens, as one measures.
//!
//! In: text. Out: a [`Profile`], or which entry is wrong and what to do. Start at [`parse`].

use serde::{Deserialize, Serialize};

use super::cost::{GroupCost, RankCost, StepCost};
use super::curve::Curve;
use super::{Handover, KvLayout, PROFILE_BYTES_MAX, PROFILE_POINTS_MAX, Profile, Request};

const VERSION: u32 = ProfileFile::VERSION;
/// A quarter of an hour for anything in a profile: only a mistaken unit says more.
const MS_MAX: f64 = 1e6;
/// Characters of `name` and of `measured`.
const TEXT_MAX: usize = 256;

/// Why a text is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Not read at all.
    #[error("profile of {bytes} bytes: give at most {PROFILE_BYTES_MAX}, a profile has a few dozen points")]
    TooLong {
        /// Length of the text.
        bytes: usize,
    },
    /// Written for another version of the format.
    #[error(
        "profile version {found}: this build reads version {VERSION}; write that, or use the matching build"
    )]
    Version {
        /// What it says.
        found: u32,
    },
    /// No JSON, an entry missing, of the wrong type, or of a name that is not known.
    #[error("profile entry `{entry}` cannot be read: correct it as its cause says")]
    Syntax {
        /// Path of the entry, `.` for the whole.
        entry: String,
        /// What the parser met there.
        #[source]
        cause: serde_json::Error,
    },
    /// An entry that can be read and cannot be true.
    #[error("profile entry `{entry}` {problem}")]
    Entry {
        /// Path of the entry.
        entry: String,
        /// What is wrong, and what to do.
        problem: EntryProblem,
    },
}

/// What is wrong with one entry of a profile.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EntryProblem {
    /// Negative, not a number, or absurdly large.
    #[error("is {found}: give a number of ms from 0 to {MS_MAX}")]
    NotMs {
        /// What it says.
        found: f64,
    },
    /// A step that takes no time.
    #[error("is 0 ms: a step takes time, give what was measured")]
    NoTime,
    /// A list without points, or a text without characters.
    #[error("is empty: give at least one")]
    Empty,
    /// More than is read.
    #[error("has {found}: give at most {limit}")]
    TooMany {
        /// How many there are.
        found: usize,
        /// How many may be.
        limit: usize,
    },
    /// Counts of tokens or sequences that do not rise.
    #[error("is for {found} after {before}: order the entries by their count, each count once and above 0")]
    Unordered {
        /// The count of this entry.
        found: u32,
        /// The count of the one before.
        before: u32,
    },
    /// A curve that falls.
    #[error("is {found} ms after {before} ms: more work never takes less, so measure again or level the two")]
    Falling {
        /// ms of this point.
        found: f64,
        /// ms of the one before.
        before: f64,
    },
    /// Budgets whose least time of a token does not fall.
    #[error(
        "is {found} ms after {before} ms: a wider budget never costs more a token, so leave the entry out"
    )]
    Rising {
        /// ms of this entry.
        found: f64,
        /// ms of the one before.
        before: f64,
    },
    /// A layout that an earlier entry describes.
    #[error("repeats a layout: keep one entry of each")]
    Repeated,
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// The JSON form of a profile, as it is written and read; `profiles/README.md` says what each entry means. Times are in ms.
/// What it says may be impossible: [`Profile::from_file`] checks it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileFile {
    /// Of the form: [`ProfileFile::VERSION`].
    pub version: u32,
    /// What it is called.
    pub name: String,
    /// Engine, model and machine.
    pub measured: String,
    /// Of a request outside of all steps.
    pub request: RequestFile,
    /// Of steps.
    pub steps: StepsFile,
    /// One entry a layout.
    pub handover: Vec<HandoverFile>,
}

impl ProfileFile {
    /// The only version so far. A reader refuses others, and entries that it does not know.
    pub const VERSION: u32 = 1;
}

/// ms of a request outside of all steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestFile {
    /// Of any.
    pub fixed_ms: f64,
    /// Of each of its prompt tokens, cached or not.
    pub token_ms: f64,
}

/// Whose steps they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepsFile {
    /// Of a rank that steps alone.
    Rank(RankFile),
    /// Of the ranks of one expert-parallel group.
    Group(GroupFile),
}

/// ms of what a rank does that steps alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankFile {
    /// Points (tokens, ms) of a step by its tokens, prompt and decode alike.
    pub launch_ms: Vec<(u32, f64)>,
    /// Of a unit of attention work.
    pub attention_ms: f64,
    /// Of a token of context that a decode reads.
    pub context_token_ms: f64,
    /// Of the same token, in addition, in a step with prefill.
    pub mixed_context_token_ms: f64,
    /// Least times under narrow budgets.
    pub budgets: Vec<BudgetFile>,
}

/// The least time of a token in a step with prefill, under a budget.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BudgetFile {
    /// The budget, at most.
    pub tokens: u32,
    /// ms of each token, at least.
    pub token_min_ms: f64,
}

/// ms of what a group does, whose ranks step together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupFile {
    /// Points (sequences, ms) of a step by the sequences that decode in the whole group.
    pub sequences_ms: Vec<(u32, f64)>,
    /// Of a sequence on the rank with most.
    pub fullest_decode_ms: f64,
    /// Of a token of context on the rank with most.
    pub fullest_context_token_ms: f64,
    /// Of a step with prefill on any rank, in the place of `sequences_ms`.
    pub prefill_step_ms: f64,
    /// Of a prompt token on the rank with most.
    pub fullest_prefill_token_ms: f64,
}

/// ms of a hand-over of KV in one layout.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandoverFile {
    /// Which.
    pub layout: KvLayout,
    /// From the decode leg's arrival to the KV being there.
    pub fixed_ms: f64,
    /// Of each token of it.
    pub token_ms: f64,
    /// By how much starting it lengthens the decode engine's step of the moment.
    pub start_fixed_ms: f64,
    /// The same, of each token.
    pub start_token_ms: f64,
}

/// Reads and checks a profile.
pub(super) fn parse(text: &str) -> Result<Profile, ProfileError> {
    if text.len() > PROFILE_BYTES_MAX {
        return Err(ProfileError::TooLong { bytes: text.len() });
    }
    // The version first: another version's entries would only be called unknown.
    let Versioned { version } = read(text)?;
    if version != VERSION {
        return Err(ProfileError::Version { found: version });
    }
    checked(read(text)?)
}

fn read<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, ProfileError> {
    let mut json = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| ProfileError::Syntax {
        entry: error.path().to_string(),
        cause: error.into_inner(),
    })?;
    let ended = json.end().map_err(|cause| ProfileError::Syntax { entry: ".".to_owned(), cause });
    ended.map(|()| value)
}

/// The profile that `file` describes, in seconds.
pub(super) fn checked(file: ProfileFile) -> Result<Profile, ProfileError> {
    let ProfileFile { version, name, measured, request, steps, handover } = file;
    if version != VERSION {
        return Err(ProfileError::Version { found: version });
    }
    check_text("name", &name)?;
    check_text("measured", &measured)?;
    let RequestFile { fixed_ms, token_ms } = request;
    let request = Request {
        fixed: seconds("request.fixed_ms", fixed_ms)?,
        token: seconds("request.token_ms", token_ms)?,
    };
    let steps = match steps {
        StepsFile::Rank(rank) => StepCost::Rank(rank_cost(rank)?),
        StepsFile::Group(group) => StepCost::Group(group_cost(group)?),
    };
    Ok(Profile { name, measured, request, steps, handover: handovers(handover)? })
}

fn rank_cost(rank: RankFile) -> Result<RankCost, ProfileError> {
    let RankFile { launch_ms, attention_ms, context_token_ms, mixed_context_token_ms, budgets } = rank;
    let path = "steps.rank";
    Ok(RankCost {
        launch: curve(&format!("{path}.launch_ms"), &launch_ms)?,
        attention: seconds(&format!("{path}.attention_ms"), attention_ms)?,
        context_token: seconds(&format!("{path}.context_token_ms"), context_token_ms)?,
        mixed_context_token: seconds(&format!("{path}.mixed_context_token_ms"), mixed_context_token_ms)?,
        token_min: token_min(&format!("{path}.budgets"), &budgets)?,
    })
}

fn group_cost(group: GroupFile) -> Result<GroupCost, ProfileError> {
    let GroupFile {
        sequences_ms,
        fullest_decode_ms,
        fullest_context_token_ms,
        prefill_step_ms,
        fullest_prefill_token_ms,
    } = group;
    let path = "steps.group";
    Ok(GroupCost {
        sequences: curve(&format!("{path}.sequences_ms"), &sequences_ms)?,
        fullest_decode: seconds(&format!("{path}.fullest_decode_ms"), fullest_decode_ms)?,
        fullest_context_token: seconds(
            &format!("{path}.fullest_context_token_ms"),
            fullest_context_token_ms,
        )?,
        prefill_step: seconds(&format!("{path}.prefill_step_ms"), prefill_step_ms)?,
        fullest_prefill_token: seconds(
            &format!("{path}.fullest_prefill_token_ms"),
            fullest_prefill_token_ms,
        )?,
    })
}

fn curve(entry: &str, points: &[(u32, f64)]) -> Result<Curve, ProfileError> {
    check_count(entry, points.len())?;
    if points.is_empty() {
        return wrong(entry, EntryProblem::Empty);
    }
    let mut checked: Vec<(u32, f64)> = Vec::with_capacity(points.len());
    for (index, &(count, ms)) in points.iter().enumerate() {
        let entry = format!("{entry}[{index}]");
        let seconds = seconds(&entry, ms)?;
        if seconds == 0.0 {
            return wrong(&entry, EntryProblem::NoTime);
        }
        rising(&entry, count, checked.last().map_or(0, |&(count, _)| count))?;
        if let Some(&(_, before)) = checked.last()
            && seconds < before
        {
            return wrong(&entry, EntryProblem::Falling { found: ms, before: points[index - 1].1 });
        }
        checked.push((count, seconds));
    }
    Ok(Curve::new(&checked))
}

fn token_min(entry: &str, budgets: &[BudgetFile]) -> Result<Box<[(u32, f64)]>, ProfileError> {
    check_count(entry, budgets.len())?;
    let mut checked: Vec<(u32, f64)> = Vec::with_capacity(budgets.len());
    for (index, &BudgetFile { tokens, token_min_ms }) in budgets.iter().enumerate() {
        let entry = format!("{entry}[{index}]");
        let seconds = seconds(&format!("{entry}.token_min_ms"), token_min_ms)?;
        rising(&entry, tokens, checked.last().map_or(0, |&(tokens, _)| tokens))?;
        if let Some(&(_, before)) = checked.last()
            && seconds > before
        {
            let before = budgets[index - 1].token_min_ms;
            return wrong(&entry, EntryProblem::Rising { found: token_min_ms, before });
        }
        checked.push((tokens, seconds));
    }
    Ok(checked.into())
}

fn handovers(entries: Vec<HandoverFile>) -> Result<Box<[Handover]>, ProfileError> {
    let mut checked: Vec<Handover> = Vec::new();
    for (index, entry) in entries.into_iter().enumerate() {
        let HandoverFile { layout, fixed_ms, token_ms, start_fixed_ms, start_token_ms } = entry;
        let path = format!("handover[{index}]");
        if checked.iter().any(|earlier| earlier.layout == layout) {
            return wrong(&path, EntryProblem::Repeated);
        }
        checked.push(Handover {
            layout,
            fixed: seconds(&format!("{path}.fixed_ms"), fixed_ms)?,
            token: seconds(&format!("{path}.token_ms"), token_ms)?,
            start_fixed: seconds(&format!("{path}.start_fixed_ms"), start_fixed_ms)?,
            start_token: seconds(&format!("{path}.start_token_ms"), start_token_ms)?,
        });
    }
    Ok(checked.into())
}

fn seconds(entry: &str, ms: f64) -> Result<f64, ProfileError> {
    // NaN is in no range.
    if (0.0..=MS_MAX).contains(&ms) {
        Ok(ms.abs() / 1e3)
    } else {
        wrong(entry, EntryProblem::NotMs { found: ms })
    }
}

fn rising(entry: &str, found: u32, before: u32) -> Result<(), ProfileError> {
    if found > before { Ok(()) } else { wrong(entry, EntryProblem::Unordered { found, before }) }
}

fn check_count(entry: &str, found: usize) -> Result<(), ProfileError> {
    let limit = PROFILE_POINTS_MAX;
    if found <= limit { Ok(()) } else { wrong(entry, EntryProblem::TooMany { found, limit }) }
}

fn check_text(entry: &str, text: &str) -> Result<(), ProfileError> {
    match text.chars().count() {
        0 => wrong(entry, EntryProblem::Empty),
        found if found > TEXT_MAX => wrong(entry, EntryProblem::TooMany { found, limit: TEXT_MAX }),
        _ => Ok(()),
    }
}

fn wrong<T>(entry: &str, problem: EntryProblem) -> Result<T, ProfileError> {
    Err(ProfileError::Entry { entry: entry.to_owned(), problem })
}
