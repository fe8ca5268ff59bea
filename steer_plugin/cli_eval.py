"""`steer-plugin eval {pope, ohd, chair, mmsafety, vnia}`: thin over the Python calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steer_plugin.cli_data import Judging, folder_data, pairs_to_fit, pocket_data
from steer_plugin.cli_options import Given, refuse_unused
from steer_plugin.cli_pocket import say
from steer_plugin.cli_steering import load_steering
from steer_plugin.errors import InputError
from steer_plugin.intervention import Steerable
from steer_plugin.processes import Processes

if TYPE_CHECKING:
    from steer_plugin.evaluation.lineup import Lineup
    from steer_plugin.evaluation.strengths import Strengths

eval_app = typer.Typer(
    no_args_is_help=True,
    help="Evaluate steering methods on a benchmark, beside their controls.",
    epilog="Example: steer-plugin eval pope --data pocket --methods none,mean,l2s --out pope-out",
)

Out = Annotated[Path, typer.Option(help="Output folder; a run that was interrupted resumes in it.")]
Model = Annotated[str, typer.Option(help="'pocket', a model folder, or a hub id.")]
Device = Annotated[
    str | None, typer.Option(help="Where the model goes: cuda:1, cpu, or auto (over all GPUs); its own GPU without it.")
]
Data = Annotated[str, typer.Option(help="'pocket', or the folder of the data as it is published (docs/data.md).")]
_ALL = ("pope", "ohd", "chair", "mmsafety", "vnia")
_HELP = {
    "pope": "POPE: accuracy, F1, yes-ratio by subset; and the accuracy of the L2S paper under its own name.",
    "ohd": "OHD: POPE's questions on pictures of COCO, Flickr30K and nocaps.",
    "chair": "CHAIR: objects in captions that are not in the picture.",
    "mmsafety": "MM-SafetyBench: unsafe answers, experts deferred to, quality.",
    "vnia": "VNIA: captions in the spirit of a target prompt and against its converse.",
}
_PUBLISHED = {
    "pope": "--data POPE/output/coco --images val2014",
    "ohd": "--data ohd --images pictures",
    "chair": "--data coco --images val2014 --synonyms synonyms.txt",
    "mmsafety": "--data MM-SafetyBench --guard meta-llama/Llama-Guard-3-8B",
    "vnia": "--data vnia --images cc3m --judge MODEL",
}
# Which benchmarks an option is for; what is not listed is for all.
_FOR: Mapping[str, tuple[str, ...]] = {
    "images": ("pope", "ohd", "chair", "vnia"),
    "fitting": ("pope", "ohd"),
    "synonyms": ("chair",),
    "limit": ("chair",),
    "pairs": ("chair",),
    "part": ("ohd", "mmsafety", "vnia"),
    "preset": ("mmsafety",),
    "guard": ("mmsafety",),
    "judge": ("mmsafety", "vnia"),
    "judge_url": ("mmsafety", "vnia"),
    "judge_requests": ("mmsafety", "vnia"),
    "p_plus": ("pope", "ohd", "chair", "mmsafety"),
    "p_minus": ("pope", "ohd", "chair", "mmsafety"),
}


def _run(
    benchmark: str,
    out: Out = Path("eval-out"),
    model: Model = "pocket",
    device: Device = None,
    data: Data = "pocket",
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures; images/ in the data without it.")] = None,
    methods: Annotated[
        str, typer.Option(help="Some of none, prompt, norm_rnd, mean, mean_ba, l2s, p2s, actadd, steervlm.")
    ] = ("none,prompt"),
    steering: Annotated[list[Path] | None, typer.Option(help="Saved steering; several times for several.")] = None,
    write: Annotated[str | None, typer.Option(help="Site that fitted methods write at, as resid_post.14.")] = None,
    read: Annotated[str | None, typer.Option(help="Site of L2S's context; the written one without it.")] = None,
    positions: Annotated[str | None, typer.Option(help="Tokens they write on: paper, authors_code, ...")] = None,
    alpha: Annotated[
        str | None, typer.Option(help="Strength: a number, l2s=2,mean=1, or calibrate: chosen on validation items.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Bound of calibrate: KL to unsteered, nats per token; 0.5 without it.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Instruction of the prompt baseline.")] = None,
    p_plus: Annotated[str | None, typer.Option(help="Target prompt of SteerVLM.")] = None,
    p_minus: Annotated[str | None, typer.Option(help="Converse prompt of SteerVLM.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of fits and random directions, as 0,1,2.")] = "0",
    controls: Annotated[bool, typer.Option(help="Run swapped and random controls beside each method.")] = True,
    pictures: Annotated[int | None, typer.Option(help="Test pictures of the pocket world.")] = None,
    fitting: Annotated[
        float | None, typer.Option(help="Share of the pictures that are not tested: 0.4 where anything is steered.")
    ] = None,
    synonyms: Annotated[Path | None, typer.Option(help="CHAIR's list of synonyms; synonyms.txt in the data.")] = None,
    limit: Annotated[int | None, typer.Option(help="Pictures to caption, as the paper 500.")] = None,
    part: Annotated[bool, typer.Option(help="Take a part of the data; incomplete data is refused without it.")] = False,
    preset: Annotated[str | None, typer.Option(help="Contrastive suffixes: llava, or the L2S authors' qwen.")] = None,
    guard: Annotated[str | None, typer.Option(help="Guard model (folder or hub id) for P(unsafe).")] = None,
    judge: Annotated[str | None, typer.Option(help="Model of an OpenAI-compatible server that grades answers.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="That server; OPENAI_BASE_URL or OpenAI's without it.")] = None,
    judge_requests: Annotated[int, typer.Option(help="Most requests to spend on it.")] = 10_000,
    wording: Annotated[str | None, typer.Option(help="Ask in other words, as polite, quoted or typos.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Contrastive pairs to fit on: JSONL or CSV.")] = None,
    sample: Annotated[bool, typer.Option("--sample/--greedy", help="Draw the answers, or take the likeliest.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    costs: Annotated[int, typer.Option(help="Items that KL and perplexity are measured on; 0 for none.")] = 200,
    figures: Annotated[bool, typer.Option(help="Draw the figures.")] = True,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of questions, splits, draws and bootstrap.")] = 0,
) -> None:
    from steer_plugin.atomic import atomic_write_bytes
    from steer_plugin.evaluation.asking import AUTHORS_TOKENS, Sampling
    from steer_plugin.evaluation.evaluate import evaluate
    from steer_plugin.evaluation.recipes import against_published
    from steer_plugin.evaluation.wording import reworded_benchmark
    from steer_plugin.loading import load_model

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    pair = _pair(p_plus, p_minus)
    saved = _steerings(steering or [], packaged=model == "pocket" and "steervlm" in names, wanted="steervlm" in names)
    lineup = _lineup(names, saved, (write, read, positions), alpha, prompt, pair, seeds, controls)
    pocket = data == "pocket" and model == "pocket"
    calibrated = alpha == "calibrate" or (pocket and alpha is None)
    refuse_unused(Given(write, positions, max_kl, prompt, p_plus), lineup, calibrated=calibrated)
    judging = Judging(guard, judge, judge_url, judge_requests, out / "judge-cache")
    fits = any(name in ("mean", "mean_ba", "l2s", "p2s", "norm_rnd", "actadd") for name in names)
    if data == "pocket":
        folders = {
            "images": images,
            "synonyms": synonyms,
            "guard": guard,
            "judge": judge,
            "part": part or None,
            "pairs": pairs,
            "limit": limit,
            "preset": preset,
            "fitting": fitting,
            "judge-url": judge_url,
        }
        _refuse(folders, "is for data in a folder; the pocket world draws its own and knows the truth. Leave it out.")
    else:
        _refuse({"pictures": pictures}, "is for --data pocket; a folder is tested as it is split. Leave it out.")
    options: dict[str, object] = {
        "fitting": fitting if fitting is not None else 0.4 if fits or saved else 0.0, "synonyms": synonyms,
        "pictures": limit or 500, "whole": not part, "missing": "skip" if part else "error",
        "preset": preset or "llava", "seed": seed, "training": None if pairs is None else pairs_to_fit(pairs),
    }  # fmt: skip
    lineup, strengths = _usual(benchmark, lineup, alpha, positions, max_kl, pocket=pocket, calibrated=calibrated)
    opened = (
        pocket_data(benchmark, seed, pictures, fits)
        if data == "pocket"
        else folder_data(benchmark, Path(data), images, options, judging)
    )
    if wording is not None:
        opened = reworded_benchmark(opened, wording)
    lineup.check(opened)  # before a large model is loaded
    if sample and benchmark in ("pope", "ohd") and max_new_tokens is None:
        max_new_tokens = AUTHORS_TOKENS
    vlm = load_model(model, device)
    found = evaluate(
        vlm, opened, lineup, out, strengths=strengths, max_new_tokens=max_new_tokens, costed=costs,
        sampling=Sampling.as_authors(vlm, seed) if sample else None, batch_size=batch_size, seed=seed, figures=figures,
    )  # fmt: skip
    say(found.markdown())
    if len(found.scores) > 1 and (beside := against_published(found)) is not None:
        if Processes.current().main:
            atomic_write_bytes(out / "published.md", beside.markdown().encode())
        say(beside.markdown())
    say(f"written: {out / 'table.md'}, {out / 'metrics.json'}")


def _refuse(given: Mapping[str, object], why: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise InputError(f"--{name} {why}")


def _lineup(
    names: tuple[str, ...],
    steerings: Mapping[str, Steerable],
    where: tuple[str | None, str | None, str | None],
    alpha: str | None,
    prompt: str | None,
    pair: tuple[str, str] | None,
    seeds: str,
    controls: bool,
) -> Lineup:
    from steer_plugin.evaluation.lineup import Lineup, seeds_from

    write, read, positions = where
    strength, by_method = _alphas(alpha)
    return Lineup(
        methods=names, steerings=steerings, write=write, read=read, positions=positions or "paper", alpha=strength,
        alphas=by_method, prompt=prompt, pair=pair, seeds=seeds_from(seeds), controls=controls,
    )  # fmt: skip


def _alphas(text: str | None) -> tuple[float, dict[str, float]]:
    if text is None or text == "calibrate":
        return 1.0, {}
    try:
        if "=" not in text:
            return float(text), {}
        parts = [part.partition("=") for part in text.split(",")]
        return 1.0, {name.strip(): float(value) for name, _, value in parts}
    except ValueError as error:
        raise InputError(f"--alpha is {text!r}: expected a number, l2s=2,mean=1, or calibrate.") from error


def _usual(
    benchmark: str,
    lineup: Lineup,
    alpha: str | None,
    positions: str | None,
    max_kl: float | None,
    *,
    pocket: bool,
    calibrated: bool,
) -> tuple[Lineup, Strengths | None]:
    """On the pocket VLM sites, positions and strengths are known or chosen where none are given."""
    from dataclasses import replace

    from steer_plugin.demo.usual import USUAL
    from steer_plugin.evaluation.bounds import KLBound
    from steer_plugin.evaluation.lineup import FITTED, ORACLES
    from steer_plugin.evaluation.strengths import Strengths

    fits = [name for name in lineup.methods if name in (*FITTED, *ORACLES, "actadd")]
    if alpha is not None and not fits:
        raise InputError("--alpha is the strength of methods that are fitted here; a saved steering carries its own.")
    if lineup.read is not None and lineup.write is None:
        raise InputError(f"--read {lineup.read} without --write: give both sites.")
    layers: tuple[tuple[str, str], ...] = ()
    if pocket and fits and lineup.write is None:
        usual = USUAL[benchmark]
        layers, lineup = usual.layers, replace(lineup, positions=positions or usual.positions)
        lineup = replace(lineup, write=layers[0][0], read=layers[0][1])
    if not (calibrated and fits):
        return lineup, None
    return lineup, Strengths(KLBound() if max_kl is None else KLBound(max_kl), layers=layers)


def _steerings(paths: list[Path], *, packaged: bool, wanted: bool) -> dict[str, Steerable]:
    """Saved steerings by the names of their folders; the pocket VLM's own SteerVLM where none is given."""
    from steer_plugin.demo.usual import packaged_steervlm
    from steer_plugin.methods import SteerVLM

    found: dict[str, Steerable] = {}
    for path in paths:
        name = path.stem if path.suffix == ".pt" else path.resolve().name
        if name in found:
            raise InputError(f"two methods would be called {name!r}; rename the folder of one of the steerings.")
        found[name] = load_steering(path)
    modules = [name for name, one in found.items() if isinstance(one, SteerVLM)]
    if wanted and len(modules) == 1:
        found = {"steervlm" if name in modules else name: one for name, one in found.items()}
    if packaged and not any(isinstance(one, SteerVLM) for one in found.values()):
        found["steervlm"] = packaged_steervlm()
    return found


