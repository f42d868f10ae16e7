"""The commands of ``mdsens``; their exit codes say whether a result can be trusted.

Several imports are inside functions, so that ``mdsens --help`` answers fast and starts no backend
of jax.
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
from mdsens._util.pytree import named_leaves
from mdsens.cli import arguments, moduli_report, report
from mdsens.cli.arguments import FIGURES, MANY, SOLVERS, UNTRUSTED
from mdsens.mechanics.status import Status
from mdsens.relaxation.minimization import stop_if_interrupted

if TYPE_CHECKING:
    import jax

    from mdsens._util.tables import Rows
    from mdsens.cli.report import Component, Finding
    from mdsens.design import State
    from mdsens.model.system import System
    from mdsens.relaxation.equilibrium import Equilibrium
    from mdsens.sensitivity.certificate import Certificate
    from mdsens.sensitivity.derivatives import Linearization

__all__ = ["main"]

# Exit codes; UNTRUSTED is 3. 2 is what argparse exits with on bad usage, and 130 what a shell
# reports of a process that Ctrl-C stopped (128 + SIGINT).
GOOD = 0
INTERNAL = 1
BAD_INPUT = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``mdsens`` with the arguments ``argv`` and return the exit code.

    After --help and --version (code 0) and after bad usage (code 2), argparse ends the process.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            # an ASCII terminal has no Å: print a question mark instead of failing
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    # raised in jax-md's cell list
    warnings.filterwarnings("ignore", "scatter inputs have incompatible types", FutureWarning)
    parser = arguments.parser(_RUNS, _Version)
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return BAD_INPUT
    try:
        _keep_compiled(args.cache)
        code = args.run(args)
        # here, so that a closed pipe raises its error inside of this try
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _report_failure(INTERRUPTED, "interrupted")
    except BrokenPipeError:  # as in `mdsens systems | head -1`
        # Python flushes stdout once more at exit: into a file that takes it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GOOD
    # before MdsensError, of which it is a kind
    except ConvergenceError as error:
        return _report_failure(UNTRUSTED, str(error))
    except (MdsensError, OSError) as error:
        return _report_failure(BAD_INPUT, str(error))
    except Exception as error:
        if os.environ.get("MDSENS_DEBUG", "0") not in ("", "0"):
            raise  # with its traceback, for developers
        return _report_failure(
            INTERNAL,
            f"internal error: {type(error).__name__}: {error} (set MDSENS_DEBUG=1 for the"
            " traceback)",
        )


def _report_failure(code: int, message: str) -> int:
    """Print an error message as one line on stderr, and return the exit code ``code``."""
    sys.stdout.flush()  # so that the message comes after what was printed before
    print("mdsens:", " ".join(message.split()), file=sys.stderr)
    return code


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import mdsens

        print(f"mdsens {mdsens.__version__}")
        parser.exit()


def _check_writable(option: str, path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Raise InputError, before a computation, if the result could not be written to ``path``."""
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{option} {path}: give a name that ends in {', '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise InputError(
            f"{option} {path}: there is no folder {path.parent}, make this folder first."
        )
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {path}: this file cannot be written, give another name.")


def _relax_system(args: argparse.Namespace) -> tuple[Equilibrium, Linearization, list[Component]]:
    """Load the system that a command names, check the command's options, and relax the system.

    The system and its relaxation are printed as tables.

    Returns:
      the minimum, the linearization at the minimum (Hessian and solver), and the parameter
      components that ``--wrt`` names (an empty list without ``--wrt``).
    """
    import mdsens as ms
    from mdsens.io import system_toml

    # getattr with a default: not every command has each of these options
    if not getattr(args, "single", False):
        # before the system is loaded: jax sets the precision of an array when it makes the array
        ms.enable_x64()
    fields = {} if args.seed is None else {"seed": args.seed}
    system = ms.load_system(args.system, **fields)
    options = _merge_options(args, fields)
    if args.command == "moduli":
        from mdsens.model.system import require_volume

        require_volume(system, "elastic moduli need")
    differentiate = getattr(args, "wrt", None) is not None
    pressure = getattr(args, "pressure", None)
    parts = report.components(system, *args.wrt, pressure=pressure) if differentiate else []
    solver = getattr(ms.implicit, SOLVERS[getattr(args, "solver", "auto")])()
    content = system_toml.read(system_toml.locate(args.system))
    print(report.system(Path(args.system).stem, system, content), end="\n\n", flush=True)
    eq = ms.minimize(system, throw=False, **options)
    stop_if_interrupted(eq)
    lin = ms.linearize(eq, solver, throw=False)
    more = [] if differentiate else _format_energy(eq.system)
    print(report.relaxation(eq, lin.network, more), end="\n\n", flush=True)
    if args.command == "certify":  # also examines what did not relax, and names the cause
        return eq, lin, parts
    ms.implicit.raise_for_status(eq.status, "not to be trusted: the system did not relax", eq)
    if differentiate:
        ms.implicit.raise_for_status(lin.status, "this minimum cannot be differentiated", lin)
    return eq, lin, parts


def _merge_options(args: argparse.Namespace, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the options of ``ms.minimize``: those of the system's file, changed by the command's.

    Args:
      args: the arguments of the command.
      fields: values that replace those of the system's file, such as the seed.

    Raises:
      InputError: the command has an option that needs ``--pressure``, but no ``--pressure``.
    """
    import mdsens as ms

    options = ms.io.relaxation_options(args.system, **fields)
    if args.tolerance is not None:
        options["tolerance"] = args.tolerance
    # getattr and hasattr: not every command has each of these options
    if getattr(args, "max_steps", None) is not None:
        options["max_steps"] = args.max_steps
    wrt = getattr(args, "wrt", None)
    pressure = getattr(args, "pressure", None)
    if pressure is not None:
        options |= {"pressure": pressure, "shape": args.shape}
    elif wrt is not None and wrt[0] == "pressure" and hasattr(args, "pressure"):
        raise InputError("--wrt pressure: give the pressure as well, with --pressure P.")
    elif getattr(args, "shape", False):
        raise InputError("--shape goes with --pressure: give the pressure to relax the cell to.")
    return options


def _format_energy(system: System) -> Rows:
    """Format the energy of a relaxed system and, with a box, its pressure as rows of a table."""
    import mdsens as ms

    energy = float(ms.observables.energy(system))
    rows = [("energy", f"{energy:.6g}, {energy / system.n:.6g} a particle")]
    if system.has_volume:
        pressure = float(ms.observables.pressure(system)) + 0.0  # + 0.0: no "-0"
        rows.append(("pressure", f"{pressure:.6g}"))
    return rows


def _relax(args: argparse.Namespace) -> int:
    """Run ``mdsens relax``: relax a system and store the minimum."""
    import mdsens as ms

    _check_writable("--out", args.out, (".npz",))
    _check_writable("--extxyz", args.extxyz)
    eq, lin, _ = _relax_system(args)
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
    """Run ``mdsens sensitivity``: compute, check and certify responses of a minimum.

    There is a response to each parameter component that ``--wrt`` names. Many components are
    listed in a table by the size of their responses, and only the largest response is checked.
    """
    import mdsens as ms

    _check_writable("--out", args.out, (".npz",))
    _check_writable("--plot", args.plot, FIGURES)
    eq, lin, parts = _relax_system(args)
    if len(parts) > MANY:  # shown as a ranking; the first alone is checked
        table, best = report.ranking(lin, parts, ms.jacobian(lin, args.wrt[0]), MANY)
        print(table, end="\n\n", flush=True)
        parts = [parts[best]]
    findings, warnings_of_parts = [], []
    for k, part in enumerate(parts):
        finding = report.examined(eq, lin, part, check=not args.no_check)
        certificate = ms.certify(lin, part.direction)
        mild, grave = _split_findings(certificate)
        warnings_of_parts += [f"{part.label}: {sentence}" for sentence in mild]
        if not finding.reason and grave:
            finding = finding._replace(reason=grave[0])
        findings.append(finding)
        print(
            report.sensitivity(finding),
            certificate.page(derivative_only=k > 0),
            sep="\n\n",
            end="\n\n",
            flush=True,
        )
    if args.out:
        _store(args.out, lin, findings)
    if args.plot:
        _plot(args.plot, lin, max(findings, key=lambda finding: finding.size))
    if args.no_check:
        praise = "solved, but not checked against finite differences"
    else:
        worst = max(finding.error for finding in findings)
        praise = f"agrees with finite differences to {worst:.0e}"
    return _print_verdict(findings, praise, warnings_of_parts, args.strict)


def _split_findings(certificate: Certificate) -> tuple[list[str], list[str]]:
    """Split the findings of a certificate into warnings and reasons not to trust a derivative.

    The finding UNSTABLE counts as a warning: a derivative at fixed cell is right whether or not the
    configuration would keep its shape without the cell.

    Returns:
      the sentences of the warnings, and the sentences of the reasons.
    """
    mild = [
        sentence
        for code, sentence in certificate.findings
        if code.warning or code is Status.UNSTABLE
    ]
    grave = [
        sentence
        for code, sentence in certificate.findings
        if not (code.good or code is Status.UNSTABLE)
    ]
    return mild, grave


def _certify(args: argparse.Namespace) -> int:
    """Run ``mdsens certify``: examine a minimum, and its derivative by one parameter component."""
    import mdsens as ms

    _check_writable("--json", args.json, (".json",))
    if args.modes < 1:
        raise InputError(f"--modes {args.modes}: give 1 or more.")
    if args.max_steps is not None and args.max_steps < 1:
        raise InputError(f"--max-steps {args.max_steps}: give 1 or more.")
    _, lin, parts = _relax_system(args)
    if len(parts) > 1:
        raise InputError(
            f"--wrt {args.wrt[0]} has {len(parts)} components: name one, such as {parts[0].label}."
        )
    certificate = ms.certify(
        lin,
        parts[0].direction if parts else None,
        modes=args.modes,
        observable=_select_position(args.particle, lin.system.n),
    )
    print(certificate, end="\n\n", flush=True)
    if args.json:
        _write_json(args.json, certificate.as_dict())
    return _print_verdict_of_certificate(certificate, args.strict)


def _select_position(particle: int | None, n: int) -> Callable[[System], jax.Array] | None:
    """Return a function that takes a system and returns the position of one particle.

    For ``particle=None`` the result is None, too.

    Args:
      particle: index of the particle, or None.
      n: number of particles.

    Raises:
      InputError: no such particle.
    """
    if particle is None:
        return None
    if not 0 <= particle < n:
        raise InputError(f"--particle {particle}: give 0 to {n - 1}.")
    return lambda system: system.positions[particle]


def _print_verdict_of_certificate(certificate: Certificate, strict: bool) -> int:
    """Print a line that says whether a minimum can be trusted, and return the exit code.

    With ``strict``, a warning is a reason not to trust the minimum.
    """
    grave = [
        sentence
        for code, sentence in certificate.findings
        if not code.good or (strict and code.warning)
    ]
    fine = "good, but see the warning" if certificate.warnings else "good: nothing found against it"
    print(f"not to be trusted: {'; '.join(grave)}" if grave else fine)
    return UNTRUSTED if grave else GOOD


def _moduli(args: argparse.Namespace) -> int:
    """Run ``mdsens moduli``: compute elastic moduli and their derivatives by parameters."""
    import mdsens as ms
    from mdsens.io import system_toml

    _check_writable("--plot", args.plot, FIGURES)
    _check_writable("--json", args.json, (".json",))
    _, lin, parts = _relax_system(args)
    ms.implicit.raise_for_status(lin.status, "this minimum has no moduli", lin)
    moduli = ms.elasticity.moduli(lin, throw=False)
    units = system_toml.read(system_toml.locate(args.system)).get("units", "")
    in_gpa = moduli_report.in_gpa(units, lin.system.dimension)
    print(moduli_report.page(moduli, in_gpa), end="\n\n", flush=True)
    slopes = moduli_report.slopes_of(lin, parts) if parts else {}
    if parts:
        print(moduli_report.derivatives(parts, slopes, MANY), end="\n\n", flush=True)
    if args.plot:
        _figure(args.plot, lambda: ms.plots.moduli(moduli)[0])
        print(f"wrote {args.plot}")
    if args.json:
        _write_json(args.json, moduli_report.as_dict(moduli, parts, slopes))
    print(moduli_report.verdict(moduli))
    status = moduli.status
    return UNTRUSTED if not status.good or (args.strict and status.warning) else GOOD


def _design(args: argparse.Namespace) -> int:
    """Run ``mdsens design``: search for parameters that give a system the wanted properties.

    The state of the search is stored after each step, so that the search can be resumed.
    """
    import mdsens as ms
    from mdsens.cli import design_report
    from mdsens.io.design_toml import load_design

    state_path = args.state or Path(args.design.with_suffix(".npz").name)
    _check_writable("--state", state_path, (".npz",))
    _check_writable("--plot", args.plot, FIGURES)
    _check_writable("--json", args.json, (".json",))
    ms.enable_x64()
    spec = load_design(args.design)
    state = _load_state(state_path, args.resume)
    members = "" if len(spec.systems) == 1 else f", {len(spec.systems)} members"
    print(report.system(spec.system + members, spec.systems[0], {}), end="\n\n", flush=True)
    print_step = design_report.lines(
        tuple(t.name for t in spec.targets), lambda text: print(text, flush=True)
    )

    # stored after each step, so that an interrupted design can go on
    def after_step(state: State) -> None:
        provenance = {"design": args.design.name, "system": spec.system}
        ms.io.save(state_path, state, provenance=provenance)
        print_step(state)

    options = {**spec.options, **({} if args.steps is None else {"steps": args.steps})}
    design = ms.design.fit(
        spec.targets, spec.systems, spec.free, resume=state, callback=after_step, **options
    )
    print("", design, f"the state is in {state_path}", sep="\n")
    if args.plot:
        _figure(args.plot, lambda: ms.plots.design_history(design)[0])
        print(f"wrote {args.plot}")
    if args.json:
        _write_json(args.json, design_report.as_dict(design))
    if not design.status.good:
        print(f"not there: {design.status.sentence}")
        return UNTRUSTED
    print("good: every target is met")
    return GOOD


def _load_state(path: Path, resume: bool) -> State | None:
    """Load the stored state of a search for parameters; return None if there is no such file.

    Raises:
      InputError: the file exists, and the search is not to be resumed.
    """
    import mdsens as ms

    if not path.exists():
        return None
    if not resume:
        raise InputError(
            f"{path} exists already: give --resume to go on from it, or another --state to start"
            " again."
        )
    return ms.io.load(path)


def _print_verdict(
    findings: Sequence[Finding], praise: str, warned: Sequence[str] = (), strict: bool = False
) -> int:
    """Print a line that says whether the results can be trusted, and return the exit code.

    Args:
      findings: the checked results; a result with a ``reason`` is not to be trusted.
      praise: text of the line if all results can be trusted.
      warned: warnings to report.
      strict: whether a warning is a reason not to trust the results.
    """
    bad = [f"{finding.part.label}: {finding.reason}" for finding in findings if finding.reason]
    bad += warned if strict else []
    if bad:
        print(f"not to be trusted: {'; '.join(bad)}")
        return UNTRUSTED
    plural = "see the warning" if len(warned) == 1 else f"see the {len(warned)} warnings"
    print(f"good: {praise} ({plural})" if warned else f"good: {praise}")
    return GOOD


def _store(path: Path, lin: Linearization, findings: Sequence[Finding]) -> None:
    """Store the minimum and its responses to parameters as plain arrays, for ``numpy.load``.

    The status, the residual and the error of each response are stored, too.
    """
    import numpy as np

    from mdsens.io.files import replacing

    arrays = {**_collect_responses(lin, findings), **_collect_minimum(lin)}
    with replacing(path) as file:
        np.savez(
            file, **{name: np.asarray(value) for name, value in arrays.items()}, allow_pickle=False
        )
    print(f"wrote {path}")


def _collect_responses(lin: Linearization, findings: Sequence[Finding]) -> dict[str, Any]:
    """Collect the responses of a minimum to parameter components in a dict of lists.

    Each list has one entry for each component: its label, the response, the non-affine part of the
    response, the status, the residual or the error. Where the cell was relaxed to a pressure, the
    dict also has a list of the strains of the cell, and this pressure as one number.
    """
    responses = [finding.response for finding in findings]
    cell = {}
    if lin.cell is not None:  # the cell was relaxed to a pressure
        strains = [r.value.strain for r in responses]
        cell = {"strain": strains, "pressure": lin.equilibrium.pressure}
    return {
        "wrt": [finding.part.label for finding in findings],
        "value": [report.parts_of(r.value)[0] for r in responses],
        **cell,
        "nonaffine": [r.nonaffine for r in responses],
        "status": [r.status.name for r in responses],
        "residual": [r.stats.residual for r in responses],
        "finite_difference_error": [finding.error for finding in findings],
    }


def _collect_minimum(lin: Linearization) -> dict[str, Any]:
    """Return the arrays of a minimum by name: positions, rattlers, parameters, box, species."""
    system = lin.equilibrium.system
    return {
        "rattlers": lin.network.rattlers,
        "positions": system.positions,
        "max_force": lin.equilibrium.max_force,
        **{f"parameter_{name}": value for name, value in named_leaves(system.params)},
        **({} if system.box is None else {"box": system.box}),
        **({} if system.species is None else {"species": system.species}),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write numbers and texts to a JSON file."""
    import json

    from mdsens.io.files import replacing

    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())
    print(f"wrote {path}")


def _plot(path: Path, lin: Linearization, finding: Finding) -> None:
    """Draw the particles' displacements in response to a parameter, and write the figure."""
    import mdsens as ms

    label = finding.part.label
    _figure(path, lambda: ms.plots.sensitivity_map(lin, finding.response, title=f"d/d {label}"))
    print(f"wrote {path}: {label}")


def _figure(path: Path, draw: Callable[[], Any]) -> None:
    """Write the figure that ``draw`` makes to a file; ``draw`` returns one Axes of the figure."""
    import matplotlib

    from mdsens.io.files import replacing

    matplotlib.use("agg")  # a backend that needs no display
    figure = draw().get_figure(root=True)
    assert figure is not None
    with replacing(path) as file:
        # the format has to be named: an open file has no suffix by which matplotlib chooses it
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=300)


