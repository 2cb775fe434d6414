"""`keepsight diagnose`: does this model lose its image, and is its memory really used?"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keepsight.checkpoints.atomic import try_folder
from keepsight.cli.common.console import Interrupted, check_device, out, quiet, refuse_twins, say, with_examples
from keepsight.cli.common.model import BUILT_IN, Adapters, Attention, Base, Device, Dtype, Images, Source
from keepsight.cli.common.progress import Progress, Waiting
from keepsight.data.mixture import for_evaluation, load_sources, mixture_of_words
from keepsight.data.tables.reading import COLUMNS_HELP, IGNORE_HELP, IMAGE_FOLDER_HELP
from keepsight.diagnose.settings import Settings
from keepsight.errors import KeepsightError, KeepsightWarning


@with_examples(
    ("the tiny model that is built in, on its own tasks; no download", "keepsight diagnose"),
    ("a memory (its base is found by itself) on the same tasks", "keepsight diagnose keepsight-demo/pvm"),
    (
        "any supported VLM: does it lose this image in a long answer?",
        "keepsight diagnose Qwen/Qwen3-VL-4B-Instruct -i photo.jpg --steps 2048 --every 8",
    ),
    (
        "a latent memory: when is it invoked on two data sets, and what do its latents hold?",
        "keepsight diagnose my-vismem -d charts.jsonl -d photos.jsonl",
    ),
    (
        "is a memory used? With references, against a LoRA trained on the same data",
        "keepsight diagnose my-memory --dataset questions.jsonl --control my-lora",
    ),
)
def diagnose(
    source: Source = BUILT_IN,
    adapter: Adapters = None,
    image: Images = None,
    video: Annotated[
        str | None, typer.Option(help="A video: an animated GIF or WebP, or a folder of frames in order of name.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", help="What to ask. Default: a long description that needs a look at every step."
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "--dataset",
            "-d",
            help="Questions with images and, if known, answers, of any format that training reads; repeat for several.",
        ),
    ] = None,
    columns: Annotated[list[str] | None, typer.Option(help=COLUMNS_HELP)] = None,
    ignore: Annotated[list[str] | None, typer.Option(help=IGNORE_HELP)] = None,
    image_folder: Annotated[Path | None, typer.Option(help=IMAGE_FOLDER_HELP)] = None,
    split: Annotated[str, typer.Option(help="Which split of the datasets, if they have several.")] = "train",
    steps: Annotated[int, typer.Option(help="Tokens to write for the curves.", min=1)] = Settings.steps,
    every: Annotated[
        int, typer.Option(help="Measure every n-th of them; 16 costs next to nothing.", min=1)
    ] = Settings.every,
    layers: Annotated[
        str, typer.Option(help="Layers to meter: auto (up to twelve), all, or indices: 8,16,24.")
    ] = "auto",
    samples: Annotated[
        int, typer.Option(help="At most so many samples for the causal table.", min=1)
    ] = Settings.samples,
    method: Annotated[
        Literal["auto", "PVM", "VisMem"],
        typer.Option(
            "--method", case_sensitive=False, help="Which memory to examine in a model that carries both; auto: PVM."
        ),
    ] = Settings.memory,
    memory: Annotated[
        Literal["auto", "PVM", "VisMem"] | None, typer.Option(hidden=True, help="--method as it was called before.")
    ] = None,
    kind: Annotated[
        Literal["auto", "short", "long"],
        typer.Option(help="VisMem: the type that is formed where text is only read; auto: as the model would."),
    ] = Settings.kind,
    probe_images: Annotated[
        int, typer.Option(help="VisMem: at most so many images for the probe of its latents.", min=1)
    ] = Settings.probe_images,
    out_dir: Annotated[
        str, typer.Option("--output-dir", "-o", help="Folder for report.html, results.json and the charts as SVG.")
    ] = "keepsight-diagnosis",
    control: Annotated[
        str | None, typer.Option(help="An adapter trained on the memory's data without its memory, to compare.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the written text. Default: 1 for the built-in model, else 0.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of noise, choices and sampling.")] = Settings.seed,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = None,
    attention: Attention = None,
) -> None:
    """Does this VLM lose its image, and is its memory really used? Works with and without a keepsight memory.

    Writes report.html (open it in a browser; it needs no network), results.json and the charts as SVG. Ctrl-C stops it
    and still writes what was measured.
    """
    from keepsight.checkpoints.load import load, load_checked, load_processor
    from keepsight.checkpoints.sources import check_sources

    chosen = _layers(layers)
    folder = _writable(out_dir)
    check_device(device)
    if dataset and (image or video or prompt):
        raise KeepsightError("--dataset brings its own images and prompts; leave --image, --video and --prompt out.")
    quiet()
    if not dataset and (columns or ignore or image_folder or split != "train"):
        raise KeepsightError("--columns, --ignore, --image-folder and --split say how --data is read; name some.")
    asked = for_evaluation(mixture_of_words(dataset, columns or (), ignore or (), image_folder)) if dataset else None
    base_name, infos = check_sources(source, adapter or [], base)
    processor = load_processor(base_name, infos)
    with Waiting("checking the questions"):
        sources = load_sources(asked, split)[0] if asked is not None else []
        given = _samples(image or [], video, prompt, sources, processor)
    refuse_twins(infos, "Leave one of them out.")
    with Waiting(f"loading {base_name}"):
        options: dict[str, Any] = {"dtype": dtype, "device": device, "attn_implementation": attention}
        model, _ = load_checked(base_name, infos, processor=processor, **options)
        other = None if control is None else load(control, base=base, **options)[0]
    from keepsight.checkpoints.adapters import trained_steps
    from keepsight.diagnose.results import Diagnosis
    from keepsight.diagnose.run import examine
    from keepsight.lab.cases import DigitGrids

    settings = Settings(
        steps=steps,
        every=every,
        layers=chosen,
        curves=1 if given else 4,
        samples=samples,
        memory=memory or method,
        kind=kind,
        probe_images=probe_images,
        temperature=temperature,
        seed=seed,
    )
    with Progress("the diagnosis", announce=True) as progress:
        found: Diagnosis = examine(model, processor, given, settings, other, progress, DigitGrids.of(processor))
    found.model["name"] = source
    info = next((info for info in infos if info.method == str(found.model["memory"]).upper()), None)
    if info is not None:
        found.model["steps"] = trained_steps(info.path)
    _write(found, folder)
    for line in found.headline:
        out.print(line, markup=False, highlight=False)
    say(f"report: {folder / 'report.html'}")
    if found.interrupted:
        raise Interrupted(f"stopped by Ctrl-C; what was measured is in {folder}")


def _layers(text: str) -> Any:
    if text in ("auto", "all"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise KeepsightError(f"--layers {text}: write auto, all, or indices such as 8,16,24.") from error


def _writable(name: str) -> Path:
    """The folder, which can be written to; it is made when there is something to write."""
    folder = Path(name).expanduser()
    if folder.exists() and not folder.is_dir():
        raise KeepsightError(f"-o {name} is a file; name a folder.")
    try:
        try_folder(folder)
    except OSError as error:
        raise KeepsightError(f"-o {name} cannot be written ({error.strerror}). Name another folder.") from error
    return folder


def _samples(
    images: list[str], video: str | None, prompt: str | None, datasets: list[Any], processor: Any
) -> list[Any]:
    from keepsight.data.images import open_image
    from keepsight.diagnose.cases import LONG_PROMPT, Sample, read_dataset

    if datasets:
        parts = [read_dataset(dataset, processor=processor) for dataset in datasets]
        # in turn, so that --samples takes as many of each
        return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
    if not images and video is None and prompt is None:
        return []
    if prompt is not None and not prompt.strip():
        raise KeepsightError("--prompt is empty; ask something, or leave it out for the built-in prompt.")
    if not images and video is None:
        warnings.warn(
            "A prompt without --image: there is nothing to look at, and little to diagnose.",
            KeepsightWarning,
            stacklevel=2,
        )
    opened = tuple(open_image(path) for path in images)
    return [Sample(prompt or LONG_PROMPT, opened, () if video is None else (_video(video),))]


def _video(name: str) -> Any:
    """Frames uint8 [F, H, W, 3] of an animated picture or a folder of pictures."""
    import numpy as np
    from PIL import Image, ImageSequence, UnidentifiedImageError

    from keepsight.data.images import open_image
    from keepsight.data.pixels import as_seen

    path = Path(name).expanduser()
    if path.is_dir():
        frames = [open_image(file) for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    elif not path.exists():
        raise KeepsightError(f"--video {name}: no such file or folder.")
    else:
        try:
            with Image.open(path) as moving:
                frames = [as_seen(frame.copy()) for frame in ImageSequence.Iterator(moving)]
        except UnidentifiedImageError as error:
            raise KeepsightError(
                f"--video {name}: not an animated GIF or WebP. Of other videos give a folder of frames, as "
                "`ffmpeg -i video.mp4 -r 2 frames/%04d.png` makes it."
            ) from error
    if len(frames) < 2:
        raise KeepsightError(f"--video {name} has {len(frames)} frames; a video needs two or more (see --image).")
    return np.stack([np.asarray(frame.resize(frames[0].size)) for frame in frames])


def _write(found: Any, folder: Path) -> None:
    """All files; a second Ctrl-C while writing still ends it."""
    from keepsight.diagnose.report import render_report, save_charts

    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder / "results.json")
    (folder / "report.html").write_text(render_report(found), encoding="utf-8")
    save_charts(found, folder)
