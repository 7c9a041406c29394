"""`tarflow verify`: check that an engine computes a bundle correctly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tarflow_runtimes.cli.options import BundleArgument, Engine, EngineDir, Json, Tf32, load_options
from tarflow_runtimes.cli.shell import command, new_app, note, print_json

if TYPE_CHECKING:
    from tarflow_runtimes.bundle.tolerances import Record

app = new_app()


@command(app)
def verify(
    bundle: BundleArgument = None,
    *,
    engine: Engine = "cpu",
    tf32: Tf32 = False,
    engine_dir: EngineDir = None,
    as_json: Json = False,
) -> None:
    """Run an engine on the inputs stored in a bundle and compare with PyTorch's outputs, without PyTorch.

    The exit code is 1 if a tolerance is missed. The outcome is stored with TensorRT engines; failed ones are not used
    again.
    """
    import tarflow_runtimes as tfr
    from tarflow_runtimes.bundle.tolerances import require_passed
    from tarflow_runtimes.cli.progress import StepClock
    from tarflow_runtimes.measure.verify import verify as run_verification

    options = load_options(tf32=tf32, engine_dir=engine_dir)
    with tfr.load(bundle, engine=engine, **options) as flow, StepClock("verifying") as clock:
        blocks, precision = flow.config.blocks, flow.engine.precision
        records = run_verification(flow.bundle, flow.engine, on_block=lambda block: clock.show(block + 1, blocks))
        facts = {"bundle": str(flow.bundle.path), "digest": flow.bundle.digest}
        facts |= {"engine": flow.engine_name, "precision": precision}
        missed = [record.name for record in records if not record.passed]
        if facts["engine"] in {"trt", "trt-rtx"}:
            from tarflow_runtimes.engines.trt.engine import record_verification

            found = {"bundle": flow.bundle.digest, "comparisons": len(records), "missed": missed}
            record_verification(flow.engine, passed=not missed, facts=found)
    note(comparison_table(records))
    passed = not missed
    if as_json:
        listed = [record.to_json() for record in records]
        print_json(facts | {"passed": passed, "seconds": clock.seconds, "records": listed})
    require_passed(records)
    note(f"all {len(records)} comparisons passed on {facts['engine']}, {precision} ({clock.seconds:.1f} s)")


def comparison_table(records: Iterable[Record]) -> str:
    """One line per comparison: its name, the graph file, the measure with its value and bound, passed or failed."""
    header = ("comparison", "graph", "measure", "value", "tolerance", "")
    rows = [header] + [
        (
            record.name,
            record.graph or "-",
            record.measure,
            "not finite" if record.value is None else f"{record.value:.2e}",
            f"{record.tolerance:.2e}",
            "ok" if record.passed else "MISSED",
        )
        for record in records
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
