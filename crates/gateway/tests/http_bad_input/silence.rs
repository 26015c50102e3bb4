//! Clients that connect and say nothing, or not enough, and those that want their places.

use forebay_types::FinishReason;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::*;

#[tokio::test]
async fn silent_connections_keep_nobody_out() {
    let limits = HttpLimits { connections_max: 4, ..patient() };
    let server = Server::start(&greeter(), limits).await;
    let mut silent = Vec::new();
    for count in 1..=4 {
        silent.push(server.connect().await);
        server.until_connections(count).await;
    }
    // Far more than there is room for: the oldest makes room, each time.
    for _ in 0..20 {
        server.serves_another().await;
    }
    assert!(server.metrics.connections.get() <= 4);
    let first = silent.remove(0);
    assert_eq!(read_to_end(first).await, "", "it was closed, an hour before its time");
    assert!(server.metrics.connections_closed_for_room.get() >= 1);
}

#[tokio::test]
async fn the_one_that_was_idle_for_longest_makes_room() {
    let limits = HttpLimits { connections_max: 3, ..patient() };
    let server = Server::start(&greeter(), limits).await;
    // Slowly sent, answered and kept open, silent: in this order.
    let mut slow = server.connect().await;
    slow.write_all(b"GET /health HTTP/1.1\r\nho").await.unwrap();
    server.until_connections(1).await;
    let mut kept = server.ask(WHOLE).await;
    read_until(&mut kept, "\"text\":\"hi\"").await;
    let silent = server.connect().await;
    server.until_connections(3).await;
    // Used again, so it is no longer the second.
    send(&mut kept, WHOLE).await;
    read_until(&mut kept, "\"text\":\"hi\"").await;

    let _new = served(&server).await;
    assert_eq!(read_to_end(slow).await, "");
    let _newer = served(&server).await;
    assert_eq!(read_to_end(silent).await, "");
    send(&mut kept, WHOLE).await;
    read_until(&mut kept, "\"text\":\"hi\"").await;
    assert_eq!(server.metrics.connections_closed_for_room.get(), 2);
}

async fn served(server: &Server) -> TcpStream {
    let mut client = server.ask(WHOLE).await;
    read_until(&mut client, "\"text\":\"hi\"").await;
    client
}

#[tokio::test]
async fn a_connection_with_a_request_never_makes_room() {
    let (fake, senders) = Fake::by_hand();
    let limits = HttpLimits { connections_max: 2, ..patient() };
    let server = Server::start(&fake, limits).await;
    let mut waits_for_its_answer = server.ask(WHOLE).await;
    let first = next_sender(&senders).await;
    let mut sends_its_body = server.connect().await;
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", STREAM.len());
    sends_its_body.write_all(head.as_bytes()).await.unwrap();
    while server.metrics.requests_in_flight.get() != 2 {
        tokio::task::yield_now().await;
    }

    let mut third = server.ask(WHOLE).await;
    // It waits while both others go on: one answer is streamed in parts, the other given.
    sends_its_body.write_all(STREAM.as_bytes()).await.unwrap();
    let second = next_sender(&senders).await;
    second.send([token(0, 65)]);
    read_until(&mut sends_its_body, "\"text\":\"A\"").await;
    assert_eq!(server.metrics.connections.get(), 2);
    assert_eq!(server.metrics.connections_closed_for_room.get(), 0);
    // The first to be done makes room.
    first.send(answer("done"));
    read_until(&mut waits_for_its_answer, "\"text\":\"done\"").await;
    let sender = next_sender(&senders).await;
    assert_eq!(waits_for_its_answer.read(&mut [0; 8]).await.unwrap(), 0, "closed behind its answer");
    sender.send(answer("third"));
    read_until(&mut third, "\"text\":\"third\"").await;
    second.send([token(0, 66), finished(0, FinishReason::Length), done(1, 0, 2)]);
    read_until(&mut sends_its_body, "[DONE]").await;
    assert_eq!(server.metrics.disconnects.get(), 0);
}

#[tokio::test]
async fn silence_and_trickles_end_with_the_time_for_a_head() {
    let limits = HttpLimits { header_read_timeout: Duration::from_millis(50), ..patient() };
    let server = Server::start(&greeter(), limits).await;
    assert_eq!(read_to_end(server.connect().await).await, "", "not a byte");
    let mut kept = server.ask(WHOLE).await;
    let mut answer = String::new();
    kept.read_to_string(&mut answer).await.unwrap();
    assert!(
        answer.contains("\"text\":\"hi\""),
        "answered, kept, and closed when nothing more came: {answer}"
    );

    let mut client = server.connect().await;
    client.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\na: ").await.unwrap();
    let (mut reading, mut writing) = client.split();
    let mut answer = Vec::new();
    let trickle = async {
        loop {
            if writing.write_all(b"a").await.is_err() {
                std::future::pending::<()>().await;
            }
            server.serves_another().await;
        }
    };
    tokio::select! {
        () = trickle => unreachable!("it never ends"),
        // Closed, or reset under the bytes that were still sent.
        _ = reading.read_to_end(&mut answer) => {}
    }
    assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
    server.serves_another().await;
}
