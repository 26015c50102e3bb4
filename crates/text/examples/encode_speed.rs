//! Measures encoding by this crate, by `fastokens` and by `tokenizers`, in turns; prints one JSON object a line.
//!
//! `cargo run --release -p forebay-text --example encode_speed [family …]`
//!
//! Seconds are CPU seconds of all threads, which depend little on what else the machine does. Texts: "load", words as a
//! load generator draws them; "code", this project's own files; "scripts", sentences in many languages. "cold": each prompt
//! on a thread of its own, after a megabyte of words that do not exist was encoded on another, unmeasured; "new": one
//! prompt after the other, none twice in the life of an encoder; "same": one prompt again and again. The median of three
//! turns counts.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "its output is what an example is for")]
#![allow(clippy::unwrap_used, reason = "an example may fail")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::{error::Error, fs, path::Path, thread, time::Instant};

use common::families::{FAMILIES, Family};
use fastokens::AddedTokenPolicy;
use forebay_text::{Preference, Source, Tokenizer};
use serde_json::json;

const PROMPT_TOKENS: [usize; 2] = [8_192, 32_768];
const TURNS: usize = 3;

/// What one turn encodes of drawn texts: some milliseconds even for the fastest.
const TEXT_BYTES: usize = 2_000_000;

type Encode = Box<dyn Fn(&str) -> usize + Send + Sync>;

fn main() -> Result<(), Box<dyn Error>> {
    let asked: Vec<String> = std::env::args().skip(1).collect();
    for name in FAMILIES.iter().filter(|name| asked.is_empty() || asked.iter().any(|asked| asked == *name)) {
        let Some(family) = Family::find(name) else { continue };
        measure(name, &family.source)?;
    }
    Ok(())
}

fn measure(family: &str, source: &Source) -> Result<(), Box<dyn Error>> {
    let (started, before) = (Instant::now(), resident_kib()?);
    let fast = Tokenizer::load(source.clone(), Preference::FastIfExact)?;
    println!(
        "{}",
        json!({"family": family, "backend": format!("{:?}", fast.backend()),
               "load_seconds": started.elapsed().as_secs_f64(), "resident_mib": (resident_kib()? - before) / 1024.0})
    );
    let reference = Tokenizer::load(source.clone(), Preference::Reference)?;
    let tokens_of = |text: &str| {
        let mut tokens = Vec::new();
        fast.encode(text, &mut tokens).unwrap();
        tokens.len()
    };
    for corpus in ["load", "code", "scripts"] {
        let texts: Vec<String> = (0..TURNS).map(|turn| text(corpus, turn)).collect();
        let bytes_a_token = texts[0].len() as f64 / tokens_of(&texts[0]) as f64;
        for tokens in PROMPT_TOKENS {
            let bytes = (tokens as f64 * bytes_a_token) as usize;
            let prompts: Vec<Vec<String>> = texts.iter().map(|text| prompts(text, bytes)).collect();
            for caches in ["cold", "new", "same"] {
                let encoders = encoders(&fast, &reference, source);
                let mut seconds = vec![Vec::new(); encoders.len()];
                for (turn, prompts) in prompts.iter().enumerate() {
                    for ((name, encode), seconds) in encoders.iter().zip(&mut seconds) {
                        // The reference takes a hundred times as long and needs no precision.
                        let share = if *name == "tokenizers" { 16 } else { 1 };
                        if turn == 0 || share == 1 {
                            seconds.push(measured(encode, prompts, caches, share));
                        }
                    }
                }
                for ((name, _), seconds) in encoders.iter().zip(&mut seconds) {
                    seconds.sort_by(f64::total_cmp);
                    let a_byte = seconds[seconds.len() / 2];
                    println!(
                        "{}",
                        json!({"family": family, "text": corpus, "caches": caches, "prompt_tokens": tokens, "by": name,
                               "mb_per_cpu_second": (1e-6 / a_byte).round(),
                               "cpu_seconds_per_1000_prompts": a_byte * tokens as f64 * bytes_a_token * 1000.0})
                    );
                }
            }
        }
    }
    Ok(())
}

