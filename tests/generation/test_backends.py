from pathlib import Path

import pytest
import torch

from lark.generation.backends import TransformersBackend, VllmBackend, find_stop_ids


def test_what_ends_an_answer(make_student):
    chat = make_student().load_chat()
    ends = chat.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<end>"])
    assert find_stop_ids(chat) == sorted(ends)
    other = make_student(end_token="<end>").load_chat()
    assert find_stop_ids(other) == sorted(ends)  # the template's own end is still one
    assert other.end_id != chat.end_id


def make_backend(make_student, **changes):
    student = make_student(**changes)
    of_weights = {"trained": None, "weights": dict(student.identity()), "device": torch.device("cpu")}
    return TransformersBackend(student, student.load_chat(), **of_weights, batch_size=None)


def test_identity_tells_what_samples_depend_on(make_student):
    plain = make_backend(make_student).identity
    assert make_backend(make_student).identity == plain
    others = ({"dtype": "bfloat16"}, {"attention": "eager"}, {"path": "shipped:tiny"})
    assert all(make_backend(make_student, **changes).identity != plain for changes in others)


def test_the_student_is_loaded_once_and_when_it_is_wanted(make_student, tmp_path, monkeypatch):
    asked = make_backend(make_student)
    loaded = []
    load = type(make_student()).load_model
    monkeypatch.setattr(type(make_student()), "load_model", lambda *args: loaded.append(1) or load(*args))
    settings = {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4, "seed": 0}
    for prompt in ([65, 66], [67]):
        batches = asked.generate([prompt], ["p"], tmp_path, **settings, stop_ids=asked.stop_ids)
        assert sum(map(len, batches)) == 2
    assert loaded == [1]


def test_the_record_says_who_answered(make_student):
    backend = make_backend(make_student)
    assert backend.identity["weights"] == dict(make_student().identity())
    record = backend.describe()
    assert record["stops"] == ["<end>", "<|im_end|>"]
    assert torch.__version__.startswith(record["packages"]["torch"])


def make_vllm(student, gpus=None):
    own = {"trained": None, "weights": dict(student.identity()), "device": torch.device("cuda", 4)}
    return VllmBackend(student, student.load_chat(), **own, python=None, gpus=gpus, memory=0.9)


@pytest.mark.parametrize(
    ("world", "gpus", "devices", "size"),
    [(1, None, None, None), (1, 2, None, 2), (8, None, [4], 1), (8, 2, [4, 5], 2)],
)
def test_each_rank_gives_vllm_its_own_gpus(make_student, monkeypatch, world, gpus, devices, size):
    given = {}
    monkeypatch.setattr("lark.generation.backends.world_size", lambda: world)
    monkeypatch.setattr(
        "lark.generation.vllm_backend.generate_with_vllm", lambda *_, **settings: given.update(settings)
    )
    backend = make_vllm(make_student(dtype="float32"), gpus)
    backend.generate([[1]], ["p"], Path())
    assert (given["devices"] and list(given["devices"]), given["tensor_parallel_size"]) == (devices, size)
    assert backend.ranks == (1 if world == 1 else gpus or 1)
