//! Looks at an engine about once a second: the shell around [`Pulse`].

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use forebay_engine_wire::{
    discovery::Server,
    metrics::{Figures, Pace, Scrape, read_loads, steps_between},
};
use tokio::{
    sync::Notify,
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};

use super::{
    ObservePlan, ObserveSettings, Shared,
    follow::End,
    pulse::{Look, Pulse, Verdict},
};
use crate::{
    remote::client::{Answer, Endpoint, HttpError, Limits, Unreachable},
    reports::{LoadReport, Notice, Reports},
};

/// Between two looks, whatever asks for one.
const GAP_MIN: Duration = Duration::from_millis(100);
/// Before a death is confirmed.
const CONFIRM_AFTER: Duration = Duration::from_millis(200);
/// Of an answer that only says that it is there. vLLM's and SGLang's have no body; others list their models.
const HEALTH_BYTES_MAX: usize = 1 << 20;
/// Held KV that nobody fetched before anything is made of it: whoever attaches, and `doctor`, leaves one or two behind.
const PROBES_EXPIRED_MAX: f64 = 16.0;
/// Of `/v1/loads`.
const LOADS_BYTES_MAX: usize = 1 << 20;

pub(super) struct Watch {
    endpoint: Endpoint,
    plan: ObservePlan,
    dp_ranks: u16,
    settings: ObserveSettings,
    reports: Arc<Reports>,
    trouble: Arc<Notify>,
    origin: Instant,
    pulse: Pulse,
    last: Option<(Instant, Scrape)>,
    /// What the first scrape counted.
    first: BTreeMap<u16, Figures>,
    paces: BTreeMap<u16, Pace>,
    told: Told,
}

/// What operators were told already.
#[derive(Debug, Default)]
struct Told {
    no_metrics: bool,
    transfers_failed: bool,
    holds_expired: bool,
}

impl Watch {
    pub(super) fn new(
        endpoint: Endpoint,
        plan: ObservePlan,
        dp_ranks: u16,
        settings: ObserveSettings,
        reports: Arc<Reports>,
        trouble: Arc<Notify>,
    ) -> Self {
        let pulse = Pulse::new(&settings, Duration::ZERO);
        Self {
            endpoint,
            plan,
            dp_ranks,
            settings,
            reports,
            trouble,
            origin: Instant::now(),
            pulse,
            last: None,
            first: BTreeMap::new(),
            paces: BTreeMap::new(),
            told: Told::default(),
        }
    }

    /// Until the engine is dead. The followers end with it.
    pub(super) async fn run(mut self, mut followers: JoinSet<End>, shared: Arc<Shared>) {
        let dead = loop {
            let began = Instant::now();
            if let Some(why) = self.look().await {
                break why;
            }
            let pause = if self.pulse.doubts() { CONFIRM_AFTER } else { self.settings.poll_every };
            tokio::select! {
                biased;
                Some(end) = followers.join_next(), if !followers.is_empty() => {
                    if let Some(why) = follower_ended(&end, &shared) {
                        break why;
                    }
                }
                () = self.trouble.notified() => {}
                () = sleep_until(began + pause) => {}
            }
            sleep_until(began + GAP_MIN).await;
        };
        followers.shutdown().await;
        self.reports.put_death(dead);
    }

    /// Looks once. Says why the engine is dead, if it is.
    async fn look(&mut self) -> Option<Arc<str>> {
        let asked = Instant::now();
        let deadline = self.origin + self.pulse.deadline(self.origin.elapsed());
        let limits = |body_bytes_max| Limits { body_bytes_max, deadline: deadline.into_std() };
        let ask = async |wanted: bool, path: &str, bytes: usize| match wanted {
            true => Some(self.endpoint.get(path, limits(bytes)).await),
            false => None,
        };
        let (health, metrics, loads) = tokio::join!(
            self.endpoint.get(self.plan.health, limits(HEALTH_BYTES_MAX)),
            ask(self.plan.metrics, "/metrics", self.settings.metrics_bytes_max),
            ask(self.plan.loads, "/v1/loads?include=core", LOADS_BYTES_MAX),
        );
        let told_anything = matches!(metrics, Some(Ok(_))) || matches!(loads, Some(Ok(_)));
        let mut look = self.health(health, told_anything);
        if let Some(Err(error)) = &metrics
            && look == Look::Well
            && !std::mem::replace(&mut self.told.no_metrics, true)
        {
            self.note(format!("its load is not known: {error}"));
        }
        if let Some(scrape) = scraped(metrics, loads) {
            if let Some(why) = self.restarted(&scrape) {
                return Some(why);
            }
            if scrape.asleep && look == Look::Well {
                look = Look::Idle("it sleeps: POST /wake_up wakes it".into());
            }
            self.report(asked, scrape);
        }
        match self.pulse.saw(self.origin.elapsed(), look) {
            Verdict::Same => {}
            Verdict::Silent(why) => self.reports.put_notice(Notice::Silent { why }),
            Verdict::Heard => self.reports.put_notice(Notice::Heard),
            Verdict::Dead(why) => return Some(why),
        }
        None
    }

