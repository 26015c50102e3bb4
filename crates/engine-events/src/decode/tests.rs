use forebay_types::Tier;
use proptest::prelude::*;
use rmp::encode as to;

use super::*;
use crate::{
    encode::{Dialect, encode},
    event::{ExtraKey, GroupKind, Removed, Stored},
};

/// A value to write, so that tests can write what no engine would.
#[derive(Debug, Clone)]
enum Value {
    Nil,
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(&'static str),
    Bytes(Vec<u8>),
    Extension(i8, Vec<u8>),
    /// A value of one byte.
    Raw(u8),
    List(Vec<Value>),
    Map(Vec<(Value, Value)>),
}
use Value::{Bytes, Extension, Float, List, Map, Nil, Raw, Signed, Text, Unsigned};

impl Value {
    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Nil => to::write_nil(out).unwrap(),
            Raw(byte) => out.push(*byte),
            Unsigned(value) => drop(to::write_uint(out, *value).unwrap()),
            Signed(value) => drop(to::write_sint(out, *value).unwrap()),
            Float(value) => to::write_f64(out, *value).unwrap(),
            Text(text) => to::write_str(out, text).unwrap(),
            Bytes(bytes) => to::write_bin(out, bytes).unwrap(),
            Extension(kind, bytes) => {
                to::write_ext_meta(out, bytes.len() as u32, *kind).unwrap();
                out.extend_from_slice(bytes);
            }
            List(values) => {
                to::write_array_len(out, values.len() as u32).unwrap();
                values.iter().for_each(|value| value.write(out));
            }
            Map(pairs) => {
                to::write_map_len(out, pairs.len() as u32).unwrap();
                pairs.iter().for_each(|(key, value)| {
                    key.write(out);
                    value.write(out);
                });
            }
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.write(&mut out);
        out
    }
}

fn list<const N: usize>(values: [Value; N]) -> Value {
    List(values.into())
}

