from __future__ import annotations

import json
import pickle
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spt_compiler.config import (
    EXACT,
    PRESETS,
    FrozenOptions,
    SPTConfig,
    glob_matches,
    is_disabled,
    list_options,
    parse_assignments,
    replace,
)
from spt_compiler.errors import OptionError, SPTError

NAMES = [info.name for info in list_options()]


def build(options=None, **env):
    return SPTConfig.from_options(options, env={f"SPT_{key}": value for key, value in env.items()})


# ---- defaults, presets, precedence --------------------------------------------------------------------------------


def test_defaults_are_those_of_balanced():
    config = build()
    assert config == SPTConfig() == build({}) == build({"preset": "balanced"})
    assert (config.attention.granularity, config.attention.density, config.attention.tile) == ("tile", 0.25, (64, 16))
    assert (config.attention.select, config.attention.min_keys, config.attention.codewords) == ("pq", None, 16)
    assert (config.ffn.density, config.ffn.blocks, config.ffn.router, config.ffn.gate) == (0.5, 8, "learned", "hard")
    assert config.ffn.compensation and not config.attention.compensation
    assert (config.dense_layers, config.dense_steps, config.inference, config.inner) == (
        (0, 0),
        0,
        "sparse",
        "inductor",
    )
    assert config.attention.max_rel_error is None and config.ffn.max_rel_error is None and config.sites == ()


def test_paper_preset_and_explicit_keys_override_it():
    config = build({"preset": "paper", "ffn.blocks": 16})
    assert (config.attention.granularity, config.attention.select, config.attention.density) == (
        "token",
        "pq-match",
        0.125,
    )
    assert (config.attention.min_keys, config.ffn.min_width, config.ffn.gate, config.ffn.blocks) == (0, 0, "spt", 16)


@pytest.mark.parametrize("options", [{"exact": True}, {"preset": "exact"}, {"exact": True, "preset": "paper"}])
def test_exact_forces_everything_selected_and_keeps_the_rest(options):
    asked = {"attention.density": 0.1, "ffn.gate": "spt", "dense_layers": [1, 1], "dense_steps": 3, "inner": "eager"}
    config = build({**asked, **options})
    flat = config.to_options()
    for name, value in EXACT.items():
        assert flat[name] == (list(value) if isinstance(value, tuple) else value), name
    assert config.inner == "eager"


def test_exact_reaches_sites():
    config = build({"exact": True, "sites": {"*": {"attention.density": 0.1}}})
    assert config.for_site("x.attn/attention/0").attention.density == 1
    only_one = build({"sites": {"*.0.*": {"exact": True}}})
    assert only_one.for_site("h.0.mlp/ffn/0").exact and not only_one.for_site("h.1.mlp/ffn/0").exact


def test_precedence_is_options_then_environment_then_preset():
    assert build({"preset": "paper"}).ffn.blocks == 4
    assert build({"preset": "paper"}, FFN_BLOCKS="6").ffn.blocks == 6
    assert build({"preset": "paper", "ffn.blocks": 12}, FFN_BLOCKS="6").ffn.blocks == 12
    assert build(PRESET="paper").attention.select == "pq-match"
    assert build({"preset": "balanced"}, PRESET="paper").attention.select == "pq"


