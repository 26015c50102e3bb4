//! Texts as people, programs and nobody write them, from a seed.

/// What is put together to texts: words of many languages and code, borders of splitting rules, marks and joiners.
const PIECES: &[&str] = &[
    "the",
    " of",
    " and",
    "The",
    " THE",
    "ing",
    "ation",
    " internationalization",
    "HTTPServer",
    "getElementById",
    "camelCase",
    "snake_case_name",
    " naïve",
    "Straße",
    "ÅNGSTRÖM",
    "İstanbul",
    "ıı",
    "ǅungla",
    "ﬁn",
    "слово",
    " ЖЁЛТЫЙ",
    "ξεσκεπάζω",
    "Հայերեն",
    "ქართული",
    "漢字",
    "日本語の",
    "テスト・ケース",
    "ー",
    "々",
    "〇",
    "中文,标点。",
    "한국어",
    "각",
    "العربية",
    "١٢٣",
    "שלום",
    "नमस्ते",
    "हिन्दी",
    "ภาษาไทย",
    "ខ្មែរ",
    "தமிழ்",
    "বাংলা",
    "ລາວ",
    "မြန်မာ",
    "አማርኛ",
    "ᚠᚢᚦ",
    "𐍈",
    "𝔘𝔫𝔦",
    "𝟘𝟙",
    "😀",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "👍🏽",
    "🇩🇪",
    "1️⃣",
    "❤️",
    "☺",
    "'s",
    "'S",
    "'re",
    "'LL",
    "'ſ",
    "’s",
    "''",
    " '",
    "'",
    "''d",
    "I'm",
    "don't",
    "0",
    "7",
    "42",
    "365",
    "2024",
    "1234567",
    "3.14",
    "1e-9",
    "0xFF",
    "²",
    "½",
    "Ⅳ",
    "٣",
    "१२",
    "㊿",
    "e\u{301}",
    "\u{301}",
    "a\u{308}\u{304}",
    "\u{1100}\u{1161}\u{11a8}",
    "\u{212b}",
    "\u{f900}",
    "क\u{93c}",
    "\u{20dd}",
    "\u{200d}",
    "\u{200b}",
    "\u{feff}",
    "\u{ad}",
    "\u{fe0f}",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "    ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n\n",
    "\r\n",
    "\r",
    " \n",
    "\n ",
    "\u{a0}",
    "\u{3000}",
    "\u{2003}",
    "\u{2028}",
    "\u{85}",
    "\u{b}",
    "\u{c}",
    "\u{1c}",
    "\0",
    "\u{1}",
    "\u{1b}[31m",
    "\u{7f}",
    "\u{9f}",
    "\u{fffd}",
    "\u{e000}",
    "\u{10ffff}",
    "\u{378}",
    "fn main() {",
    "});\n",
    "    return x;\n",
    "#include <stdio.h>\n",
    "<div class=\"a\">",
    "</p>",
    "&nbsp;",
    "{\"k\": [1, -2]}",
    "https://example.com/a?b=c&d",
    "C:\\Windows",
    "a@b.org",
    "--",
    "...",
    "!?",
    "!!!",
    "_",
    "__",
    "/",
    "//",
    "/\n",
    ".\n",
    "*/",
    "`",
    "```",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "<",
    ">",
    "<|",
    "|>",
    "|",
    "<｜",
    "｜>",
    "$",
    "€",
    "+=",
    "=>",
    "->",
    ",",
    ";",
    ":",
    "#",
    "\"",
    "~",
    "^",
    "%",
    "\\n",
    "▁",
    "▁▁",
    "▁the",
    ">▁",
    "<0x0A>",
    "Ġ",
    "Ċ",
    "你好",
    "我们",
    "的",
    "。",
    ",",
    "!",
    "「",
    "」",
];

