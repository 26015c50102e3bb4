//! Engines and requests of the central test.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use forebay_engines::{
    Driver, EngineLimits, KvHandle, Launch, Leg, LegEvent, LegStream, LocalEngine, Prompt, Work,
    embedded::{EmbeddedFleet, EmbeddedLauncher, Weights},
    simulated::{SimulatedFleet, SimulatedLauncher, StepCoefficients},
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_kv_move::{CopyPlan, Fault, FaultyMover, Mover, SharedMemoryMover, SharedMemorySettings};
use forebay_text::{GgufVocabulary, Tokenizer};
use forebay_types::{EngineName, Incarnation, LegId, RankLoad, Role, SampledToken, Sampling, TokenId};
use futures::{FutureExt, StreamExt, stream};

const BLOCK_TOKENS: u32 = 16;
pub(crate) const AT_ONCE: usize = 16;
const CHRONICLE: &str = include_str!("chronicle.txt");

/// What the engines compute with, and what they are asked.
pub(crate) struct Model {
    kind: Kind,
    prompts: Vec<Vec<TokenId>>,
    output_tokens: u32,
}

enum Kind {
    Embedded(Arc<Weights>),
    Simulated,
}

/// One prompt and how to answer it.
#[derive(Clone)]
pub(crate) struct Request {
    pub(crate) number: usize,
    pub(crate) prompt: Arc<[TokenId]>,
    sampling: Sampling,
}

impl Model {
    /// 64 prompts of 8 to 900 tokens on seeded random weights; every second one shares a prefix with the one before.
    pub(crate) fn tiny() -> Self {
        Self {
            kind: Kind::Embedded(Weights::random_tiny(1)),
            prompts: random_prompts(64, 256),
            output_tokens: 48,
        }
    }

    /// The same prompts for simulated engines.
    pub(crate) fn simulated() -> Self {
        Self { kind: Kind::Simulated, prompts: random_prompts(64, 256), output_tokens: 48 }
    }

    /// 12 prompts of 8 to 200 tokens of English on real weights. `None`, loudly, where they were not fetched; in
    /// continuous integration that is a failure.
    #[allow(
        clippy::disallowed_methods,
        clippy::print_stderr,
        reason = "a test asks its environment where the weights are, and says aloud that it skips"
    )]
    pub(crate) fn smollm2() -> Option<Self> {
        let given = std::env::var_os("FOREBAY_MODEL_FOLDER").map(PathBuf::from);
        let cache = || {
            let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
            Some(cache.join("forebay/models"))
        };
        let path = given.or_else(cache)?.join("SmolLM2-135M-Instruct.Q4_1.gguf");
        if !path.exists() {
            assert!(
                std::env::var_os("CI").is_none(),
                "no weights at {}: run scripts/fetch-model.sh",
                path.display()
            );
            eprintln!("SKIPPED: no weights at {}; scripts/fetch-model.sh fetches them", path.display());
            return None;
        }
        let weights = Weights::load(&path).expect("the weights load");
        let vocabulary = weights.tokenizer().clone();
        let tokenizer = Tokenizer::from_gguf_parts(GgufVocabulary {
            tokens: vocabulary.tokens,
            merges: vocabulary.merges,
            token_types: vocabulary.token_types,
            bos: vocabulary.bos,
            eos: vocabulary.eos,
            pre: vocabulary.pre,
            add_bos: vocabulary.add_bos,
            chat_template: vocabulary.chat_template,
        })
        .expect("the vocabulary loads");
        let mut text = Vec::new();
        tokenizer.encode_plain(CHRONICLE, &mut text).expect("English tokenises");
        // Prompts 0, 1, 2, ... begin at three places only, so that many share prefixes.
        let lengths = [8, 23, 47, 64, 80, 96, 111, 128, 150, 171, 190, 200];
        let begin = |number: usize| number % 3 * 20;
        let prompts =
            lengths.iter().enumerate().map(|(n, &length)| text[begin(n)..begin(n) + length].to_vec());
        Some(Self { kind: Kind::Embedded(weights), prompts: prompts.collect(), output_tokens: 24 })
    }

    pub(crate) fn requests(&self, temperature: f32) -> Vec<Request> {
        let request = |(number, prompt): (usize, &Vec<TokenId>)| Request {
            number,
            prompt: prompt.as_slice().into(),
            sampling: Sampling {
                temperature,
                top_p: if temperature > 0.0 { 0.95 } else { 1.0 },
                top_k: 0,
                seed: 1000 + number as u64,
                output_tokens_max: self.output_tokens,
                stop_tokens: [].into(),
                logprobs: None,
            },
        };
        self.prompts.iter().enumerate().map(request).collect()
    }

    /// Limits under which sixteen requests run side by side.
    pub(crate) fn roomy(&self) -> EngineLimits {
        EngineLimits {
            blocks_total: 1200,
            block_size_tokens: BLOCK_TOKENS,
            step_tokens_max: 96,
            ..EngineLimits::default()
        }
    }

    /// A pool that holds the longest request and little more.
    pub(crate) fn tight(&self, requests: &[Request]) -> EngineLimits {
        let longest = requests.iter().map(|request| request.prompt.len() as u32 + self.output_tokens).max();
        let blocks = longest.expect("there are requests").div_ceil(BLOCK_TOKENS);
        EngineLimits { blocks_total: blocks + 4, ..self.roomy() }
    }
}

