"""config.py: a configuration is decoded strictly, a typo is answered with the key that was meant,
and what is echoed reads back equal.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from loader.config import ConfigError, dump_toml, load_toml


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    folders: list[str] = []
    i2v_share: float = 0.4
    cache: str | None = None


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    prompt: str = ""
    seed: int | None = None
    task: Literal["t2v", "i2v"] | None = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    output: str
    data: Data = Data()
    num_steps: int = 10
    dtype: Annotated[Literal["float16", "float32"], "of the model"] = "float16"
    every_s: float | None = None
    samples: list[Sample] = []


def load(folder: Path, text: str, *overrides: str) -> Config:
    (folder / "c.toml").write_text(text, encoding="utf-8")
    return load_toml(folder / "c.toml", Config, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_step=3", "unknown field `num_step`; did you mean num_steps?"),
        ("data.i2vshare=1", "unknown field `i2vshare` - at `$.data`; did you mean data.i2v_share?"),
        ("i2v_share=1", "unknown field `i2v_share`; did you mean data.i2v_share?"),
        ("dta.folders=['a']", "unknown field `dta`; did you mean data?"),
        ("data.prompt='x'", "unknown field `prompt` - at `$.data`; did you mean samples.prompt?"),
        (
            "data.zzz=1",
            "unknown field `zzz` - at `$.data`; known keys here: cache, folders, i2v_share",
        ),
        ("data_folders=['a']", "unknown field `data_folders`; did you mean data.folders?"),
        ("zzz=1", "`zzz`; known keys here: data, dtype, every_s, num_steps, output, samples"),
        ("samples=[{promt = 'x'}]", "`promt` - at `$.samples[0]`; did you mean samples.prompt?"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, 'output = "o"', override)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/c.toml (with --set {override}): ")


@pytest.mark.parametrize(
    ("override", "options"),
    [("dtype=half", "float16, float32"), ("samples=[{}, {task = 'v2v'}]", "t2v, i2v")],
)
def test_a_value_that_is_none_of_a_few_is_answered_with_those(
    tmp_path: Path, override: str, options: str
) -> None:
    with pytest.raises(ConfigError, match=rf"Invalid enum value .*; choose from {options}$"):
        load(tmp_path, 'output = "o"', override)


def test_a_wrong_value_names_its_key_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, 'output = "o"\nnum_steps = "ten"')
    assert str(caught.value) == (f"{tmp_path}/c.toml: Expected `int`, got `str` - at `$.num_steps`")


@pytest.mark.parametrize(
    ("text", "message"), [("output = ", "not valid TOML"), ("num_steps = 1", "field `output`")]
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"c.toml: .*{message}"):
        load(tmp_path, text)
    with pytest.raises(ConfigError, match=r"absent\.toml: can't read the configuration"):
        load_toml(tmp_path / "absent.toml", Config)


def test_what_is_echoed_reads_back_equal(tmp_path: Path) -> None:
    config = Config(
        output='C:\\a "b"\n\t\x7f 이미지',
        data=Data(folders=["a" * 60, "b, ]", ""], i2v_share=1e-7),
        samples=[Sample(prompt="x"), Sample()],
    )
    text = dump_toml(config)
    assert load(tmp_path, text) == config
    plain: dict[str, Any] = tomllib.loads(text)
    assert "every_s" not in plain and "cache" not in plain["data"]  # None is left out


def test_set_overrides_one_value_as_toml_or_plain_text(tmp_path: Path) -> None:
    overrides = ("num_steps=3", "data.folders=['a', 'b']", "output=runs/a", "every_s=0.5")
    config = load(tmp_path, 'output = "o"', *overrides)
    assert config == Config(
        output="runs/a", num_steps=3, data=Data(folders=["a", "b"]), every_s=0.5
    )
    for wrong in ("num_steps", "=3"):
        with pytest.raises(ConfigError, match="expected key=value"):
            load(tmp_path, 'output = "o"', wrong)
    with pytest.raises(ConfigError, match="output is a value, not a table"):
        load(tmp_path, 'output = "o"', "output.x=1")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_number_that_is_not_finite_is_refused_by_its_key(tmp_path: Path, value: str) -> None:
    message = f"every_s = {value}: give a finite number"
    with pytest.raises(ConfigError, match=f"c.toml: {message}"):
        load(tmp_path, f'output = "o"\nevery_s = {value}')
    with pytest.raises(ConfigError, match=rf"\(with --set every_s={value}\): {message}"):
        load(tmp_path, 'output = "o"', f"every_s={value}")


def test_infinity_in_a_table_or_a_list_is_found(tmp_path: Path) -> None:
    class Table(msgspec.Struct):
        weights: list[float]

    class Whole(msgspec.Struct):
        data: Table

    path = tmp_path / "c.toml"
    path.write_text("[data]\nweights = [1.0, inf]")
    with pytest.raises(ConfigError, match=r"data\.weights\[1\] = inf: give a finite number"):
        load_toml(path, Whole)
