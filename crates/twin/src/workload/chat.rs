//! Conversations of five turns that begin with one of a few system prompts.

use super::{Session, Turn, poisson};
use crate::{
    clock::Time,
    content::{Kind, Piece, name},
    draw::Draw,
};

/// Its numbers. With endless caches 81 % of all prompt tokens would be found in one.
#[derive(Debug, Clone, Copy)]
pub struct Chat {
    /// System prompts.
    pub groups: u64,
    /// Tokens of each.
    pub system_tokens: u32,
    /// Turns of a conversation.
    pub turns: u32,
    /// Tokens that the first question has beside the system prompt: a document, for one.
    pub first_tokens: u32,
    /// Tokens of each later question.
    pub new_tokens: u32,
    /// Tokens of each answer.
    pub answer_tokens: u32,
    /// Mean time from an answer to the next question; exponential.
    pub think_seconds: f64,
}

impl Default for Chat {
    fn default() -> Self {
        Self {
            groups: 16,
            system_tokens: 2000,
            turns: 5,
            first_tokens: 1000,
            new_tokens: 1000,
            answer_tokens: 200,
            think_seconds: 5.0,
        }
    }
}

impl Chat {
    /// Agents: many short turns, as fast as tools answer, after one of four long lists of tools.
    pub const AGENT: Self = Self {
        groups: 4,
        system_tokens: 6000,
        turns: 20,
        first_tokens: 400,
        new_tokens: 600,
        answer_tokens: 120,
        think_seconds: 2.0,
    };

    /// Three questions about a long document.
    pub const DOCUMENT: Self = Self {
        groups: 4,
        system_tokens: 400,
        turns: 3,
        first_tokens: 30_000,
        new_tokens: 60,
        answer_tokens: 300,
        think_seconds: 20.0,
    };

    /// Sessions that bring `rate` requests a second, all turns counted, once the first ones have got to their last.
    pub fn sessions(&self, rate: f64, end: Time, seed: u64) -> Vec<Session> {
        let arrivals = poisson(rate / f64::from(self.turns), end, &mut Draw::new(seed, "arrivals"));
        let (mut groups, mut thinking) = (Draw::new(seed, "groups"), Draw::new(seed, "think times"));
        let sessions = arrivals.into_iter().enumerate().map(|(number, at)| {
            let (number, group) = (number as u64, groups.below(self.groups));
            let system = Piece { name: name(Kind::System, group, 0), tokens: self.system_tokens };
            let turns = (0..self.turns).map(|turn| {
                let part = |kind, tokens| Piece { name: name(kind, number, u64::from(turn)), tokens };
                let user = part(Kind::User, if turn == 0 { self.first_tokens } else { self.new_tokens });
                Turn {
                    new: if turn == 0 { vec![system, user] } else { vec![user] },
                    answer: part(Kind::Answer, self.answer_tokens),
                    think: Time::from_seconds(thinking.exponential(self.think_seconds)),
                }
            });
            Session { at, key: number, tenant: 0, turns: turns.collect() }
        });
        sessions.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_grow_by_question_and_answer_and_share_a_system_prompt() {
        let sessions = Chat::default().sessions(50.0, Time::from_seconds(100.0), 3);
        assert!((sessions.len() as f64 - 1000.0).abs() < 100.0);
        let session = &sessions[17];
        let lengths: Vec<u32> = (0..5).map(|turn| session.prompt_tokens(turn)).collect();
        assert_eq!(lengths, [3000, 4200, 5400, 6600, 7800]);
        let mut systems: Vec<u64> = sessions.iter().map(|session| session.turns[0].new[0].name).collect();
        systems.sort_unstable();
        systems.dedup();
        assert_eq!(systems.len(), 16);
    }

    #[test]
    fn a_higher_rate_asks_the_same_questions_sooner() {
        let at = |rate| Chat::default().sessions(rate, Time::from_seconds(50.0), 3);
        let (slow, fast) = (at(10.0), at(20.0));
        assert_eq!(slow[3].turns, fast[3].turns);
        assert!(slow[3].at > fast[3].at);
    }
}
