"""What a corpus will be as tokens, before it is prepared: nothing is written and nothing is downloaded.

Eats `config.Data`; yields counts. Exact for plain text as bytes or characters; for a byte-pair encoding a few stretches
of the corpus are encoded, where its ranks are on this machine.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.data import corpus
from orchestrator.data.corpus import Source
from orchestrator.data.documents import Span, pieces, plan_spans
from orchestrator.data.tokenizer import N_VOCAB, has_ranks, load_tokenizer

if TYPE_CHECKING:
    from orchestrator.config.experiment import Data

BYTES_PER_TOKEN = 4.0  # of English in a vocabulary of 50,000; where nothing can be encoded
SAMPLES, SAMPLE_BYTES = 8, 64 << 10
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class TokenEstimate:
    """Size of a corpus; None for what cannot be known before it is downloaded or prepared."""

    bytes: int | None
    tokens: int | None
    exact: bool
    n_vocab: int | None


def estimate_tokens(data: "Data") -> TokenEstimate:
    """Estimate the size of the whole corpus.

    Raises:
        UserError: as preparing would: a missing path, an unknown tokenizer; for `char` also what is wrong inside.
    """
    sources = corpus.resolve(data.corpus)
    if any(s.size is None for s in sources):
        return TokenEstimate(None, None, False, _n_vocab(data.tokenizer))
    size = sum(s.size for s in sources)
    plain = all(s.kind == "text" for s in sources)
    ends = len(sources) if plain and data.append_eot else 0
    if data.tokenizer == "char":
        count, seen = _characters(sources, data)
        return TokenEstimate(size, count, True, len(seen))
    if data.tokenizer == "byte" and plain and data.invalid_utf8 == "stop":
        return TokenEstimate(size, size + ends, True, 257)
    tokens = round(size / _bytes_per_token(sources, data)) + ends
    return TokenEstimate(size, tokens, False, _n_vocab(data.tokenizer))


def _n_vocab(name: str) -> int | None:
    if name == "char":
        return None
    return N_VOCAB[name] if name in N_VOCAB else load_tokenizer(name).n_vocab


def _characters(sources: list[Source], data: "Data") -> tuple[int, set[str]]:
    count, seen = 0, set()
    for chunk in plan_spans([s.size for s in sources], CHUNK_BYTES):
        for number, start, end in chunk:
            for piece in pieces(_span(sources[number], start, end, data), data.text_field):
                count += len(piece.text)
                seen.update(piece.text)
    return count, seen


def _bytes_per_token(sources: list[Source], data: "Data") -> float:
    """Bytes of the files per token of their text, from a few stretches spread evenly over the corpus."""
    if data.tokenizer not in N_VOCAB:
        load_tokenizer(data.tokenizer)  # unknown: says so
    if data.tokenizer != "byte" and not has_ranks(data.tokenizer):
        return BYTES_PER_TOKEN
    tokenizer, read, tokens = load_tokenizer(data.tokenizer), 0, 0
    chunks = plan_spans([s.size for s in sources], SAMPLE_BYTES)
    for chunk in chunks[:: max(1, len(chunks) // SAMPLES)][:SAMPLES]:
        for number, start, end in chunk:
            read += end - start
            for piece in pieces(_span(sources[number], start, end, data), data.text_field):
                tokens += len(tokenizer.encode(piece.text)) + (
                    data.append_eot and sources[number].kind != "text"
                )
    return read / tokens if tokens else BYTES_PER_TOKEN


def _span(source: Source, start: int, end: int, data: "Data") -> Span:
    return Span(
        str(source.path),
        source.name,
        source.kind,
        source.size,
        start,
        end,
        data.invalid_utf8 == "replace",
    )