# ---- values: right ones, wrong ones -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attension.density": 1}, ["unknown option 'attension.density'", "'attention.density'"]),
        ({"attention_density": 1}, ["did you mean 'attention.density'?"]),
        ({"density": 1}, ["'attention.density' or 'ffn.density'"]),
        ({"attention": {"density": 1}}, ["flat", "'attention.density'"]),
        ({"require_match": 1}, ["'require_matches'"]),
        ({"xyzzy": 1}, ["unknown option 'xyzzy'", "list_options", "attention.density"]),
        ({7: 1}, ["unknown option 7", "int"]),
        ({"attention.density": 25}, ["above 0 and at most 1", "got 25", "0.25"]),
        ({"attention.density": 0}, ["above 0", "dense_layers"]),
        ({"attention.density": -0.5}, ["got -0.5"]),
        ({"attention.density": float("nan")}, ["got nan"]),
        ({"attention.density": "0.5"}, ["got '0.5' (str)", "without quotes"]),
        ({"attention.density": True}, ["got True (bool)"]),
        ({"attention.density": None}, ["got None", "leave it out", "0.25"]),
        ({"ffn.blocks": 2.0}, ["integer", "write 2"]),
        ({"ffn.blocks": 0}, ["from 1 to"]),
        ({"ffn.blocks": True}, ["integer", "got True"]),
        ({"exact": 1}, ["true or false", "write True"]),
        ({"strict": "true"}, ["true or false", "write true without quotes"]),
        ({"preset": "papper"}, ["'balanced', 'paper', 'exact'", "did you mean 'paper'?"]),
        ({"inner": "Inductor"}, ["did you mean 'inductor'?"]),
        ({"attention.tile": 64}, ["[queries, keys]", "write [64, 64]"]),
        ({"attention.tile": [64]}, ["[queries, keys]"]),
        ({"attention.tile": [64, 0]}, ["from 1 to"]),
        ({"attention.tile": "64x16"}, ["[queries, keys]"]),
        ({"dense_layers": [1, -1]}, ["[first, last]", "at least 0"]),
        ({"attention.max_rel_error": 0}, ["above 0, or null"]),
        ({"seed": -1}, ["from 0 to"]),
        ({"inner_options": [1]}, ["object", "max_autotune"]),
        ({"inner_options": {"a": {1, 2}}}, ["inner_options['a']", "set"]),
        ({"inner_options": {"a": [float("inf")]}}, ["inner_options['a'][0]", "inf"]),
        ({"inner_options": {3: 4}}, ["key 3"]),
        ({"dump": ""}, ["folder"]),
        ({"dump": True}, ["folder"]),
        ({"sites": ["*"]}, ["'sites'", "object of globs"]),
        ({"sites": {"*": 3}}, ["sites['*']", "object of options"]),
        ({"sites": {"": {}}}, ["glob"]),
        ({"sites": {"*": {"inner": "eager"}}}, ["sites['*']", "'inner'", "whole run"]),
        ({"sites": {"*": {"attention.densty": 1}}}, ["sites['*']", "'attention.density'"]),
        ({"sites": {"*": {"attention.density": 2}}}, ["sites['*']['attention.density']", "at most 1"]),
        ({"sites": {"*": {"attention.select": "pq-match"}}}, ["sites['*']", "granularity 'token'"]),
        ({"attention.select": "mean", "attention.granularity": "token"}, ["'mean' needs", "'tile'", "'pq'"]),
        ({"attention.select": "pq-match"}, ["needs attention.granularity 'token'", "'pq'"]),
        ({"preset": "paper", "attention.granularity": "tile"}, ["preset 'paper'"]),
        ({"attention.compensation": True, "attention.granularity": "token"}, ["granularity 'tile'", "got 'token'"]),
        ({"sites": {"*": {"attention.granularity": "token"}}, "attention.compensation": True}, ["sites['*']", "'tile'"]),
        ({"inner": "aot_eager", "inner_options": {"max_autotune": True}}, ["inner_options", "'aot_eager'", "'inductor'"]),
    ],
)
def test_wrong_options_say_what_was_expected(options, words):
    with pytest.raises(OptionError) as caught:
        build(options)
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, SPTError)


def test_options_must_be_a_mapping():
    with pytest.raises(OptionError, match="mapping"):
        build("attention.density=0.5")


def test_numbers_of_numpy_and_paths_become_plain(tmp_path):
    numpy = pytest.importorskip("numpy")
    given = {
        "ffn.density": numpy.float64(0.25),
        "ffn.blocks": numpy.int64(4),
        "exact": numpy.bool_(False),
        "dump": tmp_path,
    }
    config = build(given)
    assert type(config.ffn.blocks) is int and type(config.ffn.density) is float and config.dump == str(tmp_path)
    json.dumps(config.to_options())


def test_integers_count_as_numbers():
    assert build({"attention.density": 1}).attention.density == 1.0


