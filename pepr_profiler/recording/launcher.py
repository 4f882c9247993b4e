"""Which job this process is of, and which part of it, as whatever launched it says.

Launchers tell their processes by environment variables. Several may be nested: Slurm starts Open
MPI, which starts a program. The innermost one knows the rank. The job is named by all of them,
outermost first, because each name must be the same in all ranks and on all nodes.
"""

from __future__ import annotations

# Loaded before the child starts: no re, no dataclasses.
import os
import sys
from collections.abc import Iterable, Iterator, Mapping

from pepr_profiler.record import Record
from pepr_profiler.units import utf8_text

TYPE_CHECKING = False  # typing takes 0.5 MB
if TYPE_CHECKING:
    from typing import Any

JOB_VARIABLE = "PEPR_JOB"
"""Names the job; it outweighs what launchers say."""

_SPECIAL_STEP = 0xFFFF_FFF0
"""From this number on a Slurm step is no task of a user's srun: the batch script, the interactive
shell of salloc and the like (SLURM_BATCH_SCRIPT and others, slurm/slurm.h)."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Launch(Record):
    """What a process is of a job; None is unknown.

    `node` is a name, or an index where the launcher has no names. `launcher` is the innermost one.
    `attempt` counts how often launchers have started the job before.
    """

    job: str | None = None
    rank: int | None = None
    local_rank: int | None = None
    world_size: int | None = None
    node: str | None = None
    launcher: str | None = None
    attempt: int | None = None

    @classmethod
    def of(
        cls,
        environ: Mapping[str, str],
        *,
        parents: Iterable[tuple[str, ...]] = (),
        ray_job: str | None = None,
    ) -> Launch:
        """What an environment says.

        `parents` are the commands above the process, nearest first: MPICH names no job in its
        variables. `ray_job` is what Ray says inside the process.
        """
        found = (
            _kubernetes(environ),
            _slurm(environ),
            _ray(environ, ray_job),
            _openmpi(environ),
            _mpich(environ, parents),
            _torch(environ),
        )
        levels = [level for level in found if level is not None]
        given = environ.get(JOB_VARIABLE) or None
        if not levels:
            return cls(job=given)
        inner = _without_contradiction(levels[-1])
        levels[-1] = inner
        names = [_name_of(level, is_innermost=level is inner) for level in levels]
        attempts = [level.attempt for level in levels if level.attempt is not None]
        nodes = [level.node for level in levels if level.node]
        return cls(
            job=given or "/".join(name for name in names if name) or None,
            rank=inner.rank,
            local_rank=inner.local_rank,
            world_size=inner.world_size,
            node=next((node for node in nodes if not node.isdigit()), nodes[-1] if nodes else None),
            launcher=next((level.launcher for level in levels[::-1] if level.launcher), None),
            attempt=sum(attempts) if attempts else None,
        )

    @classmethod
    def of_roots(cls, root: str) -> Launch:
        """What the job is part of whose processes a ProcessRoot names: this process or others.

        Of a cgroup with several ranks it is what they have in common.
        """
        if root in ("self", "children"):
            return cls.of(os.environ, parents=_commands_above(os.getpid()), ray_job=_ray_job())
        from pepr_profiler.recording.procfs import environ_of
        from pepr_profiler.sensors.spec import ProcessRoot

        def of(pid: int) -> Launch:
            block = (os.fsdecode(entry).partition("=") for entry in environ_of(pid))
            return cls.of({name: value for name, _, value in block}, parents=_commands_above(pid))

        folder = ProcessRoot(root).cgroup
        if not folder:
            return of(ProcessRoot(root).pids[0])
        from pepr_profiler.recording.cgroups import oldest_of

        found = [launch for pid in oldest_of(folder) if (launch := of(pid)).job]
        if not found:
            return cls()
        if len({launch.rank for launch in found}) == 1:
            return found[0]
        # What is around several ranks is none of them.
        return found[0]._replace(rank=None, local_rank=None, world_size=None)

    def facts(self) -> dict[str, Any]:
        """As run.json has it."""
        return {
            name: utf8_text(value) if isinstance(value, str) else value
            for name, value in zip(self._fields, self, strict=True)
        }

    def local_world_size(self) -> int | None:
        """How many ranks the node of this process has, where their numbers follow each other."""
        if self.rank is None:
            return None
        return _number(os.environ, *_LOCAL_SIZES.get(self.launcher or "", ()))


def rank_facts() -> dict[str, Any]:
    """What a file of events says of the process that writes it; nothing if it has no rank."""
    launch = Launch.of(os.environ)
    if launch.rank is None:
        return {}
    return {
        "rank": launch.rank,
        "local_rank": launch.local_rank,
        "world_size": launch.world_size,
        "local_world_size": launch.local_world_size(),
    }


_LOCAL_SIZES = {
    **dict.fromkeys(("torchrun", "accelerate"), ("LOCAL_WORLD_SIZE",)),
    "deepspeed": ("LOCAL_SIZE",),
}
"""Which variable says how many ranks are on this node, where these follow each other; those of MPI
need not."""


def _name_of(level: Launch, *, is_innermost: bool) -> str | None:
    """The job's name at one launcher of several; a restarted job is another.

    mpirun and Ray start their processes by several steps of Slurm, and some by none, so that the
    step names the job only where its tasks are the ranks.
    """
    name = level.job
    if name and not is_innermost and level.launcher == "slurm":
        name = name.partition(".")[0]
    return f"{name}#{level.attempt}" if name and level.attempt else name


def _without_contradiction(level: Launch) -> Launch:
    """Without its rank if there is no such rank: some variables are of an earlier launch."""
    if level.rank is None or level.world_size is None or level.rank < level.world_size:
        return level
    return level._replace(rank=None, local_rank=None, world_size=None)


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is a whole number from 0 on."""
    for name in names:
        text = environ.get(name, "")
        if text.isascii() and text.isdigit() and len(text) < 20:
            return int(text)
    return None


