"""Settings are checked against the dataclasses they build; errors are sentences."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from lark_command import answered_lightly, lark
from omegaconf import OmegaConf

from lark import config as configuration

DEFECTS = [  # overrides; what the one sentence has to hold
    (["selector=larkk"], ["selector=larkk is unknown", "did you mean lark?", "shortest"]),
    (["seed=abc"], ["seed=abc", "a whole number of 0 or more"]),
    (["seed=-1"], ["seed=-1", "0 or more"]),
    (["seed=1.5"], ["seed=1.5"]),
    (["budget=-1"], ["budget=-1", "1 or more"]),
    (["filter=[correct]"], ["filter=['correct']", "text or a group of settings or null"]),
    (["filter=corect"], ["corect", "did you mean correct?", "filter"]),
    (["budget=x"], ["budget=x", "1 or more"]),
    (["sft.xyzzy=1"], ["sft.xyzzy is not a setting; --cfg job"]),
    (["sft.stesp=1"], ["sft.stesp is not a setting", "did you mean sft.steps?"]),
    (["budgt=2"], ["budgt is not a setting", "did you mean budget?"]),
    (["selectr=lark"], ["selectr is not a setting", "did you mean selector?"]),
    (
        ["selector.score.parameters=last:1"],
        ["selector.score.parameters is not a setting here: another option of selector="],
    ),
    (
        ["baseline=none", "baseline.filter=correct"],
        ["baseline.filter is not a setting here", "another option of baseline="],
    ),
    (["checkpoint=x"], ["checkpoint is not a setting here: another command"]),
    (["baseline.polcy.tau=1"], ["did you mean baseline.policy.tau?"]),
    (["+sft.stpes=1"], ["sft.stpes is not a setting", "did you mean sft.steps?"]),
    (["+foo=1"], ["foo is not a setting"]),
    (["sft.lr=abc"], ["sft.lr=abc", "a number"]),
    (["sft.lr=0"], ["sft.lr=0", "positive"]),
    (["sft.steps=0"], ["sft.steps=0", "at least 1"]),
    (["sft.steps=1.5"], ["sft.steps=1.5", "a whole number or null"]),
    (["sft.weighted=maybe"], ["sft.weighted=maybe", "true or false"]),
    (["sft.betas=3"], ["sft.betas=3", "a list of 2, each a number"]),
    (["sft.betas=[0.9]"], ["sft.betas=[0.9]", "a list of 2"]),
    (["evaluation.pass_at=[9]"], ["evaluation.pass_at=9", "evaluation.samples=4"]),
    (["evaluation.pass_at=[x]"], ["evaluation.pass_at=['x']", "a list, each a whole number"]),
    (["task.held_out=x"], ["task.held_out=x", "a number"]),
    (["task.held_out=1"], ["task.held_out=1", "below 1"]),
    (["task.limit=0"], ["task.limit=0", "null for all"]),
    (["task.system=3"], ["task.system=3", "text or null"]),
    (["task=jsonl"], ["task.pool has no value", "task.pool=..."]),
    (["task=jsonl", "task.pool=null"], ["task.pool=None", "file, folder or list"]),
    (["task=jsonl", "task.pool=x", "task.eval=3"], ["task.eval=3", "text or a group of settings or a list, each a"]),
    (["selector.policy.tau=0.1"], ["selector.policy.budget=2", "selector.policy.tau=0.1", "=null"]),
    (["selector.policy.kind=softmax"], ["selector.policy.kind=softmax", "top_b"]),
    (["selector.policy.budget=x"], ["selector.policy.budget=x", "a whole number or null"]),
    (["+selector.policy.power=2"], ["does not take its settings", "power"]),
    (["selector.policy=3"], ["selector.policy=3", "a group of settings"]),
    (["selector.name=null"], ["selector.name=None"]),
    (["selector=custom"], ["selector.score has no value", "selector.score=..."]),
    (["selector=custom", "selector.score=no_such_module:f"], ["selector.score='no_such_module:f'", "PYTHONPATH"]),
    (
        ["selector.score._target_=lark.selection.scores.statistics.Nope"],
        ["selector.score._target_=lark.selection.scores.statistics.Nope", "correct it"],
    ),
    (["task._target_=lark.data.Task"], ["task._target_=lark.data.Task", "earlier version", "run the command again"]),
    (["stop_after=foo"], ["stop_after=foo", "statistics, selection, training, null"]),
    (["match=bytes"], ["match=bytes", "trajectories, tokens"]),
    (["selector=drop_first", "selector.score.skip=3"], ["selector: skip=3", "probe.skip=2", "set both"]),
    (["probe.model=gpt"], ["probe.model=gpt", "one of", "tiny_b"]),
    (["+sft.lr_sweep=[0.1]"], ["sft.lr_sweep is not a setting"]),
    (["selector.refresh=2"], ["selector.refresh is not a setting"]),
    (["baseline=judge"], ["baseline=judge", "no column judge", "baseline.score"]),
    (["selector=teacher_matched_random"], ["baseline=teacher_matched_random"]),
    (["selector=lark_exact", "selector.score.parameters=some"], ["selector.score.parameters='some'", "last:<layers>"]),
    (["baseline=entropy", "baseline.score.sign=3"], ["baseline.score.sign=3", "lowest entropy first"]),
    (["baseline.policy.budget=0"], ["baseline.policy.budget=0", "set 3, say"]),
    (["logger=offline", "logger.mode=foo"], ["logger.mode='foo'", "auto, online or offline"]),
    (["paths.logs=3"], ["paths.logs=3", "folder"]),
    (["model.path=/nowhere"], ["model.path=/nowhere", "set it to a folder"]),
    (["task.limit"], ["task.limit", "setting=value"]),
    (["selector={a: 1}"], ["selector=... cannot be replaced", "selector.<name>=", "lark_length"]),
]


@pytest.mark.parametrize(("words", "parts"), DEFECTS, ids=[" ".join(words) for words, _ in DEFECTS])
def test_a_wrong_setting_is_one_sentence(words: list[str], parts: list[str], tmp_path: Path) -> None:
    logs = [] if words[0].startswith("paths.logs") else [f"paths.logs={tmp_path}"]
    done = lark("logger=csv", f"hydra.run.dir={tmp_path / 'run'}", *logs, *words)
    assert done.code == 1
    assert done.err.startswith("lark: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    assert "HYDRA_FULL_ERROR" not in done.err
    for part in parts:
        assert part in done.err


def test_help_and_cfg_import_nothing_heavy(tmp_path: Path) -> None:
    """Loading torch takes seconds: only a job may do it."""
    for words, part in ((["--help"], "selector: all, "), (["--cfg", "job"], "budget: 2")):
        assert part in answered_lightly("run", words, tmp_path)


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    pair: tuple[float, str] = (1.0, "a")
    names: dict[str, str] | None = None
    numbers: list[int] = field(default_factory=list)
    hook: object = None


RIGHT = {"inner": {"_target_": "test_config.Inner", "size": 1}}


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"pair": [1, "a"], "names": {"a": "b"}, "numbers": [1, 2], "hook": "anything"}, None),
        ({"inner": {"_target_": "test_config.Inner", "size": True}}, "block.inner.size=True"),
        ({"inner": {"_target_": "test_config.Inner", "size": 1, "sise": 2}}, "did you mean block.inner.size?"),
        ({"inner": 3}, "block.inner=3"),
        ({"pair": ["a", 1]}, "block.pair=['a', 1]: this setting takes a list of 2"),
        ({"pair": [1.0, "a", 2]}, "block.pair"),
        ({"names": ["a"]}, "a group of settings or null"),
        ({"numbers": [1, 2.5]}, "a list, each a whole number"),
    ],
)
def test_types_are_those_of_the_dataclass(settings: dict, part: str | None) -> None:
    node = OmegaConf.create({"_target_": "test_config.Outer", **RIGHT, **settings})
    if part is None:
        configuration._check_node("block", node)
    else:
        with pytest.raises(ValueError) as error:
            configuration._check_node("block", node)
        assert part in str(error.value)


def test_a_class_of_the_users_own_may_take_anything(tmp_path: Path) -> None:
    node = OmegaConf.create({"_target_": "collections.Counter", "a": "x"})
    configuration._check_node("block", node)
    assert configuration.build(node) == {"a": "x"}
    with pytest.raises(ValueError, match="does not take its settings"):
        configuration.build(OmegaConf.create({"_target_": "pathlib.PurePath.joinpath", "b": 1}))
