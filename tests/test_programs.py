"""What a command line runs in the end: how a run without a name is called."""

from __future__ import annotations

import random
import shlex

import pytest

from pepr_profiler.commands.programs import command_in, name_of, steps_of
from pepr_profiler.commands.submitters import Submitter

NAMES = {
    # Python's own options
    "python train.py --epochs 3": "train",
    "python3.11 -u scripts/train.py": "train",
    "/opt/venv/bin/python3 -W ignore train.py": "train",
    "python -Wignore -X dev train.py": "train",
    "python -Xfrozen_modules=off -OO -I -B -E -s -S -P train.py": "train",
    "python -uW ignore train.py": "train",
    "python -bb -q -v -d train.v2.py": "train.v2",
    "python --check-hash-based-pycs never train.py": "train",
    "python -- train.py": "train",
    "python -m train": "train",
    "python -m pkg.models.train --lr 1": "train",
    "python -Im pkg.train": "train",
    "python -mpkg.train": "train",
    "python -m pkg.__main__": "pkg",
    "python train/__main__.py": "train",
    "python ./train/": "train",
    "python -c 'import train' train.py": "python",
    "python -uc 'import train'": "python",
    "python - < train.py": "python",
    "python": "python",
    "python -W": "python",
    "pypy3 train.py": "train",
    "ipython train.py": "train",
    "pythonic train.py": "pythonic",
    "./train.py 2": "train.py",
    "./train 2": "train",
    "train": "train",
    # launchers
    "torchrun --nproc-per-node 2 train.py": "train",
    "torchrun --no-python pepr-profile -- python train.py": "train",
    "mpirun -n 2 pepr-profile run -q --sensor nvml -- python train.py": "train",
    "python -m pepr_profiler --job 7 -- python train.py": "train",
    "python -m pepr_profiler run python train.py": "train",
    "python -m pepr_profiler attach 4121": "pepr_profiler",
    "pepr-profile attach 4121": "pepr-profile",
    "torchrun --nproc_per_node=2 --standalone train.py 3": "train",
    "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint n1:29500 -m pkg.train": "train",
    "torchrun --no-python --nproc-per-node 2 python -W ignore train.py": "train",
    "torchrun -t 3 -r 3 train.py": "train",
    "python -m torch.distributed.run --nproc-per-node 2 train.py": "train",
    "python -u -m torch.distributed.launch --nproc_per_node 2 --use_env train.py": "train",
    "accelerate launch --multi_gpu --num_processes 2 train.py": "train",
    "accelerate launch --config_file c.yaml --mixed-precision no -m pkg.train": "train",
    "python -m accelerate.commands.launch --cpu train.py": "train",
    "accelerate test": "accelerate",
    "deepspeed --num_gpus 2 --hostfile hosts train.py --deepspeed": "train",
    "deepspeed --module pkg.train": "train",
    "python -m deepspeed.launcher.runner --num_gpus=2 train.py": "train",
    "srun -n 2 python train.py": "train",
    "srun -n2 -c 4 -l --mem=4G --gres gpu:1 --exclusive python train.py": "train",
    "srun --ntasks 2 --label --kill-on-bad-exit=1 ./train": "train",
    "srun -n 2 torchrun --nproc-per-node 4 train.py": "train",
    "sbatch -W -n 2 --parsable -o out train.sh 3": "train",
    "sbatch --wrap 'srun python train.py'": "sbatch",
    "salloc -N 2 srun python train.py": "train",
    "mpirun -n 2 python train.py": "train",
    "mpirun -np 2 --oversubscribe --mca btl tcp,self -x NCCL_DEBUG=INFO python train.py": "train",
    "mpiexec -n 1 python train.py : -n 3 python worker.py": "train",
    "mpiexec.hydra -genv OMP_NUM_THREADS 1 -ppn 2 -hosts n1,n2 python train.py": "train",
    "mpirun.openmpi --bind-to none -H n1:2,n2:2 ./train": "train",
    # environments
    "uv run train.py": "train",
    "uv run --with torch --python 3.12 python train.py": "train",
    "uv run -m pkg.train": "train",
    "uv run --no-sync torchrun --nproc-per-node 2 train.py": "train",
    "uv pip list": "uv",
    "conda run -n env --no-capture-output python train.py": "train",
    "micromamba run -p /opt/env python train.py": "train",
    "poetry run python -m pkg.train": "train",
    "pipenv run python train.py": "train",
    "pixi run -e gpu python train.py": "train",
    "hatch run python train.py": "train",
    # programs that run another
    "env -u X CUDA_VISIBLE_DEVICES=0 A=b python train.py": "train",
    "env -i python train.py": "train",
    "nice python train.py": "train",
    "nice -n 10 python train.py": "train",
    "nice -10 python train.py": "train",
    "ionice -c 3 nice -n 5 python train.py": "train",
    "nohup python train.py": "train",
    "setsid -w python train.py": "train",
    "taskset -c 0-3 python train.py": "train",
    "taskset 0x3 python train.py": "train",
    "chrt -b 0 python train.py": "train",
    "numactl --cpunodebind=0 --membind 0 python train.py": "train",
    "numactl -N 0 -m 0 -l python train.py": "train",
    "xvfb-run -a -s '-screen 0 640x480x24' python train.py": "train",
    "time -p python train.py": "train",
    "/usr/bin/time -v -o out python train.py": "train",
    "timeout -k 5 1h python train.py": "train",
    "timeout --signal KILL 60 python train.py": "train",
    "stdbuf -oL -e 0 python train.py": "train",
    "sudo -E -u alice A=b python train.py": "train",
    "sudo -- python train.py": "train",
    "coverage run --source pkg train.py": "train",
    "coverage run -m pkg.train": "train",
    "python -m coverage run train.py": "train",
    "python -m cProfile -o out -s time train.py": "train",
    "python -m cProfile -m pkg.train": "train",
    "python -m pdb -c continue train.py": "train",
    "memray run -o out.bin train.py": "train",
    "nsys profile -o out -t cuda python train.py": "train",
    "perf stat -e cycles python train.py": "train",
    "strace -f -o log python train.py": "train",
    "apptainer exec --nv -B /data image.sif python train.py": "train",
    "docker run --rm -it --gpus all -v /data:/data image:tag python train.py": "train",
    "docker run image": "docker",
    "docker ps": "docker",
    "kubectl exec -it pod -c main -- python train.py": "train",
    "ray job submit --address http://h:8265 --working-dir . -- python train.py": "train",
    "ray start --head": "ray",
    "ssh -p 22 host 'cd /work && python train.py'": "train",
    "ssh host python train.py": "train",
    "systemd-run --user --scope -p MemoryMax=4G python train.py": "train",
    "tmux new -d -s work 'python train.py'": "train",
    "screen -dmS work python train.py": "train",
    # shells and other interpreters
    "bash train.sh 3": "train",
    "sh ./run.all.sh": "run.all",
    "bash -x -o pipefail train.sh": "train",
    "bash -c 'python train.py --lr 0.1'": "train",
    "bash -lc 'conda activate x && python train.py'": "train",
    "bash -euo pipefail -c 'cd /work; export A=b\nA=c exec python -u train.py > log 2>&1'": "train",
    "bash -c 'for s in 1 2; do python train.py --seed $s; done'": "train",
    "bash -c 'if true; then srun -n 2 python train.py; fi'": "train",
    "bash -c '$PYTHON train.py'": "bash",
    "bash -c 'python \"train.py'": "bash",
    "bash": "bash",
    "Rscript --vanilla train.R": "train",
    "julia -t 4 --project=. train.jl": "train",
    "node train.js": "train",
    # nested
    "env A=b nice -n 5 numactl -N 0 srun -n 2 bash -c 'torchrun -t 3 train.py'": "train",
    "timeout 60 uv run accelerate launch --num_processes 2 train.py": "train",
}


