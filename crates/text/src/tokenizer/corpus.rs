//! Texts on which the two encoders are compared when a vocabulary is loaded: what tokenizers are known to get wrong.
//! Small, since `tokenizers` encodes about 2 MB a second.

use super::vocabulary::Vocabulary;

/// Written by hand: scripts, code, numbers, white space, marks and what breaks naive rules.
const TEXTS: [&str; 24] = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog. It's what we've said they'll do; I'd say he's right, isn't it?",
    "IT'S WHAT WE'VE SAID. don''t 'tis rock'n'roll o'clock ’twas it’s",
    "Ein größeres Übel: Straße, Ärger, naïve façade, Ångström, Łódź, Ðorđe, ﬁn, İstanbul ıı",
    "Съешь же ещё этих мягких французских булок. Ελληνικά: ξεσκεπάζω τὴν ψυχοφθόρα. Հայերեն ქართული",
    "我能吞下玻璃而不伤身体。今天是2024年11月22日,星期五!「日本語」のテキスト、カタカナとひらがな。한국어도 있습니다.",
    "أنا قادر على أكل الزجاج ١٢٣٤. שלום עולם 12:30 (אבג)",
    "मैं काँच खा सकता हूँ १२३। ฉันกินกระจกได้ ๑๒๓ ខ្ញុំអាចញុំកញ្ចក់ មិនអី தமிழ் বাংলা ৪৫ ໑໒",
    "emoji: 😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇯🇵 ❤️ ☺ 1️⃣ #️⃣ 🫠",
    "combining: e\u{301} \u{301}e a\u{308}\u{304} \u{1100}\u{1161}\u{11a8} 각 Å Å ñ ñ \u{200d}\u{200b}\u{feff}x\u{ad}y",
    "fn main() {\n\tlet x: Vec<u32> = (0..10).map(|i| i * 2).collect();\n    println!(\"{x:?}\");\n}\n\n\n// end",
    "def f(x):\n    if x == 0:\n        return None  # comment\n\n\n\n    return {'a': [1, 2.5e-3, 0xFF, 1_000]}\n",
    "<div class=\"a b\">&nbsp;&lt;x&gt;</div>\r\n\r\n<!-- -->\r<p>\r\r\n</p>",
    "{\"k\": [1, -2, 3.14159, 1e10, true, null], \"s\": \"\\u00e9\\n\\\"\"}",
    "0 1 12 123 1234 12345 123456789 1,234,567.89 $12.50 50% 3/4 1st 2nd A4 b2b 2024-11-22T13:05:00Z ½ ² ₃ Ⅳ ④ ٣ 三 〇 ⅒ 𝟘𝟙 🄀",
    "a1 b 2 c  3 d   4\t5\n6 \n 7\n\n8  9   ",
    "two  spaces   three    four     five\ttab\t\ttabs \t mixed\t \n newline\n\nparagraph\n\n\n   indented\n \n  \n",
    "   leading and trailing   ",
    "no-break\u{a0}space\u{a0}\u{a0}thin\u{2009}em\u{2003}\u{2003}ideographic\u{3000}line\u{2028}par\u{2029}next\u{85}vt\u{b}ff\u{c}x",
    "nul\0soh\u{1}bel\u{7}bs\u{8}esc\u{1b}[31m del\u{7f} c1\u{80}\u{9f} repl\u{fffd} priv\u{e000}\u{f8ff} last\u{10ffff} nonchar\u{fffe}",
    "!!! ??? ... -- --- ___ *** ~~~ ### $$$ @@ && || == != <= >= -> => :: // /* */ ;;; ,,, '' \"\" `` ``` <|> <| |> <||>",
    "https://example.com/a/b?c=d&e=%20f#g user@example.com C:\\Windows\\System32 ~/.config/x.y_z-1 v1.2.3-rc.4+build",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa xyzzyxyzzyxyzzy",
];

/// From which mixtures are drawn: borders between kinds of characters are where splitting rules differ.
const PIECES: [&str; 56] = [
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n",
    "\u{a0}",
    "\u{3000}",
    "\u{2028}",
    "a",
    "the",
    " the",
    "Hello",
    "WORLD",
    "ing",
    "'s",
    "'S",
    "'ll",
    "'",
    "’s",
    "é",
    "e\u{301}",
    "ß",
    "я",
    "слово",
    "の",
    "漢字",
    "한",
    "ع",
    "ש",
    "ไ",
    "ि",
    "0",
    "7",
    "42",
    "2024",
    "٣",
    "²",
    "½",
    "Ⅳ",
    ".",
    ",",
    "!?",
    "--",
    "_",
    "(",
    "<|",
    "|>",
    "😀",
    "👍🏽",
    "\u{200d}",
    "\0",
];

const MIXTURES: usize = 120;

/// Samples made of the vocabulary's own words, and words in each: merges compete where words meet.
const WORD_SAMPLES: usize = 24;
const WORDS: usize = 24;

/// Some vocabularies have a thousand reserved tokens; the first ones stand for them.
const ADDED_TOKENS_MAX: usize = 64;

/// The texts, mixtures of pieces, the vocabulary's words, and its added tokens among them all.
pub(super) fn samples(vocabulary: &Vocabulary) -> Vec<String> {
    let added: Vec<&str> = vocabulary.added_texts().take(ADDED_TOKENS_MAX).collect();
    let mut samples: Vec<String> = TEXTS.iter().map(|&text| text.to_owned()).collect();
    for (index, token) in added.iter().enumerate() {
        let next = added[(index + 1) % added.len()];
        let cut = &token[..token.len() - token.chars().next_back().map_or(0, char::len_utf8)];
        samples.push(format!("{token}user\nHi 5 {token}{next} x{token}  {next}\n{cut}"));
    }
    samples.extend(every_byte());
    let mut state = 0x666f_7265_6261_7921;
    for index in 0..MIXTURES {
        let mut text = String::new();
        for _ in 0..4 + index % 32 {
            let draw = splitmix64(&mut state);
            let from = if draw.is_multiple_of(16) && !added.is_empty() { &added } else { &PIECES[..] };
            text.push_str(pick(from, draw >> 8));
        }
        samples.push(text);
    }
    let plain = vocabulary.plain();
    let words: Vec<&str> =
        plain.iter().filter_map(|&token| str::from_utf8(vocabulary.bytes(token)).ok()).collect();
    for _ in 0..WORD_SAMPLES {
        if !words.is_empty() {
            samples.push((0..WORDS).map(|_| pick(&words, splitmix64(&mut state))).collect());
        }
    }
    samples
}

/// Every byte that can occur in UTF-8 occurs, alone and between letters: not every vocabulary has a token for each.
fn every_byte() -> [String; 2] {
    let controls = (0..=0x7f_u32).filter(|&code| code < 0x20 || code == 0x7f);
    let two_bytes = (2..0x20).map(|lead| lead * 0x40 + lead);
    let three_bytes = (0..0x10).map(|lead| lead * 0x1000 + 0x800 + lead * 0x41);
    let four_bytes = (0..5).map(|lead| lead * 0x4_0000 + 0x1_0000 - lead * 0x4000);
    let codes = controls.chain(two_bytes).chain(three_bytes).chain(four_bytes);
    let characters: Vec<char> = codes.filter_map(char::from_u32).collect();
    [characters.iter().collect(), characters.iter().flat_map(|&c| ['t', c, 'h', 'e', ' ', c, c]).collect()]
}

fn pick<'a>(from: &[&'a str], draw: u64) -> &'a str {
    from[usize::try_from(draw % from.len() as u64).expect("an index")]
}

/// Sebastiano Vigna's generator: every load compares the same texts.
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
