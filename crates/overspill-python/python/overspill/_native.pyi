"""The native half of the package; what users call is in the modules beside it."""

from collections.abc import Mapping, Sequence
from os import PathLike

from torch import Tensor

VERSION: str

def run(arguments: Sequence[str]) -> int:
    """Runs the command line ``arguments``, the first of which is the program's name; the answer is its exit status."""

def norm(gradients: Sequence[Tensor]) -> float:
    """The global 2-norm of ``gradients`` (fp32, bf16 or fp16), summed in fp64 in a fixed order, on all cores."""

class Optimizer:
    """Swapped optimizer state of parameters that are numbered from 0 on. All calls release the GIL; one at a time.

    A parameter is ``(name, shape, dtype, rule)``: ``dtype`` is ``"float32"``, ``"bfloat16"`` or ``"float16"``; ``rule`` is
    ``"adamw"``, ``"adamw_amsgrad"``, ``"adam"``, ``"adam_amsgrad"``, ``"sgd"``, ``"sgd_momentum"``, ``"adagrad"``,
    ``"lion"``, ``"adafactor"`` or ``"muon"``.
    """

    @staticmethod
    def create(
        directories: Sequence[str],
        parameters: Sequence[tuple[str, Sequence[int], str, str]],
        *,
        memory_bytes: int,
        moments: str = "float32",
        stochastic: bool = False,
        initial_accumulator: float = 0.0,
        durability: str = "step",
        backend: str = "auto",
        depth: int | None = None,
        tile_bytes: int | None = None,
        resident_bytes_max: int | None = None,
    ) -> Optimizer:
        """State without contents in new directories, absolute paths, one per disk; the first is the store's home.

        They are served as the profile of ``overspill tune`` beside them says, and have shares by their bandwidths; of
        several, those that have no profile are measured. A profile that is damaged is told by a ``RuntimeWarning``.

        ``moments`` is ``"float32"``, ``"bfloat16"`` or ``"8bit"``. ``stochastic``: bf16 parameters have no fp32 master.
        ``durability`` is ``"step"`` or ``"none"`` (then there is no commit). ``backend`` is ``"auto"``, ``"io_uring"``,
        ``"aio"`` or ``"threads"``. The directories go with the object, unless something was committed.
        """

    @staticmethod
    def open(
        directories: Sequence[str],
        parameters: Sequence[tuple[str, Sequence[int], str, str]],
        weights: Sequence[Tensor],
        meta: str,
        *,
        memory_bytes: int,
        moments: str = "float32",
        stochastic: bool = False,
        initial_accumulator: float = 0.0,
        durability: str = "step",
        backend: str = "auto",
        depth: int | None = None,
        resident_bytes_max: int | None = None,
        snapshot: str | None = None,
    ) -> Optimizer:
        """The state that was committed last, with the same parameters; ``weights`` are filled with theirs.

        ``meta`` is what :meth:`committed` has said: nothing is changed if something else is there by now. A ``snapshot`` is
        read, every byte of it, and made the last commit before. ``weights`` are as they were if those of the commit are
        damaged.
        """

    @staticmethod
    def committed(directory: str, snapshot: str | None = None) -> str:
        """What went with the last commit in ``directory``, or with a snapshot, before it is opened: the ``meta`` of
        :meth:`commit`.
        """

    def step(
        self,
        groups: Sequence[Mapping[str, float]],
        entries: Sequence[tuple[int, int, int, Tensor, Tensor]],
        scale: float = 1.0,
    ) -> None:
        """Updates the parameters of ``entries``: ``(parameter, group, step, weight, gradient)``, ``step`` from 1 on.

        ``groups`` are hyper-parameters as torch names them: ``lr``, ``weight_decay``, ``beta1``, ``beta2``, ``eps``,
        ``momentum``, ``dampening``, ``nesterov`` (0 or 1), ``lr_decay``, ``beta2_decay``, ``eps1``, ``eps2``, ``d``,
        ``ns_a``, ``ns_b``, ``ns_c``, ``ns_steps``, ``match_rms_adamw`` (0 or 1), ``maximize`` (0 or 1).
        Every gradient is multiplied by ``scale``. Weights are changed in place; writes may be under way on return.
        """

    def prefetch(self) -> None:
        """Begins to load what the next step needs first."""

    def settle(self) -> None:
        """Waits for every write."""

    def fields(self, parameter: int) -> list[tuple[str, tuple[int, ...]]]:
        """The fields of a parameter's state and their shapes, under torch's names; ``"master"`` if it has one."""

    def is_new(self, parameter: int) -> bool:
        """Whether the parameter has no state yet."""

    def read_state(self, wanted: Sequence[tuple[int, Tensor, Mapping[str, Tensor]]]) -> None:
        """Fills fp32 tensors with the state of parameters, ``(parameter, weight, {field: tensor})``, in one pass."""

    def write_state(self, given: Sequence[tuple[int, Tensor, Mapping[str, Tensor]]]) -> None:
        """Sets the state of parameters from fp32 tensors, in one pass.

        A ``"master"`` sets the weight, too; without one, the master is the weight. Other fields that are missing are as new.
        """

    def purge(self, parameter: int) -> None:
        """Drops the state of a parameter: the next step finds it new."""

    def extend(self, parameters: Sequence[tuple[str, Sequence[int], str, str]]) -> None:
        """Adds parameters, numbered on."""

    def commit(self, weights: Sequence[Tensor], meta: str) -> None:
        """Makes the state and all weights the next generation on storage; ``meta`` (JSON) goes with it."""

    def compare(self, weights: Sequence[Tensor], compared: tuple[int, int]) -> tuple[int, int] | None:
        """Reads the last commit for a short while and compares it with what was stored; nothing is changed.

        ``compared`` is how far an earlier call has come, ``(0, 0)`` for the first one; ``None`` when nothing is left.
        """

    def roll_back(self, weights: Sequence[Tensor]) -> bool:
        """Goes back to the last commit, weights included, if it is the one that :meth:`compare` has read to its end.

        What fails here leaves no state, until this succeeds.
        """

    def lose(self) -> None:
        """Gives the state up until :meth:`roll_back` succeeds: its weights are not where they belong."""

    def meta(self) -> str:
        """What went with the last commit; ``"null"`` if there was none."""

    def snapshot(self, name: str) -> None:
        """Pins the committed generation under a name."""

    def delete_snapshot(self, name: str) -> None:
        """Gives a snapshot up."""

    def snapshots(self) -> list[str]:
        """The names of all snapshots."""

    def report(self) -> dict[str, object]:
        """Plan and counters: ``backend``, ``degraded_reason``, ``state_bytes``, ``resident_bytes``, ``memory_bytes``,
        ``depth``, ``tile_bytes``, ``bytes_read``, ``bytes_written``, ``seconds_step`` (native time of all
        steps), ``seconds_load``, ``seconds_compute``, ``seconds_store``, ``passes``, ``generation``; and ``volumes``: a
        dictionary for each directory, with its ``directory``, ``weight`` (its share of the data), ``rings``,
        ``chunk_bytes``, ``queue_depth``, ``read_gbps`` and ``write_gbps`` (``None`` if nobody knows).
        """

    def close(self) -> None:
        """Ends all I/O and releases everything; any other call is refused afterwards."""

