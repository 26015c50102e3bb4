//! The last batches, for subscribers that missed them.

use std::collections::VecDeque;

use bytes::Bytes;

/// Bounded by batches and by bytes; the oldest go first.
#[derive(Debug)]
pub(crate) struct Ring {
    batches: VecDeque<(u64, Bytes)>,
    bytes: usize,
    batches_max: usize,
    bytes_max: usize,
}

impl Ring {
    pub(crate) fn new(batches_max: usize, bytes_max: usize) -> Self {
        Self { batches: VecDeque::new(), bytes: 0, batches_max, bytes_max }
    }

    pub(crate) fn push(&mut self, sequence: u64, payload: Bytes) {
        self.bytes += payload.len();
        self.batches.push_back((sequence, payload));
        while self.batches.len() > self.batches_max || self.bytes > self.bytes_max {
            let Some((_, oldest)) = self.batches.pop_front() else { break };
            self.bytes -= oldest.len();
        }
    }

    /// Those from `sequence` on that are still here.
    pub(crate) fn since(&self, sequence: u64) -> Vec<(u64, Bytes)> {
        self.batches.iter().filter(|(number, _)| *number >= sequence).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_bounds_hold_and_the_newest_stay() {
        let numbers = |ring: &Ring| ring.since(0).into_iter().map(|(number, _)| number).collect::<Vec<_>>();
        let mut ring = Ring::new(3, 100);
        (0..5).for_each(|number| ring.push(number, Bytes::from(vec![0; 10])));
        assert_eq!(numbers(&ring), [2, 3, 4]);
        assert_eq!(ring.since(4).len(), 1);
        ring.push(5, Bytes::from(vec![0; 85]));
        assert_eq!(numbers(&ring), [4, 5], "95 bytes fit, 105 do not");
        ring.push(6, Bytes::from(vec![0; 101]));
        assert!(numbers(&ring).is_empty() && ring.bytes == 0, "what fits nowhere is not kept");
    }
}