fn map<const N: usize>(pairs: [(&'static str, Value); N]) -> Value {
    Map(pairs.map(|(key, value)| (Text(key), value)).into())
}

fn batch_of(event: Value) -> Vec<u8> {
    list([Float(1.5), list([event])]).bytes()
}

fn only_event(event: Value) -> EngineEvent {
    let mut batch = decode(&batch_of(event)).unwrap();
    assert_eq!(batch.events.len(), 1);
    batch.events.pop().unwrap()
}

fn stored() -> Stored {
    Stored { lora_id: Some(3), lora_name: Some("adapter".into()), ..plain() }
}

fn plain() -> Stored {
    let tokens = vec![0, 127, 128, 255, 256, 65_535, 65_536, u32::MAX];
    Stored::plain(Some(EngineHash(1 << 63)), vec![EngineHash(u64::MAX), EngineHash(5)], tokens, 4)
}

#[test]
fn every_dialect_is_read_as_it_was_written() {
    let keyed = Stored {
        extra_keys: Some(vec![
            vec![ExtraKey::Text("salt".into()), ExtraKey::media("cat", -3), ExtraKey::Other([0xc3].into())],
            vec![],
        ]),
        ..stored()
    };
    let grouped = Stored {
        group: Some(1),
        kind: Some(GroupKind::SlidingWindow),
        window_tokens: Some(4096),
        ..keyed.clone()
    };
    let salted = Stored { salt: Some("s".into()), lora_name: Some("adapter".into()), ..plain() };
    let removed = |tier, group| EngineEvent::Removed(Removed { hashes: stored().hashes, tier, group });
    for (dialect, stored, group) in [
        (Dialect::VllmMap, grouped.clone(), Some(1)),
        (Dialect::VllmMapBytes, grouped, Some(1)),
        (Dialect::VllmList, keyed, None),
        (Dialect::Sglang, salted, None),
    ] {
        for dp_rank in [None, Some(0), Some(u16::MAX)] {
            let mut events: Vec<EngineEvent> = [Tier::Device, Tier::Host, Tier::Disk, Tier::Remote]
                .into_iter()
                .flat_map(|tier| {
                    [EngineEvent::Stored(Stored { tier, ..stored.clone() }), removed(tier, group)]
                })
                .collect();
            events.extend([EngineEvent::Cleared, EngineEvent::Unknown { tag: "BlockMoved".into() }]);
            let batch = EventBatch { time_seconds: 1.5, events, dp_rank };
            assert_eq!(decode(&encode(&batch, dialect)), Ok(batch), "{dialect:?}");
        }
    }
}

#[test]
fn a_hash_is_the_same_in_every_shape() {
    let last = [0xfe, 0xdc, 0xba, 0x98, 0x76, 0x54, 0x32, 0x10];
    let mut long = vec![0xaa; 24];
    long.extend(last);
    for value in [
        Unsigned(0xfedc_ba98_7654_3210),
        Signed(0xfedc_ba98_7654_3210_u64.cast_signed()),
        Bytes(long),
        Bytes(last.into()),
    ] {
        let event =
            only_event(list([Text("BlockRemoved"), list([value, Signed(-1), Bytes(vec![0x12, 0x34])])]));
        let EngineEvent::Removed(removed) = event else { panic!("{event:?}") };
        let expected = [0xfedc_ba98_7654_3210, u64::MAX, 0x1234].map(EngineHash);
        assert_eq!((&removed.hashes[..], removed.tier, removed.group), (&expected[..], Tier::Device, None));
    }
}

#[test]
fn lists_of_every_age_are_read() {
    let parts = |count: usize| {
        let all = [
            Text("BlockStored"),
            list([Unsigned(7)]),
            Nil,
            list([Unsigned(1), Unsigned(2)]),
            Unsigned(2),
            Nil,
            Text("CPU"),
            Text("adapter"),
            list([list([Text("adapter")])]),
            Unsigned(2),
            Text("mla_attention"),
            Text("of the future"),
        ];
        List(all[..count].to_vec())
    };
    let oldest = Stored::plain(None, vec![EngineHash(7)], vec![1, 2], 2);
    let with_medium = Stored { tier: Tier::Host, ..oldest.clone() };
    let with_name = Stored { lora_name: Some("adapter".into()), ..with_medium.clone() };
    let keys = Some(vec![vec![ExtraKey::Text("adapter".into())]]);
    let with_keys = Stored { extra_keys: keys, ..with_name.clone() };
    let newest = Stored { group: Some(2), kind: Some(GroupKind::MlaAttention), ..with_keys.clone() };
    for (count, expected) in
        [(5, &oldest), (6, &oldest), (7, &with_medium), (8, &with_name), (9, &with_keys), (12, &newest)]
    {
        assert_eq!(only_event(parts(count)), EngineEvent::Stored(expected.clone()), "{count} parts");
    }
}

#[test]
fn what_only_sglang_says_is_read() {
    // Metadata in the place of an adapter's name, and pairs for tokens.
    let pairs = list([list([Unsigned(1), Unsigned(2)]), list([Unsigned(2), Unsigned(3)])]);
    let event = only_event(list([
        Text("BlockStored"),
        list([Signed(-7)]),
        Signed(-8),
        pairs,
        Unsigned(2),
        Nil,
        Text("CPU_PINNED"),
        map([("of the future", Nil), ("cache_salt", Text("s"))]),
    ]));
    let EngineEvent::Stored(stored) = event else { panic!("{event:?}") };
    assert_eq!(stored.hashes, [EngineHash(-7_i64 as u64)]);
    assert_eq!(stored.parent, Some(EngineHash(-8_i64 as u64)));
    assert_eq!((stored.tokens, stored.salt.as_deref(), stored.tier), (vec![1, 2], Some("s"), Tier::Host));
}

#[test]
fn media_become_tiers() {
    let tier_of = |pairs: Vec<(Value, Value)>| {
        let mut all = vec![(Text("type"), Text("BlockRemoved")), (Text("block_hashes"), list([Unsigned(1)]))];
        all.extend(pairs);
        match only_event(Map(all)) {
            EngineEvent::Removed(removed) => removed.tier,
            other => panic!("{other:?}"),
        }
    };
    for (medium, expected) in [
        ("GPU", Tier::Device),
        ("gpu", Tier::Device),
        ("CPU", Tier::Host),
        ("cpu", Tier::Host),
        ("CPU_PINNED", Tier::Host),
        ("DISK", Tier::Disk),
        ("STORAGE", Tier::Disk),
        ("EXTERNAL", Tier::Remote),
        ("of the future", Tier::Remote),
        ("", Tier::Remote),
    ] {
        assert_eq!(tier_of(vec![(Text("medium"), Text(medium))]), expected, "{medium}");
    }
    assert_eq!(tier_of(vec![]), Tier::Device);
    assert_eq!(tier_of(vec![(Text("medium"), Nil)]), Tier::Device);
    let elsewhere = vec![(Text("medium"), Text("CPU")), (Text("locality"), Text("REMOTE"))];
    assert_eq!(tier_of(elsewhere), Tier::Remote);
    let here = vec![(Text("medium"), Text("CPU")), (Text("locality"), Text("LOCAL"))];
    assert_eq!(tier_of(here), Tier::Host);
}

#[test]
fn the_unknown_is_passed_over() {
    let event = map([
        ("of the future", map([("deep", list([list([Nil, Bytes(vec![1; 300])]), Float(1.0)]))])),
        ("block_hashes", list([Unsigned(1)])),
        // The type may come late.
        ("type", Text("BlockRemoved")),
        ("ownership", Text("us")),
    ]);
    let Map(mut pairs) = event.clone() else { unreachable!() };
    pairs.push((Unsigned(4), Text("a key that is no text")));
    let batch = map([
        ("ts", Unsigned(3)),
        ("of the future", Nil),
        (
            "events",
            list([event, Map(pairs), map([("type", Text("BlockMoved")), ("block_hashes", list([]))])]),
        ),
        ("attn_dp_rank", Unsigned(2)),
    ]);
    let removed =
        EngineEvent::Removed(Removed { hashes: vec![EngineHash(1)], tier: Tier::Device, group: None });
    let unknown = EngineEvent::Unknown { tag: "BlockMoved".into() };
    let expected =
        EventBatch { time_seconds: 3.0, events: vec![removed.clone(), removed, unknown], dp_rank: Some(2) };
    assert_eq!(decode(&batch.bytes()), Ok(expected));
    let longer = list([Float(0.0), list([]), Nil, Text("of the future")]);
    assert_eq!(decode(&longer.bytes()).unwrap().dp_rank, None);
}

#[test]
fn a_mistake_is_named() {
    let stored = |field: &'static str, value: Value| {
        let mut event = vec![
            (Text("type"), Text("BlockStored")),
            (Text("block_hashes"), list([Unsigned(1)])),
            (Text("parent_block_hash"), Nil),
            (Text("token_ids"), list([])),
            (Text("block_size"), Unsigned(16)),
        ];
        event.retain(|(key, _)| !matches!(key, Text(text) if *text == field));
        event.push((Text(field), value));
        list([Float(0.0), list([map([("type", Text("AllBlocksCleared"))]), Map(event)])]).bytes()
    };
    for (payload, said) in [
        (vec![], "shape of the batch: it goes on past the end of the payload"),
        (Text("hello").bytes(), "shape of the batch: a text where a list or a map belongs"),
        (vec![0xc1], "shape of the batch: a byte that starts no value where a list or a map belongs"),
        (list([]).bytes(), "ts of the batch: missing"),
        (list([Float(0.0)]).bytes(), "events of the batch: missing"),
        (list([Text("now"), list([])]).bytes(), "ts of the batch: a text where seconds belongs"),
        (list([Float(0.0), Nil]).bytes(), "events of the batch: nothing where a list belongs"),
        (
            list([Float(0.0), list([]), Unsigned(65_536)]).bytes(),
            "data_parallel_rank of the batch: another integer where a rank (0 to 65535) belongs",
        ),
        ([list([Float(0.0), list([])]).bytes(), vec![0]].concat(), "end of the batch: bytes after it"),
        (batch_of(Float(1.0)), "shape of event 0: a fraction where an event (a list or a map) belongs"),
        (batch_of(list([])), "type of event 0: missing"),
        (batch_of(map([])), "type of event 0: missing"),
        (batch_of(list([Text("BlockRemoved")])), "block_hashes of event 0: missing"),
        (batch_of(list([Text("BlockStored"), list([]), Nil])), "token_ids of event 0: missing"),
        (stored("token_ids", Nil), "token_ids of event 1: missing"),
        (
            stored("block_hashes", Unsigned(1)),
            "block_hashes of event 1: an integer where a list of hashes belongs",
        ),
        (
            stored("block_hashes", list([Bytes(vec![])])),
            "block_hashes of event 1: bytes of another length where a hash (an integer or 1 to 64 bytes) belongs",
        ),
        (
            stored("token_ids", list([Unsigned(1), Signed(-1)])),
            "token_ids of event 1: another integer where a token id (0 to 4294967295) belongs",
        ),
        (
            stored("token_ids", list([Unsigned(1 << 32)])),
            "token_ids of event 1: another integer where a token id (0 to 4294967295) belongs",
        ),
        (
            stored("token_ids", list([Text("the")])),
            "token_ids of event 1: a text where a token id (0 to 4294967295) belongs",
        ),
        (stored("medium", Unsigned(1)), "medium of event 1: an integer where a text belongs"),
    ] {
        assert_eq!(decode(&payload).unwrap_err().to_string(), said);
    }
    let parentless = [0x92, 0x00, 0x91, 0x84].into_iter();
    let mut payload: Vec<u8> = parentless.collect();
    for (key, value) in [
        ("type", Text("BlockStored")),
        ("block_hashes", list([])),
        ("token_ids", list([])),
        ("block_size", Unsigned(1)),
    ] {
        Text(key).write(&mut payload);
        value.write(&mut payload);
    }
    let said = decode(&payload).unwrap_err().to_string();
    assert_eq!(said, "parent_block_hash of event 0: missing", "a parent that is not said is not: none");
    let not_utf8 = batch_of(list([Text("BlockRemoved"), list([]), Text("GPU")]));
    let at = not_utf8.len() - 1;
    let broken = [&not_utf8[..at], &[0xff]].concat();
    assert_eq!(decode(&broken).unwrap_err().to_string(), "medium of event 0: text that is not UTF-8");
}

#[test]
fn bounds_hold_before_anything_is_reserved() {
    let long = vec![0; PAYLOAD_BYTES_MAX + 1];
    assert_eq!(decode(&long), Err(DecodeError::TooLong { bytes: PAYLOAD_BYTES_MAX + 1 }));
    // A list of 4 billion, and nothing behind it.
    let said = |payload: &[u8]| decode(payload).unwrap_err().to_string();
    let endless: [u8; 5] = [0xdd, 0xff, 0xff, 0xff, 0xff];
    assert_eq!(said(&endless), "shape of the batch: it goes on past the end of the payload");
    assert_eq!(
        said(&[&[0x92, 0x00], &endless[..]].concat()),
        "events of the batch: it goes on past the end of the payload"
    );
    let too_many = |count: usize, prefix: &[u8], value: u8| {
        let mut payload = prefix.to_vec();
        to::write_array_len(&mut payload, count as u32).unwrap();
        payload.resize(payload.len() + count, value);
        said(&payload)
    };
    let event = |parts: u8, before: &[Value]| {
        let mut prefix = vec![0x92, 0x00, 0x91, 0x90 | parts];
        before.iter().for_each(|value| value.write(&mut prefix));
        prefix
    };
    let tag = Text("BlockStored");
    assert_eq!(
        too_many(EVENTS_MAX + 1, &[0x92, 0x00], 0xc0),
        "events of the batch: more than 262144 events in one batch"
    );
    assert_eq!(
        too_many(HASHES_MAX + 1, &event(2, std::slice::from_ref(&tag)), 0),
        "block_hashes of event 0: more than 1048576 block hashes in one batch"
    );
    let before_tokens = event(4, &[tag.clone(), list([]), Nil]);
    assert_eq!(
        too_many(TOKENS_MAX + 1, &before_tokens, 0),
        "token_ids of event 0: more than 8388608 token ids in one batch"
    );
    let mut before_keys = event(9, &[tag, list([]), Nil, list([]), Unsigned(1), Nil, Nil, Nil]);
    assert_eq!(
        too_many(HASHES_MAX + 1, &before_keys, 0xc0),
        "extra_keys of event 0: more than 1048576 block hashes in one batch"
    );
    // As many keys of one block, which counts itself.
    before_keys.push(0x91);
    assert_eq!(
        too_many(HASHES_MAX, &before_keys, 0xc0),
        "extra_keys of event 0: more than 1048576 block hashes in one batch"
    );
}

#[test]
fn nesting_costs_no_stack() {
    // Ten million lists in each other, in a field that is passed over, to the end and cut off.
    for end in [Some(0xc0), None] {
        let mut payload = vec![0x93, 0x00, 0x90, 0xc0];
        payload[0] = 0x94;
        payload.resize(payload.len() + 10_000_000, 0x91);
        payload.extend(end);
        assert_eq!(decode(&payload).is_ok(), end.is_some());
    }
}

#[test]
fn names_of_unknown_types_are_cut_between_letters() {
    let tag: String = "é".repeat(50);
    let payload = batch_of(list([Text(tag.leak())]));
    let EngineEvent::Unknown { tag } = decode(&payload).unwrap().events.remove(0) else { panic!() };
    assert_eq!(&*tag, "é".repeat(32));
}

/// Of every length that has a format of its own.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![0..20_usize, Just(255), Just(256), Just(65_536)];
    (any::<u8>(), length).prop_map(|(byte, length)| vec![byte; length])
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Nil),
        any::<u64>().prop_map(Unsigned),
        any::<i64>().prop_map(Signed),
        any::<f64>().prop_map(Float),
        prop::sample::select(vec!["type", "BlockStored", "BlockRemoved", "token_ids", "medium", "GPU", "é"])
            .prop_map(Text),
        any::<bool>().prop_map(|value| if value { Raw(0xc3) } else { Raw(0xc2) }),
        bytes().prop_map(Bytes),
        (any::<i8>(), bytes()).prop_map(|(kind, bytes)| Extension(kind, bytes)),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(List),
            prop::collection::vec((inner.clone(), inner), 0..4).prop_map(Map),
        ]
    })
}

proptest! {
    #[test]
    fn any_value_is_passed_over_exactly(value in any_value(), after in prop::collection::vec(any::<u8>(), 0..9)) {
        let bytes = value.bytes();
        let all = [&bytes[..], &after].concat();
        let mut reader = Reader::new(&all);
        prop_assert_eq!(reader.raw(), Ok(&bytes[..]));
        prop_assert_eq!(reader.bytes_left(), after.len());
        for cut in (0..bytes.len().min(100)).chain([bytes.len() - 1]) {
            prop_assert_eq!(Reader::new(&bytes[..cut]).raw(), Err(Problem::Truncated));
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&bytes);
        // The same inside an event, where random bytes seldom come.
        let _ = decode(&[&[0x92, 0x00, 0x91], &bytes[..]].concat());
    }

    #[test]
    fn any_values_in_an_events_fields_are_read_or_refused(
        values in prop::collection::vec(any_value(), 0..11),
        tag in prop::sample::select(vec!["BlockStored", "BlockRemoved"]),
    ) {
        let event = List([Text(tag)].into_iter().chain(values).collect());
        let _ = decode(&batch_of(event));
    }
}
