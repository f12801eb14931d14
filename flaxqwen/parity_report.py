"""What a parity run found: the numbers, their tolerances, a table for the terminal, JSON and a plot.

The reference is PyTorch in float32. In bfloat16, PyTorch's own bfloat16 is measured against it too: what a port may err
is what rounding costs anyway.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flaxqwen.files import replacing

if TYPE_CHECKING:
    from rich.console import RenderableType

Dtype = Literal["float32", "bfloat16"]
PRECISION = "highest"  # of jax's matrix products: TPUs and some GPUs take shortcuts by default

MAX_LOGIT_ERROR = 2e-5  # float32: of the largest |logit|
MAX_KL_RATIO = 1.2  # bfloat16: of PyTorch's own divergence from float32
CULPRIT_RATIO = 2.0  # bfloat16: a module that errs this many times as much as PyTorch's is named

AUDIO_KINDS = ("audio layer", "audio norm", "projector")
KINDS = ("embedding", *AUDIO_KINDS, "attention", "mlp", "residual", "final norm", "logits")


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the text they came from, if they did."""

    ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True)
class ModuleError:
    """How far one module's output is from PyTorch float32's, over the valid positions.

    name: the module's, as in the checkpoint; "logits" for the head's output.
    kind: one of KINDS; "residual" is the output of a whole layer, as "audio layer" is of the audio tower.
    layer: its number, or None.
    max_abs, rms_abs: max |error| and sqrt(mean error^2).
    max_rel, rms_rel: the same over max |reference| and sqrt(mean reference^2).
    """

    name: str
    kind: str
    layer: int | None
    max_abs: float
    rms_abs: float
    max_rel: float
    rms_rel: float


@dataclass(frozen=True)
class GreedyDifference:
    """Where a prompt's greedy continuation leaves PyTorch float32's.

    prompt: index of the prompt. step: 0 is the first new token. token: what came instead of reference_token.
    margin: the gap of PyTorch float32's two largest logits there.
    """

    prompt: int
    step: int
    reference_token: int
    token: int
    margin: float


@dataclass(frozen=True)
class Comparison:
    """One implementation against PyTorch float32.

    modules: in the order of execution.
    kl: KL(reference || this) of the next-token distribution at each of P positions, in nats, prompt by prompt.
    top1_agreement: the part of the positions where the most likely token is the same.
    differences: for each prompt whose greedy continuation differs, the first token that does.
    """

    modules: tuple[ModuleError, ...]
    kl: tuple[float, ...]
    top1_agreement: float
    differences: tuple[GreedyDifference, ...]

    @property
    def kl_mean(self) -> float:
        """Mean over positions, in nats."""
        return float(np.mean(self.kl))

    @property
    def kl_max(self) -> float:
        """The largest of all positions, in nats."""
        return float(np.max(self.kl))

    @property
    def first_difference(self) -> GreedyDifference | None:
        """The earliest greedy token that differs, of all prompts; None when all are equal."""
        return min(self.differences, key=lambda d: (d.step, d.prompt), default=None)


