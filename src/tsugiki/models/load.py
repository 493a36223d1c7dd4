"""A base model from a folder: checked, loaded, frozen, and tried flat.

Knows how to refuse: pickled weights, code of its own, missing or hostile tensor files, a missing
tokenizer. The Hub is `models/hub.py`'s; adapters and training are unknown here.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tsugiki.errors import ModelError
from tsugiki.files import human_bytes
from tsugiki.kernels.backend import describe
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.fingerprint import Fingerprint, fingerprint_folder
from tsugiki.models.flat import flat_forward, solo_forward, use_flat_attention, use_own_attention
from tsugiki.models.hub import ResolvedModel, has_tokenizer, refuse_no_tokenizer, resolve_model
from tsugiki.models.int8 import Int8Products
from tsugiki.models.isolation import probe_isolation, refuse_encoder
from tsugiki.models.quantized import quantize_modules
from tsugiki.models.quantized_load import load_quantized, notes_on_base
from tsugiki.models.quantized_store import Origin, is_quantized_folder, load_stored, read_origin
from tsugiki.models.shards import stops_in, whole_shards
from tsugiki.models.spec import ModelSpec, NameMap, load_config, refuse_code
from tsugiki.models.tune import Tuned, tune
from tsugiki.models.unused import notes_on_unused

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)


@dataclass
class Base:
    """A loaded base: frozen weights, its tokenizer, and where it came from.

    flat: documents may lie end to end; else each runs alone with the model's own attention.
    tuned: which modules were replaced by proven faster ones (`make_fast`).
    int8: the products of its frozen projections in int8, where they are in use (`use_int8`).
    quantize: how its projections are kept: none (as they are), nf4 or int8.
    origin: the 16-bit base, where quantised weights were read from a folder of their own.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec
    folder: Path
    name: str
    commit: str | None
    flat: bool
    notes: list[str] = field(default_factory=list)
    tuned: Tuned | None = None
    int8: Int8Products | None = None
    quantize: str = "none"
    origin: Origin | None = None

    @property
    def device(self) -> torch.device:
        """Where its parameters are; where they run, if each comes only then (proof/streamed.py)."""
        device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, as the base's own files say; a chat format has its own."""
        config = getattr(self.model, "config", None)
        return tuple(stops_in(self.folder, getattr(config, "eos_token_id", None)))

    def fingerprint(self) -> Fingerprint:
        """Identity of the stored tensors, of the 16-bit base where they are quantised."""
        if self.origin is not None:
            return self.origin.fingerprint
        return fingerprint_folder(self.folder, self.spec.meta_model())

    def names(self) -> NameMap:
        """How its parameters are named in its files; only headers are read."""
        if self.origin is not None:
            return NameMap(self.spec.meta_model(), self.origin.stored)
        stored = [t.name for shard in whole_shards(self.folder) for t in shard.tensors]
        return NameMap(self.spec.meta_model(), stored)

    def make_fast(self) -> str:
        """Replace modules by proven faster ones, adapters being attached; what was done."""
        if self.tuned is None:
            self.tuned = tune(self.model) if self.flat else Tuned()
        if self.device.type != "cuda":
            return self.tuned.note
        table = self.model.get_input_embeddings()  # type: ignore[operator]
        kernels, why = describe(self.device, table.weight.dtype)
        return f"{self.tuned.note}; kernels: {kernels}{why and f' ({why})'}"

    def use_int8(self) -> str:
        """Multiply in int8 while gradients are recorded, after `make_fast`; what was done."""
        assert self.tuned is not None
        self.int8 = Int8Products(self.model, self.tuned)
        count, size = len(self.int8.weights), self.int8.nbytes
        return f"int8 products: {count} frozen projections, {human_bytes(size)} of codes"

    def forward(self, ids: Tensor, batch: ForwardBatch, logits_at: Tensor | None = None) -> Tensor:
        """Logits (1, n, V) of sequences laid end to end; flat where the model allows it."""
        if self.flat:
            return flat_forward(self.model, ids, batch, logits_at=logits_at)
        return solo_forward(self.model, ids, batch.lengths, logits_at=logits_at)


