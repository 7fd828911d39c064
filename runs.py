"""Trainings as one sees them, from what their folders hold, also while they go on: log.jsonl as curves, validations as pictures.

    python runs.py out/photos_flow                                # where it stands, in a few lines
    python runs.py out/photos_flow --plot run.png                 # loss, loss by t, PSNR, LPIPS, learning rate, images/s
    python runs.py out/a out/b --plot both.png                    # several in one plot, and which settings tell them apart
    python runs.py out/photos_flow --pictures over_time.png       # validation pictures: x_lr, the result of each validation, x_1
"""
import importlib.util
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import figures
from console import InputError, Parser, check_file, duration, in_range, read_lines
from pictures import read_image, write_picture

OWN = {"out_dir", "init_from", "name", "eval_interval", "log_interval", "wandb", "tensorboard"}  # settings that make no other training
BAND = 18  # pixels above a row of pictures, for words


def parse_args(argv):
    p = Parser(description=__doc__)
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="out_dir of a training")
    p.add_argument("--plot", metavar="FILE", help="draw the curves there: .png, .pdf or .svg")
    p.add_argument("--pictures", metavar="FILE", help="put the validation pictures side by side there, .png")
    p.add_argument("--show", metavar="NAME", help="result to show in --pictures: one, few (of a flow), t0, t0.5, t1, teacher (of a student); default: few, t1")
    p.add_argument("--columns", type=in_range(int, 1), default=8, help="validations in --pictures, spread evenly when there were more (default: 8)")
    args = p.parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
        raise InputError(f"--plot {args.plot}: a plot is a .png, .pdf or .svg")
    if args.pictures and not args.pictures.endswith(".png"):
        raise InputError(f"--pictures {args.pictures}: pictures beside pictures are a .png")
    for file in filter(None, (args.plot, args.pictures)):
        check_file(file)
    return args


@dataclass
class Record:
    """A training as its folder tells it."""
    name: str
    folder: Path
    steps: list  # lines of the log about steps: dicts with step, loss ...
    looks: list  # and about validations: step, psnr_NAME, lpips_NAME
    starts: list  # of starts.jsonl: settings, code, versions and machine of each start


# --- what a folder holds ---


def read_run(folder):
    """The Record of a folder, which may be named by its log.jsonl. Raises InputError if no training has written there."""
    folder = Path(folder)
    folder = folder.parent if folder.name == "log.jsonl" else folder
    if not (folder / "log.jsonl").is_file():
        raise InputError(f"{folder} holds no log.jsonl: it is not the out_dir of a training")
    lines = [line for line in read_lines(folder / "log.jsonl") if isinstance(line.get("step"), int)]
    steps, looks = [line for line in lines if "loss" in line], [line for line in lines if "psnr_lr" in line]
    if not steps:
        raise InputError(f"{folder}/log.jsonl has no line of a step yet: there is nothing to see")
    starts = read_lines(folder / "starts.jsonl") if (folder / "starts.jsonl").is_file() else []
    return Record(folder.resolve().name, folder, steps, looks, starts)


def read_runs(folders):
    """The Records of several folders, under names that differ."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        run.name = str(run.folder) if names.count(run.name) > 1 else run.name
    return runs


def settings(run):
    """All that a run was told: its flags, and the cells of its task; {} of a run that has noted none."""
    return {**run.starts[-1]["settings"], **run.starts[-1]["task"]} if run.starts else {}


# --- in words ---


def describe(run):
    """Where a run stands, in lines."""
    told, speed = settings(run), recent(run, "images_per_s")
    step = max(line["step"] for line in (*run.steps[-1:], *run.looks[-1:]))
    lines = [f"{run.name}: step {step}" + (f" of {told['max_iters']}" if told else "") + f", loss {recent(run, 'loss'):.4g}, {speed:.1f} images/s"]
    if told and step < told["max_iters"] and speed:
        per_step = told["batch_size"] * told["gradient_accumulation_steps"] * told["world"]
        lines[0] += f", {duration((told['max_iters'] - step) * per_step / speed)} more at that speed"
    for name in sorted({key for look in run.looks for key in look if key[:5] in ("psnr_", "lpips")}, key=lambda key: (key[:4] != "psnr", key)):
        measured = [(look[name], look["step"]) for look in run.looks if name in look]
        best, at = (min if name.startswith("lpips") else max)(measured)
        digits = 4 if name.startswith("lpips") else 2
        lines.append(f"  {name} {measured[-1][0]:.{digits}f}" + (f", best {best:.{digits}f} at step {at}" if not name.endswith("_lr") else ""))
    for start in run.starts:
        machine = start["machine"]
        lines.append(f"  started {start['time']} from step {start['step']}: git {start['git']}, torch {start['versions']['torch']}, "
                     f"{machine['gpu'] or machine.get('cpu', 'CPU')}, {machine['processes']} process(es)")
    return "\n".join(lines)


def recent(run, name):
    """The mean of the last tenth of the lines."""
    values = [line[name] for line in run.steps if name in line]
    return statistics.fmean(values[-max(1, len(values) // 10):])


def apart(runs):
    """Which settings tell the runs apart, in lines."""
    told = {run.name: settings(run) for run in runs}
    keys = [key for key in dict.fromkeys(k for s in told.values() for k in s) if key not in OWN]
    return [f"{key}: " + ", ".join(f"{name} {s.get(key)}" for name, s in told.items()) for key in keys if len({str(s.get(key)) for s in told.values()}) > 1]


# --- in curves ---


def smooth(values, share=50):
    """The running mean over a fiftieth of all values, less at the beginning."""
    width = max(1, len(values) // share)
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - width)
    return (total[ends] - total[begins]) / (ends - begins)


def plot(path, runs):
    """Six panels over the updates; a colour a run, and where there is one run alone, a colour a curve."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    for number, run in enumerate(runs):
        draw(axes.flat, run, f"C{number}", alone=len(runs) == 1)
    for panel in axes.flat:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    figures.save(figure, path)


