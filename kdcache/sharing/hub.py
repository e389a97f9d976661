"""The Hub's own library, made quiet, and its refusals as kdcache's errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from kdcache.archive.format.manifest import CARD_NAME
from kdcache.errors import IncompatibleError, KdcacheError, RetryError, UsageError, printable

__all__ = ["OF_THE_HUB", "quiet_hub", "told_by_the_hub"]

OF_THE_HUB = {".gitattributes", CARD_NAME}  # files of a repository created on the Hub's web page


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Hide the progress bars of the Hub's own library."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def told_by_the_hub(url: str, kind: str = "dataset") -> Iterator[None]:
    """Translate the Hub's refusals into kdcache's errors."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except KdcacheError:
        raise
    except HFValidationError as error:
        raise UsageError(f"{url} is not a {kind} on the Hub", why=printable(error), fix="correct its name") from None
    except Exception as error:  # huggingface_hub raises errors of its HTTP library, which varies
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
        why = printable(str(error).partition("\n")[0])[:300] or type(error).__name__
        if status in {401, 403, 404}:
            raise UsageError(
                f"not allowed to write {url}",
                why=why,
                fix="log in with a token that may write there: hf auth login, or set HF_TOKEN",
            ) from None
        if status is not None and 400 <= status < 500 and status not in {408, 425, 429}:
            raise IncompatibleError(
                f"the Hub refuses {url}", why=why, fix="correct what it says, and repeat the command"
            ) from None
        raise RetryError(
            f"{url} cannot be reached", why=why, fix="repeat the command when it can: what was sent is kept there"
        ) from error