def _kubernetes(environ: Mapping[str, str]) -> Launch | None:
    """Kubernetes says to a pod of an indexed job which one it is, and names it after the job.

    JobSet sets no variables: JOBSET_NAME and JOBSET_RESTART_ATTEMPT are its labels, where the
    manifest asks for them (docs/howto/kubernetes.md).
    """
    if "KUBERNETES_SERVICE_HOST" not in environ:
        return None
    index = _number(environ, "JOB_COMPLETION_INDEX")
    job = job_set = environ.get("JOBSET_NAME")
    host, end = environ.get("HOSTNAME", ""), f"-{index}"
    if not job and index is not None and host.endswith(end):
        job = host[: -len(end)]
    return Launch(
        f"k8s-{job}" if job else None,
        launcher="kubernetes",
        rank=None if job_set else index,  # each job of a set counts from 0
        node=environ.get("NODE_NAME") or (None if index is None else str(index)),
        attempt=_number(environ, "JOBSET_RESTART_ATTEMPT"),
    )


def _slurm(environ: Mapping[str, str]) -> Launch | None:
    """A task of srun has a step. A batch script has the first task's variables, but is none."""
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return None
    step = _number(environ, "SLURM_STEP_ID")
    is_task = step is not None and step < _SPECIAL_STEP
    return Launch(
        f"slurm-{job}.{step}" if is_task else f"slurm-{job}",
        launcher="slurm",
        rank=_number(environ, "SLURM_PROCID") if is_task else None,
        local_rank=_number(environ, "SLURM_LOCALID") if is_task else None,
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if is_task else None,
        node=environ.get("SLURMD_NODENAME"),
        attempt=_number(environ, "SLURM_RESTART_COUNT") or 0,
    )


def _ray(environ: Mapping[str, str], job: str | None) -> Launch | None:
    """Ray's workers have the variables of the raylet, whose rank is not theirs."""
    if job is None and "RAY_RAYLET_PID" not in environ:
        return None
    named = environ.get("RAY_JOB_ID", "").strip("f")  # of a worker that waits for a job: all f
    return Launch(f"ray-{job}" if job else f"ray-{named}" if named else None, launcher="ray")


