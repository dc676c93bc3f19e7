"""Pages of the key-value cache: who holds which, and which prefixes they keep for those who come later.

A page is in exactly one place: held by one or more sequences, or in the queue of free pages.  A free page may still
keep a known prefix; it is taken up again by whoever has that prefix, and forgotten when its turn in the queue comes.

A known page is found by the identity of the page before it and its own tokens, compared as they are: no hashes collide.
An identity is never used twice, so what followed a forgotten page is never found again.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count

ROOT = 0  # identity of the empty prefix
Key = tuple[int, tuple[int, ...]]  # identity of the prefix before the page, tokens of the page


class Pages:
    """A pool of `total` pages of `size` tokens each.

    Args:
        prefixes: whether full pages are remembered for other sequences.

    Raises:
        ValueError: a pool without pages, or pages without tokens.
    """

    def __init__(self, total: int, size: int, prefixes: bool = True):
        if total < 1 or size < 1:
            raise ValueError(f"the pool has {total} pages of {size} tokens, wanted at least one of each")
        self.total, self.size, self.prefixes = total, size, prefixes
        self.free: OrderedDict[int, None] = OrderedDict((page, None) for page in range(total))  # next to go first
        self.holders = [0] * total
        self.known: dict[Key, int] = {}
        self.key_of: dict[int, Key] = {}
        self.identity: dict[int, int] = {}  # of the prefix that ends with a known page
        self.identities = count(ROOT + 1)

    def needed(self, tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-tokens // self.size)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Known pages that hold the start of `tokens`, never all of them: one token is left to compute logits from."""
        found: list[int] = []
        before = ROOT
        if not self.prefixes:
            return found
        for start in range(0, len(tokens) - self.size, self.size):
            page = self.known.get((before, tuple(tokens[start : start + self.size])))
            if page is None:
                break
            found.append(page)
            before = self.identity[page]
        return found

    def cost(self, matched: Iterable[int]) -> int:
        """How many free pages it takes to hold `matched` once more: those that nobody holds."""
        return sum(self.holders[page] == 0 for page in matched)

    def hold(self, matched: Iterable[int]) -> None:
        """One more sequence holds these pages."""
        for page in matched:
            if self.holders[page] == 0:
                del self.free[page]
            self.holders[page] += 1

    def take(self) -> int:
        """The free page whose turn it is, its prefix forgotten, held once; KeyError where none is free."""
        page, _ = self.free.popitem(last=False)
        self._forget(page)
        self.holders[page] = 1
        return page

    def release(self, table: Sequence[int]) -> None:
        """One sequence lets go of its pages.  The last ones are given away first: a prefix outlives what follows."""
        for page in reversed(table):
            if self.holders[page] < 1:
                raise RuntimeError(f"page {page} is released, but nobody holds it")
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.free[page] = None
                if page not in self.key_of:
                    self.free.move_to_end(page, last=False)  # nothing is lost with it

    def remember(self, before: int, tokens: tuple[int, ...], page: int) -> int:
        """Make a full, computed page known as what follows the prefix `before`; the identity of the longer prefix.

        Where another page holds the same already, that one stays known, and this one belongs to its sequence alone.
        """
        key = (before, tokens)
        if key in self.known:
            return self.identity[self.known[key]]
        if page in self.key_of:
            raise RuntimeError(f"page {page} is known as another prefix already")
        self.known[key], self.key_of[page], self.identity[page] = page, key, next(self.identities)
        return self.identity[page]

    def _forget(self, page: int) -> None:
        key = self.key_of.pop(page, None)
        if key is not None:
            del self.known[key], self.identity[page]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Every page is in exactly one place, and everything adds up, given the tables of all living sequences.

        Raises:
            AssertionError: with what is wrong.
        """
        held = [0] * self.total
        for table in tables:
            assert len(set(table)) == len(table), f"a table names a page twice: {list(table)}"
            for page in table:
                held[page] += 1
        wrong = {
            page: (held[page], self.holders[page]) for page in range(self.total) if held[page] != self.holders[page]
        }
        assert not wrong, f"pages are held so often (in tables, counted): {wrong}"
        free = {page for page in range(self.total) if held[page] == 0}
        assert set(self.free) == free, f"free pages are {sorted(self.free)}, wanted {sorted(free)}"
        assert self.known == {key: page for page, key in self.key_of.items()}, "known prefixes and their pages differ"
        assert set(self.identity) == set(self.key_of), "a known page lacks its identity, or the other way round"
        assert len(set(self.identity.values())) == len(self.identity), "two pages have one identity"
        assert all(len(tokens) == self.size for _, tokens in self.known), "a page is known that is not full"