def _pair(p_plus: str | None, p_minus: str | None) -> tuple[str, str] | None:
    if (p_plus is None) != (p_minus is None):
        raise InputError("SteerVLM needs both prompts of its pair: give --p-plus and --p-minus.")
    return None if p_plus is None or p_minus is None else (p_plus, p_minus)


def _command(benchmark: str) -> Callable[..., None]:
    """The command of one benchmark: `_run` without the options of the others."""
    whole = inspect.signature(_run, eval_str=True)
    kept = [one for name, one in whole.parameters.items() if name != "benchmark" and benchmark in _FOR.get(name, _ALL)]

    @functools.wraps(_run)
    def command(**given: object) -> None:
        _run(benchmark, **given)  # pyright: ignore[reportArgumentType]

    command.__signature__ = whole.replace(parameters=kept)  # pyright: ignore[reportAttributeAccessIssue]
    methods = "none,prompt,steervlm" if benchmark == "vnia" else "none,prompt,mean,l2s"
    command.__doc__ = (
        f"{_HELP[benchmark]}\n\nA killed run goes on by the same command.\n\n"
        f"Example: steer-plugin eval {benchmark} --data pocket \\\n  --methods {methods} --out {benchmark}-out\n\n"
        f"On published data: steer-plugin eval {benchmark} --model llava-hf/llava-1.5-7b-hf \\\n"
        f"  {_PUBLISHED[benchmark]} --out {benchmark}-llava"
    )
    return command


for _name in _ALL:
    eval_app.command(_name)(_command(_name))