/// First and last characters of blocks from which runs are drawn.
const BLOCKS: &[(u32, u32)] = &[
    (0x20, 0x7e),
    (0x20, 0x7e),
    (0x61, 0x7a),
    (0x61, 0x7a),
    (0x41, 0x5a),
    (0x30, 0x39),
    (0, 0x20),
    (0x7f, 0xa0),
    (0xa0, 0x17f),
    (0x180, 0x24f),
    (0x250, 0x2ff),
    (0x300, 0x36f),
    (0x370, 0x3ff),
    (0x400, 0x4ff),
    (0x530, 0x5ff),
    (0x600, 0x6ff),
    (0x900, 0x97f),
    (0x980, 0xdff),
    (0xe00, 0xeff),
    (0xf00, 0x109f),
    (0x10a0, 0x11ff),
    (0x1200, 0x18af),
    (0x1d00, 0x1eff),
    (0x1f00, 0x1fff),
    (0x2000, 0x206f),
    (0x2070, 0x218f),
    (0x2190, 0x2bff),
    (0x2c00, 0x2fff),
    (0x3000, 0x30ff),
    (0x3100, 0x4dff),
    (0x4e00, 0x9fff),
    (0x4e00, 0x5fff),
    (0xa000, 0xabff),
    (0xac00, 0xd7a3),
    (0xd7b0, 0xd7ff),
    (0xe000, 0xfaff),
    (0xfb00, 0xfeff),
    (0xff00, 0xffff),
    (0x1_0000, 0x1_1fff),
    (0x1_2000, 0x1_d0ff),
    (0x1_d100, 0x1_efff),
    (0x1_f000, 0x1_faff),
    (0x2_0000, 0x2_a6df),
    (0x2_f800, 0x3_134f),
    (0xe_0000, 0xe_01ef),
    (0, 0x10_ffff),
];

/// Draws texts of 64 bytes on average.
pub(crate) struct Texts<'a> {
    state: u64,
    /// Texts of added tokens.
    added: &'a [String],
    /// Texts of other tokens.
    tokens: &'a [String],
}

impl<'a> Texts<'a> {
    pub(crate) fn new(seed: u64, added: &'a [String], tokens: &'a [String]) -> Self {
        Self { state: seed, added, tokens }
    }

    pub(crate) fn next(&mut self) -> String {
        let bytes = match self.below(64) {
            0 => 600,
            1..=4 => self.below(8),
            _ => self.below(100),
        };
        let mut text = String::with_capacity(bytes + 64);
        while text.len() < bytes {
            self.piece(&mut text);
        }
        text
    }

    fn piece(&mut self, text: &mut String) {
        match self.below(24) {
            0..=9 => text.push_str(PIECES[self.below(PIECES.len())]),
            10..=14 if !self.tokens.is_empty() => text.push_str(&self.tokens[self.below(self.tokens.len())]),
            15 | 16 if !self.added.is_empty() => self.added(text),
            17 => {
                let (character, count) = (self.character(), self.below(20));
                text.extend(std::iter::repeat_n(character, count));
            }
            _ => {
                let (first, last) = BLOCKS[self.below(BLOCKS.len())];
                for _ in 0..=self.below(6) {
                    let code = first + u32::try_from(self.below((last - first + 1) as usize)).unwrap_or(0);
                    text.extend(char::from_u32(code));
                }
            }
        }
    }

    /// The text of an added token, or one like it.
    fn added(&mut self, text: &mut String) {
        let token: Vec<char> = self.added[self.below(self.added.len())].chars().collect();
        let at = self.below(token.len());
        match self.below(6) {
            0 => text.extend(&token[..at]),
            1 => text.extend(&token[at..]),
            2 => text.extend(token.iter().map(char::to_ascii_uppercase)),
            3 => text.extend(token.iter().enumerate().filter(|&(index, _)| index != at).map(|(_, c)| c)),
            _ => text.extend(token),
        }
    }

    fn character(&mut self) -> char {
        let piece = PIECES[self.below(PIECES.len())];
        piece.chars().next().unwrap_or(' ')
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        // Sebastiano Vigna's splitmix64.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }
}
