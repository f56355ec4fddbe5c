"""`stream`: the rows of a call as its jobs finish."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from lbr.api.arguments import Frame, Function, Inputs, checked_stream
from lbr.api.call import Call, StreamOptions
from lbr.api.follow import PAUSE_SHARE, finished
from lbr.api.rows import Row, settled
from lbr.core.config import one_of
from lbr.core.types import Order

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

T = TypeVar("T")
LOOK_SECONDS = 0.1


@overload
def stream(
    prompts: Inputs | Frame, function: Function = None, *, result_type: type[T], **options: Unpack[StreamOptions]
) -> AsyncGenerator[Row[T], None]: ...


@overload
def stream(
    prompts: Inputs | Frame,
    function: Function = None,
    *,
    result_type: str | None = None,
    **options: Unpack[StreamOptions],
) -> AsyncGenerator[Row[Any], None]: ...


@partial(checked_stream, options=Call)
async def stream(
    prompts: Inputs | Frame,
    function: Function = None,
    *,
    model: str | None = None,
    openrouter_api_key: str | None = None,
    result_type: Any = None,
    order: str = Order.INPUT,
    **options: Any,
) -> AsyncGenerator[Row[Any], None]:
    """Answer every prompt, and yield a row for each as soon as its job has finished. The same call again resumes.

    `order`: "input", in the order of the prompts, so that a row waits for those before it; or "finished".
    The other options, and the rows, are those of `prompt_map`. If you leave the loop early, every answer is kept and the
    jobs are given back; `contextlib.aclosing` waits for that. No results database is written.

    Raises UsageError, InputError or DatabaseError.
    """
    wanted = Order(one_of("order", order, tuple(Order)))
    given = {"openrouter_api_key": openrouter_api_key, "result_type": result_type}
    call = Call(prompts, model, function, **given, **options)
    if call.source.is_empty:
        return
    async with call.begun() as (database, run, inputs):
        working = asyncio.create_task(call.work(database, run))

        async def sleep(took: float) -> None:
            ended, _ = await asyncio.wait([working], timeout=max(LOOK_SECONDS, PAUSE_SHARE * took))
            if ended:
                working.result()
                await asyncio.sleep(LOOK_SECONDS)  # other workers may still hold jobs

        pages = finished(database, run, bytearray(), order=wanted, include=run.keep, sleep=sleep)
        try:
            async with aclosing(pages):
                async for page in pages:
                    for row in page:
                        if row.idx < inputs:
                            yield Row(settled(row).to_dict(), result_type)
            await working
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
