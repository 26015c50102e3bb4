//! How an engine is ended: drained, told, and in the end killed.

use std::time::{Duration, Instant as StdInstant};

use rustix::process::Signal;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::{Agent, AgentError, Command, Life};

/// After which a gateway that was told of a drain sends nothing new. Loads that were taken before say nothing.
const DRAIN_NOTICE: Duration = Duration::from_secs(1);
/// Between two looks whether anything still runs.
const IDLE_EVERY: Duration = Duration::from_millis(100);

impl Agent {
    /// Drains the engine, tells it to end, kills it if it does not.
    pub(super) async fn stop(&mut self, life: &mut Life, why: &str) -> Result<(), AgentError> {
        self.drain(why);
        if life.was_ready {
            self.wait_idle(life).await;
        }
        tracing::info!(engine = %self.options.engine, "telling the engine to end");
        life.process.signal(Signal::TERM);
        if !self.wait_ended(life, self.options.limits.stop_max).await {
            tracing::warn!(engine = %self.options.engine, "the engine did not end; killing it");
            life.process.kill();
        }
        let ending = life.process.ended().await;
        life.killed_because = Some(format!("it was ended: {why}"));
        self.bury(life, ending)?;
        tracing::info!(engine = %self.options.engine, ?ending, "the engine has ended");
        Ok(())
    }

    /// Until nothing runs any more, the bound is reached, or somebody is impatient.
    async fn wait_idle(&mut self, life: &mut Life) {
        let noticed = StdInstant::now() + DRAIN_NOTICE;
        let until = Instant::now() + self.options.limits.drain_max;
        let mut look = interval(IDLE_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                _ = life.process.ended() => return,
                command = self.commands.recv() => match command {
                    Some(Command::Signal(signal)) => life.process.signal(signal),
                    Some(Command::Leave | Command::Stop) | None => return,
                },
                _ = life.log_tick.tick() => self.read_log(life),
                _ = look.tick() => {
                    if self.shared.board.busy(noticed) == Some(0) {
                        return;
                    }
                }
                () = sleep_until(until) => {
                    tracing::warn!(engine = %self.options.engine, "requests still run, or nobody can tell: the drain ends");
                    return;
                }
            }
        }
    }

    /// Whether the process ended in time.
    async fn wait_ended(&mut self, life: &mut Life, bound: Duration) -> bool {
        let until = Instant::now() + bound;
        let mut told = true;
        loop {
            tokio::select! {
                biased;
                _ = life.process.ended() => return true,
                command = self.commands.recv(), if told => match command {
                    Some(Command::Signal(signal)) => life.process.signal(signal),
                    Some(Command::Leave | Command::Stop) => return false,
                    None => told = false,
                },
                _ = life.log_tick.tick() => self.read_log(life),
                () = sleep_until(until) => return false,
            }
        }
    }
}
