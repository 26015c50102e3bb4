//! What a gateway asks an agent: snapshots, logs, a drain.

use std::{collections::HashMap, sync::Arc};

use forebay_proto::v1::{self, from_gateway::Body};
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::orchestrator::Keeper;

/// Questions for logs that may wait for an answer at a time.
const QUESTIONS_MAX: usize = 16;

/// Messages to an agent.
pub(super) type Outbox = mpsc::Sender<Result<v1::FromGateway, Status>>;

/// Reaches whichever stream speaks for an engine at the moment.
#[derive(Default)]
pub(super) struct Asker(Mutex<Asking>);

#[derive(Default)]
struct Asking {
    outbox: Option<Outbox>,
    next: u64,
    logs: HashMap<u64, oneshot::Sender<Vec<String>>>,
}

impl Asker {
    /// From now on this stream is asked; questions to an earlier one have no answer.
    pub(super) fn speak_to(&self, outbox: Option<Outbox>) {
        let mut asking = self.0.lock();
        asking.outbox = outbox;
        asking.logs.clear();
    }

    /// Sends, unless nobody is there or the agent does not read: then what is asked will be asked again.
    pub(super) fn say(&self, body: Body) -> bool {
        let outbox = self.0.lock().outbox.clone();
        outbox.is_some_and(|outbox| outbox.try_send(Ok(body.into())).is_ok())
    }

    pub(super) fn request_snapshot(&self, dp_rank: u16) {
        self.say(Body::RequestSnapshot(v1::RequestSnapshot { dp_rank: dp_rank.into() }));
    }

    /// An agent's answer.
    pub(super) fn logs_came(&self, logs: v1::Logs) {
        let asked = self.0.lock().logs.remove(&logs.request_id);
        if let Some(asked) = asked {
            let lines = forebay_proto::logs(logs.request_id, usize::MAX, logs.lines).lines;
            let _ = asked.send(lines); // nobody waits any more
        }
    }

    fn ask_logs(&self, lines: usize) -> Result<oneshot::Receiver<Vec<String>>, &'static str> {
        let (sender, receiver) = oneshot::channel();
        let request_id = {
            let mut asking = self.0.lock();
            asking.logs.retain(|_, sender| !sender.is_closed());
            if asking.logs.len() >= QUESTIONS_MAX {
                return Err("too many ask for this log at once");
            }
            asking.next += 1;
            let id = asking.next;
            asking.logs.insert(id, sender);
            id
        };
        let lines = u32::try_from(lines).unwrap_or(u32::MAX);
        if self.say(Body::RequestLogs(v1::RequestLogs { request_id, lines })) {
            Ok(receiver)
        } else {
            Err("its agent is not connected")
        }
    }
}

impl Keeper for Arc<Asker> {
    fn logs(&self, lines: usize) -> BoxFuture<'static, Result<Vec<String>, String>> {
        let asked = self.ask_logs(lines);
        Box::pin(async move {
            let answer = asked.map_err(ToOwned::to_owned)?;
            answer.await.map_err(|_| "its agent left before it answered".to_owned())
        })
    }

    fn drain(&self) {
        self.say(Body::DrainEngine(v1::DrainEngine {}));
    }
}
