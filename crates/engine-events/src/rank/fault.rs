//! What is wrong with what an engine says, in sentences.

use crate::event::EngineHash;

/// Something that cannot be as an engine says. Its text is meant for `status`. At most one of a kind is reported for a
/// batch: the first, with the blocks that all of them concerned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Blocks follow one that was never stored: events were lost.
    #[error("{blocks} blocks follow block {parent}, which was never announced")]
    UnknownParent {
        /// The first such parent.
        parent: EngineHash,
        /// Blocks that are not indexed for it.
        blocks: u64,
        /// Blocks were left out before this event, or history is lost, so the parent may be one of those: a replay would
        /// not bring it.
        explained: bool,
    },
    /// Blocks were removed that were never stored, or more often than stored.
    #[error("{blocks} blocks were removed that were not stored, {hash} among them")]
    UnknownRemoval {
        /// The first.
        hash: EngineHash,
        /// How many.
        blocks: u64,
    },
    /// The engine's pool has another block size than was declared.
    #[error(
        "its events have blocks of {announced} tokens, but it was declared with {declared}; {blocks} left out"
    )]
    WrongBlockSize {
        /// By its own settings, as discovered.
        declared: u32,
        /// By its events.
        announced: u32,
        /// Blocks left out.
        blocks: u64,
    },
    /// The tokens of an event are not those of its blocks.
    #[error(
        "an event of {in_event} blocks of {block_size_tokens} tokens has {tokens} tokens; {blocks} left out"
    )]
    WrongTokenCount {
        /// Blocks in the first such event.
        in_event: usize,
        /// Their size.
        block_size_tokens: u32,
        /// Its tokens.
        tokens: usize,
        /// Blocks left out.
        blocks: u64,
    },
    /// The extra keys of an event are not those of its blocks.
    #[error("an event of {in_event} blocks has extra keys of {keys} blocks; {blocks} left out")]
    WrongKeyCount {
        /// Blocks in the first such event.
        in_event: usize,
        /// Lists of extra keys in it.
        keys: usize,
        /// Blocks left out.
        blocks: u64,
    },
    /// One hash was announced with two different prefixes, so nothing that names it can be attributed.
    #[error("{blocks} hashes, {hash} among them, were announced with two different prefixes each; left out")]
    AmbiguousHash {
        /// The first.
        hash: EngineHash,
        /// How many.
        blocks: u64,
    },
    /// There is no room for more.
    #[error(
        "{blocks} blocks left out: {blocks_max} are followed already, the most that is allowed for one rank"
    )]
    NoRoom {
        /// The bound.
        blocks_max: usize,
        /// Blocks left out.
        blocks: u64,
    },
    /// The model has more groups of layers than are followed.
    #[error("{blocks} blocks are of groups of layers beyond the {groups_max} that are followed; left out")]
    TooManyGroups {
        /// The bound.
        groups_max: usize,
        /// Blocks left out.
        blocks: u64,
    },
    /// Events of a type that this version does not know were passed over.
    #[error("{events} events of unknown types, {tag:?} among them, were passed over")]
    UnknownEvent {
        /// The first one's type.
        tag: Box<str>,
        /// How many.
        events: u64,
    },
}

impl Fault {
    /// Adds `self` to the faults of a batch.
    pub(super) fn add_to(mut self, faults: &mut Vec<Fault>) {
        let kind = std::mem::discriminant(&self);
        match faults.iter_mut().find(|fault| std::mem::discriminant(*fault) == kind) {
            Some(first) => *first.count() += *self.count(),
            None => faults.push(self),
        }
    }

    fn count(&mut self) -> &mut u64 {
        match self {
            Self::UnknownParent { blocks, .. }
            | Self::UnknownRemoval { blocks, .. }
            | Self::WrongBlockSize { blocks, .. }
            | Self::WrongTokenCount { blocks, .. }
            | Self::WrongKeyCount { blocks, .. }
            | Self::AmbiguousHash { blocks, .. }
            | Self::NoRoom { blocks, .. }
            | Self::TooManyGroups { blocks, .. } => blocks,
            Self::UnknownEvent { events, .. } => events,
        }
    }
}
