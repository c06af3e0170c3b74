import pytest
import torch

from lark.generation.backends import describe_backend, find_stop_ids, make_transformers_backend, make_vllm_backend


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
    return make_transformers_backend(student, student.load_chat(), **of_weights, batch_size=None)


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
    student = make_student()
    record = describe_backend(make_backend(make_student), student, student.load_chat(), torch.device("cpu"))
    assert record["model"].items() >= student.identity().items()
    assert record["engine"] == {"engine": "transformers", "dtype": "float32", "attention": "sdpa", "device": "cpu"}
    assert record["stops"] == ["<end>", "<|im_end|>"]
    assert record["versions"]["torch"] == torch.__version__


def test_weights_that_vllm_does_not_read_are_refused_at_once(make_student, tmp_path):
    student, chat = make_student(), make_student().load_chat()
    gguf = tmp_path / "student.gguf"
    gguf.touch()
    with pytest.raises(ValueError, match=r"evaluation\.engine=transformers"):
        make_vllm_backend(
            make_student(path=str(gguf)),
            chat,
            trained=None,
            weights=dict(student.identity()),
            device=torch.device("cpu"),
            python=None,
            tensor_parallel_size=None,
            gpu_memory_utilization=0.9,
        )
