//! What is asked, and when: sessions of one or more turns.
//!
//! In: a scenario's numbers and a seed, or a file. Out: [`Session`]s in order of their first arrival. What arrives later
//! depends on the answers (a turn comes some time after the end of the one before), everything else is fixed here, so
//! every policy is asked the same.

mod chat;
mod clients;
mod fresh;
mod recorded;
mod stand_in;
mod trace;

use crate::{clock::Time, content::Piece, draw::Draw};

pub use chat::Chat;
pub use clients::{ClientError, ClientMix, Excerpt};
pub use fresh::{Fresh, Lengths};
pub use recorded::{Measured, recorded};
pub use stand_in::StandIn;
pub use trace::{Observed, Trace, TraceError, TraceForm, TraceRequest};

/// A conversation; often of one turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    /// When its first turn is sent.
    pub at: Time,
    /// What a sticky router would hash.
    pub key: u64,
    /// Whose it is; 0 where nobody is told apart.
    pub tenant: u32,
    /// In order.
    pub turns: Vec<Turn>,
}

/// One request of a session. Its prompt is all that was said before, and `new`.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// What is said before the answer.
    pub new: Vec<Piece>,
    /// What will be generated.
    pub answer: Piece,
    /// From the end of the turn before until this one is sent.
    pub think: Time,
}

impl Session {
    /// The pieces of a turn's prompt.
    pub fn prompt(&self, turn: usize) -> impl Iterator<Item = &Piece> + Clone {
        let before = self.turns[..turn].iter().flat_map(|turn| turn.new.iter().chain([&turn.answer]));
        before.chain(&self.turns[turn].new)
    }

    /// Tokens of a turn's prompt.
    #[cfg(test)]
    pub fn prompt_tokens(&self, turn: usize) -> u32 {
        self.prompt(turn).map(|piece| piece.tokens).sum()
    }
}

/// Moments of a Poisson process of `rate` a second, up to `end`.
pub(crate) fn poisson(rate: f64, end: Time, draw: &mut Draw) -> Vec<Time> {
    // At a rate of 0 the first gap has no end.
    let mut next = || draw.exponential(1.0 / rate);
    let moments = std::iter::successors(Some(next()), |last| Some(last + next()));
    moments.take_while(|&seconds| seconds < end.seconds()).map(Time::from_seconds).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poisson_arrivals_have_the_rate_and_the_scatter_of_a_poisson_process() {
        let end = Time::from_seconds(20_000.0);
        let moments = poisson(6.0, end, &mut Draw::new(1, "arrivals"));
        assert!((moments.len() as f64 / 120_000.0 - 1.0).abs() < 0.01, "{}", moments.len());
        assert!(moments.is_sorted() && moments.iter().all(|&at| at < end));
        // Of a Poisson process the variance of counts a second is their mean.
        let mut counts = vec![0.0; 20_000];
        moments.iter().for_each(|at| counts[at.seconds() as usize] += 1.0);
        let mean = counts.iter().sum::<f64>() / 20_000.0;
        let variance = counts.iter().map(|count| (count - mean) * (count - mean)).sum::<f64>() / 20_000.0;
        assert!((variance / mean - 1.0).abs() < 0.05, "{variance} {mean}");
        assert!(poisson(0.0, end, &mut Draw::new(1, "arrivals")).is_empty());
    }

    #[test]
    fn a_turn_repeats_what_was_said() {
        let piece = |name, tokens| Piece { name, tokens };
        let turn = |new, answer| Turn { new, answer, think: Time::ZERO };
        let turns =
            vec![turn(vec![piece(1, 10), piece(2, 5)], piece(3, 7)), turn(vec![piece(4, 5)], piece(5, 7))];
        let session = Session { at: Time::ZERO, key: 0, tenant: 0, turns };
        let names: Vec<u64> = session.prompt(1).map(|piece| piece.name).collect();
        assert_eq!(names, [1, 2, 3, 4]);
        assert_eq!((session.prompt_tokens(0), session.prompt_tokens(1)), (15, 27));
    }
}
