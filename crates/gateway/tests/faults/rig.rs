//! An orchestrator, doubles, and requests as tokens.

use std::{future::poll_fn, sync::Arc, time::Duration};

use forebay_engine_wire::object::Object;
use forebay_engines::{
    ClientBody, ClientRoute, Launch,
    remote::{
        AttachSettings, HeldKv, ObserveSettings, RemoteContext, RemoteLauncher, RemoteLimits, RemoteSpec,
        TokenizerProbe,
        client::{ClientSettings, HttpClient},
    },
};
use forebay_gateway::{
    metrics::Metrics,
    orchestrator::{
        Orchestrator, OrchestratorSettings,
        api::{EngineStatus, GenerateRequest, Orchestrate, PromptUnit, Response, ResponseEvent},
    },
};
use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_testkit::{KvEventOptions, VllmDouble, VllmOptions, continuation, tokenizer};
use forebay_types::{Sampling, TokenId};
use tokio::{
    runtime::Handle,
    time::{interval, timeout},
};

/// Bound on hanging, not a measurement.
const PATIENCE: Duration = Duration::from_secs(100);

pub(crate) fn options() -> VllmOptions {
    VllmOptions {
        kv_events: Some(KvEventOptions::default()),
        prompt_tokens_details: true,
        eos_one_in: 0,
        step: Duration::from_millis(2),
        ..VllmOptions::default()
    }
}

/// Some blocks of text, different for each number.
pub(crate) fn prompt(number: u32) -> Vec<TokenId> {
    tokenizer::encode(&format!("{number}: a river runs past the mill, the town and the hill to the wide sea"))
}

pub(crate) fn expected(prompt: &[TokenId], count: usize) -> Vec<TokenId> {
    continuation(options().model_seed, prompt, count)
}

struct Probe;

impl TokenizerProbe for Probe {
    fn prompt(&self, text: &str) -> Result<Vec<TokenId>, String> {
        Ok(tokenizer::encode(text))
    }

    fn chat(&self, messages: &[(&str, &str)]) -> Result<Vec<TokenId>, String> {
        let owned = |(role, content): &(&str, &str)| ((*role).to_owned(), (*content).to_owned());
        let messages: Vec<_> = messages.iter().map(owned).collect();
        Ok(tokenizer::encode(&tokenizer::render_chat(&messages, true)))
    }
}

pub(crate) struct Rig {
    pub(crate) orchestrator: Orchestrator,
    pub(crate) doubles: Vec<VllmDouble>,
}

impl Rig {
    /// Doubles, attached and ready.
    pub(crate) async fn start(options: Vec<VllmOptions>) -> Self {
        let hasher = BlockHasher::new(HashKey::GOLDEN, 16);
        let context = Arc::new(RemoteContext {
            client: HttpClient::new(&ClientSettings::default()).expect("a client"),
            hasher,
            attach: AttachSettings::default(),
            observe: ObserveSettings::default(),
            limits: RemoteLimits::default(),
            runtime: Handle::current(),
            rooms: Arc::new(|| 4),
            held: HeldKv::new(),
        });
        let mut doubles = Vec::new();
        for options in options {
            doubles.push(VllmDouble::start(options).await);
        }
        let launchers = doubles.iter().map(|double| {
            let mut spec = RemoteSpec::new(double.url());
            spec.tokenizer = Some(Arc::new(Probe));
            Arc::new(RemoteLauncher::new(spec, context.clone()).expect("a URL")) as Arc<dyn Launch>
        });
        let orchestrator = Orchestrator::start(
            OrchestratorSettings::default(),
            launchers.collect(),
            hasher,
            Arc::new(Metrics::new()),
            &Handle::current(),
        );
        let rig = Self { orchestrator, doubles };
        rig.until(|engines| engines.iter().all(|engine| engine.state == "ready")).await;
        rig
    }

    pub(crate) async fn until(&self, reached: impl Fn(&Vec<EngineStatus>) -> bool) {
        let look = async {
            let mut tick = interval(Duration::from_millis(10));
            while !reached(&self.orchestrator.engines()) {
                tick.tick().await;
            }
        };
        assert!(timeout(PATIENCE, look).await.is_ok(), "not reached: {:?}", self.orchestrator.engines());
    }

