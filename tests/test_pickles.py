"""Foreign pickles of a checkpoint are refused before they run: `python -m pytest tests/test_pickles.py`."""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from launch.errors import UserError
from trainer.pickles import refuse_foreign_pickles


class Hiding(dict[Any, Any]):
    """Its pickle makes a table whose items() gives nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), {"items": torch.Size}, None, iter(list(self.items()))


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process saves and loads


class Attack:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self._file,)


def _distributed(folder: Path) -> Path:
    state = {"exp_avg": torch.ones(3, 2), "bf16": torch.ones(2, dtype=torch.bfloat16), "step": [1, 2], "lr": 0.5}
    dcp.save(state, checkpoint_id=folder / "optimizer_0", no_dist=True)
    return folder / "optimizer_0/.metadata"


def _zero(folder: Path) -> Path:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    scalers = [LossScaler(1.0), DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 1, False)]
    path = folder / "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.parent.mkdir(parents=True)
    state = {"state": torch.nn.Linear(2, 2).state_dict(), "stage": ZeroStageEnum.weights, "scalers": scalers}
    torch.save(state, path)
    return path


def test_what_the_libraries_write_passes(tmp_path: Path) -> None:
    _distributed(tmp_path)
    _zero(tmp_path)
    refuse_foreign_pickles(tmp_path)


def _metadata(folder: Path, attack: Attack, protocol: int) -> None:
    path = _distributed(folder)
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = attack
    path.write_bytes(pickle.dumps(metadata, protocol))


def _item(folder: Path, attack: Attack, protocol: int) -> None:
    """A byte item of a .distcp file, to whose end it is put."""
    path = _distributed(folder)
    metadata = pickle.loads(path.read_bytes())
    (index,) = [i for i in metadata.storage_data if i.fqn == "step"]
    assert isinstance(metadata.state_dict_metadata["step"], BytesStorageMetadata)
    place, content = metadata.storage_data[index], io.BytesIO()
    torch.save(attack, content, pickle_protocol=protocol)
    with (path.parent / place.relative_path).open("ab") as file:
        place.offset, place.length = file.tell(), len(content.getvalue())
        file.write(content.getvalue())
    path.write_bytes(pickle.dumps(metadata))


def _hidden_item(folder: Path, attack: Attack, protocol: int) -> None:
    """As `_item`, in a table whose items() gives nothing: torch.Size is a name that passes."""
    _item(folder, attack, protocol)
    path = folder / "optimizer_0/.metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.storage_data = Hiding(metadata.storage_data)
    path.write_bytes(pickle.dumps(metadata))


def _states(folder: Path, attack: Attack, protocol: int) -> None:
    path = _zero(folder)
    torch.save({"state": [attack]}, path, pickle_protocol=protocol)


def _old_format(folder: Path, attack: Attack, protocol: int) -> None:
    torch.save(attack, _zero(folder), pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def _load(folder: Path) -> None:
    """As the libraries do."""
    for path in folder.rglob(".metadata"):
        state = {"exp_avg": torch.ones(3, 2), "bf16": torch.ones(2, dtype=torch.bfloat16), "step": [0], "lr": 0.0}
        dcp.load(state, checkpoint_id=path.parent, no_dist=True)
    for path in folder.rglob("*_states.pt"):
        torch.load(path, weights_only=False)


@pytest.mark.parametrize("protocol", [2, 4])  # a global by its name in the pickle, and from the stack
@pytest.mark.parametrize("plant", [_metadata, _item, _hidden_item, _states, _old_format])
def test_a_pickle_that_does_something_is_refused_and_does_nothing(
    tmp_path: Path, plant: Callable[[Path, Attack, int], None], protocol: int
) -> None:
    made = tmp_path / "made"
    plant(tmp_path / "checkpoint", Attack(made), protocol)
    with pytest.raises(UserError, match="do not load this checkpoint") as error:
        refuse_foreign_pickles(tmp_path / "checkpoint")
    assert "\n" not in str(error.value) and not made.exists()
    _load(tmp_path / "checkpoint")
    assert made.exists(), "the libraries would have run it"


def test_other_formats_are_refused(tmp_path: Path) -> None:
    path = _zero(tmp_path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/constants.pkl", b"")  # by which torch.load knows TorchScript, whose code it runs
    for content in (path.read_bytes(), b"", whole[:100], pickle.dumps({})):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"states\.pt: "):
            refuse_foreign_pickles(tmp_path)
