"""`tarflow doctor`: which engines are ready on this machine, and how to install what the others lack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from tarflow_runtimes.cli.options import EXPERIMENTAL, Json
from tarflow_runtimes.cli.shell import FAILED, command, new_app, note, print_json, printable

if TYPE_CHECKING:
    from tarflow_runtimes.doctor.facts import Facts, Module

app = new_app()

CPU_ENGINES = ("native", "ort-cpu")


@command(app)
def doctor(
    as_json: Json = False,
) -> None:
    """Report which engines are ready on this machine, and the commands that install what the others lack.

    Checks the driver, the GPUs, and the packages and libraries, each in a separate process. The exit code is 0 if an
    engine for the CPU, native or ort-cpu, is ready, else 1.
    """
    from tarflow_runtimes.doctor import choose, gather, verdicts, warnings

    facts = gather()
    found, (engine, reason), unfit = verdicts(facts), choose(facts), warnings(facts)
    engines = {
        name: {
            "ready": fault is None,
            "problem": fault and fault.problem,
            "remedy": fault and fault.remedy,
            "experimental": name in EXPERIMENTAL,
        }
        for name, fault in found.items()
    }
    if as_json:
        chosen = {"engine": engine, "reason": reason}
        print_json({"engines": engines, "auto": chosen, "warnings": unfit, "facts": facts.to_json()})
    else:
        _print_facts(facts)
        _print_engines(engines, engine)
        for warning in unfit:
            note(f"warning: {printable(warning)}")
    if all(found[name] is not None for name in CPU_ENGINES):
        raise typer.Exit(FAILED)


def _print_facts(facts: Facts) -> None:
    """One line per item: its name, and its version and file, or why it is missing."""
    from tarflow_runtimes.doctor.facts import file_name

    driver = facts.driver
    runs = "runs CUDA up to {}.{}".format(*driver.cuda)
    _line("system", f"{facts.system}, Python {facts.python}")
    _line("driver", f"none: {driver.problem}" if driver.problem else f"{driver.version or 'version unknown'}, {runs}")
    for index, gpu in enumerate(facts.gpus):
        free = "" if gpu.free is None else f", {_gigabytes(gpu.free)} free"
        _line(f"GPU {index}", f"{gpu.name}, {gpu.architecture}, {_gigabytes(gpu.memory)}{free}")
    if not facts.gpus:
        _line("GPUs", "none")
    for name, module in facts.modules.items():
        _line(name, _module_text(module))
        for path in module.libraries:
            _line("", path)
    if facts.provider.built:
        state = f"does not load: {facts.provider.problem}" if facts.provider.problem else "loads"
        _line("CUDA provider", f"of onnxruntime, for CUDA {facts.provider.cuda or 'of an unknown version'}, {state}")
    _line("native kernel", facts.native.kernel or f"none: {facts.native.problem}")
    for name, library in facts.libraries.items():
        _line(file_name(name), library.file or f"does not load: {library.problem}")


def _print_engines(engines: dict[str, Any], auto: str) -> None:
    """One line per engine, with the remedy on a separate line."""
    typer.echo()
    for name, verdict in engines.items():
        experimental = " (experimental)" * verdict["experimental"]
        _line(name, f"ready{experimental}" if verdict["ready"] else f"not ready{experimental}: {verdict['problem']}")
        if not verdict["ready"]:
            _line("", verdict["remedy"])
    _line("auto", f"takes {auto}" + ("" if engines[auto]["ready"] else ", which is not ready"))


def _module_text(module: Module) -> str:
    if module.problem:
        return f"does not import: {module.problem}"
    return f"{module.version}  {module.file}" if module.installed else "not installed"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _line(name: str, text: str) -> None:
    typer.echo(f"{name:<18}  {printable(text)}".rstrip())