@pytest.mark.parametrize("line", NAMES)
def test_a_run_is_called_by_its_script(line: str) -> None:
    assert name_of(shlex.split(line)) == NAMES[line]


def test_programs_are_found_in_their_order() -> None:
    line = "env A=b srun -n 2 nice python train.py"
    assert [step.program for step in steps_of(shlex.split(line))] == [
        *("env", "srun", "nice", "python")
    ]


@pytest.mark.parametrize(
    "line", ["", " ", "''", "env", "nice -n", "srun", "python -m", "timeout 3"]
)
def test_a_line_that_runs_nothing_has_a_name_too(line: str) -> None:
    assert isinstance(name_of(shlex.split(line) or [""]), str)


def test_whatever_the_words_are_there_is_a_name() -> None:
    vocabulary = sorted({word for line in NAMES for word in shlex.split(line)})
    vocabulary += [
        "",
        "-",
        "--",
        "-c",
        "-m",
        "=",
        "a=",
        "'",
        "$(",
        "\udcff",
        "--x=",
        "-=",
        "/",
        ".",
    ]
    chosen = random.Random(0)
    for _ in range(20_000):
        words = chosen.choices(vocabulary, k=chosen.randint(1, 8))
        assert isinstance(name_of(words), str)
        Submitter.of(words, words)


def test_programs_that_run_each_other_have_an_end() -> None:
    assert name_of(["nice"] * 10_000) == "nice"
    assert command_in("(" * 10_000) == ()
