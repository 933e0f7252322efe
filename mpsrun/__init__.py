"""mpsrun runs the independent branches of a PyTorch network at the same time on one GPU."""

TYPE_CHECKING = False  # imports nothing: `python -m mpsrun` runs this with the working directory on sys.path
if TYPE_CHECKING:
    from mpsrun.checkpointer import Checkpointer as Checkpointer
    from mpsrun.run.branches import Branches as Branches
    from mpsrun.run.explain import explain as explain

__version__ = "0.1.0"
__all__ = ["Branches", "Checkpointer", "__version__", "explain"]


def __getattr__(name: str) -> object:
    """Import what the package offers on first use, so that the launcher never imports torch."""
    if name == "Branches":
        from mpsrun.run.branches import Branches

        return Branches
    if name == "Checkpointer":
        from mpsrun.checkpointer import Checkpointer

        return Checkpointer
    if name == "explain":
        from mpsrun.run.explain import explain

        return explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
