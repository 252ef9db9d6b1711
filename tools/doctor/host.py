"""Checks of the host: interpreter, packages, memory, fonts."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from loader.host_memory import total_bytes
from tools.doctor.finding import Finding

# The packages of pyproject.toml that decide numbers or bytes; each must import, too.
IMPORTED = {"torch": "torch", "diffusers": "diffusers", "av": "av", "transformers": "transformers"}
INSTALL = "bash tools/install.sh ENV installs what configs/env/ENV.txt pins"
LOCKED_LIMIT_BYTES = 16 * 2**30  # what offloading at 1280x704x121 registers on one card


def interpreter() -> Iterator[Finding]:
    """The running Python against the range that pyproject.toml states."""
    if not _has("newsreel"):
        text = f"newsreel is not installed for {sys.executable}: its ranges can't be read"
        yield Finding("python", "failure", text, INSTALL)
        return
    needed = metadata.metadata("newsreel")["Requires-Python"]
    version = ".".join(map(str, sys.version_info[:3]))
    inside = Requirement(f"python{needed}").specifier.contains(version)
    yield Finding(
        "python",
        "ok" if inside else "failure",
        f"{version} at {sys.executable}; newsreel needs {needed}",
        "" if inside else "PYTHON=python3.11 bash tools/install.sh",
    )


def packages() -> Iterator[Finding]:
    """Each dependency of newsreel against its range; the optional ones only where installed."""
    if not _has("newsreel"):
        yield Finding("packages", "skipped", "newsreel is not installed", INSTALL)
        return
    wrong = []
    num_right = 0
    for line in metadata.requires("newsreel") or []:
        requirement = Requirement(line)
        optional = requirement.marker is not None
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            if "extra" not in str(requirement.marker):
                continue  # for another platform
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if not optional:
                wrong.append(f"{requirement.name} is missing ({requirement.specifier})")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            num_right += 1
        else:
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    yield Finding(
        "packages",
        "failure" if wrong else "ok",
        "; ".join(wrong) if wrong else f"{num_right} packages are inside their ranges",
        INSTALL if wrong else "",
    )


def imports() -> Iterator[Finding]:
    """Whether the packages that carry compiled code load at all, each in a process of its own."""
    broken = []
    for name, module in IMPORTED.items():
        command = [sys.executable, "-c", f"import {module}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
            broken.append(f"{name}: {reason}")
    yield Finding(
        "imports",
        "failure" if broken else "ok",
        "; ".join(broken) if broken else ", ".join(IMPORTED),
        "reinstall these as configs/env pins them" if broken else "",
    )


def bitsandbytes() -> Iterator[Finding]:
    """Whether 8-bit AdamW and NF4 find their compiled library."""
    if not _has("bitsandbytes"):
        yield Finding("bitsandbytes", "failure", "not installed", INSTALL)
        return
    import bitsandbytes as bnb

    library = type(getattr(bnb.cextension, "lib", None)).__name__
    broken = "Error" in library or library == "NoneType"
    yield Finding(
        "bitsandbytes",
        "warning" if broken else "ok",
        f"{metadata.version('bitsandbytes')}, library {library}",
        'set optim.name = "adamw" and lora.base = "dense", or reinstall it' if broken else "",
    )


def _has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def pinned_memory() -> Iterator[Finding]:
    """The limits that registered host memory meets: locked pages, and the control group's."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    text = f"{total_bytes() / 2**30:.0f} GiB for this process"
    text += ", locked pages unlimited" if unlimited else f", locked pages {soft / 2**20:.0f} MiB"
    short = not unlimited and soft < LOCKED_LIMIT_BYTES
    # CUDA pins through its driver, which the limit does not bind everywhere: a warning, no more
    yield Finding(
        "host memory",
        "warning" if short else "ok",
        text,
        "ulimit -l unlimited, if activation_offload or streamed weights can't register memory"
        if short
        else "",
    )


def fonts() -> Iterator[Finding]:
    """Whether contact sheets and plots can show Hangul."""
    import matplotlib.font_manager as manager

    # matplotlib ships "Last Resort", which draws a box for every letter
    fonts = [font for font in manager.fontManager.ttflist if "Last Resort" not in font.name]
    hangul = [font.name for font in fonts if _has_hangul(font.fname)]
    yield Finding(
        "fonts",
        "ok" if hangul else "warning",
        f"Hangul in {sorted(set(hangul))[0]}" if hangul else "no installed font has Hangul",
        "" if hangul else "apt-get install fonts-nanum; until then sheets show boxes",
    )


def _has_hangul(path: str) -> bool:
    from matplotlib.ft2font import FT2Font

    try:
        return FT2Font(path).get_char_index(ord("가")) != 0
    except (OSError, RuntimeError):  # a font file that FreeType can't read
        return False
