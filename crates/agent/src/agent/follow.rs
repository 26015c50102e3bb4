//! What happens during a life, until the process ends or the agent is told to.

use forebay_proto::{EngineState, Progress as Told};
use tokio::time::{Instant, sleep_until};

use super::{Agent, Command, Followed, Life};
use crate::{
    board::LAST_WORDS_MAX,
    progress::{Progress, Stage},
    watcher::{WatchEnd, WatchNews, Watched},
};

/// Reads of the log in a row; the rest waits for the next turn.
const LOG_READS_MAX: usize = 8;

/// One thing that happened.
enum Turn {
    Command(Option<Command>),
    Drain(String),
    Watch(WatchNews),
    Log,
    Return,
    Late,
}

impl Agent {
    /// Follows a life.
    pub(super) async fn follow(&mut self, life: &mut Life) -> Followed {
        loop {
            let turn = {
                let Life { process, watcher, log_tick, serves_by, returns_at, .. } = life;
                tokio::select! {
                    biased;
                    ending = process.ended() => return Followed::Died(ending),
                    command = self.commands.recv() => Turn::Command(command),
                    Some(why) = self.drains.recv() => Turn::Drain(why),
                    news = next(watcher) => Turn::Watch(news),
                    _ = log_tick.tick() => Turn::Log,
                    () = at(*returns_at) => Turn::Return,
                    () = at(serves_by.as_ref().map(|(at, _)| *at)) => Turn::Late,
                }
            };
            match turn {
                Turn::Command(None | Some(Command::Leave)) if self.is_asked_to_stop() => {
                    return Followed::Stop("somebody asked for it by --stop-engine".to_owned());
                }
                Turn::Command(None | Some(Command::Leave)) => return Followed::Left,
                Turn::Command(Some(Command::Stop)) => {
                    return Followed::Stop("its agent was told to end it".to_owned());
                }
                Turn::Command(Some(Command::Signal(signal))) => life.process.signal(signal),
                Turn::Drain(why) => self.drain(&why),
                Turn::Watch(WatchNews::Stands(watched)) => self.stands(life, &watched),
                Turn::Watch(WatchNews::Ended(end)) => self.give_up(life, end),
                Turn::Log => self.read_log(life),
                Turn::Return => self.look_again(life),
                Turn::Late => {
                    life.killed_because = life.serves_by.take().map(|(_, why)| why);
                    life.process.kill();
                }
            }
        }
    }

    /// The request of another process of this user, which has then sent the signal to leave.
    fn is_asked_to_stop(&self) -> bool {
        std::fs::remove_file(self.folder.stop_request()).is_ok()
    }

    /// The engine takes nothing new; it runs on until it is told to end. The next agent keeps it so.
    pub(super) fn drain(&mut self, why: &str) {
        tracing::info!(engine = %self.options.engine, reason = %why, "the engine drains");
        self.shared.board.drain(why.to_owned());
        if let Some(life) = &mut self.state.life {
            life.draining = Some(why.to_owned());
            self.write_down("the drain");
        }
    }

    /// Writes the state where a failure changes nothing for this agent.
    fn write_down(&self, what: &str) {
        if let Err(error) = self.folder.write(&self.state) {
            tracing::warn!(error = &error as &dyn std::error::Error, "not written down: {what}");
        }
    }

    fn stands(&mut self, life: &mut Life, watched: &Watched) {
        let news = match watched {
            Watched::Asking => None,
            Watched::Answers(why) => life.follower.answers(why),
            Watched::Ready { began_ms } => {
                let seconds = life.began.elapsed().as_secs_f64();
                tracing::info!(engine = %self.options.engine, seconds, "the engine is ready");
                (life.was_ready, life.serves_by) = (true, None);
                // The watcher has told the gateways itself, with the facts.
                life.follower.ready();
                if let Some(state) =
                    self.state.life.as_mut().filter(|state| state.server_began_ms != *began_ms)
                {
                    state.server_began_ms = *began_ms;
                    self.write_down("when the engine's server began");
                }
                None
            }
        };
        self.tell(news);
    }

    fn tell(&self, news: Option<Progress>) {
        let Some(Progress { stage, sentence }) = news else {
            return;
        };
        let state = match stage {
            Stage::Starting | Stage::LoadingWeights => EngineState::Loading,
            Stage::Compiling => EngineState::Compiling,
            Stage::Warming => EngineState::Warming,
            Stage::Ready | Stage::Draining | Stage::Stopped | Stage::Failed => return,
        };
        tracing::info!(engine = %self.options.engine, %state, "{sentence}");
        self.shared.board.progress(Told { state, sentence });
    }

    /// The process runs, and the engine in it is not heard of any more, or is not the engine.
    fn give_up(&mut self, life: &mut Life, end: WatchEnd) {
        life.watcher = None;
        match end {
            WatchEnd::Foreign(why) => {
                life.killed_because =
                    Some(format!("it was killed: what answers at its address is not this engine ({why})"));
                life.process.kill();
            }
            WatchEnd::Lapsed(why) => {
                tracing::warn!(engine = %self.options.engine, reason = %why, "the engine's lease lapsed, its process runs");
                self.shared.board.died(&why, Vec::new());
                let limit = self.options.limits.hang_max;
                let late = format!("it did not answer for {} s and was killed: {why}", limit.as_secs());
                life.serves_by = Some((Instant::now() + limit, late));
                // Not at once: the gateways have to read of the end of this incarnation.
                life.returns_at = Some(Instant::now() + LAST_WORDS_MAX);
            }
        }
    }

    /// A process whose engine was given up may be heard again: as a new incarnation.
    fn look_again(&mut self, life: &mut Life) {
        life.returns_at = None;
        self.state.incarnation = self.shared.mint();
        self.write_down("the new incarnation");
        let program = self.options.command.first().map_or("engine", String::as_str).to_owned();
        self.present(&program, "its process runs, and it does not answer");
        life.follower = crate::progress::Follower::new(self.command.program());
        life.watcher = Some(self.watch(false));
    }

    /// Reads what the engine has printed.
    pub(super) fn read_log(&self, life: &mut Life) {
        let Life { tail, follower, .. } = life;
        for _ in 0..LOG_READS_MAX {
            let mut news = None;
            let read = tail.read(|line| {
                self.shared.log.push(line);
                news = follower.line(line).or(news.take());
                if self.options.echo {
                    tracing::info!(target: "engine", "{line}");
                }
            });
            self.tell(news);
            match read {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "the engine's log cannot be read"
                    );
                    return;
                }
            }
        }
    }
}

async fn next(watcher: &mut Option<crate::watcher::Watcher>) -> WatchNews {
    match watcher {
        Some(watcher) => watcher.next().await,
        None => std::future::pending().await,
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}
