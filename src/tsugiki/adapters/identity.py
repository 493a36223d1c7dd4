"""Who a model folder is by its tensors, whatever their names and shards.

Imports no transformers unless only a module tree knows an architecture's names; knows no A and
no B.
"""

from __future__ import annotations

from tsugiki.adapters.record import BaseIdentity
from tsugiki.models.families import FAMILIES, FamilyNames, is_tied
from tsugiki.models.fingerprint import fingerprint_stored
from tsugiki.models.shards import StoredModel


def identify(model: StoredModel, name: str, commit: str | None = None) -> BaseIdentity:
    """Fingerprint of a base, from its family's names or from its module tree."""
    if model.model_type in FAMILIES:
        found = fingerprint_stored(model.folder, FamilyNames(model.model_type, is_tied(model)))
    else:
        from tsugiki.models.fingerprint import fingerprint_folder
        from tsugiki.models.spec import ModelSpec

        found = fingerprint_folder(model.folder, ModelSpec.from_folder(model.folder).meta_model())
    dtype = model.setting("dtype") or model.setting("torch_dtype")
    return BaseIdentity(
        name, found.exact, found.rounded, commit, None if dtype is None else str(dtype)
    )