def _verify(args: argparse.Namespace) -> int:
    """Run ``mdsens verify``: check responses of a minimum to parameter components.

    Each response is compared with finite differences, and with the adjoint. Many components are
    checked at once, by the response to a random change of all of them.
    """
    import mdsens as ms

    eq, lin, parts = _relax_system(args)
    if len(parts) > MANY:  # one random direction tests all components at once
        parts = [report.random_direction(parts)]
    w = report.random_cotangent(eq.system)
    adjoint = ms.vjp(lin, w)
    findings = [report.examined(eq, lin, part, adjoint=(w, adjoint)) for part in parts]
    print(report.verification(findings), end="\n\n")
    error = max(finding.error for finding in findings)
    gap = max(finding.gap for finding in findings)
    return _print_verdict(
        findings, f"agrees with finite differences to {error:.0e} and with its adjoint to {gap:.0e}"
    )


def _keep_compiled(chosen: str | None) -> None:
    """Keep compiled code in a folder, from which the next command loads it.

    The first of these that is set decides: ``JAX_COMPILATION_CACHE_DIR`` of the environment, which
    jax reads itself; the option ``--cache``; ``MDSENS_CACHE`` of the environment; else it is the
    folder ``mdsens`` in the user's folder of caches. "none" stands for no folder. Where the folder
    cannot be written, nothing is kept, with a warning if the user has named the folder.

    Args:
      chosen: the value of the option ``--cache``; None where it is missing.
    """
    # after the options are read: the module imports jax
    from mdsens._util import compilation

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    named = chosen or os.environ.get("MDSENS_CACHE")
    if named == "none":
        return
    try:
        folder = Path(named) if named else compilation.cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # no home directory, or a file is in the way
        writable = False
    if writable:
        compilation.keep_compiled(folder)
    elif named:
        print(f"warning: {named} cannot be written: compiled code is not kept", file=sys.stderr)


def _systems(args: argparse.Namespace) -> int:
    """Run ``mdsens systems``: list the systems that come with mdsens."""
    import mdsens as ms

    title = "Systems: give the name, or the path of a .toml file of your own"
    print(tables.text(title, list(ms.io.bundled_systems().items())))
    return GOOD


def _doctor(args: argparse.Namespace) -> int:
    """Run ``mdsens doctor``: show versions and device, and check neighbor lists for lost pairs."""
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
    energies = doctor.energies()
    table = [[method, f"{energy:.9f}", f"{error:.0e}"] for method, energy, error in energies]
    title = "One energy by several methods: random spheres in a periodic cell in 3-D"
    print(tables.columns(title, ["method", "energy", "error"], table), end="\n\n")
    # "not below", so that an energy of NaN fails too
    bad = [method for method, _, error in energies if not error < doctor.TOLERANCE]
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
