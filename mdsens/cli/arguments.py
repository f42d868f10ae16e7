"""The parser of the command line ``mdsens``: commands, options, and checks of their values."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from mdsens.cli import report
from mdsens.potentials.parameters import split_label

__all__ = ["FIGURES", "MANY", "SOLVERS", "UNTRUSTED", "parser"]

UNTRUSTED = 3  # the exit code of a result that is not to be trusted
MANY = 10  # components of a parameter that are shown one by one; more are ranked instead
# suffixes of figures; matplotlib chooses the format by them
FIGURES = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
# what the user types, in lower case, and the name of the solver in mdsens.implicit
SOLVERS = {name.lower(): name for name in ("Auto", "GMRES", "CG", "MINRES", "BiCGSTAB", "Direct")}
EXAMPLES = """\
examples:
  mdsens systems                                           the systems that come with mdsens
  mdsens sensitivity seed_packing_2d --wrt "sigma[1]"      how a packing moves as species 1 grows
  mdsens sensitivity seed_packing_2d --wrt alpha --plot alpha.png --out alpha.npz
  mdsens relax my_system.toml --seed 3 --extxyz relaxed.extxyz
  mdsens certify seed_packing_2d --wrt "sigma[1]"          can that be trusted, and how far
  mdsens moduli seed_packing_2d --pressure 0.05 --wrt "sigma[1]"
  mdsens design design.toml --plot history.png             parameters that meet given targets
  mdsens verify dimer --wrt sigma                          finite differences, and the adjoint
  mdsens doctor                                            versions, device, compiler check

exit codes:
  0 the result is good; 2 bad input; 3 a result not to be trusted; 1 an internal error;
  130 interrupted