def load_tokenizer(
    resolved: ResolvedModel, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights.

    Raises:
        ModelError: none there, or not readable.
    """
    folder = resolved.folder
    refuse_no_tokenizer(folder)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and not trust_remote_code:
        try:
            raw = json.loads(settings.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{settings} cannot be read: {error}") from None
        refuse_code(raw, f"the tokenizer in {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizers and transformers raise many types for a bad file
        raise ModelError(
            f"the tokenizer in {folder} cannot be read",
            got=str(error).strip()[:300],
            fix="copy the tokenizer files of the original model again",
        ) from None
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def tokenizer_of(adapter: Path, base: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer beside an adapter, whose template it was trained with, if one came along that
    is as long as its base's; else the base's."""
    if has_tokenizer(adapter):
        own = load_tokenizer(ResolvedModel(adapter, str(adapter)))
        if len(own) == len(base) and own.chat_template:
            return own
    return base


def load_base(
    resolved: ResolvedModel,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    trust_remote_code: bool = False,
    random_init: bool = False,
    quantize: str = "none",
) -> Base:
    """Load, freeze, and find out whether documents may lie end to end.

    Args:
        resolved: from `resolve_model`.
        dtype: type the weights are held and computed in.
        random_init: the same shapes with fresh weights from torch's generator (a control).
        quantize: nf4 or int8: projections in few bits, quantised while they are read.

    Raises:
        ModelError: anything that keeps the folder from being this model; files and tensors named.
    """
    folder = resolved.folder
    config = load_config(folder, trust_remote_code=trust_remote_code)
    spec = ModelSpec.from_config(config)
    refuse_quantized(config, folder)
    origin = origin_of(folder, quantize)
    tokenizer = load_tokenizer(resolved, trust_remote_code=trust_remote_code)
    isolation = probe_isolation(config)
    refuse_encoder(isolation, config, folder)
    notes: list[str] = []
    if random_init:
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        ).to(device)
        if quantize != "none":
            quantize_modules(model, quantize)
    elif origin is not None:
        model = load_stored(folder, config, dtype=dtype, device=device)
        names = NameMap(spec.meta_model(), origin.stored)
        notes = notes_on_base(spec.meta_model(), origin.method, names, origin.stored)
    elif quantize != "none":
        model, notes = load_quantized(
            folder, config, quantize,
            dtype=dtype, device=device, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    else:
        whole_shards(folder)
        model, notes = _load(folder, dtype, device, trust_remote_code)
    _load_generation_config(model, folder)
    model.eval()
    model.requires_grad_(False)
    if isolation.holds:
        use_flat_attention(model)
    else:
        use_own_attention(model)
        notes.append(f"one document at a time for this base: {isolation.reason}")
    base = Base(
        model, tokenizer, spec, folder, resolved.name, resolved.commit, isolation.holds, notes,
        quantize=quantize, origin=origin,
    )  # fmt: skip
    if origin is not None:  # it is the 16-bit base that an adapter belongs to
        base.name, base.commit, base.quantize = origin.name, origin.commit, origin.method
    return base


def origin_of(folder: Path, quantize: str | None) -> Origin | None:
    """Who the base of a quantised folder is; None for any other folder.

    Raises:
        ModelError: it is quantised otherwise than asked for.
    """
    if not is_quantized_folder(folder):
        return None
    origin = read_origin(folder)
    if quantize not in (None, "none", origin.method):
        raise ModelError(
            f"{folder} is quantised already",
            got=f"{origin.method}, asked for {quantize}",
            fix=f"leave --quantize out, or --model {origin.name}",
        )
    return origin


def refuse_quantized(config: PretrainedConfig, folder: Path) -> None:
    """Raises ModelError: somebody else's few-bit weights, which are neither trained on nor merged
    into here."""
    text = config.get_text_config()
    found = getattr(config, "quantization_config", None) or getattr(
        text, "quantization_config", None
    )
    if found:
        how = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise ModelError(
            f"{folder} is quantised already",
            got=f"quantization_config of {getattr(how, 'value', how) or 'an unknown method'}",
            allowed="the 16- or 32-bit weights of the model",
            fix="--model with the unquantised model; --quantize nf4 makes it small while it loads",
        )


def _load(
    folder: Path, dtype: torch.dtype, device: str, trust_remote_code: bool
) -> tuple[nn.Module, list[str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with the tensors named
            )
    except Exception as error:  # transformers raises many types for a bad folder
        raise ModelError(
            f"the weights in {folder} cannot be loaded",
            got=str(error).strip()[:400],
            fix="copy or download the model again",
        ) from None
    assert isinstance(model, nn.Module)
    missing = sorted(info.get("missing_keys") or [])
    mismatched = sorted(str(m[0]) for m in info.get("mismatched_keys") or [])
    if missing or mismatched:
        raise ModelError(
            f"{folder} does not hold every tensor of its config",
            got="; ".join(
                f"{what}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
                for what, names in (("missing", missing), ("other shape", mismatched))
                if names
            ),
            fix="download the model again, or check its config.json",
        )
    return model.to(device), notes_on_unused([str(n) for n in info.get("unexpected_keys") or ()])


def refuse_unknown(
    ids: Sequence[int], rows: int, tokenizer: PreTrainedTokenizerBase, place: str
) -> None:
    """Raises ModelError: a token beyond an embedding of so many rows."""
    wrong = next((i for i in ids if i >= rows), None)
    if wrong is None:
        return
    token = tokenizer.convert_ids_to_tokens(wrong)
    raise ModelError(
        f"the tokenizer's token {token!r} has no row in this model's embedding ({rows:,} rows)",
        got=f"id {wrong:,} in {place}; the tokenizer knows {len(tokenizer):,} tokens",
        fix="put the tokenizer that belongs to this model into its folder, or resize the "
        f"embedding with transformers (model.resize_token_embeddings({len(tokenizer)})) "
        "and save the model",
    )


def _load_generation_config(model: nn.Module, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError):
            return  # only stop tokens are read from it, and the chat format has its own


__all__ = [
    "Base",
    "ResolvedModel",
    "load_base",
    "load_tokenizer",
    "resolve_model",
]
