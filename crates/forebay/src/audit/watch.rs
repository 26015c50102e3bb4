//! Looking on: metrics every second, KV events as they come, into one recorder.
//!
//! One task an engine reads metrics, one a rank listens; the recorder has one owner. What they say waits in a bounded
//! channel, so that a burst slows the readers and costs no memory.

use std::time::{Duration, Instant};

use forebay_audit::{Limits, Recorder};
use forebay_engines::remote::{Dialled, Heard, HeardBatch, listen};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{MissedTickBehavior, sleep_until},
};

use super::fleet::{Engine, Fleet};
use crate::terminal::{Terminal, Tone, without_controls};

/// What waits for the recorder.
const NEWS_MAX: usize = 1024;
/// Time that one look at metrics may take.
const READ_MAX: Duration = Duration::from_secs(5);
/// Time that the last look may take.
const LAST_READ_MAX: Duration = Duration::from_secs(2);
/// Time that listeners have to read what was published before: 10,000 batches, what vLLM keeps, take some seconds.
const READY_MAX: Duration = Duration::from_secs(20);
/// Different things that are complained about.
const COMPLAINTS_MAX: usize = 64;

/// What a task says.
enum News {
    /// What was published before is known, and what comes is heard.
    Listening(usize),
    Heard {
        seat: usize,
        heard: HeardBatch,
    },
    Missed(u64),
    Restarted(usize),
    /// Something does not work, as a sentence; said once.
    Trouble(String),
}

/// Looks on for so long, or until Ctrl-C.
pub(super) async fn record(fleet: &Fleet, lasts: Duration, every: Duration, terminal: Terminal) -> Recorder {
    let mut watch = Watch {
        recorder: Recorder::new(fleet.seats(), Limits::default()),
        began: None,
        heard: 0,
        terminal,
        complained: Vec::new(),
    };
    let (tell, mut news) = mpsc::channel(NEWS_MAX);
    let mut listeners = JoinSet::new();
    for engine in &fleet.engines {
        for source in &engine.events {
            let seat = engine.seat + usize::from(source.dp_rank);
            listeners.spawn(hear(source.clone(), seat, engine.name.clone(), tell.clone()));
        }
    }
    drop(tell);
    watch.get_ready(listeners.len(), &mut news).await;
    let began = Instant::now();
    watch.began = Some(began);
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = sleep_until(tokio::time::Instant::now() + lasts);
    tokio::pin!(end);
    loop {
        tokio::select! {
            () = &mut end => break,
            _ = tokio::signal::ctrl_c() => break,
            _ = ticks.tick() => {
                watch.read_all(fleet, READ_MAX).await;
                terminal.progress(&watch.progress(fleet, began.elapsed(), lasts));
            }
            Some(said) = news.recv() => watch.take(said),
        }
    }
    // Events of what the last look counts are here by then.
    watch.read_all(fleet, LAST_READ_MAX).await;
    while let Ok(said) = news.try_recv() {
        watch.take(said);
    }
    terminal.progress("");
    watch.recorder
}

/// The one owner of what is recorded.
struct Watch {
    recorder: Recorder,
    /// `None`: the listeners are not ready yet, and what they bring is history.
    began: Option<Instant>,
    /// Ranks that are listened to.
    heard: usize,
    terminal: Terminal,
    /// What was said already.
    complained: Vec<String>,
}

impl Watch {
    /// Waits until so many listeners know what was published before, or cannot be ready.
    async fn get_ready(&mut self, listeners: usize, news: &mut mpsc::Receiver<News>) {
        let mut waiting = listeners;
        let ready = async {
            while waiting > 0
                && let Some(said) = news.recv().await
            {
                if matches!(said, News::Listening(_) | News::Trouble(_)) {
                    waiting -= 1;
                }
                self.take(said);
            }
        };
        tokio::select! {
            () = ready => {}
            () = sleep_until(tokio::time::Instant::now() + READY_MAX) => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    }

    /// One look at every engine, all at once.
    async fn read_all(&mut self, fleet: &Fleet, within: Duration) {
        let Some(began) = self.began else { return };
        let looks = fleet.engines.iter().map(|engine: &Engine| async move {
            engine.read(began, within).await.map_err(|error| format!("engine {}: {error:#}", engine.name))
        });
        for look in futures::future::join_all(looks).await {
            match look {
                Ok(readings) => {
                    readings.into_iter().for_each(|(seat, reading)| self.recorder.read(seat, reading));
                }
                Err(sentence) => self.complain(sentence),
            }
        }
    }

    fn take(&mut self, news: News) {
        match news {
            News::Listening(seat) => {
                self.heard += 1;
                self.recorder.listening(seat);
            }
            News::Heard { seat, heard: HeardBatch { at, is_history, batch } } => {
                let since = self.began.and_then(|began| at.checked_duration_since(began));
                let at_seconds = since.unwrap_or_default().as_secs_f64();
                self.recorder.heard(seat, at_seconds, is_history || since.is_none(), &batch);
            }
            News::Missed(batches) => self.recorder.missed(batches),
            News::Restarted(seat) => self.recorder.restarted(seat),
            News::Trouble(sentence) => self.complain(sentence),
        }
    }

    /// Says what does not work, once.
    fn complain(&mut self, what: String) {
        if !self.complained.contains(&what) && self.complained.len() < COMPLAINTS_MAX {
            self.terminal.progress("");
            let label = self.terminal.paint_err.tone(Tone::Warning, "warning:");
            self.terminal.err(&format!("{label} {}\n", without_controls(&what)));
            self.complained.push(what);
        }
    }

    fn progress(&self, fleet: &Fleet, elapsed: Duration, lasts: Duration) -> String {
        let clock = |time: Duration| format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60);
        format!(
            "looking on: {} of {}, {:.0} requests, KV events of {} of {} ranks (Ctrl-C ends it and reports)",
            clock(elapsed),
            clock(lasts),
            self.recorder.requests(),
            self.heard,
            fleet.seats()
        )
    }
}

async fn hear(source: Dialled, seat: usize, engine: String, tell: mpsc::Sender<News>) {
    let mut listener = listen(source);
    let mut is_known = false;
    while let Some(heard) = listener.next().await {
        let news = match heard {
            Heard::Listening if std::mem::replace(&mut is_known, true) => continue,
            Heard::Listening => News::Listening(seat),
            Heard::Batch(heard) => News::Heard { seat, heard },
            Heard::Missed(batches) => News::Missed(batches),
            Heard::Restarted => News::Restarted(seat),
            Heard::Unreachable(why) => {
                News::Trouble(format!("engine {engine}: its KV events cannot be heard: {why}"))
            }
        };
        if tell.send(news).await.is_err() {
            return;
        }
    }
}
