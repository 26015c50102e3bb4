//! The HTTP client.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use forebay_engines::remote::client::{
    ClientSettings, Endpoint, HttpClient, HttpError, Limits, Secret, TlsSettings, Unreachable, UrlError,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use crate::rig::*;

fn limits() -> Limits {
    Limits { body_bytes_max: 1000, deadline: Instant::now() + PATIENCE }
}

fn plain(url: &str) -> Endpoint {
    Endpoint::new(url, HttpClient::new(&ClientSettings::default()).expect("a client"), None)
        .expect("an address")
}

#[tokio::test]
async fn documents_are_asked_for_and_bounded() {
    let mut double = Double::start().await;
    let endpoint = plain(&format!("{}/v1/", double.url));
    let get = |path: &'static str| {
        let endpoint = endpoint.clone();
        tokio::spawn(async move { endpoint.get(path, limits()).await })
    };
    let asking = get("/v1/models?x=1");
    let (asked, line) = double.asked().await;
    assert_eq!((asked.path.as_str(), asked.headers.get("authorization")), ("/v1/models?x=1", None));
    line.json(200, "{}").await;
    let answer = asking.await.expect("no panic").expect("an answer");
    assert_eq!(
        (answer.status, &*answer.content_type, &answer.body[..]),
        (200, "application/json", &b"{}"[..])
    );

    let asking = get("/long");
    double.asked().await.1.json(200, &"x".repeat(1001)).await;
    let error = asking.await.expect("no panic").expect_err("too long");
    assert!(matches!(error, HttpError::TooLarge { limit_bytes: 1000, .. }), "{error}");

    let asking = get("/chunked");
    let (_, mut line) = double.asked().await;
    line.events().await;
    line.piece(&[b'x'; 900]).await;
    line.piece(&[b'x'; 900]).await;
    let error = asking.await.expect("no panic").expect_err("too long");
    assert!(matches!(error, HttpError::TooLarge { .. }), "{error}");

    let asking = get("/missing");
    double.asked().await.1.json(404, &"no ".repeat(600)).await;
    match asking.await.expect("no panic") {
        Err(error @ HttpError::Status { status: 404, .. }) => {
            assert!(error.to_string().contains("answered status 404: no no"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_document_is_sent_with_the_key() {
    let mut double = Double::start().await;
    let endpoint = plain(&double.url).with_key(Some(&Secret::new("k"))).expect("a key");
    let asking =
        tokio::spawn(async move { endpoint.post_json("/x", Bytes::from_static(b"[1]"), limits()).await });
    let (asked, line) = double.asked().await;
    assert_eq!(asked.headers["authorization"], "Bearer k");
    assert_eq!(asked.headers["content-type"], "application/json");
    assert_eq!(&asked.body[..], b"[1]");
    line.json(201, "").await;
    assert_eq!(asking.await.expect("no panic").expect("an answer").status, 201);
}

#[tokio::test]
async fn connections_are_used_again_unless_they_are_old_or_closed() {
    let settings =
        ClientSettings { idle_max: 1, idle_timeout: Duration::from_secs(3600), ..Default::default() };
    let client = HttpClient::new(&settings).expect("a client");
    let mut double = Double::start().await;
    let endpoint = Endpoint::new(&double.url, client, None).expect("an address");
    let ask = || {
        let endpoint = endpoint.clone();
        tokio::spawn(async move { endpoint.get("/x", limits()).await.expect("an answer") })
    };
    let connection = async |double: &mut Double| {
        let asking = ask();
        let (asked, line) = double.asked().await;
        assert_eq!(asked.headers["host"], endpoint.name().to_string());
        line.json(200, "{}").await;
        asking.await.expect("no panic");
        asked.connection
    };
    assert_eq!(connection(&mut double).await, 0);
    assert_eq!(connection(&mut double).await, 0);
    // Two at once: one more is made, and one kept.
    let asking = (ask(), ask());
    let lines = (double.asked().await, double.asked().await);
    assert_ne!(lines.0.0.connection, lines.1.0.connection);
    lines.0.1.json(200, "{}").await;
    lines.1.1.json(200, "{}").await;
    for asking in [asking.0, asking.1] {
        asking.await.expect("no panic");
    }
    assert!(connection(&mut double).await < 2);
    // The server closes the one that is idle: the next request goes over a new one and is sent once.
    let asking = ask();
    let (_, mut line) = double.asked().await;
    line.raw(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}").await;
    asking.await.expect("no panic");
    line.closed().await;
    assert_eq!(connection(&mut double).await, 2);
    assert!(double.is_idle());

    let settings = ClientSettings { idle_timeout: Duration::ZERO, ..settings };
    let endpoint = Endpoint::new(&double.url, HttpClient::new(&settings).expect("a client"), None);
    let endpoint = endpoint.expect("an address");
    for expected in [3, 4] {
        let endpoint = endpoint.clone();
        let asking = tokio::spawn(async move { endpoint.get("/x", limits()).await });
        let (asked, line) = double.asked().await;
        assert_eq!(asked.connection, expected, "what is too old is not used again");
        line.json(200, "{}").await;
        asking.await.expect("no panic").expect("an answer");
    }
}

#[tokio::test]
async fn what_does_not_answer_is_left_at_the_deadline() {
    let mut double = Double::start().await;
    let endpoint = plain(&double.url);
    let deadline = Instant::now() + Duration::from_millis(200);
    let asking = endpoint.get("/x", Limits { deadline, ..limits() });
    let (error, (_, line)) = tokio::join!(asking, double.asked());
    let error = error.expect_err("too slow");
    assert!(matches!(error, HttpError::TooSlow { .. }) && error.is_trouble(), "{error}");
    line.closed().await;
}

#[tokio::test]
async fn why_nobody_is_reached_is_told() {
    let why = async |url: &str| match plain(url).get("/", limits()).await {
        Err(HttpError::Unreachable { why, at }) => {
            assert!(!at.contains("://"));
            why
        }
        other => panic!("{url}: {other:?}"),
    };
    assert_eq!(why(&nowhere().await).await, Unreachable::Refused);
    // A label of more than 63 letters: the resolver refuses it without asking anybody, so no network is needed.
    let no_name = format!("http://{}.invalid:80", "a".repeat(64));
    assert_eq!(why(&no_name).await, Unreachable::Name);
}

#[test]
fn urls_that_are_none_are_refused_without_being_repeated() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    let client = HttpClient::new(&ClientSettings::default()).expect("a client");
    let check = |url: &str, expected: UrlError| {
        let error = Endpoint::new(url, client.clone(), None).expect_err(url);
        assert_eq!(error, expected, "{url}");
        assert!(!error.to_string().contains("hunter2"));
    };
    check("host:8000", UrlError::Malformed);
    check("ftp://host", UrlError::Malformed);
    check("http://", UrlError::Malformed);
    check("", UrlError::Malformed);
    check("http://user:hunter2@host:8000", UrlError::Credentials);
    check("http://host:8000/?key=hunter2", UrlError::Query);
    let error = Endpoint::new("http://h", client, Some(&Secret::new("a\nb"))).expect_err("a line feed");
    assert_eq!(error, UrlError::Key);
}

#[test]
fn keys_are_never_printed() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    let client = HttpClient::new(&ClientSettings::default()).expect("a client");
    let key = Secret::new("hunter2");
    let endpoint = Endpoint::new("http://host:8000", client, Some(&key)).expect("an address");
    let tls = TlsSettings { client: Some(("chain".into(), key.clone())), ..TlsSettings::default() };
    for printed in [format!("{key:?}"), format!("{key}"), format!("{endpoint:?}"), format!("{tls:?}")] {
        assert!(!printed.contains("hunter2"), "{printed}");
    }
    assert_eq!(key.expose(), "hunter2");
}

/// A certificate authority made for a test, and what it signed.
struct Authority {
    pem: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a certificate");
        let (pem, der) = (certificate.pem(), certificate.der().clone());
        Self { pem, certificate: der, issuer: Issuer::new(params, key) }
    }

    fn sign(&self, name: &str) -> (String, CertificateDer<'static>, KeyPair) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        (certificate.pem(), certificate.der().clone(), key)
    }
}

/// A server with a certificate for `name`; with `clients`, only for those that this authority knows.
async fn tls_server(authority: &Authority, name: &str, clients: bool) -> String {
    let (_, certificate, key) = authority.sign(name);
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("versions");
    let builder = if clients {
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate.clone()).expect("a root");
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build();
        builder.with_client_cert_verifier(verifier.expect("a verifier"))
    } else {
        builder.with_no_client_auth()
    };
    let config = builder.with_single_cert(vec![certificate], key).expect("a certificate");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut request = [0; 2048];
                if stream.read(&mut request).await.is_ok_and(|read| read > 0) {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                    let _ = stream.shutdown().await;
                }
            });
        }
    });
    format!("https://localhost:{port}")
}

