//! The last few values of a series, and their order statistics.

/// A ring of the last `N` values. Inline, so that cloning a model allocates nothing.
#[derive(Debug, Clone)]
pub(crate) struct Window<const N: usize> {
    values: [f32; N],
    pushed: u64,
}

impl<const N: usize> Window<N> {
    pub(crate) const fn new() -> Self {
        Self { values: [0.0; N], pushed: 0 }
    }

    /// Adds a value; the oldest goes once `N` are held.
    pub(crate) fn push(&mut self, value: f32) {
        self.values[(self.pushed % N as u64) as usize] = value;
        self.pushed += 1;
    }

    /// Values ever pushed.
    pub(crate) fn pushed(&self) -> u64 {
        self.pushed
    }

    pub(crate) fn values(&self) -> &[f32] {
        &self.values[..self.pushed.min(N as u64) as usize]
    }

    /// The value below which a share `q` of `map`ped values lie; `None` while nothing was pushed.
    pub(crate) fn quantile(&self, q: f64, map: impl Fn(f32) -> f32) -> Option<f64> {
        let mut sorted = [0.0; N];
        let held = self.values().len();
        for (slot, &value) in sorted.iter_mut().zip(self.values()) {
            *slot = map(value);
        }
        let index = (q * held.checked_sub(1)? as f64).round() as usize;
        let (_, value, _) = sorted[..held].select_nth_unstable_by(index, f32::total_cmp);
        Some(f64::from(*value))
    }
}