def draw(panels, run, colour, alone):
    """One run into the six panels."""
    loss, parts, psnr, lpips, rate, speed = panels
    for panel, name in ((loss, "loss"), (rate, "lr"), (speed, "images_per_s")):
        steps, values = zip(*((line["step"], line[name]) for line in run.steps))
        panel.set(xlabel="updates", ylabel={"lr": "learning rate", "images_per_s": "images/s"}.get(name, name))
        if name != "lr":
            panel.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        panel.plot(steps, smooth(values) if name != "lr" else values, color=colour, label=None if alone else run.name)
    loss.set_yscale("log")
    speed.set_ylim(bottom=0)
    (by_t if "loss_by_t" in run.steps[0] else by_part)(parts, run, colour, alone)
    for panel, measure in ((psnr, "psnr"), (lpips, "lpips")):
        panel.set(xlabel="updates", ylabel={"psnr": "PSNR in dB (up is better)", "lpips": "LPIPS (down is better)"}[measure])
        names = dict.fromkeys(key for look in run.looks for key in look if key.startswith(measure))
        for i, name in enumerate(names):
            steps, values = zip(*((look["step"], look[name]) for look in run.looks if name in look))
            label = name.partition("_")[2] if alone else f"{run.name} {name.partition('_')[2]}"
            if name.endswith("_lr"):  # what there is before any restoring: the same at every validation
                panel.axhline(values[-1], linestyle=":", color="black" if alone else colour, label=label)
            else:
                panel.plot(steps, values, ("o-", "s--", "^-.", "D:")[i % 4], markersize=4, **({} if alone else dict(color=colour)), label=label)


def by_t(panel, run, colour, alone):
    """Of a flow: the loss over t. Of one run alone as it was in each fifth of the training, from light to dark; else of each the last fifth."""
    rows = np.array([line["loss_by_t"] for line in run.steps])
    panel.set(xlabel="t", ylabel="loss by t" if alone else "loss by t, last fifth")
    fifths = [part for part in np.array_split(np.arange(len(rows)), 5) if len(part)]
    for i, part in enumerate(fifths if alone else fifths[-1:]):
        values = np.ma.masked_equal(rows[part], 0)  # 0: no picture of that t since the line before
        panel.plot((np.arange(10) + 0.5) / 10, values.mean(axis=0), "o-", markersize=3, color=colour, alpha=(i + 1) / len(fifths) if alone else 1,
                   label=f"to step {run.steps[part[-1]]['step']}" if alone else run.name)


def by_part(panel, run, colour, alone):
    """Of a student: the parts of its loss."""
    panel.set(xlabel="updates", ylabel="parts of the loss", yscale="log")
    names = [key for key in run.steps[0] if key not in ("step", "loss", "grad_norm", "lr", "images_per_s")]
    for i, name in enumerate(names):
        steps, values = zip(*((line["step"], line[name]) for line in run.steps))
        panel.plot(steps, smooth(values), ("-", "--", "-.", ":")[i % 4], **({} if alone else dict(color=colour)), label=name if alone else f"{run.name} {name}")


# --- in pictures ---


def over_time(run, show, columns):
    """The validation pictures of a run in rows: x_lr, what `show` was after each validation, x_1, under words. (H, W, 3) uint8. Raises InputError if there are none."""
    looks = [(look, run.folder / f"val_{look['step']:07d}.png") for look in run.looks]
    looks = [(look, path) for look, path in looks if path.is_file()]
    if not looks:
        raise InputError(f"{run.folder} holds no val_STEP.png of a validation yet")
    chosen = sorted({round(i) for i in np.linspace(len(looks) - 1, 0, min(columns, len(looks)))})  # the last in any case
    results = [key.removeprefix("psnr_") for key in looks[0][0] if key.startswith("psnr_")]
    show = show or next(name for name in ("few", "t1", results[-1]) if name in results)
    if show not in results:
        raise InputError(f"--show {show}: the validations of {run.folder} have {', '.join(results)}")
    place, across = results.index(show), []
    for i in chosen:
        look, path = looks[i]
        picture = read_image(path)
        side = picture.shape[1] // (len(results) + 1)  # training.look puts x_lr, the results and x_1 beside each other
        tiles = picture.reshape(len(picture), len(results) + 1, side, 3)
        measured = "".join(f", {name} {look[f'{name}_{show}']:.4g}" for name in ("psnr", "lpips") if f"{name}_{show}" in look)
        if not across:
            across.append(("x_lr", tiles[:, 0]))
        across.append((f"step {look['step']}{measured}", tiles[:, place]))
    across.append(("x_1", tiles[:, -1]))
    image = Image.fromarray(np.vstack([np.full((BAND, len(across) * side, 3), 255, np.uint8), np.hstack([tile for _, tile in across])]))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for i, (words, _) in enumerate(across):
        draw.text((i * side + 3, 2), f"{run.name} {show}" if i == 0 else words, "black", font)
    return np.asarray(image)


def main(argv=None):
    args = parse_args(argv)
    runs = read_runs(args.folders)
    print(*map(describe, runs), *apart(runs), sep="\n")
    if args.plot:
        plot(args.plot, runs)
    if args.pictures:
        bands = [over_time(run, args.show, args.columns) for run in runs]
        width = max(band.shape[1] for band in bands)
        write_picture(Path(args.pictures), np.vstack([np.pad(band, ((0, 0), (0, width - band.shape[1]), (0, 0)), constant_values=255) for band in bands]))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"runs.py: {e}")
