//! Promised work, and which part of it its rank's load already shows.

use forebay_placement::Reserved;
use forebay_types::RankId;

use crate::event::Progress;

/// How far a leg got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    /// Promised; the engine may not know of it yet.
    Placed,
    /// In the engine's queue.
    Accepted,
    /// Takes part in steps.
    Started,
    /// Its prompt is there.
    Decoding,
}

/// One promise.
#[derive(Debug, Clone)]
pub(crate) struct Reservation {
    pub(crate) rank: RankId,
    amount: Reserved,
    reached: Stage,
    /// What the rank's last load report can have shown: the stage reached before that report.
    visible: Stage,
    generated_tokens: u64,
}

impl Reservation {
    pub(crate) fn new(rank: RankId, amount: Reserved) -> Self {
        Self { rank, amount, reached: Stage::Placed, visible: Stage::Placed, generated_tokens: 0 }
    }

    /// Takes in progress; what it changes shows in [`Reservation::unseen`].
    pub(crate) fn advance(&mut self, progress: Progress) {
        let stage = match progress {
            Progress::Accepted => Stage::Accepted,
            Progress::Started => Stage::Started,
            Progress::Decoding => Stage::Decoding,
            Progress::Generated { tokens } => {
                self.generated_tokens = self.generated_tokens.max(tokens);
                Stage::Decoding
            }
        };
        self.reached = self.reached.max(stage);
    }

    /// Whether the next load report shows more of it.
    pub(crate) fn is_pending(&self) -> bool {
        self.visible < self.reached
    }

    /// The rank reported its load.
    pub(crate) fn reported(&mut self) {
        self.visible = self.reached;
    }

    /// What the load does not show. A computed prompt is no prefill ahead of anyone, reported or not.
    pub(crate) fn unseen(&self) -> Reserved {
        let Reserved { prefill_tokens, context_tokens, output_tokens, sequences, decodes, blocks } =
            self.amount;
        let queueing = self.visible < Stage::Accepted;
        let unallocated = self.visible < Stage::Started;
        let not_decoding = self.visible < Stage::Decoding;
        Reserved {
            prefill_tokens: if queueing && self.reached < Stage::Decoding { prefill_tokens } else { 0 },
            sequences: if queueing { sequences } else { 0 },
            blocks: if unallocated { blocks } else { 0 },
            context_tokens: if not_decoding { context_tokens } else { 0 },
            decodes: if not_decoding { decodes } else { 0 },
            output_tokens: output_tokens.saturating_sub(self.generated_tokens),
        }
    }
}
