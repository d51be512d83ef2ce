"""Pickles of a checkpoint are looked at before torch or DeepSpeed loads them: one from outside could run any code.

The Trainer reads optimizer.pt, scheduler.pt and random states with weights_only. torch.distributed.checkpoint (FSDP2)
reads `.metadata` and some items of .distcp files without, DeepSpeed its *_states.pt.
"""

import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from launch.errors import UserError

_DCP, _DEEPSPEED = "torch.distributed.checkpoint", "deepspeed.runtime"
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_METADATA = ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta")
# What checkpoints of every engine, with and without adapters, in fp32, bf16 and fp16, were seen to name. None of these
# does more than make a value.
ALLOWED = {
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "torch.Size",
    "torch.Tensor",
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.serialization._get_layout",
    *(f"torch.{name}" for name in _DTYPES),
    *(f"torch.{name}Storage" for name in _STORAGES),
    *(f"{_DCP}.metadata.{name}" for name in _METADATA),
    f"{_DCP}.metadata.TensorProperties",
    f"{_DCP}.metadata.TensorStorageMetadata",
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem._StorageInfo",
    f"{_DEEPSPEED}.fp16.loss_scaler.DynamicLossScaler",
    f"{_DEEPSPEED}.fp16.loss_scaler.LossScaler",
    f"{_DEEPSPEED}.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def refuse_foreign_pickles(checkpoint: Path) -> None:
    """Raise UserError where a file that is loaded as a pickle names something else than ALLOWED; executes nothing."""
    for path in sorted(checkpoint.rglob("*")):
        if path.name == ".metadata":
            _look_at_distributed(path)
        elif path.name.endswith("_states.pt"):
            with path.open("rb") as file:
                _look_at_zip(file, path)


def _look_at_distributed(path: Path) -> None:
    content = path.read_bytes()
    _look_at(io.BytesIO(content), path)
    metadata: Metadata = pickle.loads(content)
    if {type(metadata.storage_data), type(metadata.state_dict_metadata)} != {dict}:  # another could hide its items
        raise UserError(f"{path}: its tables are no plain dicts; {_NEXT}")
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):  # tensors are read weights_only
            with (path.parent / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                _look_at_zip(io.BytesIO(file.read(place.length)), path.parent / place.relative_path)


def _look_at_zip(file: BinaryIO, path: Path) -> None:
    """What torch.save writes. Raises UserError for what torch.load reads too: old formats and TorchScript."""
    try:
        reader: Any = torch._C.PyTorchFileReader(file)  # as torch.load opens it
        names = reader.get_all_records()
    except RuntimeError:
        names = []
    if "data.pkl" not in names or "constants.pkl" in names:
        raise UserError(f"{path}: got another format, allowed: what torch.save writes; {_NEXT}")
    _look_at(io.BytesIO(reader.get_record("data.pkl")), path)


_NEXT = "do not load this checkpoint; who could write there could run code here"


class _Inert(dict[Any, Any]):
    """In the place of everything that a pickle makes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> "_Inert":
        return _Inert()

    def __setstate__(self, _: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """As lists have it."""

    def extend(self, _: Any) -> None:
        """As lists have it."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def _look_at(stream: BinaryIO, path: Path) -> None:
    class Look(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" not in ALLOWED:
                allowed = f"allowed: the {len(ALLOWED)} names that checkpoints have"
                raise UserError(f"{path}: its pickle asks for {module}.{name}, {allowed}; {_NEXT}")
            return _Inert

        def persistent_load(self, pid: Any) -> Any:
            return _Inert()

    try:
        Look(stream).load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: its pickle cannot be read: {type(error).__name__}: {error}; {_NEXT}") from None
