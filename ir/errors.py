"""Every error that graphwright raises for a user's mistake, or for a promise that did not hold.

One sentence each: what, where, why, what to try. The failing operation's IR travels as a note (`add_note`), so the
sentence stays short. A `ValueError` or `KeyError` that escapes to the user is a defect of ours.
"""


class GraphwrightError(Exception):
    """Base of all errors below: `except gw.GraphwrightError` catches what graphwright itself has to say."""


def first_line(error: BaseException) -> str:
    """What another package's exception says, as part of one sentence; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """`text`, of which nothing can colour, turn around or overwrite what a terminal shows; lines stay."""
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


class CaptureError(GraphwrightError):
    """A model could not be turned into a program; the message lists every blocker found."""


class VerifyError(GraphwrightError):
    """A program breaks a rule of the IR (structure, schema, metadata, weights, dialect)."""


class ParseError(GraphwrightError):
    """Text is not a program: line and column (both from 1) say where."""

    def __init__(self, message: str, line: int, column: int):
        super().__init__(f"line {line}, column {column}: {message}")
        self.line, self.column = line, column


class PassError(GraphwrightError):
    """A pass is unknown, has a bad option, stands in the wrong order, or failed inside."""


class ContractError(GraphwrightError):
    """A pass changed the function by more than its contract allows."""


class BudgetError(GraphwrightError):
    """A budget that the user insisted on cannot be met."""


class InputError(GraphwrightError):
    """A call's arguments do not fit the program's signature (tree, dtype, shape, symbol range)."""


class CalibrationError(InputError):
    """The iterable of example inputs that a pass was given raised as it was iterated; its own exception is the cause."""


class ArtifactError(GraphwrightError):
    """A file is not what it should be: truncated, edited, of another version, or not ours."""


class TargetError(GraphwrightError):
    """The asked-for backend or device cannot run here."""


class StateError(GraphwrightError):
    """A step would read keys and values that were never written: a fault of the schedule that asked for it, not of the call."""