fn random_prompts(count: usize, vocabulary: u64) -> Vec<Vec<TokenId>> {
    let mut state = 7_u64;
    let mut draw = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut prompts: Vec<Vec<TokenId>> = Vec::new();
    for number in 0..count {
        let length = 8 + (number * 892).div_ceil(count.max(2) - 1).min(892);
        let shared = match prompts.last() {
            Some(before) if number % 2 == 1 => before[..before.len() / 2].to_vec(),
            _ => Vec::new(),
        };
        let own = length - shared.len();
        prompts.push(shared.into_iter().chain((0..own).map(|_| draw(vocabulary) as TokenId)).collect());
    }
    prompts
}

/// Some engines of one model and the mover between them.
pub(crate) struct Rig {
    engines: Vec<Arc<dyn Driver>>,
    crash: Vec<Arc<LocalEngine>>,
    hasher: BlockHasher,
}

impl Rig {
    pub(crate) fn new(model: &Model, engines: u64, limits: &EngineLimits) -> Self {
        Self::with_faults(model, engines, limits, |_| None)
    }

    pub(crate) fn with_faults(
        model: &Model,
        engines: u64,
        limits: &EngineLimits,
        faults: impl Fn(&CopyPlan) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        let mover = SharedMemoryMover::new(SharedMemorySettings::default()).expect("threads");
        let mover: Arc<dyn Mover> = Arc::new(FaultyMover::new(Arc::new(mover), Arc::new(faults)));
        Self::with_mover(model, engines, limits, &mover)
    }

    /// Engines between which nothing moves: the mover refuses every plan.
    pub(crate) fn with_closed_mover(model: &Model, engines: u64, limits: &EngineLimits) -> Self {
        let mover = SharedMemoryMover::new(SharedMemorySettings::default()).expect("threads");
        mover.close();
        let mover: Arc<dyn Mover> = Arc::new(mover);
        Self::with_mover(model, engines, limits, &mover)
    }

    fn with_mover(model: &Model, engines: u64, limits: &EngineLimits, mover: &Arc<dyn Mover>) -> Self {
        let hasher = BlockHasher::new(HashKey::GOLDEN, BLOCK_TOKENS);
        let runtime = tokio::runtime::Handle::current();
        let mut rig = Self { engines: Vec::new(), crash: Vec::new(), hasher };
        for number in 0..engines {
            let name = EngineName::from(format!("engine-{number}"));
            let (limits, mover, runtime) = (limits.clone(), mover.clone(), runtime.clone());
            let incarnation = Incarnation(number + 1);
            let prior = StepCoefficients::CPU_TINY;
            let (driver, local) = match &model.kind {
                Kind::Embedded(weights) => {
                    let (model, weights) = ("m".into(), weights.clone());
                    let fleet = EmbeddedFleet { model, weights, limits, hasher, mover, runtime, prior };
                    let launcher = EmbeddedLauncher::new(name, Role::Both, fleet);
                    (
                        launcher.launch(incarnation).now_or_never().expect("it is here").expect("it starts"),
                        launcher.current(),
                    )
                }
                Kind::Simulated => {
                    let fleet = SimulatedFleet {
                        model: "m".into(),
                        context_tokens_max: 4096,
                        limits,
                        hasher,
                        mover,
                        runtime,
                        candidates: (0..50_000).collect(),
                        timing: prior,
                        speed: 0.0,
                    };
                    let launcher = SimulatedLauncher::new(name, Role::Both, fleet);
                    (
                        launcher.launch(incarnation).now_or_never().expect("it is here").expect("it starts"),
                        launcher.current(),
                    )
                }
            };
            rig.engines.push(driver);
            rig.crash.push(local.expect("it was just launched"));
        }
        rig
    }

