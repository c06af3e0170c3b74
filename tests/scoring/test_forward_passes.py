"""Local windows, content alone, mean hidden states: against the student's own logits and states, in float64."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lark.common.cache import read_json
from lark.common.table_cache import read_columns
from lark.scoring.forward_passes import ContentAloneModule, LocalWindowsModule, MeanHiddenModule, cut_windows
from lark.scoring.pass_module import PassInputs, run_pass
from lark.scoring.passes import ContentAlone, LocalWindows, MeanHidden
from lark.selection.scores.statistics import InstructionDifficulty, Likelihood, LocalLikelihood
from lark.student.chat import TokenizedTrajectory


def pool_rows():
    """Trajectories of 1 to 7 steps, one of them a single token, one that spells out a special token."""
    sentences = ["Take 3.", "Add 4 to it.", "That is 7!", "Is it?", "It is.", "See: 3 + 4 = 7.", "So \\boxed{7}"]
    texts = [" ".join(sentences[-count:]) for count in (1, 2, 4, 6, 7)] + ["A turn <|im_end|> ends. So.", "7"]
    return [
        {
            "problem_id": problem,
            "candidate_id": str(i),
            "messages": [{"role": "user", "content": f"{problem}?"}, {"role": "assistant", "content": text}],
        }
        for problem in ("3 + 4", "What is 3 and 4")
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def measured(make_data, make_trainer, tmp_path):
    """Runs a pass over the pool: its data module, columns and manifest."""

    def run(module, wanted, name="pass", **settings):
        data = make_data(pool_rows(), cache=name, **{"task": {"held_out": 0.0}} | settings)
        data.prepare_data()
        pool = data.trajectories
        inputs = PassInputs(student=data.student, settings=data.probe, pool=pool, rows=pool.scored, seed=0)
        folder = tmp_path / f"{name} columns"
        run_pass(make_trainer(inference_mode=False), module(wanted=wanted, inputs=inputs, folder=folder), {})
        columns = read_columns(folder)
        np.testing.assert_array_equal(columns["row"], pool.scored)
        return data, columns, read_json(folder / "manifest.json")

    return run


@pytest.fixture
def dense(make_student):
    """Surprisals of ids[1:] and last hidden states of ids, by a forward pass of one sequence in float64."""
    model = make_student().load_model(torch.float32).double()

    def run(ids):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        logp = output.logits[0, :-1].log_softmax(-1)
        return -logp[torch.arange(len(ids) - 1), ids[1:]].numpy(), output.hidden_states[-1][0].numpy()

    return run


def steps_of(row: TokenizedTrajectory) -> tuple[list[int], list[list[int]]]:
    """The prompt's tokens, and those of each step."""
    prompt, span = row.input_ids[: row.prompt_tokens], row.input_ids[row.prompt_tokens :]
    content = span if row.end_of_turn < 0 else span[: row.end_of_turn]
    return prompt, [content[a:b] for a, b in zip(row.steps, [*row.steps[1:], None], strict=True)] if content else []


@pytest.mark.parametrize("steps_before", [0, 1, 3, 50])
@pytest.mark.parametrize("cut", [None, 70])
def test_window_surprisal_is_that_of_each_step_after_prompt_and_previous_steps(measured, dense, steps_before, cut):
    task = {"held_out": 0.0} | ({} if cut is None else {"overlong": "truncate", "max_length": cut})
    data, columns, manifest = measured(LocalWindowsModule, LocalWindows(steps_before=steps_before), task=task)
    encoded = data.trajectories.read_tokens(data.trajectories.scored)
    assert (data.trajectories.truncated > 0) == (cut is not None)
    forward_tokens = 0
    for row, surprisal_S in zip(encoded, columns["window_surprisal"], strict=True):
        prompt, steps = steps_of(row)
        expected = []
        for i, step in enumerate(steps):
            before = [token for earlier in steps[max(0, i - steps_before) : i] for token in earlier]
            expected.append(dense([*prompt, *before, *step])[0][-len(step) :].sum())
            whole_prefix, is_last_such = i <= steps_before, i == min(steps_before, len(steps) - 1)
            forward_tokens += (is_last_such or not whole_prefix) * len([*prompt, *before, *step])
        np.testing.assert_allclose(surprisal_S, expected, rtol=1e-5)
    assert max(len(surprisal_S) for surprisal_S in columns["window_surprisal"]) >= (7 if cut is None else 3)
    assert manifest["forward_tokens"] == forward_tokens


def test_a_window_holds_the_prompt_the_steps_before_and_the_step():
    row = TokenizedTrajectory(
        input_ids=[90, 91, 10, 11, 20, 30, 31, 40, 99], prompt_tokens=2, end_of_turn=6, steps=[0, 2, 3, 5]
    )
    first, third, fourth = cut_windows(row, 1)
    assert first == TokenizedTrajectory(input_ids=[90, 91, 10, 11, 20], prompt_tokens=2, end_of_turn=-1, steps=[0, 2])
    assert third == TokenizedTrajectory(input_ids=[90, 91, 20, 30, 31], prompt_tokens=3, end_of_turn=-1, steps=[0])
    assert fourth == TokenizedTrajectory(input_ids=[90, 91, 30, 31, 40], prompt_tokens=4, end_of_turn=-1, steps=[0])


