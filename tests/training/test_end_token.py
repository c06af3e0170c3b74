"""The end token: can a student learn it, do the remedies help, and what is said of it."""

import json
import math
import re
import shlex
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from lark import config as configuration
from lark.student.model_parts import compute_hidden_states, get_base_model, get_head
from lark.student.student import save_student
from lark.student.token_statistics import Head
from lark.training.end_token import (
    ENOUGH,
    RECORD,
    EndTokenCheck,
    count_missing_ends,
    describe_problem,
    inspect_end_token,
    is_trainable,
    max_probability,
)

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
UNUSED = "<|endoftext|>"  # of the shipped students: no row they were trained on holds it


def sums(count: int) -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"{a} + 5 = ?"},
            {"role": "assistant", "content": f"{a} + 5 = {a + 5}.\n\nThe answer is \\boxed{{{a + 5}}}."},
        ]
        for a in range(10, 10 + count)
    ]


def pool_of(chat) -> Any:
    """What the check asks a pool for, from its rows in memory."""
    import datasets

    rows = chat.encode(sums(12))
    columns = {"end_of_turn": [r.end_of_turn for r in rows], "prompt_tokens": [r.prompt_tokens for r in rows]}
    return SimpleNamespace(
        chat=chat,
        tokens=datasets.Dataset.from_dict(columns),
        length=np.array([len(r.input_ids) for r in rows]),
        read_tokens=lambda picked: [rows[i] for i in picked],
    )


def untrained(student) -> Any:
    """The student, LoRA on top, with the head's row of its end token as pre-training leaves one that never occurs."""
    model = student.load_trainable(torch.float32)
    output: Any = get_base_model(model).get_output_embeddings()
    weight = output.weight.data
    alike = F.cosine_similarity(weight, weight[0][None]) > 0.9  # to another that never occurred
    assert alike.sum() > 100
    mean = weight[alike].mean(0)
    weight[student.load_chat().end_id] = mean + 0.05 * mean.norm() * F.normalize(torch.randn(len(mean)), dim=0)
    return model


# ---- the ceiling


@pytest.mark.parametrize("more", [{}, {"bias_V": torch.linspace(-1, 1, 9)}, {"scale": 0.5}, {"softcap": 3.0}])
def test_the_ceiling_is_the_best_of_all_hidden_states_of_that_length(more):
    torch.manual_seed(0)
    head = Head(weight_VD=torch.randn(9, 2), **more)
    angle = torch.linspace(0, 2 * math.pi, 20001)
    best_V = head.compute_logits(2.5 * torch.stack([angle.cos(), angle.sin()], 1)).softmax(1).amax(0).numpy()
    found_V = np.array([max_probability(head, token, 2.5) for token in range(9)])
    assert (found_V < 1.001 * best_V).all()
    assert (best_V > 0.5).sum() >= 2
    np.testing.assert_allclose(found_V[best_V > 0.2], best_V[best_V > 0.2], rtol=5e-3)


def test_tokens_of_one_row_share_their_probability():
    torch.manual_seed(0)
    weight = torch.randn(40, 16)
    weight[:8] = weight[0]
    assert max_probability(Head(weight_VD=weight), 3, 50.0) == pytest.approx(1 / 8, rel=1e-3)
    assert max_probability(Head(weight_VD=weight), 20, 50.0) > 0.99


