"""A pruned directory that was trained afterwards: adopted, verified for what it is, pushed, pruned again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import SHIPPED, tree

from export.onnx.session import OnnxSession
from export.push import push
from prune_attn import Layers, WriteOptions, adopt, convert, verify
from pruner import PruneAttnError


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    convert(SHIPPED, tmp_path / "pruned", Layers("5,9"), options=WriteOptions(dtype="float32"))
    return tmp_path / "pruned"


@pytest.fixture
def trained(tmp_path: Path, pruned: Path) -> Path:
    """As a training script leaves it: loaded, one matrix moved, saved by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(pruned).save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_trained_adopted_verified_pushed(pruned, trained, cli, tmp_path):
    before = (trained / "model.safetensors").read_bytes()
    assert not verify(trained).ok
    assert "adopted" in cli("adopt", trained, "--like", pruned, check=0).stdout
    assert (trained / "model.safetensors").read_bytes() == before
    said = cli("verify", trained, check=0).stdout
    assert "its weights were changed after it was pruned" in said
    assert "byte for byte" not in said
    result = verify(trained, SHIPPED)
    assert result.ok
    assert result.changed
    assert result.differ == ["model.layers.3.mlp.up_proj.weight"]
    said = cli("verify", trained, "--against", SHIPPED, check=0).stdout
    assert "1 tensors differ from" in said
    assert "model.layers.3.mlp.up_proj.weight" in said
    assert not verify(pruned, SHIPPED).changed
    assert set(push(trained, "me/x", dry_run=True).files) == set(tree(trained))
    text = (trained / "README.md").read_text()
    assert "trained further afterwards" in text
    assert "are the source's" not in text
    assert "attention removed at layers: 5, 9" in text

    import numpy as np
    import oracle

    ids = oracle.ids(1, 12, 4096)
    expected = oracle.logits(oracle.pruned(trained), ids).numpy()
    assert np.abs(OnnxSession(trained).logits(ids.numpy()) - expected).max() < 1e-3
    convert(trained, tmp_path / "again", Layers("2"))
    assert verify(tmp_path / "again", trained).ok
    assert verify(tmp_path / "again", SHIPPED).differ == ["model.layers.3.mlp.up_proj.weight"]
    shutil.copy(trained / "README.md", trained / "notes.md")
    assert not verify(trained).ok


def test_what_training_did_not_save(tmp_path, cli):
    """Licence texts come along, a missing tokenizer is told, and of many tensors that differ five are named."""
    import torch
    from transformers import AutoModelForCausalLM

    source = shutil.copytree(SHIPPED, tmp_path / "source")
    (source / "LICENSE.txt").write_text("Mine\n")
    convert(source, pruned := tmp_path / "pruned", Layers("5"))
    model = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "trained")
    done = adopt(tmp_path / "trained", pruned)
    assert any("there is no tokenizer" in note for note in done.notes)
    assert (tmp_path / "trained/LICENSE.txt").read_text() == "Mine\n"
    said = cli("verify", tmp_path / "trained", "--against", source, check=0).stdout
    assert "12 tensors differ from" in said
    assert said.endswith("model.layers.2.mlp.up_proj.weight and 7 more\n") or said.count("up_proj") == 5


def test_what_is_not_adopted(pruned, trained, tmp_path, cli):
    kept = tree(trained)
    convert(SHIPPED, tmp_path / "other", Layers("4,9"))
    assert "has other layers" in cli("adopt", trained, "--like", tmp_path / "other", check=2).stderr
    assert "was not written by prune-attn" in cli("adopt", trained, "--like", trained, check=2).stderr
    with pytest.raises(PruneAttnError, match="is the pruned directory itself"):
        adopt(pruned, pruned)
    (trained / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(PruneAttnError, match=r"optimizer\.pt: is no part of a model"):
        adopt(trained, pruned)
    (trained / "optimizer.pt").unlink()
    assert tree(trained) == kept
    (trained / "README.md").write_text("# Mine\n")
    assert any("README.md was there" in note for note in adopt(trained, pruned).notes)
    assert (trained / "README.md").read_text() == "# Mine\n"
    assert verify(trained).ok
    plan = json.loads((trained / "pruning_plan.json").read_text())
    shard = trained / "model.safetensors"
    assert plan["files"]["model.safetensors"]["size"] == shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-2])
    assert not verify(trained).ok
