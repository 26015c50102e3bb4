//! Where an engine is in its life, told from its log and its answers.
//!
//! In: log lines, whether its address answers. Out: a [`Progress`] whenever it moved on. Start at [`Follower::line`].
//! Beside it, [`last_words`] makes a sentence of how a process ended and what it logged.
//!
//! Invariants: a start-up never goes back to an earlier stage, for workers log at their own pace; log lines alone never make
//! an engine ready, being asked and answering does.

use crate::command::Program;

/// Stages in the order in which they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// The process runs; nothing is known of it yet.
    Starting,
    /// Weights are read.
    LoadingWeights,
    /// Kernels are compiled, graphs captured.
    Compiling,
    /// It answers, or is about to; it is tried out.
    Warming,
    /// It serves.
    Ready,
    /// It finishes what runs.
    Draining,
    /// It was told to end, and did.
    Stopped,
    /// It ended by itself.
    Failed,
}

/// A stage, and a sentence about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Which.
    pub stage: Stage,
    /// For people.
    pub sentence: String,
}

/// Follows one start-up.
#[derive(Debug, Clone)]
pub struct Follower {
    program: Program,
    stage: Stage,
    sentence: String,
}

impl Follower {
    /// A process that was just started.
    pub fn new(program: Program) -> Self {
        Self { program, stage: Stage::Starting, sentence: "the process starts".to_owned() }
    }

    /// Where it is.
    pub fn progress(&self) -> Progress {
        Progress { stage: self.stage, sentence: self.sentence.clone() }
    }

    /// Takes a line of the log.
    pub fn line(&mut self, line: &str) -> Option<Progress> {
        let (stage, sentence) = match self.program {
            Program::Vllm => vllm(line),
            Program::Sglang => sglang(line),
            Program::Forebay | Program::Unknown => None,
        }?;
        self.advance(stage, sentence)
    }

    /// Its address answers, but it does not serve yet; `why`, as a sentence.
    pub fn answers(&mut self, why: &str) -> Option<Progress> {
        self.advance(Stage::Warming, why.to_owned())
    }

    /// It was asked what it is, and answered.
    pub fn ready(&mut self) -> Option<Progress> {
        self.advance(Stage::Ready, String::new())
    }

    fn advance(&mut self, stage: Stage, sentence: String) -> Option<Progress> {
        let news = stage > self.stage || (stage == self.stage && sentence != self.sentence);
        if !news || self.stage > Stage::Ready {
            return None;
        }
        (self.stage, self.sentence) = (stage, sentence);
        Some(self.progress())
    }
}

type Found = Option<(Stage, String)>;

/// Lines of vLLM 0.25 to 0.32. The bars are tqdm's.
fn vllm(line: &str) -> Found {
    let has = |text: &str| line.contains(text);
    let found = |stage, sentence: &str| Some((stage, sentence.to_owned()));
    if has("checkpoint shards:") {
        return Some((Stage::LoadingWeights, bar(line, "loading weights", "shards")));
    }
    if has("Starting to load model") || has("Loading model from scratch") {
        return found(Stage::LoadingWeights, "loading weights");
    }
    if has("Loading weights took") || has("Model loading took") {
        return found(Stage::LoadingWeights, "weights are loaded");
    }
    if has("Capturing") && has("CUDA graph") {
        return Some((Stage::Compiling, bar(line, "capturing graphs", "sizes")));
    }
    if has("torch.compile")
        || has("Dynamo bytecode transform")
        || has("Compiling a graph")
        || has("Warming up model for the compilation")
    {
        return found(Stage::Compiling, "compiling");
    }
    if has("Graph capturing finished") {
        return found(Stage::Compiling, "graphs are captured");
    }
    if has("init engine (profile, create kv cache, warmup model) took") {
        return found(Stage::Warming, "the engine is up; its server starts");
    }
    if has("Starting vLLM server on")
        || has("Starting vLLM API server")
        || has("Application startup complete")
    {
        return found(Stage::Warming, "its server is up; it is being tried out");
    }
    if has("Initializing a V1 LLM engine") {
        return found(Stage::Starting, "the engine core starts");
    }
    None
}