@pytest.mark.parametrize("name", ["tiny", "tiny_b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_shipped_students_the_end_token_is_trained_and_another_is_not(name, dtype, make_student):
    student = make_student(path=f"shipped:{name}", lora=LORA)
    model = student.load_trainable(dtype)
    trained = inspect_end_token(model, pool_of(student.load_chat()), np.arange(12))
    assert trained["ceiling"] > ENOUGH and describe_problem(trained) is None
    other = make_student(path=f"shipped:{name}", lora=LORA, end_token=UNUSED)
    found = inspect_end_token(model, pool_of(other.load_chat()), np.arange(12))
    assert found["ceiling"] < 0.01 and found["eos_ceiling"] > ENOUGH
    assert 'model.end_token="<|im_end|>"' in str(describe_problem(found))


def test_surprisal_alone_would_not_tell(make_student):
    """An ordinary word is as unlikely at an end as a token that was never trained; its ceiling is another."""
    student = make_student(path="shipped:tiny", lora=LORA)
    model, chat = student.load_trainable(torch.float32), student.load_chat()
    row = chat.encode(sums(1))[0]
    with torch.no_grad():
        logits = get_head(model).compute_logits(
            compute_hidden_states(model.eval(), torch.tensor([row.input_ids]), None)
        )
    surprisal = -logits[-2].log_softmax(0)
    word, unused = (chat.tokenizer.convert_tokens_to_ids(token) for token in ("StartĠ", UNUSED))
    assert surprisal[word] > math.log(len(surprisal)) and surprisal[unused] > math.log(len(surprisal))
    assert max_probability(get_head(model), word, 17.0) > 0.99 > 0.01 > max_probability(get_head(model), unused, 17.0)


def test_a_student_whose_end_token_was_never_trained(make_student):
    torch.manual_seed(0)
    student = make_student(path="shipped:tiny", lora=LORA)
    found = inspect_end_token(untrained(student), pool_of(student.load_chat()), np.arange(12))
    text = str(describe_problem(found))
    assert found["ceiling"] < 0.1 and "<|im_end|>" in text
    assert "model.end_token" not in text  # the tokenizer's own end token is the same


# ---- the remedies


def trained_for(student, steps=25) -> tuple[float, float, Any]:
    """Mean probability of the end at true ends before and after training, and the student."""
    torch.manual_seed(0)
    model, rows = student.load_trainable(torch.float32), student.load_chat().encode(sums(16))
    ids_RL = torch.tensor([row.input_ids for row in rows])  # of one length
    start = rows[0].prompt_tokens
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def surprisal(ids_RL):
        logits_RLV = get_head(model).compute_logits(compute_hidden_states(model, ids_RL, None)).view(*ids_RL.shape, -1)
        return F.cross_entropy(logits_RLV[:, start - 1 : -1].transpose(1, 2), ids_RL[:, start:], reduction="none")

    def at_ends():
        with torch.no_grad():
            return float((-surprisal(ids_RL)[:, -1]).exp().mean())

    before = at_ends()
    for step in range(steps):
        optimizer.zero_grad()
        surprisal(ids_RL[step % 4 :: 4]).mean().backward()
        optimizer.step()
    return before, at_ends(), model


def test_no_training_passes_the_ceiling(make_student):
    student = make_student(path="shipped:tiny", lora=LORA, end_token=UNUSED)
    before, after, model = trained_for(student)
    found = inspect_end_token(model, pool_of(student.load_chat()), np.arange(12))
    assert before < 0.1 * after and after < 1.01 * found["ceiling"] < 0.01


@pytest.mark.parametrize(
    "remedy",
    [
        {"end_token": "<|im_end|>"},
        {"lora": LORA | {"trainable_token_indices": {"embed_tokens": [0]}}},
        {"lora": LORA | {"modules_to_save": ["lm_head"]}},
    ],
)
def test_each_remedy_lets_the_end_be_learned_and_survives_saving(remedy, make_student, tmp_path):
    student = make_student(**{"path": "shipped:tiny", "lora": LORA, "end_token": UNUSED} | remedy)
    _, after, model = trained_for(student)
    assert after > 0.9
    assert is_trainable(model, 0) == ("lora" in remedy)
    assert is_trainable(model, 5) == ("modules_to_save" in student.lora)
    assert describe_problem(inspect_end_token(model, pool_of(student.load_chat()), np.arange(12))) is None
    chat = student.load_chat()
    save_student(model.eval(), chat, tmp_path / "saved")
    ids = torch.tensor([chat.encode(sums(1))[0].input_ids])
    with torch.no_grad():
        loaded = student.load_trained(tmp_path / "saved", torch.float32).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_rows_that_training_does_not_reach(make_student):
    others = make_student(path="shipped:tiny", lora=LORA | {"trainable_token_indices": [5]})
    assert not is_trainable(others.load_trainable(torch.float32), 2)
    assert is_trainable(make_student(path="shipped:tiny").load_trainable(torch.float32), 2)


def test_what_the_warning_says_to_set_can_be_typed(make_student):
    student = make_student(path="shipped:tiny", lora=LORA, end_token=UNUSED)
    found = inspect_end_token(student.load_trainable(torch.float32), pool_of(student.load_chat()), np.arange(12))
    typed = re.findall(r"'[^']*model\.[^']*'", str(describe_problem(found)))
    assert len(typed) == 3
    settings = []
    configuration.register_resolvers()
    with initialize_config_dir(str(configuration.find_conf()), version_base="1.3"):
        for shell_word in typed:
            config = compose("config", ["model=qwen", *shlex.split(shell_word)])
            configuration.check_types(config)
            configuration.build(config.model)
            settings.append((config.model.end_token, dict(config.model.lora)))
    (end_token, _), (_, rows), (_, head) = settings
    assert end_token == "<|im_end|>"
    assert rows["trainable_token_indices"] == {"embed_tokens": [0]}  # the head's too: they share their weights
    assert head["modules_to_save"] == ["lm_head"]


def test_sampling_stops_at_the_end_token_and_at_the_templates_own(make_student):
    from lark.generation.backends import find_stop_ids

    assert find_stop_ids(make_student(path="shipped:tiny").load_chat()) == [2]
    assert find_stop_ids(make_student(path="shipped:tiny", end_token=UNUSED).load_chat()) == [0, 2]


# ---- before training


def checked(data, arm: str, check: EndTokenCheck, model, folder) -> dict[str, Any]:
    data.set_active_arm(arm)
    folder.mkdir()
    check.on_fit_start(None, SimpleNamespace(student_model=model, folder=folder))  # type: ignore[arg-type]
    return json.loads((folder / RECORD).read_text())


def test_it_warns_once_and_is_kept_for_every_arm(make_data, tmp_path, caplog):
    data = make_data(student={"path": "shipped:tiny", "lora": LORA, "end_token": UNUSED})
    data.prepare_data()
    data.setup("fit")
    model, check = data.student.load_trainable(torch.float32), EndTokenCheck(data)
    records = [checked(data, arm, check, model, tmp_path / arm) for arm in ("selector", "baseline")]
    assert sum(UNUSED in line for line in caplog.messages) == 1
    assert all(r["token"] == UNUSED and r["ceiling"] < 0.01 and r["without_end"] == 0 for r in records)
    assert all(module.training for module in model.modules())


def test_trajectories_that_are_cut_have_no_end(make_data, tmp_path, caplog):
    data = make_data(task={"max_length": 70, "overlong": "truncate"})
    data.prepare_data()
    data.setup("fit")
    pool = data.trajectories
    cut = sum(pool.read_tokens(np.array([row]))[0].end_of_turn == -1 for row in range(len(pool.length)))
    assert 0 < cut < len(pool.length)
    assert count_missing_ends(pool, np.arange(len(pool.length))) == cut
    model = data.student.load_trainable(torch.float32)
    record = checked(data, "selector", EndTokenCheck(data), model, tmp_path / "arm")
    assert record["head_trained"] and "ceiling" not in record, "every parameter is trained"
    assert any("have no end token to learn" in line for line in caplog.messages) == (record["without_end"] > 0)
