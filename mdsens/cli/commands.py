"""The command line: sensitivities, relaxations and their checks, with exit codes that say whether
to trust them.

Heavy imports are inside functions, so that ``mdsens --help`` answers at once and starts no backend.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdsens._util import tables
from mdsens._util.errors import ConvergenceError, InputError, MdsensError
from mdsens.cli import arguments, moduli_report, report
from mdsens.cli.arguments import FIGURES, MANY, SOLVERS, UNTRUSTED
from mdsens.mechanics.status import Status

if TYPE_CHECKING:
    from mdsens.cli.report import Component, Finding
    from mdsens.relaxation.equilibrium import Equilibrium
    from mdsens.sensitivity.derivatives import Linearization

__all__ = ["main"]

GOOD, INTERNAL, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; argparse itself exits, with 0 for --help and 2
    for bad usage.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # an ASCII terminal has no Å
    warnings.filterwarnings(
        "ignore", "scatter inputs have incompatible types", FutureWarning
    )  # in jax-md's cell list
    parser = arguments.parser(_RUNS, _Version)
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
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # Python flushes once more at exit
        return GOOD
    except ConvergenceError as error:
        return _failed(UNTRUSTED, str(error))
    except (MdsensError, OSError) as error:
        return _failed(BAD_INPUT, str(error))
    except Exception as error:
        if os.environ.get("MDSENS_DEBUG", "0") not in ("", "0"):
            raise
        return _failed(
            INTERNAL,
            f"internal error: {type(error).__name__}: {error} (set MDSENS_DEBUG=1 for the"
            " traceback)",
        )


def _failed(code: int, message: str) -> int:
    sys.stdout.flush()
    print("mdsens:", " ".join(message.split()), file=sys.stderr)
    return code


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import mdsens

        print(f"mdsens {mdsens.__version__}")
        parser.exit()


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
    from mdsens.io import system_toml

    if not getattr(args, "single", False):
        ms.enable_x64()
    fields = {} if args.seed is None else {"seed": args.seed}
    system = ms.load_system(args.system, **fields)
    options = ms.io.relaxation_options(args.system, **fields)
    if args.tolerance is not None:
        options["tolerance"] = args.tolerance
    if getattr(args, "max_steps", None) is not None:
        options["max_steps"] = args.max_steps
    differentiate, examine = getattr(args, "wrt", None) is not None, args.command == "certify"
    pressure = getattr(args, "pressure", None)
    if pressure is not None:
        options |= {"pressure": pressure, "shape": args.shape}
    elif differentiate and args.wrt[0] == "pressure" and hasattr(args, "pressure"):
        raise InputError("--wrt pressure: give the pressure as well, with --pressure P.")
    elif getattr(args, "shape", False):
        raise InputError("--shape goes with --pressure: give the pressure to relax the cell to.")
    if args.command == "moduli" and system.box is None:
        raise InputError(
            "elastic moduli need a volume, and this system has open boundaries: give it a box."
        )
    parts = report.components(system, *args.wrt, pressure=pressure) if differentiate else []
    solver = getattr(ms.implicit, SOLVERS[getattr(args, "solver", "auto")])()
    about = system_toml.read(system_toml.locate(args.system))
    print(report.system(Path(args.system).stem, system, about), end="\n\n", flush=True)
    eq = ms.minimize(system, throw=False, **options)
    lin = ms.linearize(eq, solver, throw=False)
    more = []
    if not differentiate:
        energy = float(ms.observables.energy(eq.system))
        more.append(("energy", f"{energy:.6g}, {energy / system.n:.6g} a particle"))
        if system.box is not None:
            more.append(("pressure", f"{float(ms.observables.pressure(eq.system)) + 0.0:.6g}"))
    print(report.relaxation(eq, lin.network, more), end="\n\n", flush=True)
    if examine:  # the certificate says it all
        return eq, lin, parts
    ms.implicit.raise_for_status(
        Status(int(eq.status)), "not to be trusted: the system did not relax", eq
    )
    if differentiate:
        ms.implicit.raise_for_status(
            Status(int(lin.status)), "this minimum cannot be differentiated", lin
        )
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
        table, best = report.ranking(lin, parts, ms.jacobian(lin, args.wrt[0]), MANY)
        print(table, end="\n\n", flush=True)
        parts = [parts[best]]
    findings, warned = [], []
    for k, part in enumerate(parts):
        found = report.examined(eq, lin, part, check=not args.no_check)
        certificate = ms.certify(lin, part.direction)
        # a derivative in the cell holds whether the configuration would keep its shape without it
        # or not
        warns = [
            sentence
            for code, sentence in certificate.findings
            if code.warning or code is Status.UNSTABLE
        ]
        grave = [
            sentence
            for code, sentence in certificate.findings
            if not (code.good or code is Status.UNSTABLE)
        ]
        warned += [f"{part.label}: {sentence}" for sentence in warns]
        if not found.reason and grave:
            found = found._replace(reason=grave[0])
        findings.append(found)
        print(
            report.sensitivity(found),
            certificate.page(derivative_only=k > 0),
            sep="\n\n",
            end="\n\n",
            flush=True,
        )
    if args.out:
        _store(args.out, lin, findings)
    if args.plot:
        _plot(args.plot, lin, max(findings, key=lambda found: found.size))
    if args.no_check:
        return _verdict(
            findings, "solved, but not checked against finite differences", warned, args.strict
        )
    worst = max(f.error for f in findings)
    return _verdict(findings, f"agrees with finite differences to {worst:.0e}", warned, args.strict)


def _certify(args: argparse.Namespace) -> int:
    import json

    import mdsens as ms
    from mdsens.io.files import replacing

    _writable("--json", args.json, (".json",))
    if args.modes < 1:
        raise InputError(f"--modes {args.modes}: give 1 or more.")
    if args.max_steps is not None and args.max_steps < 1:
        raise InputError(f"--max-steps {args.max_steps}: give 1 or more.")
    _, lin, parts = _relaxed(args)
    if len(parts) > 1:
        raise InputError(
            f"--wrt {args.wrt[0]} has {len(parts)} components: name one, such as {parts[0].label}."
        )
    n, particle = lin.system.n, args.particle
    if particle is not None and not 0 <= particle < n:
        raise InputError(f"--particle {particle}: give 0 to {n - 1}.")
    place = None if particle is None else lambda s: s.positions[particle]
    certificate = ms.certify(
        lin, parts[0].direction if parts else None, modes=args.modes, observable=place
    )
    print(certificate, end="\n\n", flush=True)
    if args.json:
        with replacing(args.json) as file:
            file.write(json.dumps(certificate.as_dict(), indent=1).encode())
        print(f"wrote {args.json}")
    grave = [
        sentence
        for code, sentence in certificate.findings
        if not code.good or (args.strict and code.warning)
    ]
    fine = "good, but see the warning" if certificate.warnings else "good: nothing found against it"
    print(f"not to be trusted: {'; '.join(grave)}" if grave else fine)
    return UNTRUSTED if grave else GOOD


def _moduli(args: argparse.Namespace) -> int:
    import json

    import mdsens as ms
    from mdsens.io.files import replacing

    _writable("--plot", args.plot, FIGURES)
    _writable("--json", args.json, (".json",))
    _, lin, parts = _relaxed(args)
    ms.implicit.raise_for_status(Status(int(lin.status)), "this minimum has no moduli", lin)
    found = ms.elasticity.moduli(lin, throw=False)
    print(moduli_report.page(found), end="\n\n", flush=True)
    slopes = moduli_report.slopes_of(lin, parts) if parts else {}
    if parts:
        print(moduli_report.derivatives(parts, slopes, MANY), end="\n\n", flush=True)
    if args.plot:
        _figure(args.plot, lambda: ms.plots.moduli(found)[0])
        print(f"wrote {args.plot}")
    if args.json:
        with replacing(args.json) as file:
            file.write(json.dumps(moduli_report.as_dict(found, parts, slopes), indent=1).encode())
        print(f"wrote {args.json}")
    print(moduli_report.verdict(found))
    return UNTRUSTED if not found.status.good or (args.strict and found.status.warning) else GOOD


def _design(args: argparse.Namespace) -> int:
    import json

    import mdsens as ms
    from mdsens.cli import design_report
    from mdsens.io.design_toml import load_design
    from mdsens.io.files import replacing

    where = args.state or Path(args.design.with_suffix(".npz").name)
    _writable("--state", where, (".npz",))
    _writable("--plot", args.plot, FIGURES)
    _writable("--json", args.json, (".json",))
    ms.enable_x64()
    brief = load_design(args.design)
    kept = where.exists()
    if kept and not args.resume:
        raise InputError(
            f"{where} is there already: give --resume to go on from it, or another --state to begin"
            " anew."
        )
    state = ms.io.load(where) if kept else None
    members = "" if len(brief.systems) == 1 else f", {len(brief.systems)} members"
    print(report.system(brief.system + members, brief.systems[0], {}), end="\n\n", flush=True)
    show = design_report.lines(
        tuple(t.name for t in brief.targets), lambda text: print(text, flush=True)
    )

    def after(at: ms.design.State) -> None:
        ms.io.save(where, at, provenance={"design": args.design.name, "system": brief.system})
        show(at)

    options = {**brief.options, **({} if args.steps is None else {"steps": args.steps})}
    found = ms.design.fit(
        brief.targets, brief.systems, brief.free, resume=state, callback=after, **options
    )
    print("", found, f"the state is in {where}", sep="\n")
    if args.plot:
        _figure(args.plot, lambda: ms.plots.design_history(found)[0])
        print(f"wrote {args.plot}")
    if args.json:
        with replacing(args.json) as file:
            file.write(json.dumps(design_report.as_dict(found), indent=1).encode())
        print(f"wrote {args.json}")
    print(
        "good: every target is met" if found.status.good else f"not there: {found.status.sentence}"
    )
    return GOOD if found.status.good else UNTRUSTED


def _verdict(
    findings: Sequence[Finding], good: str, warned: Sequence[str] = (), strict: bool = False
) -> int:
    bad = [f"{found.part.label}: {found.reason}" for found in findings if found.reason]
    bad += warned if strict else []
    doubt = f" ({_count_of(warned)})" if warned else ""
    print(f"not to be trusted: {'; '.join(bad)}" if bad else f"good: {good}{doubt}")
    return UNTRUSTED if bad else GOOD


def _count_of(warned: Sequence[str]) -> str:
    return "see the warning" if len(warned) == 1 else f"see the {len(warned)} warnings"


def _store(path: Path, lin: Linearization, findings: Sequence[Finding]) -> None:
    import numpy as np

    from mdsens.io.files import replacing

    system = lin.equilibrium.system
    responses = [found.response for found in findings]
    arrays = {
        "wrt": [found.part.label for found in findings],
        "value": [report.parts_of(r.value)[0] for r in responses],
        **(
            {}
            if lin.cell is None
            else {"strain": [r.value.strain for r in responses], "pressure": lin.cell.pressure}
        ),
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
        np.savez(
            file, **{name: np.asarray(value) for name, value in arrays.items()}, allow_pickle=False
        )
    print(f"wrote {path}")


def _plot(path: Path, lin: Linearization, found: Finding) -> None:
    import mdsens as ms

    _figure(
        path, lambda: ms.plots.sensitivity_map(lin, found.response, title=f"d/d {found.part.label}")
    )
    print(f"wrote {path}: {found.part.label}")


def _figure(path: Path, draw: Callable[[], Any]) -> None:
    """Draw without a display, and write."""
    import matplotlib

    from mdsens.io.files import replacing

    matplotlib.use("agg")
    figure = draw().get_figure(root=True)
    assert figure is not None
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=300)


def _verify(args: argparse.Namespace) -> int:
    import mdsens as ms

    eq, lin, parts = _relaxed(args)
    if len(parts) > MANY:
        parts = [report.random_direction(parts)]
    w = report.random_cotangent(eq.system)
    adjoint = ms.vjp(lin, w)
    findings = [report.examined(eq, lin, part, adjoint=(w, adjoint)) for part in parts]
    print(report.verification(findings), end="\n\n")
    error, gap = max(found.error for found in findings), max(found.gap for found in findings)
    return _verdict(
        findings, f"agrees with finite differences to {error:.0e} and with its adjoint to {gap:.0e}"
    )


def _systems(args: argparse.Namespace) -> int:
    import mdsens as ms

    title = "Systems: give the name, or the path of a .toml file of your own"
    print(tables.text(title, list(ms.io.bundled_systems().items())))
    return GOOD


def _doctor(args: argparse.Namespace) -> int:
    import jax

    import mdsens as ms
    from mdsens.cli import doctor

    ms.enable_x64()
    device = jax.devices()[0]
    precision = jax.numpy.zeros(()).dtype
    rows = [
        *doctor.versions(),
        ("device", f"{device.platform}, {device.device_kind}"),
        ("precision", f"{precision}"),
    ]
    print(tables.text("Installed", rows), end="\n\n", flush=True)
    found = doctor.energies()
    table = [[way, f"{energy:.9f}", f"{error:.0e}"] for way, energy, error in found]
    title = "One energy by several ways: random spheres in a periodic cell in 3-D"
    print(tables.columns(title, ["way", "energy", "error"], table), end="\n\n")
    bad = [way for way, _, error in found if not error < doctor.TOLERANCE]
    if bad:
        print(
            f"not to be trusted: pairs are lost by {', '.join(bad)}; install another version of jax"
            " and jaxlib"
        )
    else:
        print("good: neighbor lists find every pair")
    return UNTRUSTED if bad else GOOD


_RUNS = {
    "sensitivity": _sensitivity,
    "certify": _certify,
    "relax": _relax,
    "moduli": _moduli,
    "design": _design,
    "verify": _verify,
    "systems": _systems,
    "doctor": _doctor,
}
