use proptest::prelude::*;

use super::*;

/// Feeds `chunks`; returns what was released after each, the released whole, and the stop string.
fn run(stops: &[&str], chunks: &[&str]) -> (Vec<String>, String, Option<usize>) {
    let mut matcher = StopMatcher::new(stops).unwrap();
    let mut pieces = Vec::new();
    let mut which = None;
    for chunk in chunks {
        let mut piece = String::new();
        which = matcher.push(chunk, &mut piece);
        pieces.push(piece);
    }
    let mut end = String::new();
    matcher.finish(&mut end);
    let whole = pieces.concat() + &end;
    (pieces, whole, which)
}

/// The definition, by search over the whole: of all occurrences the one that ends first, of those the longest.
fn naive(stops: &[&str], text: &str) -> (String, Option<usize>) {
    let occurrences = stops
        .iter()
        .enumerate()
        .filter_map(|(index, stop)| text.find(stop).map(|start| (start + stop.len(), start, index)));
    match occurrences.min() {
        Some((_, start, index)) => (text[..start].to_owned(), Some(index)),
        None => (text.to_owned(), None),
    }
}

#[test]
fn text_is_held_back_only_while_it_may_be_a_stop_string() {
    //    stop strings       chunks                        released after each            at the end     stopped by
    check(&["END"], &["a", "E", "N", "x"], &["a", "", "", "ENx"], "aENx", None);
    check(&["END"], &["aE", "N", "D", "more"], &["a", "", "", ""], "a", Some(0));
    check(&["END"], &["EEND"], &["E"], "E", Some(0));
    check(&["aab"], &["aa", "a", "a", "b"], &["", "a", "a", ""], "aa", Some(0));
    check(&["END"], &["tail EN"], &["tail "], "tail EN", None);
    check(&["\n\n", "User:"], &["hi\n", "Us", "er", ":"], &["hi", "\n", "", ""], "hi\n", Some(1));
    check(&["€"], &["1", "€", "2"], &["1", "", ""], "1", Some(0));
    check(&["€a"], &["€", "b"], &["", "€b"], "€b", None);
    check(&[], &["any", "thing"], &["any", "thing"], "anything", None);
}

#[rustfmt::skip]
fn check(stops: &[&str], chunks: &[&str], pieces: &[&str], whole: &str, which: Option<usize>) {
    assert_eq!(run(stops, chunks), (pieces.iter().map(|&p| p.to_owned()).collect(), whole.to_owned(), which), "{stops:?} {chunks:?}");
}

#[test]
fn of_two_completed_by_one_character_the_longer_counts() {
    assert_eq!(run(&["b", "ab"], &["xab"]).1, "x");
    assert_eq!(run(&["b", "ab"], &["xab"]).2, Some(1));
    assert_eq!(run(&["abc", "b"], &["xabc"]).2, Some(1), "the first to be completed ends the text");
    assert_eq!(run(&["ab", "ab"], &["ab"]).2, Some(0));
}

#[test]
fn nothing_follows_a_stop_string() {
    let mut matcher = StopMatcher::new(&["."]).unwrap();
    let mut out = String::new();
    assert_eq!(matcher.push("one. two", &mut out), Some(0));
    assert_eq!(matcher.push("three", &mut out), Some(0));
    matcher.finish(&mut out);
    assert_eq!((out.as_str(), matcher.stopped()), ("one", Some(0)));
}

#[test]
fn impossible_stop_strings_are_refused() {
    let error = |stops: &[&str]| StopMatcher::new(stops).unwrap_err();
    assert_eq!(error(&["a", ""]), StopError::Empty { index: 1 });
    assert_eq!(error(&["a"; 17]), StopError::TooMany { count: 17 });
    assert_eq!(error(&[&"x".repeat(1025)]), StopError::TooLong { index: 0, bytes: 1025 });
    assert_eq!(error(&["a"; 17]).to_string(), "17 stop strings were given; give at most 16");
    assert!(StopMatcher::new(&["x".repeat(1024)]).is_ok());
}

#[test]
fn a_longest_stop_string_of_one_letter_is_found() {
    let stop = "a".repeat(STOP_STRING_BYTES_MAX);
    let text = "b".to_owned() + &stop;
    let chunks: Vec<&str> = text.as_bytes().chunks(7).map(|chunk| str::from_utf8(chunk).unwrap()).collect();
    assert_eq!(run(&[&stop], &chunks).1, "b");
}

/// Texts over few letters, so that beginnings of stop strings are everywhere; two of them of several bytes.
fn text(length: std::ops::Range<usize>) -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!['a', 'b', 'é', '😀']), length)
        .prop_map(|letters| letters.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn agrees_with_search_over_the_whole(
        stops in prop::collection::vec(text(1..5), 0..5),
        chunks in prop::collection::vec(text(0..5), 0..12),
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let chunks: Vec<&str> = chunks.iter().map(String::as_str).collect();
        let whole = chunks.concat();
        let (_, released, which) = run(&stops, &chunks);
        prop_assert_eq!((released, which), naive(&stops, &whole));
    }

    #[test]
    fn holds_back_no_more_than_the_beginning_of_a_stop_string(
        stops in prop::collection::vec(text(1..5), 1..4), text in text(0..30),
    ) {
        let mut matcher = StopMatcher::new(&stops).unwrap();
        let (mut seen, mut released) = (String::new(), String::new());
        for letter in text.chars() {
            seen.push(letter);
            if matcher.push(letter.encode_utf8(&mut [0; 4]), &mut released).is_some() { break; }
            let held = seen.strip_prefix(&released).expect("released text begins the text");
            prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
        }
    }
}
