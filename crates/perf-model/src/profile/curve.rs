//! A piecewise linear, never falling function of a count.

/// From `from` on: `seconds + slope x (count - from)`, but never past `end`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Segment {
    from: u32,
    seconds: f64,
    slope: f64,
    /// The next segment's start, so that rounding cannot make the curve fall there.
    end: f64,
}

/// Counts by their number of bits, 0 included.
const MAGNITUDES: usize = u32::BITS as usize + 1;

/// Constant up to the first point, straight between points, and on along the last slope.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Curve {
    /// The first one is constant and starts at 0.
    segments: Box<[Segment]>,
    /// The segment of the smallest count of each magnitude. Points are measured at some powers of two, so a look-up
    /// starts at its segment or beside it: a search would mispredict several branches.
    starts: [u8; MAGNITUDES],
}

impl Curve {
    /// `points` are (count, seconds): 1 to 64, counts rising from 1 or more, seconds not falling. The format checks
    /// that.
    pub(crate) fn new(points: &[(u32, f64)]) -> Self {
        let first = points.first().map_or(0.0, |&(_, seconds)| seconds);
        let mut segments = vec![Segment { from: 0, seconds: first, slope: 0.0, end: first }];
        segments.extend(points.windows(2).map(|pair| {
            let [(from, seconds), (to, end)] = [pair[0], pair[1]];
            Segment { from, seconds, slope: (end - seconds) / f64::from(to - from), end }
        }));
        if let Some(last) = segments.last_mut() {
            last.end = f64::INFINITY;
        }
        let starts = std::array::from_fn(|bits| {
            let smallest = if bits == 0 { 0 } else { 1 << (bits - 1) };
            (segments.partition_point(|segment| segment.from <= smallest) - 1) as u8
        });
        Self { segments: segments.into(), starts }
    }

    /// What the fewest take.
    #[inline]
    pub(crate) fn first(&self) -> f64 {
        self.segments[0].seconds
    }

    /// Seconds at `count`: O(points within its magnitude), usually one.
    #[inline]
    pub(crate) fn at(&self, count: u32) -> f64 {
        let magnitude = (u32::BITS - count.leading_zeros()) as usize;
        let mut segment = &self.segments[usize::from(self.starts[magnitude])];
        for next in &self.segments[usize::from(self.starts[magnitude]) + 1..] {
            if next.from > count {
                break;
            }
            segment = next;
        }
        (segment.seconds + segment.slope * f64::from(count - segment.from)).min(segment.end)
    }
}
