use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use zeromq::{PubSocket, RouterSocket};

use super::*;

fn address(port: u16) -> ZmqAddress {
    ZmqAddress { host: "127.0.0.1".into(), port }
}

/// Runs `serve` for one connection.
async fn peer<F, S>(serve: S) -> ZmqAddress
where
    S: FnOnce(TcpStream) -> F + Send + 'static,
    F: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { serve(listener.accept().await.unwrap().0).await });
    address(port)
}

/// A publisher's side of the handshake.
async fn shake_hands(stream: &mut TcpStream) {
    let mut greeting = vec![0; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..16].copy_from_slice(b"NULL");
    stream.write_all(&greeting).await.unwrap();
    let mut theirs = [0; 64];
    stream.read_exact(&mut theirs).await.unwrap();
    let ready = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03PUB";
    stream.write_all(ready).await.unwrap();
}

async fn until_closed(mut stream: TcpStream) {
    let mut rest = Vec::new();
    let _over_either_way = stream.read_to_end(&mut rest).await;
}

/// What made the library reserve a terabyte, and the process abort.
#[tokio::test]
async fn a_frame_that_announces_a_terabyte_ends_the_connection_alone() {
    let at = peer(async |mut stream: TcpStream| {
        shake_hands(&mut stream).await;
        let header = [&[2][..], &(1_u64 << 40).to_be_bytes()].concat();
        stream.write_all(&header).await.unwrap();
        until_closed(stream).await;
    })
    .await;
    let mut subscriber = Subscriber::connect(&at, "").await.unwrap();
    let end = subscriber.next().await;
    assert_eq!(end, Err(ZmqError::TooLarge { at, limit_bytes: MESSAGE_BYTES_MAX }));
}

#[tokio::test]
async fn other_servers_are_told_by_a_sentence() {
    let at = peer(async |mut stream: TcpStream| {
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        until_closed(stream).await;
    })
    .await;
    let error = Subscriber::connect(&at, "").await.err().unwrap();
    assert_eq!(
        error.to_string(),
        format!("{at} is not the socket of an engine's KV events: it does not speak ZMTP 3")
    );
    let closes = peer(async |stream: TcpStream| drop(stream)).await;
    assert_eq!(Subscriber::connect(&closes, "").await.err(), Some(ZmqError::Closed { at: closes }));
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let error = Subscriber::connect(&address(nobody), "").await.err().unwrap();
    assert!(matches!(error, ZmqError::Unreachable { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_is_not_waited_for() {
    let at = peer(until_closed).await;
    assert_eq!(Subscriber::connect(&at, "").await.err(), Some(ZmqError::TooSlow { at }));
}

#[tokio::test]
async fn messages_come_whole_and_the_end_after_them() {
    let mut publisher = PubSocket::new();
    let bound = publisher.bind("tcp://127.0.0.1:0").await.unwrap();
    let at = ZmqAddress::parse(&bound.to_string()).unwrap();
    let mut subscriber = Subscriber::connect(&at, "kv").await.unwrap();
    // A subscription takes a moment to arrive: what was sent before it is lost.
    let first = loop {
        let greeting = vec![Bytes::from_static(b"kv"), Bytes::from_static(b"hello")];
        publisher.send(ZmqMessage::try_from(greeting).unwrap()).await.unwrap();
        if let Ok(message) = timeout(Duration::from_millis(20), subscriber.next()).await {
            break message.unwrap();
        }
    };
    assert_eq!(first, ["kv", "hello"]);
    let large = Bytes::from(vec![7; 3 << 20]);
    for topic in ["other", "kv"] {
        let frames = vec![Bytes::from(topic), large.clone()];
        publisher.send(ZmqMessage::try_from(frames).unwrap()).await.unwrap();
    }
    let mut message = subscriber.next().await.unwrap();
    while message[1] == "hello" {
        message = subscriber.next().await.unwrap();
    }
    assert_eq!((message[0].clone(), message[1].len()), (Bytes::from_static(b"kv"), large.len()));
    assert_eq!(subscriber.ready(), None);
    drop(publisher);
    assert_eq!(subscriber.next().await, Err(ZmqError::Closed { at }));
}

#[tokio::test]
async fn a_replay_is_asked_for_and_answered() {
    let mut router = RouterSocket::new();
    let bound = router.bind("tcp://127.0.0.1:0").await.unwrap();
    let at = ZmqAddress::parse(&bound.to_string()).unwrap();
    let server = tokio::spawn(async move {
        let request = router.recv().await.unwrap().into_vec();
        let answer = vec![request[0].clone(), Bytes::new(), Bytes::from_static(b"7")];
        router.send(ZmqMessage::try_from(answer).unwrap()).await.unwrap();
        (router, request)
    });
    let mut replay = Replay::ask(&at, 258).await.unwrap();
    assert_eq!(replay.next().await.unwrap().unwrap(), ["", "7"]);
    let (router, request) = server.await.unwrap();
    assert_eq!(request[1..], [Bytes::new(), Bytes::from_static(&[0, 0, 0, 0, 0, 0, 1, 2])]);
    drop(router);
    assert_eq!(replay.next().await, Err(ZmqError::Closed { at }));
}
