//! Requests of one turn that share nothing.

use super::{Session, Turn, poisson};
use crate::{
    clock::Time,
    content::{Kind, Piece, name},
    draw::Draw,
};

/// Longest prompt and answer that is drawn.
const TOKENS_MAX: u32 = 100_000;

/// A lognormal distribution of lengths.
#[derive(Debug, Clone, Copy)]
pub struct Lengths {
    /// Half of them are shorter, tokens.
    pub median: f64,
    /// Of the logarithm.
    pub sigma: f64,
}

impl Lengths {
    fn draw(self, least: u32, draw: &mut Draw) -> u32 {
        draw.lognormal_tokens(self.median, self.sigma, least, TOKENS_MAX)
    }
}

/// Lengths of prompts and answers.
#[derive(Debug, Clone, Copy)]
pub struct Fresh {
    /// Of prompts.
    pub input: Lengths,
    /// Of answers.
    pub output: Lengths,
    /// Seconds in which requests come, and seconds in which none do, in turn; `None`: they come all the time.
    pub bursts: Option<(f64, f64)>,
}

impl Fresh {
    /// `rate` requests a second, in the mean.
    pub fn sessions(&self, rate: f64, end: Time, seed: u64) -> Vec<Session> {
        let mut arrivals = poisson(rate, end, &mut Draw::new(seed, "arrivals"));
        if let Some((on, off)) = self.bursts {
            // What came evenly comes in the first part of each round, as much faster.
            let round = on + off;
            for at in &mut arrivals {
                let within = at.seconds() % round;
                *at = Time::from_seconds(at.seconds() - within + within * on / round);
            }
        }
        let (mut inputs, mut outputs) = (Draw::new(seed, "inputs"), Draw::new(seed, "outputs"));
        let sessions = arrivals.into_iter().enumerate().map(|(number, at)| {
            let (input, output) = (self.input.draw(16, &mut inputs), self.output.draw(2, &mut outputs));
            single(at, number as u64, input, output)
        });
        sessions.collect()
    }
}

/// A session of one request that is like no other.
pub(super) fn single(at: Time, number: u64, input_tokens: u32, output_tokens: u32) -> Session {
    let turn = Turn {
        new: vec![Piece { name: name(Kind::User, number, 0), tokens: input_tokens }],
        answer: Piece { name: name(Kind::Answer, number, 0), tokens: output_tokens },
        think: Time::ZERO,
    };
    Session { at, key: number, tenant: 0, turns: vec![turn] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_lognormal() {
        let of = |median| Lengths { median, sigma: 0.4 };
        let fresh = Fresh { input: of(4000.0), output: of(200.0), bursts: None };
        let sessions = fresh.sessions(100.0, Time::from_seconds(200.0), 1);
        let mut inputs: Vec<u32> = sessions.iter().map(|session| session.prompt_tokens(0)).collect();
        inputs.sort_unstable();
        let at = |share: f64| f64::from(inputs[(share * inputs.len() as f64) as usize]);
        assert!((at(0.5) / 4000.0 - 1.0).abs() < 0.02);
        // One sigma above the median.
        assert!((at(0.8413) / (4000.0 * 0.4_f64.exp()) - 1.0).abs() < 0.02);
    }

    #[test]
    fn bursts_bring_the_same_rate_in_a_part_of_the_time() {
        let of = |median| Lengths { median, sigma: 0.4 };
        let fresh = Fresh { input: of(4000.0), output: of(200.0), bursts: Some((5.0, 15.0)) };
        let sessions = fresh.sessions(10.0, Time::from_seconds(2000.0), 1);
        assert!((sessions.len() as f64 / 20_000.0 - 1.0).abs() < 0.03);
        assert!(sessions.iter().all(|session| session.at.seconds() % 20.0 <= 5.0));
        assert!(sessions.is_sorted_by_key(|session| session.at));
    }
}
