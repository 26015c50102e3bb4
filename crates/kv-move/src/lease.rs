//! Leases: who may still read a set of blocks, and until when.
//!
//! In: grants, renewals, releases and the time, as a `Duration` since an origin of the caller's choice. Out: ids, and
//! the leases that ended unreleased. What a lease covers is the caller's affair: it hands in a number (`owner`, for
//! example a leg's id) and gets it back when the lease is over.
//!
//! Invariants: a lease leaves the table exactly once, by [`LeaseTable::release`] or by [`LeaseTable::expired`]; ids are
//! never reused; a lease is live while `now < end`, so the moment of its end belongs to the owner of the blocks.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

/// Identity of one lease within its table. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A lease that ended without being released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expired {
    /// Which.
    pub lease: LeaseId,
    /// What the caller named when it was granted.
    pub owner: u64,
}

/// Why a lease was not granted or renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// The bound of the table is reached.
    #[error("all {leases_max} leases are taken: release some, or raise the bound")]
    Full {
        /// The bound.
        leases_max: usize,
    },
    /// It was released, is over, or never was. The blocks behind it may already hold something else.
    #[error("lease {lease} is over: take its blocks as lost and recompute")]
    Over {
        /// Which.
        lease: LeaseId,
    },
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    owner: u64,
    end: Duration,
}

/// The live leases of one pool.
#[derive(Debug)]
pub struct LeaseTable {
    leases: BTreeMap<LeaseId, Lease>,
    ends: BTreeSet<(Duration, LeaseId)>,
    next: u64,
    leases_max: usize,
}

impl LeaseTable {
    /// An empty table that holds at most `leases_max` leases.
    pub fn new(leases_max: usize) -> Self {
        Self { leases: BTreeMap::new(), ends: BTreeSet::new(), next: 0, leases_max }
    }

    /// Grants a lease that ends at `now + ttl`. O(log leases).
    ///
    /// # Errors
    /// `Full` at the bound. Leases that are over count until [`expired`](Self::expired) took them out.
    pub fn grant(&mut self, owner: u64, now: Duration, ttl: Duration) -> Result<LeaseId, LeaseError> {
        if self.leases.len() >= self.leases_max {
            return Err(LeaseError::Full { leases_max: self.leases_max });
        }
        let id = LeaseId(self.next);
        self.next += 1;
        let end = now.saturating_add(ttl);
        self.leases.insert(id, Lease { owner, end });
        self.ends.insert((end, id));
        Ok(id)
    }

    /// Lets the lease end at `now + ttl`, unless it already ends later: a renewal never shortens.
    ///
    /// # Errors
    /// `Over` once the lease ended, even if nobody has asked for [`expired`](Self::expired) leases since: what the
    /// owner of the blocks does must not depend on when it looked.
    pub fn renew(&mut self, id: LeaseId, now: Duration, ttl: Duration) -> Result<(), LeaseError> {
        let lease =
            self.leases.get_mut(&id).filter(|lease| now < lease.end).ok_or(LeaseError::Over { lease: id })?;
        let end = lease.end.max(now.saturating_add(ttl));
        self.ends.remove(&(lease.end, id));
        self.ends.insert((end, id));
        lease.end = end;
        Ok(())
    }

    /// Ends a lease; gives its owner, or `None` if it had left the table already.
    pub fn release(&mut self, id: LeaseId) -> Option<u64> {
        let lease = self.leases.remove(&id)?;
        self.ends.remove(&(lease.end, id));
        Some(lease.owner)
    }

    /// Takes out every lease that is over at `now`, the longest over first. Each is reported once.
    pub fn expired(&mut self, now: Duration) -> Vec<Expired> {
        let mut over = Vec::new();
        while let Some((_, id)) = self.ends.first().copied().filter(|(end, _)| *end <= now) {
            self.ends.pop_first();
            let lease = self.leases.remove(&id).expect("every end belongs to a lease");
            over.push(Expired { lease: id, owner: lease.owner });
        }
        over
    }

    /// Whether the lease may still be relied on at `now`.
    pub fn is_live(&self, id: LeaseId, now: Duration) -> bool {
        self.end(id).is_some_and(|end| now < end)
    }

    /// When the lease ends if nobody renews it.
    pub fn end(&self, id: LeaseId) -> Option<Duration> {
        self.leases.get(&id).map(|lease| lease.end)
    }

    /// When [`expired`](Self::expired) will next have something to say.
    pub fn next_end(&self) -> Option<Duration> {
        self.ends.first().map(|(end, _)| *end)
    }

    /// Leases in the table, those that are over and not yet collected included.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }
}

#[cfg(test)]
mod tests;
