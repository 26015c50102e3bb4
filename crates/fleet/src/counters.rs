//! What was ignored, refused or voided, since the start.

/// Each rises by one per event (or per thing, where it says so) and never falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Events of incarnations that are lost or never joined.
    pub fenced: u64,
    /// Joins refused: already joined, lost before, or beyond `ranks_max`.
    pub joins_refused: u64,
    /// Releases and progress of reservations that do not exist: released before, voided, or refused.
    pub reservations_unknown: u64,
    /// Reservations under an id that is in use.
    pub reservations_duplicate: u64,
    /// Reservations beyond `reservations_max`.
    pub reservations_refused: u64,
    /// Reservations (not events) that died with their incarnation.
    pub reservations_voided: u64,
    /// Links that made room for others.
    pub links_evicted: u64,
}
