"""What is measured of restored pictures: one function a metric, and what it needs found on this machine.

    psnr_rgb, psnr_y, ssim_y     arithmetic, against the true picture
    lpips, dists                 a network's opinion, against the true picture
    consistency                  against the low-resolution picture: PSNR of H(restored)
    niqe                         no true picture: statistics of good photographs (niqe.py)
    musiq, maniqa, clipiqa, liqe no true picture: pyiqa's (pip install -e '.[iqa]')
    fid, fid_tf, fd_vgg16        all restored pictures against all true ones: Fréchet distances of features

`pick_metrics` makes a Metrics of those that a run measures; `measure` reads two files and goes through it, `measure_sets`
two lists of files. A network that is not on this machine is named with the place where it is sought, and its column left
out: nothing is downloaded unasked.
"""
import importlib.util
import os
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoints import load_checkpoint
from console import InputError
from degradations import H, to_float
from folders import note
from niqe import niqe
from pictures import read_image

METRICS = {"psnr_rgb": 3, "psnr_y": 3, "ssim_y": 4, "lpips": 4, "consistency": 2, "dists": 4, "niqe": 3, "musiq": 2, "maniqa": 4, "clipiqa": 4, "liqe": 3,
           "fid": 2, "fid_tf": 2, "fd_vgg16": 3}  # decimals
USUAL = ("psnr_rgb", "psnr_y", "ssim_y", "lpips")
PYIQA = ("dists", "musiq", "maniqa", "clipiqa", "liqe")  # of these dists has the true picture beside it
HIGHER = {"psnr_rgb", "psnr_y", "ssim_y", "consistency", "musiq", "maniqa", "clipiqa", "liqe"}  # is better; of the others lower
ALONE = {"consistency", "niqe", "musiq", "maniqa", "clipiqa", "liqe"}  # need no true picture
FID_MODES = {"fid": "clean", "fid_tf": "legacy_tensorflow"}  # clean-fid's names; the second is the published repository's
WINDOW = 11  # side of SSIM's
FEW = 2048  # pictures: fewer than Inception has features, and the FID is of that number's own kind


# --- arithmetic. PSNR and SSIM are of float64, which mps has not: they are for the CPU ---


def psnr_rgb(a, b):
    """PSNR in dB of each picture over all of its pixels and channels: a, b (B, 3, H, W) uint8 -> (B,) float64, inf if equal."""
    return _psnr(a.cpu().double(), b.cpu().double())


def psnr_y(a, b, crop):
    """PSNR in dB of the luma, without `crop` pixels at each border: a, b (B, 3, H, W) uint8 -> (B,) float64, inf if equal."""
    return _psnr(luma(a, crop), luma(b, crop))


def _psnr(a, b):
    return 10 * torch.log10(255**2 / (a - b).square().mean(dim=(1, 2, 3)))


def luma(x, crop=0):
    """BT.601 luma in the limited range 16 to 235, not rounded, less `crop` pixels at each border: uint8 (B, 3, H, W) -> (B, 1, h, w) float64.

    The range is the super-resolution literature's; in the full range every PSNR reads 20 log10(255/219) = 1.3219 dB lower.
    """
    x = x[..., crop : x.shape[-2] - crop, crop : x.shape[-1] - crop].cpu().double() / 255
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)
    return (x * weights.view(3, 1, 1)).sum(dim=1, keepdim=True) + 16


