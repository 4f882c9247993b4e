"""What a command line runs in the end: behind launchers, interpreters and programs like nice."""

from __future__ import annotations

from collections.abc import Sequence

from pepr_profiler.record import Record

# How the command lines of programs are read. "VALUES" are the options that take a value, with _
# written as -; "!FLAGS" those that take none, where all others take one; "NAME=2" takes two.
_CONTAINER = (
    "!d detach i interactive t tty rm privileged init read-only P publish-all no-healthcheck "
    "oom-kill-disable q quiet sig-proxy replace no-hosts tls-verify"
)
_KUBECTL = (
    "n namespace context kubeconfig c container f filename image o output l selector s server"
)
_SRUN = (
    "!E H I k K l O s u v V X Z h Q preserve-env hold immediate no-kill kill-on-bad-exit label "
    "overcommit oversubscribe unbuffered verbose version disable-status no-allocate help usage "
    "quiet compress multi-prog nice overlap propagate pty quit-on-interrupt reboot send-libs "
    "spread-job use-min-nodes contiguous exact exclusive resv-ports"
)
_MPIRUN = (
    "n np c N H host hosts hostfile machinefile default-hostfile f x mca=2 gmca=2 omca=2 prtemca=2 "
    "pmixmca=2 env=2 genv=2 genvlist envlist wd wdir configfile map-by bind-to rank-by membind "
    "cpu-list cpu-set cpus-per-proc cpus-per-rank npernode npersocket ppn perhost rf rankfile "
    "prefix path output output-filename of stdin timeout am app tune display runtime-options "
    "launcher bootstrap launcher-exec rmk topolib demux iface launch-agent usize gpus-per-proc "
    "tmpdir preload-files localhost nameserver errfile-pattern outfile-pattern prepend-pattern"
)
_UV_RUN = (
    "w with with-requirements with-editable p python project directory env-file extra group "
    "no-group only-group package index default-index i index-url extra-index-url f find-links "
    "config-file cache-dir C config-setting P upgrade-package refresh-package no-extra color"
)

_WRAPPERS: dict[str, tuple[int, str]] = {
    # What runs the command after its options, and after so many words that are none.
    **{"env": (0, "u unset C chdir S split-string"), "nice": (0, "n adjustment")},
    **{"ionice": (0, "c class n classdata"), "nohup": (0, ""), "setsid": (0, "")},
    **{"time": (0, "f format o output"), "timeout": (1, "k kill-after s signal")},
    **{"taskset": (1, ""), "chrt": (1, "T sched-runtime P sched-period D sched-deadline")},
    "numactl": (
        0,
        "i interleave w weighted-interleave p preferred P preferred-many C physcpubind "
        "N cpunodebind m membind",
    ),
    "stdbuf": (0, "i input o output e error"),
    "sudo": (
        0,
        "u user g group h host p prompt C close-from D chdir R chroot r role t type "
        "T command-timeout U other-user",
    ),
    **{"doas": (0, "u C"), "runuser": (0, "u user g group G supp-group")},
    "xvfb-run": (0, "e error-file f auth-file n server-num p xauth-protocol s server-args w wait"),
    **{"exec": (0, "a"), "command": (0, ""), "chronic": (0, ""), "unbuffer": (0, "")},
    **{"catchsegv": (0, ""), "prlimit": (0, "p pid o output"), "unshare": (0, "R root w wd S G")},
    "strace": (0, "e o p s u E P a b I O S X attach output trace string-limit user env"),
    **{"conda run": (0, "n name p prefix cwd"), "mamba run": (0, "n name p prefix cwd")},
    **{
        "micromamba run": (0, "n name p prefix cwd"),
        "pixi run": (0, "e environment manifest-path"),
    },
    **{
        "poetry run": (0, ""),
        "pipenv run": (0, ""),
        "pdm run": (0, "p project"),
        "rye run": (0, ""),
    },
    **{"hatch run": (0, ""), "uv run": (0, _UV_RUN)},
    **{"pepr-profile": (0, "!q quiet"), "pepr-profile run": (0, "!q quiet")},
    "perf stat": (0, "e event o output r repeat x field-separator C cpu I interval-print"),
    "perf record": (0, "e event o output F freq c count C cpu call-graph"),
    "nsys profile": (0, "o output t trace s sample c capture-range y delay d duration"),
    "ncu": (0, "o export k kernel-name c launch-count s launch-skip set section metrics"),
    "salloc": (0, _SRUN),
    **{"singularity exec": (1, "B bind env env-file H home W workdir pwd"), "srun": (0, _SRUN)},
    **{"apptainer exec": (1, "B bind env env-file H home W workdir pwd"), "mpirun": (0, _MPIRUN)},
    **{"docker run": (1, _CONTAINER), "podman run": (1, _CONTAINER)},
    **{"docker exec": (1, _CONTAINER), "podman exec": (1, _CONTAINER)},
    "nerdctl run": (1, _CONTAINER),
    **{"kubectl exec": (1, _KUBECTL), "kubectl run": (1, _KUBECTL)},
    "ray job submit": (0, "!no-wait no-verify verbose v"),
    "tmux new-session": (0, "s n t c x y e F f"),
    "screen": (0, "S c e h p s T t"),
    "ssh": (1, "B b c D E e F I i J L l m O o P p Q R S W w"),
    "systemd-run": (
        0,
        "p property E setenv u unit slice M machine H host uid gid nice working-directory "
        "description service-type on-active on-boot on-calendar timer-property",
    ),
}