fn encoders(fast: &Tokenizer, reference: &Tokenizer, source: &Source) -> Vec<(&'static str, Encode)> {
    let own = |tokenizer: &Tokenizer| -> Encode {
        let tokenizer = tokenizer.clone();
        Box::new(move |text| {
            let mut tokens = Vec::with_capacity(text.len() / 3);
            tokenizer.encode(text, &mut tokens).unwrap();
            tokens.len()
        })
    };
    let mut encoders: Vec<(&'static str, Encode)> = vec![("forebay", own(fast))];
    if let Source::JsonFile(path) = source {
        let other = fastokens::Tokenizer::from_file(path).unwrap();
        let encode = move |text: &str| {
            other.encode_unpadded::<Vec<u32>>(text, false, AddedTokenPolicy::All).unwrap().len()
        };
        encoders.push(("fastokens", Box::new(encode)));
    }
    encoders.push(("tokenizers", own(reference)));
    encoders
}

/// CPU seconds a byte.
fn measured(encode: &Encode, prompts: &[String], caches: &str, share: usize) -> f64 {
    let (mut seconds, mut bytes) = (0.0, 0);
    let mut one = |prompt: &str| {
        let started = cpu_seconds();
        std::hint::black_box(encode(prompt));
        seconds += cpu_seconds() - started;
        bytes += prompt.len();
    };
    for index in 0..prompts.len().div_ceil(share) {
        match caches {
            "cold" => {
                encode(&made_up(index as u64));
                thread::scope(|scope| scope.spawn(|| one(&prompts[index])).join()).expect("it encodes");
            }
            "same" => one(&prompts[0]),
            _ => one(&prompts[index]),
        }
    }
    seconds / bytes as f64
}

/// Parts of a text, each from another place on.
fn prompts(text: &str, bytes: usize) -> Vec<String> {
    let count = (text.len() / bytes).clamp(8, 100);
    let part = |index: usize| {
        let start = text.floor_char_boundary(index * text.len() / count);
        let first = &text[start..];
        let mut part = String::with_capacity(bytes + text.len());
        part.push_str(first);
        while part.len() < bytes {
            part.push_str(text);
        }
        part.truncate(part.floor_char_boundary(bytes));
        part
    };
    (0..count).map(part).collect()
}

/// Another text for each turn.
fn text(corpus: &str, turn: usize) -> String {
    match corpus {
        "load" => load(turn as u64),
        "code" => code(turn),
        _ => scripts(turn as u64),
    }
}

/// Source files and documents of this project, others in each turn.
fn code(turn: usize) -> String {
    fn collect(folder: &Path, into: &mut Vec<std::path::PathBuf>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if path.is_dir() && !name.starts_with('.') && name != "target" {
                collect(&path, into);
            } else if [".rs", ".md", ".py", ".sh", ".toml"].iter().any(|end| name.ends_with(end)) {
                into.push(path);
            }
        }
    }
    let mut files = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."), &mut files);
    files.sort();
    files.iter().skip(turn).step_by(TURNS).filter_map(|path| fs::read_to_string(path).ok()).collect()
}

