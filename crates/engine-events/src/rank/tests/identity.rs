//! What makes blocks with equal tokens different.

use super::*;
use crate::event::ExtraKey;

#[test]
fn salts_and_adapters_have_roots_of_their_own() {
    let root = |model: &str, salt: &str| hasher(4).root(model, salt);
    let text = |text: &str| ExtraKey::Text(text.into());
    let first = |keys: Vec<ExtraKey>| Some(vec![keys, vec![]]);
    let event = stored(None, &[1, 2]);
    let lora = Some(Box::from("lora"));
    for (what, event, expected) in [
        ("plain", event.clone(), root("m", "")),
        ("no keys", Stored { extra_keys: first(vec![]), ..event.clone() }, root("m", "")),
        ("vLLM's salt", Stored { extra_keys: first(vec![text("s")]), ..event.clone() }, root("m", "s")),
        ("SGLang's salt", Stored { salt: Some("s".into()), ..event.clone() }, root("m", "s")),
        ("an adapter", Stored { lora_name: lora.clone(), ..event.clone() }, root("lora", "")),
        (
            "an adapter, in every block's keys",
            Stored {
                lora_name: lora.clone(),
                lora_id: Some(1),
                extra_keys: Some(vec![vec![text("lora")], vec![text("lora")]]),
                ..event.clone()
            },
            root("lora", ""),
        ),
        (
            "an adapter and a salt",
            Stored {
                lora_name: lora,
                extra_keys: Some(vec![vec![text("lora"), text("s")], vec![text("lora")]]),
                ..event
            },
            root("lora", "s"),
        ),
    ] {
        let mut cache = cache();
        let chain = own(expected, &[1, 2, 3]);
        assert_eq!(cache.says(event), only([on_device(None, &chain[..2])]), "{what}");
        // What follows inherits it, whatever it says itself.
        assert_eq!(
            cache.says(stored(Some(2), &[3])),
            only([on_device(Some(chain[1]), &chain[2..])]),
            "{what}"
        );
    }
}

#[test]
fn what_is_not_plain_text_matches_only_itself() {
    let text = |text: &str| ExtraKey::Text(text.into());
    let media = |hash: &str, offset| ExtraKey::media(hash, offset);
    let keys = |first: Vec<ExtraKey>, second: Vec<ExtraKey>| Stored {
        extra_keys: Some(vec![first, second]),
        ..stored(None, &[1, 2])
    };
    let variants = [
        keys(vec![], vec![]),
        keys(vec![text("s")], vec![]),
        keys(vec![], vec![media("cat", 0)]),
        keys(vec![], vec![media("cat", 1)]),
        keys(vec![], vec![media("dog", 0)]),
        keys(vec![], vec![text("s")]),
        keys(vec![media("cat", 0)], vec![]),
        keys(vec![media("cat", 0)], vec![media("cat", -4)]),
        keys(vec![media("cat", 0), text("s")], vec![]),
        keys(vec![text("s"), text("t")], vec![]),
        keys(vec![text("st")], vec![]),
        Stored { lora_id: Some(1), ..stored(None, &[1, 2]) },
        Stored { lora_id: Some(2), ..stored(None, &[1, 2]) },
        Stored { salt: Some("t".into()), ..keys(vec![text("s")], vec![]) },
    ];
    let chain = |event: &Stored| {
        let applied = cache().says(event.clone());
        match &applied.events[..] {
            [KvEvent::Stored { parent: None, hashes, .. }] if applied.faults.is_empty() => hashes.clone(),
            other => panic!("{other:?}"),
        }
    };
    let chains: Vec<Vec<BlockHash>> = variants.iter().map(chain).collect();
    for (index, one) in chains.iter().enumerate() {
        assert_eq!(*one, chain(&variants[index]), "the same each time");
        for (other_index, other) in chains[..index].iter().enumerate() {
            assert_ne!(one[1], other[1], "{:?} and {:?}", variants[index], variants[other_index]);
        }
    }
    let plain = plain(&[1, 2]);
    assert_eq!(chains[0], plain);
    assert_eq!(chains[2][0], plain[0], "what is before an image is plain");
    assert_ne!(chains[6][0], plain[0]);
    // What follows an image is not plain either, and is told as following it.
    let mut cache = cache();
    assert_eq!(cache.says(variants[2].clone()).events, [on_device(None, &chains[2])]);
    let after = cache.says(stored(Some(2), &[3]));
    let third = hasher(4).next(chains[2][1], &[3; 4]);
    assert_eq!(after, only([on_device(Some(chains[2][1]), &[third])]));
}

#[test]
fn keys_within_a_block_of_ours_make_that_block_private() {
    // Ours has 8 tokens, the engine's 4: an image in the second half is one in the block.
    let event = |second: Vec<ExtraKey>| Stored {
        extra_keys: Some(vec![vec![], second, vec![], vec![]]),
        ..stored(None, &[1, 2, 3, 4])
    };
    let chain = |event: Stored| match &cache_of(8, None, 100).says(event).events[..] {
        [KvEvent::Stored { hashes, .. }] => hashes.clone(),
        other => panic!("{other:?}"),
    };
    let plain = hasher(8).chain(hasher(8).root("m", ""), &stored(None, &[1, 2, 3, 4]).tokens);
    assert_eq!(chain(event(vec![])), plain);
    let private = chain(event(vec![ExtraKey::media("cat", 0)]));
    assert_eq!(private.len(), 2);
    assert!(private[0] != plain[0] && private[1] != plain[1]);
}
