"""The student: where its weights and tokenizer come from, LoRA, how it is saved."""

import copy
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from lark.common.cache import file_hash, read_json, write_json
from lark.common.errors import LarkError
from lark.common.hub import describe_refusal
from lark.student.chat import Chat, load_template
from lark.student.model_parts import compute_hidden_states, get_base_model, get_head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHIPPED = "shipped:"
LOADING_ERRORS = (OSError, ValueError, ImportError, SafetensorError)
"""What transformers raises for files that are missing, of no known kind, broken, or in want of another package."""
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "config.json")


@dataclass(frozen=True, kw_only=True)
class Student:
    """Settings and loading of a causal language model to score with and to train."""

    name: str
    """What runs are filed under."""
    id: str | None = None
    """On the Hugging Face hub, with `revision`; used when `path` is null."""
    revision: str | None = None
    path: str | None = None
    """A folder with safetensors and a tokenizer, a .gguf file, or `shipped:<name>` for an embedded student."""
    dtype: str = "auto"
    """auto | float32 | bfloat16 | float16. auto is float32 on a CPU and bfloat16 on an accelerator."""
    attention: str = "sdpa"
    """The transformers attention implementation. sdpa shares prompts and packs rows; others take one row at a time."""
    template: str = "chatml"
    """chatml | llama3 | own | a Jinja file."""
    end_token: str | None = None
    """The special token that ends the student's turns; null = the template's own. Typed into a shell as
    'model.end_token="<|endoftext|>"': the single quotes are for the shell, the double ones for Hydra.
    """
    lora: dict[str, Any] | None = None
    """peft.LoraConfig's arguments; null trains every parameter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    trust_remote_code: bool = False
    """Run code that comes with the weights; never on unless set."""
    adapter: str | tuple[str, ...] | None = None
    """A folder with a peft adapter (such as an arm's checkpoint), or several, which are merged into the weights in
    their order. What is trained starts from there.
    """
    date: str | None = None
    """What stands for today in templates that print the date (strftime_now), such as '2026-01-31'."""
    config: dict[str, Any] | None = None
    """Entries of the student's config.json that are changed, such as {max_position_embeddings: 32768}."""

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", *DTYPES):
            raise LarkError(f"model.dtype={self.dtype!r} is unknown; set it to auto, {', '.join(DTYPES)}")
        if self.lora is not None:
            self.lora_config()
        if self.path is None and self.id is None:
            raise LarkError("model.path and model.id are both null; set model.path to a folder or a .gguf file")
        if self.path is not None and not self.path.startswith(SHIPPED) and not Path(self.path).exists():
            raise LarkError(f"model.path={self.path} does not exist; set it to a folder with weights or a .gguf file")
        for folder in self.adapters:
            if not (Path(folder) / "adapter_config.json").is_file():
                raise LarkError(
                    f"model.adapter={folder} holds no adapter_config.json; set it to a folder with a peft adapter, "
                    "such as the checkpoint of an arm that was trained with LoRA"
                )

    def lora_config(self) -> Any:
        """Build peft's LoraConfig. Raises LarkError for a setting it does not have or cannot use."""
        from peft import LoraConfig

        try:
            config = LoraConfig(task_type="CAUSAL_LM", **(self.lora or {}))
        except (TypeError, ValueError) as error:
            raise LarkError(f"model.lora={self.lora} is not usable ({error}); set r, lora_alpha, ...") from error
        if isinstance(config.r, bool) or not isinstance(config.r, int) or config.r < 1:
            raise LarkError(f"model.lora.r={config.r} is not a rank; set it to a whole number from 1 on")
        return config

    @property
    def adapters(self) -> tuple[str, ...]:
        """List the folders of the adapters that are merged into the weights."""
        return (self.adapter,) if isinstance(self.adapter, str) else tuple(self.adapter or ())

    @property
    def folder(self) -> Path | None:
        """Find the folder of local weights; None when they come from the hub."""
        if self.path is None:
            return None
        if self.path.startswith(SHIPPED):
            return Path(str(resources.files("lark") / "student/shipped" / self.path.removeprefix(SHIPPED)))
        return Path(self.path).parent if self._is_gguf else Path(self.path)

    @property
    def _is_gguf(self) -> bool:
        return self.path is not None and self.path.endswith(".gguf")

    def pretrained_arguments(self) -> tuple[str, dict[str, Any]]:
        """Return from_pretrained's first argument and keywords."""
        common: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.folder is None:
            return str(self.id), common | {"revision": self.revision}
        if self._is_gguf:
            common["gguf_file"] = Path(str(self.path)).name
        return str(self.folder), common

    def identity(self) -> dict[str, str | None]:
        """Identify the weights: hub id and revision, or a hash of the local files; likewise merged adapters."""
        found: dict[str, str | None]
        found = {"id": self.id, "revision": self._commit} if self.folder is None else {"weights": self._weights_hash}
        if self.adapters:
            found["adapter"] = self._adapter_hash
        if self.config:
            found["config"] = json.dumps(self.config, sort_keys=True)
        return found

    @cached_property  # 135M parameters hash in a fraction of a second; once a process is enough
    def _weights_hash(self) -> str:
        assert self.folder is not None
        if self._is_gguf:
            return _hash_files([Path(str(self.path))])
        patterns = (*_WEIGHTS, "*.py") if self.trust_remote_code else _WEIGHTS  # code from the folder computes too
        return _hash_files(sorted({f for pattern in patterns for f in self.folder.glob(pattern)}))

    @cached_property
    def _adapter_hash(self) -> str:
        return _hash_files([f for folder in self.adapters for f in sorted(Path(folder).glob("adapter_*"))])

    @cached_property
    def _commit(self) -> str:
        """Look up the commit that `revision` stands for now: a branch moves, and caches must notice."""
        try:
            path = cached_file(str(self.id), "config.json", revision=self.revision)
        except OSError as error:
            raise self._unavailable(error) from error
        return Path(str(path)).parent.name  # .../snapshots/<commit>/config.json

    def resolve_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype that the setting means on `device`."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return torch.float32 if device.type == "cpu" else torch.bfloat16

    def load_config(self) -> Any:
        """Load the student's config.json with `config`'s changes; no weights. Raises LarkError where there is none."""
        source, keywords = self.pretrained_arguments()
        try:
            return AutoConfig.from_pretrained(source, **keywords, **(self.config or {}))
        except LOADING_ERRORS as error:
            raise self._unavailable(error) from error

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer. Raises LarkError where there is none."""
        source, keywords = self.pretrained_arguments()
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **keywords)
        except LOADING_ERRORS as error:
            raise self._unavailable(error) from error
        if not tokenizer("0", add_special_tokens=False)["input_ids"]:  # what transformers makes of a missing file
            raise self._unavailable("its tokenizer has no vocabulary")
        return tokenizer

    def load_chat(self, *, span: str = "content", step_splitter: str = "sentences") -> Chat:
        """Load how rows become tokens: tokenizer, template, end token."""
        tokenizer = self.load_tokenizer()
        template = load_template(self.template, tokenizer, self.date)
        chat = Chat(tokenizer=tokenizer, template=template, span=span, step_splitter=step_splitter)
        return chat if self.end_token is None else chat.replace_end_token(self.end_token)

    def load_model(self, dtype: torch.dtype, *, merge: bool = True) -> PreTrainedModel:
        """Load the pre-trained weights, on the CPU and in eval mode. Raises LarkError if they or their head are no use.

        merge: whether the last adapter goes into the weights, or stays beside them: in bfloat16, weights swallow what
        is small against them.
        """
        source, keywords = self.pretrained_arguments()
        # Weights a user downloaded are never unpickled; GGUF has its own reader.
        keywords |= {"attn_implementation": self.attention, "use_safetensors": None if self._is_gguf else True}
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **keywords, **(self.config or {}))
        except LOADING_ERRORS as error:
            raise self._unavailable(error) from error
        except TypeError as error:
            if not self.config:
                raise
            raise LarkError(
                f"model.config={self.config} cannot be used ({error}); take out what the student's config.json lacks"
            ) from error
        for parameter in model.parameters():  # a dequantised GGUF file arrives in its own dtype
            parameter.data = parameter.data.to(dtype)  # not model.to(dtype): that would round RoPE's frequencies too
        for folder in self.adapters:
            model = self._add_adapter(model, folder, merge=merge or folder != self.adapters[-1])
        self._check_head(model)
        return model

    def _add_adapter(self, model: Any, folder: str, *, merge: bool) -> Any:
        """Put the adapter in `folder` into the model's weights, which keep their dtype, or into its layers."""
        from peft import PeftModel

        try:
            adapted: Any = PeftModel.from_pretrained(model, folder)
            return (adapted.merge_and_unload() if merge else adapted.get_base_model()).eval()
        except (*LOADING_ERRORS, RuntimeError, TypeError) as error:  # of another format, or for another model
            raise LarkError(
                f"model.adapter={folder} is not an adapter that peft can merge into model={self.name} "
                f"({_first_line(error)}); set it to one that was trained on these weights"
            ) from error

    def _check_head(self, model: Any) -> None:
        """Check that hidden states and head, which statistics and training use apart, give the model's own logits."""
        tokens_RL = torch.arange(4)[None]
        is_on_gpus_only = self.attention.startswith("flash")  # and the model is not there yet
        if is_on_gpus_only:
            model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            expected = model(input_ids=tokens_RL, use_cache=False).logits[0].float()
            difference = (
                (get_head(model).compute_logits(compute_hidden_states(model, tokens_RL, None)) - expected)
                .abs()
                .max()
                .item()
            )
        if is_on_gpus_only:
            model.set_attn_implementation(self.attention)
        if not difference <= 0.02 * max(1.0, expected.abs().max().item()):
            raise LarkError(
                f"model={self.name}: {model.config.model_type} does more to its logits than this package reproduces "
                f"(they differ by {difference:.3g}); set model to one of another architecture"
            )

    def load_trainable(self, dtype: torch.dtype) -> torch.nn.Module:
        """Load the model to train, in train mode: LoRA on top of frozen weights, or every parameter.

        from_pretrained returns eval mode, in which dropout is off and gradient checkpointing silently does nothing.
        """
        model: Any = self.load_model(dtype)
        if self.lora is not None:
            from peft import get_peft_model

            self._check_trained_rows(model)
            model = get_peft_model(model, self.lora_config())
            # The head's weight alone is what we multiply by.
            if hasattr(get_base_model(model).get_output_embeddings(), "lora_A"):
                raise LarkError(
                    f"model.lora.target_modules={self.lora.get('target_modules')} puts LoRA on the head, where it "
                    "would not be trained; take the head out, or name it in +model.lora.modules_to_save=[lm_head]"
                )
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        return model

    def _check_trained_rows(self, model: Any) -> None:
        """Check that of a head that shares the embeddings' weights no rows are trained apart: merging corrupts both."""
        rows = (self.lora or {}).get("trainable_token_indices")
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        name = {part: name.split(".")[-1] for name, part in model.named_modules() if part in (head, embeddings)}
        alone = isinstance(rows, dict) and name[head] in rows and name[embeddings] not in rows
        if alone and head.weight is embeddings.weight:
            raise LarkError(
                f"model.lora.trainable_token_indices={rows} trains rows that the head of model={self.name} shares with "
                f"the embeddings, and could not be merged; write {name[embeddings]} in place of {name[head]}"
            )

    def load_trained(self, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
        """Load the student as `save_student` left it in `folder`."""
        if self.lora is None:
            return AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=self.attention,
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
            )
        from peft import PeftModel

        model = PeftModel.from_pretrained(self.load_model(dtype), str(folder))
        get_base_model(model).generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def describe_base(self) -> dict[str, str | None]:
        """Name the weights an adapter is for as adapter_config.json does."""
        if self.folder is None:
            return {"base_model_name_or_path": self.id, "revision": self._commit}
        place = Path(str(self.path)) if self._is_gguf else self.folder
        return {"base_model_name_or_path": str(place.absolute())}

    def _unavailable(self, reason: object) -> LarkError:
        if self.folder is not None:
            return LarkError(
                f"model.path={self.path} holds no student that transformers can load ({_first_line(reason)}); set it "
                "to a folder with config.json, *.safetensors and tokenizer.json, or to a .gguf file"
            )
        refusal = isinstance(reason, BaseException) and describe_refusal(
            reason, str(self.id), self.revision, kind="model"
        )
        if refusal:
            return LarkError(f"model.id={self.id} {refusal}, or set model.path=<a folder or .gguf file>")
        return LarkError(
            f"model={self.name}: {self.id} could be loaded neither from the local Hugging Face cache nor from the hub "
            f"({_first_line(reason)}); set model.path=<a folder or .gguf file>, or connect to the hub once (and log "
            "in if the model is gated)"
        )


def _hash_files(files: list[Path]) -> str:
    return "-".join(file_hash(file)[:16] for file in files)


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0].rstrip(":. ")