def test_local_likelihood_over_the_whole_prefix_is_the_mean_of_the_steps_means(make_data):
    score = LocalLikelihood(steps_before=50)
    data = make_data(selector=score, baseline=Likelihood())
    data.setup("fit")
    rows = data.candidates
    by_step = zip(rows["step_surprisal"], rows["step_tokens"], strict=True)
    np.testing.assert_allclose(score(rows), [-np.mean(nats / tokens) for nats, tokens in by_step], rtol=1e-6)


def content_ids(text: str, tokenizer) -> list[int]:
    """The byte tokenizer's ids, one a byte."""
    return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(chr(byte))[0]) for byte in text.encode()]


@pytest.mark.parametrize("bos", [None, "<|im_start|>"])
def test_content_alone_is_scored_without_prompt_template_and_end(measured, dense, student_folder, tmp_path, bos):
    student = {}
    if bos is not None:
        folder = tmp_path / "with BOS"
        folder.mkdir()
        for file in student_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(student_folder)
        tokenizer.bos_token = bos
        tokenizer.save_pretrained(folder)
        student = {"path": str(folder)}
    data, columns, manifest = measured(ContentAloneModule, ContentAlone(), student=student)
    pool = data.trajectories
    tokenizer = pool.chat.tokenizer
    start = [] if bos is None else [tokenizer.convert_tokens_to_ids(bos)]
    forward_tokens = 0
    for i, text in enumerate(pool.column("text", pool.scored)):
        ids = [*start, *content_ids(text, tokenizer)]
        assert columns["alone_tokens"][i] == max(0, len(ids) - 1)
        expected = dense(ids)[0].sum() if len(ids) > 1 else 0.0
        assert columns["alone_surprisal"][i] == pytest.approx(expected, rel=1e-5)
        forward_tokens += len(ids) if len(ids) > 1 else 0
    assert manifest["forward_tokens"] == forward_tokens
    assert columns["alone_tokens"].min() == len(start), "of the single token"


def test_content_alone_ends_where_the_row_was_cut(measured, dense):
    data, columns, _ = measured(
        ContentAloneModule, ContentAlone(), task={"held_out": 0.0, "overlong": "truncate", "max_length": 70}
    )
    pool = data.trajectories
    rows = pool.read_tokens(pool.scored)
    was_cut = [row.end_of_turn < 0 for row in rows]
    assert any(was_cut) and not all(was_cut)
    for i, text in enumerate(pool.column("text", pool.scored)):
        span = rows[i].input_ids[rows[i].prompt_tokens :]
        content = span if was_cut[i] else span[:-1]
        assert len(content) == len(text.encode()) or was_cut[i]
        if len(content) > 1:
            assert columns["alone_surprisal"][i] == pytest.approx(dense(content)[0].sum(), rel=1e-5)


def test_instruction_difficulty_is_the_ratio_of_perplexities(make_data, dense):
    data = make_data(selector=InstructionDifficulty(max=None))
    data.setup("fit")
    pool = data.trajectories
    for row, value in zip(pool.scored, InstructionDifficulty(max=None)(data.candidates), strict=True):
        (encoded,) = pool.read_tokens(np.array([row]))
        content = encoded.input_ids[encoded.prompt_tokens : -1]
        given = dense(encoded.input_ids[:-1])[0][encoded.prompt_tokens - 1 :]
        assert value == pytest.approx(np.exp(given.mean()) / np.exp(dense(content)[0].mean()), rel=1e-4)


def test_mean_hidden_averages_the_states_at_the_spans_own_tokens(measured, dense):
    data, columns, manifest = measured(MeanHiddenModule, MeanHidden())
    encoded = data.trajectories.read_tokens(data.trajectories.scored)
    for row, vector_D in zip(encoded, columns["vector"], strict=True):
        assert vector_D.dtype == np.float32
        expected = dense(row.input_ids)[1][row.prompt_tokens :].mean(0)
        np.testing.assert_allclose(vector_D, expected, rtol=1e-4, atol=1e-5)
    assert manifest["forward_tokens"] == sum(len(row.input_ids) for row in encoded)


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (LocalWindowsModule, LocalWindows(steps_before=1)),
        (ContentAloneModule, ContentAlone()),
        (MeanHiddenModule, MeanHidden()),
    ],
)
def test_batch_composition_changes_no_column(measured, module, wanted):
    alone = measured(module, wanted, "alone", probe={"batch_tokens": 1})[1]
    together = measured(module, wanted, "together", probe={"batch_tokens": 100_000})[1]
    assert alone.keys() == together.keys()
    for name, column in alone.items():
        for one, other in zip(column, together[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=name)
