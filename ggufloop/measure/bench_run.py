"""A bench of a model file: what `ggufloop bench` prints, a record per test and way to run the model.

    plan = BenchPlan((Workload(prompt=512), Workload(generated=128)), (LoopSpec((12, 16), 3),), compare=True)
    for record in run_bench(path, plan):
        record["test"], record["avg_ts"], record["ratio"]

Records have llama-bench's field names where the field is the same. `row` gets each as it is measured, so that what is
there is not lost if the rest is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufloop.backend import library
from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import BackendError, UsageError
from ggufloop.files import file_sha256
from ggufloop.loop import LoopSpec
from ggufloop.measure import bench
from ggufloop.measure.bench import Child, Timed, Variant, Workload
from ggufloop.models.info import describe
from ggufloop.opening import check_loops, keywords
from ggufloop.progress import Progress, doing, note, silent

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

SCHEMA_VERSION = 1

BenchRecord = dict[str, Any]


@dataclass(frozen=True)
class BenchPlan:
    """What is measured.

    works, loops   every test under every loop; without loops the plain model
    stock          the unpatched llama.cpp
    compare        stock, plain and every loop in each round, and the time ratios
    repetitions    of each test; with compare, rounds
    warm           evaluate each test once before it is timed

    Raises UsageError for what says nothing.
    """

    works: tuple[Workload, ...]
    loops: tuple[LoopSpec, ...] = ()
    stock: bool = False
    compare: bool = False
    repetitions: int = 5
    warm: bool = True

    def __post_init__(self) -> None:
        if self.stock and self.loops and not self.compare:
            raise UsageError("the stock llama.cpp has no loops.", "leave out --window, or add --compare.")
        if self.compare and self.repetitions < 2:
            raise UsageError("--compare needs -r 2 or more: one round has no interval.", "-r 6 is the least for 95 %.")

    @property
    def context(self) -> int:
        """Tokens of context the largest test needs."""
        return max(work.context for work in self.works)

    def check_context(self, n_ctx: int) -> None:
        """Raise UsageError if a test needs more than n_ctx tokens."""
        work = max(self.works, key=lambda w: w.context)
        if work.context > n_ctx:
            raise UsageError(
                f"test {work} needs {work.context} tokens of context, which has {n_ctx}.",
                "leave out -c, which then is what the tests need, or give smaller tests.",
            )

    def variants(self, over_rpc: bool = False, progress: Progress = silent) -> list[Variant]:
        """The ways to run the model, in the order of the rows. Raises UsageError, BackendError."""
        if not self.compare:
            return [Variant(loop) for loop in self.loops] or [Variant(None, self.stock)]
        required = self.stock or not self.loops
        if over_rpc and required:
            raise UsageError(
                "the stock library cannot be compared over RPC: a server has one client at a time.",
                "leave out --rpc, or measure it alone: --stock without --compare.",
            )
        if over_rpc:
            note(progress, "the stock library is left out: an RPC server has one client at a time.")
        with_stock = not over_rpc and _has_stock(required, progress)
        return [*([Variant(None, True)] if with_stock else []), Variant(), *(Variant(loop) for loop in self.loops)]


def _has_stock(required: bool, progress: Progress) -> bool:
    """Whether there is a stock library to compare with. Raises BackendError if there must be."""
    try:
        library.locate(stock=True)
    except BackendError as e:
        if required:
            raise
        note(progress, f"the stock library is left out: {e.message} ({e.hint})")
        return False
    return True


def run_bench(
    path: Path,
    plan: BenchPlan,
    settings: ContextSettings | None = None,
    *,
    variants: Sequence[Variant] | None = None,
    hashed: bool = True,
    verbose: bool = False,
    begun: Callable[[BenchRecord], None] = lambda constant: None,
    row: Callable[[BenchRecord], None] = lambda record: None,
    progress: Progress = silent,
) -> list[BenchRecord]:
    """Measure the model, and return a record per test and variant.

    settings: n_ctx is what the tests need if it is None. variants: plan.variants(...), if somebody asked already.
    hashed: whether records have the file's sha256, which takes a while. begun: gets what is the same in every record,
    before anything is measured. Raises UsageError, GgufloopError, BackendError.
    """
    settings = settings or ContextSettings()
    variants = variants or plan.variants(bool(settings.rpc_servers), progress)
    check_loops(path, plan.loops)
    if settings.n_ctx is None:
        settings = replace(settings, n_ctx=plan.context)
    settings.check_memory([path], plan.loops)
    given = keywords(path, settings, progress) | {"swa_full": False}  # as llama-bench
    plan.check_context(given["n_ctx"])
    loaded = library.activate(stock=plan.stock and not plan.compare)
    from ggufloop.engine import LoopedLlama

    records: list[BenchRecord] = []

    def keep(record: BenchRecord) -> None:
        records.append(record)
        row(record)

    with ExitStack() as stack:
        with doing(progress, f"loading {path.name} ..."):
            llm = LoopedLlama(path, verbose=verbose, **given)
            stack.callback(llm.close)
            for loop in plan.loops:
                llm.set_loop(loop)  # what only the loaded model can refuse is refused before anything is measured
            child = None
            if plan.compare and variants[0].stock:
                child = stack.enter_context(Child(path, True, given))
        shown = given | {"cache_type_k": settings.type_k, "cache_type_v": settings.type_v}
        constant = _constant(llm, path, loaded, shown) | {"model_sha256": file_sha256(path) if hashed else None}
        begun(constant)

        def run(variant: Variant, work: Workload, repetition: int, warm: bool = True) -> int:
            with doing(progress, f"{work}: {variant}, {repetition + 1} of {plan.repetitions} ..."):
                warm = warm and plan.warm
                if variant.stock and child is not None:
                    return child.run(work, None, repetition, warm).ns
                return bench.sample(llm, work, variant.loop, repetition, warm)

        for work in plan.works if plan.compare else ():
            results = bench.compare(variants, work, plan.repetitions, run)
            for result in results:
                keep(compared(constant, result, results, llm.n_layer(), path))
        for variant in () if plan.compare else variants:
            for work in plan.works:
                samples = tuple(run(variant, work, i, warm=i == 0) for i in range(plan.repetitions))
                keep(record(constant, Timed(variant, work, samples, bench.now())))
    return records


def _constant(llm: LoopedLlama, path: Path, loaded: library.Backend, flags: BenchRecord) -> BenchRecord:
    """What is the same in every record."""
    info = describe(path)
    return {
        "schema_version": SCHEMA_VERSION,
        "build_commit": library.LLAMA_CPP_COMMIT,
        "patch_id": loaded.patch_id or None,
        "backends": bench.backends(loaded.directory, llm.devices),
        "model_filename": str(path),
        "model_sha256": None,
        "model_type": llm.model_type(),
        "model_size": info.weight_bytes,
        "model_n_params": info.elements,
        "n_batch": flags["n_batch"],
        "n_ubatch": flags["n_ubatch"],
        "n_threads": flags["n_threads"],
        "type_k": flags["cache_type_k"],
        "type_v": flags["cache_type_v"],
        "n_gpu_layers": flags["n_gpu_layers"],
        "flash_attn": flags["flash_attn"],
        "repack": flags["repack"],
        "seed": bench.SEED,
    }


def record(constant: BenchRecord, result: Timed) -> BenchRecord:
    """One row, all of it."""
    loop, work = result.variant.loop, result.work
    return {
        **constant,
        "library": "stock" if result.variant.stock else "patched",
        "patch_id": None if result.variant.stock else constant["patch_id"],
        "window": None if loop is None else f"{loop.window[0]}:{loop.window[1]}",
        "k": None if loop is None else loop.k,
        "kv": None if loop is None else loop.kv,
        "loop": None if loop is None else str(loop),
        "test": str(work),
        "n_prompt": work.prompt,
        "n_gen": work.generated,
        "n_depth": work.depth,
        "test_time": result.time,
        "n": len(result.samples_ns),
        "avg_ns": result.mean_ns,
        "stddev_ns": result.stdev_ns,
        "avg_ts": result.mean_ts,
        "stddev_ts": result.stdev_ts,
        "samples_ns": list(result.samples_ns),
        "samples_ts": result.samples_ts,
    }


def compared(constant: BenchRecord, result: Timed, results: list[Timed], n_layer: int, path: Path) -> BenchRecord:
    """A row of --compare: looped over plain, plain over stock, and what a loop should cost."""
    loop = result.variant.loop
    base = (
        None if result.variant.stock else next((r for r in results if r.variant == Variant(None, loop is None)), None)
    )
    found = None if base is None else bench.ratio(result, base)
    layers = weights = None
    if loop is not None:
        layers = bench.predicted(result.work, loop, loop.relative_cost(n_layer))
        if not result.work.prompt:  # of a prompt only the last token meets the output matrix
            weights = bench.predicted(result.work, loop, bench.weight_cost(path, loop))
    return record(constant, result) | {
        "over": None if base is None else str(base.variant),
        "ratio": None if found is None else found.mean,
        "ratio_low": None if found is None else found.low,
        "ratio_high": None if found is None else found.high,
        "ratio_level": None if found is None else found.level,
        "predicted_layers": layers,
        "predicted_weights": weights,
    }
