//! Bodies that are too large, too many or too slow.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;

const MIB: usize = 1 << 20;

fn limits() -> HttpLimits {
    HttpLimits { body_bytes_max: MIB, ..patient() }
}

fn head(more: &str) -> Vec<u8> {
    format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\n{more}\r\n\r\n").into_bytes()
}

#[tokio::test]
async fn a_body_of_100_mb_is_refused_before_it_is_sent() {
    let server = Server::start(&greeter(), limits()).await;
    for more in ["content-length: 104857600", "content-length: 104857600\r\nexpect: 100-continue"] {
        let mut client = server.connect().await;
        client.write_all(&head(more)).await.unwrap();
        // Not a byte of the body was sent.
        let answer = read_until(&mut client, "body_too_large").await;
        assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("1048576 bytes"), "{answer}");
    }
    let mut endless = server.connect().await;
    endless.write_all(&head("content-length: 18446744073709551614")).await.unwrap();
    assert!(read_until(&mut endless, "\r\n").await.starts_with("HTTP/1.1 4"), "more than there are bytes");
    server.serves_another().await;
}

#[tokio::test]
async fn who_sends_100_mb_before_reading_sees_why_it_is_refused() {
    let server = Server::start(&greeter(), limits()).await;
    let declared = [head("content-length: 104857600")].into_iter().chain((0..100).map(|_| vec![b' '; MIB]));
    let chunk = [b"100000\r\n", &vec![b' '; MIB][..], b"\r\n"].concat();
    let chunked = [head("transfer-encoding: chunked")].into_iter().chain((0..100).map(|_| chunk.clone()));
    for exchange in [exchange(server.address, declared).await, exchange(server.address, chunked).await] {
        assert_eq!((exchange.status(), exchange.answers()), (413, 1), "{}", exchange.answer);
        assert!(exchange.answer.contains("body_too_large"));
        // Twice the limit, 32 MiB after the answer, and what the kernel keeps for both sides.
        assert!(exchange.taken < 64 * MIB, "{} bytes were taken", exchange.taken);
    }
    assert_eq!(server.metrics.body_bytes.get(), 0);
    server.serves_another().await;
}

/// A reset while it sends may be all that a client looks at.
#[tokio::test]
async fn who_is_refused_is_not_cut_off_while_it_sends() {
    let server = Server::start(&greeter(), limits()).await;
    let body = (0..24).map(|_| vec![b' '; MIB]);
    let exchange = exchange(server.address, [head("content-length: 25165824")].into_iter().chain(body)).await;
    assert!(exchange.taken > 24 * MIB, "cut off after {} bytes", exchange.taken);
    assert_eq!((exchange.status(), exchange.answers()), (413, 1), "{}", exchange.answer);
}

/// Writes until so much is held.
async fn hold(server: &Server, client: &mut TcpStream, declared: usize, bytes: usize) {
    client.write_all(&head(&format!("content-length: {declared}"))).await.unwrap();
    client.write_all(&vec![b' '; bytes]).await.unwrap();
    let before = bytes as i64;
    while server.metrics.body_bytes.get() < before {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn large_bodies_share_a_bound_and_small_ones_do_not_wait_for_it() {
    let server = Server::start(&greeter(), HttpLimits { bodies_bytes_max: 256 * 1024, ..limits() }).await;
    let mut slow = server.connect().await;
    hold(&server, &mut slow, 240_000, 200_000).await;
    let refused = post_raw(server.address, "/v1/completions", &vec![b' '; 100_000]).await;
    assert_eq!((refused.status(), refused.answers()), (503, 1), "{}", refused.answer);
    assert!(refused.answer.contains("retry-after: 1\r\n"), "{}", refused.answer);
    assert_eq!(refused.error()["code"], "too_many_bodies");
    server.serves_another().await;
    // The one that was first is not refused for the others' sake.
    slow.write_all(&vec![b' '; 40_000]).await.unwrap();
    assert!(read_until(&mut slow, "invalid_json").await.starts_with("HTTP/1.1 400 "));
    while server.metrics.body_bytes.get() != 0 {
        tokio::task::yield_now().await;
    }
    let again = post_raw(server.address, "/v1/completions", &vec![b' '; 100_000]).await;
    assert_eq!(again.status(), 400, "{}", again.answer);
    // Who hangs up gives back what it held.
    let mut gone = server.connect().await;
    hold(&server, &mut gone, 240_000, 200_000).await;
    drop(gone);
    while server.metrics.body_bytes.get() != 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_body_that_is_passed_on_counts_until_its_answer_ends() {
    let (fake, senders) = Fake::by_hand();
    fake.takes_bodies.store(true, std::sync::atomic::Ordering::Relaxed);
    let server = Server::start(&fake, limits()).await;
    let body = format!(r#"{{"model":"tiny","prompt":"{}"}}"#, "x".repeat(200_000));
    let client = server.ask(&body).await;
    let sender = next_sender(&senders).await;
    assert_eq!(server.metrics.body_bytes.get(), body.len() as i64);
    fake.requests.lock().clear(); // the test's own copy
    drop(client);
    client_gone(&sender).await;
    drop(sender);
    while server.metrics.body_bytes.get() != 0 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_body_a_byte_at_a_time_is_told_and_closed() {
    let slow = HttpLimits { body_read_timeout: Duration::from_millis(50), ..limits() };
    let server = Server::start(&greeter(), slow).await;
    let mut client = server.connect().await;
    client.write_all(&head("content-length: 1000000")).await.unwrap();
    let (mut reading, mut writing) = client.split();
    let mut answer = Vec::new();
    let trickle = async {
        loop {
            if writing.write_all(b" ").await.is_err() {
                std::future::pending::<()>().await;
            }
            server.serves_another().await;
        }
    };
    tokio::select! {
        () = trickle => unreachable!("it never ends"),
        // Ends when the server closes.
        _ = reading.read_to_end(&mut answer) => {}
    }
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("body_timeout"), "{answer}");
}

/// A client that asks for much and reads nothing: its request is cancelled once the kernel has waited long enough.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_answer_that_nobody_reads_is_cancelled() {
    let (fake, senders) = Fake::by_hand();
    let limits = HttpLimits { write_stall_timeout: Duration::from_millis(100), ..limits() };
    let server = Server::start(&fake, limits).await;
    let _never_reads = server.ask(STREAM).await;
    let sender = next_sender(&senders).await;
    // Some 200 bytes a token: more than the buffers of both sides take.
    for _ in 0..200 {
        sender.send((0..1_000).map(|_| token(0, 65)));
    }
    client_gone(&sender).await;
    server.until_idle().await;
}
