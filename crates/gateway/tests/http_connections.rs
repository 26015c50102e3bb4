//! Sockets: clients that leave, servers that end, peers that dawdle.
#![allow(clippy::unwrap_used, reason = "an unexpected value is a failed test")]

mod http_support;

use std::time::Duration;

use forebay_gateway::http::{Ended, HttpLimits};
use forebay_types::FinishReason;
use http_support::{sockets::*, *};
use tokio::{io::AsyncWriteExt, net::TcpStream};

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request_wherever_it_is() {
    let (fake, senders) = Fake::by_hand();
    let server = Server::start(&fake, HttpLimits::default()).await;
    // Queued, whole and streamed: no header was sent yet.
    for body in [WHOLE, STREAM] {
        let client = server.ask(body).await;
        let sender = next_sender(&senders).await;
        drop(client);
        client_gone(&sender).await;
    }
    // In the middle of an answer, whole and streamed, with nothing to write at that moment.
    for body in [WHOLE, STREAM] {
        let mut client = server.ask(body).await;
        let sender = next_sender(&senders).await;
        sender.send([token(0, 65)]);
        if body == STREAM {
            read_until(&mut client, "\"text\":\"A\"").await;
        }
        drop(client);
        client_gone(&sender).await;
    }
    server.until_idle().await;
    assert_eq!(server.metrics.disconnects.get(), 4);
}

#[tokio::test]
async fn tokens_arrive_as_they_are_made_and_connections_are_kept() {
    let (fake, senders) = Fake::by_hand();
    let server = Server::start(&fake, HttpLimits::default()).await;
    let mut client = TcpStream::connect(server.address).await.unwrap();
    for _ in 0..2 {
        send(&mut client, STREAM).await;
        let sender = next_sender(&senders).await;
        sender.send([token(0, 65)]);
        read_until(&mut client, "\"text\":\"A\"").await;
        sender.send([token(0, 66)]);
        read_until(&mut client, "\"text\":\"B\"").await;
        sender.send([finished(0, FinishReason::Length), done(1, 0, 2)]);
        read_until(&mut client, "data: [DONE]\n\n\r\n0\r\n\r\n").await;
    }
    drop(client);
    server.until_idle().await;
    assert_eq!(server.metrics.disconnects.get(), 0);
}

#[tokio::test]
async fn shutdown_lets_answers_finish() {
    let (fake, senders) = Fake::by_hand();
    let mut server = Server::start(&fake, HttpLimits::default()).await;
    let idle = TcpStream::connect(server.address).await.unwrap();
    let mut client = server.ask(STREAM).await;
    let sender = next_sender(&senders).await;
    sender.send([token(0, 65)]);
    read_until(&mut client, "\"text\":\"A\"").await;
    server.stop();
    assert_eq!(read_to_end(idle).await, "", "an idle connection closes at once");
    assert!(TcpStream::connect(server.address).await.is_err(), "nothing new is accepted");
    sender.send([token(0, 66), finished(0, FinishReason::Length), done(1, 0, 2)]);
    let rest = read_to_end(client).await;
    assert!(rest.contains("\"text\":\"B\"") && rest.contains("[DONE]"), "{rest}");
    assert_eq!(server.serving.await.unwrap(), Ended { cut: 0 });
}

#[tokio::test]
async fn shutdown_cuts_what_does_not_end() {
    let (fake, senders) = Fake::by_hand();
    let limits = HttpLimits { shutdown_max: Duration::from_millis(20), ..HttpLimits::default() };
    let mut server = Server::start(&fake, limits).await;
    let client = server.ask(STREAM).await;
    let sender = next_sender(&senders).await;
    server.stop();
    assert_eq!((&mut server.serving).await.unwrap(), Ended { cut: 1 });
    client_gone(&sender).await;
    assert_eq!(read_to_end(client).await, "");
    server.until_idle().await;
}

#[tokio::test]
async fn a_slow_head_is_cut_and_a_slow_body_is_told() {
    let limits = HttpLimits {
        header_read_timeout: Duration::from_millis(20),
        body_read_timeout: Duration::from_millis(20),
        ..HttpLimits::default()
    };
    let server = Server::start(&greeter(), limits).await;
    let mut slow_head = TcpStream::connect(server.address).await.unwrap();
    slow_head.write_all(b"GET /health HTTP/1.1\r\nhost:").await.unwrap();
    assert_eq!(read_to_end(slow_head).await, "");
    let mut slow_body = TcpStream::connect(server.address).await.unwrap();
    slow_body
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        .await
        .unwrap();
    let answer = read_until(&mut slow_body, "body_timeout").await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
}

#[tokio::test]
async fn a_client_that_sends_too_much_still_reads_why() {
    let limits = HttpLimits { body_bytes_max: 1 << 20, header_bytes_max: 4096, ..HttpLimits::default() };
    let server = Server::start(&greeter(), limits).await;
    let mut client = server.ask(&" ".repeat(3 << 19)).await;
    let answer = read_until(&mut client, "body_too_large").await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    let mut client = TcpStream::connect(server.address).await.unwrap();
    let head = format!("GET /health HTTP/1.1\r\nhost: x\r\nx-a: {}\r\n\r\n", "a".repeat(5000));
    client.write_all(head.as_bytes()).await.unwrap();
    assert!(read_until(&mut client, "\r\n").await.starts_with("HTTP/1.1 431 "));
}