    fn note(&self, sentence: String) {
        self.reports.put_notice(Notice::Note(sentence.into()));
    }

    /// What the health route's answer shows. `told_anything`: another route gave a good answer meanwhile.
    fn health(&self, answer: Result<Answer, HttpError>, told_anything: bool) -> Look {
        let error = match answer {
            Ok(_) => return Look::Well,
            Err(error) => error,
        };
        let why: Arc<str> = error.to_string().into();
        match error {
            // vLLM says so when its engine core is gone; the process follows.
            HttpError::Status { status: 503, .. } if self.plan.server == Server::Vllm => Look::Dead(why),
            HttpError::Status { status: 401 | 403 | 500.., .. } => Look::Idle(why),
            HttpError::Status { .. } | HttpError::TooLarge { .. } => Look::Well,
            HttpError::Unreachable { why: Unreachable::Refused, .. } => Look::Refused(why),
            _ if told_anything => Look::Well,
            HttpError::Unreachable { .. } | HttpError::BrokenOff { .. } | HttpError::TooSlow { .. } => {
                Look::Failed(why)
            }
        }
    }

    fn restarted(&self, scrape: &Scrape) -> Option<Arc<str>> {
        let restarted = match &self.last {
            Some((_, last)) => last.restarted(scrape),
            None => self.plan.started_seconds.is_some_and(|began| scrape.of_another_process(began)),
        };
        restarted.then(|| "it restarted: its metrics are of another process".into())
    }

    /// Passes on what a scrape says, and what it and the one before say together.
    fn report(&mut self, asked: Instant, scrape: Scrape) {
        let now = Instant::now();
        let ranks =
            (0..self.dp_ranks).map_while(|rank| Some((rank, self.plan.first_rank.checked_add(rank)?)));
        for (rank, its_number) in ranks {
            let Some(figures) = scrape.ranks.get(&its_number) else {
                continue;
            };
            let pace = self.paces.entry(rank).or_default();
            let before = self.last.as_ref().and_then(|(at, last)| Some((*at, *last.ranks.get(&its_number)?)));
            if let Some((at, before)) = before {
                let steps = steps_between(
                    &before,
                    figures,
                    now - at,
                    self.plan.pool,
                    self.plan.step_tokens_max,
                    pace,
                );
                self.reports.put_steps(rank, steps);
            }
            self.reports.put_load(LoadReport {
                dp_rank: rank,
                load: figures.load(self.plan.pool, pace),
                as_of: asked,
            });
        }
        if self.first.is_empty() {
            self.first.clone_from(&scrape.ranks);
        }
        let grown = |of: fn(&Figures) -> f64| -> f64 {
            let grown = |(rank, now): (&u16, &Figures)| of(now) - self.first.get(rank).map_or(0.0, of);
            scrape.ranks.iter().map(grown).sum()
        };
        let failed = grown(|it| it.transfers_failed) > 0.0;
        let expired = grown(|it| it.holds_expired) > PROBES_EXPIRED_MAX;
        if failed && !std::mem::replace(&mut self.told.transfers_failed, true) {
            self.note("transfers of KV to it fail".to_owned());
        }
        if expired && !std::mem::replace(&mut self.told.holds_expired, true) {
            self.note("KV that it held for another engine was not fetched in time".to_owned());
        }
        self.last = Some((now, scrape));
    }
}

/// Joins what the two routes say. Nothing if one that was asked did not answer: counters of one kind beside those of
/// another would look like steps.
fn scraped(
    metrics: Option<Result<Answer, HttpError>>,
    loads: Option<Result<Answer, HttpError>>,
) -> Option<Scrape> {
    let metrics = metrics.transpose().ok()?.map(|answer| Scrape::read(&answer.body));
    let loads = loads.transpose().ok()?.map(|answer| read_loads(&answer.body)).transpose().ok()?;
    match (metrics, loads) {
        (Some(metrics), Some(loads)) => Some(metrics.with_loads(&loads)),
        (metrics, loads) => metrics.or(loads),
    }
}

/// Why the engine is dead, if the end of a follower says so.
pub(super) fn follower_ended(end: &Result<End, JoinError>, shared: &Shared) -> Option<Arc<str>> {
    match end {
        Ok(End::Restarted) => Some("it restarted: its KV events begin anew".into()),
        // A panic below, in the ZMQ library: events are lost, the engine is not. Which rank it was is not told.
        Err(_) => {
            for rank in shared.ranks.keys() {
                shared.sees(*rank, Some("following its KV events failed".into()));
            }
            None
        }
    }
}
