"""`SpiceConfig`: defaults, the published settings, command line and YAML round trips, and every error text."""

import dataclasses
import json
import math
import typing

import numpy as np
import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from spice_trainer.config import DEFAULT_SKETCH_DIM, MIN_SKETCH_DIM, STRATEGIES, SpiceConfig

# SFTConfig sets gradient_checkpointing itself, which newer transformers deprecate.
pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]

FIELDS = {field.name: field for field in dataclasses.fields(SpiceConfig)}
TYPES = {name: hint for name, hint in typing.get_type_hints(SpiceConfig).items() if name in FIELDS}
STRATEGY_NAMES = tuple(STRATEGIES)
NEIGHBOURS = (ScriptArguments, SFTConfig, ModelConfig)

# field: legal values, and what else must be set for them.
LEGAL: dict[str, tuple[list[object], dict[str, object]]] = {
    "pool_size": ([12, 13, 120, 1_000_000], {}),
    "num_selected": ([1, 2, 12, 119, 120], {}),
    "pools_per_step": ([None, 1, 10, 10_000], {}),
    "pool_seed": ([None, 0, 42, 2**63], {}),
    "fisher_alpha": ([1e-30, 1e-6, 0.5, 1.0, 3.0, 1e30], {}),
    "alpha_scaling": (["fixed", "pool"], {}),
    "conflict_penalty": ([0.0, 1e-9, 0.1, 1.0, 1000.0], {}),
    "conflict_reference": (["selected", "candidates", "pool", "momentum"], {}),
    "information": (["exact", "diagonal", "adafisher"], {}),
    "gradient_normalization": (["none", "sqrt_tokens", "tokens", "unit"], {}),
    "stop_ratio": ([None, 1e-9, 0.5, 0.999], {"pools_per_step": 10}),
    "min_gain": ([None, 0.0, 1e-9, 0.5, 2.0], {"pools_per_step": 10}),
    "selection_epochs": ([None, 1, 2, 1000], {}),
    "max_repeats": ([None, 0, 3], {}),
    "tie_tolerance": ([0.0, 1e-12, 1e-6, 0.5], {}),
    "strategy": (list(STRATEGY_NAMES), {}),
    "gradient_centering": ([True, False], {}),
    "gradient_preconditioning": (["none", "adam"], {}),
    "validation_rows": ([1, 32, 1000], {}),
    "score_once_after": ([None, 0, 20], {}),
    "validation_weights": ([None, [1.0], [0.5, 2.0]], {}),
    "validation_every": ([1, 10], {}),
    "matching_features": (["hidden_states", "gradients"], {}),
    "hidden_layer": ([None, 0, 24], {}),
    "length_quotas": (["auto", "none", "pool", "validation"], {}),
    "length_bins": ([1, 4, 10], {}),
    "sketch_dim": ([None, -1, 0, 16, 65536, 10**9], {}),
    "scoring_tokens_per_batch": ([1, 2048, 10**6], {}),
    "scoring_layers": ([None, 1, 10, 1000], {}),
    "scoring_parameters": (["all", "lora"], {}),
    "scoring_target_modules": ([None, ["q_proj"], ["q_proj", "mlp.down_proj"]], {}),
    "scoring_max_tokens": ([None, 1, 64], {}),
    "scoring_prefilter": ([None, 0.1, 0.25, 0.999], {}),
    "proxy_model_name_or_path": ([None, "org/model", "./folder"], {}),
    "proxy_learning_rate": ([0.0, 1e-5, 2e-4], {}),
    "proxy_update_every": ([1, 5, 50], {}),
    "proxy_check_pools": ([0, 3], {}),
    "overlap_scoring": ([True, False], {}),
    "pack_picks": ([True, False], {}),
    "record_id_column": ([None, "id", "my key"], {}),
    "record_text_length": ([0, 80], {}),
}
CASES = [
    pytest.param(name, value, extra, id=f"{name}={value}")
    for name, (values, extra) in LEGAL.items()
    for value in values
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, object]:
    """What the neighbouring classes need to be built quietly on a CPU."""
    folder = str(tmp_path_factory.mktemp("run"))
    return {
        "dataset_name": "none",
        "output_dir": folder,
        "bf16": False,
        "use_cpu": True,
        "seed": 7,
    }