    /// What an engine says of itself now: two snapshots are asked for, and the load between them is of this moment.
    pub(crate) async fn load(&self, engine: usize) -> RankLoad {
        let mut load = RankLoad::default();
        for _ in 0..2 {
            self.engines[engine].request_snapshot(0);
            loop {
                let report = self.engines[engine].reports().next().await;
                load = report.loads.last().map_or(load, |report| report.load);
                if !report.snapshots.is_empty() {
                    break;
                }
            }
        }
        load
    }

    fn leg(&self, id: u64, request: &Request, prompt: Arc<[TokenId]>, choices: Vec<u32>, work: Work) -> Leg {
        let root = self.hasher.root("m", "");
        let prompt =
            Prompt { hashes: self.hasher.chain(root, &prompt).into(), tokens: prompt, root, salt: "".into() };
        let generated = (prompt.tokens.len() - request.prompt.len()) as u32;
        let output_tokens_max = request.sampling.output_tokens_max - generated;
        let sampling = Arc::new(Sampling { output_tokens_max, ..request.sampling.clone() });
        Leg {
            id: LegId(id),
            request: "test".into(),
            dp_rank: 0,
            prompt,
            choices,
            sampling,
            work,
            body: None,
            deadline: Instant::now() + Duration::from_secs(600),
        }
    }

    fn start(&self, engine: usize, leg: Leg) -> LegStream {
        self.engines[engine].start(leg).expect("the engine takes it")
    }

