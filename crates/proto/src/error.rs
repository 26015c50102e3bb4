//! Why a message was not taken.

/// What is wrong with a message, as a sentence. It never quotes a secret, and a name only within its bound.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Something required is absent.
    #[error("{message} has no {field}, which is required")]
    Missing {
        /// The message's name.
        message: &'static str,
        /// The field's name.
        field: &'static str,
    },
    /// There is more of something than is allowed.
    #[error("{what}: {got} {unit}, at most {max} are allowed")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much there is.
        got: u64,
        /// How much may be.
        max: u64,
        /// Of which unit.
        unit: &'static str,
    },
    /// A number that says nothing to this version.
    #[error("{what} is {got}, which this version does not know")]
    Unknown {
        /// The enum or union.
        what: &'static str,
        /// Its value.
        got: i64,
    },
    /// A number that cannot be.
    #[error("{what} is {got}; it must be {must}")]
    Range {
        /// Which number.
        what: &'static str,
        /// Its value.
        got: String,
        /// What it may be.
        must: &'static str,
    },
    /// A text that cannot be.
    #[error("{what} {wrong}")]
    Text {
        /// Which text.
        what: &'static str,
        /// What is wrong with it.
        wrong: &'static str,
    },
    /// A rank that the engine does not have.
    #[error("DP rank {got} of an engine with {dp_ranks}")]
    Rank {
        /// Which.
        got: u32,
        /// How many there are, numbered from 0.
        dp_ranks: u16,
    },
    /// Pieces of something larger do not fit together.
    #[error("a piece of {what} does not continue the one before: {wrong}; ask for all of it again")]
    Sequence {
        /// Of what.
        what: &'static str,
        /// How not.
        wrong: String,
    },
    /// A batch of cache events holds too much for one message.
    #[error(
        "a batch of {events} cache events with {hashes} hashes is too large for a message; send a snapshot instead"
    )]
    BatchTooLarge {
        /// Events in it.
        events: usize,
        /// Hashes in it.
        hashes: usize,
    },
}

impl WireError {
    /// `got` against its bound.
    ///
    /// # Errors
    /// [`WireError::TooMuch`].
    pub(crate) fn at_most(
        what: &'static str,
        unit: &'static str,
        got: usize,
        max: usize,
    ) -> Result<(), Self> {
        if got > max {
            return Err(Self::TooMuch { what, got: got as u64, max: max as u64, unit });
        }
        Ok(())
    }
}
