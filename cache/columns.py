"""The columns of a batch, as Transformers counts them: which are tokens, and which ids were fed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_NEVER = np.iinfo(np.int64).max


class Columns:
    """As many for every request, padding included.

    Args:
        mask: bool [requests, columns] of the prompts; padding is `False`.

    Attributes:
        length: how many there are.
        prompts: how many of them are the prompts'.
        ended: int64 [requests], the column from which a request is finished.
        fed: ids of the tokens fed since the prompts, [requests, any] each; `None` where not told.
    """

    def __init__(self, mask: np.ndarray):
        self.length = self.prompts = mask.shape[1]
        self.ended = np.full(len(mask), _NEVER)
        self.fed: list[torch.Tensor | None] = []
        self._mask = mask  # columns beyond it are tokens, up to a request's end
        self._stops: Sequence[int] = ()
        self._searched = 0  # of `fed`

    def begin(self, batch: int) -> None:
        """Makes this the columns, none so far, of requests without prompts."""
        self._mask, self.ended = np.ones((batch, 0), bool), np.full(batch, _NEVER)

    def copy(self) -> Columns:
        """The same, to change by itself."""
        twin = Columns(self._mask)
        twin.length, twin.prompts = self.length, self.prompts
        twin.ended, twin.fed = self.ended.copy(), list(self.fed)
        return twin

    def tokens(self) -> np.ndarray:
        """Which columns are tokens, bool [requests, length]."""
        later = np.arange(self._mask.shape[1], self.length) < self.ended[:, None]
        return np.concatenate([self._mask, later], 1)

    @property
    def alive(self) -> np.ndarray:
        """Which requests are not finished, bool [requests]."""
        return self.ended > self.length

    @property
    def longest(self) -> int:
        """Tokens of the longest request as `generate()` numbers them: beyond its end, too."""
        prompts = self._mask[:, : self.prompts].sum(1).max(initial=0)
        return int(prompts) + self.length - self.prompts

    @property
    def ids(self) -> torch.Tensor | None:
        """What was fed since the prompts, [requests, length - prompts], if it is all known."""
        known = [ids for ids in self.fed if ids is not None]
        if not known or sum(ids.shape[1] for ids in known) != self.length - self.prompts:
            return None
        return torch.cat(known, 1)

    def advance(self, count: int, real: np.ndarray | None = None) -> None:
        """Adds columns.

        Args:
            count: how many.
            real: bool [requests, count], padding `False`; `None` where there is none.
        """
        if real is not None:
            self._mask = np.concatenate([self.tokens(), real], 1)
        self.length += count

    def cut(self, count: int) -> np.ndarray:
        """Removes the last `count` columns, or all; int [requests], the tokens in them."""
        keep = max(0, self.length - count)
        removed = self.tokens()[:, keep:].sum(1)
        ids = self.ids
        self.fed = [] if ids is None else [ids[:, : max(0, keep - self.prompts)]]
        self._searched = len(self.fed)
        self.length, self._mask = keep, self._mask[:, :keep]
        self.prompts = min(self.prompts, keep)
        self.ended[self.ended > keep] = _NEVER
        return removed

    def select(self, indices: Sequence[int]) -> None:
        """Makes requests `indices` the batch."""
        indices, ids = list(indices), self.ids
        self._mask, self.ended = self._mask[indices], self.ended[indices]
        self.fed = [] if ids is None else [ids[indices]]
        self._searched = len(self.fed)

    def stop_at(self, ids: Sequence[int]) -> None:
        """Ends requests that are fed one of `ids` from now on, when `find_ends` is called."""
        self._stops, self._searched = ids, len(self.fed)

    def resume(self) -> None:
        """Lets all requests go on; what they were fed behind their ends is padding."""
        if (self.ended < _NEVER).any():
            self._mask, self.ended = self.tokens(), np.full(len(self.ended), _NEVER)

    def find_ends(self) -> None:
        """Ends requests that were fed one of the ids to stop at: they get no more pages or work."""
        fed = self.fed[self._searched :]
        self._searched += len(fed)
        if not len(self._stops) or not fed or any(ids is None for ids in fed):
            return
        done = np.isin(torch.cat(fed, 1).cpu().numpy(), self._stops).any(1)
        self.ended[done] = np.minimum(self.ended[done], self.length)

    def added(self, mask: np.ndarray, ended_too: bool) -> np.ndarray:
        """The new columns of a mask, once the others are known to be as they were.

        Args:
            mask: bool [requests, columns].
            ended_too: whether requests that have ended may have tokens behind their ends, as
                `generate()` goes on feeding them.

        Returns:
            bool [requests, columns - length].

        Raises:
            ValueError: if a column is a token that was none, or the reverse.
        """
        differs = mask[:, : self.length] != self.tokens()
        if ended_too:
            differs &= np.arange(self.length) < self.ended[:, None]
        if differs.any():
            row, column = np.argwhere(differs)[0].tolist()
            raise ValueError(
                f"attention_mask says {int(mask[row, column])} at request {row}, column {column}, "
                "and said otherwise when that token was stored, or the request had ended there. "
                "Pass the mask of the prompts with ones behind it; or, to go on behind ends that "
                "requests met at different steps, all their tokens: what is stored is found."
            )
        return mask[:, self.length :]
