#!/usr/bin/env python3
"""Writes the `tokenizer.json` that a Mistral `tekken.json` means: `convert_tekken.py tekken.json tokenizer.json`.

Tekken lists tokens by rank and merges whatever two tokens make the token of the lowest rank. So each token's merges are
all pairs of tokens that make it, and its rank is theirs.
"""

import base64
import json
import pathlib
import sys

# What files of version 3 do not list; the others up to the number of special tokens have numbers for names.
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
           "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
           "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]


def letters():
    """GPT-2's alphabet: a printable character for each byte."""
    others = iter(range(0x100, 0x200))
    printable = set(range(0x21, 0x7F)) | set(range(0xA1, 0xAD)) | set(range(0xAE, 0x100))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def convert(tekken):
    config = tekken["config"]
    specials = config["default_num_special_tokens"]
    tokens = [base64.b64decode(token["token_bytes"]) for token in tekken["vocab"]]
    tokens = tokens[: config["default_vocab_size"] - specials]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    alphabet = letters()
    text = lambda token: "".join(alphabet[byte] for byte in token)
    merges = []
    for token in tokens:
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [[text(left), text(right)] for left, right in pairs]
    names = SPECIAL + [f"<SPECIAL_{rank}>" for rank in range(len(SPECIAL), specials)]
    vocab = {name: rank for rank, name in enumerate(names)}
    vocab |= {text(token): specials + rank for rank, token in enumerate(tokens)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "decoder": byte_level,
        "added_tokens": [
            {"id": rank, "content": name, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
             "single_word": False} for rank, name in enumerate(names)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocab, "merges": merges},
    }


def main():
    source, target = map(pathlib.Path, sys.argv[1:])
    target.write_text(json.dumps(convert(json.loads(source.read_text())), ensure_ascii=False))


if __name__ == "__main__":
    main()
