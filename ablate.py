"""The paper's ablations, one command a table: trains the rows that are not done, measures them, prints the table.

    python ablate.py table7 --dataset ffhq --nproc 4           # stage 1: sigma_p, no condition, l2
    python ablate.py table8 --dataset ffhq --nproc 4           # stage 2: loss, dt, weights, solver; from out/ffhq_flow/ckpt.pt
    python ablate.py table11 --dataset ffhq_noisy --nproc 4    # stage 1 with noise: sigma_p
    python ablate.py table7 --data_dir DIR --model plain --image_size 64 --batch_size 16 --max_iters 3000    # small, on a CPU
    python ablate.py table8 --dataset ffhq --dry_run           # the settings of each row, and nothing else

Flags that this script does not know go to train_flow.py or distill.py, to every row alike. A row's folder is below --out_dir; when
the same command is given again, rows that are done are read, and one that was stopped goes on.
"""
import json
import subprocess
import sys
from pathlib import Path

from console import InputError, Parser, in_range

HERE = Path(__file__).parent


def distillation(solver="euler", dt="0.05", align="0", bc="0", loss="oftsr", batch="8"):
    """The flags of a row of Table 8, whose batch over all processes is 8 unless the row says otherwise."""
    return ["--loss", loss, "--solver", solver, "--dt", dt, "--lambda_align", align, "--lambda_bc", bc, "--batch_size", batch]


# Each table: its stage, and {row: flags}, in the paper's order.
TABLES = {
    "table7": ("flow", {**{f"sigma_p_{s}": ["--sigma_p", s] for s in ("0", "0.001", "0.01", "0.1", "0.2", "0.3", "0.5", "0.8", "1")},
                        "sigma_p_0.1_no_condition": ["--sigma_p", "0.1", "--no_condition"],
                        "sigma_p_0.1_l2": ["--sigma_p", "0.1", "--loss", "l2"]}),
    "table8": ("distill", {**{f"euler_dt{dt}": distillation(dt=dt) for dt in ("0.001", "0.01", "0.02", "0.05", "0.1")},
                           "boot": distillation(loss="boot"),
                           "pinn": distillation(loss="pinn"),
                           "euler_bc": distillation(bc="0.1"),
                           **{f"{solver}_bc_align": distillation(solver, align="0.01", bc="0.1") for solver in ("euler", "heun", "ralston", "midpoint")},
                           "midpoint_bc_align_batch32": distillation("midpoint", align="0.01", bc="0.1", batch="32")}),
    "table11": ("flow", {f"sigma_p_{s}": ["--sigma_p", s] for s in ("0", "0.1", "0.3", "0.5", "1")}),
}


def parse_args(argv):
    """(the flags below, the flags for the training script)."""
    p = Parser(description=__doc__)
    p.add_argument("table", choices=TABLES)
    p.add_argument("--dataset", default="photos", help="row of data.TASKS")
    p.add_argument("--data_dir", help="folder of pictures (default: data/DATASET)")
    p.add_argument("--teacher", help="table8: what is distilled (default: out/DATASET_flow/ckpt.pt)")
    p.add_argument("--out_dir", help="where the rows go (default: out/TABLE_DATASET)")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only")
    p.add_argument("--nproc", type=in_range(int, 1), default=1, help="processes, one a GPU")
    p.add_argument("--pictures", type=in_range(int, 0), default=0, help="validation pictures to measure; 0: all")
    p.add_argument("--seeds", type=in_range(int, 1), default=3, help="measure with the seeds 0 to SEEDS - 1")
    p.add_argument("--dry_run", action="store_true", help="print each row's settings and stop")
    args, rest = p.parse_known_args(argv)
    rows = TABLES[args.table][1]
    if unknown := [name for name in args.rows or () if name not in rows]:
        raise InputError(f"{args.table} has no row {unknown[0]!r}: it has {' '.join(rows)}")
    args.out_dir = Path(args.out_dir or f"out/{args.table}_{args.dataset}")
    return args, rest


def train_command(args, rest, name):
    """The command that trains a row, or goes on with it: a list of words. Flags of `rest` come last, so that they count."""
    stage, rows = TABLES[args.table]
    flags, out = list(rows[name]), args.out_dir / name
    if "--batch_size" in flags:  # the paper's is over all processes
        i = flags.index("--batch_size") + 1
        flags[i] = str(max(1, int(flags[i]) // args.nproc))
    flags += ["--dataset", args.dataset, "--out_dir", str(out), *(["--data_dir", args.data_dir] if args.data_dir else [])]
    if stage == "distill":
        flags += ["--teacher", args.teacher or f"out/{args.dataset}_flow/ckpt.pt"]
    if (out / "ckpt.pt").exists():
        flags += ["--init_from", "resume"]
    script = str(HERE / ("train_flow.py" if stage == "flow" else "distill.py"))
    start = [sys.executable, script] if args.nproc == 1 else [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(args.nproc), script]
    return [*start, *flags, *rest, *(["--dry_run"] if args.dry_run else [])]


def measure_command(args, name):
    """The command that measures a row into its scores.json: a flow by rk45, a student at t = 1."""
    how = ["--solver", "rk45"] if TABLES[args.table][0] == "flow" else ["--t", "1"]
    how += ["--metrics", "psnr_rgb,lpips,fid", *([] if args.dataset.startswith("photos") else ["--float_lr"])]  # the paper's low-resolution pictures are floats
    out = args.out_dir / name
    return [sys.executable, str(HERE / "evaluate.py"), "--ckpt", str(out / "ckpt.pt"), *how, "--pictures", str(args.pictures), "--seeds", str(args.seeds),
            *(["--data_dir", args.data_dir] if args.data_dir else []), "--out_dir", str(out / "eval"), "--json", str(out / "scores.json")]


def run(command):
    """Raises InputError if the command fails; what was wrong it has said itself."""
    print("$", " ".join(command[1:]), flush=True)
    if code := subprocess.run(command).returncode:
        raise InputError(f"stopped: the command above ended with {code}. Given again, this one goes on from there")


def line(name, path):
    """A row of the table, of what evaluate.py measured last into the file at path. Raises InputError if that is broken."""
    try:
        row = json.loads(path.read_text())["rows"][-1]
        cells = [f"{row['nfe']:.4g}", f"{row['psnr_rgb']:.2f}", *(f"{row[key]:.{digits}f}" for key, digits in (("lpips", 3), ("fid", 2)) if row.get(key) is not None)]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is broken: take it away, and the same command measures the row again") from None
    return f"| {name} | " + " | ".join(cells) + " |"


def main(argv=None):
    args, rest = parse_args(argv)
    names = args.rows or list(TABLES[args.table][1])
    lines = []
    for name in names:
        out = args.out_dir / name
        if args.dry_run or not (out / "weights.safetensors").exists():  # which is written at the end of a training
            run(train_command(args, rest, name))
        if args.dry_run:
            continue
        if not (out / "scores.json").exists():
            run(measure_command(args, name))
        lines.append(line(name, out / "scores.json"))
    if lines:
        print("\n| row | NFE | PSNR | LPIPS | FID |\n|---|---|---|---|---|" if lines[0].count("|") == 6 else "\n| row | NFE | PSNR | LPIPS |\n|---|---|---|---|")
        print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"ablate.py: {e}")