def ssim_y(a, b, crop):
    """SSIM of the luma (Wang et al. 2004) without `crop` pixels at each border: a, b (B, 3, H, W) uint8 -> (B,) float64.

    11x11 Gaussian of deviation 1.5, K1 .01, K2 .03, range 255, the mean over where the window fits.
    Raises ValueError when it fits nowhere.
    """
    if min(a.shape[-2:]) < WINDOW + 2 * crop:
        raise ValueError(f"{a.shape[-2]} x {a.shape[-1]} less {crop} at each border is smaller than SSIM's {WINDOW} x {WINDOW} window")
    g = torch.exp(-(torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2 / (2 * 1.5**2))
    g = (g / g.sum()).view(1, 1, WINDOW, 1)

    def mean(x):  # the Gaussian is separable: columns, then rows
        return F.conv2d(F.conv2d(x, g), g.mT)

    a, b = luma(a, crop), luma(b, crop)
    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    s = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return s.mean(dim=(1, 2, 3))


def consistency(a, y, task):
    """PSNR in dB of H(a) against y, the low-resolution picture that a was restored from: a (B, 3, H, W) uint8, y (B, 3, h, w) in [-1, 1] -> (B,).

    How far a restored picture explains what was measured; noise in y bounds it. For the real world's degradation H is the bicubic reduction.
    """
    low = H(to_float(a).double(), task.degradation if task.degradation == "avgpool" else "bicubic", task.scale)
    return _psnr(low * 127.5, y.cpu().double() * 127.5)


def frechet_distance(a, b):
    """Fréchet distance of the Gaussians fitted to two sets of features, (N, D) and (M, D) float64: a number, at least 0.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). With S = X^T X / (N - 1) of the centred features X, the last trace is
    the sum of the singular values of X_a X_b^T / sqrt((N-1)(M-1)): no root of a matrix, and exact for few pictures too.
    """
    mu = a.mean(0) - b.mean(0)
    x, y = ((f - f.mean(0)) / max(1, len(f) - 1) ** 0.5 for f in (a, b))
    if min(len(x), len(y)) > x.shape[1]:  # the triangular factors have the same covariances, and D rows
        x, y = np.linalg.qr(x, mode="r"), np.linalg.qr(y, mode="r")
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return max(0.0, float(mu @ mu + (x * x).sum() + (y * y).sum() - 2 * cross))


# --- networks: found on this machine, never downloaded ---


class Missing(Exception):
    """What a metric needs is not on this machine. The message is a clause that says what, and where it is sought."""


@dataclass
class Backbone:
    what: str
    variable: str  # of the environment, that names a file
    flag: str
    pattern: str  # of the file in torch's cache
    get: str  # what a user runs to have it there


def torchvision_get(name):
    return f"python -c \"import torchvision; torchvision.models.{name}(weights='DEFAULT')\" puts it there"


BACKBONES = {
    "lpips": Backbone("AlexNet", "OFTSR_LPIPS_ALEX", "--lpips_backbone", "alexnet-owt-*.pth", torchvision_get("alexnet")),
    "vgg16": Backbone("VGG16", "OFTSR_VGG16", "--vgg_backbone", "vgg16-*.pth", torchvision_get("vgg16")),
    "inception": Backbone("Inception", "OFTSR_INCEPTION", "--inception", "inception-2015-12-05.pt",
                          "clean-fid's check_download_inception(FOLDER) fetches it"),
}


def find_weights(kind, file=None):
    """The file of a backbone: the one named, else the one its variable names, else the one in torch's cache. Raises Missing or InputError."""
    b, folder = BACKBONES[kind], Path(torch.hub.get_dir(), "checkpoints")
    named = file or os.environ.get(b.variable)
    found = [Path(named)] if named else sorted(folder.glob(b.pattern))
    if not found:
        raise Missing(f"no {b.what} ({b.pattern}) in {folder}: {b.get}, or name a file by {b.flag} or {b.variable}")
    if not found[0].is_file():
        raise InputError(f"no {b.what} weights at {found[0]}")
    return found[0]


def read_features(kind, file, layers):
    """Fill the parameters layers {name: tensor} with torchvision's convolutions from a file. Raises InputError if it does not hold them."""
    features = {str(k).removeprefix("features."): v for k, v in load_checkpoint(file).items() if not str(k).startswith("classifier.")}
    if features.keys() != layers.keys() or not all(torch.is_tensor(features[k]) and features[k].shape == p.shape for k, p in layers.items()):
        raise InputError(f"{file} does not hold torchvision's {BACKBONES[kind].what} features")
    for name, p in layers.items():
        p.data.copy_(features[name])


def load_lpips(backbone=None, device="cpu"):
    """LPIPS v0.1 with AlexNet: a function of two (B, 3, H, W) in [-1, 1] to (B,), or None, said in one line, when no AlexNet is found.

    backbone: a file of torchvision's AlexNet weights; else as find_weights. Raises InputError when the file named is not
    there or not an AlexNet.
    """
    try:
        file = find_weights("lpips", backbone)
    except Missing as e:
        note(f"LPIPS is left out: {e}")
        return None
    import lpips
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's advice about arguments that lpips passes
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    read_features("lpips", file, {name: p for part in (metric.net.slice1, metric.net.slice2, metric.net.slice3, metric.net.slice4, metric.net.slice5)
                                  for name, p in part.named_parameters()})
    metric.to(device)

    def distance(a, b):
        # Metrics in float32, on a GPU too, and whatever the caller's autocast is.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(a.device.type, enabled=False):
            return metric(a.float(), b.float()).flatten()
    return distance


def load_vgg16(file, device):
    """Features for a Fréchet distance: a function of a list of picture files to (N, 512) float64: the mean of VGG16's last convolutions, at the pictures' own size."""
    import torchvision
    net = torchvision.models.vgg16(weights=None).features[:30]  # up to relu5_3
    read_features("vgg16", find_weights("vgg16", file), dict(net.named_parameters()))
    net.eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def features(files):
        rows = []
        for f in files:
            x = torch.from_numpy(read_image(f)).permute(2, 0, 1)[None].to(device).float() / 255
            rows.append(net((x - mean) / std).mean(dim=(2, 3))[0].double().cpu().numpy())
        return np.stack(rows)
    return features


def load_inception(file, mode, device):
    """clean-fid's features: a function of a list of picture files to (N, 2048) float64. mode: "clean" or "legacy_tensorflow". Raises Missing or InputError."""
    if importlib.util.find_spec("cleanfid") is None:
        raise Missing("it needs clean-fid: pip install -e '.[iqa]'")
    path = find_weights("inception", file)
    if path.name != BACKBONES["inception"].pattern:
        raise InputError(f"{path} should be called {BACKBONES['inception'].pattern}, as clean-fid calls it")
    from cleanfid.fid import get_files_features
    from cleanfid.inception_torchscript import InceptionV3W
    try:
        net = InceptionV3W(str(path.parent), download=False, resize_inside=mode == "legacy_tensorflow").to(device).eval()
    except RuntimeError as e:
        raise InputError(f"{path} is not the TorchScript Inception of clean-fid: {str(e).strip().splitlines()[0]}") from None
    # One after the other where sizes differ: legacy_tensorflow resizes inside the network, and stacks before it.
    batch = 1 if mode == "legacy_tensorflow" else 32
    return lambda files: get_files_features([str(f) for f in files], net, num_workers=0, batch_size=batch, device=torch.device(device), mode=mode, verbose=False).astype(np.float64)


@contextmanager
def offline():
    """Whatever wants to download raises Missing, which says what file it wanted and where it looked for it."""
    import urllib.request

    import pyiqa.utils.download_util as pyiqa_files
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError
    from timm.models import _hub as timm_files

    def refuse(url, dst=None, *args, **kwargs):
        url = getattr(url, "full_url", url)
        file = Path(dst or Path(torch.hub.get_dir(), "clip", str(url).rsplit("/", 1)[-1]))  # CLIP's loader opens the address itself
        raise Missing(f"no {file.name} in {file.parent} (from {url})")

    def look_up(repo_id, filename, **kwargs):  # in huggingface_hub's cache, which does not say what it lacks
        try:
            return download(repo_id, filename, **kwargs)
        except LocalEntryNotFoundError:
            raise LocalEntryNotFoundError(f"no {filename} of {repo_id} in {HF_HUB_CACHE}") from None

    download = timm_files.hf_hub_download
    replaced = [(torch.hub, "download_url_to_file", refuse), (pyiqa_files, "download_url_to_file", refuse), (urllib.request, "urlopen", refuse),
                (urllib.request, "urlretrieve", refuse), (timm_files, "hf_hub_download", look_up)]
    kept = [getattr(module, name) for module, name, _ in replaced]
    for module, name, function in replaced:
        setattr(module, name, function)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # where "Downloading" is announced
            yield
    finally:
        for (module, name, _), function in zip(replaced, kept):
            setattr(module, name, function)


def load_pyiqa(name, device):
    """A metric of pyiqa: a function of restored and true pictures (B, 3, H, W) in [0, 1] to (B,). Raises Missing."""
    if importlib.util.find_spec("pyiqa") is None:
        raise Missing("it needs pyiqa: pip install -e '.[iqa]'")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
    import pyiqa
    try:
        with offline(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric = pyiqa.create_metric(name, device=torch.device(device))
    except Missing:
        raise
    except OSError as e:  # huggingface_hub's: not in its cache, and offline
        raise Missing(str(e).strip().splitlines()[0]) from None
    except ImportError as e:  # of what pyiqa itself imports when a metric is made
        cure = ": pip install 'setuptools<81'" if e.name == "pkg_resources" else ""
        raise Missing(f"pyiqa wants the module {e.name}, which is not here{cure}") from None
    return (lambda a, b: metric(a, b).flatten()) if metric.metric_mode == "FR" else (lambda a, b: metric(a).flatten())


# --- what a run measures ---


@dataclass
class Metrics:
    """What a run measures. pictures: {name: function of restored, true (B, 3, H, W) uint8 -> (B,)}; sets: {name: features of a list of files}."""
    pictures: dict
    sets: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)  # for the protocol: versions, modes

    def names(self):
        return [name for name in METRICS if name in self.pictures or name in self.sets]


def pick_metrics(names, crop, device, lpips_backbone=None, vgg_backbone=None, inception=None):
    """The Metrics of those names, less what is not on this machine, each of which is said in one line. crop: of the luma's border, pixels."""
    m = Metrics({})
    plain = dict(psnr_rgb=psnr_rgb, psnr_y=lambda a, b: psnr_y(a, b, crop), ssim_y=lambda a, b: ssim_y(a, b, crop), consistency=None,
                 niqe=lambda a, b: niqe(luma(a)))
    for name in names:
        try:
            if name in plain:
                m.pictures[name] = plain[name]
            elif name == "lpips":
                if lpips := load_lpips(lpips_backbone, device):
                    m.pictures[name] = lambda a, b: lpips(to_float(a).to(device), to_float(b).to(device))
            elif name in PYIQA:
                metric = load_pyiqa(name, device)
                m.pictures[name] = lambda a, b, metric=metric: metric(a.to(device).float() / 255, b.to(device).float() / 255)
            else:
                m.sets[name] = load_vgg16(vgg_backbone, device) if name == "fd_vgg16" else load_inception(inception, FID_MODES[name], device)
        except Missing as e:
            note(f"{name} is left out: {e}")
    m.notes = [f"{package} {version(package)}" for package, used in (("pyiqa", set(PYIQA) & set(m.pictures)), ("clean-fid", set(FID_MODES) & set(m.sets))) if used]
    m.notes += [f"{name}: clean-fid's {FID_MODES[name]}" for name in FID_MODES if name in m.sets]
    return m


def version(package):
    from importlib.metadata import version
    return version(package)


def measure(restored, truth, crop, metrics, y=None, task=None):
    """Every metric of one picture file against another: a dict of floats. y (1, 3, h, w): what it was restored from, for `consistency`.

    truth: None where there is none, and all metrics are of ALONE.
    Raises InputError that names what does not fit.
    """
    a, b = (torch.from_numpy(read_image(p)).permute(2, 0, 1)[None] for p in (restored, truth or restored))
    if a.shape != b.shape:
        raise InputError(f"{restored} is {a.shape[3]} x {a.shape[2]}, but {truth} is {b.shape[3]} x {b.shape[2]}")
    check_size(truth or restored, *b.shape[2:], crop)
    with torch.no_grad():
        return {name: (consistency(a, y, task) if name == "consistency" else metric(a, b)).item() for name, metric in metrics.pictures.items()}


def measure_sets(restored, truth, metrics, known):
    """Every Fréchet distance of one list of picture files to another: a dict of floats. known: {}, in which the features of truth are kept between calls."""
    scores = {}
    with torch.no_grad():
        for name, features in metrics.sets.items():
            if name not in known:
                known[name] = features(truth)
            scores[name] = frechet_distance(features(restored), known[name])
    return scores


def check_size(path, height, width, crop):
    least = max(32, WINDOW + 2 * crop)  # AlexNet's pooling leaves nothing of less than 31, SSIM's window must fit
    if min(height, width) < least:
        raise InputError(f"{path} is {width} x {height}: the metrics need at least {least} pixels a side")
