"""What texts are embedded with: a PyTorch model or a bundle, behind one face.

`open_embedder` takes what a user names: a sentence-transformers folder, a checkpoint, a run, a bundle, a hub name.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from launch.config import Model
from launch.errors import UserError
from trainer.model import ROLES, Role, load_model, max_length_of, prompt_of, tokenizer_settings

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer


class Embedder(Protocol):
    """Texts -> vectors of unit length, a batch at a time."""

    artifact: str  # pytorch, onnx-fp32, ...
    width: int  # dims of a vector
    dims: list[int] | None  # what vectors may be cut to, None = any dim up to the width
    device: "torch.device"

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides a vector; vectors of two fingerprints do not mix."""
        ...

    def input_of(self, role: Role) -> dict[str, Any]:
        """What becomes of a text first: {"prompt", "max_length"}, the length in tokens, None = unlimited."""
        ...

    def lengths(self, texts: list[str], role: Role) -> np.ndarray:
        """Tokens of each text with prompt and special tokens, after truncation: int64 [n]."""
        ...

    def vectors(self, texts: list[str], role: Role) -> "torch.Tensor":
        """float32 [n, width] on `device`, each of length 1, padded to the longest text."""
        ...


class ModelEmbedder:
    """A SentenceTransformer with its own prompts and maximal lengths by role.

    Equal to `model.encode(texts, prompt=..., normalize_embeddings=True)` up to rounding.
    """

    artifact = "pytorch"

    def __init__(self, model: "SentenceTransformer") -> None:
        self.model = model
        self.width = model.get_embedding_dimension() or 0
        self.dims: list[int] | None = None
        self.device = model.device

    @property
    def fingerprint(self) -> str:
        """See Embedder; reads all weights."""
        return fingerprint(self.model)

    def input_of(self, role: Role) -> dict[str, Any]:
        """See Embedder."""
        return {"prompt": prompt_of(self.model, role) or "", "max_length": max_length_of(self.model, role)}

    def lengths(self, texts: list[str], role: Role) -> np.ndarray:
        """See Embedder."""
        features = self._features(texts, role)
        if "attention_mask" in features:
            return features["attention_mask"].sum(dim=1).cpu().numpy()
        if "cu_seq_lens_q" in features:  # flash attention: one flat row, no padding
            return features["cu_seq_lens_q"].diff().cpu().numpy()
        return np.array([len(text) for text in texts])  # static embeddings have no padding; characters order them

    def vectors(self, texts: list[str], role: Role) -> "torch.Tensor":
        """See Embedder."""
        import torch

        features = self._features(texts, role)
        features = {k: v.to(self.device) if hasattr(v, "to") else v for k, v in features.items()}
        with _evaluating(self.model):
            out = self.model(features, task=role)["sentence_embedding"]
        return torch.nn.functional.normalize(out.float(), dim=1)

    def _features(self, texts: list[str], role: Role) -> dict[str, Any]:
        arguments: dict[str, Any] = {"prompt": prompt_of(self.model, role), "task": role}
        if (length := max_length_of(self.model, role)) is not None:
            arguments["max_length"] = length
        return self.model.preprocess(texts, **arguments)


class BundleEmbedder:
    """An ONNX file of a bundle; prompts and lengths are the bundle's. On the CPU."""

    def __init__(self, folder: Path, precision: str = "fp32", threads: int | None = None) -> None:
        import torch

        from trainer.export.encoder import Encoder, read_manifest

        self.encoder = Encoder(folder, threads, precision)
        self._manifest = read_manifest(folder)
        self.artifact = f"onnx-{precision}"
        self.width = self.encoder.width
        self.dims: list[int] | None = self.encoder.dims
        self.device = torch.device("cpu")

    @property
    def fingerprint(self) -> str:
        """That of the model it was exported from."""
        return self._manifest["model_fingerprint"]

    def input_of(self, role: Role) -> dict[str, Any]:
        """See Embedder."""
        return {"prompt": self.encoder.prompts[role], "max_length": self.encoder.max_length[role]}

    def lengths(self, texts: list[str], role: Role) -> np.ndarray:
        """See Embedder."""
        return np.array([len(ids) for ids, _ in self.encoder.tokenize(texts, role)], dtype=np.int64)

    def vectors(self, texts: list[str], role: Role) -> "torch.Tensor":
        """See Embedder."""
        import torch

        return torch.from_numpy(self.encoder.encode(texts, kind=role, batch_tokens=1 << 62))


def open_embedder(name: str, device: str, precision: str | None = None) -> Embedder:
    """The model that `name` names: folder of a model, checkpoint, run or bundle, hub name, package:PACKAGE/FOLDER.

    `precision` chooses the ONNX file of a bundle, None = fp32. Raises UserError if there is no such model, and
    CheckFailed if a bundle is damaged.
    """
    folder = Path(name)
    if (folder / "run.json").is_file():
        folder = folder / "model"
        if not folder.is_dir():
            raise UserError(f"{name}: the run has no model/ yet; finish it, or name one of its checkpoints")
    if (folder / "manifest.json").is_file() and (folder / "onnx").is_dir():
        return BundleEmbedder(folder, precision or "fp32")
    if precision is not None:
        raise UserError(f"--precision: got {precision} with {name}; allowed with a bundle only, a model runs in fp32")
    return ModelEmbedder(load_model(Model(path=str(folder) if folder.exists() else name), device))


def fingerprint(model: "SentenceTransformer") -> str:
    """sha256 over weights, tokenizer, truncation side, modules, prompts and maximal lengths: whatever decides a vector.

    Weights count by name, shape and bytes in fp32, so saving a model again does not change it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    digest.update(json.dumps(tokenizer_settings(model)).encode())  # lengths are below, padding changes no vector
    facts = {role: (prompt_of(model, role), max_length_of(model, role)) for role in ROLES}
    side = getattr(model.tokenizer, "truncation_side", None)
    digest.update(
        json.dumps([facts, side, [_module(module) for module in model]], sort_keys=True, default=str).encode()
    )
    return digest.hexdigest()


def _module(module: Any) -> tuple[str, Any]:
    """Class and settings of a step of the pipeline, without what differs after saving and changes no vector."""
    if hasattr(module, "auto_model"):
        settings = module.auto_model.config.to_dict()
        volatile = ("_", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
        settings = {k: v for k, v in settings.items() if not k.startswith(volatile) and "dropout" not in k}
    else:
        settings = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
    return type(module).__name__, settings


@contextmanager
def _evaluating(model: "SentenceTransformer") -> Iterator[None]:
    """Without gradients and dropout; each module's own training flag comes back, whatever happens."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
