//! The service over loopback: a stream in both directions, the bounds on messages, mutual TLS.

use std::pin::Pin;

use forebay_proto::{
    fleet_client, fleet_server,
    limits::{MESSAGE_BYTES_MAX, SNAPSHOT_CHUNK_HASHES_MAX},
    snapshot_chunks,
    tls::{Identity, Pem, TlsFiles},
    v1::{self, fleet_server::Fleet, from_agent::Body as AgentBody, from_gateway::Body as GatewayBody},
};
use forebay_types::{BlockHash, KvEvent, Tier};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{ReceiverStream, TcpListenerStream},
};
use tonic::{
    Code, Request, Response, Status, Streaming,
    transport::{ClientTlsConfig, Endpoint, Server},
};

/// Answers each heartbeat, and each piece of a snapshot with the number of its hashes.
struct Echo;

#[tonic::async_trait]
impl Fleet for Echo {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<v1::FromGateway, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::FromAgent>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let answers = request.into_inner().filter_map(|message| {
            let counter = match message.map(|message| message.body) {
                Ok(Some(AgentBody::Heartbeat(v1::Heartbeat { counter }))) => counter,
                Ok(Some(AgentBody::KvSnapshot(piece))) => match &piece.contents[..] {
                    [v1::KvEvent { event: Some(v1::kv_event::Event::Stored(stored)) }] => {
                        stored.hashes.len() as u64
                    }
                    other => panic!("{other:?}"),
                },
                Ok(_) => return None,
                Err(status) => return Some(Err(status)),
            };
            Some(Ok(GatewayBody::Ack(v1::Ack { counter }).into()))
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// A gateway on a free port; gives its port.
async fn serve(tls: Option<TlsFiles>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let port = listener.local_addr().expect("bound").port();
    let mut server = Server::builder();
    if let Some(tls) = tls {
        server = server.tls_config(tls.server().expect("an identity")).expect("checked files");
    }
    let serving =
        server.add_service(fleet_server(Echo)).serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serving);
    port
}

/// Sends `messages` and gives the answers, or the error that came first.
async fn attach(
    port: u16,
    tls: Option<ClientTlsConfig>,
    messages: Vec<AgentBody>,
) -> Result<Vec<v1::FromGateway>, String> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://localhost:{port}")).expect("a URL");
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls).map_err(|error| error.to_string())?;
    }
    let chain = |error: &dyn std::error::Error| format!("{error:?}");
    let channel = endpoint.connect().await.map_err(|error| chain(&error))?;
    let (sender, receiver) = mpsc::channel(messages.len().max(1));
    for message in messages {
        sender.try_send(v1::FromAgent::from(message)).expect("room");
    }
    drop(sender);
    let mut client = fleet_client(channel);
    let answers = client.attach(ReceiverStream::new(receiver)).await.map_err(|status| chain(&status))?;
    answers.into_inner().collect::<Result<Vec<_>, _>>().await.map_err(|status| chain(&status))
}

fn heartbeat(counter: u64) -> AgentBody {
    AgentBody::Heartbeat(v1::Heartbeat { counter })
}

fn ack(counter: u64) -> v1::FromGateway {
    GatewayBody::Ack(v1::Ack { counter }).into()
}

#[tokio::test]
async fn messages_go_both_ways_and_unknown_bodies_are_skipped() {
    let port = serve(None).await;
    let blocks = vec![BlockHash(u64::MAX); SNAPSHOT_CHUNK_HASHES_MAX + 1];
    let mut messages = vec![heartbeat(1), AgentBody::Drain(v1::Drain::default())];
    let stored = KvEvent::Stored { parent: None, hashes: blocks, tier: Tier::Device, group: 0 };
    messages.extend(snapshot_chunks(0, 7, vec![stored]).into_iter().map(AgentBody::KvSnapshot));
    messages.push(heartbeat(2));
    let answers = attach(port, None, messages).await.expect("served");
    assert_eq!(answers, [ack(1), ack(SNAPSHOT_CHUNK_HASHES_MAX as u64), ack(1), ack(2)]);
}

#[tokio::test]
async fn a_message_beyond_the_bound_is_never_sent_or_read() {
    let port = serve(None).await;
    let hashes = vec![BlockHash(u64::MAX); MESSAGE_BYTES_MAX / 8];
    let stored = KvEvent::Stored { parent: None, hashes, tier: Tier::Device, group: 0 };
    let large = v1::KvSnapshot { contents: vec![stored.into()], ..v1::KvSnapshot::default() };
    let sent = attach(port, None, vec![AgentBody::KvSnapshot(large.clone())]).await;
    assert!(sent.is_err(), "the sender's own bound ends the stream: {sent:?}");

    // A sender without the bound is refused by the reader.
    let endpoint = Endpoint::from_shared(format!("http://localhost:{port}")).expect("a URL");
    let channel = endpoint.connect().await.expect("served");
    let mut unbounded = v1::fleet_client::FleetClient::new(channel);
    let message = v1::FromAgent::from(AgentBody::KvSnapshot(large));
    let answers = unbounded.attach(tokio_stream::once(message)).await.expect("opened").into_inner();
    let status = answers.collect::<Result<Vec<_>, _>>().await.expect_err("refused");
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
}

fn ca(name: &str) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(vec![]).expect("no names");
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().expect("entropy")).expect("signed")
}

fn files(
    believes: &CertifiedIssuer<'static, KeyPair>,
    signed_by: &CertifiedIssuer<'static, KeyPair>,
) -> TlsFiles {
    let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    let key = KeyPair::generate().expect("entropy");
    let cert = params.signed_by(&key, signed_by).expect("signed");
    let identity =
        Identity { cert: Pem::new("cert.pem", cert.pem()), key: Pem::new("key.pem", key.serialize_pem()) };
    TlsFiles::new(Pem::new("ca.pem", believes.pem()), Some(identity)).expect("well-formed")
}

#[tokio::test]
async fn both_sides_must_be_signed_by_the_fleets_ca() {
    let (fleet, stranger) = (ca("fleet"), ca("stranger"));
    let port = serve(Some(files(&fleet, &fleet))).await;
    let try_with = |tls| attach(port, tls, vec![heartbeat(1)]);

    assert_eq!(try_with(Some(files(&fleet, &fleet).client(None))).await, Ok(vec![ack(1)]));

    let nameless = TlsFiles::new(Pem::new("ca.pem", fleet.pem()), None).expect("well-formed");
    let refused = [
        ("a client without a certificate", Some(nameless.client(None)), "CertificateRequired"),
        ("a client of another CA", Some(files(&fleet, &stranger).client(None)), "UnknownCA"),
        (
            "a server of a CA that the client does not believe",
            Some(files(&stranger, &fleet).client(None)),
            "UnknownIssuer",
        ),
        (
            "a server of another name",
            Some(files(&fleet, &fleet).client(Some("other.example"))),
            "NotValidForName",
        ),
        ("a client without TLS", None, ""),
    ];
    for (what, tls, reason) in refused {
        let error = try_with(tls).await.expect_err(what);
        assert!(error.contains(reason), "{what}: {error}");
    }
    assert_eq!(try_with(Some(files(&fleet, &fleet).client(Some("localhost")))).await, Ok(vec![ack(1)]));
}
