"""Trains a byte-pair encoding: counts the words of a text, and merges their most frequent pairs.

The result depends only on how often each word occurs, not on the order of the words or on threads.
Which characters are letters and numbers (\\p{L}, \\p{N}) is in the Unicode tables of `regex`, not
in those of Python; tokenizer.json has its version. No library trains here: those that we tried take
minutes to hours for one line of a megabyte without a space.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise

import regex

# The pattern of GPT-2, whose matches are the words. Merges do not go across words.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_WORD = regex.compile(PATTERN)
LONGEST = 256  # characters; longer words take long and teach little
LEAST = 2  # a pair that occurs less often is not merged
SAMPLE = 64 << 20  # characters of train that are read at most
WINDOW = 1 << 20  # of which this many stand together

Pair = tuple[int, int]


def count_words(texts: Iterable[str]) -> dict[str, int]:
    """Return how often each word occurs, without the longest words."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_WORD.findall(text, concurrent=True))  # other threads run meanwhile
    return {word: n for word, n in words.items() if len(word) <= LONGEST}


def windows(first: int, length: int, total: int) -> Iterator[slice]:
    """Return the parts of a text that are in the sample: all of it if the corpus is small enough.

    Else these are windows at places that depend only on `total`.

    Args:
        first: Characters of the corpus before the text.
        length: Characters of the text.
        total: Characters that are sampled.
    """
    if total <= SAMPLE:
        yield slice(None)
        return
    distance = -(-total * WINDOW // SAMPLE)  # rounded up
    for window in range(-(first % distance), length, distance):
        if window + WINDOW > 0:
            yield slice(max(0, window), window + WINDOW)


def learn_merges(
    words: Mapping[str, int], size: int, progress: Callable[[float], object]
) -> list[bytes]:
    """Return the tokens that merging makes of pairs, the most frequent pair first.

    Of pairs that occur equally often, the one with the smallest ids is merged.

    Args:
        words: How often each word occurs.
        size: Number of tokens; there are fewer if no pair occurs twice any more.
        progress: Called with the share that is done.
    """
    tokens = [bytes([i]) for i in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = _Pairs(words)
    queue = [(-n, pair) for pair, n in pairs.counts.items()]
    heapq.heapify(queue)
    while queue and len(tokens) < 256 + size:
        count, pair = heapq.heappop(queue)
        now = pairs.counts[pair]
        if now < LEAST:
            continue
        if now != -count:  # it was counted before other merges
            heapq.heappush(queue, (-now, pair))
            continue
        token = tokens[pair[0]] + tokens[pair[1]]
        merged = ids.setdefault(token, len(tokens))  # two pairs may make the same token
        if merged == len(tokens):
            tokens.append(token)
            progress((len(tokens) - 256) / size)
        for changed in pairs.merge(pair, merged):
            heapq.heappush(queue, (-pairs.counts[changed], changed))
    return tokens[256:]


class _Pairs:
    """Pairs of neighbouring ids in words.

    Attributes:
        counts: How often each pair occurs.
        where: Numbers of the words that have a pair, or had it.
    """

    def __init__(self, words: Mapping[str, int]) -> None:
        self.words = [tuple(word.encode()) for word in words]
        self.weights = list(words.values())
        self.counts: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)
        for i, word in enumerate(self.words):
            for pair in pairwise(word):
                self.counts[pair] += self.weights[i]
                self.where[pair].add(i)

    def merge(self, pair: Pair, merged: int) -> set[Pair]:
        """Replace a pair by one id in all words. Returns the pairs that occur more often now."""
        more = set()
        for i in self.where.pop(pair):
            weight = self.weights[i]
            for old in pairwise(self.words[i]):
                self.counts[old] -= weight
            word = self.words[i] = _replaced(self.words[i], pair, merged)
            for new in pairwise(word):
                self.counts[new] += weight
                if merged in new:
                    self.where[new].add(i)
                    more.add(new)
        return more


def _replaced(word: tuple[int, ...], pair: Pair, merged: int) -> tuple[int, ...]:
    found: list[int] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            found.append(merged)
            i += 2
        else:
            found.append(word[i])
            i += 1
    return tuple(found)