def _ray_job() -> str | None:
    """The job that this process is of, if it has joined a Ray cluster; Ray counts them from 1."""
    ray: Any = sys.modules.get("ray")
    try:
        if ray is None or not ray.is_initialized():
            return None
        context = ray.get_runtime_context()
        return f"{context.get_job_id()}@{context.gcs_address}"
    except Exception:  # another version of Ray, or a module of that name
        return None


def _openmpi(environ: Mapping[str, str]) -> Launch | None:
    """Open MPI, and others that speak PMIx; Slurm itself does (srun --mpi=pmix)."""
    space = environ.get("PMIX_NAMESPACE", "")
    rank = _number(environ, "OMPI_COMM_WORLD_RANK")
    if rank is None:
        rank = _number(environ, "PMIX_RANK")
        if rank is None or not space or space.startswith("slurm."):
            return None
        return Launch(
            f"pmix-{space}", launcher="pmix", rank=rank, node=environ.get("PMIX_HOSTNAME")
        )
    job = space or environ.get("OMPI_MCA_ess_base_jobid")
    return Launch(
        f"openmpi-{job}" if job else None,
        launcher="openmpi",
        rank=rank,
        local_rank=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size=_number(environ, "OMPI_COMM_WORLD_SIZE"),
        node=environ.get("PMIX_HOSTNAME"),
    )


def _mpich(environ: Mapping[str, str], parents: Iterable[tuple[str, ...]]) -> Launch | None:
    """MPICH and its relatives, by their launcher Hydra, which sets no name of the job.

    On each node a proxy of Hydra starts the ranks; all proxies get the address of one mpiexec.
    """
    rank = _number(environ, "PMI_RANK")
    if rank is None or "MPI_LOCALRANKID" not in environ:  # Slurm sets the first too (--mpi=pmi2)
        return None
    name = None
    for command in parents:
        if command and "hydra_pmi_proxy" in command[0]:
            if "--control-port" in command[:-1]:
                name = f"mpich-{command[command.index('--control-port') + 1]}"
            break
    return Launch(
        name,
        launcher="mpich",
        rank=rank,
        local_rank=_number(environ, "MPI_LOCALRANKID"),
        world_size=_number(environ, "PMI_SIZE"),
    )


def _commands_above(pid: int) -> Iterator[tuple[str, ...]]:
    """Those of a process's parent, of its parent, and so on; read as far as they are taken."""
    from pepr_profiler.recording.procfs import ancestors_of, command_of

    for above in ancestors_of(pid):
        try:
            yield command_of(above)
        except OSError:  # hidden from us
            return


def _torch(environ: Mapping[str, str]) -> Launch | None:
    """torchrun, and whoever sets the variables of torch.distributed's `env://`."""
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    address = environ.get("MASTER_ADDR")
    if address in _LOOPBACK:
        address = os.uname().nodename
    meeting = f"{address}:{environ.get('MASTER_PORT', '')}" if address else None
    local_rank = _number(environ, "LOCAL_RANK")
    elastic = environ.get("TORCHELASTIC_RUN_ID")
    if elastic is not None:
        made_by: str | None = "torchrun"
        if "ACCELERATE_MIXED_PRECISION" in environ:
            made_by = "accelerate"
    elif meeting is None or size is None:
        return None
    elif rank is None:
        # Lightning starts all but the first process of a node, and names no rank.
        node_rank = _number(environ, "NODE_RANK")
        if local_rank is None or node_rank is None:
            return None
        made_by, rank = "lightning", local_rank if node_rank == 0 else None
    else:
        made_by = "deepspeed" if {"CROSS_RANK", "CROSS_SIZE"} <= environ.keys() else None
    # "none" is what torchrun takes where several nodes were given no --rdzv-id.
    job = elastic if elastic not in (None, "", "none") else meeting
    return Launch(
        f"{made_by or 'torch'}-{job}" if job else None,
        launcher=made_by,
        rank=rank,
        local_rank=local_rank,
        world_size=size,
        node=environ.get("GROUP_RANK") or environ.get("CROSS_RANK") or environ.get("NODE_RANK"),
        attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT"),
    )