/// Lines of SGLang 0.5.
fn sglang(line: &str) -> Found {
    let has = |text: &str| line.contains(text);
    let found = |stage, sentence: &str| Some((stage, sentence.to_owned()));
    if has("checkpoint shards:") || has("Multi-thread loading shards:") {
        return Some((Stage::LoadingWeights, bar(line, "loading weights", "shards")));
    }
    if has("Load weight begin") {
        return found(Stage::LoadingWeights, "loading weights");
    }
    if has("Load weight end") {
        return found(Stage::LoadingWeights, "weights are loaded");
    }
    if has("Capturing batches") {
        return Some((Stage::Compiling, bar(line, "capturing graphs", "sizes")));
    }
    if has("Capture") && has("begin") {
        return found(Stage::Compiling, "capturing graphs");
    }
    if has("Capture") && has("end.") {
        return found(Stage::Compiling, "graphs are captured");
    }
    if has("warmup") || has("Application startup complete") || has("Uvicorn running on") {
        return found(Stage::Warming, "its server is up; it warms up");
    }
    if has("The server is fired up and ready to roll") {
        return found(Stage::Warming, "its server is up; it is being tried out");
    }
    None
}

/// What a tqdm bar says: `label: 43%|███  | 3/7 [00:01<00:02, …]`, as `doing, 3 of 7 things`.
fn bar(line: &str, doing: &str, things: &str) -> String {
    let pair = line.rsplit('|').next().and_then(|rest| {
        let (done, all) = rest.split('[').next()?.trim().split_once('/')?;
        Some((done.trim().parse::<u32>().ok()?, all.trim().parse::<u32>().ok()?))
    });
    match pair {
        Some((done, all)) => format!("{doing}, {done} of {all} {things}"),
        None => doing.to_owned(),
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It exited with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It is gone; an agent that did not start it is not told how.
    Unknown,
}

/// A sentence about the end of an engine, with the error that it logged last.
pub fn last_words<'a>(ending: Ending, tail: impl DoubleEndedIterator<Item = &'a str>) -> String {
    let ended = match ending {
        Ending::Code(0) => "it ended by itself, exit code 0".to_owned(),
        Ending::Code(code) => format!("exit code {code}"),
        Ending::Signal(number) => format!("killed by {}", signal_name(number)),
        Ending::Unknown => "the process is gone (it was adopted, so its exit code is not known)".to_owned(),
    };
    match tail.rev().find_map(error_in) {
        Some(error) => format!("{ended}: {error}"),
        None => ended,
    }
}

fn signal_name(number: i32) -> String {
    let name = match number {
        2 => "SIGINT",
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        15 => "SIGTERM",
        _ => return format!("signal {number}"),
    };
    // The kernel's way of ending a process when memory runs out; nothing is logged then.
    let cause = if number == 9 { ", as when memory runs out" } else { "" };
    format!("{name}{cause}")
}

/// `…Error: what` in a line of a Python program's log.
fn error_in(line: &str) -> Option<&str> {
    let end = ["Error: ", "Exception: "].iter().find_map(|mark| line.find(mark))?;
    let start = line[..end].rfind(|letter: char| !(letter.is_alphanumeric() || "._".contains(letter)));
    let error = line[start.map_or(0, |at| at + line[at..].chars().next().map_or(1, char::len_utf8))..].trim();
    error.starts_with(char::is_alphabetic).then_some(error)
}

