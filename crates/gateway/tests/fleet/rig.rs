//! A real orchestrator over simulated engines, with or without HTTP in front.

use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};

use forebay_engines::{
    EngineLimits, Launch, LocalEngine,
    simulated::{SimulatedFleet, SimulatedLauncher, StepCoefficients},
};
use forebay_gateway::{
    decisions::DecisionRecord,
    metrics::Metrics,
    orchestrator::{
        Orchestrator, OrchestratorSettings,
        api::{GenerateRequest, Orchestrate, PromptUnit, Response, ResponseEvent, RouteError, Usage},
    },
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_kv_move::{Mover, SharedMemoryMover, SharedMemorySettings};
use forebay_placement::Policy;
use forebay_text::Tokenizer;
use forebay_types::{RequestId, Role, Sampling, TokenId};
use tokio::{runtime::Handle, time::timeout};

pub(crate) const MODEL: &str = "sim";
/// Longest that anything here may take; a bound on hanging, not a measurement.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// An orchestrator and a hand on each of its engines.
pub(crate) struct Rig {
    pub(crate) orchestrator: Orchestrator,
    pub(crate) metrics: Arc<Metrics>,
    launchers: Vec<Arc<SimulatedLauncher>>,
}

/// What differs from rig to rig.
pub(crate) struct Plan<'a> {
    pub(crate) roles: &'a [Role],
    pub(crate) policy: Policy,
    /// What a step takes at speed 1.
    pub(crate) timing: StepCoefficients,
    /// 0: unpaced.
    pub(crate) speed: f64,
    pub(crate) limits: EngineLimits,
    pub(crate) settings: OrchestratorSettings,
}

impl Default for Plan<'_> {
    fn default() -> Self {
        Self {
            roles: &[Role::Both; 4],
            policy: Policy::Cost,
            timing: StepCoefficients::H100_8B,
            speed: 20.0,
            limits: EngineLimits {
                blocks_total: 2048,
                step_tokens_max: 2048,
                // Longer than any wait here: held KV that nobody releases shows as a leak.
                kv_lease: 10 * PATIENCE,
                ..EngineLimits::default()
            },
            settings: OrchestratorSettings::default(),
        }
    }
}

impl Rig {
    pub(crate) async fn start(plan: Plan<'_>) -> Self {
        let hasher = BlockHasher::new(HashKey::GOLDEN, plan.limits.block_size_tokens);
        let mover: Arc<dyn Mover> =
            Arc::new(SharedMemoryMover::new(SharedMemorySettings::default()).expect("threads"));
        let fleet = SimulatedFleet {
            model: MODEL.into(),
            context_tokens_max: 131_072,
            limits: plan.limits,
            hasher,
            mover,
            runtime: Handle::current(),
            candidates: Tokenizer::bytes().plain_tokens().into(),
            timing: plan.timing,
            speed: plan.speed,
        };
        let launcher = |(number, role): (usize, &Role)| {
            Arc::new(SimulatedLauncher::new(format!("sim-{number}").into(), *role, fleet.clone()))
        };
        let launchers: Vec<_> = plan.roles.iter().enumerate().map(launcher).collect();
        let metrics = Arc::new(Metrics::new());
        let settings = OrchestratorSettings { policy: plan.policy, ..plan.settings };
        let orchestrator = Orchestrator::start(
            settings,
            launchers.iter().map(|launcher| launcher.clone() as Arc<dyn Launch>).collect(),
            hasher,
            metrics.clone(),
            &Handle::current(),
        );
        let rig = Self { orchestrator, metrics, launchers };
        let engines = plan.roles.len();
        rig.until(|rig| rig.orchestrator.engines().iter().filter(|e| e.state == "ready").count() == engines)
            .await;
        rig
    }

    /// The running life of an engine.
    pub(crate) fn engine(&self, name: &str) -> Arc<LocalEngine> {
        let launcher = self.launchers.iter().find(|launcher| launcher.name().as_str() == name);
        launcher.and_then(|launcher| launcher.current()).expect("the engine runs")
    }

    /// Waits for a state by looking again whenever something else has run.
    pub(crate) async fn until(&self, reached: impl Fn(&Self) -> bool) {
        let look = async {
            while !reached(self) {
                tokio::task::yield_now().await;
            }
        };
        assert!(timeout(PATIENCE, look).await.is_ok(), "not reached: {:?}", self.orchestrator.leaks());
    }

    pub(crate) fn submit(&self, request: GenerateRequest) -> Result<Response, RouteError> {
        self.orchestrator.submit(request)
    }

    pub(crate) async fn answer(&self, request: GenerateRequest) -> Answer {
        let response = self.submit(request).expect("it has a place");
        timeout(PATIENCE, Answer::read(response)).await.expect("it ends")
    }

    pub(crate) fn record(&self, id: &str) -> Arc<DecisionRecord> {
        self.orchestrator.decision(&RequestId::from(id)).expect("it was kept")
    }

    /// Nothing is held any more, wherever it was.
    pub(crate) async fn assert_nothing_leaks(&self) {
        self.until(|rig| {
            let leaks = rig.orchestrator.leaks();
            leaks.requests == 0 && leaks.reservations == 0 && leaks.blocks == 0
        })
        .await;
    }
}

pub(crate) fn request(
    id: &str,
    prompt: Vec<TokenId>,
    choices: u32,
    output_tokens_max: u32,
) -> GenerateRequest {
    GenerateRequest {
        id: id.into(),
        tenant: "test".into(),
        salt: "test".into(),
        model: MODEL.into(),
        prompt: prompt.into(),
        unit: PromptUnit::Tokens,
        body: None,
        audit: None,
        sampling_is_particular: true,
        choices,
        sampling: Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            seed: 5,
            output_tokens_max,
            stop_tokens: [].into(),
            logprobs: None,
        },
    }
}

/// Bytes as a prompt; the same `seed` gives the same prompt.
pub(crate) fn prompt(seed: u32, length: u32) -> Vec<TokenId> {
    (0..length).map(|i| (i.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) >> 9 & 0x7f).collect()
}

/// A whole answer.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<Vec<TokenId>>,
    pub(crate) usage: Option<Usage>,
    pub(crate) error: Option<String>,
}

impl Answer {
    pub(crate) async fn read(mut response: Response) -> Self {
        let mut answer = Self::default();
        while answer.read_some(&mut response).await {}
        answer
    }

    /// One batch; `false` after the last. Positions of each choice must rise by one.
    pub(crate) async fn read_some(&mut self, response: &mut Response) -> bool {
        let mut batch = Vec::new();
        let more = poll_fn(|cx| match response.poll_batch(cx, &mut batch) {
            Poll::Ready(more) => Poll::Ready(more),
            Poll::Pending => Poll::Pending,
        })
        .await;
        for event in batch {
            match event {
                ResponseEvent::Token(token) => {
                    let choice = token.choice as usize;
                    if self.tokens.len() <= choice {
                        self.tokens.resize(choice + 1, Vec::new());
                    }
                    self.tokens[choice].push(token.token);
                }
                ResponseEvent::Finished { .. } | ResponseEvent::Reply(_) => {}
                ResponseEvent::Done(usage) => self.usage = Some(usage),
                ResponseEvent::Failed(error) => self.error = Some(error.to_string()),
            }
        }
        more
    }
}
