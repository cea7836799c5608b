"""Estimates the tokens of a corpus before it is prepared. Nothing is written or downloaded.

The number is exact for `char`, and for `byte` with plain text. For a byte-pair encoding, a few
chunks of the corpus are encoded, if the ranks are on this machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.data import corpus
from orchestrator.data.corpus import Listing
from orchestrator.data.documents import Piece, Span, read_pieces, reader_of
from orchestrator.data.encoder import is_possible
from orchestrator.data.input.kinds import kind_of as kind_of_file
from orchestrator.data.tasks import count, plan_chunks
from orchestrator.data.tokenizer import has_ranks, kind_of, load_tokenizer

if TYPE_CHECKING:
    from orchestrator.config.sections import Data

BYTES_PER_TOKEN = 4.0  # English, vocabulary of 50,000; used if nothing can be encoded
SAMPLES = 8  # chunks that are encoded
SAMPLE_BYTES = 64 << 10  # of each of them
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class TokenEstimate:
    """Size of a corpus. Values that need a download or a preparation are None."""

    bytes: int | None
    tokens: int | None
    exact: bool
    n_vocab: int | None


def estimate_tokens(data: "Data", sources: Listing | None = None) -> TokenEstimate:
    """Estimate the size of the whole corpus.

    Args:
        data: The `data` section.
        sources: The files of the corpus, if they were listed already.

    Raises:
        UserError: A path is missing or the tokenizer is unknown. For `char`, also the errors of
            reading the whole corpus.
    """
    name = data.tokenizer
    is_possible(data.encoder, name)
    sources = sources or corpus.resolve(data.corpus)
    n_vocab = kind_of(name).n_vocab
    counts = kind_of(name).counts
    if any(source.size is None for source in sources):
        return TokenEstimate(None, None, False, n_vocab)
    size = sum(source.bytes for source in sources)
    if counts == "characters":
        chunks = plan_chunks(sources, CHUNK_BYTES, data)
        characters, seen = count(span for spans in chunks for span in spans)
        return TokenEstimate(size, characters, True, len(seen))

    documents = 0  # documents whose end-of-text token `_bytes_per_token` does not count
    plain = all(reader_of(source.path).one_document for source in sources)
    if plain and data.append_eot:
        documents = len(sources)
    if any(kind_of_file(source.path).packing for source in sources):
        return TokenEstimate(size, None, False, n_vocab)
    if counts == "bytes" and plain and data.invalid_utf8 == "stop":
        return TokenEstimate(size, size + documents, True, n_vocab)
    bytes_per_token = BYTES_PER_TOKEN
    if has_ranks(name):
        bytes_per_token = _bytes_per_token(plan_chunks(sources, SAMPLE_BYTES, data), data)
    return TokenEstimate(size, round(size / bytes_per_token) + documents, False, n_vocab)


def _bytes_per_token(chunks: list[list[Span]], data: "Data") -> float:
    """Return bytes of files per token, from chunks that are spread evenly over the corpus."""
    tokenizer = load_tokenizer(data.tokenizer)
    size = 0.0
    tokens = 0
    for piece in sample(chunks):
        size += piece.size
        has_eot = data.append_eot and piece.starts and piece.ends
        tokens += len(tokenizer.encode(piece.text)) + has_eot
    return size / tokens if tokens > 0 else BYTES_PER_TOKEN


def sample(chunks: list[list[Span]]) -> Iterator[Piece]:
    """Return pieces of at most `SAMPLE_BYTES` from the beginnings of `SAMPLES` chunks."""
    for spans in chunks[:: max(1, len(chunks) // SAMPLES)][:SAMPLES]:
        room = float(SAMPLE_BYTES)
        for piece in _pieces(spans):
            # A text that cannot be cut may be one piece of many megabytes.
            text = piece.text[:SAMPLE_BYTES]
            size = piece.size * len(text) / max(1, len(piece.text))
            yield replace(piece, text=text, size=size)
            room -= piece.size or len(text)  # the size of a packed piece is not known
            if room <= 0:
                break


def _pieces(spans: list[Span]) -> Iterator[Piece]:
    for span in spans:
        yield from read_pieces(replace(span, end=min(span.end, span.start + SAMPLE_BYTES)))