@dataclass(frozen=True)
class Check:
    """One tolerance: what is measured may not exceed its limit."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it holds; NaN never does."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Report:
    """What `compare` found.

    model: as it was named. dtype: of flaxqwen's weights and arithmetic.
    steps: greedy tokens per prompt. platform: of jax; PyTorch runs on the CPU.
    versions: of the libraries.
    ours: flaxqwen against PyTorch float32. pytorch: PyTorch bfloat16 against it, where dtype is bfloat16.
    """

    model: str
    dtype: Dtype
    prompts: tuple[Prompt, ...]
    steps: int
    platform: str
    versions: dict[str, str]
    ours: Comparison
    pytorch: Comparison | None

    @property
    def checks(self) -> tuple[Check, ...]:
        """The tolerances of the dtype."""
        if self.pytorch is not None:
            limit = MAX_KL_RATIO * self.pytorch.kl_mean
            name = f"mean KL <= {MAX_KL_RATIO} x that of PyTorch {self.dtype}"
            return (Check(name, self.ours.kl_mean, limit),)
        logits = self.ours.modules[-1]
        margin = max((d.margin for d in self.ours.differences), default=0.0)
        return (
            Check(f"max |logit error| <= {MAX_LOGIT_ERROR:g} x max |logit|", logits.max_rel, MAX_LOGIT_ERROR),
            Check("greedy tokens equal, or the top-2 margin within the logit error", margin, logits.max_abs),
        )

    @property
    def passed(self) -> bool:
        """Whether every tolerance holds."""
        return all(check.passed for check in self.checks)

    @property
    def first_divergent(self) -> str | None:
        """Of a report that does not pass, the first module in the order of execution that is off: where to look.

        Off is, in float32, an error past the tolerance of the logits; in bfloat16, past CULPRIT_RATIO x PyTorch's.
        """
        if self.passed:
            return None
        if self.pytorch is None:
            off = (m.name for m in self.ours.modules if not m.max_rel <= MAX_LOGIT_ERROR)
        else:
            pairs = zip(self.ours.modules, self.pytorch.modules, strict=True)
            off = (m.name for m, peer in pairs if not m.rms_rel <= CULPRIT_RATIO * peer.rms_rel)
        return next(off, None)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as what JSON holds; numbers that are not finite become None."""
        result = dataclasses.asdict(self)
        for name, comparison in (("ours", self.ours), ("pytorch", self.pytorch)):
            if comparison is not None:
                first = comparison.first_difference
                result[name] |= {"kl_mean": comparison.kl_mean, "kl_max": comparison.kl_max}
                result[name]["first_difference"] = first and dataclasses.asdict(first)
        result["reference"] = "PyTorch float32, eager attention"
        result["matmul_precision"] = PRECISION
        result["checks"] = [dataclasses.asdict(check) | {"passed": check.passed} for check in self.checks]
        result["passed"] = self.passed
        result["first_divergent"] = self.first_divergent
        return _finite(result)

    def table(self) -> RenderableType:
        """The report for a terminal, by rich: of each kind of module the worst layer, then the verdict."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        columns = ["module (its worst layer)", "max error", "RMS error", "max rel.", "RMS rel."]
        columns += [] if self.pytorch is None else ["PyTorch's"]
        modules = Table(*columns, box=None, pad_edge=False)
        for column in modules.columns[1:]:
            column.justify = "right"
        for name, error, peer in self._worst():
            numbers = [error.max_abs, error.rms_abs, error.max_rel, error.rms_rel]
            numbers += [] if peer is None else [peer.rms_rel]
            modules.add_row(name, *(f"{number:.2e}" for number in numbers))
        title = (
            f"[bold]flaxqwen {self.dtype} on {self.platform} against PyTorch float32[/bold]: {escape(self.model)}\n"
            f"{len(self.prompts)} prompts, {len(self.ours.kl)} positions, matmul precision {PRECISION}\n"
        )
        return Group(title, modules, "", *self._lines())

    def _worst(self) -> Iterator[tuple[str, ModuleError, ModuleError | None]]:
        """A row of the table for each kind: its label, the worst layer, and PyTorch's error of the same module."""
        peers = {} if self.pytorch is None else {m.name: m for m in self.pytorch.modules}
        for kind in KINDS:
            modules = [m for m in self.ours.modules if m.kind == kind]
            if not modules:  # of audio
                continue
            worst = max(modules, key=lambda m: math.inf if math.isnan(m.rms_rel) else m.rms_rel)
            label = kind if worst.layer is None else f"{kind} ({worst.layer})"
            yield label, worst, peers.get(worst.name)

    def _lines(self) -> Iterator[str]:
        """The rest of the table: next-token distributions, greedy tokens, tolerances."""
        for name, comparison in self._comparisons():
            yield (
                f"{name}: KL mean {comparison.kl_mean:.3e}, max {comparison.kl_max:.3e} nats; "
                f"top-1 agreement {comparison.top1_agreement:.2%}"
            )
            first = comparison.first_difference
            if first is None:
                yield f"  {self.steps} greedy tokens of every prompt are equal"
                continue
            yield (
                f"  greedy tokens differ in {len(comparison.differences)} of {len(self.prompts)} prompts, first in "
                f"prompt {first.prompt} at step {first.step}: {first.token} for {first.reference_token}, "
                f"where the top-2 margin is {first.margin:.2e}"
            )
        for check in self.checks:
            verdict = "[green]pass[/green]" if check.passed else "[red]FAIL[/red]"
            yield f"{verdict} {check.name}: {check.value:.3g} against {check.limit:.3g}"
        if self.first_divergent is not None:
            yield f"[red]look at {self.first_divergent}[/red], the first module that is off"

    def _comparisons(self) -> Iterator[tuple[str, Comparison]]:
        yield f"flaxqwen {self.dtype}", self.ours
        if self.pytorch is not None:
            yield f"PyTorch {self.dtype}", self.pytorch

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write report.json and parity.png into a folder, made if need be; each takes its place whole.

        Raises:
          ModuleNotFoundError: matplotlib is not installed; nothing is written.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        files = {"report.json": text.encode(), "parity.png": self._draw()}
        for name, data in files.items():
            with replacing(Path(folder, name)) as path:
                path.write_bytes(data)

    def _draw(self) -> bytes:
        """parity.png: the error of every module along the depth, and the KL at every position."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('the plot needs matplotlib: pip install "flaxqwen[plot]"') from error
        figure = Figure(figsize=(13, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        verdict = "pass" if self.passed else "FAIL"
        figure.suptitle(f"{self.model}: flaxqwen {self.dtype} against PyTorch float32 ({verdict})")
        depth, tokens = figure.subplots(1, 2, width_ratios=(3, 2))
        self._draw_modules(depth)
        self._draw_kl(tokens)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
        return file.getvalue()

    def _draw_modules(self, axes: Any) -> None:
        """Relative RMS error over the depth: a line per kind of module, PyTorch's dashed."""
        layers = 1 + max(m.layer for m in self.ours.modules if m.layer is not None)
        ends = {"embedding": -1, "final norm": layers, "logits": layers + 1}
        colors = {("attention",): "C0", ("mlp",): "C1", ("residual",): "C2", tuple(ends): "black"}
        labels = ["\nembedding", "norm", "\nlogits"]
        if any(m.kind in AUDIO_KINDS for m in self.ours.modules):
            colors |= {AUDIO_KINDS[:1]: "C4", AUDIO_KINDS[1:]: "C5"}
            ends |= {"audio norm": layers + 2, "projector": layers + 3}
            labels += ["audio norm", "\nprojector"]
        for (line, fill), (name, comparison) in zip((("-", "full"), ("--", "none")), self._comparisons(), strict=False):
            for kinds, color in colors.items():
                modules = [m for m in comparison.modules if m.kind in kinds]
                at, errors = [ends.get(m.kind, m.layer) for m in modules], _drawable(m.rms_rel for m in modules)
                style = {"linestyle": line, "marker": "."} if len(kinds) == 1 else {"linestyle": "", "marker": "D"}
                label = f"{', '.join(kinds)}: {name}"
                axes.plot(at, errors, color=color, fillstyle=fill, markersize=5, label=label, **style)
        axes.set_yscale(_scale(axes))
        if self.ours.modules[0].rms_rel == 0:
            axes.text(-1, 0.02, "exact", rotation=90, ha="center", transform=axes.get_xaxis_transform())
        ticks = range(0, layers, -(-layers // 8))
        axes.set_xticks([*ticks, *ends.values()], [*map(str, ticks), *labels])
        axes.set_xlim(-2, max(ends.values()) + 1)
        axes.set(xlabel="layer", ylabel="RMS error / RMS of the reference", title="Error of each module")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")

    def _draw_kl(self, axes: Any) -> None:
        """KL at every position, ours and PyTorch's, with their means."""
        for color, (name, comparison) in zip(("C3", "0.5"), self._comparisons(), strict=False):
            label = f"{name}: mean {comparison.kl_mean:.2e}, max {comparison.kl_max:.2e}"
            axes.plot(_drawable(comparison.kl), ".", markersize=4, color=color, label=label)
            axes.axhline(*_drawable([comparison.kl_mean]), color=color, linewidth=1)
        axes.set_yscale(_scale(axes))
        for start in np.cumsum([len(prompt.ids) for prompt in self.prompts[:-1]]):
            axes.axvline(start - 0.5, color="0.8", linewidth=1, zorder=0)
        axes.set(xlabel="position (a line where a prompt begins)", ylabel="KL from PyTorch float32 (nats)")
        axes.set_title(f"Next token: top-1 agreement {self.ours.top1_agreement:.1%}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def _drawable(values: Iterable[float]) -> list[float]:
    """Values for a log scale, with NaN, which is not drawn, in place of those that have no place on it."""
    return [value if 0 < value < math.inf else math.nan for value in values]


def _scale(axes: Any) -> str:
    """Logarithmic where anything is drawn; matplotlib cannot make a log scale of nothing."""
    return "log" if any(np.isfinite(line.get_ydata()).any() for line in axes.get_lines()) else "linear"


def _finite(value: Any) -> Any:
    """The value with None for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
