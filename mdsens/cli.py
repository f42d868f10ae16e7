"""The command line: sensitivities, relaxations and their checks, with exit codes that say whether to trust them.

Heavy imports are inside functions, so that ``mdsens --help`` answers at once and starts no backend.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdsens import _report, _tables
from mdsens.implicit.status import ConvergenceError, InputError, MdsensError, Status

if TYPE_CHECKING:
    from mdsens._report import Component, Finding
    from mdsens.relaxation import Equilibrium
    from mdsens.sensitivity import Linearization

__all__ = ["main"]

GOOD, INTERNAL, BAD_INPUT, UNTRUSTED, INTERRUPTED = 0, 1, 2, 3, 130
MANY = 10  # components; more are ranked in place of shown one by one
FIGURES = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
SOLVERS = {name.lower(): name for name in ("Auto", "GMRES", "CG", "MINRES", "BiCGSTAB", "Direct")}
EXAMPLES = """\
examples:
  mdsens systems                                           what comes with mdsens
  mdsens sensitivity seed_packing_2d --wrt "sigma[1]"      how a packing moves as species 1 grows
  mdsens sensitivity seed_packing_2d --wrt alpha --plot alpha.png --out alpha.npz
  mdsens relax my_system.toml --seed 3 --extxyz relaxed.extxyz
  mdsens certify seed_packing_2d --wrt "sigma[1]"          can that be trusted, and how far
  mdsens verify dimer --wrt sigma                          finite differences, and the adjoint
  mdsens doctor                                            versions, device, a check of the compiler

exit codes: 0 the result is good; 2 bad input; 3 a result not to be trusted; 1 an internal error; 130 interrupted
"""
WRT = """\
what to differentiate by: a parameter (sigma), a component (sigma[1]), or one of a matrix of species pairs (sigma[0,1],
which changes together with sigma[1,0])"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; argparse itself exits, with 0 for --help and 2 for bad usage."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # an ASCII terminal has no Å
    warnings.filterwarnings("ignore", "scatter inputs have incompatible types", FutureWarning)  # in jax-md's cell list
    parser = _parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return BAD_INPUT
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _failed(INTERRUPTED, "interrupted")
    except BrokenPipeError:  # as in `mdsens systems | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        return GOOD
    except ConvergenceError as error:
        return _failed(UNTRUSTED, str(error))
    except (MdsensError, OSError) as error:
        return _failed(BAD_INPUT, str(error))
    except Exception as error:
        if os.environ.get("MDSENS_DEBUG", "0") not in ("", "0"):
            raise
        return _failed(
            INTERNAL, f"internal error: {type(error).__name__}: {error} (set MDSENS_DEBUG=1 for the traceback)"
        )


