//! Heads out of bounds, and heads whose framing is in doubt.

use super::*;

/// Sends a request and, behind it, one that must not be answered; `status` 0 is no answer.
async fn check(server: &Server, what: &str, head: &[u8], status: u16) {
    let behind = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n";
    let exchange = exchange(server.address, [head.to_vec(), behind.to_vec()]).await;
    let answers = usize::from(status != 0);
    assert_eq!((exchange.status(), exchange.answers()), (status, answers), "{what}: {}", exchange.answer);
}

fn get(more: &str) -> Vec<u8> {
    format!("GET /health HTTP/1.1\r\nhost: x\r\n{more}\r\n\r\n").into_bytes()
}

fn post(more: &str, body: &str) -> Vec<u8> {
    format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\n{more}\r\n\r\n{body}").into_bytes()
}

#[tokio::test]
async fn heads_beyond_the_bounds_are_refused_and_closed() {
    let server = Server::start(&greeter(), patient()).await;
    let many: Vec<String> = (0..200).map(|index| format!("a{index}: 1")).collect();
    check(&server, "200 headers", &get(&many.join("\r\n")), 431).await;
    check(&server, "a value of 40 kB", &get(&format!("a: {}", "a".repeat(40_000))), 431).await;
    check(&server, "a value of 10 MB", &get(&format!("a: {}", "a".repeat(10_000_000))), 431).await;
    check(&server, "a name of 40 kB", &get(&format!("{}: a", "a".repeat(40_000))), 431).await;
    check(&server, "a path of 40 kB", &head_of("GET", &format!("/{}", "a".repeat(40_000))), 431).await;
    check(&server, "a method of 40 kB", &head_of(&"A".repeat(40_000), "/"), 431).await;
    let roomy = HttpLimits { header_bytes_max: 1 << 20, ..patient() };
    let server = Server::start(&greeter(), roomy).await;
    check(&server, "a path of 70 kB", &head_of("GET", &format!("/{}", "a".repeat(70_000))), 414).await;
    server.serves_another().await;
}

fn head_of(method: &str, target: &str) -> Vec<u8> {
    format!("{method} {target} HTTP/1.1\r\nhost: x\r\n\r\n").into_bytes()
}

#[tokio::test]
async fn heads_that_are_not_http_are_refused_and_closed() {
    let server = Server::start(&greeter(), patient()).await;
    for (what, head) in [
        ("a space in a name", get("a b: c")),
        ("a space before the colon", get("a : c")),
        ("an empty name", get(": c")),
        ("no colon", get("abc")),
        ("a folded line", get("a: b\r\n c: d")),
        ("a bare carriage return", get("a: b\rc")),
        ("a control character", get("a: b\u{1}c")),
        ("another version", b"GET / HTTP/3.0\r\n\r\n".to_vec()),
        ("no version", b"GET /\r\n\r\n".to_vec()),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec()),
        ("zeros", vec![0; 1000]),
    ] {
        check(&server, what, &head, 400).await;
    }
    check(&server, "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0).await;
    server.serves_another().await;
}

/// Where two servers could disagree on the end of a request, what comes behind it is never answered.
#[tokio::test]
async fn no_request_hides_in_another() {
    let fake = greeter();
    let server = Server::start(&fake, patient()).await;
    for (what, more) in [
        ("two lengths", "content-length: 5\r\ncontent-length: 6"),
        ("a list of lengths", "content-length: 5, 6"),
        ("a signed length", "content-length: +5"),
        ("a negative length", "content-length: -1"),
        ("a length in hexadecimal", "content-length: 0x5"),
        ("no length", "content-length: "),
        ("more than 64 bits", "content-length: 99999999999999999999"),
        ("another coding", "transfer-encoding: gzip"),
        ("chunked, then another", "transfer-encoding: chunked, gzip"),
        ("chunked in disguise", "transfer-encoding: xchunked"),
    ] {
        check(&server, what, &post(more, "5\r\nhello\r\n0\r\n\r\n"), 400).await;
    }
    let old = b"POST /v1/completions HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    check(&server, "chunked in HTTP/1.0", old, 400).await;
    // RFC 9112: the chunks count, and the connection ends.
    let chunks = "1d\r\n{\"model\":\"tiny\",\"prompt\":\"x\"}\r\n0\r\n\r\n";
    for both in
        ["content-length: 4\r\ntransfer-encoding: chunked", "transfer-encoding: chunked\r\ncontent-length: 4"]
    {
        check(&server, both, &post(both, chunks), 200).await;
    }
    // The same whole request, framed once.
    let chunked =
        exchange(server.address, [post("transfer-encoding: chunked\r\nconnection: close", chunks)]).await;
    assert_eq!(chunked.status(), 200, "{}", chunked.answer);
    for (what, body) in [
        ("a size that is none", "zz\r\nhello\r\n0\r\n\r\n"),
        ("a size of 64 bits and more", "fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
        ("a chunk that is longer", "2\r\nhello\r\n0\r\n\r\n"),
        ("an extension of 1 MB", &format!("5;{}\r\nhello\r\n0\r\n\r\n", "a".repeat(1_000_000))),
        ("trailers of 1 MB", &format!("0\r\n{}\r\n", "a: b\r\n".repeat(200_000))),
    ] {
        check(&server, what, &post("transfer-encoding: chunked", body), 400).await;
    }
    assert_eq!(fake.requests.lock().len(), 3);
    server.serves_another().await;
}

#[tokio::test]
async fn other_forms_of_a_target_lead_nowhere_new() {
    let setup = Setup { keys: Some(NOBODY), http_limits: patient(), ..Setup::default() };
    let server = Server::of(&greeter(), setup).await;
    let closing = "connection: close\r\n\r\n";
    for (request, status) in [
        ("GET /health HTTP/1.0\r\n\r\n".to_owned(), 200),
        (format!("GET http://elsewhere/health HTTP/1.1\r\nhost: x\r\n{closing}"), 200),
        (format!("GET http://elsewhere/v1/models HTTP/1.1\r\nhost: x\r\n{closing}"), 401),
        (format!("GET //v1/models HTTP/1.1\r\nhost: x\r\n{closing}"), 404),
        (format!("GET /x/../v1/models HTTP/1.1\r\nhost: x\r\n{closing}"), 404),
        (format!("GET /%76%31/models HTTP/1.1\r\nhost: x\r\n{closing}"), 404),
        (format!("GET /V1/models HTTP/1.1\r\nhost: x\r\n{closing}"), 404),
        (format!("OPTIONS * HTTP/1.1\r\nhost: x\r\n{closing}"), 404),
        (format!("CONNECT elsewhere:443 HTTP/1.1\r\nhost: x\r\n{closing}"), 404),
        (format!("GET /metrics HTTP/1.1\r\nhost: x\r\n{closing}"), 404),
    ] {
        let exchange = exchange(server.address, [request.clone().into_bytes()]).await;
        assert_eq!(exchange.answer.get(9..12), Some(&*status.to_string()), "{request}: {}", exchange.answer);
    }
}

const NOBODY: &str = "0000000000000000000000000000000000000000000000000000000000000000 nobody";