_SCRIPTS: dict[str, str] = {
    # What runs a script, or the module after -m or --module.
    "torchrun": "!h help standalone m module no-python run-path virtual-local-rank use-env",
    "accelerate launch": "!h help q quiet cpu multi-gpu tpu enable-cpu-affinity m module no-python "
    "dynamo-use-fullgraph dynamo-use-dynamic dynamo-use-regional-compilation use-deepspeed "
    "use-fsdp use-parallelism-config use-megatron-lm same-network tpu-cluster no-tpu-cluster "
    "tpu-use-sudo downcast-bf16 fp8-use-autocast-during-eval debug",
    "deepspeed": "!h help q quiet module no-python no-local-rank no-ssh no-ssh-check force-multi "
    "save-pid bind-cores-to-rank",
    "sbatch": f"{_SRUN} W wait parsable requeue no-requeue test-only ignore-pbs",
    "coverage run": "data-file rcfile source include omit context concurrency",
    "memray run": "o output p live-port",
    "viztracer": "o output-file max-stack-depth",
    "scalene": "outfile",
    "kernprof": "o outfile s setup",
    "cProfile": "o s outfile sort",
    "pdb": "c command",
    "debugpy": "listen configure",
    "julia": "e E p procs t threads L load J sysimage C",
    "Rscript": "e",
    "node": "e p r require import",
}

_SAME = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate launch",
    "accelerate.commands.accelerate_cli": "accelerate",
    "deepspeed.launcher.runner": "deepspeed",
    "profile": "cProfile",
    **dict.fromkeys(("mpiexec", "orterun", "prterun", "mpiexec.hydra"), "mpirun"),
    **dict.fromkeys(("mpirun.openmpi", "mpirun.mpich", "mpiexec.openmpi"), "mpirun"),
    **{"mpiexec.mpich": "mpirun", "oshrun": "mpirun", "apptainer run": "apptainer exec"},
    "tmux new": "tmux new-session",
    "pepr_profiler": "pepr-profile",
}
"""Other names of programs, and modules that are programs."""