# ---- environment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("ATTENTION_DENSITY", ".5", "attention.density", 0.5),
        ("ATTENTION_TILE", "32x8", "attention.tile", [32, 8]),
        ("ATTENTION_TILE", "32, 8", "attention.tile", [32, 8]),
        ("ATTENTION_TILE", "[32, 8]", "attention.tile", [32, 8]),
        ("ATTENTION_MIN_KEYS", "0", "attention.min_keys", 0),
        ("ATTENTION_MIN_KEYS", "null", "attention.min_keys", None),
        ("EXACT", "1", "exact", True),
        ("STRICT", "no", "strict", False),
        ("INNER", "eager", "inner", "eager"),
        ("DUMP", "out/x", "dump", "out/x"),
        ("INNER_OPTIONS", '{"max_autotune": true}', "inner_options", {"max_autotune": True}),
        ("SITES", '{"*": {"ffn.density": 1}}', "sites", {"*": {"ffn.density": 1.0}}),
        ("FFN_BLOCKS", "  ", "ffn.blocks", 8),
    ],
)
def test_environment(variable, text, name, value):
    assert build(**{variable: text}).to_options()[name] == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [("ATTENTION_DENSITY", "half"), ("EXACT", "maybe"), ("SITES", "{"), ("INNER", "nvcc"), ("ATTENTION_TILE", "64")],
)
def test_wrong_environment_names_the_variable(variable, text):
    with pytest.raises(OptionError, match=f"SPT_{variable}"):
        build(**{variable: text})


