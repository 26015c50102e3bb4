//! What is asked: texts of common words, from a seed.
//!
//! Invariant: a text depends on seed, shape and its place (session and turn) alone.

use forebay_twin::{Draw, mix};

/// Words that the vocabularies of common models hold whole, with the space before them: one is about one token.
const WORDS: [&str; 128] = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
    "car",
    "city",
    "name",
    "team",
    "minute",
    "idea",
    "body",
    "back",
    "parent",
    "face",
    "level",
    "office",
    "door",
    "health",
    "person",
    "art",
    "war",
    "history",
    "party",
    "result",
    "change",
    "morning",
    "reason",
    "research",
    "girl",
    "moment",
    "air",
    "teacher",
    "force",
    "education",
    "foot",
    "boy",
    "age",
    "policy",
    "music",
    "market",
    "sense",
    "nation",
    "plan",
    "college",
    "interest",
    "death",
    "course",
    "someone",
    "experience",
    "behind",
    "effect",
    "use",
    "class",
    "control",
    "field",
    "development",
    "role",
    "effort",
    "rate",
    "heart",
    "drug",
    "show",
    "leader",
    "light",
    "voice",
    "wife",
    "police",
    "mind",
    "price",
];

/// How long texts are and what they share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Words of a turn's own text.
    pub prompt_tokens: u32,
    /// Words of a group's system prompt; 0 for none.
    pub shared_tokens: u32,
    /// Groups of sessions with one system prompt each; at least 1.
    pub groups: u32,
}

/// The texts of one run.
#[derive(Debug, Clone, Copy)]
pub struct Prompts {
    seed: u64,
    shape: Shape,
}

impl Prompts {
    /// The texts that `seed` makes.
    pub fn new(shape: Shape, seed: u64) -> Self {
        Self { seed, shape }
    }

    /// What the sessions of this one's group share.
    pub fn system(&self, session: u64) -> Option<String> {
        let group = session % u64::from(self.shape.groups.max(1));
        let seed = derived_seed(derived_seed(self.seed, 1), group);
        (self.shape.shared_tokens > 0).then(|| words(seed, self.shape.shared_tokens))
    }

    /// What a session says in a turn.
    pub fn user(&self, session: u64, turn: u32) -> String {
        let seed = derived_seed(derived_seed(derived_seed(self.seed, 2), session), u64::from(turn));
        words(seed, self.shape.prompt_tokens)
    }
}

/// A seed of its own for part `index` of what `seed` makes.
pub fn derived_seed(seed: u64, index: u64) -> u64 {
    // One more: the finaliser leaves 0 as it is.
    mix(mix(seed.wrapping_add(1)) ^ index.wrapping_add(1).rotate_left(32))
}

fn words(seed: u64, count: u32) -> String {
    let mut draw = Draw::new(seed, "words");
    let mut text = String::with_capacity(count as usize * 7);
    for index in 0..count {
        if index > 0 {
            text.push(' ');
        }
        text.push_str(WORDS[draw.below(WORDS.len() as u64) as usize]);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn one_seed_makes_one_text_and_another_seed_another() {
        let shape = Shape { prompt_tokens: 32, shared_tokens: 16, groups: 3 };
        let (one, same, other) = (Prompts::new(shape, 1), Prompts::new(shape, 1), Prompts::new(shape, 2));
        let texts: BTreeSet<String> =
            (0..50).flat_map(|session| (0..2).map(move |turn| one.user(session, turn))).collect();
        assert_eq!(texts.len(), 100, "no two alike");
        assert!(texts.iter().all(|text| text.split(' ').count() == 32));
        assert_eq!((one.user(7, 1), one.system(4)), (same.user(7, 1), same.system(4)));
        assert_ne!(one.user(7, 1), other.user(7, 1));
        assert_eq!(one.system(1), one.system(4), "of one group");
        assert_ne!(one.system(1), one.system(2), "of two");
        assert_eq!(Prompts::new(Shape { shared_tokens: 0, ..shape }, 1).system(0), None);
    }
}
