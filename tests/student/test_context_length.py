import math

import pytest
import torch
from tiny_student import SHAPE
from transformers import Qwen2Config, Qwen2ForCausalLM

from lark.student.context_length import check_answer_room, read_max_positions
from lark.student.student import Student


@pytest.fixture
def folder(tmp_path):
    config = Qwen2Config(vocab_size=64, max_position_embeddings=128, **SHAPE)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    return str(tmp_path / "qwen")


STRETCHED = {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 300000.0}}


def test_positions_are_those_of_the_config_as_changed(folder):
    assert read_max_positions(Student(name="qwen", path=folder)) == 128
    assert read_max_positions(Student(name="qwen", path=folder, config=STRETCHED)) == 512
    assert read_max_positions(Student(name="qwen", path="shipped:tiny")) == 1024


def test_nothing_to_read_is_left_for_loading_to_report(tmp_path):
    assert read_max_positions(Student(name="qwen", path=str(tmp_path))) == math.inf


def test_a_changed_config_acts_and_is_part_of_what_the_student_is(folder):
    plain, stretched = Student(name="qwen", path=folder), Student(name="qwen", path=folder, config=STRETCHED)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        logits = [student.load_model(torch.float32)(input_ids=ids).logits for student in (plain, stretched)]
    assert not torch.equal(*logits)
    assert plain.identity() != stretched.identity()


def test_an_entry_that_the_config_lacks_is_named(folder):
    student = Student(name="qwen", path=folder, config={"max_positions": 512})
    with pytest.raises(ValueError, match=r"model\.config=.*max_positions"):
        student.load_model(torch.float32)


def test_answers_that_leave_a_prompt_no_room_are_refused(folder):
    check_answer_room(Student(name="qwen", path=folder), 127)
    with pytest.raises(ValueError, match=r"task\.max_new_tokens=128 .* 128 positions"):
        check_answer_room(Student(name="qwen", path=folder), 128)