    pub(crate) async fn until_state(&self, engine: usize, state: &str) {
        self.until(|engines| engines[engine].state == state).await;
    }

    fn submit(&self, prompt: &[TokenId], count: usize) -> Result<Response, String> {
        self.submit_of(prompt, None, count)
    }

    /// The tokens of a text, and the text to be audited by.
    pub(crate) async fn ask_audited(&self, text: &str, count: usize) -> Result<Vec<TokenId>, String> {
        let json = serde_json::json!({"prompt": text, "max_tokens": count}).to_string();
        let json = Object::parse(json).expect("an object");
        let words = ClientBody { route: ClientRoute::Completions, json, streams: false };
        let response = self.submit_of(&tokenizer::encode(text), Some(Arc::new(words)), count)?;
        Answer { response, tokens: Vec::new() }.read().await
    }

    fn submit_of(
        &self,
        prompt: &[TokenId],
        audit: Option<Arc<ClientBody>>,
        count: usize,
    ) -> Result<Response, String> {
        let request = GenerateRequest {
            id: "asked".into(),
            tenant: "test".into(),
            salt: "".into(),
            model: self.orchestrator.models().first().expect("a model is served").id.clone(),
            prompt: prompt.into(),
            unit: PromptUnit::Tokens,
            body: None,
            audit,
            choices: 1,
            sampling: Sampling {
                temperature: 0.0,
                top_p: 1.0,
                top_k: 0,
                seed: 0,
                output_tokens_max: count as u32,
                stop_tokens: [].into(),
                logprobs: None,
            },
            sampling_is_particular: false,
        };
        self.orchestrator.submit(request).map_err(|error| error.to_string())
    }

    /// A whole answer, or its error.
    pub(crate) async fn ask(&self, prompt: &[TokenId], count: usize) -> Result<Vec<TokenId>, String> {
        Answer { response: self.submit(prompt, count)?, tokens: Vec::new() }.read().await
    }

    /// An answer that has begun, and who gives it.
    pub(crate) async fn begin(&self, prompt: &[TokenId], count: usize) -> (Answer, usize) {
        let mut answer =
            Answer { response: self.submit(prompt, count).expect("it has a place"), tokens: Vec::new() };
        let begun = async {
            while answer.tokens.is_empty() {
                assert!(answer.more().await.is_ok_and(|more| more), "it ended early");
            }
        };
        timeout(PATIENCE, begun).await.expect("it begins");
        let asked = |double: &VllmDouble| double.seen().iter().any(|seen| seen.body["max_tokens"] == count);
        let busy = self.doubles.iter().position(asked).expect("one of them was asked");
        (answer, busy)
    }

    pub(crate) async fn assert_nothing_is_held(&self) {
        let look = async {
            let mut tick = interval(Duration::from_millis(10));
            loop {
                let leaks = self.orchestrator.leaks();
                if leaks.requests == 0 && leaks.reservations == 0 {
                    return;
                }
                tick.tick().await;
            }
        };
        assert!(timeout(PATIENCE, look).await.is_ok(), "{:?}", self.orchestrator.leaks());
    }
}

/// An answer on its way.
pub(crate) struct Answer {
    response: Response,
    tokens: Vec<TokenId>,
}

impl Answer {
    /// One batch; whether more can follow.
    async fn more(&mut self) -> Result<bool, String> {
        let mut batch = Vec::new();
        let more = poll_fn(|cx| self.response.poll_batch(cx, &mut batch)).await;
        for event in batch {
            match event {
                ResponseEvent::Token(token) => self.tokens.push(token.token),
                ResponseEvent::Failed(error) => return Err(error.to_string()),
                ResponseEvent::Finished { .. } | ResponseEvent::Reply(_) | ResponseEvent::Done(_) => {}
            }
        }
        Ok(more)
    }

    pub(crate) async fn read(mut self) -> Result<Vec<TokenId>, String> {
        let reading = async {
            while self.more().await? {}
            Ok(std::mem::take(&mut self.tokens))
        };
        timeout(PATIENCE, reading).await.expect("it ends")
    }
}
