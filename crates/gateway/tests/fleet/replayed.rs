//! A live run, told again: what decided there decides the same without sockets, threads and clocks.

use forebay_gateway::orchestrator::OrchestratorSettings;
use forebay_types::TokenId;
use futures::future::join_all;

use crate::rig::{Plan, Rig, prompt, request};

const REQUESTS: u32 = 120;

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_is_told_what_a_live_one_was_decides_the_same() {
    let settings = OrchestratorSettings { journal_max: 1 << 20, ..OrchestratorSettings::default() };
    let rig = Rig::start(Plan { settings, ..Plan::default() }).await;
    // Conversations of three turns beside each other, so that caches, queues and reservations matter; and one engine dies.
    let conversations = (0..REQUESTS / 3).map(|who| {
        let rig = &rig;
        async move {
            let mut history: Vec<TokenId> = prompt(who % 7, 300);
            for turn in 0..3 {
                history.extend(prompt(1000 + 10 * who + turn, 200));
                let answer = rig.answer(request(&format!("{who}-{turn}"), history.clone(), 1, 40)).await;
                history.extend(&answer.tokens[0]);
                if (who, turn) == (20, 1) {
                    rig.engine("sim-2").crash();
                }
            }
        }
    });
    join_all(conversations).await;
    rig.assert_nothing_leaks().await;
    let journal = rig.orchestrator.take_journal();
    assert!(journal.is_whole() && !journal.is_empty());
    let placed = journal.replay().unwrap_or_else(|differs| panic!("{differs}"));
    assert!(placed >= REQUESTS as usize, "{placed} placements");
}