async fn ask(url: &str, tls: TlsSettings) -> Result<Bytes, HttpError> {
    let settings =
        ClientSettings { tls, connect_timeout: Duration::from_secs(5), ..ClientSettings::default() };
    let client = HttpClient::new(&settings).expect("a client");
    let endpoint = Endpoint::new(url, client, None).expect("an address");
    endpoint.get("/", limits()).await.map(|answer| answer.body)
}

#[tokio::test]
async fn engines_behind_tls_are_trusted_as_told() {
    let authority = Authority::new();
    let url = tls_server(&authority, "localhost", false).await;
    let trusting = TlsSettings { extra_ca: Some(authority.pem.as_str().into()), ..TlsSettings::default() };
    assert_eq!(ask(&url, trusting.clone()).await.expect("an answer"), "ok");
    let unknown = ask(&url, TlsSettings::default()).await.expect_err("an unknown authority");
    let told = unknown.to_string();
    assert!(matches!(unknown, HttpError::Unreachable { why: Unreachable::Tls(_), .. }), "{told}");
    assert!(told.contains("fails the TLS handshake"), "{told}");
    // Another name than the URL's.
    let url = tls_server(&authority, "engine.internal", false).await;
    assert!(ask(&url, trusting.clone()).await.is_err());
    let named = TlsSettings { server_name: Some("engine.internal".into()), ..trusting };
    assert_eq!(ask(&url, named).await.expect("an answer"), "ok");
}

