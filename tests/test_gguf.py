"""``export --gguf``, read back with llama.cpp's own reader. That llama.cpp runs it is ``scripts/compat``'s to show."""

from __future__ import annotations

import resource

import gguf
import numpy as np
import pytest
from conftest import SHIPPED, invoke
from safetensors.numpy import load_file
from sentencepiece import SentencePieceProcessor

from export.gguf import write_gguf
from prune_attn import Drop, Layers, WriteOptions, convert
from pruner.errors import PruneAttnError


def read(path):
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {t.name: t.data for t in reader.tensors}


def test_tensors_vocabulary_and_widths(tmp_path):
    convert(SHIPPED, tmp_path / "pruned", Layers("0,5", allow_first_layer=True))
    convert(tmp_path / "pruned", tmp_path / "further", Layers("3,11", sublayer="mlp", allow_first_layer=True))
    write_gguf(tmp_path / "further", tmp_path / "m.gguf")
    fields, tensors = read(tmp_path / "m.gguf")
    source = load_file(SHIPPED / "model.safetensors")

    assert fields["deci.attention.head_count_kv"] == [0, 5, 5, 5, 5, 0, 5, 5, 5, 5, 5, 5]
    assert fields["deci.attention.head_count"] == [5, 5, 5, 5, 5, 0, 5, 5, 5, 5, 5, 5]  # layer 0: an attention of zeros
    assert fields["deci.feed_forward_length"] == [512, 512, 512, 256] + [512] * 7 + [256]
    assert not tensors["blk.0.attn_output.weight"].any()
    assert not tensors["blk.3.ffn_down.weight"].any()
    assert "blk.5.attn_output.weight" not in tensors
    assert tensors["blk.1.attn_norm.weight"].dtype == np.float32
    assert np.array_equal(tensors["blk.7.ffn_down.weight"], source["model.layers.7.mlp.down_proj.weight"])
    assert np.array_equal(tensors["output.weight"], source["lm_head.weight"])
    # each head's rows: halves there, neighbours here
    for name, theirs in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        halves = source[f"model.layers.4.self_attn.{theirs}.weight"].reshape(5, 2, 16, 160)
        pairs = tensors[f"blk.4.{name}.weight"].reshape(5, 16, 2, 160)
        assert np.array_equal(pairs[:, :, 1], halves[:, 1])
        assert np.array_equal(pairs[:, :, 0], halves[:, 0])

    pieces = SentencePieceProcessor(model_file=str(SHIPPED / "tokenizer.model"))
    assert fields["tokenizer.ggml.tokens"] == [pieces.id_to_piece(i) for i in range(4096)]
    assert np.allclose(fields["tokenizer.ggml.scores"], [pieces.get_score(i) for i in range(4096)])
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert fields["tokenizer.ggml.add_bos_token"] is True


def test_bfloat16_keeps_its_bytes(tmp_path):
    convert(SHIPPED, tmp_path / "pruned", "33%", options=WriteOptions(dtype="bfloat16", graph=None))
    write_gguf(tmp_path / "pruned", tmp_path / "m.gguf")
    _, tensors = read(tmp_path / "m.gguf")
    kept = (tmp_path / "pruned" / "model.safetensors").read_bytes()
    assert tensors["blk.2.attn_v.weight"].tobytes() in kept


def test_refusals_leave_nothing(tmp_path):
    convert(SHIPPED, tmp_path / "every", Drop("100%", allow_all=True))
    with pytest.raises(PruneAttnError, match="no attention is left"):
        write_gguf(tmp_path / "every", tmp_path / "m.gguf")
    convert(SHIPPED, tmp_path / "pruned", "1")
    (tmp_path / "pruned" / "tokenizer.model").rename(tmp_path / "elsewhere")
    with pytest.raises(PruneAttnError, match=r"tokenizer\.model: is missing"):
        write_gguf(tmp_path / "pruned", tmp_path / "m.gguf")
    (tmp_path / "elsewhere").rename(tmp_path / "pruned" / "tokenizer.model")
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    done = invoke("export", tmp_path / "pruned", "--gguf", tmp_path / "mine.gguf")
    assert isinstance(done.exception, PruneAttnError)
    assert (tmp_path / "mine.gguf").read_bytes() == b"mine"
    for useless in ([tmp_path / "out"], ["--context", "64"], ["--dtype", "float16"], ["--last-token-logits"]):
        done = invoke("export", tmp_path / "pruned", *useless, "--gguf", tmp_path / "new.gguf")
        assert "has no use for" in str(done.exception), useless
    assert sorted(p.name for p in tmp_path.iterdir()) == ["every", "mine.gguf", "pruned"]


def test_a_full_disk_is_named_and_killed_runs_are_cleaned_up(tmp_path):
    convert(SHIPPED, tmp_path / "pruned", "1")
    left = tmp_path / ".m.gguf.prune-attn-new-0123456789ab"  # of a killed run
    left.mkdir()
    (left / "new.gguf").write_bytes(b"half")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(PruneAttnError, match=r"m\.gguf: cannot be written: File too large"):
            write_gguf(tmp_path / "pruned", tmp_path / "m.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in tmp_path.iterdir()] == ["pruned"]
