"""The errors which mpsrun raises on purpose; each text says what was expected, found, and what to do."""


def in_a_line(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, if it says anything."""
    return str(error).strip().partition("\n")[0].rstrip()


class MpsrunError(Exception):
    """Any error which mpsrun itself raises."""


class UsageError(MpsrunError):
    """mpsrun was asked for what it cannot do here; the launcher prints one line and exits with 2."""


class WorkerError(MpsrunError, RuntimeError):
    """A worker raised, was killed or did not answer in time; the text has its traceback if there is one."""


class MemoryGone(MpsrunError):
    """Memory that another process has shared is not there any more: its owner has freed it since."""


class NotNow(MpsrunError):
    """Something cannot be done at the moment, for instance since a worker is missing; later it can."""


class NotShippable(MpsrunError):
    """A branch cannot be written as data and stays in the lead; the text is the reason in words."""