_PROGRAM_MODULES = frozenset(
    {"coverage", "memray", "viztracer", "scalene", "kernprof", "cProfile", "pdb", "debugpy"}
)
_FIRST_OF_SEVERAL = frozenset(name.partition(" ")[0] for name in (*_WRAPPERS, *_SCRIPTS, *_SAME))
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish", "ash"})
_PYTHONS = frozenset({"python", "pythonw", "pypy", "ipython"})
_NO_COMMAND = frozenset(
    {"cd", "pushd", "export", "set", "unset", "source", ".", "ulimit", "umask", "module", "echo"}
    | {"true", ":", "trap", "for", "case", "function", "fi", "done", "esac", "}"}
)
_BEFORE_COMMAND = frozenset({"if", "then", "else", "elif", "while", "until", "do", "!", "{"})
_DEEPEST = 16  # programs that run each other; a line of more is made to be so


class Step(Record):
    """What one program of a command line does with the words behind it.

    `program` is its name, with the verb of one that has several ("docker run"). `name` is that of
    the script or module that it runs, else its own. `inner` is the command that it runs; `at` is
    where that begins among the words, None where they have it as text for a shell.
    """

    program: str
    name: str
    inner: tuple[str, ...] = ()
    at: int | None = None


def name_of(command: Sequence[str]) -> str:
    """The script's or module's name where an interpreter runs one, else the program's."""
    return steps_of(command)[-1].name


def steps_of(command: Sequence[str]) -> list[Step]:
    """The programs of a command line, outermost first; each is run by the one before it."""
    steps: list[Step] = []
    words = tuple(command)
    while len(steps) < _DEEPEST:
        step = _step_of(words)
        steps.append(step)
        if not step.inner or not step.inner[0] or step.inner[0].startswith(("$", "`")):
            break
        words = step.inner
    return steps


def _step_of(words: tuple[str, ...]) -> Step:
    base = words[0].rstrip("/").rpartition("/")[2] or words[0]
    if base.rstrip("0123456789.t") in _PYTHONS:
        return _python(words, base)
    if base in _SHELLS:
        return _shell(words, base)
    program, at = _SAME.get(base, base), 1
    if base in _FIRST_OF_SEVERAL:
        for count in (3, 2):
            several = " ".join([base, *words[1:count]])
            several = _SAME.get(several, several)
            if several in _WRAPPERS or several in _SCRIPTS:
                program, at = several, count
                break
    if program in _SCRIPTS:
        return _script(words, at, base, program)
    if program in _WRAPPERS and _wraps(program, words):
        return _wrapper(words, at, base, program)
    return Step(program, base)


def _wraps(program: str, words: tuple[str, ...]) -> bool:
    """Whether it runs a command: of ours, `attach` and others do not."""
    return program != "pepr-profile" or "--" in words or words[:1] == ("run",)


def _python(words: tuple[str, ...], base: str) -> Step:
    at = 1
    while at < len(words) and words[at] != "-":
        word = words[at]
        at += 1
        if not word.startswith("-"):
            return Step(base, _script_name(word, base))
        if word.startswith("--"):
            at += word == "--check-hash-based-pycs"
            continue
        for i, letter in enumerate(word[1:], start=2):
            if letter not in "cmWX":
                continue
            value = word[i:] or (words[at] if at < len(words) else "")
            at += not word[i:]
            if letter == "m" and value:
                return _module(value, words[at:], base)
            if letter == "c":
                return Step(base, base)
            break
    return Step(base, base)


def _module(module: str, others: tuple[str, ...], base: str) -> Step:
    """A module that runs others is what the program of its name is."""
    program = _SAME.get(module, module)
    if (program != module or program in _PROGRAM_MODULES) and _wraps(program, others):
        return Step(base, base, (*program.split(), *others))
    return Step(base, _module_name(module))


def _module_name(module: str) -> str:
    parts = module.removesuffix(".__main__").split(".")
    return parts[-1] or module


def _script_name(script: str, base: str) -> str:
    """The stem of a script; base where it is read from stdin."""
    path = script.rstrip("/").removesuffix("/__main__.py")
    name = path.rpartition("/")[2]
    stem = name.rpartition(".")[0] or name
    return base if script == "-" else stem or base


