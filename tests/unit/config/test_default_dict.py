"""What people who hold their settings in a `DictDefault` rely on."""

import copy
import json
import pickle

import pytest

from fiducial.config.load import DictDefault


def test_keys_are_attributes_and_missing_ones_are_none() -> None:
    cfg = DictDefault({"rl": "dpo", "trl": {"beta": 0.1}})
    assert cfg.rl == "dpo"
    assert cfg["rl"] == "dpo"
    assert cfg.trl.beta == 0.1
    assert cfg.trl.missing is None
    assert cfg.adapter is None
    assert cfg["adapter"] is None


def test_missing_and_null_are_told_apart_by_in_and_get() -> None:
    cfg = DictDefault(rl=None)
    assert "rl" in cfg
    assert "adapter" not in cfg
    assert cfg.get("adapter", "none") == "none"
    assert cfg.get("rl", "none") is None
    assert list(cfg.items()) == [("rl", None)]


def test_reading_a_missing_key_does_not_add_it() -> None:
    cfg = DictDefault()
    assert cfg.adapter is None
    assert not cfg


def test_nested_dicts_are_converted_however_they_come_in() -> None:
    cfg = DictDefault(datasets=[{"path": "a"}], pair=({"x": 1},))
    cfg.fsdp_config = {"a": {"b": 1}}
    cfg["trl"] = {"beta": 1}
    cfg.update({"more": {"c": 2}})
    cfg.setdefault("last", {"d": 3})
    assert cfg.datasets[0].path == "a"
    assert cfg.pair[0].x == 1
    assert (cfg.fsdp_config.a.b, cfg.trl.beta, cfg.more.c, cfg.last.d) == (1, 1, 2, 3)
    assert cfg.setdefault("last", {}) is cfg.last


def test_to_dict_is_plain_at_every_depth() -> None:
    plain = {"a": {"b": [{"c": 1}, ({"d": 2},)]}, "e": None}
    result = DictDefault(plain).to_dict()
    assert result == plain
    assert type(result["a"]) is dict
    assert type(result["a"]["b"][0]) is dict
    assert type(result["a"]["b"][1][0]) is dict
    assert json.loads(json.dumps(DictDefault(plain)["a"]["b"][0])) == {"c": 1}


def test_a_copy_is_independent() -> None:
    cfg = DictDefault(a={"b": 1}, names=["x"])
    for other in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert type(other) is DictDefault
        assert type(other.a) is DictDefault
        other.a.b = 2
        other.names.append("y")
    shallow = cfg.copy()
    shallow.a.b = 3
    shallow.new = 1
    assert cfg.to_dict() == {"a": {"b": 1}, "names": ["x"]}


def test_a_union_keeps_the_type_and_the_right_side_wins() -> None:
    cfg = DictDefault(a=1) | {"a": 2, "b": {"c": 3}}
    assert cfg.b.c == 3
    assert cfg.a == 2
    other = {"a": 0, "z": 1} | cfg
    assert type(other) is DictDefault
    assert (other.a, other.z) == (2, 1)
    cfg |= {"d": {"e": 4}}
    assert cfg.d.e == 4


def test_protocol_names_are_not_keys() -> None:
    cfg = DictDefault(_private=1)
    for name in ("__array__", "_repr_html_", "_private"):
        assert not hasattr(cfg, name)
    with pytest.raises(AttributeError, match="_private"):
        cfg._private = 2


def test_names_of_dict_methods_are_reached_with_brackets() -> None:
    cfg = DictDefault()
    with pytest.raises(AttributeError, match=r"write cfg\['items'\] = \.\.\."):
        cfg.items = 1
    with pytest.raises(AttributeError, match="to_dict"):
        cfg.to_dict = 1
    cfg["items"] = 1
    assert cfg["items"] == 1
    assert list(cfg.items()) == [("items", 1)]


def test_an_attribute_can_be_deleted() -> None:
    cfg = DictDefault(a=1)
    del cfg.a
    assert "a" not in cfg
    with pytest.raises(AttributeError, match="has no key 'a'"):
        del cfg.a