"""
WRT = (
    "what to differentiate by: a parameter (sigma), a component (sigma[1]), or a component of a"
    " matrix of species pairs (sigma[0,1], which in a pair potential changes together with"
    " sigma[1,0]) or of a table of triples (lambda[0,1,1]); with --pressure also the pressure"
)


def parser(
    runs: Mapping[str, Callable[[argparse.Namespace], int]], version: type[argparse.Action]
) -> argparse.ArgumentParser:
    """Build the parser of the command line ``mdsens``, with all commands and options.

    Args:
      runs: for each command, by name, the function that runs the command and returns an exit code.
      version: argparse action that prints the version, for the option ``--version``.
    """
    top = argparse.ArgumentParser(
        prog="mdsens",
        description=(
            "How relaxed particle configurations move with the parameters of their interactions."
        ),
        epilog=EXAMPLES,
        # keeps the line breaks of the examples, which argparse would fold
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(title="commands", metavar="COMMAND")

    # One function for each group of options that several commands share.

    def add_command(name: str, what: str, more: str = "") -> argparse.ArgumentParser:
        description = f"{what[0].upper()}{what[1:]}.{' ' if more else ''}{more}"
        command = commands.add_parser(name, help=what, description=description)
        command.set_defaults(run=runs[name], command=name)
        command.add_argument(
            "--cache",
            metavar="FOLDER",
            help=(
                "where to keep compiled code for the next time, or none (default: MDSENS_CACHE of"
                " the environment, or mdsens in the user's folder of caches)"
            ),
        )
        return command

    def add_system_options(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "system",
            metavar="SYSTEM",
            help="a bundled name (mdsens systems lists them) or a .toml file",
        )
        command.add_argument(
            "--seed",
            type=int,
            help="seed of random starts and parameters (default: the system's own)",
        )
        command.add_argument(
            "--tolerance",
            type=_positive,
            help=(
                "largest net force on a particle to relax to, in the system's units (default: the"
                " system's, or 1e-12 of the mean force of its pairs, as far as round-off allows)"
            ),
        )

    def add_pressure_options(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--pressure", type=_number, metavar="P", help="relax the cell too, to this pressure"
        )
        command.add_argument(
            "--shape",
            action="store_true",
            help="with --pressure: relax the cell's shape, not size alone",
        )

    def add_derivative_options(command: argparse.ArgumentParser) -> None:
        command.add_argument("--wrt", required=True, metavar="NAME", type=_wrt, help=WRT)
        command.add_argument(
            "--solver", choices=SOLVERS, default="auto", help="linear solver (default: auto)"
        )

    def add_strict_option(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--strict", action="store_true", help=f"exit with {UNTRUSTED} on any warning too"
        )

    sensitivity = add_command(
        "sensitivity",
        "relax a system, and differentiate where its particles come to rest",
        f"Without an index every component is taken in turn; beyond {MANY} components, the {MANY}"
        " that move the others most are listed and the first is shown. Each result is checked by"
        " relaxing again at parameters a little to either side: above a relative difference of"
        f" {report.AGREEMENT:g} the exit code is {UNTRUSTED}.",
    )
    add_system_options(sensitivity)
    add_pressure_options(sensitivity)
    add_derivative_options(sensitivity)
    sensitivity.add_argument(
        "--out",
        type=Path,
        metavar="FILE.npz",
        help="store positions, responses, statuses and errors, for numpy.load",
    )
    sensitivity.add_argument(
        "--plot",
        type=Path,
        metavar="FIGURE",
        help=(
            f"draw the response ({', '.join(FIGURES[:3])}, ...); of several components, the largest"
            " response"
        ),
    )
    sensitivity.add_argument(
        "--no-check", action="store_true", help="do not check against finite differences"
    )
    add_strict_option(sensitivity)

    certify = add_command(
        "certify",
        "examine a minimum: is it one, is it stable, how wrong can its derivative be, how far does"
        " it reach",
        "What did not relax, what is unjammed, floppy or a saddle is examined too: the exit code"
        f" is then {UNTRUSTED}.",
    )
    add_system_options(certify)
    add_pressure_options(certify)
    certify.add_argument(
        "--wrt",
        metavar="NAME",
        type=_wrt,
        help=f"{WRT}. Without --wrt the minimum alone is examined",
    )
    certify.add_argument(
        "--particle",
        type=int,
        metavar="I",
        help="report which part of particle I's position has no derivative (the null space)",
    )
    certify.add_argument(
        "--modes",
        type=int,
        default=1,
        metavar="K",
        help="how many of the lowest modes to compute (default: 1)",
    )
    certify.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="stop relaxing after N steps (default: the system's, or 200,000)",
    )
    certify.add_argument(
        "--single",
        action="store_true",
        help="compute in single precision, to see how many digits it leaves",
    )
    certify.add_argument("--json", type=Path, metavar="FILE.json", help="store every number")
    add_strict_option(certify)

    relax = add_command(
        "relax", "relax a system to a minimum of its energy, or at a pressure of its enthalpy"
    )
    add_system_options(relax)
    add_pressure_options(relax)
    relax.add_argument(
        "--out", type=Path, metavar="FILE.npz", help="store the minimum, for mdsens.io.load"
    )
    relax.add_argument(
        "--extxyz", type=Path, metavar="FILE", help="store it for OVITO, ASE and others"
    )

    moduli = add_command(
        "moduli",
        "relax a system, and measure its elastic moduli",
        "Bulk, shear and Young's modulus and Poisson's ratio, in both conventions for a solid"
        " under pressure; with --wrt their derivatives by a parameter. If the bulk or the shear"
        f" modulus is not positive, the exit code is {UNTRUSTED}; a strain that lowers the"
        " enthalpy, though both are, is a warning.",
    )
    add_system_options(moduli)
    add_pressure_options(moduli)
    moduli.add_argument("--wrt", metavar="NAME", type=_wrt, help=WRT)
    moduli.add_argument(
        "--plot", type=Path, metavar="FIGURE", help="in 2-D: draw E and nu against the angle"
    )
    moduli.add_argument(
        "--json", type=Path, metavar="FILE.json", help="store the tensors and their derivatives"
    )
    add_strict_option(moduli)

    design = add_command(
        "design",
        "find parameters that give relaxed systems the properties that are wanted",
        "The file says what is wanted, what may change and how far; systems/README.md documents"
        " it. After each step the state is stored, so that a design that was cut off can go on. If"
        f" a target is missed, the exit code is {UNTRUSTED}.",
    )
    design.add_argument("design", type=Path, metavar="DESIGN.toml", help="the design's file")
    design.add_argument(
        "--state",
        type=Path,
        metavar="FILE.npz",
        help="where to store the state (default: DESIGN.npz in the working directory)",
    )
    design.add_argument(
        "--resume",
        action="store_true",
        help="go on from the stored state, or begin where there is none",
    )
    design.add_argument(
        "--steps", type=_count, metavar="N", help="relaxations at most (default: the file's, or 60)"
    )
    design.add_argument("--plot", type=Path, metavar="FIGURE", help="draw the history")
    design.add_argument(
        "--json", type=Path, metavar="FILE.json", help="store the history and the parameters found"
    )

    verify = add_command(
        "verify",
        "compare a sensitivity with finite differences and with its own adjoint",
        f"Of a parameter with more than {MANY} components, one random direction through all is"
        f" taken. Limits: relative differences of {report.AGREEMENT:g} to finite differences,"
        f" {report.ADJOINT:g} between forward and adjoint.",
    )
    add_system_options(verify)
    add_pressure_options(verify)
    add_derivative_options(verify)
    add_command("systems", "list the systems that come with mdsens")
    add_command(
        "doctor",
        "show versions and the device, and check the compiler",
        f"Exit code {UNTRUSTED} if it fails.",
    )
    return top


# The types below raise ArgumentTypeError, whose message argparse prints behind the option's name.


def _positive(text: str) -> float:
    """Convert the text of a command-line option to a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number: give a number above 0")


def _count(text: str) -> int:
    """Convert the text of a command-line option to an integer of at least 1."""
    # isdecimal, and not isdigit, which is also true of digits such as ² that int() refuses
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number: give 1 or more")


def _number(text: str) -> float:
    """Convert the text of a command-line option to a finite number."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a finite number: give one, such as 0.05")


def _wrt(text: str) -> tuple[str, tuple[int, ...] | None]:
    """Split a text such as "sigma[1]" into a parameter's name and index; "sigma" has index None."""
    label = split_label(text)
    if label is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} names no parameter component: write sigma, sigma[1] or sigma[0,1]"
        )
    return label
