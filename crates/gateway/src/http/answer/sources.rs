//! The responses of one request, one for each prompt, read as one.

use std::task::{Context, Poll};

use smallvec::SmallVec;

use crate::orchestrator::api::{Response, ResponseEvent, RouteError};

/// Responses that are read in turn, so that a busy one does not starve the rest.
#[derive(Debug)]
pub(crate) struct Sources {
    sources: SmallVec<[Source; 1]>,
    /// Where the next look begins.
    next: usize,
}

#[derive(Debug)]
struct Source {
    response: Response,
    ended: bool,
}

impl Sources {
    pub(crate) fn new(responses: impl IntoIterator<Item = Response>) -> Self {
        let source = |response| Source { response, ended: false };
        Self { sources: responses.into_iter().map(source).collect(), next: 0 }
    }

    /// Appends to the empty `batch` what one response has ready, and says which response. A response whose other half
    /// vanished without a last event gives a failure in its place. Pending for ever once all have ended.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>, batch: &mut Vec<ResponseEvent>) -> Poll<usize> {
        let count = self.sources.len();
        for step in 0..count {
            let index = (self.next + step) % count;
            let source = &mut self.sources[index];
            if source.ended {
                continue;
            }
            let Poll::Ready(alive) = source.response.poll_batch(cx, batch) else { continue };
            if !alive {
                let detail = "the response ended without a result".to_owned();
                batch.push(ResponseEvent::Failed(RouteError::Internal { detail }));
            }
            source.ended = matches!(batch.last(), Some(ResponseEvent::Done(_) | ResponseEvent::Failed(_)));
            self.next = (index + 1) % count;
            return Poll::Ready(index);
        }
        Poll::Pending
    }

    /// Ends one choice of one response early.
    pub(crate) fn stop_choice(&mut self, source: usize, choice: u32) {
        self.sources[source].response.stop_choice(choice);
    }

    pub(crate) fn len(&self) -> usize {
        self.sources.len()
    }
}
