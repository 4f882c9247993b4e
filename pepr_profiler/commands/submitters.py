"""Commands that only submit work, which then runs as no child of ours and is not measured."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pepr_profiler.commands.programs import Step, steps_of
from pepr_profiler.errors import warning
from pepr_profiler.record import Record

_RUNNERS = ("docker", "podman", "nerdctl")
_OWN_CPU_S = {
    **dict.fromkeys(("srun", "sbatch", "qsub", "bsub", "condor_submit"), 0.3),
    **dict.fromkeys(("ssh", "systemd-run", "tmux", "screen"), 0.3),
    **dict.fromkeys(_RUNNERS, 1.0),
    "kubectl": 1.0,
    "ray job": 5.0,  # a program in Python, which imports much
}
"""CPU time that each takes at most by itself, s: what does more has done the work as our child. On
a slow machine srun and tmux took 0.02 s, docker and kubectl 0.1 s, `ray job submit` 2 s."""

_OWN_SHARE = 0.02
"""Of a long run it may be such a share of a core: some pass on the output of what they started."""

_IN_IMAGE = ", with pepr-profiler in the image"
_FROM_OUTSIDE = "; or from outside, while it runs: pepr-profile attach --container ID"
_WHERE = {
    "sbatch": "in the script: srun {profiler} CMD, or {profiler} CMD for what it runs itself",
    "qsub": "in the script: {profiler} CMD",
    "bsub": "bsub {profiler} CMD",
    "condor_submit": "in the submit file: executable = pepr-profile, arguments = -- CMD",
    "ssh": "ssh HOST {profiler} CMD",
    "systemd-run": "systemd-run {profiler} CMD",
    "tmux": "in tmux: {profiler} CMD",
    "screen": "in screen: {profiler} CMD",
    "kubectl": 'in the manifest: command: ["pepr-profile", "--", "CMD"]' + _IN_IMAGE,
    "ray job": "ray job submit -- {profiler} CMD",
}


class Submitter(Record):
    """A program of a command line that only submits work, and what to run instead."""

    name: str
    instead: str
    profiles: bool

    @classmethod
    def of(cls, command: Sequence[str], options: Sequence[str]) -> Submitter | None:
        """The outermost one of a command line, if there is one.

        `options` are those of pepr-profile, which what is to be run instead has too. `profiles`
        says that what it starts is wrapped already.
        """
        words = tuple(command)
        at = 0
        for step in steps_of(command):
            name = _name_of(step.program, words[at:])
            if name is not None:
                profiles = any(_is_profiler(word) for word in step.inner)
                profiler = ("pepr-profile", *_without_json(options), "--")
                return cls(name, _instead(words, at, step, name, profiler=profiler), profiles)
            if step.at is None:  # a shell's text: what it runs is to be replaced there
                words, at = step.inner, 0
            else:
                at += step.at
        return None

    def did_nothing(self, cpu_s: float, duration_s: float) -> bool:
        """Whether so little CPU time was used that the work was done elsewhere."""
        return cpu_s <= max(_OWN_CPU_S[self.name], _OWN_SHARE * duration_s)

    def warning(self, cpu_s: float, *, found_s: float, whole: bool) -> dict[str, str]:
        """What to warn of; the total is that of `whole` devices or of the command itself.

        `found_s` is the CPU time of what it started and was found on this machine.
        """
        total = f"the total is only what {self.name} itself took ({cpu_s:.2f} s of CPU time)"
        if found_s > 0:
            total = (
                f"the total has what was found of it here ({found_s:.2f} s of CPU time), and lacks "
            )
            total += "what runs on other machines or for less than some 0.3 s"
        if whole:
            total = "what it takes on other machines is not in the total"
        text = f"{self.name} starts its work elsewhere, not as a child of the profiler: {total}"
        return warning("submitted", text, self.instead)


def _is_profiler(word: str) -> bool:
    return "pepr-profile" in word or "pepr_profiler" in word


def _name_of(program: str, words: Sequence[str]) -> str | None:
    first = program.partition(" ")[0]
    if first == "ray":
        return "ray job" if words[1:2] == ("job",) else None
    return first if first in _OWN_CPU_S else None


def _instead(
    words: tuple[str, ...], at: int, step: Step, name: str, *, profiler: tuple[str, ...]
) -> str:
    """What is to be run instead of the program whose words begin at `at`, or how to write it."""
    if step.inner and step.at is not None:
        start = at + step.at
        line = shlex.join([*words[:start], *profiler, *words[start:]])
        return line + (_IN_IMAGE + _FROM_OUTSIDE if name in _RUNNERS else "")
    if step.inner:
        text = words[-1]
        if list(step.inner) != shlex.split(text):  # more than one command
            text = shlex.join(["sh", "-c", text])
        return shlex.join([*words[:-1], f"{shlex.join(profiler)} {text}"])
    where = _WHERE.get(name, f"{name} run IMAGE {{profiler}} CMD{_IN_IMAGE}{_FROM_OUTSIDE}")
    return where.format(profiler=shlex.join(profiler))


def _without_json(options: Sequence[str]) -> list[str]:
    """Each rank would write the same file."""
    kept: list[str] = []
    words = iter(options)
    for word in words:
        if word == "--json":
            next(words, None)
        elif not word.startswith("--json="):
            kept.append(word)
    return kept
