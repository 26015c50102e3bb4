//! The prefill engine's end of the side channel: gives held KV to those who know its ids.
//!
//! Invariants: a block is sent only if its generation was the promised one before and after it was read; nothing is
//! read for a peer that has not named engine, request, shape and prompt; connections are bounded, and a silent one ends.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};

use super::{
    Shared,
    held::Held,
    wire::{
        CHECK_BYTES, Hello, OK, PROTOCOL, Refusal, Request, STALE, Welcome, invalid, read_greeting,
        read_request, write_greeting,
    },
};

/// Time for the greeting.
const GREETING_TIME_MAX: Duration = Duration::from_secs(5);
/// Time that a peer may be silent between requests, or take no byte of an answer.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Time to wait after an accept that failed for want of a resource.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves until `stopping` closes.
pub(super) async fn serve(
    listener: TcpListener,
    shared: Arc<Shared>,
    connections_max: usize,
    mut stopping: watch::Receiver<()>,
) {
    let slots = Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS)));
    let mut connections = JoinSet::new();
    loop {
        let accepted = async {
            let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
            (listener.accept().await, slot)
        };
        tokio::select! {
            _ = stopping.changed() => break,
            Some(_) = connections.join_next() => {}
            (stream, slot) = accepted => match stream {
                Ok((stream, _)) => {
                    let shared = shared.clone();
                    connections.spawn(async move {
                        if let Err(error) = connection(stream, &shared).await {
                            tracing::debug!(%error, "a side-channel connection ended early");
                        }
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting on the side channel failed");
                    let _pause = timeout(ACCEPT_RETRY, std::future::pending::<()>()).await;
                }
            },
        }
    }
    connections.shutdown().await;
}

async fn connection(stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let greeted = Instant::now() + GREETING_TIME_MAX;
    let hello: Hello = timeout_at(greeted, read_greeting(&mut stream)).await??;
    let held = match admit(shared, &hello) {
        Ok(held) => held,
        Err((reason, message)) => {
            let refused = Welcome::Refused { reason, message };
            return timeout_at(greeted, write_greeting(&mut stream, &refused)).await?;
        }
    };
    let granted = Welcome::Granted { blocks: held.blocks.len() as u32 };
    timeout_at(greeted, write_greeting(&mut stream, &granted)).await??;
    while let Some(request) = timeout(SILENCE_MAX, read_request(&mut stream)).await?? {
        match request {
            Request::Read(_) if hello.only_free => return Err(invalid("a read without permission")),
            Request::Read(indices) => {
                for index in indices {
                    let piece = read_block(&held, index);
                    timeout(SILENCE_MAX, stream.write_all(&piece)).await??;
                }
                stream.flush().await?;
            }
            Request::Free => {
                if shared.held.remove(&hello.request_id).is_some() {
                    (shared.release)(held.leg);
                }
                timeout(SILENCE_MAX, stream.write_u8(OK)).await??;
                // Until the peer has read it: closing at once could throw it away.
                let _closed = timeout(SILENCE_MAX, stream.read_u8()).await;
                break;
            }
        }
    }
    Ok(())
}

fn admit(shared: &Shared, hello: &Hello) -> Result<Arc<Held>, (Refusal, String)> {
    let Hello { protocol, engine_id, request_id, shape, tokens, prompt: _, only_free } = hello;
    if *protocol != PROTOCOL {
        return Err((Refusal::Protocol, format!("this engine speaks version {PROTOCOL}, not {protocol}")));
    }
    if *engine_id != shared.engine_id {
        return Err((Refusal::WrongEngine, "the engine that held this KV is gone".to_owned()));
    }
    let held = shared.held.get(request_id, std::time::Instant::now());
    let held =
        held.ok_or((Refusal::NotHeld, "nothing is held for this request, or its lease is over".to_owned()))?;
    if *only_free {
        return Ok(held);
    }
    if *shape != shared.shape {
        let message = format!("KV of another shape: here {:?}, there {shape:?}", shared.shape);
        return Err((Refusal::OtherShape, message));
    }
    if !hello.is_of(held.prompt, held.tokens) {
        let message =
            format!("the KV is that of another prompt: {} tokens here, {tokens} there", held.tokens);
        return Err((Refusal::OtherPrompt, message));
    }
    Ok(held)
}

/// One block as it is sent: its bytes between two looks at its generation.
fn read_block(held: &Held, index: u32) -> Vec<u8> {
    let Some(block) = held.blocks.get(index as usize) else { return vec![STALE] };
    let (region, bytes) = (&held.region, held.region.layout().block_bytes as usize);
    if region.generation(block.block) != block.generation {
        return vec![STALE];
    }
    let head = 1 + CHECK_BYTES;
    let mut piece = vec![OK; head + bytes];
    region.copy_out(block.block, &mut piece[head..]);
    if region.generation_after_reads(block.block) != block.generation {
        return vec![STALE];
    }
    let check = held.prompt.check(index, &piece[head..]);
    piece[1..head].copy_from_slice(&check);
    piece
}

#[cfg(test)]
mod tests {
    use forebay_kv_move::{BlockRef, Layout, Region};
    use forebay_types::LegId;

    use super::*;
    use crate::hand_over::wire::PromptIdentity;

    #[test]
    fn a_block_that_was_rewritten_is_not_sent() {
        let region = Region::create("source", Layout { block_bytes: 64, blocks: 2 }).unwrap();
        region.set_generation(1, 5);
        region.copy_in(1, &[7; 64]);
        let held = Held {
            leg: LegId(1),
            region: region.clone(),
            blocks: [BlockRef { block: 1, generation: 5 }].into(),
            tokens: 4,
            prompt: PromptIdentity::of("m", "", &[1]),
            until: std::time::Instant::now(),
        };
        let piece = read_block(&held, 0);
        assert_eq!((piece[0], &piece[17..]), (OK, &[7; 64][..]));
        assert_eq!(piece[1..17], held.prompt.check(0, &[7; 64]));
        assert_eq!(read_block(&held, 1), [STALE], "no such block of the prompt");
        region.set_generation(1, 6);
        assert_eq!(read_block(&held, 0), [STALE]);
    }
}
