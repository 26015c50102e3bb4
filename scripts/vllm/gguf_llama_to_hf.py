#!/usr/bin/env python3
"""Turns a GGUF file of the llama architecture into a model folder that vLLM and transformers load.

In: a GGUF file as scripts/fetch-model.sh gets it. Out: a folder with config.json, generation_config.json,
model.safetensors, tokenizer.json and tokenizer_config.json (chat template included), put in place at once when it is
complete. `--layers` keeps the first layers only: the text turns to nonsense, but each token still depends on the whole
prompt, and an engine answers several times as fast.

Needs gguf and numpy (no torch). Weights are dequantised, and llama.cpp's permutation of the query and key rows is
undone. The tokenizer is byte-level BPE rebuilt from the vocabulary and merges in the file, with SmolLM's pre-tokenizer
(single digits, then GPT-2's byte-level pattern): other model families need their own.
"""
import argparse
import json
import os
import pathlib
import shutil
import struct
import tempfile

import numpy as np
from gguf import GGUFReader, dequantize

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What safetensors and transformers call each format.
FORMATS = {"f32": ("F32", "float32"), "bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16")}
CONTROL_TOKEN = 3  # GGUF's token type of special tokens.


def convert(source, folder, number_format="f32", layers=None):
    """Writes the model in `source` to `folder`, which appears when it is complete."""
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise SystemExit(f"{source}: architecture is {fields['general.architecture']}, only llama is known")
    folder = pathlib.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        count = min(layers or fields["llama.block_count"], fields["llama.block_count"])
        tensors = read_tensors(reader, fields, count)
        write_safetensors(work / "model.safetensors", tensors, number_format)
        write_configuration(work, fields, count, tied="lm_head.weight" not in tensors, number_format=number_format)
        write_tokenizer(work, fields)
        work.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def read_tensors(reader, fields, layers):
    """The dequantised weights by the names that transformers uses."""
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name in TENSORS:
            tensors[TENSORS[tensor.name]] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        elif tensor.name.startswith("blk."):
            _, layer, rest = tensor.name.split(".", 2)
            if int(layer) >= layers:
                continue
            part = rest.rsplit(".", 1)[0]
            weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if part == "attn_q":
                weights = unpermute(weights, fields["llama.attention.head_count"])
            elif part == "attn_k":
                weights = unpermute(weights, fields["llama.attention.head_count_kv"])
            tensors[f"model.layers.{layer}.{LAYER_TENSORS[part]}.weight"] = weights
        else:
            raise SystemExit(f"tensor {tensor.name} is not one of a llama model")
    return tensors


def unpermute(weights, heads):
    """Undoes llama.cpp's order of rotary halves: there `reshape(heads, 2, d / 2, …).swapaxes(1, 2)`."""
    size = weights.shape[0] // heads
    return weights.reshape(heads, size // 2, 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def encode(weights, number_format):
    weights = np.ascontiguousarray(weights)
    if number_format == "f32":
        return weights.tobytes()
    if number_format == "f16":
        return weights.astype(np.float16).tobytes()
    bits = weights.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()  # to nearest, ties to even


def write_safetensors(path, tensors, number_format):
    header, blobs, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name in sorted(tensors):
        blob = encode(tensors[name], number_format)
        header[name] = {
            "dtype": FORMATS[number_format][0],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for blob in blobs:
            file.write(blob)


def write_configuration(folder, fields, layers, tied, number_format):
    heads = fields["llama.attention.head_count"]
    ends = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    write_json(folder / "generation_config.json", ends)
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "hidden_act": "silu",
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": FORMATS[number_format][1],
        **ends,
    })


def write_tokenizer(folder, fields):
    tokens = fields["tokenizer.ggml.tokens"]
    special = [number for number, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    write_json(folder / "tokenizer.json", {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": tokens[number], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for number in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {**byte_level, "add_prefix_space": False},
        ]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    })
    padding = fields.get("tokenizer.ggml.padding_token_id")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[0],
        "pad_token": None if padding is None else tokens[padding],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    })


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="GGUF file")
    parser.add_argument("folder", help="model folder to make; replaced if it exists")
    parser.add_argument("--format", choices=FORMATS, default="f32", help="number format of the weights (default f32)")
    parser.add_argument("--layers", type=int, help="keep the first LAYERS layers only")
    arguments = parser.parse_args()
    if arguments.layers is not None and arguments.layers < 1:
        parser.error("--layers must be at least 1")
    convert(arguments.source, arguments.folder, arguments.format, arguments.layers)


if __name__ == "__main__":
    main()
