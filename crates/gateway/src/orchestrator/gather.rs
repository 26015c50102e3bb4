//! Requests that wait for each other before they are placed.
//!
//! In: with whom a request is to go. Out: nothing, or a [`Departure`] to wait for. Whoever waits is woken by its own timer, or
//! earlier by the request that completes the batch.

use std::{collections::HashMap, future::Future, pin::Pin, sync::Arc, time::Duration};

use forebay_admission::Admit;
use forebay_routing::Gathered;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

/// Ends when a request is to be placed.
pub(super) type Departure = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The batch of each model that was opened last, and when it reaches its engines. Bounded: only models that are served get here.
#[derive(Default)]
pub(super) struct Gathering(HashMap<Arc<str>, (u64, watch::Sender<Duration>)>);

impl Gathering {
    /// A request for `model` was admitted (times are since `origin`). `None`: it is placed at once.
    pub(super) fn depart(
        &mut self,
        origin: Instant,
        model: &Arc<str>,
        Gathered { admit, way_seconds }: Gathered,
    ) -> Option<Departure> {
        let at = match admit {
            Admit::Now => return None,
            Admit::Wait { batch, at } => match self.0.get(model) {
                Some((number, at)) if *number == batch => at.subscribe(),
                _ => {
                    let (sender, receiver) = watch::channel(at);
                    self.0.insert(model.clone(), (batch, sender));
                    receiver
                }
            },
            Admit::Release { batch: _, at } => {
                let (_, sender) = self.0.remove(model)?;
                sender.send_replace(at);
                sender.subscribe()
            }
        };
        let way = Duration::try_from_secs_f64(way_seconds).unwrap_or_default();
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
    use forebay_admission::{GatherSettings, Gatherer};
    use forebay_placement::Sharing;

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
        let (mut gatherer, mut gathering) = (Gatherer::new(settings), Gathering::default());
        let mut arrive = |now: u64, tokens: u32, way_seconds: f64| {
            let admit = gatherer.arrive(ms(now), tokens, Some(&Sharing { way_seconds, ..SHARING }));
            gathering.depart(origin, &model, Gathered { admit, way_seconds })
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
        let (mut gatherer, mut gathering) = (Gatherer::new(settings), Gathering::default());
        let mut arrive = |now: u64, way_seconds: f64| {
            let admit = gatherer.arrive(ms(now), 100, Some(&Sharing { way_seconds, ..SHARING }));
            gathering.depart(origin, &model, Gathered { admit, way_seconds })
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
