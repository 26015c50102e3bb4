//! Least squares with unknowns that are not negative.

/// Beside the largest entry of the normal equations: what keeps those of unknowns that the rows do not tell apart solvable.
const RIDGE: f64 = 1e-10;

/// The `x` with no negative part for which `rows · x` is nearest to `targets`: Lawson and Hanson's active set, on the normal
/// equations. An unknown that no row has is 0.
pub(crate) fn solve(rows: &[Vec<f64>], targets: &[f64]) -> Vec<f64> {
    let count = rows.first().map_or(0, Vec::len);
    // Unknowns in units of their own: they differ by eight orders of magnitude.
    let scale: Vec<f64> = (0..count)
        .map(|column| rows.iter().map(|row| row[column] * row[column]).sum::<f64>().sqrt())
        .collect();
    let unit = |column: usize| if scale[column] > 0.0 { 1.0 / scale[column] } else { 0.0 };
    let product =
        |a: usize, b: usize| rows.iter().map(|row| row[a] * row[b]).sum::<f64>() * unit(a) * unit(b);
    let gram: Vec<Vec<f64>> = (0..count).map(|a| (0..count).map(|b| product(a, b)).collect()).collect();
    let right: Vec<f64> = (0..count)
        .map(|a| rows.iter().zip(targets).map(|(row, target)| row[a] * target).sum::<f64>() * unit(a))
        .collect();

    let mut x = vec![0.0; count];
    let mut free: Vec<usize> = Vec::new();
    for _ in 0..10 * count + 10 {
        let gain = |a: usize| right[a] - gram[a].iter().zip(&x).map(|(g, x)| g * x).sum::<f64>();
        let best = (0..count)
            .filter(|a| scale[*a] > 0.0 && !free.contains(a))
            .max_by(|a, b| gain(*a).total_cmp(&gain(*b)))
            .filter(|a| gain(*a) > 1e-9 * right[*a].abs().max(1e-9));
        let Some(best) = best else { break };
        free.push(best);
        settle(&gram, &right, &mut free, &mut x);
    }
    x.iter().enumerate().map(|(column, x)| x * unit(column)).collect()
}

/// Solves for the free unknowns; those that would become negative stop at 0 and are free no more.
fn settle(gram: &[Vec<f64>], right: &[f64], free: &mut Vec<usize>, x: &mut [f64]) {
    while !free.is_empty() {
        let z = eliminate(gram, right, free);
        if z.iter().all(|z| *z > 0.0) {
            free.iter().zip(z).for_each(|(&a, z)| x[a] = z);
            return;
        }
        let step = free.iter().zip(&z).filter(|(_, z)| **z <= 0.0);
        let step = step.map(|(&a, z)| x[a] / (x[a] - z).max(f64::MIN_POSITIVE)).fold(1.0, f64::min);
        for (&a, z) in free.iter().zip(&z) {
            x[a] += step * (z - x[a]);
        }
        let mut least: Vec<usize> =
            free.iter().zip(&z).filter(|(a, z)| **z <= 0.0 && x[**a] <= 1e-12).map(|(a, _)| *a).collect();
        if least.is_empty() {
            // Rounding kept the one that set the step above 0.
            let nearest = free.iter().zip(&z).filter(|(_, z)| **z <= 0.0).map(|(a, _)| *a);
            least.extend(nearest.min_by(|a, b| x[*a].total_cmp(&x[*b])));
        }
        least.iter().for_each(|&a| x[a] = 0.0);
        free.retain(|a| !least.contains(a));
    }
}

/// Gauss's elimination with pivots, for the unknowns in `free`.
fn eliminate(gram: &[Vec<f64>], right: &[f64], free: &[usize]) -> Vec<f64> {
    let count = free.len();
    let mut rows: Vec<Vec<f64>> = free
        .iter()
        .map(|&a| {
            free.iter().map(|&b| gram[a][b] + if a == b { RIDGE } else { 0.0 }).chain([right[a]]).collect()
        })
        .collect();
    for column in 0..count {
        let pivot = (column..count).max_by(|a, b| rows[*a][column].abs().total_cmp(&rows[*b][column].abs()));
        rows.swap(column, pivot.unwrap_or(column));
        let (above, below) = rows.split_at_mut(column + 1);
        let pivot = &above[column];
        for row in below {
            let factor = row[column] / pivot[column];
            row.iter_mut().zip(pivot).skip(column).for_each(|(value, pivot)| *value -= factor * pivot);
        }
    }
    let mut z = vec![0.0; count];
    for column in (0..count).rev() {
        let known: f64 = (column + 1..count).map(|other| rows[column][other] * z[other]).sum();
        z[column] = (rows[column][count] - known) / rows[column][column];
    }
    z
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn misfit(rows: &[Vec<f64>], targets: &[f64], x: &[f64]) -> f64 {
        let fitted = |row: &Vec<f64>| row.iter().zip(x).map(|(a, x)| a * x).sum::<f64>();
        rows.iter().zip(targets).map(|(row, target)| (fitted(row) - target).powi(2)).sum()
    }

    #[test]
    fn what_can_be_met_is_met() {
        let rows = vec![vec![1.0, 0.0], vec![1.0, 1e6], vec![1.0, 2e6]];
        let x = solve(&rows, &[3.0, 5.0, 7.0]);
        assert!((x[0] - 3.0).abs() < 1e-6 && (x[1] - 2e-6).abs() < 1e-12, "{x:?}");
        assert_eq!(solve(&[], &[]), Vec::<f64>::new());
    }

    #[test]
    fn what_would_be_negative_is_nothing() {
        let rows = vec![vec![1.0, 1.0], vec![1.0, 2.0], vec![1.0, 3.0]];
        let x = solve(&rows, &[3.0, 2.0, 1.0]);
        assert!((x[0] - 2.0).abs() < 1e-6 && x[1] == 0.0, "{x:?}");
    }

    proptest! {
        #[test]
        fn no_neighbour_is_nearer(
            rows in proptest::collection::vec(proptest::collection::vec(0.0..10.0_f64, 5), 8),
            targets in proptest::collection::vec(-5.0..20.0_f64, 8),
        ) {
            let x = solve(&rows, &targets);
            prop_assert!(x.iter().all(|x| *x >= 0.0), "{:?}", x);
            let best = misfit(&rows, &targets, &x);
            for column in 0..5 {
                for step in [-1e-3, 1e-3] {
                    let mut other = x.clone();
                    other[column] = (other[column] + step).max(0.0);
                    prop_assert!(misfit(&rows, &targets, &other) >= best - 1e-6 * (1.0 + best), "{:?}", x);
                }
            }
        }
    }
}