def as_flags(values: dict[str, object]) -> list[str]:
    flags: list[str] = []
    for name, value in values.items():
        flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags


def expect(config: SpiceConfig, name: str, value: object, extra: dict[str, object]) -> None:
    """The parsed configuration holds `value` and `extra`, with the declared types, and defaults elsewhere."""
    assert config == SpiceConfig(**{**extra, name: value})
    wanted = 0 if name == "sketch_dim" and value is None else value
    assert getattr(config, name) == wanted and type(getattr(config, name)) is type(wanted)
    for other in FIELDS.keys() - extra.keys() - {name}:
        assert getattr(config, other) == FIELDS[other].default


def write_yaml(tmp_path, values: dict[str, object]) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


# Parsing keeps no state between calls without a YAML file, so that these two are built once.
@pytest.fixture(scope="module")
def trl_parser() -> TrlParser:
    return TrlParser((*NEIGHBOURS, SpiceConfig))


@pytest.fixture(scope="module")
def hf_parser() -> HfArgumentParser:
    return HfArgumentParser((*NEIGHBOURS, SpiceConfig))


def test_every_field_is_tested():
    assert LEGAL.keys() == FIELDS.keys()
    for name, hint in TYPES.items():
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if choices:
            assert tuple(LEGAL[name][0]) == choices
        assert (type(None) in typing.get_args(hint)) == (None in LEGAL[name][0])


def test_no_field_collides():
    for neighbour in (*NEIGHBOURS, TrainingArguments):
        names = {field.name for field in dataclasses.fields(neighbour)}
        assert names & FIELDS.keys() == set(), neighbour.__name__
    assert "config" not in FIELDS  # TrlParser keeps this name for its YAML file


def test_no_option_string_collides(trl_parser):
    """argparse would refuse a twin by itself; abbreviations must not hide anything either."""
    own = {f"--{name}" for name in FIELDS} | {f"--{name.replace('_', '-')}" for name in FIELDS}
    others = HfArgumentParser(NEIGHBOURS)._option_string_actions.keys()
    assert own & others == set()
    assert own <= trl_parser._option_string_actions.keys()


@pytest.mark.parametrize(("name", "value", "extra"), CASES)
def test_trl_flag(trl_parser, base, name, value, extra):
    if value is None:
        try:
            trl_parser._option_string_actions[f"--{name}"].type("None")
        except ValueError:
            pytest.skip("this version of TRL cannot read None from a flag")
    *_, args, model_args, config = trl_parser.parse_args_and_config(as_flags({**base, **extra, name: value}))
    expect(config, name, value, extra)
    assert args.seed == 7 and isinstance(model_args, ModelConfig)


@pytest.mark.parametrize(("name", "value", "extra"), CASES)
def test_trl_yaml(tmp_path, base, name, value, extra):
    # A parser of its own: TrlParser stores the file's values as its defaults.
    parser = TrlParser((*NEIGHBOURS, SpiceConfig))
    path = write_yaml(tmp_path, {**base, **extra, name: value})
    *_, args, _, config = parser.parse_args_and_config(["--config", path])
    expect(config, name, value, extra)
    assert args.seed == 7


@pytest.mark.parametrize(("name", "value", "extra"), CASES)
def test_hf_flag(hf_parser, base, name, value, extra):
    given = {**base, **extra, name: value}
    if value is None:  # transformers' parser reads no None; it is the default, and for sketch_dim the same as 0
        given[name] = 0
        if name != "sketch_dim":
            del given[name]
    *_, config = hf_parser.parse_args_into_dataclasses(as_flags(given), look_for_args_file=False)
    expect(config, name, value, extra)


@pytest.mark.parametrize(("name", "value", "extra"), CASES)
def test_hf_yaml_and_json(tmp_path, hf_parser, base, name, value, extra):
    *_, config = hf_parser.parse_yaml_file(write_yaml(tmp_path, {**base, **extra, name: value}))
    expect(config, name, value, extra)
    (config,) = HfArgumentParser(SpiceConfig).parse_dict(json.loads(json.dumps({**extra, name: value})))
    expect(config, name, value, extra)