    fn next_leg(&self) -> u64 {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    async fn answer(&self, engine: usize, request: &Request) -> Vec<TokenId> {
        let work = Work::Aggregated;
        let leg = self.leg(self.next_leg(), request, request.prompt.clone(), vec![0], work);
        let ended = read(self.start(engine, leg)).await;
        ended.tokens_of(0)
    }

    pub(crate) async fn one_by_one(&self, engine: usize, requests: &[Request]) -> Vec<Vec<TokenId>> {
        let mut answers = Vec::new();
        for request in requests {
            answers.push(self.answer(engine, request).await);
        }
        answers
    }

    pub(crate) async fn aggregated(&self, engine: usize, requests: &[Request]) -> Vec<Vec<TokenId>> {
        side_by_side(requests, |request| self.answer(engine, request)).await
    }

    pub(crate) async fn split(
        &self,
        prefill: usize,
        decode: usize,
        requests: &[Request],
    ) -> Vec<Vec<TokenId>> {
        side_by_side(requests, |request| async move {
            self.choices_of_split(prefill, decode, request, vec![0]).await.tokens_of(0)
        })
        .await
    }

    /// All requests run on engine 0, at most sixteen of them, until the first has some tokens; then that engine dies under all of them and each goes on
    /// on engine 1 from the tokens that it has.
    pub(crate) async fn moved(&self, requests: &[Request]) -> Vec<Vec<TokenId>> {
        let mut begun = Vec::new();
        for request in requests {
            let leg = self.leg(self.next_leg(), request, request.prompt.clone(), vec![0], Work::Aggregated);
            begun.push(self.start(0, leg));
        }
        // The first to have five tokens brings the engine down; the others have fewer, more or none.
        let mut batch = Vec::new();
        let mut first_tokens = 0;
        while first_tokens < 5 && begun[0].next_batch(&mut batch).await {
            first_tokens = batch.iter().filter(|event| matches!(event, LegEvent::Token(_))).count();
        }
        self.crash[0].crash();
        let mut answers = Vec::new();
        for (number, stream) in begun.into_iter().enumerate() {
            let mut ended =
                if number == 0 { Ended::of(std::mem::take(&mut batch)) } else { Ended::default() };
            ended.events.extend(read(stream).await.events);
            let request = &requests[number];
            let mut tokens = ended.tokens_of(0);
            if (tokens.len() as u32) < request.sampling.output_tokens_max {
                assert!(ended.is_lost(), "the engine was to die under request {number}");
                let prompt: Arc<[TokenId]> = request.prompt.iter().chain(&tokens).copied().collect();
                let leg = self.leg(self.next_leg(), request, prompt, vec![0], Work::Aggregated);
                tokens.extend(read(self.start(1, leg)).await.tokens_of(0));
            }
            answers.push(tokens);
        }
        answers
    }

    pub(crate) async fn choices_one_by_one(
        &self,
        engine: usize,
        request: &Request,
        n: u32,
    ) -> Vec<Vec<TokenId>> {
        let mut answers = Vec::new();
        for choice in 0..n {
            let work = Work::Aggregated;
            let leg = self.leg(self.next_leg(), request, request.prompt.clone(), vec![choice], work);
            answers.push(read(self.start(engine, leg)).await.tokens_of(choice));
        }
        answers
    }

    pub(crate) async fn choices_together(
        &self,
        engine: usize,
        request: &Request,
        n: u32,
    ) -> Vec<Vec<TokenId>> {
        let leg =
            self.leg(self.next_leg(), request, request.prompt.clone(), (0..n).collect(), Work::Aggregated);
        let ended = read(self.start(engine, leg)).await;
        (0..n).map(|choice| ended.tokens_of(choice)).collect()
    }

    pub(crate) async fn choices_split(
        &self,
        prefill: usize,
        decode: usize,
        request: &Request,
        n: u32,
    ) -> Vec<Vec<TokenId>> {
        let ended = self.choices_of_split(prefill, decode, request, (0..n).collect()).await;
        (0..n).map(|choice| ended.tokens_of(choice)).collect()
    }

    async fn choices_of_split(
        &self,
        prefill: usize,
        decode: usize,
        request: &Request,
        choices: Vec<u32>,
    ) -> Ended {
        let prompt = || request.prompt.clone();
        let leg = self.leg(self.next_leg(), request, prompt(), choices.clone(), Work::Prefill);
        let id = leg.id;
        let mut ended = read(self.start(prefill, leg)).await;
        let kv = ended.held().expect("a prefill leg ends with its KV held");
        let first = ended.tokens().map(|token| (token.choice, token.token)).collect();
        let leg = self.leg(self.next_leg(), request, prompt(), choices, Work::Decode { kv, first });
        let decoded = read(self.start(decode, leg)).await;
        self.engines[prefill].release_kv(id);
        let told = |event: &&LegEvent| matches!(event, LegEvent::KvArrived(_) | LegEvent::KvFailed { .. });
        assert_eq!(decoded.events.iter().filter(told).count(), 1, "a hand-over ends exactly once");
        ended.events.extend(decoded.events);
        ended
    }
}

/// Everything that a leg produced.
#[derive(Default)]
struct Ended {
    events: Vec<LegEvent>,
}

impl Ended {
    fn of(events: Vec<LegEvent>) -> Self {
        Self { events }
    }

    fn tokens(&self) -> impl Iterator<Item = &SampledToken> {
        self.events.iter().filter_map(|event| match event {
            LegEvent::Token(token) => Some(token),
            _ => None,
        })
    }

    fn tokens_of(&self, choice: u32) -> Vec<TokenId> {
        self.tokens().filter(|token| token.choice == choice).map(|token| token.token).collect()
    }

    fn held(&self) -> Option<KvHandle> {
        self.events.iter().find_map(|event| match event {
            LegEvent::Prefilled(kv) => Some(kv.clone()),
            _ => None,
        })
    }

    fn is_lost(&self) -> bool {
        self.events.iter().any(|event| matches!(event, LegEvent::Lost { .. }))
    }
}

async fn read(mut stream: LegStream) -> Ended {
    let mut events = Vec::new();
    while stream.next_batch(&mut events).await {}
    let refused = events.iter().find(|event| matches!(event, LegEvent::Refused(_)));
    assert!(refused.is_none(), "{refused:?}");
    Ended::of(events)
}

/// Sixteen at a time, answers in order.
async fn side_by_side<'a, F>(requests: &'a [Request], answer: impl Fn(&'a Request) -> F) -> Vec<Vec<TokenId>>
where
    F: Future<Output = Vec<TokenId>>,
{
    stream::iter(requests).map(answer).buffered(AT_ONCE).collect().await
}
