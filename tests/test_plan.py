"""Plans: what is chosen, cut, saved, read again, and read from other tools."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import SHIPPED, edit_config

from prune_attn import Drop, Layers, SavedPlan, convert
from pruner import PruneAttnError, open_checkpoint
from pruner.plan import parse_drop, parse_layers
from pruner.plan_files import read_plan
from pruner.select.positional import plan_drop


@pytest.mark.parametrize(
    ("text", "of", "count"),
    [("33%", 12, 4), ("33%", 20, 7), ("33%", 32, 11), ("33%", 40, 13), ("25%", 10, 3), ("1%", 12, 1), ("12.5%", 20, 3),
     ("37.5%", 12, 5), ("100%", 7, 7), (" 4 ", 12, 4)],
)  # fmt: skip
def test_percentages_round_half_up_and_are_at_least_one(text, of, count):
    assert parse_drop(text, of) == count


def test_layers():
    assert parse_layers("22-29,31") == (22, 23, 24, 25, 26, 27, 28, 29, 31)
    assert parse_layers(" 7 , 3 - 4 ") == (7, 3, 4)


def test_positional_strategies_and_layer_0():
    checkpoint = open_checkpoint(SHIPPED)
    assert plan_drop(checkpoint, Drop(4)).attention == (8, 9, 10, 11)
    assert plan_drop(checkpoint, Drop(4, strategy="keep-last")).attention == (7, 8, 9, 10)
    assert plan_drop(checkpoint, Drop(11)).attention == tuple(range(1, 12))
    assert 0 not in plan_drop(checkpoint, Drop(4)).order
    assert plan_drop(checkpoint, Drop(4, allow_first_layer=True)).order == tuple(range(11, -1, -1))
    block = plan_drop(checkpoint, Drop(2, "block"))
    assert (block.attention, block.mlp) == ((10, 11), (10, 11))


def test_a_saved_plan_gives_the_same_output_and_can_be_cut(cli, tmp_path):
    convert(SHIPPED, tmp_path / "a", Drop("33%", strategy="keep-last"))
    plan = tmp_path / "a" / "pruning_plan.json"
    convert(SHIPPED, tmp_path / "b", SavedPlan(plan))
    for name in ("model.safetensors", "config.json", "pruning_plan.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert convert(SHIPPED, tmp_path / "c", SavedPlan(plan, 2)).plan.attention == (9, 10)
    assert convert(SHIPPED, tmp_path / "d", SavedPlan(plan, "50%")).plan.attention == (5, 6, 7, 8, 9, 10)
    with pytest.raises(PruneAttnError, match="only 10"):
        convert(SHIPPED, tmp_path / "e", SavedPlan(plan, 11))
    for option, value in (("layers", "3"), ("strategy", "last"), ("sublayer", "mlp")):
        said = cli("convert", SHIPPED, tmp_path / "e", "--plan", plan, f"--{option}", value, check=2).stderr
        assert f"--{option} cannot go with --plan" in said


def test_a_plan_of_blocks_can_be_cut_where_some_have_lost_a_sublayer(tmp_path):
    convert(SHIPPED, tmp_path / "a", Layers([11]))
    convert(tmp_path / "a", tmp_path / "b", Drop(3, sublayer="block"))
    plan = convert(tmp_path / "a", tmp_path / "c", SavedPlan(tmp_path / "b" / "pruning_plan.json", 2)).plan
    assert (plan.attention, plan.mlp) == ((10,), (10, 11))


def test_a_plan_for_another_model_is_refused(tmp_path, make_llama):
    convert(SHIPPED, tmp_path / "a", 4)
    plan = tmp_path / "a" / "pruning_plan.json"
    for other in (make_llama(), tmp_path / "a"):
        with pytest.raises(PruneAttnError, match="another model"):
            convert(other, tmp_path / "b", SavedPlan(plan))
    shutil.copytree(SHIPPED, tmp_path / "edited")
    edit_config(tmp_path / "edited", rms_norm_eps=1e-6)
    with pytest.raises(PruneAttnError, match=r"config\.json differs"):
        convert(tmp_path / "edited", tmp_path / "b", SavedPlan(plan))


def test_evopress(tmp_path):
    file = tmp_path / "layer_drop_config.txt"
    lines = ["none"] * 12
    lines[3], lines[5], lines[7] = "attn", "mlp", "attn+mlp"
    file.write_text("\n".join(lines) + "\n")
    plan = read_plan(file, open_checkpoint(SHIPPED))
    assert (plan.attention, plan.mlp) == ((3, 7), (5, 7))
    result = convert(SHIPPED, tmp_path / "out", SavedPlan(file))
    assert (result.after["attention_sublayers"], result.after["mlp_sublayers"]) == (10, 10)
    again = read_plan(tmp_path / "out" / "pruning_plan.json", open_checkpoint(SHIPPED))
    assert (again.attention, again.mlp, again.strategy) == ((3, 7), (5, 7), "evopress")
    with pytest.raises(PruneAttnError, match="without an order"):
        convert(SHIPPED, tmp_path / "b", SavedPlan(file, 1))
    file.write_text("none\n" * 11)
    with pytest.raises(PruneAttnError, match="11 lines"):
        read_plan(file, open_checkpoint(SHIPPED))
    file.write_text("none\n" * 12)
    with pytest.raises(PruneAttnError, match="nothing to drop"):
        convert(SHIPPED, tmp_path / "b", SavedPlan(file))
    file.write_text("attn+mlp\n" * 12)
    with pytest.raises(PruneAttnError, match="no model be left"):
        convert(SHIPPED, tmp_path / "b", SavedPlan(file, allow_all=True))


def test_llm_drop(tmp_path):
    file, checkpoint = tmp_path / "config.json", open_checkpoint(SHIPPED)

    def read(**fields):
        file.write_text(json.dumps({"num_hidden_layers": 12} | fields))
        return read_plan(file, checkpoint)

    plan = read(drop_attn_list=[10, 8, 9], drop_mlp_list=[])
    assert (plan.attention, plan.mlp, plan.order) == ((8, 9, 10), (), (10, 8, 9))
    assert convert(SHIPPED, tmp_path / "out", SavedPlan(file, 2)).plan.attention == (8, 10)
    assert read(drop_attn_list=[i in (4, 6) for i in range(12)]).attention == (4, 6)
    block = read(drop_attn_list=[9, 8], drop_mlp_list=[9, 8])
    assert (block.sublayer, block.attention, block.mlp) == ("block", (8, 9), (8, 9))
    mixed = read(drop_attn_list=[9], drop_mlp_list=[8])
    assert (mixed.attention, mixed.mlp) == ((9,), (8,))
    with pytest.raises(PruneAttnError, match="layers"):
        read(num_hidden_layers=32, drop_attn_list=[9])
    with pytest.raises(PruneAttnError, match="list of layer numbers"):
        read(drop_attn_list=["9"])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda p: p.update(version=99), "version 99"),
        (lambda p: p.update(order=[1, 2, 3, 4]), "does not begin"),
        (lambda p: p.update(attention="8"), "list of layer numbers"),
        (lambda p: p.update(attention=[8, 9, 10, True]), "list of layer numbers"),
        (lambda p: p.update(sublayer="heads"), "unknown sublayer"),
        (lambda p: p.update(source={}), "does not say which model"),
        (lambda p: p.update(source="x"), "does not say which model"),
        (lambda p: p.update(format="other"), "is not a plan"),
        (lambda p: p.update(source=None, order=[11, 10, 9, 99], attention=[9, 10, 11, 99]), "out of range"),
    ],
)
def test_damaged_plans(tmp_path, damage, match):
    convert(SHIPPED, tmp_path / "a", 4)
    plan = json.loads((tmp_path / "a" / "pruning_plan.json").read_text())
    damage(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PruneAttnError, match=match):
        convert(SHIPPED, tmp_path / "b", SavedPlan(tmp_path / "plan.json"))


def test_what_is_no_plan(tmp_path):
    for content in (b"", b"hello", b"[1, 2]", b"\xff\xfe", b"[" * 100000):
        (tmp_path / "plan").write_bytes(content)
        with pytest.raises(PruneAttnError, match="is not a plan"):
            convert(SHIPPED, tmp_path / "b", SavedPlan(tmp_path / "plan"))
    with pytest.raises(PruneAttnError, match="is a directory"):
        convert(SHIPPED, tmp_path / "b", SavedPlan(tmp_path))


def test_the_record_can_be_checked(tmp_path):
    import hashlib

    convert(SHIPPED, tmp_path / "a", 4)
    plan = json.loads((tmp_path / "a" / "pruning_plan.json").read_text())
    raw = (SHIPPED / "model.safetensors").read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    assert plan["source"]["shards"]["model.safetensors"]["header_sha256"] == hashlib.sha256(header).hexdigest()
    assert plan["source"]["config_sha256"] == hashlib.sha256((SHIPPED / "config.json").read_bytes()).hexdigest()
    assert plan["tool"] == {"name": "prune-attn", "version": "0.1.0"}
    assert (plan["strategy"], plan["requested"], plan["attention"]) == ("last", "4", [8, 9, 10, 11])