def test_hyphens_and_flag_over_yaml(tmp_path, base):
    parser = TrlParser((*NEIGHBOURS, SpiceConfig))
    path = write_yaml(tmp_path, {**base, "pool_size": 64, "num_selected": 8})
    *_, config = parser.parse_args_and_config(["--config", path, "--pool-size", "32"])
    assert (config.pool_size, config.num_selected) == (32, 8)


def test_yaml_float_without_decimal_point(tmp_path, base):
    """YAML reads 1e-6 as text. TrlParser converts it; HfArgumentParser's file reader hands the text over."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(base) + "tie_tolerance: 1e-7\n")
    *_, config = TrlParser((*NEIGHBOURS, SpiceConfig)).parse_args_and_config(["--config", str(path)])
    assert config.tie_tolerance == 1e-7
    path.write_text("tie_tolerance: 1e-7\n")
    with pytest.raises(ValueError, match=r"tie_tolerance='1e-7' is of type str.*YAML reads 1e-6 as text and 1.0e-6"):
        HfArgumentParser(SpiceConfig).parse_yaml_file(str(path))


def test_help_page(trl_parser):
    text = " ".join(trl_parser.format_help().split())
    for name, field in FIELDS.items():
        assert f"--{name}" in text
        assert len(field.metadata["help"]) > 20 and "%" not in field.metadata["help"]


def test_docstring_names_every_field_and_its_default():
    text = "\n".join(line.strip() for line in SpiceConfig.__doc__.splitlines())
    for name, field in FIELDS.items():
        default = f", defaults to `{json.dumps(field.default)}`" if field.default is not None else ""
        default = default.replace("1e-06", "1e-6").replace("`false`", "`False`")
        kinds = {int: "int", float: "float", bool: "bool", list[str]: "list[str]", list[float]: "list[float]"}
        kind = kinds.get((*typing.get_args(TYPES[name]), TYPES[name])[0], "str")
        assert f"\n{name} (`{kind}`, *optional*{default}):\n" in text


def test_defaults():
    assert SpiceConfig().to_dict() == {
        "pool_size": 120,
        "num_selected": 12,
        "pools_per_step": None,
        "pool_seed": None,
        "fisher_alpha": 1.0,
        "alpha_scaling": "fixed",
        "conflict_penalty": 0.1,
        "conflict_reference": "selected",
        "information": "exact",
        "gradient_normalization": "sqrt_tokens",
        "stop_ratio": None,
        "min_gain": None,
        "selection_epochs": None,
        "max_repeats": None,
        "tie_tolerance": 1e-6,
        "strategy": "spice",
        "gradient_centering": False,
        "gradient_preconditioning": "none",
        "validation_rows": 32,
        "validation_weights": None,
        "validation_every": 1,
        "matching_features": "hidden_states",
        "hidden_layer": None,
        "length_quotas": "auto",
        "length_bins": 4,
        "sketch_dim": -1,
        "scoring_tokens_per_batch": 2048,
        "scoring_layers": None,
        "scoring_parameters": "all",
        "scoring_target_modules": None,
        "scoring_max_tokens": None,
        "scoring_prefilter": None,
        "score_once_after": None,
        "proxy_model_name_or_path": None,
        "proxy_learning_rate": 2e-4,
        "proxy_update_every": 1,
        "proxy_check_pools": 0,
        "overlap_scoring": False,
        "pack_picks": False,
        "record_id_column": None,
        "record_text_length": 0,
    }


def test_paper():
    published = {
        "pool_size": 120,
        "num_selected": 12,
        "pools_per_step": 10,
        "fisher_alpha": 1.0,
        "alpha_scaling": "fixed",
        "conflict_penalty": 0.1,
        "conflict_reference": "selected",
        "information": "exact",
        "gradient_normalization": "none",
        "stop_ratio": None,
        "min_gain": None,
        "selection_epochs": 1,
        "strategy": "spice",
        "gradient_centering": False,
        "gradient_preconditioning": "none",
        "sketch_dim": 0,
    }
    config = SpiceConfig.paper()
    assert published.items() <= config.to_dict().items()
    assert not config.is_adaptive and config.resolve_sketch_dim() == 0
    plus = SpiceConfig.paper(adaptive=True)
    assert {**published, "num_selected": 60, "stop_ratio": 0.5}.items() <= plus.to_dict().items()
    assert plus.is_adaptive


def test_is_adaptive():
    assert not SpiceConfig(pools_per_step=1).is_adaptive
    assert SpiceConfig(pools_per_step=1, stop_ratio=0.5).is_adaptive
    assert SpiceConfig(pools_per_step=1, min_gain=0.0).is_adaptive  # 0 is a threshold, not "off"
    assert SpiceConfig(pools_per_step=1, min_gain=0.1, stop_ratio=0.5).is_adaptive


@pytest.mark.parametrize("normalization", typing.get_args(TYPES["gradient_normalization"]))
@pytest.mark.parametrize("information", typing.get_args(TYPES["information"]))
def test_resolve_sketch_dim(normalization, information):
    both = {"gradient_normalization": normalization, "information": information}
    default = DEFAULT_SKETCH_DIM if information == "exact" else 0
    assert SpiceConfig(**both).resolve_sketch_dim() == default
    assert SpiceConfig(**both, sketch_dim=0).resolve_sketch_dim() == 0
    assert SpiceConfig(**both, sketch_dim=None).resolve_sketch_dim() == 0
    if information == "exact":
        assert SpiceConfig(**both, sketch_dim=MIN_SKETCH_DIM).resolve_sketch_dim() == MIN_SKETCH_DIM


def test_default_sketch_dim_is_legal():
    assert SpiceConfig(sketch_dim=DEFAULT_SKETCH_DIM).resolve_sketch_dim() == DEFAULT_SKETCH_DIM


@pytest.mark.parametrize(("name", "value", "extra"), CASES)
def test_dict_replace_and_json_round_trip(name, value, extra):
    config = SpiceConfig(**{**extra, name: value})
    assert SpiceConfig(**config.to_dict()) == config
    assert SpiceConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert dataclasses.replace(config) == config


def test_numpy_numbers_and_ints_become_plain_numbers():
    config = SpiceConfig(pool_size=np.int64(64), fisher_alpha=2, conflict_penalty=np.float32(0.5), min_gain=None)
    assert type(config.pool_size) is int and type(config.conflict_penalty) is float
    assert type(config.fisher_alpha) is float and config.fisher_alpha == 2.0
    json.dumps(config.to_dict())


INTEGERS = {
    "pool_size": (2, 1, "a pool needs at least two candidates to choose between"),
    "num_selected": (1, 0, "every pool must give at least one sample"),
    "pools_per_step": (1, 0, "every optimizer step needs at least one pool"),
    "pool_seed": (0, -1, "seeds are counted from 0"),
    "selection_epochs": (1, 0, "the first epoch has no earlier picks to replay"),
    "max_repeats": (0, -1, "it counts the picks of a row after its first, and None does not limit them"),
    "sketch_dim": (-1, -2, "-1 chooses the default, 0 is exact, more is a sketch of that many"),
    "scoring_tokens_per_batch": (1, 0, "a scoring pass needs at least one token"),
    "scoring_layers": (1, 0, "scoring needs at least one layer"),
    "scoring_max_tokens": (1, 0, "a row without label tokens has no gradient"),
    "validation_rows": (1, 0, "a mean needs at least one row"),
    "score_once_after": (0, -1, "it counts steps on random rows"),
    "validation_every": (1, 0, "it counts steps from one look at the validation rows to the next"),
    "hidden_layer": (0, -1, "layers are counted from 0, the embedding's output"),
    "length_bins": (1, 0, "quotas need at least one range of lengths"),
    "proxy_update_every": (1, 0, "it counts cycles from one update of the proxy to the next"),
    "proxy_check_pools": (0, -1, "it counts pools"),
    "record_text_length": (0, -1, "it counts letters, and 0 records none"),
}
REALS = {
    "fisher_alpha": ("above 0", "an alpha of 0 would make every gain 0", [0, 0.0, -1.0]),
    "conflict_penalty": ("at least 0", "a negative penalty would reward conflict", [-0.1, -1]),
    "stop_ratio": ("between 0 and 1, both excluded", "it is a share of the first gain", [0, 1, 0.0, 1.0, -0.5, 50]),
    "min_gain": ("at least 0", "gains are never negative", [-1e-9, -1]),
    "tie_tolerance": ("at least 0 and below 1", "it is a share of the best score", [-1e-6, 1, 1.0, 2.0]),
    "scoring_prefilter": (
        "between 0 and 1, both excluded",
        "it is a share of the pool, and None takes all of it",
        [0, 1, 0.0, 1.0, -0.5, 50],
    ),
    "proxy_learning_rate": ("at least 0", "a negative rate would unlearn the picks", [-1e-6, -1]),
}
OTHERS = {
    "proxy_model_name_or_path",
    "overlap_scoring",
    "pack_picks",
    "scoring_target_modules",
    "gradient_centering",
    "record_id_column",
    "validation_weights",
}


def error_of(**values: object) -> str:
    with pytest.raises(ValueError) as caught:
        SpiceConfig(**values)
    return str(caught.value)


def test_every_number_has_error_cases():
    literals = {name for name, hint in TYPES.items() if typing.get_origin(hint) is typing.Literal}
    # The legal names of rules are those that are registered.
    assert INTEGERS.keys() | REALS.keys() | literals | {"strategy"} | OTHERS == FIELDS.keys()


@pytest.mark.parametrize("value", ["", 3, True, ["a"]])
def test_proxy_name_of_wrong_type(value):
    assert error_of(proxy_model_name_or_path=value) == (
        f"SpiceConfig: proxy_model_name_or_path={value!r} is no name. Fix: give a model on the hub or a folder, or "
        "None. A loaded model goes to attach_spice as `proxy=ProxyModel(model)`."
    )


@pytest.mark.parametrize("value", ["q_proj", [], [""], [1], 3, {"q_proj": 1}])
def test_module_names_of_wrong_type(value):
    assert error_of(scoring_target_modules=value) == (
        f"SpiceConfig: scoring_target_modules={value!r} is no list of names. Fix: give a list such as "
        "['q_proj', 'v_proj'], or None."
    )


def test_prefilter_beside_training():
    assert error_of(scoring_prefilter=0.5, overlap_scoring=True) == (
        "SpiceConfig: scoring_prefilter=0.5 with overlap_scoring=True: the filter needs the losses of every process, "
        "which cannot talk to each other while the step before trains. Fix: leave one of the two out."
    )


def test_prefilter_beside_a_check_of_the_proxy():
    assert error_of(scoring_prefilter=0.5, proxy_check_pools=2) == (
        "SpiceConfig: scoring_prefilter=0.5 with proxy_check_pools=2: the proxy and the target would each drop other "
        "candidates, so their scores could not be compared. Fix: leave one of the two out."
    )


def test_prefilter_that_leaves_too_few():
    assert error_of(scoring_prefilter=0.09) == (
        "SpiceConfig: scoring_prefilter=0.09 of pool_size=120 is fewer candidates than num_selected=12. "
        "Fix: set scoring_prefilter to at least 0.1."
    )
    SpiceConfig(scoring_prefilter=0.1), SpiceConfig(scoring_prefilter=0.092, pool_size=120)


@pytest.mark.parametrize("name", ["overlap_scoring", "pack_picks", "gradient_centering"])
@pytest.mark.parametrize("value", ["yes", 1, None])
def test_switch_of_wrong_type(name, value):
    assert error_of(**{name: value}) == (
        f"SpiceConfig: {name}={value!r} is neither True nor False. Fix: set {name} to one of them."
    )


# A setting, what is wrong with it, and the strategies that it means something to.
BY_INFORMATION = ("spice", "fisher")
WITH_GRAM = ("spice", "fisher", "dpp", "matching", "facility_location")
ON_GRADIENTS = ("less", "greats", "opus")
WITH_GRADIENTS = (
    *("spice", "fisher", "targeted_matching", "top_norm", "dpp", "matching", "facility_location"),
    *ON_GRADIENTS,
)
WITHOUT_MODEL = ("random", "length_matched")
LIMITED = [
    ("stop_ratio", 0.5, "it is a share of a gain of information, which this strategy has none of", BY_INFORMATION),
    ("min_gain", 0.0, "it is a gain of information, which this strategy has none of", BY_INFORMATION),
    ("information", "diagonal", "this strategy picks by something else than information", BY_INFORMATION),
    ("gradient_centering", True, "this strategy picks by something else than information", BY_INFORMATION),
    ("scoring_prefilter", 0.5, "this strategy takes no gradients, which the filter would save", WITH_GRADIENTS),
    ("proxy_check_pools", 2, "the comparison is of gains that come from a pool's Gram matrix", WITH_GRAM),
    ("overlap_scoring", True, "beside the training nothing but the Gram matrix's gradients is computed", WITH_GRAM),
    (
        "proxy_model_name_or_path",
        "org/model",
        "this strategy scores nothing, so a proxy would have no work",
        tuple(name for name in STRATEGY_NAMES if name not in WITHOUT_MODEL),
    ),
]


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
@pytest.mark.parametrize(("name", "value", "reason", "strategies"), LIMITED, ids=[case[0] for case in LIMITED])
def test_settings_that_mean_nothing_to_a_strategy(name, value, reason, strategies, strategy):
    values = {"strategy": strategy, "pools_per_step": 10, "matching_features": "gradients", name: value}
    if strategy in strategies:
        assert getattr(SpiceConfig(**values), name) == value
        return
    listed = ", ".join(map(repr, strategies))
    assert error_of(**values) == (
        f"SpiceConfig: {name}={value!r} with strategy={strategy!r}: {reason}. Fix: leave {name} out, or set strategy "
        f"to one of {listed}."
    )


@pytest.mark.parametrize("information", ["diagonal", "adafisher"])
def test_centred_coordinates(information):
    assert error_of(gradient_centering=True, information=information) == (
        f"SpiceConfig: gradient_centering=True with information='{information}': gradients are centred in their Gram "
        "matrix, and this measure sums over their coordinates. Fix: leave gradient_centering out, or set "
        "information='exact'."
    )


def test_strategies_that_need_no_features_keep_the_fewest():
    for strategy in STRATEGY_NAMES:
        on_gradients = {"strategy": strategy, "matching_features": "gradients"}
        kept = {SpiceConfig(**on_gradients, sketch_dim=dim).resolve_sketch_dim() for dim in (-1, 0, 512)}
        needs_features = strategy in (*WITH_GRAM, *ON_GRADIENTS, "targeted_matching")
        assert kept == ({DEFAULT_SKETCH_DIM, 0, 512} if needs_features else {MIN_SKETCH_DIM})
        config = SpiceConfig(**on_gradients)
        assert config.takes_gradients == (strategy in WITH_GRADIENTS) and config.takes_gram == (strategy in WITH_GRAM)


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_out_of_range(name):
    minimum, bad, reason = INTEGERS[name]
    for value in (bad, bad - 100):
        assert error_of(**{name: value}) == (
            f"SpiceConfig: {name}={value} is below {minimum}: {reason}. Fix: set {name} to at least {minimum}."
        )


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, False, 12.0, 12.5, "12", [12], math.nan])
def test_integer_of_wrong_type(name, value):
    assert error_of(**{name: value}) == (
        f"SpiceConfig: {name}={value!r} is of type {type(value).__name__}, but {name} is a whole number. Fix: set "
        f"{name} to an int of at least {INTEGERS[name][0]}, written without quotes or decimal point."
    )


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("value", [True, False, "0.5", "1e-6", [0.5], 1j])
def test_real_of_wrong_type(name, value):
    assert error_of(pools_per_step=1, **{name: value}) == (
        f"SpiceConfig: {name}={value!r} is of type {type(value).__name__}, but {name} is a number. Fix: set {name} to "
        f"a float {REALS[name][0]}; YAML reads 1e-6 as text and 1.0e-6 as a number."
    )


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_real_not_finite(name, value):
    assert error_of(pools_per_step=1, **{name: value}) == (
        f"SpiceConfig: {name}={value} is not finite. Fix: set {name} to a float {REALS[name][0]}."
    )


@pytest.mark.parametrize("name", REALS)
def test_real_out_of_range(name):
    legal, reason, values = REALS[name]
    for value in values:
        assert error_of(pools_per_step=1, **{name: value}) == (
            f"SpiceConfig: {name}={value} is not {legal}: {reason}. Fix: set {name} to a float {legal}."
        )


@pytest.mark.parametrize("name", [name for name, hint in TYPES.items() if type(None) not in typing.get_args(hint)])
def test_none_where_a_value_is_needed(name):
    assert error_of(**{name: None}).startswith(f"SpiceConfig: {name}=None is ")


@pytest.mark.parametrize("value", ["Fixed", "", None, 1, ["fixed"]])
@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("alpha_scaling", "'fixed', 'pool'"),
        ("conflict_reference", "'selected', 'candidates', 'pool', 'momentum'"),
        ("strategy", ", ".join(map(repr, STRATEGY_NAMES))),
        ("information", "'exact', 'diagonal', 'adafisher'"),
        ("gradient_normalization", "'none', 'sqrt_tokens', 'tokens', 'unit'"),
    ],
)
def test_unknown_choice(name, choices, value):
    assert (
        error_of(**{name: value}) == f"SpiceConfig: {name}={value!r} is unknown. Fix: set {name} to one of {choices}."
    )


def test_more_picks_than_candidates():
    assert error_of(num_selected=121) == (
        "SpiceConfig: num_selected=121 is more than pool_size=120: a pool cannot give more samples than it has "
        "candidates. Fix: lower num_selected to at most 120, or raise pool_size to at least 121."
    )


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ({"stop_ratio": 0.5}, "stop_ratio=0.5"),
        ({"min_gain": 0}, "min_gain=0.0"),
        ({"stop_ratio": 0.5, "min_gain": 0.1}, "stop_ratio=0.5 and min_gain=0.1"),
    ],
)
def test_adaptive_without_pools_per_step(values, given):
    assert error_of(**values) == (
        f"SpiceConfig: {given} with pools_per_step=None: under adaptive stopping num_selected is only a cap, so the "
        "number of pools of a step cannot follow from the batch size. Fix: set pools_per_step (the paper uses 10), or "
        "leave the adaptive stopping out."
    )


@pytest.mark.parametrize("value", [1, 15])
def test_tiny_sketch(value):
    assert error_of(sketch_dim=value) == (
        f"SpiceConfig: sketch_dim={value} is below 16: so few numbers cannot tell the gradients of a pool apart. Fix: "
        "set sketch_dim to at least 16, to 0 for exact gradients, or to -1 for the default."
    )


@pytest.mark.parametrize("information", ["diagonal", "adafisher"])
def test_sketch_of_a_basis_dependent_measure(information):
    assert error_of(sketch_dim=4096, information=information) == (
        f"SpiceConfig: sketch_dim=4096 with information='{information}': this measure sums over single gradient "
        "coordinates, and a sketch mixes them, so the result would mean nothing. Fix: set sketch_dim=0 (or -1), or "
        "information='exact'."
    )


def test_errors_reach_the_command_line(trl_parser, base):
    with pytest.raises(ValueError, match="num_selected=130 is more than pool_size=120"):
        trl_parser.parse_args_and_config(as_flags({**base, "num_selected": 130}))


def test_settings_that_mean_nothing_on_hidden_states():
    assert error_of(strategy="targeted_matching", gradient_preconditioning="adam") == (
        "SpiceConfig: gradient_preconditioning='adam' with strategy='targeted_matching': this strategy compares no "
        "gradients with each other. Fix: leave gradient_preconditioning out, or set matching_features='gradients'."
    )


@pytest.mark.parametrize("value", ["1", 1.0, [], [0.0], [1.0, -1.0], [True]])
def test_weights_of_wrong_type(value):
    assert error_of(validation_weights=value).startswith("SpiceConfig: validation_weights")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"overlap_scoring": True}, "overlap_scoring=True: there is nothing to score beside the training"),
        ({"proxy_check_pools": 2}, "proxy_check_pools=2: the target would score at other weights"),
        ({"scoring_prefilter": 0.5}, "scoring_prefilter=0.5: it compares the losses of a pool's rows"),
        ({"conflict_reference": "momentum"}, "conflict_reference='momentum': the momentum changes with every step"),
    ],
)
def test_scoring_once_beside_what_changes(values, text):
    assert error_of(score_once_after=3, **values) == (
        f"SpiceConfig: score_once_after=3 with {text}. Fix: leave one of the two out."
    )
    assert "this strategy scores nothing" in error_of(score_once_after=3, strategy="random")