/// Whether a vLLM process ended because its NIXL connector finds no NIXL.
pub fn lacks_nixl<'a>(mut tail: impl Iterator<Item = &'a str>) -> bool {
    tail.any(|line| line.contains("NIXL is not available"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(program: Program, lines: &[&str]) -> Vec<(Stage, String)> {
        let mut follower = Follower::new(program);
        lines.iter().filter_map(|line| follower.line(line)).map(|news| (news.stage, news.sentence)).collect()
    }

    #[test]
    fn a_start_of_vllm_is_told_in_stages() {
        let lines = [
            "(APIServer pid=1) INFO 11-22 16:00:00 [utils.py:299] non-default args: {'port': 18001}",
            "(EngineCore pid=2) INFO 11-22 16:00:09 [core.py:134] Initializing a V1 LLM engine (v0.32.0) with config: model='/m'",
            "(EngineCore pid=2) INFO 11-22 16:00:20 [gpu_model_runner.py:5040] Starting to load model /m...",
            "Loading safetensors checkpoint shards:   0% Completed | 0/4 [00:00<?, ?it/s]",
            "Loading safetensors checkpoint shards:  75% Completed | 3/4 [00:01<00:00,  2.10it/s]",
            "(EngineCore pid=2) INFO 11-22 16:00:31 [default_loader.py:30] Loading weights took 2.02 seconds",
            "(EngineCore pid=2) INFO 11-22 16:00:33 [backends.py:70] Dynamo bytecode transform time: 4.61 s",
            "(EngineCore pid=2) INFO 11-22 16:00:33 [gpu_model_runner.py:5150] Model loading took 15 GiB memory and 2.3 seconds",
            "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  43%|####3     | 29/67 [00:01<00:01, 25.9it/s]",
            "(EngineCore pid=2) INFO 11-22 16:00:50 [core.py:386] init engine (profile, create kv cache, warmup model) took 20.10 s",
            "(APIServer pid=1) INFO 11-22 16:00:51 [entry.py:140] Starting vLLM server on http://127.0.0.1:18001",
            "(APIServer pid=1) INFO:     Application startup complete.",
        ];
        let expected = [
            (Stage::Starting, "the engine core starts"),
            (Stage::LoadingWeights, "loading weights"),
            (Stage::LoadingWeights, "loading weights, 0 of 4 shards"),
            (Stage::LoadingWeights, "loading weights, 3 of 4 shards"),
            (Stage::LoadingWeights, "weights are loaded"),
            (Stage::Compiling, "compiling"),
            (Stage::Compiling, "capturing graphs, 29 of 67 sizes"),
            (Stage::Warming, "the engine is up; its server starts"),
            (Stage::Warming, "its server is up; it is being tried out"),
        ];
        assert_eq!(told(Program::Vllm, &lines), expected.map(|(stage, text)| (stage, text.to_owned())));
    }

    #[test]
    fn a_start_of_sglang_is_told_in_stages() {
        let lines = [
            "[2026-11-22 16:00:00] server_args=ServerArgs(model_path='/m')",
            "[2026-11-22 16:00:09] Load weight begin. avail mem=78.50 GB",
            "Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:01<00:01,  2.10it/s]",
            "[2026-11-22 16:00:20] Load weight end. elapsed=11.0 s",
            "[2026-11-22 16:00:21] Capture decode CUDA graph begin. This can take up to several minutes.",
            "Capturing batches (bs=160 avail_mem=9.70 GB):  10%|#         | 4/39 [00:01<00:11,  3.1it/s]",
            "[2026-11-22 16:00:33] Capture decode CUDA graph end. Time elapsed: 12.00 s.",
            "[2026-11-22 16:00:34] INFO:     Uvicorn running on http://127.0.0.1:30000",
            "[2026-11-22 16:00:40] The server is fired up and ready to roll!",
        ];
        let expected = [
            (Stage::LoadingWeights, "loading weights"),
            (Stage::LoadingWeights, "loading weights, 2 of 4 shards"),
            (Stage::LoadingWeights, "weights are loaded"),
            (Stage::Compiling, "capturing graphs"),
            (Stage::Compiling, "capturing graphs, 4 of 39 sizes"),
            (Stage::Compiling, "graphs are captured"),
            (Stage::Warming, "its server is up; it warms up"),
            (Stage::Warming, "its server is up; it is being tried out"),
        ];
        assert_eq!(told(Program::Sglang, &lines), expected.map(|(stage, text)| (stage, text.to_owned())));
    }

    #[test]
    fn a_start_never_goes_back_and_a_log_never_makes_ready() {
        let mut follower = Follower::new(Program::Vllm);
        assert_eq!(follower.answers("busy").map(|news| news.stage), Some(Stage::Warming));
        assert_eq!(follower.line("Starting to load model /m..."), None, "another worker's line");
        assert_eq!(follower.answers("busy"), None, "no news");
        assert_eq!(follower.ready().map(|news| news.stage), Some(Stage::Ready));
        assert_eq!(follower.line("INFO:     Application startup complete."), None);
        assert_eq!(follower.progress().stage, Stage::Ready);
        assert_eq!(told(Program::Unknown, &["Application startup complete."]), []);
    }

    #[test]
    fn last_words_name_the_end_and_the_last_error() {
        //    ending             tail                                                             words
        let rows: [(Ending, &[&str], &str); 7] = [
            (
                Ending::Code(1),
                &["Traceback", "ValueError: bad block size", "  raise"],
                "exit code 1: ValueError: bad block size",
            ),
            (
                Ending::Code(1),
                &[
                    "(EngineCore pid=2) ERROR 11-22 16:00:00 [core.py:1510] torch.OutOfMemoryError: CUDA out of memory.",
                    "RuntimeError",
                ],
                "exit code 1: torch.OutOfMemoryError: CUDA out of memory.",
            ),
            (Ending::Signal(9), &["INFO all fine"], "killed by SIGKILL, as when memory runs out"),
            (Ending::Signal(11), &[], "killed by SIGSEGV"),
            (Ending::Signal(64), &[], "killed by signal 64"),
            (Ending::Code(0), &[], "it ended by itself, exit code 0"),
            (
                Ending::Unknown,
                &["“KeyError: 'ü'”"],
                "the process is gone (it was adopted, so its exit code is not known): KeyError: 'ü'”",
            ),
        ];
        for (ending, tail, words) in rows {
            assert_eq!(last_words(ending, tail.iter().copied()), words);
        }
    }
}
