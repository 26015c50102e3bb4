use proptest::prelude::*;
use serde_json::{Value, value::RawValue};

use super::*;

fn parse(json: &str) -> Result<Object, Flaw> {
    Object::parse(Bytes::copy_from_slice(json.as_bytes()))
}

fn changed(json: &str, change: impl FnOnce(&mut Object), changes: Vec<(&str, Change)>) -> String {
    let mut object = parse(json).unwrap();
    change(&mut object);
    String::from_utf8(object.with(changes)).unwrap()
}

#[test]
fn fields_are_changed_and_the_rest_stays_as_it_was() {
    let body = r#"{ "model": "a", "messages": [ {"x" : 1.50} ], "caf\u00e9":null}"#;
    assert_eq!(
        changed(body, |_| {}, vec![]),
        r#"{"model":"a","messages":[ {"x" : 1.50} ],"caf\u00e9":null}"#
    );
    let without = |object: &mut Object| assert!(object.remove("café") && !object.remove("absent"));
    let changes = vec![
        ("model", Change::Set("\"b\"".to_owned())),
        ("messages", Change::Replace("[]".to_owned())),
        ("absent", Change::Replace("1".to_owned())),
        ("n", Change::Set("1".to_owned())),
        ("café", Change::Remove),
    ];
    assert_eq!(changed(body, without, changes), r#"{"model":"b","messages":[],"n":1}"#);
    assert_eq!(changed("{}", |_| {}, vec![]), "{}");
    let object = parse(body).unwrap();
    assert_eq!(object.get("café"), Some(&b"null"[..]));
    assert_eq!(object.get("messages"), Some(&br#"[ {"x" : 1.50} ]"#[..]));
    assert_eq!(object.get("absent"), None);
}

#[test]
fn equal_are_those_that_say_the_same_in_the_same_words() {
    let a = parse(r#"{"a":1, "b" : [2]}"#).unwrap();
    let mut b = parse(r#"{"c":0,"\u0061":1,"b":[2]}"#).unwrap();
    assert_ne!(a, b);
    b.remove("c");
    assert_eq!(a, b);
    assert_ne!(a, parse(r#"{"a":1,"b":[ 2]}"#).unwrap());
}

#[test]
fn flaws_are_named_where_they_are() {
    let check = |json: &str, says: &str| {
        let error = parse(json).unwrap_err().to_string();
        assert!(error.contains(says), "{json}: {error}");
    };
    check("[]", "an object is expected at line 1 column 1");
    check("", "an object");
    check("{} x", "nothing more is expected at line 1 column 4");
    check("{\"a\":1,\n }", "a key in quotation marks is expected at line 2 column 2");
    check(r#"{"a" 1}"#, "`:` is expected");
    check(r#"{"a":1"#, "`,` or `}` is expected");
    check(r#"{"a":[1 2]}"#, "`,` or `]` is expected at line 1 column 9");
    check(r#"{"a":{"b":1]}"#, "`,` or `}`");
    check(r#"{"a":01}"#, "`,` or `}`");
    check(r#"{"a":-}"#, "a digit");
    check(r#"{"a":1.}"#, "a digit");
    check(r#"{"a":nul}"#, "a value is expected at line 1 column 6");
    check("{\"a\":\"b\n\"}", "no control character");
    check(r#"{"a":"\x"}"#, "an escape that JSON has");
    check(r#"{"a":"\u12g4"}"#, "four digits");
    check(r#"{"a":"b"#, "the end of a string");
    check(r#"{"a":1,"a":2}"#, "`a` comes twice");
    check(r#"{"a":1,"\u0061":2}"#, "`a` comes twice");
    let long = "n".repeat(1000);
    check(&format!("{{\"{long}\":1,\"{long}\":2}}"), "nnn…` comes twice");
    let many = |count| (0..count).map(|n| format!("\"{n}\":0")).collect::<Vec<_>>().join(",");
    check(&format!("{{{}}}", many(257)), "more than 256");
    assert!(parse(&format!("{{{}}}", many(256))).is_ok());
    let error = Object::parse(Bytes::from_static(b"{\"a\":\"\xff\"}")).unwrap_err();
    assert!(error.to_string().contains("not UTF-8 at line 1 column 7"), "{error}");
}

#[test]
fn depth_and_halves_are_found_where_they_are() {
    let check = |json: &str, says: Option<&str>| {
        let said = parse(json).err().map(|flaw| flaw.to_string());
        assert_eq!(said.is_some(), says.is_some(), "{json}: {said:?}");
        let said = said.unwrap_or_default();
        assert!(says.is_none_or(|says| said.contains(says)), "{json}: {said}");
    };
    let nested = |open: &str, close: &str, depth: usize| {
        format!("{{\"a\":{}{}}}", open.repeat(depth), close.repeat(depth))
    };
    check(&nested("[", "]", 127), None);
    check(&nested("[", "]", 128), Some("deeper than 128 levels at line 1 column 133"));
    check(&nested("{\"a\":", "1}", 128).replace("1}", "}"), Some("deeper"));
    check(&nested("[", "]", 1_000_000), Some("deeper"));
    check(&format!("{{\"a\":[\"{}\",[],[],{{}}]}}", "[".repeat(1000)), None);
    check(&format!("{{\"a\":[{}]}}", vec!["[{}]"; 1000].join(",")), None);
    check(r#"{"a":["\"[[[", "\\", "\ud83d\ude00 \u00e9 \uD83D\uDE00"]}"#, None);
    check("{\"a\":[1,\n \"ab\\ud800\"]}", Some(r"`\ud800` at line 2 column 5 is half"));
    check(r#"{"a":"\udc00\ud800"}"#, Some(r"`\udc00`"));
    check(r#"{"a":"\ud800\ud800\udc00"}"#, Some(r"`\ud800` at line 1 column 7"));
    check(r#"{"\ud800":1}"#, Some("column 3"));
    check(r#"{"a":"\\ud800"}"#, None);
}

fn json_text() -> impl Strategy<Value = String> {
    let scalar = prop_oneof![
        Just("null".to_owned()),
        Just("true".to_owned()),
        "-?(0|[1-9][0-9]{0,3})(\\.[0-9]{1,3})?([eE][+-]?[0-9]{1,2})?",
        r#""([a-zä字 /\[\]{},:]|\\["\\/bfnrt]|\\u00[0-9a-f]{2}|\\ud83d\\ude0[0-9])*""#,
    ];
    scalar.prop_recursive(4, 24, 4, |inner| {
        let space = || prop::sample::select(vec!["", " ", "\n\t "]);
        let list = (prop::collection::vec(inner.clone(), 0..4), space())
            .prop_map(|(values, space)| format!("[{space}{}{space}]", values.join(&format!("{space},"))));
        let fields = prop::collection::btree_map("[a-z]{0,4}", inner, 0..4);
        let object = (fields, space()).prop_map(|(fields, space)| {
            let fields: Vec<String> =
                fields.iter().map(|(key, value)| format!("{space}\"{key}\"{space}:{value}")).collect();
            format!("{{{}{space}}}", fields.join(","))
        });
        prop_oneof![list, object]
    })
}

/// What serde_json says of the same text, with its fields.
fn reference(json: &[u8]) -> Option<Vec<(String, Box<RawValue>)>> {
    let fields: serde_json::Map<String, Value> = serde_json::from_slice(json).ok()?;
    let raw: std::collections::HashMap<String, Box<RawValue>> = serde_json::from_slice(json).ok()?;
    Some(fields.keys().map(|name| (name.clone(), raw[name].clone())).collect())
}

proptest! {
    #[test]
    fn every_object_is_read_as_serde_json_reads_it(
        json in json_text(),
        noise in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
    ) {
        let text = format!("{{\"a\":{json}, \"b\" : {json}}}");
        let object = parse(&text).unwrap();
        for (name, value) in reference(text.as_bytes()).unwrap() {
            prop_assert_eq!(object.get(&name), Some(value.get().as_bytes()));
        }
        // A byte here and there is another: both take it or neither does. (serde_json's numbers have bounds, and it
        // takes the last of equal keys.)
        let mut bytes = text.into_bytes();
        for (at, byte) in noise {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let ours = Object::parse(Bytes::from(bytes.clone()));
        let theirs = serde_json::from_slice::<serde_json::Map<String, Value>>(&bytes);
        match (&ours, &theirs) {
            (Ok(_), Ok(_)) | (Err(_), Err(_)) | (Err(Flaw::Twice { .. }), Ok(_)) => {}
            (Ok(_), Err(error)) => prop_assert!(error.to_string().contains("out of range"), "{error}"),
            (Err(flaw), Ok(_)) => prop_assert!(false, "{flaw}: {}", String::from_utf8_lossy(&bytes)),
        }
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(prop::sample::select(&b"{}[]\",:\\u0d8a1-.eE tn\xff\n"[..]), 0..40)) {
        let mut json = b"{\"a\":".to_vec();
        json.extend(bytes);
        let _ = Object::parse(Bytes::from(json));
    }
}