#[tokio::test]
async fn engines_that_ask_who_calls_are_told() {
    let authority = Authority::new();
    let url = tls_server(&authority, "localhost", true).await;
    let trusting = TlsSettings { extra_ca: Some(authority.pem.as_str().into()), ..TlsSettings::default() };
    assert!(ask(&url, trusting.clone()).await.is_err());
    let (chain, _, key) = authority.sign("gateway");
    let client = Some((chain.into(), Secret::new(key.serialize_pem())));
    assert_eq!(ask(&url, TlsSettings { client, ..trusting }).await.expect("an answer"), "ok");
}

#[tokio::test]
async fn a_handshake_without_end_is_left() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("https://{}", listener.local_addr().expect("an address"));
    let settings =
        ClientSettings { connect_timeout: Duration::from_millis(200), ..ClientSettings::default() };
    let client = HttpClient::new(&settings).expect("a client");
    let error = Endpoint::new(&url, client, None).expect("an address").get("/", limits()).await;
    let why = Unreachable::TimedOut { limit: Duration::from_millis(200) };
    assert!(matches!(error, Err(HttpError::Unreachable { why: told, .. }) if told == why));
}

#[tokio::test]
async fn tls_settings_that_are_none_say_what_is_wrong() {
    let check = |tls: TlsSettings, expected: &str| {
        let settings = ClientSettings { tls, ..ClientSettings::default() };
        let error = HttpClient::new(&settings).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    let none = TlsSettings::default();
    check(TlsSettings { extra_ca: Some("hello".into()), ..none.clone() }, "the CA file");
    check(TlsSettings { server_name: Some("a b".into()), ..none.clone() }, "is no server name");
    let (chain, _, _) = Authority::new().sign("x");
    let client = Some((chain.into(), Secret::new("hello")));
    check(TlsSettings { client, ..none }, "the client key");
}
