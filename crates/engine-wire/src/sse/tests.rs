use proptest::prelude::*;

use super::*;

const LIMITS: SseLimits = SseLimits { line_bytes_max: 256, event_bytes_max: 512 };

/// Events as owned text, and how many bytes belonged to ended events.
fn decode(pieces: &[&[u8]], limits: SseLimits) -> (Vec<(String, String)>, Result<usize, SseError>) {
    let mut decoder = SseDecoder::new(limits);
    let mut events = Vec::new();
    let (mut seen, mut ended) = (0, 0);
    for piece in pieces {
        let push = decoder.push(piece, |event| events.push((event.name.to_owned(), event.data.to_owned())));
        match push {
            Ok(0) => {}
            Ok(count) => ended = seen + count,
            Err(error) => return (events, Err(error)),
        }
        seen += piece.len();
    }
    (events, Ok(ended))
}

/// What the standard says, line by line over the whole text, with no thought for speed or pieces.
fn naive(text: &str) -> Vec<(String, String)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let mut events = Vec::new();
    let (mut name, mut data): (String, Option<String>) = (String::new(), None);
    let Some((whole, _unfinished)) = text.rsplit_once('\n') else { return events };
    for line in whole.split('\n') {
        if line.is_empty() {
            if let Some(data) = data.take() {
                events.push((name.clone(), data));
            }
            name.clear();
            continue;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value).to_owned();
        match field {
            "data" => {
                data = Some(match data {
                    None => value,
                    Some(before) => format!("{before}\n{value}"),
                })
            }
            "event" => name = value,
            _ => {}
        }
    }
    events
}

fn event(name: &str, data: &str) -> (String, String) {
    (name.to_owned(), data.to_owned())
}

#[test]
fn events_are_read_as_the_standard_says() {
    let check = |text: &str, expected: &[(String, String)]| {
        let (events, ended) = decode(&[text.as_bytes()], LIMITS);
        assert_eq!(events, expected, "{text:?}");
        assert!(ended.is_ok());
        assert_eq!(naive(text), expected, "the model, {text:?}");
    };
    check("data: a\n\n", &[event("", "a")]);
    check("data:a\r\n\r\ndata:  b\r\n\r\n", &[event("", "a"), event("", " b")]);
    check("data: a\r\rdata: b\r\r", &[event("", "a"), event("", "b")]);
    check("event: error\ndata: a\n\ndata: b\n\n", &[event("error", "a"), event("", "b")]);
    check("data: a\ndata\ndata: c\n\n", &[event("", "a\n\nc")]);
    check(": ping\n\nid: 4\nretry: 5\nsomething: else\n\n", &[]);
    check("event: lonely\n\ndata: a\n\n", &[event("", "a")]);
    check("\u{feff}data: a\n\n", &[event("", "a")]);
    check("data: unfinished\n", &[]);
    check("data: unfinished", &[]);
    check("", &[]);
}

#[test]
fn bytes_of_ended_events_are_told_from_the_rest() {
    let check = |pieces: &[&str], expected: usize| {
        let pieces: Vec<&[u8]> = pieces.iter().map(|piece| piece.as_bytes()).collect();
        assert_eq!(decode(&pieces, LIMITS).1, Ok(expected), "{pieces:?}");
    };
    check(&["data: a\n\n"], 9);
    check(&["data: a\n\ndata: b"], 9);
    check(&["data: a\n", "\ndata: b"], 9);
    check(&["data: a\r\n\r", "\n"], 11);
    check(&["data: a", "b\n"], 0);
    check(&[": ping\n\n"], 8);
}

#[test]
fn a_stream_that_ends_between_events_is_told_from_one_that_is_cut() {
    let check = |text: &str, whole: bool| {
        let mut decoder = SseDecoder::new(LIMITS);
        decoder.push(text.as_bytes(), |_| {}).expect("a sound stream");
        assert_eq!(decoder.is_between_events(), whole, "{text:?}");
    };
    check("data: a\n\n", true);
    check("data: a\n", false);
    check("data: a", false);
    check("", true);
}

#[test]
fn lines_and_events_without_end_are_refused_before_they_are_kept() {
    let long = [b'x'; 300];
    let line = Err(SseError::LineTooLong { limit_bytes: 256 });
    assert_eq!(decode(&[&long], LIMITS).1, line, "in one piece");
    assert_eq!(decode(&[&long[..200], &long[200..]], LIMITS).1, line, "in two");
    assert_eq!(decode(&[&[&long[..], b"\n"].concat()], LIMITS).1, line, "even if it ends");
    let event = "data: 0123456789\n".repeat(60);
    assert_eq!(decode(&[event.as_bytes()], LIMITS).1, Err(SseError::EventTooLong { limit_bytes: 512 }));
    let mut decoder = SseDecoder::new(LIMITS);
    for _ in 0..100_000 {
        if decoder.push(b"xxxxxxxx", |_| {}).is_err() {
            break;
        }
    }
    assert!(decoder.line.capacity() <= 1024, "{} bytes are kept", decoder.line.capacity());
}

#[test]
fn what_is_no_text_is_an_error_and_a_cut_letter_is_none() {
    assert_eq!(decode(&[b"data: \xff\xfe\n\n"], LIMITS).1, Err(SseError::NotUtf8));
    let text = "data: ä€𝄞\n\n".as_bytes();
    for cut in 0..text.len() {
        let (events, ended) = decode(&[&text[..cut], &text[cut..]], LIMITS);
        assert_eq!((events, ended), (vec![event("", "ä€𝄞")], Ok(text.len())), "cut at {cut}");
    }
}

fn stream() -> impl Strategy<Value = String> {
    let line = prop_oneof![
        4 => "data: ?[a-zä€{}\" :]{0,12}",
        1 => "event: ?[a-z]{0,6}",
        1 => ": ?[a-z]{0,6}",
        1 => "[a-z]{0,6}",
    ];
    let end = prop_oneof![3 => Just("\n"), 2 => Just("\r\n"), 1 => Just("\r")];
    let lines = prop::collection::vec((line, end.clone(), prop::option::of(end)), 0..12);
    (any::<bool>(), lines, "[a-z]{0,5}").prop_map(|(mark, lines, tail)| {
        let mut text = if mark { BYTE_ORDER_MARK.to_owned() } else { String::new() };
        for (line, end, blank) in lines {
            text += &line;
            text += end;
            text += blank.unwrap_or_default();
        }
        text + &tail
    })
}

proptest! {
    #[test]
    fn any_cut_gives_the_same_events(text in stream(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8)) {
        let bytes = text.as_bytes();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.sort_unstable();
        let mut pieces = Vec::new();
        let mut from = 0;
        for cut in cuts {
            pieces.push(&bytes[from..cut]);
            from = cut;
        }
        pieces.push(&bytes[from..]);
        let (events, ended) = decode(&pieces, LIMITS);
        prop_assert_eq!(&events, &naive(&text));
        let ended = ended.expect("a sound stream");
        // What is said to have ended holds all events, so a reader of whole events loses none.
        prop_assert_eq!(decode(&[&bytes[..ended]], LIMITS).0, events);
    }

    #[test]
    fn no_bytes_make_it_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..10)) {
        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        let _ = decode(&pieces, LIMITS);
    }
}
