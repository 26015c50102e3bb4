//! The labels of metrics, and the closed sets that their values are of.

use std::{fmt, sync::Arc};

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};

/// A label value from a closed set.
macro_rules! label_values {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant),*
        }

        impl $name {
            /// The value as the label shows it.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text),*
                }
            }
        }

        impl EncodeLabelValue for $name {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
                EncodeLabelValue::encode(&self.as_str(), encoder)
            }
        }
    };
}

label_values! {
    /// A public route that generates.
    Endpoint {
        /// `/v1/chat/completions`
        Chat = "chat_completions",
        /// `/v1/completions`
        Completions = "completions",
    }
}
label_values! {
    /// How a request ended, from its client's point of view.
    Outcome {
        /// Answered whole.
        Ok = "ok",
        /// Status 4xx other than 429.
        ClientError = "client_error",
        /// Status 429 or 503: worth another try.
        Refused = "refused",
        /// Any other status 5xx, or an `error` event in the stream.
        ServerError = "server_error",
        /// The client left before the end.
        Disconnected = "disconnected",
    }
}
label_values! {
    /// What placement chose.
    DecisionKind {
        /// Both phases on one rank.
        Aggregated = "aggregated",
        /// Prefill and decode on two ranks.
        Split = "split",
        /// No rank could take it.
        None = "none",
    }
}
label_values! {
    /// How a hand-over of KV ended.
    TransferOutcome {
        /// The decode engine has the blocks.
        Done = "done",
        /// Refused or broken; the decode engine computes the prompt itself.
        Failed = "failed",
        /// Not done by its deadline.
        TimedOut = "timed_out",
        /// Nobody needs it any more.
        Cancelled = "cancelled",
    }
}

/// Labels of `forebay_requests_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// A served model, or empty when the request named none of those.
    pub model: Arc<str>,
    /// Where it came in.
    pub endpoint: Endpoint,
    /// How it ended.
    pub outcome: Outcome,
}

/// A served model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ModelLabel {
    /// As `/v1/models` lists it.
    pub model: Arc<str>,
}

/// An engine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EngineLabel {
    /// Its stable name.
    pub engine: Arc<str>,
}

/// A DP rank of an engine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RankLabels {
    /// The engine's stable name.
    pub engine: Arc<str>,
    /// Which of its ranks.
    pub dp_rank: u32,
}

/// An engine and what it does.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StateLabels {
    /// The engine's stable name.
    pub engine: Arc<str>,
    /// `starting`, `ready`, `draining`, `silent`, `fenced` or `lost`.
    pub state: String,
}

/// Labels of `forebay_engine_leaning`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PhaseLabels {
    /// The engine's stable name.
    pub engine: Arc<str>,
    /// `prefill` or `decode`.
    pub phase: &'static str,
}

/// Labels of `forebay_decisions_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DecisionLabels {
    /// Name of the placement policy in force.
    pub policy: &'static str,
    /// What it chose.
    pub kind: DecisionKind,
}

label_values! {
    /// What a request that was split saved or cost, by the prediction that it was placed with.
    Saved {
        /// Time to the first token.
        Ttft = "ttft",
        /// Time of decoding.
        Decode = "decode",
        /// Time of moving KV, which is a cost.
        Transfer = "transfer_cost",
    }
}

/// Labels of `forebay_split_saved_seconds`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SavedLabels {
    /// The model.
    pub model: Arc<str>,
    /// What.
    pub what: Saved,
}

label_values! {
    /// What came of asking an engine for a request's tokens.
    Audited {
        /// They are ours.
        Agrees = "agrees",
        /// They are others: the engine is given text from then on.
        Differs = "differs",
        /// It did not say.
        Unanswered = "unanswered",
    }
}

/// Label of `forebay_tokenizer_audits_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AuditLabels {
    /// What came of it.
    pub outcome: Audited,
}

/// Label of `forebay_transfers_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TransferLabels {
    /// How it ended.
    pub outcome: TransferOutcome,
}