def _shell(words: tuple[str, ...], base: str) -> Step:
    at, is_text = 1, False
    while at < len(words) and words[at][:1] in ("-", "+") and len(words[at]) > 1:
        word = words[at]
        at += 1
        if word == "--":
            break
        if word.startswith("--"):
            at += word in ("--rcfile", "--init-file")
        else:
            is_text = is_text or "c" in word
            at += word.endswith(("o", "O"))
    if at >= len(words):
        return Step(base, base)
    if is_text:
        return Step(base, base, command_in(words[at]))
    return Step(base, _script_name(words[at], base))


def command_in(text: str) -> tuple[str, ...]:
    """The first command of a shell's text that is more than a preparation; () if there is none."""
    import shlex

    lexer = shlex.shlex(text.replace("\n", ";"), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        tokens = [*lexer, ";"]
    except ValueError:  # a quotation that does not end
        return ()
    words: list[str] = []
    for token in tokens:
        if token.strip("();<>|&"):
            words.append(token)
            continue
        while words and (words[0] in _BEFORE_COMMAND or _is_assignment(words[0])):
            words.pop(0)
        if (
            words
            and words[0] not in _NO_COMMAND
            and words[1:2] not in (["activate"], ["deactivate"])
        ):
            return tuple(words)
        words = []
    return ()


def _is_assignment(word: str) -> bool:
    return word.partition("=")[0].isidentifier() and "=" in word


def _script(words: tuple[str, ...], at: int, base: str, program: str) -> Step:
    at, flags = _after_options(words, at, _SCRIPTS[program])
    if at >= len(words):
        return Step(program, base)
    if "no-python" in flags:
        return Step(program, base, words[at:], at)
    name = _module_name(words[at]) if flags & {"m", "module"} else _script_name(words[at], base)
    return Step(program, name)


def _wrapper(words: tuple[str, ...], at: int, base: str, program: str) -> Step:
    skipped, takes = _WRAPPERS[program]
    at, flags = _after_options(words, at, takes, whole_words=program == "mpirun")
    if program == "uv run" and flags & {"m", "module"}:
        return Step(program, _module_name(words[at]) if at < len(words) else base)
    while at < len(words) and program in ("env", "sudo") and "=" in words[at]:
        at += 1
    at += skipped
    if program.startswith("kubectl "):  # its options may come behind the pod
        at = words.index("--") + 1 if "--" in words else len(words)
    inner = words[at:]
    if program == "mpirun" and ":" in inner:
        inner = inner[: inner.index(":")]
    if program == "uv run" and inner and inner[0].endswith(".py"):
        return Step(program, _script_name(inner[0], base))
    if program in ("ssh", "tmux new-session", "screen") and len(inner) == 1:
        return Step(program, base, command_in(inner[0]))
    return Step(program, base, inner, at if inner else None)


def _after_options(
    words: Sequence[str], at: int, takes: str, *, whole_words: bool = False
) -> tuple[int, set[str]]:
    """Where the first word is that is no option, and which options without a value came before.

    `takes` says which options take a value (see above). With `whole_words` a single dash begins a
    word too, as mpirun has it, and not a row of letters.
    """
    others_take = takes.startswith("!")
    counts = {}
    for entry in takes.removeprefix("!").split():
        name, _, many = entry.partition("=")
        counts[name] = int(many or not others_take)
    flags: set[str] = set()
    while at < len(words) and words[at].startswith("-") and words[at] != "-":
        word = words[at]
        at += 1
        if word == "--":
            break
        if word.startswith("--") or whole_words:
            name, equals, _ = word.lstrip("-").partition("=")
            name = name.replace("_", "-")
            count = 0 if equals else counts.get(name, int(others_take))
            if not count:
                flags.add(name)
            at += count
            continue
        for i, letter in enumerate(word[1:], start=2):
            if counts.get(letter, int(others_take)):
                at += i == len(word)
                break
            flags.add(letter)
    return at, flags
