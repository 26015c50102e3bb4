//! The command line.

use std::path::PathBuf;

pub const USAGE: &str = "forebay-bench-index [--blocks N] [--depth D] [--shared S] [--ranks 1,8,64,1000] \
[--queries N] [--repetitions 7] [--seed X] [--only speed,single,memory,pauses,churn,turn,soak] \
[--contenders radix-tree,crtc,forebay,forebay-steps,forebay-opaque,floor-dynamo,floor-forebay,crtc-pool] [--pause-blocks N] [--churn-seconds N] \
[--soak BLOCKS] [--core N] [--out FILE]";

#[derive(Debug, Clone)]
pub struct Options {
    /// Blocks in the stream, those that sequences share counted each time.
    pub blocks: usize,
    /// Blocks a sequence.
    pub depth: usize,
    /// Leading blocks of a sequence that come from a group.
    pub shared: usize,
    pub ranks: Vec<usize>,
    /// Look-ups a batch.
    pub queries: usize,
    pub repetitions: usize,
    pub seed: u64,
    /// Sections to run; all but the soak if empty.
    pub only: Vec<String>,
    /// Contenders to run; all but the extra ones if empty.
    pub contenders: Vec<String>,
    /// Distinct blocks up to which an index grows while single events are timed.
    pub pause_blocks: usize,
    /// Wall time of each slice of look-ups beside churn.
    pub churn_seconds: u64,
    /// Blocks that the soak stores; 0: none.
    pub soak: u64,
    /// Core for single-threaded sections; the last one if absent.
    pub core: Option<usize>,
    /// Where the JSON goes; standard output if absent.
    pub out: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            blocks: 1_000_000,
            depth: 64,
            shared: 16,
            ranks: vec![1, 8, 64, 1000],
            queries: 100_000,
            repetitions: 7,
            seed: 1,
            only: vec![],
            contenders: vec![],
            pause_blocks: 4_000_000,
            churn_seconds: 10,
            soak: 0,
            core: None,
            out: None,
        }
    }
}

fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{name} {text}: not a number"))
}

fn words(text: &str) -> Vec<String> {
    text.split(',').map(str::to_owned).collect()
}

impl Options {
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        while let Some(name) = arguments.next() {
            if name == "--help" {
                return Err(USAGE.to_owned());
            }
            let value = arguments.next().ok_or_else(|| format!("{name} needs a value\n{USAGE}"))?;
            match name.as_str() {
                "--blocks" => options.blocks = number(&name, &value)?,
                "--depth" => options.depth = number(&name, &value)?,
                "--shared" => options.shared = number(&name, &value)?,
                "--ranks" => {
                    options.ranks =
                        value.split(',').map(|each| number(&name, each)).collect::<Result<_, _>>()?;
                }
                "--queries" => options.queries = number(&name, &value)?,
                "--repetitions" => options.repetitions = number(&name, &value)?,
                "--seed" => options.seed = number(&name, &value)?,
                "--only" => options.only = words(&value),
                "--contenders" => options.contenders = words(&value),
                "--pause-blocks" => options.pause_blocks = number(&name, &value)?,
                "--churn-seconds" => options.churn_seconds = number(&name, &value)?,
                "--soak" => options.soak = number(&name, &value)?,
                "--core" => options.core = Some(number(&name, &value)?),
                "--out" => options.out = Some(value.into()),
                _ => return Err(format!("unknown option {name}\n{USAGE}")),
            }
        }
        options.validate()
    }

    fn validate(self) -> Result<Self, String> {
        if self.shared >= self.depth || self.blocks < self.depth || self.ranks.contains(&0) {
            return Err("needs shared < depth <= blocks and at least one rank".to_owned());
        }
        if self.repetitions == 0 || self.queries == 0 {
            return Err("needs at least one repetition and one query".to_owned());
        }
        let known = ["speed", "single", "memory", "pauses", "churn", "turn", "soak"];
        match self.only.iter().find(|section| !known.contains(&section.as_str())) {
            Some(section) => Err(format!("--only {section}: one of {}", known.join(", "))),
            None => Ok(self),
        }
    }

    pub fn runs(&self, section: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|listed| listed == section)
    }
}
