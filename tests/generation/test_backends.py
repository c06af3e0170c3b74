import pytest
import torch

from lark.generation.backends import record_of, stop_ids, transformers_engine, vllm_engine


def test_what_ends_an_answer(make_student):
    chat = make_student().load_chat()
    ends = chat.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<end>"])
    assert stop_ids(chat) == sorted(ends)
    other = make_student(end_token="<end>").load_chat()
    assert stop_ids(other) == sorted(ends)  # the template's own end is still one
    assert other.end_id != chat.end_id


def engine(make_student, **changes):
    student = make_student(**changes)
    of_weights = {"trained": None, "weights": dict(student.identity()), "device": torch.device("cpu")}
    return transformers_engine(student, student.load_chat(), **of_weights, batch_size=None)


def test_identity_tells_what_samples_depend_on(make_student):
    plain = engine(make_student).identity
    assert engine(make_student).identity == plain
    others = ({"dtype": "bfloat16"}, {"attention": "eager"}, {"path": "shipped:tiny"})
    assert all(engine(make_student, **changes).identity != plain for changes in others)


def test_the_student_is_loaded_once_and_when_it_is_wanted(make_student, tmp_path, monkeypatch, capsys):
    asked = engine(make_student)
    loaded = []
    load = type(make_student()).load_model
    monkeypatch.setattr(type(make_student()), "load_model", lambda *args: loaded.append(1) or load(*args))
    settings = {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4, "seed": 0}
    for prompt in ([65, 66], [67]):
        batches = asked.generate([prompt], ["p"], tmp_path, **settings, stop_ids=asked.stop_ids)
        assert sum(map(len, batches)) == 2
    assert loaded == [1]
    assert len(asked.notes) == capsys.readouterr().out.count("samples at once") == 1  # said once, and kept


def test_the_record_says_who_answered(make_student):
    student = make_student()
    record = record_of(engine(make_student), student, student.load_chat(), torch.device("cpu"))
    assert record["model"].items() >= student.identity().items()
    assert record["engine"] == {"engine": "transformers", "dtype": "float32", "attention": "sdpa", "device": "cpu"}
    assert record["stops"] == ["<end>", "<|im_end|>"]
    assert record["versions"]["torch"] == torch.__version__


def test_weights_that_vllm_does_not_read_are_refused_at_once(make_student, tmp_path):
    student, chat = make_student(), make_student().load_chat()
    gguf = tmp_path / "student.gguf"
    gguf.touch()
    with pytest.raises(ValueError, match=r"evaluation\.engine=transformers"):
        vllm_engine(
            make_student(path=str(gguf)),
            chat,
            trained=None,
            weights=dict(student.identity()),
            device=torch.device("cpu"),
            python=None,
            tensor_parallel_size=None,
            gpu_memory_utilization=0.9,
        )
