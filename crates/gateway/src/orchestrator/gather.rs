//! Requests that wait for each other before they are placed: the shell around `forebay-admission`.
//!
//! In: a request that arrived and what it could share. Out: nothing, or a [`Departure`] to wait for. Whoever waits is
//! woken by its own timer, or earlier by the request that completes the batch.

use std::{collections::HashMap, future::Future, pin::Pin, sync::Arc, time::Duration};

use forebay_admission::{Admit, GatherSettings, Gatherer};
use forebay_placement::Sharing;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

/// Ends when a request is to be placed.
pub(super) type Departure = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Who waits for whom, by model. Bounded: only models that are served get here.
pub(super) struct Gathering {
    settings: GatherSettings,
    models: HashMap<Arc<str>, OfModel>,
}

struct OfModel {
    gatherer: Gatherer,
    /// The batch that was opened last, and when it reaches its engines.
    open: Option<(u64, watch::Sender<Duration>)>,
}

impl Gathering {
    pub(super) fn new(settings: GatherSettings) -> Self {
        Self { settings, models: HashMap::new() }
    }

    /// A request for `model` arrived at `now` (since `origin`). `None`: it is placed at once.
    pub(super) fn arrive(
        &mut self,
        origin: Instant,
        now: Duration,
        model: &Arc<str>,
        prompt_tokens: u32,
        sharing: &Sharing,
    ) -> Option<Departure> {
        let of = self
            .models
            .entry(model.clone())
            .or_insert_with(|| OfModel { gatherer: Gatherer::new(self.settings), open: None });
        let at = match of.gatherer.arrive(now, prompt_tokens, Some(sharing)) {
            Admit::Now => return None,
            Admit::Wait { batch, at } => match &of.open {
                Some((number, at)) if *number == batch => at.subscribe(),
                _ => {
                    let (sender, receiver) = watch::channel(at);
                    of.open = Some((batch, sender));
                    receiver
                }
            },
            Admit::Release { batch: _, at } => {
                let (_, sender) = of.open.take()?;
                sender.send_replace(at);
                sender.subscribe()
            }
        };
        let way = Duration::try_from_secs_f64(sharing.way_seconds).unwrap_or_default();
        Some(Box::pin(departure(origin, way, at)))
    }
}

/// Until what has this way ahead must leave to be there in time.
async fn departure(origin: Instant, way: Duration, mut at: watch::Receiver<Duration>) {
    loop {
        let leaves = origin + at.borrow_and_update().saturating_sub(way);
        tokio::select! {
            () = sleep_until(leaves) => return,
            // Another batch was opened: nobody changes this one any more.
            Err(_) = at.changed() => return sleep_until(leaves).await,
            else => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARING: Sharing =
        Sharing { stall_seconds: 0.1, stalled: 40.0, step_tokens: 16_000, way_seconds: 0.005 };

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[tokio::test(start_paused = true)]
    async fn all_of_a_batch_leave_when_it_is_complete_or_its_time_has_come() {
        let (origin, model) = (Instant::now(), Arc::<str>::from("m"));
        let settings = GatherSettings { wait_max: ms(250), stall_weight: 1.0 };
        let mut gathering = Gathering::new(settings);
        let mut arrive = |now: u64, tokens: u32, way_seconds: f64| {
            let sharing = Sharing { way_seconds, ..SHARING };
            gathering.arrive(origin, ms(now), &model, tokens, &sharing)
        };
        let left = || origin.elapsed();
        assert!(arrive(0, 100, 0.005).is_none(), "nothing is known of arrivals");
        // Arrivals are 20 ms apart, so company is worth waiting for.
        let first = arrive(20, 100, 0.005).expect("it waits");
        let second = arrive(40, 100, 0.025).expect("it joins");
        second.await;
        assert_eq!(left(), ms(245), "its way is 20 ms longer");
        first.await;
        assert_eq!(left(), ms(265), "both arrive at 270 ms");

        let waits = arrive(280, 100, 0.005).expect("it waits");
        let completes = arrive(300, 20_000, 0.025).expect("its way is the longest, so it leaves now");
        completes.await;
        assert_eq!(left(), ms(300));
        waits.await;
        assert_eq!(left(), ms(320), "called earlier than 530 ms");
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_that_another_follows_still_leaves() {
        let (origin, model) = (Instant::now(), Arc::<str>::from("m"));
        let settings = GatherSettings { wait_max: ms(100), stall_weight: 1.0 };
        let mut gathering = Gathering::new(settings);
        let mut arrive = |now: u64, way_seconds: f64| {
            gathering.arrive(origin, ms(now), &model, 100, &Sharing { way_seconds, ..SHARING })
        };
        assert!(arrive(0, 0.0).is_none());
        let first = arrive(20, 0.0).expect("it waits");
        let late = arrive(40, 0.09).expect("it opens the next batch, since it would not be there in time");
        late.await;
        assert_eq!(origin.elapsed(), ms(50), "90 ms before 140");
        first.await;
        assert_eq!(origin.elapsed(), ms(120));
    }
}