def _failed(code: int, message: str) -> int:
    sys.stdout.flush()
    print("mdsens:", " ".join(message.split()), file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mdsens",
        description="How relaxed particle configurations move with the parameters of their interactions.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Any, what: str, more: str = "") -> argparse.ArgumentParser:
        description = f"{what[0].upper()}{what[1:]}.{' ' if more else ''}{more}"
        made = commands.add_parser(name, help=what, description=description)
        made.set_defaults(run=run)
        return made

    def common(made: argparse.ArgumentParser) -> None:
        made.add_argument("system", metavar="SYSTEM", help="a bundled name (mdsens systems lists them) or a .toml file")
        made.add_argument("--seed", type=int, help="of random starts and parameters (default: the system's own)")
        made.add_argument(
            "--tolerance",
            type=_positive,
            help="largest net force on a particle to relax to, in the system's units (default: the system's, or 1e-12)",
        )

    def differentiated(made: argparse.ArgumentParser) -> None:
        made.add_argument("--wrt", required=True, metavar="NAME", type=_wrt, help=WRT)
        made.add_argument("--solver", choices=SOLVERS, default="auto", help="linear solver (default: auto)")

    def strict(made: argparse.ArgumentParser) -> None:
        made.add_argument("--strict", action="store_true", help=f"exit with {UNTRUSTED} on any warning too")

    made = command(
        "sensitivity",
        _sensitivity,
        "relax a system, and differentiate where its particles come to rest",
        f"Without an index every component is taken in turn; beyond {MANY} components, the {MANY} that move the others "
        "most are listed and the first is shown. Each result is checked by relaxing again at parameters a little to "
        f"either side: above a relative difference of {_report.AGREEMENT:g} the exit code is {UNTRUSTED}.",
    )
    common(made)
    differentiated(made)
    made.add_argument(
        "--out", type=Path, metavar="FILE.npz", help="store positions, responses and their evidence, for numpy.load"
    )
    made.add_argument(
        "--plot",
        type=Path,
        metavar="FIGURE",
        help=f"draw the response ({', '.join(FIGURES[:3])}, ...); of several components, the one of the largest",
    )
    made.add_argument("--no-check", action="store_true", help="do not check against finite differences")
    strict(made)

    made = command(
        "certify",
        _certify,
        "examine a minimum: is it one, is it stable, how wrong can its derivative be, how far does it reach",
        f"What did not relax, what is unjammed, floppy or a saddle is examined too: the exit code is then {UNTRUSTED}.",
    )
    common(made)
    made.add_argument("--wrt", metavar="NAME", type=_wrt, help=f"{WRT}; without it the minimum alone is examined")
    made.add_argument("--particle", type=int, metavar="I", help="examine what has no answer in the place of particle I")
    made.add_argument("--modes", type=int, default=1, metavar="K", help="how many of the lowest modes (default: 1)")
    made.add_argument(
        "--max-steps", type=int, metavar="N", help="stop relaxing there (default: the system's, or 200,000)"
    )
    made.add_argument("--single", action="store_true", help="compute in single precision, to see what is left of it")
    made.add_argument("--json", type=Path, metavar="FILE.json", help="store every figure")
    strict(made)

    made = command("relax", _relax, "relax a system to a minimum of its energy")
    common(made)
    made.add_argument("--out", type=Path, metavar="FILE.npz", help="store the minimum, for mdsens.io.load")
    made.add_argument("--extxyz", type=Path, metavar="FILE", help="store it for OVITO, ASE and others")

    made = command(
        "verify",
        _verify,
        "hold a sensitivity against finite differences and its own adjoint",
        f"Of a parameter with more than {MANY} components, one random direction through all is taken. Limits: "
        f"relative differences of {_report.AGREEMENT:g} to finite differences, "
        f"{_report.ADJOINT:g} between forward and adjoint.",
    )
    common(made)
    differentiated(made)
    command("systems", _systems, "list the systems that come with mdsens")
    command(
        "doctor", _doctor, "show versions and the device, and check the compiler", f"Exit code {UNTRUSTED} if it fails."
    )
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import mdsens

        print(f"mdsens {mdsens.__version__}")
        parser.exit()


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no positive number")


def _wrt(text: str) -> tuple[str, tuple[int, ...] | None]:
    found = re.fullmatch(r"\s*([^\[\]\s]+)\s*(?:\[\s*(-?\d+(?:\s*,\s*-?\d+)*)\s*\])?\s*", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no component: write sigma, sigma[1] or sigma[0,1]")
    name, index = found.groups()
    return name, None if index is None else tuple(int(i) for i in index.split(","))


def _writable(option: str, path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Refuse an output path that would fail after the work."""
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{option} {path}: give a name that ends in {', '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}, make it first.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {path}: cannot be written, give another name.")


def _relaxed(args: argparse.Namespace) -> tuple[Equilibrium, Linearization, list[Component]]:
    """Load the system, check what is asked of it, relax it and say what became of it."""
    import mdsens as ms
    from mdsens import specification

    if not getattr(args, "single", False):
        ms.enable_x64()
    fields = {} if args.seed is None else {"seed": args.seed}
    system = ms.load_system(args.system, **fields)
    options = ms.io.relaxation_options(args.system, **fields)
    if args.tolerance is not None:
        options["tolerance"] = args.tolerance
    if getattr(args, "max_steps", None) is not None:
        options["max_steps"] = args.max_steps
    differentiate, examine = getattr(args, "wrt", None) is not None, args.run is _certify
    parts = _report.components(system, *args.wrt) if differentiate else []
    solver = getattr(ms.implicit, SOLVERS[getattr(args, "solver", "auto")])()
    about = specification.read(specification.locate(args.system))
    print(_report.system(Path(args.system).stem, system, about), end="\n\n", flush=True)
    eq = ms.minimize(system, throw=False, **options)
    lin = ms.linearize(eq, solver, throw=False)
    more = []
    if not differentiate:
        energy = float(ms.observables.energy(eq.system))
        more.append(("energy", f"{energy:.6g}, {energy / system.n:.6g} a particle"))
        if system.box is not None:
            more.append(("pressure", f"{float(ms.observables.pressure(eq.system)) + 0.0:.6g}"))
    print(_report.relaxation(eq, lin.network, more), end="\n\n", flush=True)
    if examine:  # the certificate says it all
        return eq, lin, parts
    ms.implicit.raise_for_status(Status(int(eq.status)), "not to be trusted: the system did not relax", eq)
    if differentiate:
        ms.implicit.raise_for_status(Status(int(lin.status)), "this minimum cannot be differentiated", lin)
    return eq, lin, parts


def _relax(args: argparse.Namespace) -> int:
    import mdsens as ms

    _writable("--out", args.out, (".npz",))
    _writable("--extxyz", args.extxyz)
    eq, lin, _ = _relaxed(args)
    if args.out:
        ms.io.save(args.out, eq, provenance={"system": args.system, "seed": args.seed})
        print(f"wrote {args.out}")
    if args.extxyz:
        ms.io.write_extxyz(args.extxyz, eq)
        print(f"wrote {args.extxyz}")
    unjammed = "; no contact carries force: unjammed" if int(lin.status) == Status.UNJAMMED else ""
    print(f"good: relaxed to a largest net force of {float(eq.max_force):.1e}{unjammed}")
    return GOOD


def _sensitivity(args: argparse.Namespace) -> int:
    import mdsens as ms

    _writable("--out", args.out, (".npz",))
    _writable("--plot", args.plot, FIGURES)
    eq, lin, parts = _relaxed(args)
    if len(parts) > MANY:
        table, best = _report.ranking(lin, parts, ms.jacobian(lin, args.wrt[0]), MANY)
        print(table, end="\n\n", flush=True)
        parts = [parts[best]]
    findings, warned = [], []
    for k, part in enumerate(parts):
        found = _report.examined(eq, lin, part, check=not args.no_check)
        certificate = ms.certify(lin, part.direction)
        warned += [f"{part.label}: {sentence}" for _, sentence in certificate.warnings]
        if not found.reason and not certificate.status.good:
            found = found._replace(reason=certificate.findings[0][1])
        findings.append(found)
        print(_report.sensitivity(found), certificate.page(derivative_only=k > 0), sep="\n\n", end="\n\n", flush=True)
    if args.out:
        _store(args.out, lin, findings)
    if args.plot:
        _plot(args.plot, lin, max(findings, key=lambda found: found.size))
    if args.no_check:
        return _verdict(findings, "solved, but not checked against finite differences", warned, args.strict)
    worst = max(f.error for f in findings)
    return _verdict(findings, f"agrees with finite differences to {worst:.0e}", warned, args.strict)


def _certify(args: argparse.Namespace) -> int:
    import json

    import mdsens as ms
    from mdsens.files import replacing

    _writable("--json", args.json, (".json",))
    if args.modes < 1:
        raise InputError(f"--modes {args.modes}: give 1 or more.")
    if args.max_steps is not None and args.max_steps < 1:
        raise InputError(f"--max-steps {args.max_steps}: give 1 or more.")
    _, lin, parts = _relaxed(args)
    if len(parts) > 1:
        raise InputError(f"--wrt {args.wrt[0]} has {len(parts)} components: name one, such as {parts[0].label}.")
    n, particle = lin.system.n, args.particle
    if particle is not None and not 0 <= particle < n:
        raise InputError(f"--particle {particle}: give 0 to {n - 1}.")
    place = None if particle is None else lambda s: s.positions[particle]
    certificate = ms.certify(lin, parts[0].direction if parts else None, modes=args.modes, observable=place)
    print(certificate, end="\n\n", flush=True)
    if args.json:
        with replacing(args.json) as file:
            file.write(json.dumps(certificate.as_dict(), indent=1).encode())
        print(f"wrote {args.json}")
    grave = [sentence for code, sentence in certificate.findings if not code.good or (args.strict and code.warning)]
    fine = "good, but see the warning" if certificate.warnings else "good: nothing found against it"
    print(f"not to be trusted: {'; '.join(grave)}" if grave else fine)
    return UNTRUSTED if grave else GOOD


def _verdict(findings: Sequence[Finding], good: str, warned: Sequence[str] = (), strict: bool = False) -> int:
    bad = [f"{found.part.label}: {found.reason}" for found in findings if found.reason]
    bad += warned if strict else []
    doubt = f" ({_count_of(warned)})" if warned else ""
    print(f"not to be trusted: {'; '.join(bad)}" if bad else f"good: {good}{doubt}")
    return UNTRUSTED if bad else GOOD


def _count_of(warned: Sequence[str]) -> str:
    return "see the warning" if len(warned) == 1 else f"see the {len(warned)} warnings"


def _store(path: Path, lin: Linearization, findings: Sequence[Finding]) -> None:
    import numpy as np

    from mdsens.files import replacing

    system = lin.equilibrium.system
    responses = [found.response for found in findings]
    arrays = {
        "wrt": [found.part.label for found in findings],
        "value": [r.value for r in responses],
        "nonaffine": [r.nonaffine for r in responses],
        "status": [r.status.name for r in responses],
        "residual": [r.stats.residual for r in responses],
        "finite_difference_error": [found.error for found in findings],
        "rattlers": lin.network.rattlers,
        "positions": system.positions,
        "max_force": lin.equilibrium.max_force,
        **{f"parameter_{name}": value for name, value in system.params.items()},
        **({} if system.box is None else {"box": system.box}),
        **({} if system.species is None else {"species": system.species}),
    }
    with replacing(path) as file:
        np.savez(file, **{name: np.asarray(value) for name, value in arrays.items()}, allow_pickle=False)
    print(f"wrote {path}")


def _plot(path: Path, lin: Linearization, found: Finding) -> None:
    import matplotlib

    import mdsens as ms
    from mdsens.files import replacing

    matplotlib.use("agg")
    figure = ms.plots.sensitivity_map(lin, found.response, title=f"d/d {found.part.label}").get_figure(root=True)
    assert figure is not None
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=300)
    print(f"wrote {path}: {found.part.label}")


def _verify(args: argparse.Namespace) -> int:
    import mdsens as ms

    eq, lin, parts = _relaxed(args)
    if len(parts) > MANY:
        parts = [_report.random_direction(parts)]
    w = _report.random_cotangent(eq.system)
    adjoint = ms.vjp(lin, w)
    findings = [_report.examined(eq, lin, part, adjoint=(w, adjoint)) for part in parts]
    print(_report.verification(findings), end="\n\n")
    error, gap = max(found.error for found in findings), max(found.gap for found in findings)
    return _verdict(findings, f"agrees with finite differences to {error:.0e} and with its adjoint to {gap:.0e}")


def _systems(args: argparse.Namespace) -> int:
    import mdsens as ms

    title = "Systems: give the name, or the path of a .toml file of your own"
    print(_tables.text(title, list(ms.io.bundled_systems().items())))
    return GOOD


def _doctor(args: argparse.Namespace) -> int:
    import jax

    import mdsens as ms
    from mdsens import _doctor

    ms.enable_x64()
    device = jax.devices()[0]
    precision = jax.numpy.zeros(()).dtype
    rows = [*_doctor.versions(), ("device", f"{device.platform}, {device.device_kind}"), ("precision", f"{precision}")]
    print(_tables.text("Installed", rows), end="\n\n", flush=True)
    found = _doctor.energies()
    table = [[way, f"{energy:.9f}", f"{error:.0e}"] for way, energy, error in found]
    title = "One energy by several ways: random spheres in a periodic cell in 3-D"
    print(_tables.columns(title, ["way", "energy", "error"], table), end="\n\n")
    bad = [way for way, _, error in found if not error < _doctor.TOLERANCE]
    if bad:
        print(f"not to be trusted: pairs are lost by {', '.join(bad)}; install another version of jax and jaxlib")
    else:
        print("good: neighbour lists find every pair")
    return UNTRUSTED if bad else GOOD
