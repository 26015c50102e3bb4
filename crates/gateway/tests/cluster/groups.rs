//! Engines whose ranks step together: prompts wait to share a step, and all are answered.

use std::{sync::Arc, time::Duration};

use forebay_admission::GatherSettings;
use forebay_engine_wire::object::Object;
use forebay_engines::{ClientBody, ClientRoute};
use forebay_gateway::orchestrator::{
    ModelProfile, OrchestratorSettings,
    api::{GenerateRequest, Orchestrate, PromptUnit, ResponseEvent},
};
use forebay_perf_model::Profile;
use forebay_proto::{
    Hello,
    v1::{self, from_agent::Body},
};
use forebay_testkit::{VllmDouble, VllmOptions};
use forebay_types::Sampling;

use crate::agent::{Rig, hello};

fn group(double: &VllmDouble) -> Hello {
    let mut hello = hello("e", 7);
    hello.data_plane.url = double.url();
    let facts = hello.facts.as_mut().expect("it serves");
    facts.dp_ranks = 2;
    facts.blocks_total = 10_000;
    facts.dialect.speech.model = double.options().model.as_str().into();
    hello
}

fn request(number: usize, double: &VllmDouble) -> GenerateRequest {
    let json =
        format!(r#"{{"model":"{}","prompt":"number {number}","max_tokens":4}}"#, double.options().model);
    GenerateRequest {
        id: format!("asked-{number}").as_str().into(),
        tenant: "test".into(),
        salt: "".into(),
        model: "m".into(),
        prompt: (0..40).map(|token| token + 100 * number as u32).collect(),
        unit: PromptUnit::Text,
        body: Some(Arc::new(ClientBody {
            route: ClientRoute::Completions,
            json: Object::parse(json).expect("an object"),
            streams: false,
        })),
        audit: None,
        choices: 1,
        sampling: Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
            output_tokens_max: 4,
            stop_tokens: [].into(),
            logprobs: None,
        },
        sampling_is_particular: false,
    }
}

#[tokio::test]
async fn prompts_wait_for_each_other_and_are_all_answered() {
    let double = VllmDouble::start(VllmOptions::default()).await;
    let profile = Arc::new(Profile::built_in("h100x2-qwen3-30b-a3b").expect("it is built in"));
    let rig = Rig::start_with_settings(OrchestratorSettings {
        profiles: vec![ModelProfile { model: Some("m".into()), profile }],
        gather: GatherSettings { wait_max: Duration::from_millis(300), stall_weight: 1.0 },
        ..OrchestratorSettings::default()
    })
    .await;
    let mut agent = rig.attach(group(&double)).await;
    rig.until(|engines| engines.len() == 1 && engines[0].state == "ready").await;
    for dp_rank in 0..2 {
        let load =
            v1::RankLoad { running: 20, decoding: 20, context_tokens: 40_000, ..v1::RankLoad::default() };
        agent.send(Body::Load(v1::Load { dp_rank, load: Some(load), age_ms: 0 }));
    }
    rig.until(|engines| engines[0].load.running == 40).await;

    let answers = (0..12).map(|number| {
        let asked = rig.orchestrator.submit(request(number, &double)).expect("it is taken");
        async move {
            let (mut response, mut events) = (asked, Vec::new());
            while response.next_batch(&mut events).await {}
            events
        }
    });
    for (number, events) in futures::future::join_all(answers).await.into_iter().enumerate() {
        let done = events.iter().any(|event| matches!(event, ResponseEvent::Done(_)));
        assert!(done, "number {number}: {events:?}");
    }
    // The first two find nothing known of arrivals; the others came at once.
    assert!(rig.metrics.gathered.count() >= 8, "{}", rig.metrics.gathered.count());
    let leaks = rig.orchestrator.leaks();
    assert_eq!((leaks.requests, leaks.reservations), (0, 0));
}