def test_misspelt_variable_warns_and_foreign_ones_do_not():
    with pytest.warns(UserWarning, match="SPT_ATTENTION_DENSITY"):
        build(ATENTION_DENSITY="1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(SOMETHING_ELSE="1", DISABLE="1", CACHE_DIR="/x")


def test_reads_the_process_environment_by_default(monkeypatch):
    monkeypatch.setenv("SPT_FFN_BLOCKS", "5")
    assert SPTConfig.from_options().ffn.blocks == 5


def test_variables_are_distinct():
    assert len({info.env for info in list_options()}) == len(NAMES)


def test_is_disabled():
    assert is_disabled({"SPT_DISABLE": "1"}) and not is_disabled({"SPT_DISABLE": "0"}) and not is_disabled({})
    with pytest.raises(OptionError, match="SPT_DISABLE"):
        is_disabled({"SPT_DISABLE": "perhaps"})


def test_assignments():
    assert parse_assignments(["attention.density=.5", "attention.tile=64x16", "exact=yes", "dump=a=b"]) == {
        "attention.density": 0.5,
        "attention.tile": [64, 16],
        "exact": True,
        "dump": "a=b",
    }
    for text, word in (("exact", "key=value"), ("exat=1", "'exact'"), ("exact=perhaps", "exact")):
        with pytest.raises(OptionError, match=word):
            parse_assignments([text])


# ---- sites --------------------------------------------------------------------------------------------------------


def test_for_site_applies_globs_in_order():
    config = build({"sites": {"*": {"ffn.density": 0.25}, "h.0.*": {"ffn.density": 1, "attention.tile": [32, 8]}}})
    assert config.for_site("h.0.mlp/ffn/0").ffn.density == 1
    assert config.for_site("h.0.mlp/ffn/0").attention.tile == (32, 8)
    assert config.for_site("h.1.mlp/ffn/0").ffn.density == 0.25
    # Equal settings make equal configs, whatever the site.
    assert config.for_site("h.1.mlp/ffn/0") == config.for_site("h.2.mlp/ffn/0")
    assert config.for_site("h.1.mlp/ffn/0").sites == ()


def test_unused_globs():
    config = build({"sites": {"h.*": {}, "x.*": {"exact": True}}})
    assert config.unused_globs(["h.0.attn/attention/0"]) == ["x.*"]


@pytest.mark.parametrize(
    ("glob", "name", "matches"),
    [
        ("*.attn", "h.0.attn/attention/0", True),
        ("h.0.attn/attention/0", "h.0.attn/attention/0", True),
        ("*/ffn/*", "h.0.mlp/ffn/0", True),
        ("*/ffn/*", "h.0.attn/attention/0", False),
        ("h.[01].*", "h.2.mlp/ffn/0", False),
        ("H.*", "h.2.mlp/ffn/0", False),
    ],
)
def test_glob_matches(glob, name, matches):
    assert glob_matches(glob, name) == matches


# ---- as a value ---------------------------------------------------------------------------------------------------


def test_frozen_hashable_and_picklable():
    options = {
        "inner_options": {"a": {"b": [1, 2]}},
        "sites": {"*": {"attention.tile": [8, 4]}},
        "attention.tile": [32, 8],
    }
    config = build(options)
    assert hash(config) == hash(build(options)) and config == build(options) and len({config, build(options)}) == 1
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.inner_options["a"]["b"] == (1, 2) and config.inner_options.thaw() == {"a": {"b": [1, 2]}}
    with pytest.raises(AttributeError):
        config.seed = 3
    with pytest.raises(TypeError):
        config.inner_options["a"] = 1


def test_later_changes_of_the_options_do_not_reach_the_config():
    inner = {"a": [1]}
    options = {"inner_options": inner}
    config = build(options)
    inner["a"].append(2)
    options["exact"] = True
    assert config.inner_options == FrozenOptions({"a": [1]}) and not config.exact


def test_changed_options_and_fingerprint():
    assert build().changed_options() == {}
    assert build({"preset": "paper", "seed": 3}).changed_options() == {"preset": "paper", "seed": 3}
    assert build({"seed": 3}).fingerprint() == build({"seed": 3}).fingerprint() != build().fingerprint()
    one, other = {"a*": {"exact": True}}, {"b*": {"exact": False}}
    assert build({"sites": {**one, **other}}).fingerprint() != build({"sites": {**other, **one}}).fingerprint()


def test_replace():
    assert replace(build({"seed": 1}), **{"ffn.density": 1}) == build({"seed": 1, "ffn.density": 1})
    with pytest.raises(OptionError, match="at most 1"):
        replace(build(), **{"ffn.density": 2})


def test_list_options_is_complete_and_default_values_are_accepted():
    for info in list_options():
        assert info.help and info.type
        assert build({info.name: info.default}) == build(), info.name
        for choice in info.choices or ():
            if info.name != "attention.select":  # its choices depend on the granularity
                build({info.name: choice})
    assert {name for preset in PRESETS.values() for name in preset} <= set(NAMES)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
VALUES = {
    "preset": st.sampled_from(["balanced", "paper"]),
    "attention.density": st.floats(0.01, 1),
    "attention.min_keys": st.none() | st.integers(0, 1000),
    "attention.tile": st.tuples(st.integers(1, 128), st.integers(1, 128)).map(list),
    "attention.max_rel_error": st.none() | st.floats(0.001, 1),
    "ffn.blocks": st.integers(1, 64),
    "ffn.gate": st.sampled_from(["hard", "straight-through", "spt"]),
    "ffn.compensation": st.booleans(),
    "exact": st.booleans(),
    "dense_layers": st.tuples(st.integers(0, 4), st.integers(0, 4)).map(list),
    "require_matches": st.none() | st.integers(0, 9),
    "inner_options": st.dictionaries(st.text(max_size=3), PLAIN, max_size=2),
    "dump": st.none() | st.text("abc/", min_size=1, max_size=5),
    "seed": st.integers(0, 2**63 - 1),
    "sites": st.dictionaries(
        st.sampled_from(["*", "h.*", "*/ffn/*"]),
        st.fixed_dictionaries({}, optional={"ffn.density": st.floats(0.01, 1), "exact": st.booleans()}),
    ),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_round_trip(options):
    config = build(options)
    plain = config.to_options()
    again = SPTConfig.from_options(json.loads(json.dumps(plain)), env={})
    assert again == config and hash(again) == hash(config) and again.fingerprint() == config.fingerprint()
    for key, value in options.items():
        if not config.exact and key != "sites":
            assert plain[key] == value


@given(st.dictionaries(st.sampled_from(NAMES), PLAIN | st.floats(), max_size=3))
def test_any_value_gives_a_config_or_an_option_error(options):
    try:
        config = build(options)
    except OptionError as error:
        assert str(error)
    else:
        assert SPTConfig.from_options(config.to_options(), env={}) == config
