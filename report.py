"""A table of measurements as lines of text and as JSON, under the protocol that made it."""
import importlib.util
import json
import math
import sys

import torch

from console import atomic_write
from degradations import least_multiple
from metrics import HIGHER, METRICS
from model import count_macs


# The paper's tables: what they report of pairs, and of pictures without truth.
TABLES = {"realsr": (("psnr_rgb", "lpips", "fid_tf", "niqe", "musiq", "maniqa", "clipiqa"), ("niqe", "musiq", "maniqa", "clipiqa", "liqe"))}
PAPER = {"psnr_rgb": "PSNR", "lpips": "LPIPS", "fid_tf": "FID", "niqe": "NIQE", "musiq": "MUSIQ", "maniqa": "MANIQA", "clipiqa": "CLIPIQA", "liqe": "LIQE"}


def paper_table(title, rows, names):
    """Lines of the table as the paper's Tables 4 and 5 lay them out, in Markdown: a row a method, a column for each of `names`
    that was measured, the best **bold** and the second underlined."""
    names = [name for name in names if name in rows[0]]
    cells = [[method_name(row)] for row in rows]
    for name in names:
        values = sorted({row[name] for row in rows}, reverse=name in HIGHER)
        for row, line in zip(rows, cells):
            text, place = f"{row[name]:.{METRICS[name]}f}", values.index(row[name])
            line.append(f"**{text}**" if place == 0 else f"<u>{text}</u>" if place == 1 else text)
    head = [str(title), *(f"{PAPER[name]} ({'↑' if name in HIGHER else '↓'})" for name in names)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *cells))


def method_name(row):
    """A method with its number of steps, as the paper has it: Ours-15s, Ours-1s (t = 0.5)."""
    network = row["curve"].partition(",")[0] if row["curve"] else row["name"]
    return network + (f"-{row['nfe']:g}s" if row["nfe"] else "") + ("" if row["t"] is None else f" (t = {row['t']:g})")


def table_line(row, width, names):
    """One aligned line of the table: mean and spread of each metric; without a row, the heading."""
    if row is None:
        return f"{'':{width}} {'NFE':>5} " + " ".join(f"{name:>15}" for name in names) + f" {'s/picture':>10}"
    cells = []
    for name in names:
        mean, std, digits = row[name], row[f"{name}_std"], METRICS[name]
        cells.append(f"{mean:.{digits}f}" + (" " * (digits + 4) if std is None else f" ±{std:.{digits}f}"))
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.3f}"
    nfe = "-" if row["nfe"] is None else f"{row['nfe']:.4g}"
    return f"{row['name']:{width}} {nfe:>5} " + " ".join(f"{c:>15}" for c in cells) + f" {seconds:>10}"


def write_json(path, protocol, rows):
    """The table as strict JSON: what is infinite becomes the text "inf"."""
    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        return str(x) if isinstance(x, float) and not math.isfinite(x) else x

    text = json.dumps(plain(dict(protocol=protocol, rows=rows)), indent=1, allow_nan=False)
    atomic_write(path, lambda tmp: tmp.write_text(text + "\n"))


def how_degraded(task):
    strength = "drawn" if task.strength < 0 else f"{task.strength:g}"
    return f"real, strength {strength}," if task.degradation == "real" else task.degradation


def describe(networks, rows, bench, what, args, device):
    """The protocol: (dict, one line, a line for each network with its cost)."""
    task, parts = bench.task, []
    for n in networks:
        how = " ".join(r.name.removeprefix(f"{n.name}_") for r in rows if r.network is n) or "t sought"
        how += f" (rk45: rtol {args.rtol:g}, atol {args.atol:g}, {name_of_dtype(bench.rk45_dtype)})" if "rk45" in how else ""
        parts.append(dict(name=n.name, file=str(n.path), sha256=n.sha256, stage=n.stage, step=n.step, sigma_p=n.task.sigma_p, how=how,
                          trained_on=n.memory and dict(pictures=n.memory["train"], sha256=n.memory["sha256"]),
                          parameters=sum(p.numel() for p in n.net.parameters()), gmacs_256=count_macs(n.net, 256, 256) / 1e9,
                          gmacs_256_standard=count_macs(n.net, 256, 256, standard=True) / 1e9))
    how_made = f"{args.lr_dir or args.no_truth}'s own," if bench.low else how_degraded(task)
    cut = f"centre {task.image_size}" if task.crop == "center" and not bench.low else f"whole, to multiples of {least_multiple(task.scale)}"
    bits = "8 bits" if task.eight_bit else "float"
    protocol = dict(pictures=what, cut=cut, H=how_made, scale=task.scale, low_resolution=bits, sigma_n=task.sigma_n, seeds=list(range(args.seeds)),
                    networks=parts, methods=[f"{name}={folder}" for name, _, folder in args.methods], metrics=bench.metrics.notes,
                    dtype=name_of_dtype(bench.dtype), tile=args.tile, device=str(device), torch=torch.__version__)
    line = (f"{what} ({cut}), H {how_made} x{task.scale} in {bits}, sigma_n {task.sigma_n:g}, seeds {','.join(map(str, range(args.seeds)))}; "
            + "".join(f"{p['name']} = {p['file']} sha256 {p['sha256']}, sigma_p {p['sigma_p']:g}, {p['how']}; " for p in parts)
            + "".join(f"{method}; " for method in protocol["methods"]) + "".join(f"{text}; " for text in bench.metrics.notes)
            + f"{protocol['dtype']}, tile {args.tile}, {device}, torch {torch.__version__}")
    costs = [f"{p['name']}: {p['stage']}, step {'unknown' if p['step'] is None else p['step']}, {p['parameters']:,} parameters, "
             f"{p['gmacs_256']:.2f} GMACs an evaluation at 256x256 ({p['gmacs_256_standard']:.2f} GMACs, {2 * p['gmacs_256_standard']:.2f} GFLOPs in standard layers), "
             + (f"trained on {p['trained_on']['pictures']:,} pictures, list {p['trained_on']['sha256']}" if p["trained_on"] else "trained on an unknown list") for p in parts]
    return protocol, "\n".join([line, *costs])


def name_of_dtype(dtype):
    return str(dtype).removeprefix("torch.")


def peak_memory(device):
    """The most memory this process has held so far, GiB: on a GPU of its tensors, else of all; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if importlib.util.find_spec("resource") is None:  # Windows
        return None
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