def save_student(
    model: Any, chat: Chat, folder: Path, *, student: Student | None = None, state: dict[str, Any] | None = None
) -> None:
    """Write a save_pretrained folder (the adapter alone under LoRA) with tokenizer, template and a generation config
    that ends an answer where the template ends a turn; complete or absent.

    student: whose adapter it is; adapter_config.json then names the base so that a reader can load it: the hub's id
    and commit, a folder or a .gguf file. state: the state dict of a model that is divided over ranks.
    """
    base: Any = get_base_model(model)
    if getattr(base.config, "quantization_config", None) is not None:
        delattr(base.config, "quantization_config")  # a dequantised GGUF student is an ordinary one from here on
        base.hf_quantizer = None  # transformers would refuse to save it
    base.generation_config = _generation_config(base, chat)
    is_adapter = base is not model
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    # Embeddings are never resized; left to itself, peft asks the hub whether they were.
    options: dict[str, Any] = {"save_embedding_layers": False} if is_adapter else {}
    if state is not None:
        options["state_dict"] = state
    model.save_pretrained(temporary, safe_serialization=True, **options)
    base.generation_config.save_pretrained(temporary)
    if is_adapter and student is not None:
        settings = read_json(temporary / "adapter_config.json")
        write_json(temporary / "adapter_config.json", settings | student.describe_base())
    tokenizer = copy.copy(chat.tokenizer)
    tokenizer.chat_template = chat.template
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def _generation_config(base: Any, chat: Chat) -> GenerationConfig:
    """Extend the base's own: an answer also ends at the template's end of turn and at the tokenizer's end token."""
    config = copy.deepcopy(base.generation_config) or GenerationConfig()
    ends = [chat.end_id]
    for known in (config.eos_token_id, chat.tokenizer.eos_token_id):
        ends += [known] if isinstance(known, int) else list(known or [])
    ends = list(dict.fromkeys(ends))
    config.eos_token_id = ends if len(ends) > 1 else ends[0]
    try:
        config.validate(strict=True)
    except ValueError:  # temperature without do_sample, say: it acts on nothing, and transformers would not save it
        tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = GenerationConfig(**tokens)
    return config