Order = tuple[
    Tensor,
    "str | bytes | PathLike[str] | PathLike[bytes] | int",
    bool,
    int,
    bool,
    tuple[Tensor, int, int] | None,
]
"""``(tensor, file, write, offset, validate, landing)``: once ``tensor`` is read, it is copied to the tensor of ``landing``,
which has the addresses from the first number to before the second.
"""

class Handle:
    """The engine behind :class:`overspill.aio_handle`. All calls that move or wait release the GIL."""

    def __new__(
        cls, block_size: int, queue_depth: int, intra_op_parallelism: int, backend: str
    ) -> Handle: ...
    def backend(self) -> str:
        """The backend in use."""

    def degraded(self) -> str | None:
        """Why it is not the best one, if nobody asked for it."""

    def submit(self, order: Order) -> None:
        """Begins to move a tensor."""

    def run(self, order: Order, alone: bool) -> int:
        """Moves a tensor and waits: for that ``alone``, which is never counted, or as :meth:`wait` does."""

    def wait(self) -> int:
        """Waits for everything that was asked for; how many operations no other wait has counted."""

    def settle(self, start: int, end: int) -> None:
        """Waits until nothing that was asked for is yet to change the memory from ``start`` to before ``end``."""

    def close(self) -> None:
        """Finishes what is pending, within a minute, and stops the engine. In a fork it does nothing."""

class Pinned:
    """Memory that a tensor is made over; ``len`` is its size in bytes."""

    def __new__(cls, bytes: int) -> Pinned: ...
    def __len__(self) -> int: ...
    @property
    def address(self) -> int:
        """The address of the first byte."""

def unpin(address: int) -> bool:
    """Gives the pinned memory that begins at ``address`` up; whether there was any."""

def is_pinned(address: int, bytes: int) -> bool:
    """Whether these bytes are pinned memory of one allocation."""