/// Words of fifteen languages in sentences of five to twenty, no two alike.
fn scripts(seed: u64) -> String {
    const LANGUAGES: [&str; 15] = [
        "the quick brown fox jumps over lazy dog while many people watch from distance because nothing else happens today",
        "der schnelle braune Fuchs springt über den faulen Hund während größere Straßen häufig Übermut verursachen können",
        "le vif renard brun saute par-dessus chien paresseux pendant que l'élève français étudie déjà à l'école où naïveté",
        "el rápido zorro marrón salta sobre perro perezoso mientras niños pequeños juegan según mañana también corazón",
        "съешь же ещё этих мягких французских булок да выпей чаю потому что завтра будет хорошая погода в городе",
        "ο γρήγορος καφέ αλεπού πηδάει πάνω από τον τεμπέλη σκύλο ενώ πολλοί άνθρωποι παρακολουθούν σήμερα",
        "الثعلب البني السريع يقفز فوق الكلب الكسول بينما يشاهد كثير من الناس من بعيد لأن شيئا آخر لا يحدث اليوم",
        "השועל החום המהיר קופץ מעל הכלב העצלן בזמן שאנשים רבים צופים מרחוק כי שום דבר אחר לא קורה היום",
        "तेज भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है जबकि बहुत से लोग दूर से देखते हैं क्योंकि आज कुछ और नहीं होता",
        "敏捷的棕色 狐狸跳过了懒狗 与此同时 许多人在远处观看 因为今天 没有发生其他事情 天气很好 我们去公园散步吧",
        "素早い茶色の 狐がのろまな 犬を飛び越える その間に 多くの人々が 遠くから見ている 今日は他に 何も起こらないからです",
        "빠른 갈색 여우가 게으른 개를 뛰어넘는 동안 많은 사람들이 멀리서 지켜보고 있습니다 오늘은 다른 일이 없기 때문입니다",
        "สุนัขจิ้งจอก สีน้ำตาล ที่รวดเร็ว กระโดดข้าม สุนัขขี้เกียจ ในขณะที่ ผู้คนมากมาย เฝ้าดู จากระยะไกล",
        "con cáo nâu nhanh nhẹn nhảy qua con chó lười biếng trong khi nhiều người đứng nhìn từ xa vì hôm nay không có gì",
        "hızlı kahverengi tilki tembel köpeğin üzerinden atlar çünkü bugün başka hiçbir şey olmuyor İstanbul'da güneşli",
    ];
    let mut draw = draws(11 + seed);
    let mut text = String::new();
    while text.len() < TEXT_BYTES {
        let words: Vec<&str> = LANGUAGES[draw(LANGUAGES.len())].split(' ').collect();
        let spaced = !words[0].starts_with(['敏', '素']);
        for index in 0..5 + draw(15) {
            text.push_str(if index > 0 && spaced { " " } else { "" });
            text.push_str(words[draw(words.len())]);
        }
        text.push_str([". ", ".\n", "? ", "。", "!\n\n"][draw(5)]);
    }
    text
}

/// English-like text: common words, rare made-up ones, numbers and punctuation.
fn load(seed: u64) -> String {
    const COMMON: &str = "the of and to in a is that for it was on are as with his they at be this have from or had by \
        word but what some we can out other were all there when up use your how said an each she which do their time \
        if will way about many then them would write like so these her long make thing see him two has look more day";
    let common: Vec<&str> = COMMON.split_whitespace().collect();
    let mut draw = draws(5 + seed);
    let mut text = String::new();
    while text.len() < TEXT_BYTES {
        match draw(20) {
            0 => text.push_str(&draw(3000).to_string()),
            1 => push_made_up(&mut text, &mut draw),
            2 => text.push_str([",", ".", ".\n", "?", " -"][draw(5)]),
            _ => text.push_str(common[draw(common.len())]),
        }
        text.push(' ');
    }
    text
}

fn made_up(seed: u64) -> String {
    let mut draw = draws(seed);
    let mut text = String::new();
    while text.len() < 1_000_000 {
        push_made_up(&mut text, &mut draw);
        text.push(' ');
    }
    text
}

fn push_made_up(text: &mut String, draw: &mut impl FnMut(usize) -> usize) {
    text.extend((0..4 + draw(5)).map(|i| ["aeiou", "bcdfglmnprst"][i % 2].as_bytes()[draw(5)] as char));
}

fn draws(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    }
}

/// Of all threads.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn resident_kib() -> Result<f64, Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
