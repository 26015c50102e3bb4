//! An answer as one document.

use bytes::{Bytes, BytesMut};
use forebay_types::FinishReason;

use super::{
    Answer, Step,
    frames::{Frames, Part},
};
use crate::orchestrator::api::RouteError;

/// Waits for the end of `answer` and renders it. Dropping the future cancels what is still generated.
///
/// # Errors
/// Whatever ended the answer early; then nothing of it is shown.
pub(crate) async fn collect(answer: &mut Answer, frames: &Frames) -> Result<Bytes, RouteError> {
    let mut reasons: Vec<Option<FinishReason>> = vec![None; answer.choices.len()];
    let mut batch = Vec::new();
    loop {
        let source = answer.next_batch(&mut batch).await;
        let now = answer.observation.now();
        for event in batch.drain(..) {
            match answer.take(source, event, now) {
                Step::Quiet | Step::Text(_) => {}
                Step::Finished(index, reason) => reasons[index] = Some(reason),
                Step::Failed(error) => return Err(error),
                Step::Complete => {
                    let usage = answer.usage;
                    let mut out = BytesMut::new();
                    let choices = answer.choices.iter_mut().zip(&reasons).zip(0..);
                    let parts = choices.map(|((choice, finish), index)| Part {
                        index,
                        names_role: true,
                        text: &choice.text,
                        logprobs: choice.logprobs.as_mut(),
                        finish: *finish,
                    });
                    frames.whole(&mut out, parts, usage);
                    return Ok(out.freeze());
                }
            }
        }
    }
}
