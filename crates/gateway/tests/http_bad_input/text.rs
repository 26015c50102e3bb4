//! What is no text: broken UTF-8, halves of surrogate pairs, control characters, marks.

use super::*;

const CHAT: &str = "/v1/chat/completions";

fn chat_of(content: &[u8]) -> Vec<u8> {
    [br#"{"model":"tiny","messages":[{"role":"user","content":""#, content, br#""}]}"#].concat()
}

fn with(member: &[u8]) -> Vec<u8> {
    [br#"{"model":"tiny","messages":[{"role":"user","content":"a"}],"#, member, b"}"].concat()
}

async fn refused(server: &Server, body: &[u8], says: &str) {
    let shown = String::from_utf8_lossy(body).into_owned();
    let exchange = post_raw(server.address, CHAT, body).await;
    assert_eq!(exchange.status(), 400, "{shown}: {}", exchange.answer);
    let error = exchange.error();
    let message = error["message"].as_str().unwrap();
    assert!(message.contains(says) && error["code"].is_string(), "{shown}: {message}");
}

async fn served(server: &Server, body: &[u8]) {
    let exchange = post_raw(server.address, CHAT, body).await;
    assert_eq!(exchange.status(), 200, "{}: {}", String::from_utf8_lossy(body), exchange.answer);
}

#[tokio::test]
async fn bodies_that_are_no_text_are_refused_with_the_place() {
    for fake in [greeter(), passing()] {
        let server = Server::start(&fake, patient()).await;
        for broken in [&b"\xff"[..], b"a\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc0\x80"] {
            refused(&server, &chat_of(broken), "line 1 column").await;
        }
        for half in [r"\ud800", r"a\udfff!", r"\udc00\ud800", r"\uD83D\u0041"] {
            refused(&server, &chat_of(half.as_bytes()), "line 1 column").await;
        }
        refused(&server, &with(br#""tools":["\ud800"]"#), "line 1 column").await;
        refused(&server, &with(br#""chat_template_kwargs":{"a":"\ud800"}"#), "line 1 column").await;
        refused(&server, &with(br#""chat_template_kwargs":{"\ud800":1}"#), "line 1 column").await;
        refused(&server, &with(br#""\ud800":1"#), "line 1 column").await;
        refused(&server, &chat_of(b"a\0b"), "control character").await;
        refused(&server, &chat_of(b"a\nb"), "control character").await;
        refused(&server, &[b"\xef\xbb\xbf", &chat_of(b"a")[..]].concat(), "byte-order mark").await;
        let wide: Vec<u8> = chat_of(b"a").into_iter().flat_map(|byte| [byte, 0]).collect();
        refused(&server, &wide, "line 1 column").await;
        refused(&server, &vec![0; 1 << 20], "line 1 column").await;
        assert!(fake.requests.lock().is_empty(), "nothing of a refused request reaches the fleet");

        served(&server, &chat_of(r"\ud83d\ude00 \u0000 \u001b \ufeff \uffff é".as_bytes())).await;
        served(&server, &chat_of("\u{feff}\u{202e}\u{85}".as_bytes())).await;
    }
}

/// What is skipped is not looked at, except where engines will.
#[tokio::test]
async fn unknown_fields_are_text_where_engines_read_them() {
    for member in [&b"\"unknown\":\"\xff\""[..], br#""unknown":"\ud800""#, br#""unknown":{"\ud800":1}"#] {
        served(&Server::start(&greeter(), patient()).await, &with(member)).await;
        refused(&Server::start(&passing(), patient()).await, &with(member), "column").await;
    }
}

#[tokio::test]
async fn heads_that_are_no_text_are_refused_or_left_aside() {
    let setup = Setup { keys: Some(KEYS), http_limits: patient(), ..Setup::default() };
    let server = Server::of(&greeter(), setup).await;
    let check = async |request: &[u8], status: u16, says: &str| {
        let exchange = exchange(server.address, [request.to_vec()]).await;
        let shown = String::from_utf8_lossy(request).into_owned();
        assert_eq!(exchange.status(), status, "{shown}: {}", exchange.answer);
        assert!(exchange.answer.contains(says), "{shown}: {}", exchange.answer);
    };
    check(
        b"GET /v1/models HTTP/1.1\r\nauthorization: Bearer \xff\xfe\r\nconnection: close\r\n\r\n",
        401,
        "API key",
    )
    .await;
    check(
        b"GET /health HTTP/1.1\r\nx-request-id: \xff\xfe\r\nconnection: close\r\n\r\n",
        200,
        "x-request-id",
    )
    .await;
    check(b"GET /health HTTP/1.1\r\nx-request-id: a\0b\r\nconnection: close\r\n\r\n", 400, "").await;
    check(b"GET /\xff HTTP/1.1\r\nconnection: close\r\n\r\n", 400, "").await;
    check(b"GET /he alth HTTP/1.1\r\nconnection: close\r\n\r\n", 400, "").await;
    check(b"GET /nothing/%ff%00 HTTP/1.1\r\nconnection: close\r\n\r\n", 404, "there is nothing at").await;
    check(b"GET /health?\xff HTTP/1.1\r\nconnection: close\r\n\r\n", 400, "").await;
    check(b"GET /health?a=%ff%zz HTTP/1.1\r\nconnection: close\r\n\r\n", 200, "").await;
}

/// One tenant; the key is nobody's.
const KEYS: &str = "0000000000000000000000000000000000000000000000000000000000000000 nobody";
